"""rope: rotary positions of queries and keys."""

import torch

from fastllm import reference
from fastllm.dispatch import Op, choose
from fastllm.ops._common import apart, check_tensor, no_fp64, wants_gradient


def _like_heads(x):
    """An empty tensor like x [B, H, T, D] in its memory order: heads inside positions, or positions inside heads."""
    B, H, T, D = x.shape
    if x.stride(1) < x.stride(2):
        return x.new_empty(B, T, H, D).transpose(1, 2)
    return x.new_empty(B, H, T, D)


rope_fwd = Op(
    "rope_fwd(Tensor q, Tensor? k, Tensor cos, Tensor sin, Tensor? offsets, Tensor? cu_seqlens, SymInt offset,"
    " bool interleaved, bool whole, bool inverse) -> (Tensor q_rotated, Tensor k_rotated)",
    "rope",
    lambda q, k, *options: (_like_heads(q), q.new_empty(0) if k is None else _like_heads(k)),
)


class _Rope(torch.autograd.Function):
    """The rotation is linear: its gradient is the inverse rotation, which this function is too."""

    @staticmethod
    def forward(ctx, q, k, tables, options, inverse, backend):
        ctx.options, ctx.inverse, ctx.backend = options, inverse, backend
        ctx.save_for_backward(*tables)
        ctx.set_materialize_grads(False)
        return rope_fwd(backend, q, k, *tables, *options, inverse)

    @staticmethod
    def backward(ctx, dq, dk):
        pair = [x if x.stride(-1) == 1 else x.contiguous() for x in (dq, dk) if x is not None]
        pair = pair + [None] * (2 - len(pair))
        if pair[0] is not None:
            pair = _rotate(*pair, ctx.saved_tensors, ctx.options, not ctx.inverse, ctx.backend)
        dq, dk = pair if dq is not None else pair[::-1]
        return dq, dk, None, None, None, None


def _rotate(q, k, tables, options, inverse, backend):
    """q and k (or None) [B, H, T, D] turned, or turned back; tables are cos, sin, offsets, cu_seqlens."""
    if wants_gradient(q, k):
        turned = _Rope.apply(*apart(q, k), tables, options, inverse, backend)
    else:
        turned = rope_fwd(backend, q, k, *tables, *options, inverse)
    return turned[0], None if k is None else turned[1]


def rope(q, k, cos, sin, *, interleaved=False, offset=0, cu_seqlens=None, rotary_dim=None):
    """Turns every pair (a, b) of a head at position p to (a cos[p] - b sin[p], b cos[p] + a sin[p]).

    q [B, H, T, D] and k [B, Hkv, T, D], or None, in one dtype of fp32, bf16, fp16, fp64; any strides. cos and sin are
    [S, R / 2], a number for each pair: the first R elements of a head are turned, the rest is passed on. [.., D] is a
    number for each element, as Hugging Face's models make them, and so is [.., R] with rotary_dim=R. [B, S, ..] is a
    table for each batch entry. Any of the four dtypes. Pairs are elements i and i + R / 2 (GPT-NeoX, Llama), or 2i and
    2i + 1 where interleaved (GPT-J).

    Element t stands at position t + offset; offset is an integer, or an integer tensor [B] (the lengths of a cache).
    cu_seqlens [sequences + 1] says that q [T, H, D] and k [T, Hkv, D] are packed, as `attention_varlen` takes them: a
    position counts from the beginning of its sequence, and an offset tensor has one for each sequence.

    Returns new tensors like q, or (q, k), in the memory order of their inputs. Computed in fp32 (fp64 for fp64) and
    rounded once. Saves cos and sin alone: the gradient is the inverse rotation. Gradients of cos and sin come from
    plain PyTorch. flash-attn's layout [B, T, H, D] is a transpose(1, 2) away, before and after, which moves nothing.
    Raises TypeError for dtypes and ValueError for shapes that do not match, RuntimeError on CPU for an offset tensor or
    cu_seqlens that leave the tables; a GPU, which is not waited for, passes such positions on unturned.
    Error: at most 1.1 times that of the plain formula in q's dtype (tests/test_rope.py).
    Source: Su et al. 2021, arXiv:2104.09864.
    """
    offsets, offset = (offset, 0) if isinstance(offset, torch.Tensor) else (None, offset)
    packed = cu_seqlens is not None
    whole = _check(q, k, cos, sin, offset, offsets, cu_seqlens, rotary_dim)
    gradients = "gradients of cos and sin" if wants_gradient(cos, sin) else None
    backend = choose("rope", q, (lambda backend: gradients) if gradients else no_fp64(q))
    offsets, cu_seqlens = (None if x is None else x.to(torch.int64).contiguous() for x in (offsets, cu_seqlens))
    if packed:
        q, k = (None if x is None else x.transpose(0, 1).unsqueeze(0) for x in (q, k))
    if backend == "reference":
        turned = reference.rope(
            q,
            k,
            cos,
            sin,
            interleaved=interleaved,
            offset=offset,
            offsets=offsets,
            cu_seqlens=cu_seqlens,
            whole=whole,
        )
        q, k = (turned, None) if k is None else turned
    else:
        q, k = (x if x is None or x.stride(-1) == 1 else x.contiguous() for x in (q, k))
        tables = cos.contiguous(), sin.contiguous(), offsets, cu_seqlens
        q, k = _rotate(q, k, tables, (offset, interleaved, whole), False, backend)
    if packed:
        q, k = (None if x is None else x.squeeze(0).transpose(0, 1) for x in (q, k))
    return q if k is None else (q, k)


INTEGERS = (torch.int64, torch.int32)


def _check(q, k, cos, sin, offset, offsets, cu_seqlens, rotary_dim):
    """Whether the tables have a number for each element."""
    packed = cu_seqlens is not None
    check_tensor("rope", "q", q)
    if q.ndim != (3 if packed else 4) or q.shape[-1] == 0:
        wanted = "[T, H, D]" if packed else "[B, H, T, D]"
        raise ValueError(f"rope: q must be {wanted} with D >= 1, got {list(q.shape)}")
    if k is not None:
        check_tensor("rope", "k", k, like=q)
        if k.ndim != q.ndim or (*k.shape[:1], *k.shape[2:]) != (*q.shape[:1], *q.shape[2:]):
            raise ValueError(f"rope: k must be {list(q.shape)} like q, but for its heads, got {list(k.shape)}")
    B, T, D = 1 if packed else q.shape[0], q.shape[0] if packed else q.shape[2], q.shape[-1]
    check_tensor("rope", "cos", cos)
    check_tensor("rope", "sin", sin, like=cos)
    if cos.device != q.device:
        raise ValueError(f"rope: cos and sin must be on {q.device} like q, got {cos.device}")
    fits = cos.ndim in (2, 3) and cos.shape == sin.shape and (cos.ndim == 2 or cos.shape[0] in (1, B))
    whole = fits and cos.shape[-1] == (D if rotary_dim is None else rotary_dim)
    R = 0 if not fits else cos.shape[-1] * (1 if whole else 2)
    if not fits or not 0 < R <= D or R % 2 or rotary_dim not in (None, R):
        raise ValueError(
            f"rope: cos and sin must be [S, R / 2] with R at most D={D}, or [S, D] with an even D, or [{B}, ..] of"
            f" these, got {list(cos.shape)} and {list(sin.shape)}"
            + ("" if rotary_dim is None else f" with rotary_dim={rotary_dim}")
        )
    if packed:
        check_tensor("rope", "cu_seqlens", cu_seqlens, like=q, dtypes=INTEGERS)
        if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2:
            raise ValueError(f"rope: cu_seqlens must be [sequences + 1], got {list(cu_seqlens.shape)}")
    if offsets is not None:
        check_tensor("rope", "offset", offsets, like=q, dtypes=INTEGERS)
        sequences = len(cu_seqlens) - 1 if packed else B
        if offsets.shape != (sequences,):
            raise ValueError(f"rope: offset must be an integer or [{sequences}], got {list(offsets.shape)}")
    elif isinstance(offset, bool) or not isinstance(offset, (int, torch.SymInt)):
        raise TypeError(f"rope: offset must be an integer or a tensor of integers, got {offset!r}")
    elif offset < 0 or (not packed and offset + T > cos.shape[-2]):
        raise ValueError(
            f"rope: positions {offset} to {offset + T - 1} are outside the tables of {cos.shape[-2]} positions"
        )
    return whole
