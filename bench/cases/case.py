"""What a case is: one call of an op at one size, its cost, and who can do it."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

PASSES = ("forward", "backward", "both")


@dataclass(frozen=True)
class Case:
    """One call of an op. `flops` and `values` are the arithmetic and the memory traffic that nobody can avoid."""

    op: str
    name: str
    shapes: dict[str, tuple]  # of the floating inputs, in order
    ours: Callable
    torch: Callable  # PyTorch's own kernel: the peer of the accuracy rule and the rival that counts
    naive: Callable  # the same in plain PyTorch operations, from fastllm.reference
    flops: dict[str, float]  # pass -> floating point operations; an op without a backward pass has "forward" alone
    values: dict[str, int]  # pass -> values of the dtype read and written
    outputs: tuple[str, ...] = ("y",)
    peer: Callable | None = None  # of the accuracy rule, where `torch` computes something else
    compiled: Callable | None = None  # what torch.compile is given, where that is not `torch`
    fixed_bytes: int = 0  # read besides, whatever the dtype: packed weights
    part: Callable = field(default=lambda x: x)  # the share of an input or output that is checked against fp64

    def inputs(self, dtype, device="cpu", seed=0) -> list[torch.Tensor]:
        random = torch.Generator(device).manual_seed(seed)
        made = [torch.randn(shape, generator=random, device=device) for shape in self.shapes.values()]
        return [x.to(dtype) for x in made]

    def bytes(self, passes: str, dtype) -> int:
        return self.values[passes] * dtype.itemsize + self.fixed_bytes * (2 if passes == "both" else 1)

    def written(self, passes: str, dtype) -> float:
        """The share of `bytes` that is written, not read: outputs forward, gradients backward."""
        inputs = sum(math.prod(shape) for shape in self.shapes.values())
        forward = max(0, self.values["forward"] - inputs)
        number = {"forward": forward, "backward": inputs, "both": forward + inputs}[passes]
        return min(1.0, number * dtype.itemsize / self.bytes(passes, dtype))

    def __str__(self):
        return f"{self.op} {self.name}"


def both(costs: dict) -> dict:
    return costs | {"both": costs["forward"] + costs["backward"]}
