"""The folder of a training run: checkpoints that survive kill -9 and a full disk, and what happened at every step.

run.json              what was asked for
history.jsonl         a line for each step and each evaluation
step-000100/          a model folder (see checkpoint.py), with the optimizer in training.safetensors and, in
                      training.json, where the run stood and a digest of every file
best -> step-000080   of the checkpoint with the best evaluation
"""

import contextlib
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

from fastllm.llm import require
from fastllm.llm.checkpoint import read_tensors, steps, write_model
from fastllm.llm.files import atomic, atomic_folder, reason_of, sync, writing

OWN = ("best", "history.jsonl", "result.json", "tensorboard")
LEFT = (".step-*", ".best*", *(f".{n}.*" for n in ("run.json", "history.jsonl", "result.json", "adapter", "merged")))


class Run:
    """One run folder. `keep` checkpoints are kept, the latest ones, and the best.

    resume=True goes on with what is there, fresh=True throws it away; without either, a folder that has a run in it is
    an error, as is one that another process trains in. settings is plain values, kept in run.json; on resuming, those
    that are not named in `free` must be what they were. One process of several has writes=True, which makes the folder
    ready and must be first; the others only read. Raises ValueError, or OSError where the disk is full.
    """

    def __init__(self, folder, settings=None, *, resume=False, fresh=False, keep=2, free=(), writes=True):
        self.folder, self.keep, self.settings = Path(folder), max(1, keep), settings or {}
        self.resumed, self.writes, self._history, self._lock = resume, writes, None, None
        if writes:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = lock(self.folder)
            self._begin(resume, fresh, free)

    def _begin(self, resume, fresh, free):
        there = (self.folder / "run.json").exists()
        if there and not resume and not fresh:
            last = [path.name for path in steps(self.folder)[-1:]] or ["no checkpoint yet"]
            cure = "--resume goes on, --fresh throws it away, --out names another folder"
            raise ValueError(f"{self.folder} has a run in it ({last[0]}): {cure}")
        if resume and not there:
            raise ValueError(f"{self.folder} has no run in it to resume")
        for left in [path for pattern in LEFT for path in self.folder.glob(pattern)]:  # of a process that was killed
            remove(left)
        if resume:
            self._compare(json.loads((self.folder / "run.json").read_text("utf-8")), free)
        else:
            for path in [*steps(self.folder), *map(self.folder.joinpath, OWN)]:
                remove(path)
        with atomic(self.folder / "run.json") as file:
            json.dump(self.settings, file, indent=1)

    def _compare(self, before: dict, free):
        for name in sorted(before.keys() | self.settings.keys()):
            was, now = before.get(name), json.loads(json.dumps(self.settings.get(name)))
            if name not in free and was != now:
                raise ValueError(f"{self.folder} was begun with {name}={was}, it cannot be resumed with {now}")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self._history is not None:
            with contextlib.suppress(OSError):  # what is not yet written is behind the last checkpoint
                self._history.close()
        if self._lock is not None:
            self._lock.close()

    # --- checkpoints ---

    def save(self, step: int, model, tokenizer, training: dict, tensors: dict, *, state=None, best=False, **meta):
        """Write step-NNNNNN, let `best` point to it where it is the best, and remove those that are not kept.

        training is plain values, tensors the optimizer's; state is as in `checkpoint.save_model`. Raises OSError in one
        line where it cannot be written: then what was there before is what there is.
        """
        folder = self.folder / step_name(step)
        try:
            self._flush()
            with atomic_folder(folder) as temporary:
                write_model(temporary, model, tokenizer, state=state, **meta)
                safetensors = require("safetensors.torch", "safetensors")
                safetensors.save_file(tensors, temporary / "training.safetensors")
                files = {path.name: digest(path) for path in sorted(temporary.iterdir())}
                with atomic(temporary / "training.json") as file:
                    json.dump(dict(step=step, files=files) | training, file)
        except OSError as error:
            what = f"{folder} could not be written: {reason_of(error) or ' '.join(str(error).split())}"
            kept = [path.name for path in steps(self.folder)]
            there = f"{kept[-1]} is complete, and --resume goes on from it" if kept else "there is no checkpoint"
            raise OSError(f"{what}; {there}") from None
        if best:
            point(self.folder / "best", folder.name)
        kept = {path.name for path in steps(self.folder)[-self.keep :]} | {self.best_name()}
        for path in steps(self.folder):
            if path.name not in kept:
                aside = path.with_name(f".{path.name}.old")  # a half-removed folder must not look like a checkpoint
                path.rename(aside)
                shutil.rmtree(aside)

    def best_name(self) -> str | None:
        best = self.folder / "best"
        return os.readlink(best) if best.is_symlink() else None

    def latest(self):
        """(training, tensors, state of the model) of the last checkpoint that is whole, or None where there is none.

        One that is damaged is named on stderr and left aside as `damaged-step-...`. Raises ValueError where all are.
        """
        found = steps(self.folder)
        for path in reversed(found):
            try:
                training, tensors, state = read_checkpoint(path)
            except ValueError as error:
                if self.writes:
                    print(f"{path} is damaged and left aside: {error}", file=sys.stderr)
                    path.rename(free_name(path.with_name(f"damaged-{path.name}")))
                continue
            best = training.get("best")
            if not self.writes:
                pass
            elif best and (self.folder / step_name(best["step"])).exists():
                point(self.folder / "best", step_name(best["step"]))
            else:  # it was damaged, or the process was killed before the first one
                training["best"] = None
                (self.folder / "best").unlink(missing_ok=True)
            return training, tensors, state
        if found:
            raise ValueError(f"{self.folder}: none of its {len(found)} checkpoints is whole")
        return None

    def best_state(self) -> dict:
        """The parameters of `best`."""
        return read_tensors(self.folder / "best" / "model.safetensors")

    # --- history ---

    def history(self, upto: int) -> list[dict]:
        """The lines up to step `upto`; those behind it, of a run that was killed, are dropped from the file."""
        path, kept = self.folder / "history.jsonl", []
        if path.exists():
            with open(path, encoding="utf-8") as file:
                for line in file:
                    with contextlib.suppress(ValueError):  # the last line may be cut short
                        kept.append(json.loads(line))
        kept = [line for line in kept if line["step"] <= upto]
        if self.writes:
            with atomic(path) as file:
                file.writelines(json.dumps(line) + "\n" for line in kept)
        return kept

    def log(self, line: dict):
        if self._history is None:
            self._history = open(self.folder / "history.jsonl", "a", encoding="utf-8")
        with writing(self.folder / "history.jsonl"):
            self._history.write(json.dumps(line) + "\n")

    def _flush(self):
        if self._history is not None:
            self._history.flush()
            sync(self.folder / "history.jsonl")


def add_run_arguments(parser):
    """What every training command says about its folder."""
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    either.add_argument("--fresh", action="store_true", help="throw away what is in --out")


def step_name(step: int) -> str:
    return f"step-{step:06d}"


def read_checkpoint(folder):
    """What `Run.latest` returns, of one folder. Raises ValueError where a file is not what was written."""
    path = Path(folder) / "training.json"
    try:
        training = json.loads(path.read_text("utf-8"))
        for name, written in training["files"].items():
            if digest(path.with_name(name)) != written:
                raise ValueError(f"{name} is not what was written")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(" ".join(str(error).split()) or "training.json is damaged") from None
    return training, *(read_tensors(path.with_name(f"{name}.safetensors")) for name in ("training", "model"))


def digest(path) -> str:
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            found.update(part)
    return found.hexdigest()


def point(link: Path, target: str):
    """Let a symbolic link point to `target`, at once."""
    temporary = link.with_name(f".{link.name}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    os.replace(temporary, link)
    sync(link.parent)


def remove(path: Path):
    """A file, a link or a whole folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def free_name(path: Path) -> Path:
    taken = [path, *(path.with_name(f"{path.name}-{n}") for n in range(2, 1000))]
    return next(candidate for candidate in taken if not candidate.exists())


def lock(folder: Path):
    """Hold a run folder while the file that is returned is open; when the process ends, however it does, it is not."""
    file = open(folder / ".lock", "w")
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows
        pass
    except OSError:
        raise ValueError(f"{folder}: another process is training in it") from None
    return file
