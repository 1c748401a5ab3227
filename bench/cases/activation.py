"""Cases of swiglu, geglu and bias_gelu."""

import torch.nn.functional as F

import fastllm
from fastllm import reference
from fastllm.bench.cases.case import Case, both


def gated(op, N, D, *, approximate=None):
    """swiglu or geglu of N rows of D gates and D values."""
    options = {} if approximate is None else {"approximate": approximate}
    activation = {"swiglu": F.silu, "geglu": F.gelu}[op]
    size = N * D
    return Case(
        op=op,
        name=f"{N}x{D}" + (f" {approximate}" if approximate else ""),
        shapes={"gate": (N, D), "up": (N, D)},
        ours=lambda gate, up: getattr(fastllm, op)(gate, up, **options),
        torch=lambda gate, up: activation(gate, **options) * up,
        naive=lambda gate, up: getattr(reference, op)(gate, up, **options),
        flops=both({"forward": 20.0 * size, "backward": 28.0 * size}),
        values=both({"forward": 3 * size, "backward": 5 * size}),
    )


def bias_gelu(N, D, *, approximate):
    """gelu of N rows of D, after adding a bias."""
    size = N * D
    return Case(
        op="bias_gelu",
        name=f"{N}x{D} {approximate}",
        shapes={"x": (N, D), "bias": (D,)},
        ours=lambda x, bias: fastllm.bias_gelu(x, bias, approximate=approximate),
        torch=lambda x, bias: F.gelu(x + bias, approximate=approximate),
        naive=lambda x, bias: reference.bias_gelu(x, bias, approximate=approximate),
        flops=both({"forward": 20.0 * size, "backward": 28.0 * size}),
        values=both({"forward": 2 * size, "backward": 3 * size}),
    )
