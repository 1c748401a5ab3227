"""Attention, forward and backward."""

import functools
import math
import operator

import torch

from fastllm import reference
from fastllm.dispatch import Op, choose, cpu_op, differentiable_again, direct, is_free
from fastllm.ops._common import (
    FLOATS,
    apart,
    as_4d,
    autocast,
    check_broadcast,
    check_dropout,
    check_tensor,
    drop_all,
    gradients_through,
    is_dense,
    no_fp64,
    wants_gradient,
)


def _heads_like(x, D):
    """An empty [B, H, T, D] in the memory order of x: heads inside positions where x is a view of [B, T, H, D]."""
    B, H, T, _ = x.shape
    if x.stride(1) < x.stride(2):
        return x.new_empty(B, T, H, D).transpose(1, 2)
    return x.new_empty(B, H, T, D)


def _fwd_fake(q, k, v, mask, bias, alibi_slopes, sink, seed, scale, softcap, q_offset, left, right, dropout_p):
    # lse is fp64 between the two passes: in fp32 its rounding would be the largest error of the gradients.
    return _heads_like(q, v.shape[-1]), q.new_empty(q.shape[:3], dtype=torch.float64)


def _bwd_fake(do, dlse, q, k, v, o, lse, mask, bias, alibi_slopes, sink, *options):
    bias_grad = bias is not None and options[-2]
    return (
        _heads_like(q, q.shape[-1]),
        _heads_like(k, k.shape[-1]),
        _heads_like(v, v.shape[-1]),
        (q if bias is None else bias).new_empty(bias.shape if bias_grad else 0),
        q.new_empty(0) if sink is None else sink.new_empty(sink.shape),
    )


OPTIONS = (
    "Tensor? mask, Tensor? bias, Tensor? alibi_slopes, Tensor? sink, Tensor? seed, float scale, float softcap,"
    " SymInt q_offset, SymInt window_left, SymInt window_right, float dropout_p"
)
attention_fwd = Op(
    f"attention_fwd(Tensor q, Tensor k, Tensor v, {OPTIONS}) -> (Tensor o, Tensor lse)",
    "attention",
    _fwd_fake,
)
attention_bwd = Op(
    f"attention_bwd(Tensor do, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, {OPTIONS},"
    " bool bias_grad, bool partial)"  # partial: k and v are some of the keys that o and lse are of
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dsink)",
    "attention",
    _bwd_fake,
)
attention_plain = cpu_op(
    "attention_plain(Tensor q, Tensor k, Tensor v, float scale, SymInt q_offset, SymInt window_left,"
    " SymInt window_right) -> Tensor",
    lambda q, k, v, *options: _heads_like(q, v.shape[-1]),
)


def _again(do, q, k, v, scale, q_offset, window_left, window_right):
    options = dict(scale=scale, q_offset=q_offset, window_left=window_left, window_right=window_right)
    return gradients_through(functools.partial(reference.attention, **options), (q, k, v), (do, None))


differentiable_again(
    "attention_again(Tensor do, Tensor q, Tensor k, Tensor v, float scale, SymInt q_offset, SymInt window_left,"
    " SymInt window_right) -> (Tensor dq, Tensor dk, Tensor dv)",
    _again,
)
_at_once = direct("attention")


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, mask, bias, alibi_slopes, sink, seed, options, plain, return_lse, backend):
        o, lse = attention_fwd(backend, q, k, v, mask, bias, alibi_slopes, sink, seed, *options)
        extra = () if plain else (mask, bias, alibi_slopes, sink, seed)
        ctx.save_for_backward(q, k, v, o, lse, *extra)
        ctx.options, ctx.backend = options, backend
        ctx.set_materialize_grads(False)
        return (o, lse) if return_lse else o

    @staticmethod
    def backward(ctx, do, dlse=None):
        q, k, v, o, lse, *extra = ctx.saved_tensors
        extra = extra or (None,) * 5
        mask, bias, alibi_slopes, sink, seed = extra
        if torch.is_grad_enabled():
            scale, softcap, q_offset, left, right, dropout_p = ctx.options

            def function(q, k, v, bias, sink):
                return reference.attention(
                    q,
                    k,
                    v,
                    scale=scale,
                    softcap=softcap,
                    mask=mask,
                    bias=bias,
                    alibi_slopes=alibi_slopes,
                    sink=sink,
                    q_offset=q_offset,
                    window_left=left,
                    window_right=right,
                    dropout_p=dropout_p,
                    seed=seed,
                )

            dq, dk, dv, dbias, dsink = gradients_through(function, (q, k, v, bias, sink), (do, dlse))
        else:
            do = torch.zeros_like(o) if do is None else do
            bias_grad = ctx.needs_input_grad[4]
            dq, dk, dv, dbias, dsink = attention_bwd(
                ctx.backend, do, dlse, q, k, v, o, lse, *extra, *ctx.options, bias_grad, False
            )
            dbias = dbias if bias_grad else None
            dsink = None if sink is None else dsink
        return dq, dk, dv, None, dbias, None, dsink, *(None,) * 5


def attention(
    q,
    k,
    v,
    *,
    causal=False,
    window=None,
    q_offset=None,
    scale=None,
    softcap=0.0,
    mask=None,
    bias=None,
    alibi_slopes=None,
    sink=None,
    dropout_p=0.0,
    return_lse=False,
):
    """o = softmax(s) v with s = softcap(scale * q k^T) + bias - slope * |i + q_offset - j|, over the visible keys.

    q [B, H, T, D], k [B, Hkv, S, D], v [B, Hkv, S, Dv]; H is a multiple of Hkv and keys are never repeated in memory
    (GQA, MQA). One dtype of fp32, bf16, fp16, fp64, under autocast brought to its own; any strides. Returns o
    [B, H, T, Dv] in the memory order of q, or (o, lse) with lse [B, H, T] in fp32 (fp64 for fp64), the natural
    log-sum-exp of s, differentiable.

    Query i stands at key position i + q_offset; the default S - T aligns the last query with the last key (as
    flash-attn), 0 the first with the first (as torch). causal: keys at positions up to the query's.
    window=(left, right): from `left` before to `right` after it, inclusive; None or -1: unbounded; causal caps right.
    scale defaults to D^-0.5; softcap c > 0 makes scores c * tanh(s / c). mask: boolean, True = attend, broadcasts to
    [B, H, T, S]. bias: additive, broadcasts the same way. alibi_slopes [H] or [B, H]. sink [H]: one more score per
    head that takes probability and has no value. dropout_p drops probabilities (lse does not see it; all of them at 1,
    which makes o 0): which ones follows from a seed that torch's generator draws (torch.manual_seed), the same on every
    backend; nothing is stored.
    A query that sees no key gives o = 0, lse = -inf, gradients 0.

    Scores, probabilities and sums are in fp32 (fp64 for fp64). Saves q, k, v, o, 8 bytes a row: nothing of size T x S.
    Raises TypeError for dtypes (a float mask is told about bias=), ValueError for shapes, devices and ranges.
    Error: at most 1.1 times that of torch's scaled_dot_product_attention in q's dtype (tests/test_attention.py).
    Source: Dao 2023, arXiv:2307.08691; Rabe and Staats 2021, arXiv:2112.05682.
    """
    plain = mask is bias is alibi_slopes is sink is None and dropout_p == softcap == 0
    if plain and window is q_offset is scale is None and not return_lse and is_free():
        o = _at_once(q, k, v, causal)
        if o is not None:
            return o
    if isinstance(q, torch.Tensor):
        q, k, v = autocast(q, k, v)
    _check(q, k, v)
    options = check_options("attention", q, k, v, causal, window, q_offset, scale, softcap, dropout_p)
    if not plain:
        (B, H, T, _), S = q.shape, k.shape[2]
        if mask is not None:
            mask = check_mask("attention", mask, q, (B, H, T, S))
        if bias is not None:
            check_tensor("attention", "bias", bias)
            if bias.device != q.device:
                raise ValueError(f"attention: bias must be on {q.device} like q, got {bias.device}")
            check_broadcast("attention", "bias", bias, (B, H, T, S))
            bias = as_4d(bias)
        head_tensors("attention", q, B, H, alibi_slopes, sink)
        if dropout_p == 1:
            v, dropout_p = drop_all(v)
            options["dropout_p"] = dropout_p
    seed = torch.randint(2**62, (), device=q.device) if dropout_p else None
    backend = choose("attention", q, lambda backend: _kernels_lack(backend, q, v, dropout_p))
    if backend == "reference":
        o, lse = reference.attention(
            q, k, v, mask=mask, bias=bias, alibi_slopes=alibi_slopes, sink=sink, seed=seed, **options
        )
    elif wants_gradient(q, k, v, bias, sink):
        found = _Attention.apply(
            *apart(q, k, v), mask, bias, alibi_slopes, sink, seed, tuple(options.values()), plain, return_lse, backend
        )
        if not return_lse:
            return found
        o, lse = found
    elif plain and not return_lse and backend == "cpu" and attention_plain:
        scale, _, q_offset, left, right, _ = options.values()
        return attention_plain(q, k, v, scale, q_offset, left, right)
    else:
        o, lse = attention_fwd(backend, q, k, v, mask, bias, alibi_slopes, sink, seed, *options.values())
    if not return_lse:
        return o
    return o, lse if q.dtype == torch.float64 else lse.float()


def _kernels_lack(backend, q, v, dropout_p):
    """`unsupported` for dispatch.choose."""
    if backend == "cpu":
        return None
    if backend == "cuda" and q.dtype not in (torch.bfloat16, torch.float16):
        return f"{q.dtype}: the CUDA C++ kernels are made for the 16-bit matrix units"
    if backend == "cuda" and max(q.shape[-1], v.shape[-1]) > 128:
        return "the CUDA C++ kernels take head sizes up to 128"
    if backend == "cuda" and dropout_p:
        return "dropout_p: the CUDA C++ kernels do not have it"
    fp64 = no_fp64(q)
    return fp64 and fp64(backend)


def _check(q, k, v):
    tensors = isinstance(q, torch.Tensor) and isinstance(k, torch.Tensor) and isinstance(v, torch.Tensor)
    if tensors and q.dtype is k.dtype is v.dtype and q.dtype in FLOATS and q.ndim == k.ndim == v.ndim == 4:
        if q.is_cpu and k.is_cpu and v.is_cpu and is_dense(q) and is_dense(k) and is_dense(v):
            return  # most calls that are small enough for the time that checks take
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor("attention", name, x, like=None if name == "q" else q)
        if x.ndim != 4:
            raise ValueError(f"attention: {name} must be [B, H, T, D], got {list(x.shape)}")


def check_options(op, q, k, v, causal, window, q_offset, scale, softcap, dropout_p):
    """The shapes of q, k, v [B, H, T, D] and the numbers among the options, the latter in the schema's order."""
    (B, H, T, D), (Bk, Hkv, S, Dk), (Bv, Hv, Sv, Dv) = q.shape, k.shape, v.shape
    if (Bk, Bv) != (B, B) or Hkv != Hv or S != Sv:
        raise ValueError(
            f"{op}: k and v must agree in [B, Hkv, S] and have q's B, "
            f"got q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
        )
    if D != Dk or D == 0 or Dv == 0:
        raise ValueError(f"{op}: q and k must have one head size D >= 1, got {D} and {Dk} (v has {Dv})")
    if H and (Hkv == 0 or H % Hkv):
        raise ValueError(f"{op}: q's {H} heads must be a multiple of k's {Hkv} heads")
    check_dropout(op, dropout_p)
    if softcap is None or softcap < 0 or not math.isfinite(softcap):
        raise ValueError(f"{op}: softcap must be 0 (off) or positive, got {softcap}")
    if isinstance(scale, torch.Tensor) and scale.requires_grad:
        raise TypeError(f"{op}: scale is a number and gets no gradient: multiply q by a scale that is trained")
    left, right = _window(op, window)
    right = 0 if causal and right < 0 else min(right, 0) if causal else right
    return dict(
        scale=D**-0.5 if scale is None else float(scale),
        softcap=float(softcap),
        q_offset=S - T if q_offset is None else _offset(op, q_offset),
        window_left=left,
        window_right=right,
        dropout_p=float(dropout_p),
    )


def check_mask(op, mask, q, shape):
    """The boolean mask in four dimensions."""
    if isinstance(mask, torch.Tensor) and mask.dtype in FLOATS:
        raise TypeError(f"{op}: mask must be bool (True = attend), got {mask.dtype}: give additive scores as bias=")
    check_tensor(op, "mask", mask, like=q, dtypes=(torch.bool,))
    check_broadcast(op, "mask", mask, shape)
    return as_4d(mask)


def _offset(op, q_offset):
    """q_offset, of which a tensor of one integer is taken too."""
    if isinstance(q_offset, torch.SymInt):
        return q_offset
    try:
        number = operator.index(q_offset)
    except TypeError:
        raise TypeError(f"{op}: q_offset must be an integer, got {q_offset!r}") from None
    if abs(number) >= 2**40:
        raise ValueError(f"{op}: q_offset must be between -2^40 and 2^40, got {number}")
    return number


def _window(op, window):
    """(left, right) with -1 for unbounded."""
    if window is None:
        return -1, -1
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise ValueError(f"{op}: window must be (left, right), got {window!r}")
    sides = tuple(-1 if side is None else side for side in window)
    if any(not isinstance(side, (int, torch.SymInt)) or side < -1 for side in sides):
        raise ValueError(f"{op}: window sides must be integers >= 0, or -1 or None for unbounded, got {window!r}")
    return sides


def head_tensors(op, q, B, H, alibi_slopes, sink):
    """Checks the options that have a number per head."""
    for name, x, shapes in (("alibi_slopes", alibi_slopes, [(H,), (B, H)]), ("sink", sink, [(H,)])):
        if x is not None:
            check_tensor(op, name, x)
            if x.device != q.device:
                raise ValueError(f"{op}: {name} must be on {q.device} like q, got {x.device}")
            if tuple(x.shape) not in shapes:
                wanted = " or ".join(str(list(s)) for s in shapes)
                raise ValueError(f"{op}: {name} must be {wanted}, got {list(x.shape)}")
