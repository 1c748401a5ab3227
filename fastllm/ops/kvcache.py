"""Attention with a cache of keys and values: the step of generation that appends, rotates and attends in one call."""

import torch

from fastllm import reference
from fastllm.dispatch import Op, choose, transformed
from fastllm.ops._common import FLOATS, as_4d, check_broadcast, check_tensor, no_fp64, wants_gradient
from fastllm.ops.attention import _heads_like, check_mask, check_options, head_tensors

OP = "attention_with_kvcache"
attention_kvcache_fwd = Op(
    "attention_kvcache_fwd(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor? k_new, Tensor? v_new,"
    " Tensor cache_seqlens, Tensor? block_table, Tensor? cos, Tensor? sin, bool rope_interleaved, Tensor? mask,"
    " Tensor? bias, Tensor? alibi_slopes, Tensor? sink, float scale, float softcap, SymInt? q_offset,"
    " SymInt window_left, SymInt window_right) -> (Tensor o, Tensor lse)",
    "kvcache",
    lambda q, k_cache, v_cache, *rest: (
        _heads_like(q, v_cache.shape[-1]),
        q.new_empty(q.shape[:3], dtype=torch.float64),
    ),
)


def attention_with_kvcache(
    q,
    k_cache,
    v_cache,
    k_new=None,
    v_new=None,
    *,
    cache_seqlens,
    block_table=None,
    cos=None,
    sin=None,
    rope_interleaved=False,
    causal=False,
    window=None,
    q_offset=None,
    scale=None,
    softcap=0.0,
    mask=None,
    bias=None,
    alibi_slopes=None,
    sink=None,
    return_lse=False,
):
    """`attention` of q on the first keys of a cache, after k_new and v_new were written there; forward only.

    q [B, H, T, D]; k_cache [B, Hkv, S_max, D] and v_cache [B, Hkv, S_max, Dv], or, with block_table [B, max_pages]
    (int32 or int64), pages [pages, Hkv, page_size, D] of any page size, of which row j of sequence b is row
    j % page_size of page block_table[b, j // page_size]. cache_seqlens [B] (int32, int64, or one int for all) counts
    the keys before the call; k_new [B, Hkv, T_new, D] and v_new are written after them, IN PLACE: the caches are the
    only inputs of this library that are ever changed. Sequence b then has S_b = cache_seqlens[b] + T_new keys; what
    lies behind them in the cache is never read.

    Query i stands at key position i + q_offset; the default S_b - T makes the last query the last key. cos and sin
    [positions, R / 2] rotate the first R <= D values of q and k_new at their positions (v_new and what is in the cache
    are not rotated): pairs (i, i + R / 2), or (2i, 2i + 1) with rope_interleaved. The other options are those of
    `attention`, without dropout; mask and bias broadcast to [B, H, T, S_max].
    Returns o [B, H, T, Dv], or (o, lse) with lse [B, H, T] in fp32 (fp64 for fp64).

    Precision as `attention`; rotations in fp32, rounded to q's dtype as they are stored. Keys and values are read
    once for all query heads that share them, and cut into ranges of fixed length, so that results do not depend on the
    number of threads. Uses 4 (Dv + 2) bytes per query head, query and 512 keys beside its outputs.
    Raises ValueError for shapes and for caches to be written of which a number is in both or in one of them twice
    (expand), TypeError for dtypes, and RuntimeError where a gradient is wanted (there is no backward pass) and, on CPU,
    before anything is written, where a cache is full or a page does not exist; on a GPU, which nobody waits for, what
    does not fit is left out.
    Error: at most 1.1 times that of torch's scaled_dot_product_attention in q's dtype (tests/test_kvcache.py).
    Source: Dao et al. 2023, Flash-Decoding; Kwon et al. 2023, arXiv:2309.06180 (pages).
    """
    for name, x, like in (("q", q, None), ("k_cache", k_cache, q), ("v_cache", v_cache, q)):
        check_tensor(OP, name, x, like=like)
        if x.ndim != 4:
            raise ValueError(f"{OP}: {name} must have four dimensions, got {list(x.shape)}")
    if wants_gradient(q, k_cache, v_cache, k_new, v_new, bias, sink):
        raise RuntimeError(f"{OP}: there is no backward pass; call it under torch.no_grad(), or use attention")
    B, H, T, _ = q.shape
    if isinstance(cache_seqlens, int):
        cache_seqlens = torch.full((B,), cache_seqlens, dtype=torch.int64, device=q.device)
    check_tensor(OP, "cache_seqlens", cache_seqlens, like=q, dtypes=(torch.int32, torch.int64))
    if tuple(cache_seqlens.shape) != (B,):
        raise ValueError(f"{OP}: cache_seqlens must be [{B}] like q's batch, got {list(cache_seqlens.shape)}")
    S = k_cache.shape[2]
    if block_table is not None:
        check_tensor(OP, "block_table", block_table, like=q, dtypes=(torch.int32, torch.int64))
        if block_table.ndim != 2 or len(block_table) != B:
            raise ValueError(f"{OP}: block_table must be [{B}, max_pages], got {list(block_table.shape)}")
        if not len(k_cache) or len(v_cache) != len(k_cache):
            raise ValueError(f"{OP}: k_cache and v_cache must be as many pages, got {len(k_cache)} and {len(v_cache)}")
        S *= block_table.shape[1]
        block_table = block_table.contiguous()
    _check_new(q, k_cache, v_cache, k_new, v_new)
    _check_angles(q, cos, sin)

    caches = [x if block_table is None else x[:1].expand(B, -1, -1, -1) for x in (k_cache, v_cache)]
    options = check_options(OP, q, *caches, causal, window, q_offset, scale, softcap, 0.0)
    options["q_offset"] = q_offset
    del options["dropout_p"]
    if mask is not None:
        mask = check_mask(OP, mask, q, (B, H, T, S))
    if bias is not None:
        check_tensor(OP, "bias", bias)
        check_broadcast(OP, "bias", bias, (B, H, T, S))
        bias = as_4d(bias)
    head_tensors(OP, q, B, H, alibi_slopes, sink)
    cache_seqlens = cache_seqlens.contiguous()
    arguments = q, k_cache, v_cache, k_new, v_new, cache_seqlens, block_table, cos, sin, rope_interleaved
    backend = choose(OP, q, no_fp64(q))
    if backend == "reference":
        o, lse = reference.attention_with_kvcache(
            *arguments, mask=mask, bias=bias, alibi_slopes=alibi_slopes, sink=sink, **options
        )
    else:
        scale, softcap, offset, left, right = options.values()
        o, lse = attention_kvcache_fwd(
            backend, *arguments, mask, bias, alibi_slopes, sink, scale, softcap, offset, left, right
        )
    if not return_lse:
        return o
    return o, lse if q.dtype == torch.float64 else lse.float()


def _check_new(q, k_cache, v_cache, k_new, v_new):
    if (k_new is None) != (v_new is None):
        raise ValueError(f"{OP}: k_new and v_new come together, got {'v_new' if k_new is None else 'k_new'} alone")
    if k_new is None:
        return
    for name, x, cache in (("k_new", k_new, k_cache), ("v_new", v_new, v_cache)):
        check_tensor(OP, name, x, like=q)
        if any(n > 1 and stride == 0 for n, stride in zip(cache.shape, cache.stride(), strict=True)):
            raise ValueError(
                f"{OP}: {name} cannot be written to a cache of shape {list(cache.shape)} and strides"
                f" {list(cache.stride())}: some of its rows share their memory (expand); clone() it first"
            )
        wanted = (q.shape[0], cache.shape[1], k_new.shape[2] if k_new.ndim == 4 else -1, cache.shape[3])
        if tuple(x.shape) != wanted:
            raise ValueError(
                f"{OP}: {name} must be [B, Hkv, T_new, head size] = [{wanted[0]}, {wanted[1]}, T_new, {wanted[3]}] "
                f"like its cache, got {list(x.shape)}"
            )
    if _share_memory(k_cache, v_cache):
        raise ValueError(
            f"{OP}: k_new and v_new cannot be written: k_cache and v_cache share memory, and one would overwrite the"
            " other; give each its own"
        )


def _share_memory(a, b) -> bool:
    """Whether an element of `a` is one of `b`. Halves of one tensor, or keys beside values, have none in common."""
    if a is b:
        return bool(a.numel())
    if torch.compiler.is_compiling() or transformed():  # there is no storage to ask for
        return False
    if a.untyped_storage()._cdata != b.untyped_storage()._cdata or not (a.numel() and b.numel()):
        return False
    apart = a.storage_offset() - b.storage_offset()
    # a[i] is b[j] where the sum over strides of stride * (steps in b - steps in a) is `apart`
    steps = {}
    for x, sign in ((a, -1), (b, 1)):
        for n, stride in zip(x.shape, x.stride(), strict=True):
            if n > 1:
                low, high = steps.get(stride, (0, 0))
                steps[stride] = (low - n + 1, high) if sign < 0 else (low, high + n - 1)
    reached = {apart}  # what is left for smaller strides
    for stride in sorted(steps, reverse=True):
        low, high = steps.pop(stride)
        least, most = (sum(s * end[i] for s, end in steps.items()) for i in (0, 1))
        reached = {
            left - n * stride
            for left in reached
            for n in range(max(low, -((most - left) // stride)), min(high, (left - least) // stride) + 1)
        }
    return 0 in reached


def _check_angles(q, cos, sin):
    if (cos is None) != (sin is None):
        raise ValueError(f"{OP}: cos and sin come together, got {'sin' if cos is None else 'cos'} alone")
    if cos is None:
        return
    for name, x in (("cos", cos), ("sin", sin)):
        check_tensor(OP, name, x, like=q, dtypes=(*FLOATS,))
        if x.ndim != 2 or x.shape != cos.shape or x.dtype != cos.dtype or 2 * x.shape[1] > q.shape[3]:
            raise ValueError(
                f"{OP}: cos and sin must have one shape [positions, R / 2], R <= {q.shape[3]}, and one dtype, "
                f"got {list(cos.shape)} {cos.dtype} and {list(sin.shape)} {sin.dtype}"
            )
