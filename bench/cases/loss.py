"""Cases of cross_entropy, alone and with the head before it."""

import torch
import torch.nn.functional as F

import fastllm
from fastllm import reference
from fastllm.bench.cases.case import Case, both


def targets(N, V, ignored=0.0):
    """int64 [N], a share of them -100."""
    random = torch.Generator().manual_seed(2)
    target = torch.randint(V, (N,), generator=random)
    return target.masked_fill(torch.rand(N, generator=random) < ignored, -100)


def cross_entropy(N, V, *, ignored=0.0, **options):
    """The loss of N rows of V logits, with options that torch has; costs are those of no row ignored."""
    target = targets(N, V, ignored)
    size = N * V
    return Case(
        op="cross_entropy",
        name=f"{N}x{V}" + f" ignoring {ignored:.0%}" * bool(ignored) + "".join(f" {k} {v}" for k, v in options.items()),
        shapes={"x": (N, V)},
        outputs=("loss",),
        ours=lambda x: fastllm.cross_entropy(x, target.to(x.device), **options),
        torch=lambda x: F.cross_entropy(x, target.to(x.device), **options),
        naive=lambda x: reference.cross_entropy(x, target.to(x.device), **options),
        flops=both({"forward": 5.0 * size, "backward": 4.0 * size}),
        values=both({"forward": size, "backward": 2 * size}),
    )


def linear_cross_entropy(N, D, V, *, bias=False, ignored=0.0, **options):
    """The loss of N hidden states of D values under a head of V classes, forward and backward 3 products."""
    target = targets(N, V, ignored)
    size, inputs = N * V, N * D + V * D

    def head(x, w, b=None):
        return F.cross_entropy(F.linear(x, w, b), target.to(x.device), **options)

    def with_function(function):
        return lambda x, w, b=None: function(x, w, target.to(x.device), linear_bias=b, **options)

    return Case(
        op="linear_cross_entropy",
        name=f"{N}x{D}x{V}"
        + f" ignoring {ignored:.0%}" * bool(ignored)
        + "".join(f" {k} {v}" for k, v in options.items()),
        shapes={"x": (N, D), "linear_weight": (V, D)} | ({"linear_bias": (V,)} if bias else {}),
        outputs=("loss",),
        ours=with_function(fastllm.linear_cross_entropy),
        torch=head,
        naive=with_function(reference.linear_cross_entropy),
        flops=both({"forward": 2.0 * D * size, "backward": 4.0 * D * size}),
        values=both({"forward": inputs, "backward": 2 * inputs}),
    )
