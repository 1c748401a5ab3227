"""Other libraries' function signatures on fastllm's ops, so that their callers run: flash-attn's, PyTorch's, Liger's.

Layouts, defaults and alignments are those of the library a name comes from: flash-attn keeps heads inside positions
[B, T, H, D] and aligns causal bottom-right; PyTorch keeps [..., H, T, D] and aligns it top-left. Every function runs
on CPU and GPU, forward and backward, also in fp32 and for head sizes that the original refuses.
"""

import importlib.machinery
import importlib.util
import math
import sys
import types

import torch
import torch.nn.functional as F

from fastllm.ops.activation import geglu, swiglu
from fastllm.ops.attention import attention
from fastllm.ops.cross_entropy import cross_entropy
from fastllm.ops.kvcache import attention_with_kvcache
from fastllm.ops.linear_cross_entropy import linear_cross_entropy
from fastllm.ops.norm import layer_norm, rms_norm
from fastllm.ops.rope import rope
from fastllm.ops.softmax import softmax
from fastllm.ops.varlen import attention_varlen

__all__ = [
    "apply_rotary_emb",
    "apply_rotary_pos_emb",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "install_flash_attn",
    "layer_norm_fn",
    "liger_cross_entropy",
    "liger_fused_linear_cross_entropy",
    "liger_geglu",
    "liger_layer_norm",
    "liger_rms_norm",
    "liger_rope",
    "liger_softmax",
    "liger_swiglu",
    "pad_input",
    "rms_norm_fn",
    "scaled_dot_product_attention",
    "uninstall_flash_attn",
    "unpad_input",
]


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


def flash_attn_kvpacked_func(
    q,
    kv,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """`flash_attn_func` with keys and values in one tensor kv [B, S, 2, Hkv, D]."""
    options = dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    return flash_attn_func(q, *kv.unbind(2), *options)


def flash_attn_qkvpacked_func(
    qkv,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """`flash_attn_func` with all three in one tensor qkv [B, T, 3, H, D]."""
    options = dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    return flash_attn_func(*qkv.unbind(2), *options)


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


def flash_attn_varlen_kvpacked_func(
    q,
    kv,
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
):
    """`flash_attn_varlen_func` with keys and values in one tensor kv [total_k, 2, Hkv, D]."""
    lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    options = dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    return flash_attn_varlen_func(q, *kv.unbind(1), *lengths, *options)


def flash_attn_varlen_qkvpacked_func(
    qkv,
    cu_seqlens,
    max_seqlen,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """`flash_attn_varlen_func` with all three in one tensor qkv [total, 3, H, D]."""
    lengths = cu_seqlens, cu_seqlens, max_seqlen, max_seqlen
    options = dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    return flash_attn_varlen_func(*qkv.unbind(1), *lengths, *options)


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


def scaled_dot_product_attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):
    """torch.nn.functional.scaled_dot_product_attention: query [..., T, D], key and value [..., S, D] broadcast.

    is_causal is aligned top-left, as there. attn_mask is boolean (True = attend) or additive, then with its gradient;
    it broadcasts to [..., T, S]. With enable_gqa the third dimension from the end may be smaller in key and value by
    a whole factor. A query that sees no key gives 0. The rest is `fastllm.attention`.
    """
    if is_causal and attn_mask is not None:
        raise ValueError("scaled_dot_product_attention: attn_mask must be None where is_causal is set")
    flat, lead = _as_heads(query, key, value, enable_gqa)
    mask = bias = None
    if attn_mask is not None:
        T, S = query.shape[-2], key.shape[-2]
        if len(lead) > 2:  # batches in several dimensions: as many rows of one
            attn_mask = attn_mask.expand(*lead, T, S).reshape(-1, lead[-1], T, S)
        mask, bias = (attn_mask, None) if attn_mask.dtype == torch.bool else (None, attn_mask)
    o = attention(
        *flat,
        causal=is_causal,
        q_offset=0,
        scale=scale,
        mask=mask,
        bias=bias,
        dropout_p=dropout_p if dropout_p else 0.0,
    )
    return o.reshape(*lead, *o.shape[-2:])


def _as_heads(query, key, value, enable_gqa):
    """The three as [B, H, T, D], and the leading dimensions that the result has instead of [B, H]."""
    if query.ndim == 4 == key.ndim == value.ndim and query.shape[0] == key.shape[0] == value.shape[0]:
        heads, kv_heads = query.shape[1], key.shape[1]
        if heads == kv_heads == value.shape[1] or enable_gqa:
            return (query, key, value), query.shape[:2]
    shared = {tuple(x.shape[:-3]) if enable_gqa else tuple(x.shape[:-2]) for x in (query, key, value)}
    lead = torch.broadcast_shapes(*shared)
    if enable_gqa:
        parts = [x.expand(*lead, *x.shape[-3:]) for x in (query, key, value)]
        return [x.reshape(math.prod(lead), *x.shape[-3:]) for x in parts], (*lead, query.shape[-3])
    parts = [x.expand(*lead, *x.shape[-2:]) for x in (query, key, value)]
    H = lead[-1] if lead else 1
    B = math.prod(lead[:-1]) if lead else 1
    return [x.reshape(B, H, *x.shape[-2:]) for x in parts], lead


def layer_norm_fn(
    x,
    weight,
    bias,
    residual=None,
    x1=None,
    weight1=None,
    bias1=None,
    eps=1e-6,
    dropout_p=0.0,
    rowscale=None,
    prenorm=False,
    residual_in_fp32=False,
    zero_centered_weight=False,
    is_rms_norm=False,
    return_dropout_mask=False,
    out_dtype=None,
    out=None,
    residual_out=None,
):
    """flash-attn's: y = norm(h) * weight + bias with h = dropout(x * rowscale) + dropout(x1) + residual.

    Returns y; (y, y1) with a second weight for the same h; with prenorm also h, as the last. h has residual's dtype,
    and where there is none x's, or fp32 with residual_in_fp32. zero_centered_weight adds 1 to the weights. Addition and
    norm are one kernel. Raises ValueError for return_dropout_mask, and for out and residual_out, whose memory the
    caller would own.
    """
    if return_dropout_mask or out is not None or residual_out is not None:
        raise ValueError("layer_norm_fn: return_dropout_mask, out and residual_out are not supported")
    h = x if rowscale is None else x * rowscale.unsqueeze(-1)
    h = F.dropout(h, dropout_p) if dropout_p else h
    if x1 is not None:
        h = h + (F.dropout(x1, dropout_p) if dropout_p else x1)
    wide = residual.dtype if residual is not None else torch.float32 if residual_in_fp32 else x.dtype
    h = h.to(wide)

    def norm(h, weight, bias, residual=None):
        if is_rms_norm:
            offset = float(zero_centered_weight)
            y = rms_norm(h, weight, eps=eps, residual=residual, weight_offset=offset)
            y, h = (y, h) if residual is None else y
            return (y if bias is None else y + bias), h
        weight = weight + 1 if zero_centered_weight else weight
        y = layer_norm(h, weight, bias, eps=eps, residual=residual)
        return (y, h) if residual is None else y

    y, h = norm(h, weight, bias, None if residual is None else residual.to(wide))
    found = [y] if weight1 is None else [y, norm(h, weight1, bias1)[0]]
    found = [y.to(out_dtype or x.dtype) for y in found] + [h] * prenorm
    return found[0] if len(found) == 1 else tuple(found)


def rms_norm_fn(
    x,
    weight,
    bias,
    residual=None,
    x1=None,
    weight1=None,
    bias1=None,
    eps=1e-6,
    dropout_p=0.0,
    rowscale=None,
    prenorm=False,
    residual_in_fp32=False,
    zero_centered_weight=False,
    return_dropout_mask=False,
    out_dtype=None,
    out=None,
    residual_out=None,
):
    """flash-attn's: `layer_norm_fn` with y = h / rms(h) * weight + bias."""
    return layer_norm_fn(
        x,
        weight,
        bias,
        residual,
        x1,
        weight1,
        bias1,
        eps,
        dropout_p,
        rowscale,
        prenorm,
        residual_in_fp32,
        zero_centered_weight,
        True,
        return_dropout_mask,
        out_dtype,
        out,
        residual_out,
    )


def apply_rotary_emb(x, cos, sin, interleaved=False, inplace=False, seqlen_offsets=0, cu_seqlens=None, max_seqlen=None):
    """flash-attn's: x [B, T, H, D], or packed [total, H, D] with cu_seqlens; cos and sin [S, R / 2].

    seqlen_offsets is an integer or has one for each sequence. inplace=True also writes the result into x. max_seqlen is
    not needed. The rest is `fastllm.rope`.
    """
    if cos.ndim != 2 or 2 * cos.shape[-1] > x.shape[-1]:
        raise ValueError(f"apply_rotary_emb: cos must be [S, R / 2], R at most {x.shape[-1]}, got {list(cos.shape)}")
    options = dict(interleaved=interleaved, offset=seqlen_offsets)
    if cu_seqlens is not None:
        y = rope(x, None, cos, sin, cu_seqlens=cu_seqlens, **options)
    else:
        y = rope(x.transpose(1, 2), None, cos, sin, **options).transpose(1, 2)
    return x.copy_(y) if inplace else y


def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):
    """Hugging Face's: q and k [B, H, T, D] (unsqueeze_dim=1) or [B, T, H, D] (2) turned, cos and sin [B, T, D]."""
    if unsqueeze_dim == 1:
        return rope(q, k, cos, sin)
    if unsqueeze_dim != 2:
        raise ValueError(f"apply_rotary_pos_emb: unsqueeze_dim must be 1 or 2, got {unsqueeze_dim}")
    q, k = rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    return q.transpose(1, 2), k.transpose(1, 2)


def liger_rope(q, k, cos, sin, position_ids=None, unsqueeze_dim=1):
    """Liger's: `apply_rotary_pos_emb`; position_ids are not looked at, there as here."""
    return apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim)


def liger_swiglu(a, b):
    """Liger's: silu(a) * b."""
    return swiglu(a, b)


def liger_geglu(a, b):
    """Liger's: gelu(a) * b, gelu by tanh."""
    return geglu(a, b, approximate="tanh")


def liger_rms_norm(X, W, eps, offset=0.0, casting_mode="llama", in_place=True):
    """Liger's: X / rms(X) * (W + offset). Every casting_mode rounds once, at the end; no gradient is overwritten."""
    return rms_norm(X, W, eps=eps, weight_offset=offset)


def liger_layer_norm(X, W, B, eps):
    """Liger's: layer norm over the last dimension of X."""
    return layer_norm(X, W, B, eps=eps)


def liger_softmax(x):
    """Liger's: softmax over the last dimension."""
    return softmax(x)


def liger_cross_entropy(
    input,
    target,
    weight=None,
    size_average=None,
    ignore_index=-100,
    reduce=None,
    reduction="mean",
    label_smoothing=0.0,
    lse_square_scale=0.0,
    softcap=None,
    return_z_loss=False,
    return_token_accuracy=False,
):
    """Liger's: `fastllm.cross_entropy` with z_loss=lse_square_scale; the logits are not overwritten.

    The z-loss is part of the loss and not returned by itself: return_z_loss=True raises ValueError.
    """
    _without_z_loss("liger_cross_entropy", return_z_loss)
    return cross_entropy(
        input,
        target,
        weight,
        ignore_index,
        reduction,
        label_smoothing,
        softcap=softcap or 0.0,
        z_loss=lse_square_scale,
        return_token_accuracy=return_token_accuracy,
    )


def liger_fused_linear_cross_entropy(
    input,
    weight,
    target,
    bias=None,
    ce_weight=None,
    ignore_index=-100,
    lse_square_scale=0.0,
    label_smoothing=0.0,
    reduction="mean",
    softcap=None,
    return_z_loss=False,
):
    """Liger's: `fastllm.linear_cross_entropy`, weight [V, D] being the head's and ce_weight [V] that of the classes.

    return_z_loss=True raises ValueError, as for `liger_cross_entropy`.
    """
    _without_z_loss("liger_fused_linear_cross_entropy", return_z_loss)
    return linear_cross_entropy(
        input,
        weight,
        target,
        linear_bias=bias,
        weight=ce_weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        softcap=softcap or 0.0,
        z_loss=lse_square_scale,
    )


def _without_z_loss(op, wanted):
    if wanted:
        raise ValueError(f"{op}: return_z_loss is not offered: the z-loss is a part of the loss")


# The modules that code written for flash-attn imports from, and what it finds there.
_FLASH_ATTN = {
    "flash_attn": [name for name in __all__ if name.startswith("flash_attn")],
    "flash_attn.flash_attn_interface": [name for name in __all__ if name.startswith("flash_attn")],
    "flash_attn.bert_padding": ["pad_input", "unpad_input"],
    "flash_attn.layers": [],
    "flash_attn.layers.rotary": ["apply_rotary_emb"],
    "flash_attn.ops": [],
    "flash_attn.ops.triton": [],
    "flash_attn.ops.triton.layer_norm": ["layer_norm_fn", "rms_norm_fn"],
}


def install_flash_attn():
    """Put a stand-in for the package flash_attn into sys.modules, so that code that imports it runs on fastllm.

    Process-wide; `uninstall_flash_attn` takes it out again. Raises RuntimeError where the real package is installed:
    its callers would silently change. Twice is once.
    """
    if isinstance(sys.modules.get("flash_attn"), _StandIn):
        return
    if "flash_attn" in sys.modules or importlib.util.find_spec("flash_attn"):
        raise RuntimeError("install_flash_attn: the real flash_attn is installed here, and would be hidden")
    for name, functions in _FLASH_ATTN.items():
        module = sys.modules[name] = _StandIn(name, "fastllm.compat under flash-attn's names")
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__path__ = []
        module.__version__ = "2.8.3"  # whose signatures these are; callers compare it
        vars(module).update({function: globals()[function] for function in functions})
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, module)


def uninstall_flash_attn():
    """Take the stand-in out of sys.modules; what was imported from it goes on working."""
    for name in _FLASH_ATTN:
        if isinstance(sys.modules.get(name), _StandIn):
            del sys.modules[name]


class _StandIn(types.ModuleType):
    """A module that `install_flash_attn` made."""
