"""Attention over packed sequences: no padding in memory, none in the work."""

import itertools

import torch

from fastllm import reference
from fastllm.dispatch import Op, choose
from fastllm.ops._common import apart, autocast, check_tensor, drop_all, gradients_through, no_fp64
from fastllm.ops.attention import OPTIONS, check_options, head_tensors

_VARLEN = "Tensor cu_seqlens_q, Tensor cu_seqlens_k, " + OPTIONS.partition("Tensor? bias, ")[2].replace(
    "SymInt q_offset", "SymInt? q_offset"
)


def _bwd_fake(do, dlse, q, k, v, o, lse, cu_q, cu_k, alibi_slopes, sink, *rest):
    gradients = [x.new_empty(x.shape) for x in (q, k, v)]
    return *gradients, q.new_empty(0) if sink is None else sink.new_empty(sink.shape)


attention_varlen_fwd = Op(
    f"attention_varlen_fwd(Tensor q, Tensor k, Tensor v, {_VARLEN}) -> (Tensor o, Tensor lse)",
    "varlen",
    lambda q, k, v, *rest: (
        q.new_empty(*q.shape[:2], v.shape[2]),
        q.new_empty(q.shape[1], q.shape[0], dtype=torch.float64),
    ),
)
attention_varlen_bwd = Op(
    f"attention_varlen_bwd(Tensor do, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, {_VARLEN})"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dsink)",
    "varlen",
    _bwd_fake,
)


class _AttentionVarlen(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cu_q, cu_k, alibi_slopes, sink, seed, options, backend):
        o, lse = attention_varlen_fwd(backend, q, k, v, cu_q, cu_k, alibi_slopes, sink, seed, *options.values())
        ctx.save_for_backward(q, k, v, o, lse, cu_q, cu_k, alibi_slopes, sink, seed)
        ctx.options, ctx.backend = options, backend
        ctx.set_materialize_grads(False)
        return o, lse

    @staticmethod
    def backward(ctx, do, dlse):
        q, k, v, o, lse, cu_q, cu_k, alibi_slopes, sink, seed = ctx.saved_tensors
        if torch.is_grad_enabled():

            def function(q, k, v, sink):
                return _each(q, k, v, cu_q, cu_k, alibi_slopes, sink, seed, **ctx.options)

            dq, dk, dv, dsink = gradients_through(function, (q, k, v, sink), (do, dlse))
        else:
            do = torch.zeros_like(o) if do is None else do
            extra = cu_q, cu_k, alibi_slopes, sink, seed, *ctx.options.values()
            dq, dk, dv, dsink = attention_varlen_bwd(ctx.backend, do, dlse, q, k, v, o, lse, *extra)
            dsink = None if sink is None else dsink
        return dq, dk, dv, None, None, None, dsink, None, None, None


def attention_varlen(
    q,
    k,
    v,
    *,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q=None,
    max_seqlen_k=None,
    causal=False,
    window=None,
    q_offset=None,
    scale=None,
    softcap=0.0,
    alibi_slopes=None,
    sink=None,
    dropout_p=0.0,
    return_lse=False,
):
    """`attention` of every sequence of a packed batch with itself: queries of sequence n see keys of sequence n alone.

    q [total_q, H, D], k [total_k, Hkv, D], v [total_k, Hkv, Dv]; any strides. Sequence n is the rows
    cu_seqlens_q[n] up to cu_seqlens_q[n + 1] of q and o, and cu_seqlens_k likewise of k and v: int32 or int64
    [sequences + 1], from 0, never falling. Rows past the last are in no sequence: o = 0, lse = -inf. max_seqlen_q and
    max_seqlen_k are taken for the sake of code written for flash-attn; no result depends on them.
    The options, dtypes, precision and errors are those of `attention`, for each sequence; alibi_slopes [H] or
    [sequences, H]. Returns o [total_q, H, Dv], or (o, lse) with lse [H, total_q].
    Saves q, k, v, o and 8 bytes per head and row. On CPU raises also RuntimeError for bounds that do not fit the
    tensors; on a GPU, which nobody waits for, what lies outside of them is not touched.
    Error: at most 1.1 times that of torch's scaled_dot_product_attention per sequence (tests/test_varlen.py).
    """
    op = "attention_varlen"
    if isinstance(q, torch.Tensor):
        q, k, v = autocast(q, k, v)
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(op, name, x, like=None if name == "q" else q)
        if x.ndim != 3:
            raise ValueError(f"{op}: {name} must be [total, heads, head size], got {list(x.shape)}")
    for name, cu in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        check_tensor(op, name, cu, like=q, dtypes=(torch.int32, torch.int64))
        if cu.ndim != 1 or not len(cu):
            raise ValueError(f"{op}: {name} must be [sequences + 1], got {list(cu.shape)}")
    if len(cu_seqlens_q) != len(cu_seqlens_k):
        raise ValueError(
            f"{op}: cu_seqlens_q and cu_seqlens_k must have one length, got {len(cu_seqlens_q)} and {len(cu_seqlens_k)}"
        )
    if dropout_p == 1:
        v, dropout_p = drop_all(v)
    batched = [x.transpose(0, 1).unsqueeze(0) for x in (q, k, v)]
    options = check_options(op, *batched, causal, window, q_offset, scale, softcap, dropout_p)
    if q_offset is None:  # each sequence has its own
        options["q_offset"] = None
    head_tensors(op, q, len(cu_seqlens_q) - 1, q.shape[1], alibi_slopes, sink)
    seed = torch.randint(2**62, (), device=q.device) if dropout_p else None
    arguments = q, k, v, cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous(), alibi_slopes, sink, seed
    backend = choose(op, q, no_fp64(q))
    if backend == "reference":
        o, lse = _each(*arguments, **options)
    else:
        o, lse = _AttentionVarlen.apply(*apart(*arguments), options, backend)
    if not return_lse:
        return o
    return o, lse if q.dtype == torch.float64 else lse.float()


def _each(q, k, v, cu_q, cu_k, alibi_slopes, sink, seed, **options):
    """The reference, sequence by sequence."""
    o = q.new_zeros(*q.shape[:2], v.shape[2])
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = q.new_full((q.shape[1], q.shape[0]), -torch.inf, dtype=wide)
    bounds = zip(itertools.pairwise(cu_q.tolist()), itertools.pairwise(cu_k.tolist()), strict=True)
    offset, first = options.pop("q_offset"), 0
    for n, ((q0, q1), (k0, k1)) in enumerate(bounds):
        part = [x.transpose(0, 1).unsqueeze(0) for x in (q[q0:q1], k[k0:k1], v[k0:k1])]
        slopes = alibi_slopes[n] if alibi_slopes is not None and alibi_slopes.ndim == 2 else alibi_slopes
        found, l = reference.attention(
            *part,
            alibi_slopes=slopes,
            sink=sink,
            seed=seed,
            first_head=first,
            q_offset=k1 - k0 - (q1 - q0) if offset is None else offset,
            **options,
        )
        o = o.slice_scatter(found[0].transpose(0, 1), 0, q0, q1)
        lse = lse.slice_scatter(l[0].to(wide), 1, q0, q1)
        first += q.shape[1]
    return o, lse
