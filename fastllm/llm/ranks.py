"""Who does what in training: in one process, or in several that share every batch and, if they are to, the model.

All processes together take the step that one would. A model is whole on every process ("ddp"), or each keeps a slice of
its parameters, gradients and optimizer ("fsdp"); either way several processes can share the positions of one sequence
(ring attention). Checkpoints are whole and do not show how many processes there were.
"""

import contextlib
import dataclasses
import itertools
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fastllm.nn import Shards, sequence_parallel


@dataclasses.dataclass(frozen=True)
class StandIn:
    """What a rank computes and nobody counts, for every rank must take part: a batch has fewer rows than shares."""

    batch: Any


class Ranks:
    """The only process of a training run; `Processes` has what several do differently. All call every method."""

    rank, ranks = 0, 1
    lockstep = False  # whether all must call the model equally often, in evaluation too

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def check(self, batch: int, accumulate: int):
        """Raises ValueError where batches of so many rows cannot be shared equally."""

    def batches(self, batches, step: int, accumulate: int) -> list:
        """What this rank computes of a step, which all ranks together take `accumulate` batches for; where there is
        nothing left for it, a `StandIn`."""
        return [batches[n] for n in range(step * accumulate, (step + 1) * accumulate)]

    def sums(self, *numbers) -> list[float]:
        """Each number, summed over the ranks; those that have the same rows count once."""
        return [float(x) for x in numbers]

    def tell(self, value):
        """What it is on the first rank."""
        return value

    def gather(self, value) -> list:
        """What it is on each rank, on every rank."""
        return [value]

    def share(self, rows):
        """Of rows that come one by one this rank's part: every so many of them."""
        return itertools.islice(rows, self.rank, None, self.ranks)

    def in_step(self, batches):
        """(batch, whether it counts), of this rank's batches. In lockstep all ranks get as many: one that has no more
        gets its last again, or where it had none another rank's, and those do not count."""
        for batch in batches:
            yield batch, True

    def seed(self, seed: int, number: int) -> int:
        """For what is random in one batch: ranks with different rows or positions drop out differently."""
        return ((seed * 1_000_003 + number) * 65_537 + self.rank) % 2**63

    def spread(self, model: nn.Module) -> nn.Module:
        """`model` over the ranks; returns what is to be called in training. Make the optimizer afterwards."""
        return model

    def weight(self, count: float, total: float) -> float:
        """What the mean loss over `count` of all `total` things is multiplied with before backward(): the average of
        the ranks' gradients is then the gradient of the mean over all."""
        return count / total

    def accumulating(self, model, more: bool):
        """A context for the forward and backward pass of a batch; behind the last one the gradients are complete."""
        return contextlib.nullcontext()

    def clip(self, parameters, limit: float) -> float:
        """Scale the gradients such that their norm is at most `limit`; what it was."""
        return float(nn.utils.clip_grad_norm_(list(parameters), limit))

    def evaluating(self, model):
        """A context in which the model takes whole sequences on every rank."""
        return contextlib.nullcontext()

    def model_state(self, model) -> dict:
        """The state dict with whole tensors, on the first rank. `model` is here and below the one given to `spread`."""
        return model.state_dict()

    def load_model_state(self, model, state: dict):
        """`state` is read from the first rank; the others may have none."""
        model.load_state_dict(state, strict=False)  # a tied tensor is there once

    def optimizer_state(self, model, optimizer) -> dict:
        """Whole tensors "what.name of the parameter", on the first rank."""
        states = ((name, optimizer.state.get(parameter, {})) for name, parameter in model.named_parameters())
        return {f"{what}.{name}": tensor for name, state in states for what, tensor in state.items()}

    def load_optimizer_state(self, model, optimizer, tensors: dict):
        parameters = dict(model.named_parameters())
        for key, tensor in tensors.items():
            what, _, name = key.partition(".")
            optimizer.state[parameters[name]][what] = tensor


class Processes(Ranks):
    """This process among several that train one model, and have a torch.distributed group.

    sequence_ranks neighbouring ranks have the same rows, and each a part of their positions, cut by `shards`. There are
    `shares` such groups, and over them batches are dealt out: whole ones where a step has enough, else by rows.
    """

    def __init__(self, mode: str = "ddp", sequence_ranks: int = 1, shards: Shards | None = None):
        self.rank, self.ranks, self.mode = dist.get_rank(), dist.get_world_size(), mode
        self.sequence_ranks, self.shares = sequence_ranks, self.ranks // sequence_ranks
        self.lockstep = mode == "fsdp"  # whose ranks gather parameters as one
        self.sequence = None if shards is None else SequenceHooks(shards)

    def check(self, batch: int, accumulate: int):
        if batch % self.shares and accumulate % self.shares:
            raise ValueError(
                f"distributed: a batch of {batch} rows cannot be shared among {self.shares} ranks equally: "
                f"--batch, or else --accumulate, must be a multiple of {self.shares}"
            )

    def batches(self, batches, step: int, accumulate: int) -> list:
        first, share = step * accumulate, self.rank // self.sequence_ranks
        if accumulate % self.shares == 0:
            return [batches[first + n] for n in range(share, accumulate, self.shares)]
        return [part_of(batches[first + n], share, self.shares) for n in range(accumulate)]

    def sums(self, *numbers) -> list[float]:
        total = torch.tensor([float(x) for x in numbers], dtype=torch.float64)
        dist.all_reduce(total)
        return (total / self.sequence_ranks).tolist()

    def tell(self, value):
        found = [value]
        dist.broadcast_object_list(found, src=0)
        return found[0]

    def gather(self, value) -> list:
        found = [None] * self.ranks
        dist.all_gather_object(found, value)
        return found

    def in_step(self, batches):
        if not self.lockstep:
            yield from super().in_step(batches)
            return
        batches, last = iter(batches), None
        while True:
            batch = next(batches, None)
            states = self.gather((batch is not None, last is None))
            if not any(has for has, _ in states):
                return
            if any(not has and new for has, new in states):
                others = self.gather(batch)
                last = next(other for other in others if other is not None)
            last = last if batch is None else batch
            yield last, batch is not None

    def spread(self, model: nn.Module) -> nn.Module:
        if self.sequence is not None:
            self.sequence.register(model)
        if self.mode == "ddp":
            return nn.parallel.DistributedDataParallel(model)
        from torch.distributed import fsdp

        # Blocks hand on what they add as views of it; nothing changes those in place.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        mesh = dist.init_device_mesh(next(model.parameters()).device.type, (self.ranks,))
        for layer in layers(model):
            fsdp.fully_shard(layer, mesh=mesh)
        fsdp.fully_shard(model, mesh=mesh)
        for name in ("encode", "decode", "generate"):  # other ways into the model than forward
            if hasattr(model, name):
                fsdp.register_fsdp_forward_method(model, name)
        return model

    def weight(self, count: float, total: float) -> float:
        return self.shares * count / total

    @contextlib.contextmanager
    def accumulating(self, model, more: bool):
        if not more:
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
        norm = nn.utils.clip_grad_norm_(list(parameters), limit)
        return float(norm.full_tensor() if self.mode == "fsdp" else norm)

    @contextlib.contextmanager
    def evaluating(self, model):
        with contextlib.nullcontext() if self.sequence is None else self.sequence.off(model):
            yield
        if self.mode == "fsdp":  # a forward pass without a backward one leaves whole what is in no layer
            model.reshard()

    def model_state(self, model) -> dict:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        if self.mode == "ddp":
            return super().model_state(model) if self.first else {}
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        once = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}  # gathering has untied tensors
        return {name: tensor for name, tensor in state.items() if name in once}

    def load_model_state(self, model, state: dict):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
        set_model_state_dict(model, state, options=options)

    def optimizer_state(self, model, optimizer) -> dict:
        from torch.distributed.tensor import DTensor

        if self.mode == "ddp":
            return super().optimizer_state(model, optimizer) if self.first else {}
        found = {}
        for key, tensor in super().optimizer_state(model, optimizer).items():  # of all ranks, in one order
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if self.first:
                found[key] = whole.cpu()
        return found

    def load_optimizer_state(self, model, optimizer, tensors: dict):
        from torch.distributed.tensor import DTensor, distribute_tensor

        parameters = dict(model.named_parameters())
        sizes = self.tell({key: (tensor.shape, tensor.dtype) for key, tensor in tensors.items()})
        for key, (shape, dtype) in sizes.items():
            what, _, name = key.partition(".")
            parameter = parameters[name]
            whole = tensors[key] if self.first else torch.empty(shape, dtype=dtype)
            if isinstance(parameter, DTensor) and shape == parameter.shape:
                whole = whole.to(parameter.device)
                optimizer.state[parameter][what] = distribute_tensor(whole, parameter.device_mesh, parameter.placements)
            else:
                optimizer.state[parameter][what] = self.tell(whole)


def part_of(batch, share: int, shares: int):
    """A share of the rows of a batch, the first ones being larger where they cannot be equal; or a `StandIn`."""
    count = len(next(tensors(batch)))
    return rows(batch, share, shares) if count > share else StandIn(rows(batch, 0, count))


def tensors(batch):
    if isinstance(batch, torch.Tensor):
        yield batch
    elif dataclasses.is_dataclass(batch):
        yield from tensors([getattr(batch, f.name) for f in dataclasses.fields(batch)])
    elif isinstance(batch, (dict, tuple, list)):
        for x in batch.values() if isinstance(batch, dict) else batch:
            yield from tensors(x)


def rows(batch, share: int, shares: int):
    """A share of a batch's rows: of a tensor, or of each tensor in a dataclass, tuple, list or dict."""
    if isinstance(batch, torch.Tensor):
        return batch.tensor_split(shares)[share]
    if dataclasses.is_dataclass(batch):
        fields = {f.name: rows(getattr(batch, f.name), share, shares) for f in dataclasses.fields(batch)}
        return dataclasses.replace(batch, **fields)
    if isinstance(batch, dict):
        return {name: rows(x, share, shares) for name, x in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)(rows(x, share, shares) for x in batch)
    return batch


def layers(module: nn.Module):
    """The members of the outermost lists of modules: the layers of a stack, which FSDP gathers one at a time."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from layers(child)


class SequenceHooks:
    """Lets a model take whole sequences, compute this rank's part of their positions, and return its share of the loss:
    the mean over the ranks is the loss of the whole."""

    def __init__(self, shards: Shards):
        self.shards, self.on, self.share = shards, True, None

    def register(self, model):
        sequence_parallel(model, self.shards)
        model.register_forward_pre_hook(self.cut, with_kwargs=True)
        model.register_forward_hook(self.weigh)

    def cut(self, model, args, kwargs):
        if not self.on:
            return None
        cut = {name: self.shard(x) for name, x in kwargs.items()}
        if (targets := cut.get("targets")) is not None:
            counted, whole = int((targets != -100).sum()), int((kwargs["targets"] != -100).sum())
            self.share = self.shards.ranks * counted / max(1, whole)
            if not counted:  # a mean over nothing is NaN: one target stands in, with weight 0
                targets[:1, :1] = 0
        return tuple(map(self.shard, args)), cut

    def shard(self, x):
        return self.shards.shard(x) if isinstance(x, torch.Tensor) and x.ndim == 2 else x

    def weigh(self, model, args, loss):
        return loss * self.share if self.on and loss.ndim == 0 else loss

    @contextlib.contextmanager
    def off(self, model):
        self.on = False
        sequence_parallel(model, None)
        try:
            yield
        finally:
            self.on = True
            sequence_parallel(model, self.shards)
