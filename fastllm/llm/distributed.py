"""Training on several processes, as torchrun and accelerate launch start them: who is who, and who does what.

Each process takes its share of every batch, so that all of them together take the step that one process would. A model
is whole on every process ("ddp"), or each keeps a slice of its parameters, gradients and optimizer ("fsdp"); either way
several processes can share the positions of one sequence (ring attention).
"""

import contextlib
import os
import signal
import sys
import warnings
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

from fastllm.llm.files import atomic_folder
from fastllm.nn import Shards, sequence_parallel

MODES = ("ddp", "fsdp")
TIMEOUT = timedelta(minutes=10)  # longer than a checkpoint takes, which the other ranks wait for


@dataclass(frozen=True)
class Ranks:
    """This process among all that train one model; with its defaults, the only one.

    sequence_ranks neighbouring ranks have the same rows and each a part of their positions; batches are cut over the
    data_ranks groups of them.
    """

    rank: int = 0
    ranks: int = 1
    mode: str = "ddp"
    sequence_ranks: int = 1
    shards: Shards | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    @property
    def data_ranks(self) -> int:
        return self.ranks // self.sequence_ranks

    def rows(self, count: int) -> slice:
        """Which of a batch's `count` rows are this rank's."""
        if count % self.data_ranks:
            raise ValueError(
                f"distributed: {count} rows in a batch cannot be shared equally by {self.data_ranks} ranks"
            )
        n, at = count // self.data_ranks, self.rank // self.sequence_ranks
        return slice(at * n, (at + 1) * n)

    def share(self, *tensors):
        """This rank's rows of tensors [B, ...], and its positions of what is [B, T] where a sequence is shared."""
        found = [None if x is None else x[self.rows(len(x))] for x in tensors]
        if self.shards is not None:
            found = [x if x is None or x.ndim < 2 else self.shards.shard(x) for x in found]
        return found

    def check(self, batch: int, length: int | None = None):
        """Raises ValueError for a batch, or a length of its sequences, that cannot be shared."""
        self.rows(batch)
        if self.shards is not None and length is not None:
            self.shards.check(length)

    def sums(self, *numbers) -> list[float]:
        """Each number, summed over all ranks."""
        if self.ranks == 1:
            return [float(x) for x in numbers]
        total = torch.tensor([float(x) for x in numbers], dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def weight(self, count: float, total: float) -> float:
        """What a rank's mean loss over `count` of all `total` tokens is multiplied with before backward(): the average
        of the ranks' gradients is then the gradient of the mean over all tokens."""
        return self.ranks * count / total

    def spread(self, model: nn.Module) -> nn.Module:
        """`model` over the ranks; returns what is to be called in training. Make the optimizer afterwards."""
        if self.shards is not None:
            sequence_parallel(model, self.shards)
        if self.ranks == 1:
            return model
        if self.mode == "ddp":
            return nn.parallel.DistributedDataParallel(model)
        from torch.distributed import fsdp

        # Blocks hand on what they add as views of it; nothing changes those in place.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        mesh = dist.init_device_mesh(self.device.type, (self.ranks,))
        for layer in layers(model):
            fsdp.fully_shard(layer, mesh=mesh)
        fsdp.fully_shard(model, mesh=mesh)
        for name in ("encode", "decode", "generate"):  # other ways into the model than forward
            if hasattr(model, name):
                fsdp.register_fsdp_forward_method(model, name)
        return model

    @contextlib.contextmanager
    def accumulating(self, model: nn.Module, more: bool = True):
        """Inside, backward() of what `spread` returned leaves the gradients unsummed where `more` of them follow."""
        if self.ranks == 1 or not more:
            yield
        elif self.mode == "ddp":
            with model.no_sync():
                yield
        else:
            model.set_requires_gradient_sync(False)
            try:
                yield
            finally:
                model.set_requires_gradient_sync(True)

    def clip(self, parameters, limit: float) -> float:
        """Scale the gradients such that their norm, over all ranks' slices, is at most `limit`; what it was."""
        norm = nn.utils.clip_grad_norm_(list(parameters), limit)
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def seed(self, seed: int, step: int) -> int:
        """Of the random numbers of one step, such that ranks with different rows or positions drop out differently."""
        return (seed * 1_000_003 + step) * 65_537 + self.rank

    @contextlib.contextmanager
    def folder(self, path):
        """`atomic_folder` in which every rank may write files."""
        if self.ranks == 1:
            with atomic_folder(path) as temporary:
                yield temporary
            return
        name = [None]
        with atomic_folder(path) if self.first else contextlib.nullcontext() as temporary:
            name[0] = temporary
            dist.broadcast_object_list(name, src=0)
            yield name[0]
            dist.barrier()
        dist.barrier()  # after it, every rank finds the folder under its name


def layers(module: nn.Module):
    """The members of the outermost lists of modules: the layers of a stack, which FSDP gathers one at a time."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from layers(child)


def full_state(model: nn.Module, ranks: Ranks) -> dict:
    """The state dict with whole tensors, on the CPU; empty but on rank 0. All ranks call it."""
    if ranks.ranks == 1 or ranks.mode == "ddp":
        return {name: x.cpu() for name, x in model.state_dict().items()} if ranks.first else {}
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def save_state(folder, model: nn.Module, optimizer):
    """Write parameters and the optimizer's state, each rank its own slices; all ranks call it."""
    from torch.distributed import checkpoint

    with quiet():
        checkpoint.save(_state(model, optimizer), checkpoint_id=folder)


def load_state(folder, model: nn.Module, optimizer):
    """Read what `save_state` wrote, on any number of ranks, one included, and in either mode."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import set_state_dict

    with quiet():
        state = _state(model, optimizer)
        try:
            checkpoint.load(state, checkpoint_id=folder)
        except (checkpoint.CheckpointException, OSError, KeyError, RuntimeError) as error:
            said = " ".join(str(error).split())
            raise ValueError(f"distributed: {folder} is damaged, or of another model: {said[:300]}") from None
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def _state(model, optimizer) -> dict:
    from torch.distributed.checkpoint.state_dict import get_state_dict

    return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))


@contextlib.contextmanager
def quiet():
    """torch.distributed.checkpoint warns in a process that is alone that it is."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torch.distributed")
        yield


@contextlib.contextmanager
def start(mode: str = "ddp", sequence_ranks: int = 1, sharding: str = "zigzag"):
    """Join the processes that torchrun or accelerate launch started, and give this one's `Ranks`; without those, alone.

    Other ranks than the first print nothing to standard output. When a rank ends, by an error or killed, all do: the
    first that notices raises ConnectionError, or its own error, the others exit with status 1 and without a word.
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
        yield Ranks(device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        return
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    store, rank, count = next(dist.rendezvous("env://", timeout=TIMEOUT))
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, store=dist.PrefixStore("fastllm", store), rank=rank, world_size=count, timeout=TIMEOUT
        )
        shards = None
        if sequence_ranks > 1:
            members = [list(range(at, at + sequence_ranks)) for at in range(0, count, sequence_ranks)]
            group, _ = dist.new_subgroups_by_enumeration(members)
            shards = Shards(group, sharding)
        with contextlib.redirect_stdout(sys.stdout if rank == 0 else open(os.devnull, "w")):
            yield Ranks(rank, count, mode, sequence_ranks, shards, device)
    except BaseException as error:
        if not _speaks_for_all(store):
            raise SystemExit(1) from error
        if lost := _lost_contact(error):
            message = f"rank {rank} of {count} stops: {lost}; --resume continues from the last checkpoint"
            raise ConnectionError(message) from error
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
