"""Cases of layer_norm and rms_norm."""

import torch.nn.functional as F

import fastllm
from fastllm import reference
from fastllm.bench.cases.case import Case, both


def norm(op, N, D, *, residual=False):
    """layer_norm or rms_norm of N rows of D values, with weight (and bias), perhaps after adding a residual."""
    eps = {"layer_norm": 1e-5, "rms_norm": 1e-6}[op]
    plain, ours, naive = getattr(F, op), getattr(fastllm, op), getattr(reference, op)
    weights = {"weight": (D,), "bias": (D,)} if op == "layer_norm" else {"weight": (D,)}

    def split(inputs):
        return (inputs[0], inputs[1], inputs[2:]) if residual else (inputs[0], None, inputs[1:])

    def rival(*inputs):
        x, r, w = split(inputs)
        h = x if r is None else x + r
        y = plain(h, (D,), *w, eps=eps)
        return y if r is None else (y, h)

    def with_function(function):
        def call(*inputs):
            x, r, w = split(inputs)
            return function(x, *w, eps=eps, residual=r)

        return call

    rows, each = N * D, 2 if residual else 1  # a residual is one more tensor in and one more out, both ways
    return Case(
        op=op,
        name=f"{N}x{D}" + " residual" * residual,
        shapes={"x": (N, D)} | ({"residual": (N, D)} if residual else {}) | weights,
        outputs=("y", "h") if residual else ("y",),
        ours=with_function(ours),
        torch=rival,
        naive=with_function(naive),
        flops=both({"forward": 7.0 * rows, "backward": 11.0 * rows}),
        values=both({"forward": 2 * each * rows, "backward": (3 + residual) * rows}),
    )
