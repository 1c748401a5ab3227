"""Trying a module's own forward on a few numbers, to recognise by its results what somebody wrote out in PyTorch."""

import copy
import math

import torch
from torch import nn


def numbers(*shape, first=0, dtype=torch.float64, device="cpu"):
    """Numbers in [-2, 2] without a pattern, other ones from another `first`; the random generators are left alone."""
    i = torch.arange(first, first + math.prod(shape), dtype=torch.float64)
    return (2 * torch.sin(i * i)).view(shape).to(device, dtype)


def same(got, expected) -> bool:
    """Whether two results are one computation.

    Modules may compute in fp32 whatever they are given: right ways to one result then differ by some 1e-6 of it. Wrong
    ways differ by more than ten times the threshold: GELU's tanh form from the exact one by 5e-4 at 2, two halves or
    two neighbours that are taken for each other, a 1 that is added or is not, an eps of another size (the trial has
    rows as small as it) by about as much as the result.
    """
    return got.shape == expected.shape and torch.allclose(got.double(), expected.double(), rtol=1e-5, atol=1e-5)


def bare(module, parts=None):
    """A copy of `module` without hooks, with other submodules where `parts` names them; it shares everything else."""
    probe = copy.copy(module)
    probe.__dict__["_modules"] = {**module._modules, **(parts or {})}
    for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        probe.__dict__[name] = type(getattr(module, name))()
    return probe


def has_hooks(module) -> bool:
    hooks = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
    return any(getattr(module, name) for name in hooks)


class Projection(nn.Module):
    """A linear layer of a few numbers, in the place of one that has many."""

    def __init__(self, inputs, outputs, first, dtype=torch.float64):
        super().__init__()
        self.weight = nn.Parameter(numbers(outputs, inputs, first=first, dtype=dtype), requires_grad=False)
        self.bias = None

    def forward(self, x):
        return nn.functional.linear(x, self.weight)


class Mark(nn.Module):
    """In the place of a dropout: shows where in a forward it stands."""

    def forward(self, x):
        return 2 * x + 1
