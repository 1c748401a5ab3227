"""Attention over packed sequences in Triton: the kernels of attention.py, which find a sequence by its bounds.

The bounds stay on the device: the grid has room for every block that sequences of this total length can have, which is
at most one too many for each sequence. Goes into another project together with attention.py and attention_scores.py.
"""

import torch

from .attention import backward, call, forward, sink_grad
from .attention_scores import Packing, Window


def _as_batch(x):
    """[total, H, D] as [1, H, total, D]."""
    return x.transpose(0, 1).unsqueeze(0)


def _call(q, k, v, cu_q, cu_k, alibi_slopes, seed, scale, softcap, q_offset, left, right, dropout_p):
    T, S = q.shape[2], k.shape[2]
    shift = 0 if q_offset is None else q_offset
    most = T + S  # beyond it nothing changes, whatever S - T of a sequence is added
    first = min(max(shift - left, -most), most) if left >= 0 else -most
    last = min(max(shift + right, -most), most) if right >= 0 else most
    packing = Packing(cu_q.contiguous(), cu_k.contiguous(), len(cu_q) - 1)
    window = Window(T, S, q_offset, first, last)
    return call(q, k, v, window, scale, softcap, seed, dropout_p, alibi_slopes=alibi_slopes, packing=packing)


def attention_varlen_fwd(
    q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, sink, seed, scale, softcap, q_offset, left, right, dropout_p
):  # fmt: skip
    """o [total_q, H, Dv] and lse [H, total_q] in fp64."""
    o = q.new_empty(*q.shape[:2], v.shape[2])
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float64)
    heads = [_as_batch(x) for x in (q, k, v)]
    options = cu_seqlens_q, cu_seqlens_k, alibi_slopes, seed, scale, softcap, q_offset, left, right, dropout_p
    forward(_call(*heads, *options), *heads, _as_batch(o), lse.unsqueeze(0), sink)
    return o, lse


def attention_varlen_bwd(
    do, dlse, q, k, v, o, lse, cu_seqlens_q, cu_seqlens_k, alibi_slopes, sink, seed, scale, softcap, q_offset, left,
    right, dropout_p,
):  # fmt: skip
    """dq, dk, dv like q, k, v but contiguous; dsink, empty where there is no sink."""
    gradients = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
    heads = [_as_batch(x) for x in (q, k, v)]
    options = cu_seqlens_q, cu_seqlens_k, alibi_slopes, seed, scale, softcap, q_offset, left, right, dropout_p
    given = _as_batch(do), None if dlse is None else dlse.unsqueeze(0)
    lse = lse.unsqueeze(0)
    made = [_as_batch(x) for x in gradients]
    delta = backward(_call(*heads, *options), *given, *heads, _as_batch(o), lse, *made, None)
    return *gradients, sink_grad(sink, lse, delta, q)
