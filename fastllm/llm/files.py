"""Files and folders that appear under their name only when they are complete and on the disk."""

import errno
import os
import re
import shutil
import sqlite3
import tempfile
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Unwritten(OSError):
    """`path` could not be written, for a `reason`: the disk is full, or as good as that."""

    def __init__(self, path, reason):
        free = shutil.disk_usage(path.parent).free >> 20
        cure = f"make room ({free:,} MiB are free there), or let --out name a folder on another disk"
        super().__init__(f"{path} could not be written: {reason}; {cure}")
        self.reason = reason


def reason_of(error) -> str | None:
    """What an error says about a disk that is full, None for one that is about something else."""
    if isinstance(error, Unwritten):
        return error.reason
    if isinstance(error, OSError) and error.errno in FULL:
        return error.strerror
    if isinstance(error, sqlite3.OperationalError) or type(error).__name__ == "SafetensorError":
        return " ".join(str(error).split())
    if isinstance(error, OSError) and re.fullmatch(r"\d+ requested and \d+ written", str(error)):  # numpy's
        return "a file ended before all of it was written"
    return None


@contextmanager
def writing(path):
    """What PyTorch's, numpy's, SQLite's and the system's ways say of a full disk in the block becomes `Unwritten`."""
    try:
        yield
    except Exception as error:
        if (reason := reason_of(error)) is None:
            raise
        raise Unwritten(Path(path), reason) from error


@contextmanager
def atomic(path, mode="w"):
    """Open a file that appears under its name only when it is complete."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    with writing(path):
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, mode, **text) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)  # mkstemp's files are their owner's alone
            os.replace(temporary, path)
            sync(path.parent)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


@contextmanager
def atomic_folder(path):
    """Gives an empty folder; what was written into it appears as `path` when the block ends without an error.

    A folder that has the name already is replaced: it is moved aside, and removed when the other has its place. What
    processes left that were killed while they wrote this one is removed. Raises `Unwritten` where the disk is full.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    clear(path)
    with writing(path), temporary_folder(path) as temporary:
        try:
            yield temporary
            for found in sorted(temporary.rglob("*")):
                sync(found)
            sync(temporary)
            temporary.chmod(0o755)
            if path.exists():
                aside = temporary.with_name(temporary.name + ".replaced")
                path.rename(aside)
                temporary.rename(path)
                shutil.rmtree(aside, ignore_errors=True)
            else:
                temporary.rename(path)
            sync(path.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


@contextmanager
def temporary_folder(path):
    """A new folder .NAME.xxxxxxxx beside `path`, which is locked until the block, or the process, ends."""
    while True:
        found = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        with locked(found, wait=True):
            if found.exists():  # else another process took it for a left one before it was locked
                yield found
                return


def clear(path):
    """Remove what killed processes left of `path`; what one had moved aside, but not replaced, is put back."""
    pattern = re.compile(re.escape(f".{path.name}.") + r"\w{8}(\.replaced)?")
    for found in sorted(path.parent.iterdir(), reverse=True):  # .replaced first
        if pattern.fullmatch(found.name):
            with locked(found.with_suffix("") if found.suffix == ".replaced" else found) as free:
                if free and found.suffix == ".replaced" and not path.exists():
                    found.rename(path)
                elif free:
                    shutil.rmtree(found, ignore_errors=True)


@contextmanager
def locked(folder, wait=False):
    """Lock a folder for the block; gives False where another process has it, and where there are no such locks."""
    if fcntl is None:
        yield False
        return
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        yield not folder.exists()
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            free = True
        except OSError:
            free = False
        yield free
    finally:
        os.close(handle)


def check_free(command: str, out, *, fresh=False, mark="config.json", source=None, names=None):
    """Raise ValueError where `command` must not put a folder at `out`: a file, a folder with anything in it, unless
    `fresh` and it has the file `mark`, by which the command knows its own, or one that holds `source`, which it reads.
    With `names`, those that the command writes, a folder with another one in it is not its own.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"{command}: {out} is a file; --out names a folder")
    if not out.exists() or not any(out.iterdir()):
        return
    elsewhere = "--out names another folder"
    if source is not None and Path(source).resolve().is_relative_to(out.resolve()):
        raise ValueError(f"{command}: {out} is what is read; {elsewhere}")
    if foreign := sorted(path.name for path in out.iterdir() if names is not None and path.name not in names):
        raise ValueError(f"{command}: {out} has other files in it, they would be lost ({foreign[0]}); {elsewhere}")
    if not (out / mark).exists():
        raise ValueError(f"{command}: {out} has files in it, and no {mark}: they would be lost; {elsewhere}")
    if not fresh:
        raise ValueError(f"{command}: {out} is there already; --fresh replaces it, {elsewhere}")


def sync(path):
    """Wait until a file, or the list of names in a folder, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
