"""What the attention kernels share: where tensors lie, which keys a query sees, its scores and their gradients.

Scores are made in `_scores` and their gradients in `_score_grads`, for every kernel and with every option. In 16 bits
scores are kept in units of ln 2, so that the exponential is one exp2 and its scale is free; in fp32 that would cost a
rounding step of the score, and the exponential is natural.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
# Where a running maximum starts. Finite: exp(-inf - LOWEST) is 0, but exp(-inf - -inf) would be NaN.
LOWEST = tl.constexpr(-3.0e38)


class View(NamedTuple):
    """A tensor [B, H, rows, columns] in memory, or [B, H, rows]; or one head of it, where `ptr` points at the head."""

    ptr: Any
    strides: Any


class Tiles(NamedTuple):
    """One head of a tensor [B, H, rows, columns] whose tiles the hardware fetches (TMA): `ptr` describes the tensor."""

    ptr: Any
    head: Any


class Window(NamedTuple):
    """T queries, S keys, and who sees whom: query i, at position i + q_offset, sees keys i + first to i + last.

    Of a packed batch T and S are all rows; where q_offset is None, `_locate` adds S - T of the sequence to the others.
    """

    T: Any
    S: Any
    q_offset: Any
    first: Any
    last: Any


class Packing(NamedTuple):
    """A packed batch: sequence n is the rows cu_q[n] to cu_q[n + 1] of the queries, and cu_k likewise of the keys."""

    cu_q_ptr: Any
    cu_k_ptr: Any
    sequences: Any


class Pages(NamedTuple):
    """A cache in pages [count, Hkv, size, D]: row j of sequence b is row j % size of page table[b, j // size]."""

    table_ptr: Any
    per_sequence: Any
    size: Any
    count: Any


class Place(NamedTuple):
    """What a program works on: the block that begins at row `start` of a head, and the window of its sequence."""

    head: Any  # batch entry or sequence, head
    start: Any
    idle: Any  # there is no such block
    q_row: Any  # where the sequence begins
    k_row: Any
    window: Any


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
    dropout: Any


class Dropout(NamedTuple):
    """A probability is dropped where its random 32-bit word is below the threshold, or else multiplied by `weight`."""

    seed_ptr: Any
    threshold: Any
    weight: Any
    H: Any


@triton.jit
def _locate(window, packing, heads, BLOCK: tl.constexpr, KEYS: tl.constexpr):
    """The block of queries, or (KEYS) of keys, that is this program's.

    Causal: the blocks with the most work start first, the last queries and the first keys.
    """
    if packing is None:
        blocks = tl.cdiv(window.S if KEYS else window.T, BLOCK)
        bh, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
        start = (block if KEYS else blocks - 1 - block) * BLOCK
        return Place((bh // heads, bh % heads), start, False, 0, 0, window)
    else:
        return _locate_packed(window, packing, BLOCK, KEYS)


@triton.jit
def _rows(cu_ptr, n, packing, total, OWN: tl.constexpr):
    """Where sequence n begins and how long it is. Past the last only the rows that programs OWN are a sequence."""
    begin = tl.minimum(tl.load(cu_ptr + n), total).to(tl.int32)
    end = tl.minimum(tl.load(cu_ptr + tl.minimum(n + 1, packing.sequences)), total).to(tl.int32)
    if OWN:
        end = tl.where(n < packing.sequences, end, total)
    return begin, end - begin


@triton.jit
def _locate_packed(window, packing, BLOCK: tl.constexpr, KEYS: tl.constexpr):
    """`_locate` in a packed batch: sequence n has the blocks from cu[n] // BLOCK + n on.

    That takes no sum over sequences and leaves at most one block of each idle. The rows past the last sequence are one
    more, which sees nothing.
    """
    slots = (window.S if KEYS else window.T) // BLOCK + packing.sequences + 1
    h, slot = tl.program_id(0) // slots, tl.program_id(0) % slots
    cu_ptr = packing.cu_k_ptr if KEYS else packing.cu_q_ptr
    n, above = tl.program_id(0) * 0, packing.sequences + 1  # the sequence lies in [n, above)
    while above - n > 1:
        middle = (n + above) // 2
        right = tl.load(cu_ptr + middle) // BLOCK + middle <= slot
        n, above = tl.where(right, middle, n), tl.where(right, above, middle)
    q_row, T = _rows(packing.cu_q_ptr, n, packing, window.T, OWN=not KEYS)
    k_row, S = _rows(packing.cu_k_ptr, n, packing, window.S, OWN=KEYS)
    first, last, q_offset = window.first, window.last, window.q_offset
    if window.q_offset is None:
        q_offset = S - T
        first += q_offset
        last += q_offset
    block = slot - ((k_row if KEYS else q_row) // BLOCK + n)
    blocks = tl.cdiv(S if KEYS else T, BLOCK)
    start = (block if KEYS else blocks - 1 - block) * BLOCK
    return Place((n, h), start, block >= blocks, q_row, k_row, Window(T, S, q_offset, first, last))


@triton.jit
def _head(x, head, row=0):
    """The view of one head (batch entry, head), from `row` on, or its tiles, which have no `row`."""
    if isinstance(x, tl.tensor_descriptor):
        return Tiles(x, head)
    else:
        offset = head[0].to(tl.int64) * x.strides[0] + head[1].to(tl.int64) * x.strides[1]
        return View(x.ptr + (offset + tl.cast(row, tl.int64) * x.strides[2]), x.strides)


@triton.jit
def _tile(x, start, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Pointers to rows start, start + 1, ... of a head. Only the first term changes in a loop."""
    rows, columns = tl.arange(0, BLOCK_R).to(tl.int64), tl.arange(0, BLOCK_C).to(tl.int64)
    return (x.ptr + tl.cast(start, tl.int64) * x.strides[2]) + (rows[:, None] * x.strides[2] + columns * x.strides[3])


@triton.jit
def _load(x, start, stop, COLUMNS, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, EDGE: tl.constexpr):
    """Rows start, start + 1, ... of a head: zero past COLUMNS and, where that can happen (EDGE), from row `stop` on."""
    if isinstance(x.ptr, tl.tensor_descriptor):  # TMA gives zeros past both
        return x.ptr.load([x.head[0], x.head[1], start, 0]).reshape(BLOCK_R, BLOCK_C)
    else:
        inside = None
        if EDGE:
            inside = (start + tl.arange(0, BLOCK_R) < stop)[:, None]
        if COLUMNS < BLOCK_C:
            columns = (tl.arange(0, BLOCK_C) < COLUMNS)[None, :]
            inside = inside & columns if EDGE else columns
        return tl.load(_tile(x, start, BLOCK_R, BLOCK_C), mask=inside, other=None if inside is None else 0.0)


@triton.jit
def _load_paged(x, pages, start, stop, COLUMNS, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """`_load` where `x` begins at its head in page 0 and `pages` at its sequence; zero where there is no such page."""
    rows, columns = start + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_C).to(tl.int64)
    page = tl.load(pages.table_ptr + rows // pages.size, mask=rows < stop, other=-1).to(tl.int64)
    inside = ((page >= 0) & (page < pages.count))[:, None] & (columns < COLUMNS)[None, :]
    offset = page * x.strides[0] + (rows % pages.size) * x.strides[2]
    return tl.load(x.ptr + (offset[:, None] + columns[None, :] * x.strides[3]), mask=inside, other=0.0)


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
        slopes = scoring.slope
        slope = tl.load(slopes.ptr + head[0] * slopes.strides[0] + head[1] * slopes.strides[1]).to(tl.float32)
        s -= (slope * scoring.rate) * tl.abs(i + window.q_offset - j).to(tl.float32)
    if EDGE:
        s = tl.where((j < window.S) & (j >= i + window.first) & (j <= i + window.last), s, float("-inf"))
    if scoring.mask is not None:
        s = tl.where(tl.load(_pairs(scoring.mask, head, i, j), mask=inside, other=0) != 0, s, float("-inf"))
    return s, capped


@triton.jit
def _score_grads(qk, dp, kept, lse, lse_low, delta, head, i, j, scoring, window, EDGE: tl.constexpr):
    """p = exp(s - lse) where kept; ds = p (dp - delta), the gradient of the bias; the gradient of scale * q k^T."""
    s, capped = _scores(qk, head, i, j, scoring, window, EDGE)
    if scoring.rate == 1.0:  # fp32: rounding lse would be the largest error of the gradients
        p = _exp((s - lse) - lse_low, scoring)
    else:
        p = _exp(s - lse, scoring)
    if scoring.dropout is not None:
        dp = tl.where(kept, dp * scoring.dropout.weight, 0.0)
    ds = p * (dp - delta)
    if scoring.dropout is not None:
        p = tl.where(kept, p, 0.0)
    if scoring.softcap is not None:
        return p, ds, ds * (1.0 - capped * capped)
    else:
        return p, ds, ds


@triton.jit
def _kept(dropout, head, i, j_start, BLOCK_N: tl.constexpr):
    """Which probabilities of the queries i and the keys j_start, ... stay: word j % 4 of counter (i, j // 4, head).

    Place and seed alone decide, so that forward and backward agree, and every other backend with them.
    Source: Philox4x32-7, Salmon et al. 2011, doi:10.1145/2063384.2063405.
    """
    group = j_start // 4 + tl.arange(0, BLOCK_N // 4)
    counter = i[:, None], group[None, :], head[0] * dropout.H + head[1], 0
    w0, w1, w2, w3 = tl.philox(tl.load(dropout.seed_ptr), *counter, n_rounds=7)
    threshold = tl.cast(dropout.threshold, tl.uint32)
    # Four keys a counter: [i, BLOCK_N]. Booleans are interleaved, as they take a quarter of what the words would.
    return tl.interleave(
        tl.interleave(w0 >= threshold, w2 >= threshold), tl.interleave(w1 >= threshold, w3 >= threshold)
    )


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
