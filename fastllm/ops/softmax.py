"""softmax and log_softmax, scaled, masked and causal."""

import torch

from fastllm import reference
from fastllm.dispatch import Op, choose, cpu_op, differentiable_again, direct, is_free
from fastllm.ops._common import as_4d, check_broadcast, check_tensor, no_fp64, wants_gradient


def _like(x):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


softmax_fwd = Op(
    "softmax_fwd(Tensor x, Tensor? mask, float scale, bool causal, bool log) -> Tensor y",
    "softmax",
    lambda x, mask, scale, causal, log: _like(x),
)
softmax_bwd = Op(
    "softmax_bwd(Tensor dy, Tensor y, float scale, bool log) -> Tensor dx",
    "softmax",
    lambda dy, y, scale, log: _like(y),
)
cpu_op(
    "softmax_plain(Tensor x, Tensor? mask, float scale, bool causal, bool log) -> Tensor",
    lambda x, mask, scale, causal, log: _like(x),
)


def _again(dy, y, scale, log):
    if log:  # y is -inf where the mask hides: no gradient flows there
        return scale * torch.where(y > -torch.inf, dy - y.exp() * dy.sum(-1, keepdim=True), 0.0)
    return scale * y * (dy - (y * dy).sum(-1, keepdim=True))


differentiable_again("softmax_again(Tensor dy, Tensor y, float scale, bool log) -> Tensor dx", _again)
_at_once = direct("softmax")


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, mask, scale, causal, log, backend):
        y = softmax_fwd(backend, x, mask, scale, causal, log)
        ctx.save_for_backward(y)
        ctx.scale, ctx.log, ctx.backend = scale, log, backend
        return y

    @staticmethod
    def backward(ctx, dy):
        (y,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            dx = _again(dy, y, ctx.scale, ctx.log)
        else:
            dx = softmax_bwd(ctx.backend, dy.contiguous(), y, ctx.scale, ctx.log)
        return dx, None, None, None, None, None


def _forward(x, mask, scale, causal, log, backend):
    return softmax_fwd(backend, x, mask, scale, causal, log)


def softmax(x, dim=-1, *, scale=1.0, mask=None, causal=False):
    """y = exp(scale * x - max) / sum exp(scale * x - max) along `dim`, over what `mask` and `causal` leave.

    x of any shape in fp32, bf16, fp16 or fp64. mask is boolean, True = keep, and broadcasts to x. causal needs
    x [..., T, S] and dim=-1: row i sees columns up to i + S - T (bottom-right, as attention does). Returns y like x; a
    row that sees nothing is 0 and has gradient 0. Computed in fp32 (fp64 for fp64) and rounded once.
    Saves y for the backward pass.
    Raises TypeError for other dtypes and a mask that is not boolean, ValueError for a mask that does not broadcast, a
    dim that x does not have and causal where it has no meaning.
    Error: at most 1.1 times that of torch.softmax in x's dtype (tests/test_softmax.py).
    Source: Milakov and Gimelshein 2018, arXiv:1805.02867.
    """
    return _softmax("softmax", x, dim, scale, mask, causal, log=False)


def log_softmax(x, dim=-1, *, scale=1.0, mask=None, causal=False):
    """y = scale * x - log sum exp(scale * x) along `dim`; what is hidden gives -inf and gradient 0.

    Arguments, dtypes, precision, errors and source are those of `softmax`. Saves y for the backward pass.
    Error: at most 1.1 times that of torch.log_softmax in x's dtype (tests/test_softmax.py).
    """
    return _softmax("log_softmax", x, dim, scale, mask, causal, log=True)


def _softmax(op, x, dim, scale, mask, causal, log):
    if mask is None and dim == -1 and not causal and is_free():
        y = _at_once(x, scale, log)
        if y is not None:
            return y
    check_tensor(op, "x", x)
    if not -x.ndim <= dim < x.ndim:
        raise ValueError(f"{op}: dim must be in [{-x.ndim}, {x.ndim}) for x {list(x.shape)}, got {dim}")
    last = dim % x.ndim == x.ndim - 1
    if causal and (x.ndim < 2 or not last):
        raise ValueError(f"{op}: causal needs x [..., T, S] and dim=-1, got x {list(x.shape)} and dim={dim}")
    if mask is not None:
        check_tensor(op, "mask", mask, like=x, dtypes=(torch.bool,))
        check_broadcast(op, "mask", mask, x.shape)
    backend = choose(op, x, no_fp64(x))
    shape = x.shape
    if not last:
        mask = None if mask is None else mask.expand(shape).movedim(dim, -1)
        x = x.movedim(dim, -1)
    if backend == "reference":
        y = reference.softmax(x, scale=scale, mask=mask, causal=causal, log=log)
    else:
        moved, run = x.shape, _Softmax.apply if wants_gradient(x) else _forward
        if backend == "cpu" and mask is None and not causal:
            y = run(x.contiguous(), None, scale, False, log, backend)
        else:
            if x.ndim > 4:
                mask = None if mask is None else mask.expand(moved).flatten(0, -4)
                x = x.flatten(0, -4)
            mask = None if mask is None else as_4d(mask)
            y = run(as_4d(x).contiguous(), mask, scale, causal, log, backend).view(moved)
    return y if last else y.movedim(-1, dim)
