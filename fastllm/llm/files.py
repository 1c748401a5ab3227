"""Files and folders that appear under their name only when they are complete and on the disk."""

import os
import shutil
import sqlite3
import tempfile
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic(path, mode="w"):
    """Open a file that appears under its name only when it is complete."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
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

    A folder that has the name already is replaced: it is moved aside, and removed when the other has its place.
    What safetensors and SQLite say of a disk that is full becomes an OSError.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
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
            shutil.rmtree(aside)
        else:
            temporary.rename(path)
        sync(path.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, sqlite3.OperationalError) or type(error).__name__ == "SafetensorError":
            raise OSError(str(error)) from error
        raise


def check_free(command: str, out, *, fresh=False, mark="config.json", source=None):
    """Raise ValueError where `command` must not put a folder at `out`: a file, a folder with anything in it, unless
    `fresh` and it has the file `mark`, by which the command knows its own, or one that holds `source`, which it reads.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"{command}: {out} is a file; --out names a folder")
    if not out.exists() or not any(out.iterdir()):
        return
    elsewhere = "--out names another folder"
    if source is not None and Path(source).resolve().is_relative_to(out.resolve()):
        raise ValueError(f"{command}: {out} is what is read; {elsewhere}")
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
