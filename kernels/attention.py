"""Attention in Triton, forward and backward, of a batch or of packed sequences (varlen.py), with every option.

A block of queries walks over the keys that its window leaves: first the blocks that all of its queries see whole,
without any test, then the blocks that the diagonal, the window or the end of the keys cuts. Backward is two kernels,
one that holds keys (dk, dv) and one that holds queries (dq, dbias), so that no sum depends on the order in which
programs run.
The attention files import one another and are copied into another project together.
Source: Dao 2023, arXiv:2307.08691.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .attention_scores import (
    LOG2_E,
    LOWEST,
    Dropout,
    Scoring,
    View,
    Window,
    _exp,
    _head,
    _kept,
    _load,
    _load_lse,
    _load_paged,
    _locate,
    _pairs,
    _score_grads,
    _scores,
    _store,
    _walk_keys,
    _walk_queries,
)
from .device import entry, fetchable_strides, gpu_name, is_fetchable, shared_bytes


@triton.jit
def _attend(acc, m, l, q, k, v, pages, head, i, walk, scoring, window, D, D_V, BLOCK_N, BLOCK_D, EDGE: tl.constexpr):
    """Online softmax over the whole blocks of keys, or (EDGE) over the others."""
    for n in tl.range(walk.start if EDGE else walk.whole, walk.stop if EDGE else walk.whole + walk.gap, BLOCK_N):
        j_start = n + tl.where(n >= walk.whole, walk.gap, 0) if EDGE else n
        j = j_start + tl.arange(0, BLOCK_N)
        if pages is None:
            k_block = _load(k, j_start, window.S, D, BLOCK_N, BLOCK_D, EDGE)  # [BLOCK_N, BLOCK_D]
        else:
            k_block = _load_paged(k, pages, j_start, window.S, D, BLOCK_N, BLOCK_D)
        qk = tl.dot(q, k_block.T, input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        s, _ = _scores(qk, head, i[:, None], j[None, :], scoring, window, EDGE)

        m_next = tl.maximum(m, tl.max(s, 1))
        p = _exp(s - m_next[:, None], scoring)
        alpha = _exp(m - m_next, scoring)
        l = l * alpha + tl.sum(p, 1)
        if scoring.dropout is not None:  # the sum and lse know nothing of it
            p = tl.where(_kept(scoring.dropout, head, i, j_start, BLOCK_N), p, 0.0)
        if pages is None:
            v_block = _load(v, j_start, window.S, D_V, BLOCK_N, BLOCK_D, EDGE)  # [BLOCK_N, BLOCK_D]
        else:
            v_block = _load_paged(v, pages, j_start, window.S, D_V, BLOCK_N, BLOCK_D)
        acc = tl.dot(p.to(v_block.dtype), v_block, acc * alpha[:, None], input_precision="ieee")
        m = m_next
    return acc, m, l


@triton.jit(do_not_specialize=["window", "packing"])
def _attention_fwd(
    q,
    k,
    v,
    o,
    lse,
    sink_ptr,
    scoring,
    window,
    packing,
    H,
    G,
    D: tl.constexpr,
    D_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One block of queries of one head."""
    place = _locate(window, packing, H, BLOCK_M, KEYS=False)
    if packing is not None:
        if place.idle:
            return
    head, i_start, window = place.head, place.start, place.window
    T = window.T
    i = i_start + tl.arange(0, BLOCK_M)
    q_block = _load(_head(q, head, place.q_row), i_start, T, D, BLOCK_M, BLOCK_D, True)  # [BLOCK_M, BLOCK_D]
    head_kv = head[0], head[1] // G
    k_head, v_head = _head(k, head_kv, place.k_row), _head(v, head_kv, place.k_row)

    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    m = tl.full((BLOCK_M,), LOWEST, tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    if sink_ptr is not None:  # one more score, with no value
        sink = tl.load(sink_ptr + head[1]).to(tl.float32) * scoring.rate
        if packing is not None:  # the rows past the last sequence have not even that
            sink = tl.where(head[0] < packing.sequences, sink, float("-inf"))
        m = tl.maximum(m, sink)
        l += tl.where(sink > LOWEST, 1.0, 0.0)

    walk = _walk_keys(i_start, window, BLOCK_M, BLOCK_N)
    for EDGE in tl.static_range(2):
        acc, m, l = _attend(
            acc, m, l, q_block, k_head, v_head, None, head, i, walk, scoring, window, D, D_V, BLOCK_N, BLOCK_D, EDGE
        )

    empty = l == 0
    l = tl.where(empty, 1.0, l)
    lse_block = tl.where(empty, float("-inf"), m.to(tl.float64) * (1.0 / scoring.rate) + tl.log(l))
    tl.store(_head(lse, head, place.q_row).ptr + i, lse_block, mask=i < T)
    o_block = acc / l[:, None]
    if scoring.dropout is not None:
        o_block *= scoring.dropout.weight
    _store(_head(o, head, place.q_row), o_block, i_start, T, D_V, BLOCK_M, BLOCK_D)


@triton.jit(do_not_specialize=["window", "packing"])
def _attention_bwd_delta(
    o, do, lse, dlse, delta, window, packing, H, D_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr
):
    """delta = sum(o * do) - dlse: what the softmax's gradient subtracts from dp. 0 for a query that sees nothing."""
    place = _locate(window, packing, H, BLOCK_M, KEYS=False)
    if packing is not None:
        if place.idle:
            return
    head, i_start, T = place.head, place.start, place.window.T
    i = i_start + tl.arange(0, BLOCK_M)
    o_block = _load(_head(o, head, place.q_row), i_start, T, D_V, BLOCK_M, BLOCK_D, True).to(tl.float32)
    do_block = _load(_head(do, head, place.q_row), i_start, T, D_V, BLOCK_M, BLOCK_D, True).to(tl.float32)

    delta_block = tl.sum(o_block * do_block, 1)
    if dlse is not None:
        delta_block -= tl.load(_head(dlse, head, place.q_row).ptr + i, mask=i < T, other=0.0).to(tl.float32)
    lse_block = tl.load(_head(lse, head, place.q_row).ptr + i, mask=i < T, other=0.0)
    delta_block = tl.where(lse_block == float("-inf"), 0.0, delta_block)
    tl.store(_head(delta, head, place.q_row).ptr + i, delta_block, mask=i < T)


@triton.jit
def _add_key_grads(
    dk, dv, k, v, q, do, lse, delta, place, G, walk, scoring, D, D_V,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """dk / scale and dv of one block of keys, from the whole blocks of queries or (EDGE) from the others."""
    head_kv, j_start, row, window = place.head, place.start, place.q_row, place.window
    T = window.T
    j = j_start + tl.arange(0, BLOCK_N)
    first = walk.start if EDGE else walk.whole
    blocks = tl.cdiv(walk.stop - first if EDGE else walk.gap, BLOCK_M)
    for n in tl.range(0, G * blocks):  # one loop over G heads and their blocks: two would keep more in registers
        head = (head_kv[0], head_kv[1] * G + n // tl.maximum(blocks, 1))
        i_start = first + n % tl.maximum(blocks, 1) * BLOCK_M
        if EDGE:
            i_start += tl.where(i_start >= walk.whole, walk.gap, 0)
        i = i_start + tl.arange(0, BLOCK_M)
        q_block = _load(_head(q, head, row), i_start, T, D, BLOCK_M, BLOCK_D, EDGE)  # [BLOCK_M, BLOCK_D]
        do_block = _load(_head(do, head, row), i_start, T, D_V, BLOCK_M, BLOCK_D, EDGE)  # [BLOCK_M, BLOCK_D]
        lse_high, lse_low = _load_lse(_head(lse, head, row).ptr, i, T, scoring)
        delta_block = tl.load(_head(delta, head, row).ptr + i, mask=i < T, other=0.0)

        # Keys by queries, so that p and ds are where the next product wants its left operand: in registers.
        qk = tl.dot(k, q_block.T, input_precision="ieee")  # [BLOCK_N, BLOCK_M]
        dp = tl.dot(v, do_block.T, input_precision="ieee")
        kept = None
        if scoring.dropout is not None:
            kept = _kept(scoring.dropout, head, i, j_start, BLOCK_N).T
        p, _, ds = _score_grads(
            qk, dp, kept, lse_high[None, :], lse_low[None, :], delta_block[None, :], head, i[None, :], j[:, None],
            scoring, window, EDGE,
        )  # fmt: skip
        dv = tl.dot(p.to(do_block.dtype), do_block, dv, input_precision="ieee")
        dk = tl.dot(ds.to(q_block.dtype), q_block, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=["window", "packing"])
def _attention_bwd_dkdv(
    q,
    k,
    v,
    do,
    dk,
    dv,
    lse,
    delta,
    scoring,
    window,
    packing,
    H,
    G,
    D: tl.constexpr,
    D_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One block of keys of one key head, over the queries of its G query heads."""
    place = _locate(window, packing, H // G, BLOCK_N, KEYS=True)
    if packing is not None:
        if place.idle:
            return
    head_kv, j_start, row, S = place.head, place.start, place.k_row, place.window.S
    k_block = _load(_head(k, head_kv, row), j_start, S, D, BLOCK_N, BLOCK_D, True)  # [BLOCK_N, BLOCK_D]
    v_block = _load(_head(v, head_kv, row), j_start, S, D_V, BLOCK_N, BLOCK_D, True)  # [BLOCK_N, BLOCK_D]

    dk_block = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv_block = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    walk = _walk_queries(j_start, place.window, BLOCK_M, BLOCK_N)
    for EDGE in tl.static_range(2):
        dk_block, dv_block = _add_key_grads(
            dk_block, dv_block, k_block, v_block, q, do, lse, delta, place, G, walk, scoring, D, D_V,
            BLOCK_M, BLOCK_N, BLOCK_D, EDGE,
        )  # fmt: skip
    if scoring.dropout is not None:
        dv_block *= scoring.dropout.weight

    _store(_head(dk, head_kv, row), dk_block * scoring.scale, j_start, S, D, BLOCK_N, BLOCK_D)
    _store(_head(dv, head_kv, row), dv_block, j_start, S, D_V, BLOCK_N, BLOCK_D)


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
        kept = None
        if scoring.dropout is not None:
            kept = _kept(scoring.dropout, head, i, j_start, BLOCK_N)
        _, db, ds = _score_grads(
            qk, dp, kept, lse[:, None], lse_low[:, None], delta[:, None], head, i[:, None], j[None, :], scoring,
            window, EDGE,
        )  # fmt: skip
        if dbias is not None:
            ptrs = _pairs(dbias, head, i[:, None], j[None, :])
            tl.store(ptrs, db.to(dbias.ptr.dtype.element_ty), mask=(i[:, None] < T) & (j[None, :] < S))
        dq = tl.dot(ds.to(k_block.dtype), k_block, dq, input_precision="ieee")
    return dq


@triton.jit(do_not_specialize=["window", "packing"])
def _attention_bwd_dq(
    q,
    k,
    v,
    do,
    dq,
    dbias,
    lse,
    delta,
    scoring,
    window,
    packing,
    H,
    G,
    D: tl.constexpr,
    D_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One block of queries of one head; it walks over the keys as `_attention_fwd` does."""
    place = _locate(window, packing, H, BLOCK_M, KEYS=False)
    if packing is not None:
        if place.idle:
            return
    head, i_start, row, window = place.head, place.start, place.q_row, place.window
    T = window.T
    i = i_start + tl.arange(0, BLOCK_M)
    q_block = _load(_head(q, head, row), i_start, T, D, BLOCK_M, BLOCK_D, True)  # [BLOCK_M, BLOCK_D]
    do_block = _load(_head(do, head, row), i_start, T, D_V, BLOCK_M, BLOCK_D, True)  # [BLOCK_M, BLOCK_D]
    lse_high, lse_low = _load_lse(_head(lse, head, row).ptr, i, T, scoring)
    delta_block = tl.load(_head(delta, head, row).ptr + i, mask=i < T, other=0.0)
    head_kv = head[0], head[1] // G
    k_head, v_head = _head(k, head_kv, place.k_row), _head(v, head_kv, place.k_row)

    dq_block = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    walk = _walk_keys(i_start, window, BLOCK_M, BLOCK_N)
    for EDGE in tl.static_range(2):
        dq_block = _add_query_grads(
            dq_block, q_block, do_block, k_head, v_head, dbias, lse_high, lse_low, delta_block, head, i, walk,
            scoring, window, D, D_V, BLOCK_N, BLOCK_D, EDGE,
        )  # fmt: skip
    _store(_head(dq, head, row), dq_block * scoring.scale, i_start, T, D, BLOCK_M, BLOCK_D)


# By GPU name ("any" for the others), kernel and kind of call: head size -> BLOCK_M, BLOCK_N, num_warps, num_stages and,
# where it was measured to be faster, True: q, k, v and do come by TMA.
# 2026-11-24, not measured: the largest blocks that keep the rules of tests/test_triton_compile.py, no spilled registers
# above all, on sm_80, sm_90 and sm_100. A mask, a bias, dropout, or a soft-cap with ALiBi ("pairs") takes registers for
# every pair of query and key; fp32 has no matrix units.
LAUNCHES = {
    "any": {
        ("fwd", "plain"): {32: (128, 32, 4, 3), 64: (128, 64, 8, 3), 128: (64, 64, 4, 3), 256: (64, 32, 8, 2)},
        ("fwd", "pairs"): {32: (128, 64, 8, 2), 64: (128, 32, 8, 2), 128: (64, 32, 8, 1), 256: (32, 16, 8, 2)},
        ("fwd", "fp32"): {32: (32, 32, 4, 2), 64: (32, 32, 8, 2), 128: (32, 16, 8, 2), 256: (16, 16, 8, 2)},
        ("dkdv", "plain"): {32: (64, 128, 8, 2), 64: (32, 128, 8, 2), 128: (64, 64, 8, 2), 256: (32, 32, 8, 2)},
        ("dkdv", "pairs"): {32: (32, 64, 8, 2), 64: (32, 32, 8, 1), 128: (32, 16, 8, 1), 256: (16, 16, 8, 1)},
        ("dkdv", "fp32"): {32: (32, 32, 4, 2), 64: (32, 16, 4, 2), 128: (16, 32, 8, 2), 256: (16, 16, 8, 1)},
        ("dq", "plain"): {32: (128, 64, 8, 2), 64: (128, 64, 8, 2), 128: (64, 64, 8, 2), 256: (64, 32, 8, 2)},
        ("dq", "pairs"): {32: (64, 32, 4, 2), 64: (64, 32, 8, 2), 128: (64, 16, 8, 2), 256: (32, 16, 8, 1)},
        ("dq", "fp32"): {32: (32, 32, 4, 2), 64: (32, 32, 8, 2), 128: (32, 16, 8, 2), 256: (16, 16, 8, 2)},
    }
}


# By GPU name ("any" for the others): the head sizes for which attention_sm90.py was measured to be faster, where it can
# do a call. Nothing has been measured yet.
WARP_SPECIALISED: dict[str, tuple[int, ...]] = {}


def _warp_specialised(device):
    return WARP_SPECIALISED.get(gpu_name(device), WARP_SPECIALISED.get("any", ()))


class Call(NamedTuple):
    """What the kernels of both directions are given besides tensors."""

    scoring: Scoring
    window: Window
    packing: Any
    sizes: dict
    kind: str  # column of LAUNCHES

    def launch(self, kernel, x):
        """Block sizes, warps, stages."""
        if x.device.type == "cpu":  # the interpreter: small blocks, so that short tests cross their borders
            return dict(BLOCK_M=32, BLOCK_N=16)
        found = entry(LAUNCHES, x.device)[kernel, self.kind][self.sizes["BLOCK_D"]]
        launch = dict(zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages", "tiles"), found))
        is_largest = kernel == "dq" and self.sizes["BLOCK_D"] == 256  # two stages take 100 KiB
        if is_largest and shared_bytes(x.device) < 100 << 10:
            launch["num_stages"] = 1
        return launch

    def view(self, x):
        """`x` as kernels take it. A packed batch comes as a batch of one, its sequences told apart by their rows."""
        if x is None:
            return None
        return View(x, x.stride() if self.packing is None else (0, *x.stride()[1:]))

    def operands(self, launch, q, k, v, do=None):
        """What kernels read in blocks: views or, where the launch has `tiles` and TMA can fetch them, descriptors."""
        given = [x for x in (q, k, v, do) if x is not None]
        wanted = launch.pop("tiles", False) and self.packing is None
        if not wanted or not all(map(is_fetchable, given)):
            return [self.view(x) for x in given]
        rows = (launch[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_N", "BLOCK_M"))
        return [
            TensorDescriptor(x, list(x.shape), fetchable_strides(x), [1, 1, n, self.sizes["BLOCK_D"]])
            for x, n in zip(given, rows)
        ]

    def grid(self, x, rows, BLOCK):
        """A program for each block of `rows` rows of each head of x, and those that `_locate` leaves idle."""
        B, heads = x.shape[:2]
        blocks = triton.cdiv(rows, BLOCK) if self.packing is None else rows // BLOCK + self.packing.sequences + 1
        return (blocks * B * heads,)


def scoring_of(q, v, shape, scale, softcap, mask=None, bias=None, alibi_slopes=None, dropout=None):
    """What makes the scores [B, H, T, S]; checks what the kernels cannot take."""
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"attention: the Triton kernels take fp32, bf16 and fp16, got {q.dtype}")
    if max(q.shape[3], v.shape[3]) > 256:
        raise ValueError(f"attention: the Triton kernels take head sizes up to 256, got {q.shape[3]} and {v.shape[3]}")
    mask, bias = (None if x is None else x.expand(shape) for x in (mask, bias))
    slopes = None
    if alibi_slopes is not None:
        slopes = View(alibi_slopes, (0, *alibi_slopes.stride()) if alibi_slopes.ndim == 1 else alibi_slopes.stride())
    return Scoring(
        tl.constexpr(1.0) if q.dtype == torch.float32 else LOG2_E,
        scale,
        softcap or None,
        None if mask is None else View(mask, mask.stride()),
        None if bias is None else View(bias, bias.stride()),
        slopes,
        dropout,
    )


def call(q, k, v, window, scale, softcap, seed, dropout_p, *, packing=None, **tensors):
    """The `Call` for q [B, H, T, D], k and v; a packed batch has B = 1 and all rows in one."""
    (B, H, T, D), (Hkv, S), D_V = q.shape, k.shape[1:3], v.shape[3]
    # Of an integer that is 1 Triton makes a constant, and 3.6 loses it in a tuple of tuples; of True it makes none.
    heads = True if H == 1 else H
    dropout = Dropout(seed, int(dropout_p * 2**32), 1 / (1 - dropout_p), heads) if dropout_p else None
    scoring = scoring_of(q, v, (B, H, T, S), scale, softcap, dropout=dropout, **tensors)
    sizes = dict(H=H, G=H // max(Hkv, 1), D=D, D_V=D_V, BLOCK_D=max(32, triton.next_power_of_2(max(D, D_V))))
    pairs = scoring.mask or scoring.bias or dropout or (softcap and scoring.slope)
    kind = "fp32" if q.dtype == torch.float32 else "pairs" if pairs else "plain"
    return Call(scoring, window, packing, sizes, kind)


def forward(call, q, k, v, o, lse, sink):
    """Fills o [B, H, T, Dv] and lse [B, H, T]."""
    if WARP_SPECIALISED and q.shape[3] in _warp_specialised(q.device):
        from . import attention_sm90  # not before: Gluon is another language, and changes from release to release

        if attention_sm90.takes(q, k, v, call.scoring, sink, call.packing):
            return attention_sm90.forward(q, k, v, o, lse, call.scoring.scale, call.window)
    if lse.numel():
        launch = call.launch("fwd", q)
        sink = None if sink is None else sink.contiguous()
        operands, views = call.operands(launch, q, k, v), (call.view(x) for x in (o, lse))
        grid = call.grid(q, q.shape[2], launch["BLOCK_M"])
        _attention_fwd[grid](*operands, *views, sink, call.scoring, call.window, call.packing, **call.sizes, **launch)


def backward(call, do, dlse, q, k, v, o, lse, dq, dk, dv, dscores):
    """Fills dq, dk, dv and, where it is not None, the gradient of the scores before the soft-cap; returns delta."""
    delta = torch.empty_like(lse, dtype=torch.float32)
    rest = call.scoring, call.window, call.packing
    if lse.numel():
        BLOCK_D = call.sizes["BLOCK_D"]
        BLOCK_M = 4096 // BLOCK_D  # 32 elements of o and of do a thread
        views = (call.view(x) for x in (o, do, lse, dlse, delta))
        sizes = dict(H=q.shape[1], D_V=v.shape[3], BLOCK_M=BLOCK_M, BLOCK_D=BLOCK_D)
        _attention_bwd_delta[call.grid(q, q.shape[2], BLOCK_M)](*views, *rest[1:], **sizes)
        launch = call.launch("dq", q)
        views = (call.view(x) for x in (dq, dscores, lse, delta))
        grid = call.grid(q, q.shape[2], launch["BLOCK_M"])
        _attention_bwd_dq[grid](*call.operands(launch, q, k, v, do), *views, *rest, **call.sizes, **launch)
    if dk.numel():
        launch = call.launch("dkdv", q)
        views = (call.view(x) for x in (dk, dv, lse, delta))
        grid = call.grid(k, k.shape[2], launch["BLOCK_N"])
        _attention_bwd_dkdv[grid](*call.operands(launch, q, k, v, do), *views, *rest, **call.sizes, **launch)
    return delta


def sink_grad(sink, lse, delta, like):
    """-sum over batch and queries of p_sink * delta, as the sink is a score with dp = 0; empty where there is none."""
    if sink is None:
        return like.new_empty(0)
    p = torch.exp(sink.float().view(-1, 1) - lse).masked_fill(lse == -torch.inf, 0.0)
    return -(p * delta).sum((0, 2)).to(sink.dtype)


def _window(q, k, q_offset, left, right):
    """Beyond these limits nothing changes, and inside them no kernel overflows 32 bits."""
    T, S = q.shape[2], k.shape[2]
    first = min(max(q_offset - left, -T), S) if left >= 0 else -T
    last = min(max(q_offset + right, -T), S) if right >= 0 else S
    return Window(T, S, q_offset, first, last)


def _like_heads(x, D):
    """An empty [B, H, T, D] with the memory order of x: heads inside a position where x is a view of [B, T, H, D]."""
    B, H, T, _ = x.shape
    if x.stride(1) < x.stride(2):
        return x.new_empty(B, T, H, D).transpose(1, 2)
    return x.new_empty(B, H, T, D)


def attention_fwd(q, k, v, mask, bias, alibi_slopes, sink, seed, scale, softcap, q_offset, left, right, dropout_p):
    """o = softmax(scores) v in the memory order of q, and lse [B, H, T] in fp64: backward must not see it rounded."""
    window = _window(q, k, q_offset, left, right)
    tensors = dict(mask=mask, bias=bias, alibi_slopes=alibi_slopes)
    o, lse = _like_heads(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float64)
    forward(call(q, k, v, window, scale, softcap, seed, dropout_p, **tensors), q, k, v, o, lse, sink)
    return o, lse


def attention_bwd(
    do, dlse, q, k, v, o, lse, mask, bias, alibi_slopes, sink, seed, scale, softcap, q_offset, left, right, dropout_p,
    bias_grad, partial,
):  # fmt: skip
    """dq, dk, dv in the memory order of q, k, v; dbias and dsink, empty where they are not wanted."""
    window = _window(q, k, q_offset, left, right)
    tensors = dict(mask=mask, bias=bias, alibi_slopes=alibi_slopes)
    dq, dk, dv = _like_heads(q, q.shape[3]), _like_heads(k, k.shape[3]), _like_heads(v, v.shape[3])
    dscores = None
    if bias is not None and bias_grad:  # blocks outside the window are never visited: they stay 0
        shape = (*q.shape[:3], k.shape[2])
        dscores = q.new_zeros(shape, dtype=bias.dtype if bias.shape == shape else torch.float32)
    problem = call(q, k, v, window, scale, softcap, seed, dropout_p, **tensors)
    delta = backward(problem, do, dlse, q, k, v, o, lse, dq, dk, dv, dscores)
    return dq, dk, dv, _bias_grad(bias, dscores, q), sink_grad(sink, lse, delta, q)


def _bias_grad(bias, dscores, q):
    """The gradient of the scores, summed over the dimensions along which the bias was broadcast."""
    if dscores is None:
        return (q if bias is None else bias).new_empty(0)
    dims = [n for n in range(4) if bias.shape[n] != dscores.shape[n]]
    return (dscores.sum(dims, keepdim=True) if dims else dscores).to(bias.dtype)
