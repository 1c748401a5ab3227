"""Attention in Triton, forward and backward, with every option in one place: `_scores` and `_score_grads`.

A block of queries walks over the keys that its window leaves: first the blocks that all of its queries see whole,
without any test, then the blocks that the diagonal, the window or the end of the keys cuts. Backward is two kernels,
one that holds keys (dk, dv) and one that holds queries (dq, dbias), so that no sum depends on the order in which
programs run. In 16 bits scores are kept in units of ln 2, so that the exponential is one exp2 and its scale is free; in
fp32 that would cost a rounding step of the score, and the exponential is natural.
Source: Dao 2023, arXiv:2307.08691.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
# Where a running maximum starts. Finite: exp(-inf - LOWEST) is 0, but exp(-inf - -inf) would be NaN.
LOWEST = tl.constexpr(-3.0e38)


class View(NamedTuple):
    """A tensor [B, H, rows, columns] in memory, or one head of it, where `ptr` points at the head."""

    ptr: Any
    strides: Any


class Window(NamedTuple):
    """T queries, S keys, and who sees whom: query i, at position i + q_offset, sees keys i + first to i + last."""

    T: Any
    S: Any
    q_offset: Any
    first: Any
    last: Any


class Walk(NamedTuple):
    """The blocks from `start` to `stop` need a test; from `whole` on they lie `gap` further, past the whole blocks."""

    start: Any
    stop: Any
    whole: Any
    gap: Any


class Scoring(NamedTuple):
    """What makes a score out of q k^T. What is None is off, and its code is not compiled."""

    rate: Any  # scores are kept times this constexpr: log2(e), or 1 in fp32
    scale: Any
    softcap: Any
    mask: Any
    bias: Any
    slope: Any


@triton.jit
def _head(x, head):
    """The view of one head (batch entry, head)."""
    offset = head[0].to(tl.int64) * x.strides[0] + head[1].to(tl.int64) * x.strides[1]
    return View(x.ptr + offset, x.strides)


@triton.jit
def _tile(x, start, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Pointers to rows start, start + 1, ... of a head. Only the first term changes in a loop."""
    rows, columns = tl.arange(0, BLOCK_R).to(tl.int64), tl.arange(0, BLOCK_C).to(tl.int64)
    return (x.ptr + tl.cast(start, tl.int64) * x.strides[2]) + (rows[:, None] * x.strides[2] + columns * x.strides[3])


@triton.jit
def _load(x, start, stop, COLUMNS, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, EDGE: tl.constexpr):
    """Rows start, start + 1, ... of a head: zero past COLUMNS and, where that can happen (EDGE), from row `stop` on."""
    inside = None
    if EDGE:
        inside = (start + tl.arange(0, BLOCK_R) < stop)[:, None]
    if COLUMNS < BLOCK_C:
        columns = (tl.arange(0, BLOCK_C) < COLUMNS)[None, :]
        inside = inside & columns if EDGE else columns
    return tl.load(_tile(x, start, BLOCK_R, BLOCK_C), mask=inside, other=None if inside is None else 0.0)


@triton.jit
def _store(x, block, start, stop, COLUMNS, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Rows start, start + 1, ... of a head, as far as they exist."""
    inside = (start + tl.arange(0, BLOCK_R) < stop)[:, None] & (tl.arange(0, BLOCK_C) < COLUMNS)[None, :]
    tl.store(_tile(x, start, BLOCK_R, BLOCK_C), block.to(x.ptr.dtype.element_ty), mask=inside)


@triton.jit
def _pairs(x, head, i, j):
    """Pointers to the elements [i, j] of a head; i and j are a column and a row, or a row and a column."""
    x = _head(x, head)
    return x.ptr + i.to(tl.int64) * x.strides[2] + j.to(tl.int64) * x.strides[3]


@triton.jit
def _exp(x, scoring):
    return tl.exp(x) if scoring.rate == 1.0 else tl.exp2(x)


@triton.jit
def _load_lse(lse_ptr, i, T, scoring):
    """rate * lse in two fp32 parts, as lse is fp64; +inf, which makes every probability 0, where nothing is seen."""
    lse = tl.load(lse_ptr + i, mask=i < T, other=float("inf")) * scoring.rate
    lse = tl.where(lse == float("-inf"), float("inf"), lse)
    high = lse.to(tl.float32)
    return high, tl.where(high == float("inf"), 0.0, (lse - high.to(tl.float64)).to(tl.float32))


@triton.jit
def _tanh(x):
    """tanh to two ulp (Cephes): near 0 a polynomial, where 1 - 2 / (exp(2x) + 1) would lose its digits."""
    z = x * x
    near = -5.70498872745e-3 * z + 2.06390887954e-2
    near = (near * z - 5.37397155531e-2) * z + 1.33314422036e-1
    near = (near * z - 3.33332819422e-1) * z * x + x
    a = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp2(a * (2.0 * LOG2_E)) + 1.0)
    return tl.where(a < 0.625, near, tl.where(x < 0, -far, far))


@triton.jit
def _scores(qk, head, i, j, scoring, window, EDGE: tl.constexpr):
    """rate * s of queries i and keys j, -inf where hidden, and the tanh of the soft-cap, which its gradient needs.

    qk is [i, j] or, in the kernel that holds keys, [j, i]; i and j broadcast to it.
    """
    capped = qk
    if scoring.softcap is not None:
        capped = _tanh(qk * (scoring.scale / scoring.softcap))
        s = capped * (scoring.softcap * scoring.rate)
    else:
        s = qk * (scoring.scale * scoring.rate)
    inside = (i < window.T) & (j < window.S)
    if scoring.bias is not None:
        s += tl.load(_pairs(scoring.bias, head, i, j), mask=inside, other=0.0).to(tl.float32) * scoring.rate
    if scoring.slope is not None:
        slope = tl.load(_head(scoring.slope, head).ptr).to(tl.float32)
        s -= (slope * scoring.rate) * tl.abs(i + window.q_offset - j).to(tl.float32)
    if EDGE:
        s = tl.where((j < window.S) & (j >= i + window.first) & (j <= i + window.last), s, float("-inf"))
    if scoring.mask is not None:
        s = tl.where(tl.load(_pairs(scoring.mask, head, i, j), mask=inside, other=0) != 0, s, float("-inf"))
    return s, capped


@triton.jit
def _score_grads(qk, dp, lse, lse_low, delta, head, i, j, scoring, window, EDGE: tl.constexpr):
    """p = exp(s - lse); ds = p (dp - delta), the gradient of the bias; and the gradient of scale * q k^T."""
    s, capped = _scores(qk, head, i, j, scoring, window, EDGE)
    if scoring.rate == 1.0:  # fp32: rounding lse would be the largest error of the gradients
        p = _exp((s - lse) - lse_low, scoring)
    else:
        p = _exp(s - lse, scoring)
    ds = p * (dp - delta)
    if scoring.softcap is not None:
        return p, ds, ds * (1.0 - capped * capped)
    else:
        return p, ds, ds


@triton.jit
def _walk(low, high, whole_low, whole_high, BLOCK: tl.constexpr):
    """The blocks over [low, high), and which of them lie inside [whole_low, whole_high) and need no test."""
    start = tl.maximum(low, 0) // BLOCK * BLOCK
    stop = tl.maximum(high, start)
    whole = tl.maximum(tl.cdiv(tl.maximum(whole_low, 0), BLOCK) * BLOCK, start)
    gap = tl.maximum(tl.minimum(whole_high, stop) // BLOCK * BLOCK - whole, 0)
    return Walk(start, stop - gap, whole, gap)


@triton.jit
def _walk_keys(i_start, window, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The keys that the queries i_start, i_start + 1, ... see: query i sees i + first to i + last."""
    i_last = tl.minimum(i_start + BLOCK_M, window.T) - 1
    return _walk(
        i_start + window.first,
        tl.minimum(i_last + window.last + 1, window.S),
        i_last + window.first,
        tl.minimum(i_start + window.last + 1, window.S),
        BLOCK_N,
    )


@triton.jit
def _walk_queries(j_start, window, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The queries that see the keys j_start, j_start + 1, ...: key j is seen by j - last to j - first."""
    j_last = tl.minimum(j_start + BLOCK_N, window.S) - 1
    return _walk(
        j_start - window.last,
        tl.minimum(j_last - window.first + 1, window.T),
        j_last - window.last,
        tl.minimum(j_start - window.first + 1, window.T),
        BLOCK_M,
    )


@triton.jit
def _attend(acc, m, l, q, k, v, head, i, walk, scoring, window, D, D_V, BLOCK_N, BLOCK_D, EDGE: tl.constexpr):
    """Online softmax over the whole blocks of keys, or (EDGE) over the others."""
    for n in tl.range(walk.start if EDGE else walk.whole, walk.stop if EDGE else walk.whole + walk.gap, BLOCK_N):
        j_start = n + tl.where(n >= walk.whole, walk.gap, 0) if EDGE else n
        j = j_start + tl.arange(0, BLOCK_N)
        k_block = _load(k, j_start, window.S, D, BLOCK_N, BLOCK_D, EDGE)  # [BLOCK_N, BLOCK_D]
        qk = tl.dot(q, k_block.T, input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        s, _ = _scores(qk, head, i[:, None], j[None, :], scoring, window, EDGE)

        m_next = tl.maximum(m, tl.max(s, 1))
        p = _exp(s - m_next[:, None], scoring)
        alpha = _exp(m - m_next, scoring)
        l = l * alpha + tl.sum(p, 1)
        v_block = _load(v, j_start, window.S, D_V, BLOCK_N, BLOCK_D, EDGE)  # [BLOCK_N, BLOCK_D]
        acc = tl.dot(p.to(v_block.dtype), v_block, acc * alpha[:, None], input_precision="ieee")
        m = m_next
    return acc, m, l


@triton.jit(do_not_specialize=["window"])
def _attention_fwd(
    q,
    k,
    v,
    o,
    lse_ptr,
    sink_ptr,
    scoring,
    window,
    H,
    G,
    D: tl.constexpr,
    D_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One block of queries of one head."""
    T = window.T
    blocks = tl.cdiv(T, BLOCK_M)
    bh = tl.program_id(0) // blocks
    head, head_kv = (bh // H, bh % H), (bh // H, bh % H // G)
    i_start = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_M  # causal: the blocks with the most keys start first
    i = i_start + tl.arange(0, BLOCK_M)
    q_block = _load(_head(q, head), i_start, T, D, BLOCK_M, BLOCK_D, True)  # [BLOCK_M, BLOCK_D]
    k_head, v_head = _head(k, head_kv), _head(v, head_kv)

    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    m = tl.full((BLOCK_M,), LOWEST, tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    if sink_ptr is not None:  # one more score, with no value
        sink = tl.load(sink_ptr + head[1]).to(tl.float32) * scoring.rate
        m = tl.maximum(m, sink)
        l += tl.where(sink > LOWEST, 1.0, 0.0)

    walk = _walk_keys(i_start, window, BLOCK_M, BLOCK_N)
    for EDGE in tl.static_range(2):
        acc, m, l = _attend(
            acc, m, l, q_block, k_head, v_head, head, i, walk, scoring, window, D, D_V, BLOCK_N, BLOCK_D, EDGE
        )

    empty = l == 0
    l = tl.where(empty, 1.0, l)
    lse = tl.where(empty, float("-inf"), m.to(tl.float64) / scoring.rate + tl.log(l))
    tl.store(lse_ptr + bh.to(tl.int64) * T + i, lse, mask=i < T)
    _store(_head(o, head), acc / l[:, None], i_start, T, D_V, BLOCK_M, BLOCK_D)


@triton.jit(do_not_specialize=["T"])
def _attention_bwd_delta(
    o, do, lse_ptr, dlse_ptr, delta_ptr, T, H, D_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr
):
    """delta = sum(o * do) - dlse: what the softmax's gradient subtracts from dp. 0 for a query that sees nothing."""
    blocks = tl.cdiv(T, BLOCK_M)
    bh = tl.program_id(0) // blocks
    head = (bh // H, bh % H)
    i_start = tl.program_id(0) % blocks * BLOCK_M
    i = i_start + tl.arange(0, BLOCK_M)
    row = bh.to(tl.int64) * T + i
    o_block = _load(_head(o, head), i_start, T, D_V, BLOCK_M, BLOCK_D, True).to(tl.float32)
    do_block = _load(_head(do, head), i_start, T, D_V, BLOCK_M, BLOCK_D, True).to(tl.float32)

    delta = tl.sum(o_block * do_block, 1)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + row, mask=i < T, other=0.0).to(tl.float32)
    lse = tl.load(lse_ptr + row, mask=i < T, other=0.0)
    tl.store(delta_ptr + row, tl.where(lse == float("-inf"), 0.0, delta), mask=i < T)


@triton.jit
def _add_key_grads(
    dk, dv, k, v, q, do, lse_ptr, delta_ptr, head_kv, H, G, j, walk, scoring, window, D, D_V, BLOCK_M, BLOCK_D, EDGE
):
    """dk / scale and dv of one block of keys, from the whole blocks of queries or (EDGE) from the others."""
    T = window.T
    first = walk.start if EDGE else walk.whole
    blocks = tl.cdiv(walk.stop - first if EDGE else walk.gap, BLOCK_M)
    for n in tl.range(0, G * blocks):  # one loop over G heads and their blocks: two would keep more in registers
        head = (head_kv[0], head_kv[1] * G + n // tl.maximum(blocks, 1))
        i_start = first + n % tl.maximum(blocks, 1) * BLOCK_M
        if EDGE:
            i_start += tl.where(i_start >= walk.whole, walk.gap, 0)
        i = i_start + tl.arange(0, BLOCK_M)
        q_block = _load(_head(q, head), i_start, T, D, BLOCK_M, BLOCK_D, EDGE)  # [BLOCK_M, BLOCK_D]
        do_block = _load(_head(do, head), i_start, T, D_V, BLOCK_M, BLOCK_D, EDGE)  # [BLOCK_M, BLOCK_D]
        row = (head[0] * H + head[1]).to(tl.int64) * T
        lse, lse_low = _load_lse(lse_ptr + row, i, T, scoring)
        delta = tl.load(delta_ptr + row + i, mask=i < T, other=0.0)

        # Keys by queries, so that p and ds are where the next product wants its left operand: in registers.
        qk = tl.dot(k, q_block.T, input_precision="ieee")  # [BLOCK_N, BLOCK_M]
        dp = tl.dot(v, do_block.T, input_precision="ieee")
        p, _, ds = _score_grads(
            qk, dp, lse[None, :], lse_low[None, :], delta[None, :], head, i[None, :], j[:, None], scoring, window, EDGE
        )
        dv = tl.dot(p.to(do_block.dtype), do_block, dv, input_precision="ieee")
        dk = tl.dot(ds.to(q_block.dtype), q_block, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=["window"])
def _attention_bwd_dkdv(
    q,
    k,
    v,
    do,
    dk,
    dv,
    lse_ptr,
    delta_ptr,
    scoring,
    window,
    H,
    G,
    D: tl.constexpr,
    D_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One block of keys of one key head, over the queries of its G query heads."""
    S = window.S
    blocks = tl.cdiv(S, BLOCK_N)
    bh = tl.program_id(0) // blocks
    head_kv = (bh // (H // G), bh % (H // G))
    j_start = tl.program_id(0) % blocks * BLOCK_N
    j = j_start + tl.arange(0, BLOCK_N)
    k_block = _load(_head(k, head_kv), j_start, S, D, BLOCK_N, BLOCK_D, True)  # [BLOCK_N, BLOCK_D]
    v_block = _load(_head(v, head_kv), j_start, S, D_V, BLOCK_N, BLOCK_D, True)  # [BLOCK_N, BLOCK_D]

    dk_block = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv_block = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    walk = _walk_queries(j_start, window, BLOCK_M, BLOCK_N)
    for EDGE in tl.static_range(2):
        dk_block, dv_block = _add_key_grads(
            dk_block, dv_block, k_block, v_block, q, do, lse_ptr, delta_ptr, head_kv, H, G, j, walk, scoring, window,
            D, D_V, BLOCK_M, BLOCK_D, EDGE,
        )  # fmt: skip

    _store(_head(dk, head_kv), dk_block * scoring.scale, j_start, S, D, BLOCK_N, BLOCK_D)
    _store(_head(dv, head_kv), dv_block, j_start, S, D_V, BLOCK_N, BLOCK_D)


@triton.jit
def _add_query_grads(
    dq,
    q,
    do,
    k,
    v,
    dbias,
    lse,
    lse_low,
    delta,
    head,
    i,
    walk,
    scoring,
    window,
    D,
    D_V,
    BLOCK_N,
    BLOCK_D,
    EDGE: tl.constexpr,
):
    """dq / scale of one block of queries, from the whole blocks of keys or (EDGE) from the others; stores dbias."""
    T, S = window.T, window.S
    for n in tl.range(walk.start if EDGE else walk.whole, walk.stop if EDGE else walk.whole + walk.gap, BLOCK_N):
        j_start = n + tl.where(n >= walk.whole, walk.gap, 0) if EDGE else n
        j = j_start + tl.arange(0, BLOCK_N)
        k_block = _load(k, j_start, S, D, BLOCK_N, BLOCK_D, EDGE)  # [BLOCK_N, BLOCK_D]
        v_block = _load(v, j_start, S, D_V, BLOCK_N, BLOCK_D, EDGE)  # [BLOCK_N, BLOCK_D]

        qk = tl.dot(q, k_block.T, input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        dp = tl.dot(do, v_block.T, input_precision="ieee")
        _, db, ds = _score_grads(
            qk, dp, lse[:, None], lse_low[:, None], delta[:, None], head, i[:, None], j[None, :], scoring, window, EDGE
        )
        if dbias is not None:
            ptrs = _pairs(dbias, head, i[:, None], j[None, :])
            tl.store(ptrs, db.to(dbias.ptr.dtype.element_ty), mask=(i[:, None] < T) & (j[None, :] < S))
        dq = tl.dot(ds.to(k_block.dtype), k_block, dq, input_precision="ieee")
    return dq


@triton.jit(do_not_specialize=["window"])
def _attention_bwd_dq(
    q,
    k,
    v,
    do,
    dq,
    dbias,
    lse_ptr,
    delta_ptr,
    scoring,
    window,
    H,
    G,
    D: tl.constexpr,
    D_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One block of queries of one head; it walks over the keys as `_attention_fwd` does."""
    T = window.T
    blocks = tl.cdiv(T, BLOCK_M)
    bh = tl.program_id(0) // blocks
    head, head_kv = (bh // H, bh % H), (bh // H, bh % H // G)
    i_start = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_M
    i = i_start + tl.arange(0, BLOCK_M)
    row = bh.to(tl.int64) * T
    q_block = _load(_head(q, head), i_start, T, D, BLOCK_M, BLOCK_D, True)  # [BLOCK_M, BLOCK_D]
    do_block = _load(_head(do, head), i_start, T, D_V, BLOCK_M, BLOCK_D, True)  # [BLOCK_M, BLOCK_D]
    lse, lse_low = _load_lse(lse_ptr + row, i, T, scoring)
    delta = tl.load(delta_ptr + row + i, mask=i < T, other=0.0)
    k_head, v_head = _head(k, head_kv), _head(v, head_kv)

    dq_block = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    walk = _walk_keys(i_start, window, BLOCK_M, BLOCK_N)
    for EDGE in tl.static_range(2):
        dq_block = _add_query_grads(
            dq_block, q_block, do_block, k_head, v_head, dbias, lse, lse_low, delta, head, i, walk, scoring, window,
            D, D_V, BLOCK_N, BLOCK_D, EDGE,
        )  # fmt: skip
    _store(_head(dq, head), dq_block * scoring.scale, i_start, T, D, BLOCK_M, BLOCK_D)


def _launch_for(kernel, x, BLOCK_D, pairs):
    """Block sizes, warps, stages. Not measured yet, chosen from the compile table (registers, shared memory)."""
    if x.device.type == "cpu":  # the interpreter: small blocks, so that short tests cross their borders
        return dict(BLOCK_M=32, BLOCK_N=16)
    column = "fp32" if x.dtype == torch.float32 else "pairs" if pairs else "plain"
    launch = _LAUNCHES[kernel, column][BLOCK_D]
    return dict(zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), launch))


# Head size -> BLOCK_M, BLOCK_N, num_warps, num_stages. A mask or a bias ("pairs") is loaded for every pair of query and
# key, which takes registers; fp32 has no matrix units.
_LAUNCHES = {
    ("fwd", "plain"): {32: (128, 32, 4, 3), 64: (128, 64, 8, 3), 128: (64, 64, 4, 3), 256: (64, 32, 8, 2)},
    ("fwd", "pairs"): {32: (128, 64, 8, 2), 64: (128, 32, 8, 2), 128: (64, 32, 8, 1), 256: (32, 16, 8, 2)},
    ("fwd", "fp32"): {32: (32, 32, 4, 2), 64: (32, 32, 8, 2), 128: (32, 16, 8, 2), 256: (16, 32, 8, 2)},
    ("dkdv", "plain"): {32: (64, 128, 8, 2), 64: (32, 128, 8, 2), 128: (64, 64, 8, 2), 256: (32, 32, 8, 2)},
    ("dkdv", "pairs"): {32: (32, 64, 8, 2), 64: (32, 64, 8, 1), 128: (32, 32, 8, 1), 256: (16, 32, 8, 1)},
    ("dkdv", "fp32"): {32: (32, 32, 4, 2), 64: (32, 16, 4, 2), 128: (16, 32, 8, 2), 256: (16, 16, 8, 1)},
    ("dq", "plain"): {32: (128, 64, 8, 2), 64: (128, 64, 8, 2), 128: (64, 64, 8, 2), 256: (64, 32, 8, 2)},
    ("dq", "pairs"): {32: (64, 32, 4, 2), 64: (64, 32, 8, 2), 128: (64, 16, 8, 2), 256: (32, 16, 8, 1)},
    ("dq", "fp32"): {32: (32, 32, 4, 2), 64: (32, 32, 8, 2), 128: (32, 16, 8, 2), 256: (16, 16, 8, 2)},
}


def _like_heads(x, D):
    """An empty [B, H, T, D] with the memory order of x: heads inside a position where x is a view of [B, T, H, D]."""
    B, H, T, _ = x.shape
    if x.stride(1) < x.stride(2):
        return x.new_empty(B, T, H, D).transpose(1, 2)
    return x.new_empty(B, H, T, D)


def _view(x, shape=None):
    """`x`, broadcast to [B, H, T, S] where `shape` is given, as kernels take it."""
    if x is None:
        return None
    x = x if shape is None else x.expand(shape)
    return View(x, x.stride())


def _prepare(q, k, v, mask, bias, alibi_slopes, seed, scale, softcap, q_offset, left, right):
    """What the kernels of both directions are given: scoring, window and sizes."""
    (B, H, T, D), (Hkv, S), D_V = q.shape, k.shape[1:3], v.shape[3]
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"attention: the Triton kernels take fp32, bf16 and fp16, got {q.dtype}")
    if max(D, D_V) > 256:
        raise ValueError(f"attention: the Triton kernels take head sizes up to 256, got {D} and {D_V}")
    if seed is not None:
        raise NotImplementedError("attention: the Triton kernels have no dropout yet")
    shape = (B, H, T, S)
    slopes = None if alibi_slopes is None else alibi_slopes.view(-1, H, 1, 1)
    rate = tl.constexpr(1.0) if q.dtype == torch.float32 else LOG2_E
    scoring = Scoring(
        rate,
        scale,
        softcap or None,
        _view(mask, shape),
        _view(bias, shape),
        _view(slopes, None if slopes is None else shape),
    )
    # Beyond these limits nothing changes, and inside them no kernel overflows 32 bits.
    first = min(max(q_offset - left, -T), S) if left >= 0 else -T
    last = min(max(q_offset + right, -T), S) if right >= 0 else S
    window = Window(T, S, q_offset, first, last)
    sizes = dict(H=H, G=H // max(Hkv, 1), D=D, D_V=D_V, BLOCK_D=max(32, triton.next_power_of_2(max(D, D_V))))
    return scoring, window, sizes


def attention_fwd(q, k, v, mask, bias, alibi_slopes, sink, seed, scale, softcap, q_offset, left, right, dropout_p):
    """o = softmax(scores) v in the memory order of q, and lse [B, H, T] in fp64: backward must not see it rounded."""
    scoring, window, sizes = _prepare(q, k, v, mask, bias, alibi_slopes, seed, scale, softcap, q_offset, left, right)
    B, H, T, _ = q.shape
    o = _like_heads(q, v.shape[3])
    lse = q.new_empty(B, H, T, dtype=torch.float64)
    if lse.numel():
        launch = _launch_for("fwd", q, sizes["BLOCK_D"], mask is not None or bias is not None)
        sink = None if sink is None else sink.contiguous()
        grid = (triton.cdiv(T, launch["BLOCK_M"]) * B * H,)
        _attention_fwd[grid](_view(q), _view(k), _view(v), _view(o), lse, sink, scoring, window, **sizes, **launch)
    return o, lse


def attention_bwd(
    do, dlse, q, k, v, o, lse, mask, bias, alibi_slopes, sink, seed, scale, softcap, q_offset, left, right, dropout_p,
    bias_grad,
):  # fmt: skip
    """dq, dk, dv in the memory order of q, k, v; dbias and dsink, empty where they are not wanted."""
    scoring, window, sizes = _prepare(q, k, v, mask, bias, alibi_slopes, seed, scale, softcap, q_offset, left, right)
    (B, H, T, D), (Hkv, S), D_V = q.shape, k.shape[1:3], v.shape[3]
    dq, dk, dv = _like_heads(q, D), _like_heads(k, D), _like_heads(v, D_V)
    delta = torch.empty_like(lse, dtype=torch.float32)
    dscores = None
    if bias is not None and bias_grad:  # blocks outside the window are never visited: they stay 0
        whole = bias.shape == (B, H, T, S)
        dscores = q.new_zeros(B, H, T, S, dtype=bias.dtype if whole else torch.float32)
    if lse.numel():
        dlse = None if dlse is None else dlse.contiguous()
        BLOCK_D = sizes["BLOCK_D"]
        BLOCK_M = 4096 // BLOCK_D  # 32 elements of o and of do a thread
        grid = (triton.cdiv(T, BLOCK_M) * B * H,)
        _attention_bwd_delta[grid](
            _view(o), _view(do), lse, dlse, delta, T, H, D_V=D_V, BLOCK_M=BLOCK_M, BLOCK_D=BLOCK_D
        )
        launch = _launch_for("dq", q, sizes["BLOCK_D"], mask is not None or bias is not None)
        grid = (triton.cdiv(T, launch["BLOCK_M"]) * B * H,)
        views = _view(q), _view(k), _view(v), _view(do)
        _attention_bwd_dq[grid](*views, _view(dq), _view(dscores), lse, delta, scoring, window, **sizes, **launch)
    if dk.numel():
        launch = _launch_for("dkdv", q, sizes["BLOCK_D"], mask is not None or bias is not None)
        grid = (triton.cdiv(S, launch["BLOCK_N"]) * B * Hkv,)
        views = _view(q), _view(k), _view(v), _view(do)
        _attention_bwd_dkdv[grid](*views, _view(dk), _view(dv), lse, delta, scoring, window, **sizes, **launch)
    return dq, dk, dv, _bias_grad(bias, dscores, q), _sink_grad(sink, lse, delta, q)


def _bias_grad(bias, dscores, q):
    """The gradient of the scores, summed over the dimensions along which the bias was broadcast."""
    if dscores is None:
        return (q if bias is None else bias).new_empty(0)
    dims = [n for n in range(4) if bias.shape[n] != dscores.shape[n]]
    return (dscores.sum(dims, keepdim=True) if dims else dscores).to(bias.dtype)


def _sink_grad(sink, lse, delta, q):
    """-sum over batch and queries of p_sink * delta: the sink is a score with dp = 0."""
    if sink is None:
        return q.new_empty(0)
    p = torch.exp(sink.float().view(-1, 1) - lse).masked_fill(lse == -torch.inf, 0.0)
    return -(p * delta).sum((0, 2)).to(sink.dtype)
