"""How close is close enough: the only tolerance in the project."""

import torch

NORM_SLACK = 1.1
MAX_SLACK = 2.0


def assert_as_accurate(got, peer, truth, what=""):
    """`got` may be hardly further from `truth` (fp64) than `peer`, PyTorch's own kernel in the same dtype.

    The norm of the error may be 1.1 times the peer's, the largest error twice the peer's; to both comes one rounding
    step of the dtype (eps times the norm, or the largest value, of the truth), so that a peer that happens to be exact
    does not ask for equality bit by bit. Infinities must stand where the truth has them; NaN never passes.
    """
    assert got.shape == truth.shape, f"{what}: shape {list(got.shape)}, expected {list(truth.shape)}"
    assert got.dtype == peer.dtype, f"{what}: dtype {got.dtype}, expected {peer.dtype}"
    assert not got.isnan().any(), f"{what}: {int(got.isnan().sum())} of {got.numel()} elements are NaN"
    got, peer, eps = got.detach().double(), peer.detach().double(), torch.finfo(got.dtype).eps
    finite = truth.isfinite()
    assert torch.equal(got[~finite], truth[~finite]), f"{what}: infinities are not where they should be"
    got, peer, truth = got[finite], peer[finite], truth[finite]
    if not truth.numel():
        return
    error, allowed = (got - truth).norm(), NORM_SLACK * (peer - truth).norm() + eps * truth.norm()
    assert error <= allowed, f"{what}: norm of the error {error:.3e}, allowed {allowed:.3e}"
    error, allowed = (got - truth).abs().max(), MAX_SLACK * (peer - truth).abs().max() + eps * truth.abs().max()
    assert error <= allowed, f"{what}: largest error {error:.3e}, allowed {allowed:.3e}"


def run(function, inputs, grads=None, dtype=None):
    """Outputs of `function(*inputs)` and the gradients of every floating input, as two lists.

    `dtype` converts the floating inputs first. `grads` are the upstream gradients, one per output (None: no backward
    pass); an output whose gradient is None takes no part in it.
    """
    leaves = []
    for x in inputs:
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            x = x.detach().to(dtype or x.dtype).requires_grad_(grads is not None)
        leaves.append(x)
    outputs = function(*leaves)
    outputs = list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
    if grads is None:
        return outputs, []
    pairs = [(o, g.to(o.dtype)) for o, g in zip(outputs, grads, strict=True) if g is not None]
    wanted = [x for x in leaves if isinstance(x, torch.Tensor) and x.requires_grad]
    found = torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True)
    return outputs, [torch.zeros_like(x) if g is None else g for x, g in zip(wanted, found, strict=True)]


def compare(function, peer, truth, inputs, grads, dtype):
    """Run `function` and `peer` in `dtype` and `truth` in fp64 on the same (rounded) numbers; hold the rule for each result."""
    rounded = [x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs]
    grads = None if grads is None else [None if g is None else g.to(dtype) for g in grads]
    got = run(function, rounded, grads)
    other = run(peer, rounded, grads)
    exact = run(truth, rounded, grads, dtype=torch.float64)
    for kind, a, b, c in zip(("output", "gradient"), got, other, exact, strict=True):
        for n, (x, y, z) in enumerate(zip(a, b, c, strict=True)):
            assert_as_accurate(x, y, z, f"{kind} {n}")
