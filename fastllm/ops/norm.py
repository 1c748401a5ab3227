"""layer_norm and rms_norm, with the residual addition that precedes them in a transformer block."""

import torch

from fastllm import reference
from fastllm.dispatch import Op, choose
from fastllm.ops._common import check_tensor, gradients_through, no_fp64, wants_gradient


def _rows(x):
    """Where the statistics of x's rows go: fp32 (fp64 for fp64), one per row."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.empty(x.shape[:-1], dtype=wide, device=x.device)


def _like(x, wanted=True):
    return torch.empty(x.shape if wanted else (0,), dtype=x.dtype, device=x.device)


layer_norm_fwd = Op(
    "layer_norm_fwd(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, float eps)"
    " -> (Tensor y, Tensor h, Tensor mean, Tensor rstd)",
    "norm",
    lambda x, weight, bias, residual, eps: (_like(x), _like(x, residual is not None), _rows(x), _rows(x)),
)
layer_norm_bwd = Op(
    "layer_norm_bwd(Tensor dy, Tensor? dh, Tensor h, Tensor? weight, Tensor mean, Tensor rstd, bool has_bias)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias)",
    "norm",
    lambda dy, dh, h, weight, mean, rstd, has_bias: (
        _like(h),
        h.new_empty(0) if weight is None else _like(weight),
        _rows(h).new_empty(h.shape[-1] if has_bias else 0),
    ),
)
rms_norm_fwd = Op(
    "rms_norm_fwd(Tensor x, Tensor? weight, Tensor? residual, float eps, float weight_offset)"
    " -> (Tensor y, Tensor h, Tensor rstd)",
    "norm",
    lambda x, weight, residual, eps, weight_offset: (_like(x), _like(x, residual is not None), _rows(x)),
)
rms_norm_bwd = Op(
    "rms_norm_bwd(Tensor dy, Tensor? dh, Tensor h, Tensor? weight, Tensor rstd, float weight_offset)"
    " -> (Tensor dx, Tensor dweight)",
    "norm",
    lambda dy, dh, h, weight, rstd, weight_offset: (
        _like(h),
        h.new_empty(0) if weight is None else _like(weight),
    ),
)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, residual, eps, backend):
        y, h, mean, rstd = layer_norm_fwd(backend, x, weight, bias, residual, eps)
        ctx.save_for_backward(x if residual is None else h, weight, bias, mean, rstd)
        ctx.fused, ctx.eps, ctx.backend = residual is not None, eps, backend
        ctx.set_materialize_grads(False)
        return (y, h) if ctx.fused else y

    @staticmethod
    def backward(ctx, dy, dh=None):
        h, weight, bias, mean, rstd = ctx.saved_tensors
        if dy is None:
            return dh, None, None, dh if ctx.fused else None, None, None
        if torch.is_grad_enabled():
            dx, dweight, dbias = gradients_through(
                lambda *a: reference.layer_norm(*a, eps=ctx.eps), (h, weight, bias), (dy,)
            )
            dx = dx if dh is None or dx is None else dx + dh
        else:
            dh = None if dh is None else dh.contiguous()
            dx, dweight, dbias = layer_norm_bwd(
                ctx.backend, dy.contiguous(), dh, h, weight, mean, rstd, bias is not None
            )
            dweight = None if weight is None else dweight
            dbias = None if bias is None else dbias.to(bias.dtype)
        return dx, dweight, dbias, dx if ctx.fused else None, None, None


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, residual, eps, weight_offset, backend):
        y, h, rstd = rms_norm_fwd(backend, x, weight, residual, eps, weight_offset)
        ctx.save_for_backward(x if residual is None else h, weight, rstd)
        ctx.fused, ctx.eps, ctx.weight_offset, ctx.backend = residual is not None, eps, weight_offset, backend
        ctx.set_materialize_grads(False)
        return (y, h) if ctx.fused else y

    @staticmethod
    def backward(ctx, dy, dh=None):
        h, weight, rstd = ctx.saved_tensors
        if dy is None:
            return dh, None, dh if ctx.fused else None, None, None, None
        if torch.is_grad_enabled():
            dx, dweight = gradients_through(
                lambda *a: reference.rms_norm(*a, eps=ctx.eps, weight_offset=ctx.weight_offset),
                (h, weight),
                (dy,),
            )
            dx = dx if dh is None or dx is None else dx + dh
        else:
            dh = None if dh is None else dh.contiguous()
            dx, dweight = rms_norm_bwd(ctx.backend, dy.contiguous(), dh, h, weight, rstd, ctx.weight_offset)
            dweight = None if weight is None else dweight
        return dx, dweight, dx if ctx.fused else None, None, None, None


def layer_norm(x, weight=None, bias=None, *, eps=1e-5, residual=None):
    """y = (h - mean(h)) / sqrt(var(h) + eps) * weight + bias over the last dimension, with h = x + residual.

    x [..., D] in fp32, bf16, fp16 or fp64; weight and bias [D] in any of these; residual like x. Returns y like x, or
    (y, h) where a residual is given, h being the sum rounded to x's dtype, which is what the next block adds to.
    The statistics and the normalisation are computed in fp32 (fp64 for fp64), the variance in a second pass over the
    centred row; weight gradients are summed in fp32 in an order that does not depend on the number of threads.
    Saves h (x itself without a residual) and mean and rstd, 8 bytes a row, for the backward pass.
    Raises TypeError for dtypes that do not match, ValueError for shapes or devices that do not.
    Error: at most 1.1 times that of torch.nn.functional.layer_norm in x's dtype (tests/test_norm.py).
    Source: Ba, Kiros and Hinton 2016, arXiv:1607.06450.
    """
    _check("layer_norm", x, weight, bias, residual)
    backend = choose("layer_norm", x, no_fp64(x))
    if backend == "reference":
        return reference.layer_norm(x, weight, bias, eps=eps, residual=residual)
    x, residual = x.contiguous(), None if residual is None else residual.contiguous()
    if wants_gradient(x, weight, bias, residual):
        return _LayerNorm.apply(x, weight, bias, residual, eps, backend)
    y, h, _, _ = layer_norm_fwd(backend, x, weight, bias, residual, eps)
    return y if residual is None else (y, h)


def rms_norm(x, weight=None, *, eps=1e-6, residual=None, weight_offset=0.0):
    """y = h / sqrt(mean(h^2) + eps) * (weight + weight_offset) over the last dimension, with h = x + residual.

    x [..., D] in fp32, bf16, fp16 or fp64; weight [D] in any of these; residual like x. weight_offset=1 is Gemma's
    norm. Returns y like x, or (y, h) where a residual is given, h being the sum rounded to x's dtype.
    Computed in fp32 (fp64 for fp64) and rounded once at the end. Saves h (x itself without a residual) and rstd, 4
    bytes a row, for the backward pass.
    Raises TypeError for dtypes that do not match, ValueError for shapes or devices that do not.
    Error: at most 1.1 times that of torch.nn.functional.rms_norm in x's dtype (tests/test_norm.py).
    Source: Zhang and Sennrich 2019, arXiv:1910.07467.
    """
    _check("rms_norm", x, weight, None, residual)
    backend = choose("rms_norm", x, no_fp64(x))
    if backend == "reference":
        return reference.rms_norm(x, weight, eps=eps, residual=residual, weight_offset=weight_offset)
    x, residual = x.contiguous(), None if residual is None else residual.contiguous()
    if wants_gradient(x, weight, residual):
        return _RMSNorm.apply(x, weight, residual, eps, weight_offset, backend)
    y, h, _ = rms_norm_fwd(backend, x, weight, residual, eps, weight_offset)
    return y if residual is None else (y, h)


def _check(op, x, weight, bias, residual):
    check_tensor(op, "x", x)
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"{op}: x must be [..., D] with D >= 1, got {list(x.shape)}")
    for name, w in (("weight", weight), ("bias", bias)):
        if w is not None:
            check_tensor(op, name, w)
            if w.device != x.device:
                raise ValueError(f"{op}: {name} must be on {x.device} like x, got {w.device}")
            if w.shape != x.shape[-1:]:
                raise ValueError(f"{op}: {name} must be [{x.shape[-1]}] like x's last dimension, got {list(w.shape)}")
    if residual is not None:
        check_tensor(op, "residual", residual, like=x)
        if residual.shape != x.shape:
            raise ValueError(f"{op}: residual must be {list(x.shape)} like x, got {list(residual.shape)}")
