"""PyTorch's attention function: [..., H, T, D], causal aligned top-left."""

import math

import torch

from fastllm.ops._common import check_tensor
from fastllm.ops.attention import attention


def scaled_dot_product_attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):
    """torch.nn.functional.scaled_dot_product_attention: query [..., T, D], key and value [..., S, D] broadcast.

    is_causal is aligned top-left, as there. attn_mask is boolean (True = attend) or additive, then with its gradient;
    it broadcasts to [..., T, S]. With enable_gqa the third dimension from the end may be smaller in key and value by
    a whole factor. A query that sees no key gives 0. Raises ValueError for an attn_mask beside is_causal. The rest is
    `fastllm.attention`.
    """
    if is_causal and attn_mask is not None:
        raise ValueError("scaled_dot_product_attention: attn_mask must be None where is_causal is set")
    try:
        if enable_gqa and key.shape[-3:-2] != value.shape[-3:-2]:  # each by its own factor
            key, value = (_for_each_head(x, query.shape[-3]) for x in (key, value))
        flat, lead = _as_heads(query, key, value, enable_gqa)
    except (AttributeError, RuntimeError):  # what is no tensor or a nested one
        for name, x in (("query", query), ("key", key), ("value", value)):
            check_tensor("scaled_dot_product_attention", name, x)
        raise
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


def _for_each_head(x, heads):
    if heads % max(x.shape[-3], 1):
        raise ValueError(f"scaled_dot_product_attention: query's {heads} heads must be a multiple of {x.shape[-3]}")
    return x.repeat_interleave(heads // max(x.shape[-3], 1), -3)


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
