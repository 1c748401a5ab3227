"""Cases of softmax and log_softmax."""

import functools
import math

import torch

import fastllm
from fastllm import reference
from fastllm.bench.cases.case import Case, both


def softmax(*shape, log=False, causal=False, scale=1.0):
    """softmax or log_softmax over the last of `shape`."""
    op = "log_softmax" if log else "softmax"
    T, S = (1, *shape)[-2:]

    @functools.cache
    def hidden(device):
        return torch.ones(T, S, dtype=torch.bool, device=device).triu(S - T + 1)

    def rival(x):
        x = x if scale == 1.0 else x * scale
        x = x.masked_fill(hidden(x.device), -math.inf) if causal else x
        return getattr(torch, op)(x, -1)

    size = math.prod(shape)
    return Case(
        op=op,
        name="x".join(map(str, shape)) + " causal" * causal + (f" scale {scale}" if scale != 1.0 else ""),
        shapes={"x": shape},
        ours=lambda x: getattr(fastllm, op)(x, causal=causal, scale=scale),
        torch=rival,
        naive=lambda x: reference.softmax(x, causal=causal, scale=scale, log=log),
        flops=both({"forward": 5.0 * size, "backward": 4.0 * size}),
        values=both({"forward": 2 * size, "backward": 3 * size}),
        part=lambda x: x[-4096:],  # fp64 copies of more rows would fill a GPU
    )
