"""Attention forward for Hopper (sm_90) in Gluon: warps that load, and warps that multiply, explicitly apart.

One warp brings blocks of keys and values to shared memory by TMA; two warp groups with 64 queries each multiply and
take exponentials. In a warp group the scores of the next block are multiplied while the last one's probabilities meet
its values, so that the matrix units do not wait for the exponentials. Rings of memory barriers say what is full and
what is read. 16 bits, head sizes 64 and 128, causal, window, fewer key heads; everything else is attention.py's.

Compiled and looked at (tests/test_triton_compile.py), never run or measured: nothing chooses it until the table
WARP_SPECIALISED of attention.py names a GPU.
Source: Shah et al. 2024, arXiv:2407.08608 (FlashAttention-3).
"""

import functools

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .device import fetchable_strides, is_fetchable

LOG2_E = gl.constexpr(1.4426950408889634)
LOWEST = gl.constexpr(-3.0e38)  # where a running maximum starts; finite, so that exp(-inf - LOWEST) is 0
CONSUMERS = gl.constexpr(2)  # warp groups that multiply
ROWS = gl.constexpr(64)  # queries of each
_fetch = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # the name until Triton 3.9


@gluon.jit
def _walk(i_start, T, S, first, last, BLOCK_N: gl.constexpr):
    """The first key, a whole number of blocks, and the number of blocks that the queries of a program see."""
    i_last = gl.minimum(i_start + CONSUMERS * ROWS, T) - 1
    start = gl.maximum(i_start + first, 0) // BLOCK_N * BLOCK_N
    stop = gl.minimum(i_last + last + 1, S)
    return start, gl.cdiv(gl.maximum(stop - start, 0), BLOCK_N)


@gluon.jit
def _produce(
    q, k, v, q_s, k_s, v_s, q_full, k_full, k_read, v_full, v_read, b, h, h_kv, i_start, start, blocks,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One warp: brings the queries, then blocks of keys and of values where those before them have been read."""
    if blocks > 0:
        mbarrier.expect(q_full, CONSUMERS * q.block_type.nbytes)
        for n in gl.static_range(CONSUMERS):
            _fetch(q, [b, h, i_start + n * ROWS, 0], q_full, q_s.index(n))
    for n in range(blocks):
        stage, phase = n % STAGES, n // STAGES & 1
        mbarrier.wait(k_read.index(stage), phase ^ 1)
        mbarrier.expect(k_full.index(stage), k.block_type.nbytes)
        _fetch(k, [b, h_kv, start + n * BLOCK_N, 0], k_full.index(stage), k_s.index(stage))
        mbarrier.wait(v_read.index(stage), phase ^ 1)
        mbarrier.expect(v_full.index(stage), v.block_type.nbytes)
        _fetch(v, [b, h_kv, start + n * BLOCK_N, 0], v_full.index(stage), v_s.index(stage))


@gluon.jit
def _visible(s, i_start, j_start, T, S, first, last, BLOCK_N: gl.constexpr, SCORES: gl.constexpr):
    """s where the queries from i_start see the keys from j_start, else -inf; untouched where all see all."""
    if (j_start + BLOCK_N > gl.minimum(S, i_start + last + 1)) | (j_start < i_start + ROWS - 1 + first):
        i = i_start + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))[:, None]
        j = j_start + gl.arange(0, BLOCK_N, gl.SliceLayout(0, SCORES))[None, :]
        s = gl.where((j < S) & (j >= i + first) & (j <= i + last), s, float("-inf"))
    return s


@gluon.jit
def _softmax(s, m, l, rate):
    """exp(rate * s - m_next), what multiplies the sums so far, and the new maximum and sum."""
    m_next = gl.maximum(m, gl.max(s, 1) * rate)
    p = gl.exp2(s * rate - m_next[:, None])
    alpha = gl.exp2(m - m_next)
    return p, alpha, m_next, l * alpha + gl.sum(p, 1)


@gluon.jit
def _consume(
    o_ptr, lse_ptr, o_strides, q_s, k_s, v_s, q_full, k_full, k_read, v_full, v_read, b, h, H, i_start, start, blocks,
    T, S, first, last, rate, D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, OWN: gl.constexpr,
):  # fmt: skip
    """One warp group: o and lse of its 64 queries."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, SUMS)
    dtype: gl.constexpr = o_ptr.dtype.element_ty
    i_start += OWN * ROWS
    m = gl.full([ROWS], LOWEST, gl.float32, gl.SliceLayout(1, SCORES))
    l = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, SCORES))
    acc = gl.zeros([ROWS, D], gl.float32, SUMS)
    if blocks > 0:
        none = gl.zeros([ROWS, BLOCK_N], gl.float32, SCORES)
        q = q_s.index(OWN).reshape([ROWS, D])
        mbarrier.wait(q_full, 0)
        mbarrier.wait(k_full.index(0), 0)
        s = warpgroup_mma(q, k_s.index(0).reshape([BLOCK_N, D]).permute((1, 0)), none, use_acc=False)
        mbarrier.arrive(k_read.index(0), count=1)
        s = _visible(s, i_start, start, T, S, first, last, BLOCK_N, SCORES)
        p, alpha, m, l = _softmax(s, m, l, rate)
        p = gl.convert_layout(p.to(dtype), LEFT)
        for n in range(1, blocks):
            stage, before = n % STAGES, (n - 1) % STAGES
            mbarrier.wait(k_full.index(stage), n // STAGES & 1)
            k = k_s.index(stage).reshape([BLOCK_N, D]).permute((1, 0))
            scores = warpgroup_mma(q, k, none, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(before), (n - 1) // STAGES & 1)
            sums = warpgroup_mma(p, v_s.index(before).reshape([BLOCK_N, D]), acc, is_async=True)
            s = warpgroup_mma_wait(num_outstanding=1, deps=(scores,))
            mbarrier.arrive(k_read.index(stage), count=1)
            s = _visible(s, i_start, start + n * BLOCK_N, T, S, first, last, BLOCK_N, SCORES)
            p, alpha, m, l = _softmax(s, m, l, rate)
            acc = warpgroup_mma_wait(num_outstanding=0, deps=(sums,))
            mbarrier.arrive(v_read.index(before), count=1)
            acc *= gl.convert_layout(alpha, ROW)[:, None]
            p = gl.convert_layout(p.to(dtype), LEFT)
        n = blocks - 1
        mbarrier.wait(v_full.index(n % STAGES), n // STAGES & 1)
        acc = warpgroup_mma(p, v_s.index(n % STAGES).reshape([BLOCK_N, D]), acc)

    empty = l == 0
    l = gl.where(empty, 1.0, l)
    lse = gl.where(empty, float("-inf"), m.to(gl.float64) * (1.0 / LOG2_E) + gl.log(l).to(gl.float64))
    i = i_start + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
    gl.store(lse_ptr + (b * H + h).to(gl.int64) * T + i, lse, mask=i < T)
    acc = acc / gl.convert_layout(l, ROW)[:, None]
    i = i_start + gl.arange(0, ROWS, ROW)
    column = gl.arange(0, D, gl.SliceLayout(0, SUMS))
    head = o_ptr + (b.to(gl.int64) * o_strides[0] + h.to(gl.int64) * o_strides[1])
    gl.store(head + i.to(gl.int64)[:, None] * o_strides[2] + column[None, :], acc.to(dtype), mask=(i < T)[:, None])


@gluon.jit(do_not_specialize=["first", "last"])
def _attention_fwd_sm90(
    q,
    k,
    v,
    o_ptr,
    lse_ptr,
    o_strides,
    scale,
    T,
    S,
    first,
    last,
    H,
    G,
    D: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    """128 queries of one head. q, k, v are descriptors of [B, H, rows, D]: rows past the end are zeros."""
    blocks_m = gl.cdiv(T, CONSUMERS * ROWS)
    bh = gl.program_id(0) // blocks_m
    b, h = bh // H, bh % H
    # Causal: the last queries, which see the most keys, start first.
    i_start = (blocks_m - 1 - gl.program_id(0) % blocks_m) * (CONSUMERS * ROWS)
    start, blocks = _walk(i_start, T, S, first, last, BLOCK_N)

    q_s = gl.allocate_shared_memory(q.dtype, [CONSUMERS, 1, 1, ROWS, D], q.layout)
    k_s = gl.allocate_shared_memory(q.dtype, [STAGES, 1, 1, BLOCK_N, D], k.layout)
    v_s = gl.allocate_shared_memory(q.dtype, [STAGES, 1, 1, BLOCK_N, D], v.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_read = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_read = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    for n in gl.static_range(STAGES):
        mbarrier.init(k_full.index(n), count=1)
        mbarrier.init(v_full.index(n), count=1)
        mbarrier.init(k_read.index(n), count=CONSUMERS)
        mbarrier.init(v_read.index(n), count=CONSUMERS)
    fence_async_shared()

    rate = scale * LOG2_E
    gl.warp_specialize(
        [
            (_consume, (
                o_ptr, lse_ptr, o_strides, q_s, k_s, v_s, q_full, k_full, k_read, v_full, v_read, b, h, H, i_start,
                start, blocks, T, S, first, last, rate, D, BLOCK_N, STAGES, 0,
            )),
            (_consume, (
                o_ptr, lse_ptr, o_strides, q_s, k_s, v_s, q_full, k_full, k_read, v_full, v_read, b, h, H, i_start,
                start, blocks, T, S, first, last, rate, D, BLOCK_N, STAGES, 1,
            )),
            (_produce, (
                q, k, v, q_s, k_s, v_s, q_full, k_full, k_read, v_full, v_read, b, h, h // G, i_start,
                start, blocks, BLOCK_N, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


# By head size: BLOCK_N and stages. 2026-11-30, not measured: the largest that do not spill and fit.
LAUNCHES = {64: (128, 3), 128: (128, 2)}


@functools.cache
def is_hopper(device) -> bool:
    """Whether a GPU has wgmma and TMA as this kernel uses them."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def takes(q, k, v, scoring, sink, packing) -> bool:
    """Whether the kernel can do this call."""
    D = q.shape[3]
    if D not in LAUNCHES or v.shape[3] != D or q.dtype not in (torch.bfloat16, torch.float16) or packing is not None:
        return False
    optional = scoring.softcap, scoring.mask, scoring.bias, scoring.slope, scoring.dropout, sink
    if any(x is not None for x in optional) or scoring.scale <= 0:
        return False
    return is_hopper(q.device) and all(map(is_fetchable, (q, k, v)))


def _descriptor(x, rows):
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    return TensorDescriptor(x, list(x.shape), fetchable_strides(x), [1, 1, rows, x.shape[3]], layout)


def forward(q, k, v, o, lse, scale, window):
    """Fills o [B, H, T, D] and lse [B, H, T], which is contiguous; `window` is attention.py's."""
    (B, H, T, D), (Hkv, S) = q.shape, k.shape[1:3]
    BLOCK_N, STAGES = LAUNCHES[D]
    grid = (triton.cdiv(T, CONSUMERS.value * ROWS.value) * B * H,)
    _attention_fwd_sm90[grid](
        _descriptor(q, ROWS.value), _descriptor(k, BLOCK_N), _descriptor(v, BLOCK_N), o, lse, o.stride()[:3],
        scale, T, S, window.first, window.last, H, H // Hkv, D=D, BLOCK_N=BLOCK_N, STAGES=STAGES, num_warps=4,
    )  # fmt: skip
