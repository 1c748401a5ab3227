"""flash-attn's attention functions and padding: heads inside positions [B, T, H, D], causal aligned bottom-right."""

import inspect

import torch
import torch.nn.functional as F

from fastllm.ops._common import check_tensor
from fastllm.ops.attention import attention
from fastllm.ops.kvcache import attention_with_kvcache
from fastllm.ops.varlen import attention_varlen


def with_signature_of(function, *changed, without=()):
    """Decorator: the signature of `function`, with parameters `changed` in the place of those in `without`.

    Callers pass these by position, and help() says which they are.
    """
    ours = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in changed]
    theirs = [p for name, p in inspect.signature(function).parameters.items() if name not in without]

    def decorate(packed):
        packed.__signature__ = inspect.Signature(ours + theirs)
        return packed

    return decorate


def _unpacked(op, name, x, parts, ndim):
    """The parts of x [..., parts, H, D]."""
    check_tensor(op, name, x)
    if x.ndim != ndim or x.shape[-3] != parts:
        leading = "total" if ndim == 4 else "B, T"
        raise ValueError(f"{op}: {name} must be [{leading}, {parts}, H, D], got {list(x.shape)}")
    return x.unbind(-3)


def flash_attn_func(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """flash-attn's function of this name: q [B, T, H, D], k and v [B, S, Hkv, D]; returns [B, T, H, D].

    Causal and window are aligned bottom-right. return_attn_probs=True returns (out, lse [B, H, T], None): probabilities
    are never in memory. Results are deterministic whether asked or not. The rest is `fastllm.attention`.
    """
    o, lse = attention(
        *(x.transpose(1, 2) for x in (q, k, v)),
        causal=causal,
        window=window_size,
        scale=softmax_scale,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        dropout_p=dropout_p,
        return_lse=True,
    )
    o = o.transpose(1, 2)
    return (o, lse, None) if return_attn_probs else o


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    """flash-attn's function of this name: q [total_q, H, D], k and v [total_k, Hkv, D]; returns [total_q, H, D].

    return_attn_probs=True returns (out, lse [H, total_q], None). Raises ValueError for a block_table: keys in pages are
    not taken here. The rest is `fastllm.attention_varlen`.
    """
    if block_table is not None:
        raise ValueError("flash_attn_varlen_func: a block_table (keys and values in pages) is not supported")
    o, lse = attention_varlen(
        q,
        k,
        v,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        causal=causal,
        window=window_size,
        scale=softmax_scale,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        dropout_p=dropout_p,
        return_lse=True,
    )
    return (o, lse, None) if return_attn_probs else o


@with_signature_of(flash_attn_func, "q", "kv", without=("q", "k", "v"))
def flash_attn_kvpacked_func(q, kv, *options, **named):
    """`flash_attn_func` with keys and values in one tensor kv [B, S, 2, Hkv, D]."""
    return flash_attn_func(q, *_unpacked("flash_attn_kvpacked_func", "kv", kv, 2, 5), *options, **named)


@with_signature_of(flash_attn_func, "qkv", without=("q", "k", "v"))
def flash_attn_qkvpacked_func(qkv, *options, **named):
    """`flash_attn_func` with all three in one tensor qkv [B, T, 3, H, D]."""
    return flash_attn_func(*_unpacked("flash_attn_qkvpacked_func", "qkv", qkv, 3, 5), *options, **named)


@with_signature_of(flash_attn_varlen_func, "q", "kv", without=("q", "k", "v", "block_table"))
def flash_attn_varlen_kvpacked_func(q, kv, *options, **named):
    """`flash_attn_varlen_func` with keys and values in one tensor kv [total_k, 2, Hkv, D]."""
    return flash_attn_varlen_func(q, *_unpacked("flash_attn_varlen_kvpacked_func", "kv", kv, 2, 4), *options, **named)


LENGTHS = "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"


@with_signature_of(
    flash_attn_varlen_func, "qkv", "cu_seqlens", "max_seqlen", without=("q", "k", "v", *LENGTHS, "block_table")
)
def flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, max_seqlen, *options, **named):
    """`flash_attn_varlen_func` with all three in one tensor qkv [total, 3, H, D]."""
    parts = _unpacked("flash_attn_varlen_qkvpacked_func", "qkv", qkv, 3, 4)
    return flash_attn_varlen_func(*parts, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, *options, **named)


def flash_attn_with_kvcache(
    q,
    k_cache,
    v_cache,
    k=None,
    v=None,
    rotary_cos=None,
    rotary_sin=None,
    cache_seqlens=None,
    cache_batch_idx=None,
    cache_leftpad=None,
    block_table=None,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    rotary_interleaved=True,
    alibi_slopes=None,
    num_splits=0,
    return_softmax_lse=False,
):
    """flash-attn's function of this name: q [B, T, H, D], caches [B, S, Hkv, D], or pages [pages, page, Hkv, D].

    k and v [B, T_new, Hkv, D] are written into the caches behind cache_seqlens (an int or [B]; without it a cache is
    full). Returns [B, T, H, D], or (out, lse [B, H, T]). Raises ValueError for cache_batch_idx and cache_leftpad, and
    for a rotation of several queries that are not causal, which flash-attn turns as if all stood at one position. The
    rest is `fastllm.attention_with_kvcache`.
    """
    if cache_batch_idx is not None or cache_leftpad is not None:
        raise ValueError("flash_attn_with_kvcache: cache_batch_idx and cache_leftpad are not supported")
    if rotary_cos is not None and q.shape[1] > 1 and not causal and tuple(window_size) == (-1, -1):
        raise ValueError("flash_attn_with_kvcache: several rotated queries must be causal or have a window")
    if cache_seqlens is None:
        cache_seqlens = k_cache.shape[1]
    heads = [None if x is None else x.transpose(1, 2) for x in (q, k_cache, v_cache, k, v)]
    o, lse = attention_with_kvcache(
        *heads,
        cache_seqlens=cache_seqlens,
        block_table=block_table,
        cos=rotary_cos,
        sin=rotary_sin,
        rope_interleaved=rotary_interleaved,
        causal=causal,
        window=window_size,
        scale=softmax_scale,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        return_lse=True,
    )
    o = o.transpose(1, 2)
    return (o, lse) if return_softmax_lse else o


def unpad_input(hidden_states, attention_mask, unused_mask=None):
    """flash-attn's: the rows of hidden_states [B, T, ...] that attention_mask [B, T] keeps, packed as [total, ...].

    Returns (packed, indices [total] into B * T, cu_seqlens [B + 1] int32, longest length, lengths [B] that
    attention_mask alone keeps); rows of unused_mask [B, T] are packed too. Differentiable.
    """
    kept = attention_mask if unused_mask is None else attention_mask + unused_mask
    lengths = kept.sum(-1, dtype=torch.int32)
    indices = kept.flatten().nonzero().flatten()
    cu_seqlens = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    longest = int(lengths.max()) if len(lengths) else 0
    packed = hidden_states.flatten(0, 1).index_select(0, indices)
    return packed, indices, cu_seqlens, longest, attention_mask.sum(-1, dtype=torch.int32)


def pad_input(hidden_states, indices, batch, seqlen):
    """flash-attn's: the packed rows [total, ...] at their indices of [batch, seqlen, ...], 0 elsewhere."""
    rest = hidden_states.shape[1:]
    padded = hidden_states.new_zeros(batch * seqlen, *rest).index_copy(0, indices, hidden_states)
    return padded.view(batch, seqlen, *rest)
