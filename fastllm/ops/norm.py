"""layer_norm and rms_norm, with the dropout and residual addition that precede them in a transformer block."""

import functools
import math

import torch

from fastllm import reference
from fastllm.dispatch import Op, choose, cpu_op, differentiable_again, direct, is_free
from fastllm.ops._common import (
    apart,
    check_dropout,
    check_tensor,
    drop_all,
    gradients_through,
    no_fp64,
    promoted,
    wants_gradient,
)


def _rows(x):
    """Where the statistics of x's rows go: fp32 (fp64 for fp64), one per row."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.empty(x.shape[:-1], dtype=wide, device=x.device)


def _like(x, wanted=True):
    return torch.empty(x.shape if wanted else (0,), dtype=x.dtype, device=x.device)


# h is empty where it would be x. Backward's dresidual is empty where it would be dx, which is unless dropout comes
# between the two.
layer_norm_fwd = Op(
    "layer_norm_fwd(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? seed, float eps, float dropout_p)"
    " -> (Tensor y, Tensor h, Tensor mean, Tensor rstd)",
    "norm",
    lambda x, weight, bias, residual, seed, eps, dropout_p: (
        _like(x),
        _like(x, residual is not None or dropout_p > 0),
        _rows(x),
        _rows(x),
    ),
)
layer_norm_bwd = Op(
    "layer_norm_bwd(Tensor dy, Tensor? dh, Tensor h, Tensor? weight, Tensor mean, Tensor rstd, Tensor? seed,"
    " float dropout_p, bool has_bias, bool has_residual)"
    " -> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)",
    "norm",
    lambda dy, dh, h, weight, mean, rstd, seed, dropout_p, has_bias, has_residual: (
        _like(h),
        _like(h, has_residual and dropout_p > 0),
        h.new_empty(0) if weight is None else _like(weight),
        _rows(h).new_empty(h.shape[-1] if has_bias else 0),
    ),
)
layer_norm_plain = cpu_op(
    "layer_norm_plain(Tensor x, Tensor? weight, Tensor? bias, float eps) -> Tensor",
    lambda x, weight, bias, eps: _like(x),
)
rms_norm_fwd = Op(
    "rms_norm_fwd(Tensor x, Tensor? weight, Tensor? residual, Tensor? seed, float eps, float weight_offset,"
    " float dropout_p) -> (Tensor y, Tensor h, Tensor rstd)",
    "norm",
    lambda x, weight, residual, seed, eps, weight_offset, dropout_p: (
        _like(x),
        _like(x, residual is not None or dropout_p > 0),
        _rows(x),
    ),
)
rms_norm_bwd = Op(
    "rms_norm_bwd(Tensor dy, Tensor? dh, Tensor h, Tensor? weight, Tensor rstd, Tensor? seed, float weight_offset,"
    " float dropout_p, bool has_residual) -> (Tensor dx, Tensor dresidual, Tensor dweight)",
    "norm",
    lambda dy, dh, h, weight, rstd, seed, weight_offset, dropout_p, has_residual: (
        _like(h),
        _like(h, has_residual and dropout_p > 0),
        h.new_empty(0) if weight is None else _like(weight),
    ),
)
rms_norm_plain = cpu_op(
    "rms_norm_plain(Tensor x, Tensor? weight, float eps, float weight_offset) -> Tensor",
    lambda x, weight, eps, weight_offset: _like(x),
)


def _layer_norm_again(dy, x, weight, bias, eps):
    return gradients_through(lambda *a: reference.layer_norm(*a, eps=eps), (x, weight, bias), (dy,))


def _rms_norm_again(dy, x, weight, eps, weight_offset):
    function = functools.partial(reference.rms_norm, eps=eps, weight_offset=weight_offset)
    return gradients_through(function, (x, weight), (dy,))


differentiable_again(
    "layer_norm_again(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, float eps)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias)",
    _layer_norm_again,
)
differentiable_again(
    "rms_norm_again(Tensor dy, Tensor x, Tensor? weight, float eps, float weight_offset)"
    " -> (Tensor dx, Tensor dweight)",
    _rms_norm_again,
)
_layer_norm_at_once, _rms_norm_at_once = direct("layer_norm"), direct("rms_norm")


def _input_grads(dh, seed, dropout_p, fused):
    """Gradients of x and the residual where only h = dropout(x) + residual was used."""
    dx = dh
    if dh is not None and dropout_p:
        N = math.prod(dh.shape[:-1])
        keep = reference.dropout_keep(seed, dropout_p, 1, 1, N, dh.shape[-1])
        dx = dh * keep.view(dh.shape).to(dh.dtype)
    return dx, dh if fused else None


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, residual, seed, eps, dropout_p, backend):
        y, h, mean, rstd = layer_norm_fwd(backend, x, weight, bias, residual, seed, eps, dropout_p)
        ctx.save_for_backward(h if residual is not None or dropout_p else x, weight, bias, mean, rstd, seed)
        ctx.fused, ctx.eps, ctx.dropout_p, ctx.backend = residual is not None, eps, dropout_p, backend
        ctx.set_materialize_grads(False)
        return (y, h) if ctx.fused else y

    @staticmethod
    def backward(ctx, dy, dh=None):
        h, weight, bias, mean, rstd, seed = ctx.saved_tensors
        dweight = dbias = None
        if dy is not None and not torch.is_grad_enabled():
            dh = None if dh is None else dh.contiguous()
            options = seed, ctx.dropout_p, bias is not None, ctx.fused
            dx, dresidual, dweight, dbias = layer_norm_bwd(
                ctx.backend, dy.contiguous(), dh, h, weight, mean, rstd, *options
            )
            dresidual = (dresidual if ctx.dropout_p else dx) if ctx.fused else None
            dweight = None if weight is None else dweight
            dbias = None if bias is None else dbias.to(bias.dtype)
        else:
            if dy is not None:
                grad, dweight, dbias = _layer_norm_again(dy, h, weight, bias, ctx.eps)
                dh = grad if dh is None or grad is None else grad + dh
            dx, dresidual = _input_grads(dh, seed, ctx.dropout_p, ctx.fused)
        return dx, dweight, dbias, dresidual, None, None, None, None


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, residual, seed, eps, weight_offset, dropout_p, backend):
        y, h, rstd = rms_norm_fwd(backend, x, weight, residual, seed, eps, weight_offset, dropout_p)
        ctx.save_for_backward(h if residual is not None or dropout_p else x, weight, rstd, seed)
        ctx.fused, ctx.eps, ctx.weight_offset = residual is not None, eps, weight_offset
        ctx.dropout_p, ctx.backend = dropout_p, backend
        ctx.set_materialize_grads(False)
        return (y, h) if ctx.fused else y

    @staticmethod
    def backward(ctx, dy, dh=None):
        h, weight, rstd, seed = ctx.saved_tensors
        dweight = None
        if dy is not None and not torch.is_grad_enabled():
            dh = None if dh is None else dh.contiguous()
            options = seed, ctx.weight_offset, ctx.dropout_p, ctx.fused
            dx, dresidual, dweight = rms_norm_bwd(ctx.backend, dy.contiguous(), dh, h, weight, rstd, *options)
            dresidual = (dresidual if ctx.dropout_p else dx) if ctx.fused else None
            dweight = None if weight is None else dweight
        else:
            if dy is not None:
                grad, dweight = _rms_norm_again(dy, h, weight, ctx.eps, ctx.weight_offset)
                dh = grad if dh is None or grad is None else grad + dh
            dx, dresidual = _input_grads(dh, seed, ctx.dropout_p, ctx.fused)
        return dx, dweight, dresidual, None, None, None, None, None


def layer_norm(x, weight=None, bias=None, *, eps=1e-5, residual=None, dropout_p=0.0):
    """y = (h - mean(h)) / sqrt(var(h) + eps) * weight + bias over the last dimension, with h = dropout(x) + residual.

    x [..., D] in fp32, bf16, fp16 or fp64; weight and bias [D] in any of these; residual like x. Returns y like x, or
    (y, h) where a residual is given, h being the sum rounded to x's dtype, which is what the next block adds to.
    dropout_p drops elements of x and scales the others by 1 / (1 - dropout_p): which ones follows from a seed that
    torch's generator draws (torch.manual_seed), the same on every backend; no mask is stored.
    The statistics and the normalisation are computed in fp32 (fp64 for fp64), the variance in a second pass over the
    centred row; weight gradients are summed in fp32 in an order that does not depend on the number of threads.
    Saves h (x itself where h is x) and mean and rstd, 8 bytes a row, for the backward pass.
    Raises TypeError for dtypes that do not match, ValueError for shapes or devices that do not, or dropout_p.
    Error: at most 1.1 times that of torch.nn.functional.layer_norm in x's dtype (tests/test_norm.py).
    Source: Ba, Kiros and Hinton 2016, arXiv:1607.06450; the numbers: Salmon et al. 2011 (Philox4x32-7).
    """
    if residual is None and dropout_p == 0 and is_free():
        y = _layer_norm_at_once(x, weight, bias, eps)
        if y is not None:
            return y
    x, residual = promoted(x, residual)
    _check("layer_norm", x, weight, bias, residual, dropout_p)
    if dropout_p == 1:
        x, dropout_p = drop_all(x)
    backend = choose("layer_norm", x, _unsupported(x, dropout_p))
    seed = torch.randint(2**62, (), device=x.device) if dropout_p else None
    if backend == "reference":
        return reference.layer_norm(x, weight, bias, eps=eps, residual=residual, dropout_p=dropout_p, seed=seed)
    x, residual = x.contiguous(), None if residual is None else residual.contiguous()
    if wants_gradient(x, weight, bias, residual):
        x, residual = apart(x, residual)
        return _LayerNorm.apply(x, weight, bias, residual, seed, eps, dropout_p, backend)
    if backend == "cpu" and layer_norm_plain and residual is seed is None:
        return layer_norm_plain(x, weight, bias, eps)
    y, h, _, _ = layer_norm_fwd(backend, x, weight, bias, residual, seed, eps, dropout_p)
    return y if residual is None else (y, h)


def rms_norm(x, weight=None, *, eps=1e-6, residual=None, weight_offset=0.0, dropout_p=0.0):
    """y = h / sqrt(mean(h^2) + eps) * (weight + weight_offset) over the last dimension, with h = dropout(x) + residual.

    x [..., D] in fp32, bf16, fp16 or fp64; weight [D] in any of these; residual like x. weight_offset=1 is Gemma's
    norm; dropout_p is that of `layer_norm`. eps is Llama's; torch.nn.functional.rms_norm has 1.2e-7, that of fp32.
    Returns y like x, or (y, h) where a residual is given, h being the sum rounded to x's dtype.
    Computed in fp32 (fp64 for fp64) and rounded once at the end. Saves h (x itself where h is x) and rstd, 4 bytes a
    row, for the backward pass.
    Raises TypeError for dtypes that do not match, ValueError for shapes or devices that do not, or dropout_p.
    Error: at most 1.1 times that of torch.nn.functional.rms_norm in x's dtype (tests/test_norm.py).
    Source: Zhang and Sennrich 2019, arXiv:1910.07467; the numbers: Salmon et al. 2011 (Philox4x32-7).
    """
    if residual is None and dropout_p == 0 and is_free():
        y = _rms_norm_at_once(x, weight, eps, weight_offset)
        if y is not None:
            return y
    x, residual = promoted(x, residual)
    _check("rms_norm", x, weight, None, residual, dropout_p)
    if dropout_p == 1:
        x, dropout_p = drop_all(x)
    backend = choose("rms_norm", x, _unsupported(x, dropout_p))
    seed = torch.randint(2**62, (), device=x.device) if dropout_p else None
    if backend == "reference":
        options = dict(eps=eps, residual=residual, weight_offset=weight_offset, dropout_p=dropout_p, seed=seed)
        return reference.rms_norm(x, weight, **options)
    x, residual = x.contiguous(), None if residual is None else residual.contiguous()
    if wants_gradient(x, weight, residual):
        x, residual = apart(x, residual)
        return _RMSNorm.apply(x, weight, residual, seed, eps, weight_offset, dropout_p, backend)
    if backend == "cpu" and rms_norm_plain and residual is seed is None:
        return rms_norm_plain(x, weight, eps, weight_offset)
    y, h, _ = rms_norm_fwd(backend, x, weight, residual, seed, eps, weight_offset, dropout_p)
    return y if residual is None else (y, h)


def _unsupported(x, dropout_p):
    fp64 = no_fp64(x)
    if not dropout_p or fp64:
        return fp64
    return lambda backend: "dropout_p: the CUDA C++ kernels have no dropout" if backend == "cuda" else None


def _check(op, x, weight, bias, residual, dropout_p):
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
    check_dropout(op, dropout_p)
