"""How close is close enough: the project's only tolerance is `accuracy` in fastllm/verify.py; here it is asserted."""

import torch

from fastllm.verify import accuracy
from fastllm.verify import forward_backward as run


def assert_as_accurate(got, peer, truth, what=""):
    """`got` holds the rule of `fastllm.verify.accuracy` beside `peer`, PyTorch's own kernel in the same dtype."""
    problem = accuracy(got, peer, truth).problem
    assert problem is None, f"{what}: {problem}"


def compare(function, peer, truth, inputs, grads, dtype):
    """Run `function` and `peer` in `dtype`, `truth` in fp64, on the same (rounded) numbers; hold the rule for each."""
    rounded = [x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs]
    grads = None if grads is None else [None if g is None else g.to(dtype) for g in grads]
    got = run(function, rounded, grads)
    other = run(peer, rounded, grads)
    exact = run(truth, rounded, grads, dtype=torch.float64)
    for kind, a, b, c in zip(("output", "gradient"), got, other, exact, strict=True):
        for n, (x, y, z) in enumerate(zip(a, b, c, strict=True)):
            assert_as_accurate(x, y, z, f"{kind} {n}")
