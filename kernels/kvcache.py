"""Attention with a cache of keys and values in Triton: append and rotate, attend to ranges of keys, merge the ranges.

The query heads that share a key head stand in one tile, so that keys and values are read once. A sequence's keys are
cut into as many ranges as keep the GPU busy; how long they are follows from the length that the device knows, so nobody
waits for it. Goes into another project together with attention.py and attention_scores.py.
Source: Dao et al. 2023, Flash-Decoding; Kwon et al. 2023, arXiv:2309.06180 (pages).
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .attention import _attend, _like_heads, scoring_of
from .attention_scores import LOWEST, Pages, View, Walk, Window, _walk_keys
from .device import entry, processors


class Angles(NamedTuple):
    """cos and sin [positions, R / 2]; the pairs are (i, i + R / 2), or (2i, 2i + 1) where INTERLEAVED."""

    cos_ptr: Any
    sin_ptr: Any
    positions: Any
    half: Any
    INTERLEAVED: Any


@triton.jit
def _rotated(x, rows, position, inside, angles, D, BLOCK_D: tl.constexpr):
    """Rows of x [.., 1] as pointers, at `position`: their first 2 * half values rotated, in x's dtype."""
    c = tl.arange(0, BLOCK_D)[None, :]
    mask = inside & (c < D)
    values = tl.load(rows + c.to(tl.int64) * x.strides[3], mask=mask, other=0.0)
    if angles is not None:
        half = angles.half
        second = c % 2 == 1 if angles.INTERLEAVED else c >= half
        angle = c // 2 if angles.INTERLEAVED else tl.where(second, c - half, c)
        step = 1 if angles.INTERLEAVED else half
        other = tl.where(second, c - step, c + step)
        turns = mask & (c < 2 * half)
        partner = tl.load(rows + other.to(tl.int64) * x.strides[3], mask=turns, other=0.0).to(tl.float32)
        known = turns & (position >= 0) & (position < angles.positions)
        place = position.to(tl.int64) * half + angle
        cos = tl.load(angles.cos_ptr + place, mask=known, other=0.0).to(tl.float32)
        sin = tl.load(angles.sin_ptr + place, mask=known, other=0.0).to(tl.float32)
        rotated = values.to(tl.float32) * cos + tl.where(second, partner, -partner) * sin
        values = tl.where(turns, rotated, values.to(tl.float32)).to(values.dtype)
    return values


@triton.jit
def _rows_of_cache(cache, b, h, row, pages):
    """Pointers to rows [.., 1] of one key head of sequence b, and which of them have a page."""
    if pages is None:
        return cache.ptr + (b * cache.strides[0] + h * cache.strides[1] + row * cache.strides[2]), row >= 0
    else:
        page = tl.load(pages.table_ptr + b * pages.per_sequence + row // pages.size)
        offset = page.to(tl.int64) * cache.strides[0] + h * cache.strides[1] + row % pages.size * cache.strides[2]
        return cache.ptr + offset, (page >= 0) & (page < pages.count)


@triton.jit(do_not_specialize=["capacity"])
def _kvcache_append(
    k_new,
    v_new,
    k_cache,
    v_cache,
    lengths_ptr,
    pages,
    angles,
    capacity,
    Hkv,
    added,
    D: tl.constexpr,
    D_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One new key and its value behind those of its sequence; nothing where the cache is full."""
    n = tl.program_id(0) % added
    b, h = (tl.program_id(0) // added // Hkv).to(tl.int64), (tl.program_id(0) // added % Hkv).to(tl.int64)
    row = tl.load(lengths_ptr + b).to(tl.int64) + n
    fits = (row >= 0) & (row < capacity)
    to_k, has_page = _rows_of_cache(k_cache, b, h, tl.where(fits, row, 0), pages)
    to_v, _ = _rows_of_cache(v_cache, b, h, tl.where(fits, row, 0), pages)
    fits = fits & has_page
    columns = tl.arange(0, BLOCK_D)[None, :]
    from_k = k_new.ptr + (b * k_new.strides[0] + h * k_new.strides[1] + n * k_new.strides[2])
    key = _rotated(k_new, from_k, row, fits, angles, D, BLOCK_D)
    tl.store(to_k + columns.to(tl.int64) * k_cache.strides[3], key, mask=fits & (columns < D))
    from_v = v_new.ptr + (b * v_new.strides[0] + h * v_new.strides[1] + n * v_new.strides[2])
    value = tl.load(from_v + columns.to(tl.int64) * v_new.strides[3], mask=fits & (columns < D_V), other=0.0)
    tl.store(to_v + columns.to(tl.int64) * v_cache.strides[3], value, mask=fits & (columns < D_V))


@triton.jit(do_not_specialize=["window", "capacity"])
def _kvcache_attend(
    q,
    k_cache,
    v_cache,
    o,
    lse,
    sink_ptr,
    lengths_ptr,
    pages,
    angles,
    scoring,
    window,
    capacity,
    added,
    Hkv,
    G,
    RANGES,
    D: tl.constexpr,
    D_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Some queries of the G heads of one key head, on one range of the keys that they see; o and lse of that range."""
    T = window.T
    blocks = tl.cdiv(T * G, BLOCK_M)
    at, bh = tl.program_id(0) % blocks * BLOCK_M, tl.program_id(0) // blocks
    b, h = bh // Hkv, bh % Hkv
    S = tl.minimum(tl.load(lengths_ptr + b).to(tl.int32) + added, capacity)
    q_offset, first, last = window.q_offset, window.first, window.last
    if window.q_offset is None:
        q_offset = S - T
        first += q_offset
        last += q_offset
    window = Window(T, S, q_offset, first, last)

    m = at + tl.arange(0, BLOCK_M)
    i, head = m // G, (b, (h * G + m % G)[:, None])  # query by query, so that a block sees neighbouring keys
    rows = b.to(tl.int64) * q.strides[0] + head[1].to(tl.int64) * q.strides[1]
    rows = q.ptr + (rows + i[:, None].to(tl.int64) * q.strides[2])
    q_block = _rotated(q, rows, i[:, None] + q_offset, (i < T)[:, None], angles, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]

    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    m_row = tl.full((BLOCK_M,), LOWEST, tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    part = tl.program_id(1)
    if sink_ptr is not None:  # in the first range
        sink = tl.load(sink_ptr + h * G + m % G).to(tl.float32) * scoring.rate
        sink = tl.where(part == 0, sink, float("-inf"))
        m_row = tl.maximum(m_row, sink)
        l += tl.where(sink > LOWEST, 1.0, 0.0)

    seen = _walk_keys(at // G, window, tl.cdiv(BLOCK_M, G) + 1, BLOCK_N)
    length = tl.cdiv(tl.cdiv(seen.stop + seen.gap - seen.start, BLOCK_N), RANGES) * BLOCK_N
    start = seen.start + part * length
    stop = tl.minimum(start + length, seen.stop + seen.gap)
    k_head = View(k_cache.ptr + h.to(tl.int64) * k_cache.strides[1], k_cache.strides)
    v_head = View(v_cache.ptr + h.to(tl.int64) * v_cache.strides[1], v_cache.strides)
    table = None
    if pages is None:
        k_head = View(k_head.ptr + b.to(tl.int64) * k_cache.strides[0], k_cache.strides)
        v_head = View(v_head.ptr + b.to(tl.int64) * v_cache.strides[0], v_cache.strides)
    else:
        table = Pages(pages.table_ptr + b.to(tl.int64) * pages.per_sequence, 0, pages.size, pages.count)
    walk = Walk(start, tl.maximum(stop, start), capacity, 0)
    acc, m_row, l = _attend(
        acc, m_row, l, q_block, k_head, v_head, table, head, i, walk, scoring, window, D, D_V, BLOCK_N, BLOCK_D, True
    )

    empty = l == 0
    l = tl.where(empty, 1.0, l)
    lse_block = tl.where(empty, float("-inf"), m_row.to(tl.float64) * (1.0 / scoring.rate) + tl.log(l))
    row = b.to(tl.int64) * lse.strides[1] + (h * G + m % G).to(tl.int64) * lse.strides[2] + i * lse.strides[3]
    tl.store(lse.ptr + part.to(tl.int64) * lse.strides[0] + row, lse_block, mask=i < T)
    row = b.to(tl.int64) * o.strides[1] + head[1].to(tl.int64) * o.strides[2] + i[:, None].to(tl.int64) * o.strides[3]
    columns = tl.arange(0, BLOCK_D)[None, :]
    o_ptrs = o.ptr + (part.to(tl.int64) * o.strides[0] + row + columns * o.strides[4])
    inside = (i < T)[:, None] & (columns < D_V)
    tl.store(o_ptrs, (acc / l[:, None]).to(o.ptr.dtype.element_ty), mask=inside)


@triton.jit
def _kvcache_merge(parts, part_lse_ptr, o, lse_ptr, N, H, T, RANGES, D_V: tl.constexpr, BLOCK_D: tl.constexpr):
    """o = sum_n exp(lse_n - lse) o_n of one query, over its ranges; 0 and -inf where none has a key."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    m = tl.cast(LOWEST, tl.float64)
    for n in tl.range(0, RANGES):
        m = tl.maximum(m, tl.load(part_lse_ptr + n * N + row))
    l = tl.cast(0.0, tl.float32)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for n in tl.range(0, RANGES):
        weight = tl.exp((tl.load(part_lse_ptr + n * N + row) - m).to(tl.float32))
        l += weight
        acc += weight * tl.load(parts + (n * N + row) * D_V + columns, mask=columns < D_V, other=0.0)
    empty = l == 0
    l = tl.where(empty, 1.0, l)
    tl.store(lse_ptr + row, tl.where(empty, float("-inf"), m + tl.log(l)))
    b, h, i = row // T // H, row // T % H, row % T
    o_ptr = o.ptr + (b * o.strides[0] + h * o.strides[1] + i * o.strides[2])
    tl.store(o_ptr + columns * o.strides[3], (acc / l).to(o.ptr.dtype.element_ty), mask=columns < D_V)


# By GPU name ("any" for the others): head size -> BLOCK_N, num_warps, num_stages, for 16 rows of queries in 16 bits.
# 2026-11-24, not measured: a decode step is bound by reading keys and values, so that the blocks are as large as three
# of each in shared memory let two programs share a multiprocessor. fp32 and more rows take half the block.
LAUNCHES = {"any": {32: (128, 4, 3), 64: (128, 4, 3), 128: (64, 4, 3), 256: (32, 4, 3)}}


def _launch_for(x, rows, BLOCK_D):
    """Block sizes, warps, stages for `rows` queries that share their keys."""
    if x.device.type == "cpu":  # the interpreter: small blocks, so that short tests cross their borders
        return dict(BLOCK_M=16, BLOCK_N=16)
    BLOCK_M = min(64, max(16, triton.next_power_of_2(rows)))
    BLOCK_N, warps, stages = entry(LAUNCHES, x.device)[BLOCK_D]
    if x.dtype == torch.float32 or BLOCK_M > 16:
        BLOCK_N, warps, stages = max(16, BLOCK_N // 2), 8, 2
        BLOCK_M = min(BLOCK_M, 32) if x.dtype == torch.float32 else BLOCK_M
    return dict(BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=warps, num_stages=stages)


def _ranges(x, programs, capacity, BLOCK_N):
    """How many ranges of keys give every multiprocessor about two programs; none is shorter than four blocks."""
    if x.device.type == "cpu":
        return 3
    return max(1, min(triton.cdiv(2 * processors(x.device), programs), capacity // (4 * BLOCK_N), 64))


def attention_kvcache_fwd(
    q, k_cache, v_cache, k_new, v_new, cache_seqlens, block_table, cos, sin, interleaved, mask, bias, alibi_slopes,
    sink, scale, softcap, q_offset, left, right,
):  # fmt: skip
    """o in the memory order of q and lse [B, H, T] in fp64; writes k_new and v_new behind the keys of k_cache, v_cache.

    What does not fit into the cache, and pages that do not exist, are left out: nobody waits for the lengths.
    """
    (B, H, T, D), Hkv, D_V = q.shape, k_cache.shape[1], v_cache.shape[3]
    capacity = k_cache.shape[2]
    pages = angles = None
    if block_table is not None:
        pages = Pages(block_table, block_table.shape[1], capacity, len(k_cache))
        capacity *= block_table.shape[1]
    if cos is not None:
        angles = Angles(cos.contiguous(), sin.contiguous(), len(cos), cos.shape[1], tl.constexpr(bool(interleaved)))
    sizes = dict(D=D, D_V=D_V, BLOCK_D=max(32, triton.next_power_of_2(max(D, D_V))))
    added = 0 if k_new is None else k_new.shape[2]
    caches = [View(x, x.stride()) for x in (k_cache, v_cache)]
    if added and B * Hkv:
        new = [View(x, x.stride()) for x in (k_new, v_new)]
        _kvcache_append[(B * Hkv * added,)](*new, *caches, cache_seqlens, pages, angles, capacity, Hkv, added, **sizes)

    o, lse = _like_heads(q, D_V), q.new_empty(B, H, T, dtype=torch.float64)
    if not lse.numel():
        return o, lse
    scoring = scoring_of(q, v_cache, (B, H, T, capacity), scale, softcap, mask, bias, alibi_slopes)
    shift, most = (0 if q_offset is None else q_offset), T + capacity  # beyond it nothing changes
    first = min(max(shift - left, -most), most) if left >= 0 else -most
    last = min(max(shift + right, -most), most) if right >= 0 else most
    window = Window(T, capacity, q_offset, first, last)
    G = H // Hkv
    launch = _launch_for(q, T * G, sizes["BLOCK_D"])
    programs = triton.cdiv(T * G, launch["BLOCK_M"]) * B * Hkv
    ranges = _ranges(q, programs, capacity, launch["BLOCK_N"])
    parts, part_lse = o[None], lse[None]
    if ranges > 1:
        parts = q.new_empty(ranges, B, H, T, D_V, dtype=torch.float32)
        part_lse = lse.new_empty(ranges, B, H, T)
    sink = None if sink is None else sink.contiguous()
    views = (View(x, x.stride()) for x in (q, k_cache, v_cache, parts, part_lse))
    _kvcache_attend[(programs, ranges)](
        *views, sink, cache_seqlens, pages, angles, scoring, window, capacity, added, Hkv, G, ranges, **sizes, **launch
    )
    if ranges > 1:
        _kvcache_merge[(B * H * T,)](
            parts, part_lse, View(o, o.stride()), lse, B * H * T, H, T, ranges, D_V=D_V, BLOCK_D=sizes["BLOCK_D"]
        )
    return o, lse
