"""Training on several processes, as torchrun and accelerate launch start them: how they begin, and how they end."""

import contextlib
import os
import signal
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from fastllm.llm.ranks import Processes, Ranks
from fastllm.nn import Shards

MODES = ("ddp", "fsdp")
TIMEOUT = timedelta(minutes=10)  # longer than a checkpoint takes, which the other ranks wait for


class SharedRun:
    """A `runs.Run` that rank 0 has and all ranks use: what it reads is told to the others, whose tensors are none."""

    def __init__(self, run, ranks: Ranks):
        self.run, self.ranks = run, ranks
        self.resumed = ranks.tell(run and run.resumed)
        self.folder = ranks.tell(run and run.folder)

    def latest(self):
        found = self.run and self.run.latest()
        training = self.ranks.tell(found and found[0])
        return found or (training and (training, {}, {}))

    def best_state(self) -> dict:
        return self.run.best_state() if self.run else {}

    def history(self, upto: int) -> list[dict]:
        return self.ranks.tell(self.run and self.run.history(upto))

    def save(self, *args, **kwargs):
        self.run.save(*args, **kwargs)

    def log(self, line: dict):
        self.run.log(line)


@contextlib.contextmanager
def shared(ranks: Ranks, open_run):
    """The run that open_run() opens, on rank 0, and its `SharedRun` on all where there are several."""
    with open_run() if ranks.first else contextlib.nullcontext() as run:
        yield run if ranks.ranks == 1 else SharedRun(run, ranks)


@contextlib.contextmanager
def start(
    mode: str = "ddp",
    sequence_ranks: int = 1,
    sharding: str = "zigzag",
    cure="--resume continues from the last checkpoint",
):
    """Join the processes that torchrun or accelerate launch started, and give this one's `Ranks`; without those, alone.

    Other ranks than the first print nothing to standard output. When a rank ends, by an error or killed, all do: the
    first that notices raises ConnectionError, or its own error, the others exit with status 2 and without a word;
    `cure` is what it says can be done then.
    Raises ValueError for settings that do not fit the number of processes.
    """
    count = int(os.environ.get("WORLD_SIZE", 1))
    if mode not in MODES:
        raise ValueError(f"distributed: the mode must be one of {', '.join(MODES)}, got {mode!r}")
    if sequence_ranks < 1 or count % sequence_ranks:
        raise ValueError(
            f"distributed: sequence_ranks={sequence_ranks} must divide the number of processes, {count}"
            + (": start with torchrun --nproc-per-node N -m fastllm ..." if count == 1 else "")
        )
    if count == 1:
        yield Ranks()
        return
    store, rank, count = next(dist.rendezvous("env://", timeout=TIMEOUT))
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        backend = "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
            backend = "cpu:gloo,cuda:nccl"
        own = dist.PrefixStore("fastllm", store)
        dist.init_process_group(backend, store=own, rank=rank, world_size=count, timeout=TIMEOUT)
        shards = None
        if sequence_ranks > 1:
            members = [list(range(at, at + sequence_ranks)) for at in range(0, count, sequence_ranks)]
            group, _ = dist.new_subgroups_by_enumeration(members)
            shards = Shards(group, sharding)
        with contextlib.redirect_stdout(sys.stdout if rank == 0 else open(os.devnull, "w")):
            yield Processes(mode, sequence_ranks, shards)
    except BaseException as error:
        if not _speaks_for_all(store):
            raise SystemExit(2) from error
        if lost := _lost_contact(error):
            raise ConnectionError(f"rank {rank} of {count} stops: {lost}; {cure}") from error
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
        if dist.is_initialized():
            dist.destroy_process_group()


class _Stopped(BaseException):
    """SIGTERM, which launchers send to the other ranks when one has ended."""


def _stop(number, frame):
    raise _Stopped


def _lost_contact(error) -> str | None:
    """What happened to other ranks, if that is why this one stops."""
    if isinstance(error, _Stopped):
        return "the launcher ended it, as it does when another rank has ended"
    said = " ".join(str(error).split())
    if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in said):
        return f"another rank has ended or does not answer ({said[:160]})"
    return None


def _speaks_for_all(store) -> bool:
    """True for the first rank that asks: one message is enough."""
    try:
        store.set_timeout(timedelta(seconds=5))
        return store.add("fastllm-stopped", 1) == 1
    except Exception:  # the store has ended with the rank that kept it
        return True


def add_mode_argument(parser):
    parser.add_argument(
        "--parallel", choices=MODES, default="ddp", help="under torchrun: a whole model per process, or a slice of it"
    )


def add_parallel_arguments(parser):
    """How a training command is spread over the processes that started it."""
    add_mode_argument(parser)
    parser.add_argument("--sequence-ranks", type=int, default=1, help="processes that share each sequence, default 1")
