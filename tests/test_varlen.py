"""attention_varlen: packed sequences, against fp64 and beside PyTorch's own kernel on each sequence."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from check import assert_as_accurate, compare, run
from test_attention import arguments, torch_attention

import fastllm
from fastllm import dispatch, reference
from fastllm.ops import varlen as ops

LENGTHS = [(5, 5), (1, 9), (33, 40), (0, 4), (7, 0), (64, 64), (70, 20)]
OPTIONS = {
    "full": {},
    "causal": dict(causal=True),
    "top-left": dict(causal=True, q_offset=0),
    "window": dict(window=(6, 2)),
    "scale": dict(scale=0.4),
}


def bounds(lengths, device="cpu"):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def packed(device, H=4, Hkv=2, D=24, Dv=None, tail=0):
    cu_q, cu_k = (bounds(n, device) for n in zip(*LENGTHS, strict=True))
    q = torch.randn(int(cu_q[-1]) + tail, H, D, device=device)
    k = torch.randn(int(cu_k[-1]) + tail, Hkv, D, device=device)
    v = torch.randn(len(k), Hkv, Dv or D, device=device)
    do = torch.randn(len(q), H, Dv or D, device=device)
    return (q, k, v), do, dict(cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)


def each(attention, cu_seqlens_q, cu_seqlens_k, tail=0):
    """`attention` [B, H, T, D] on every sequence of a packed batch."""

    def function(q, k, v):
        o = []
        spans = zip(itertools.pairwise(cu_seqlens_q.tolist()), itertools.pairwise(cu_seqlens_k.tolist()), strict=True)
        for (q0, q1), (k0, k1) in spans:
            parts = [x.transpose(0, 1)[None] for x in (q[q0:q1], k[k0:k1], v[k0:k1])]
            empty = q1 == q0 or k1 == k0
            o.append(q.new_zeros(q1 - q0, q.shape[1], v.shape[2]) if empty else attention(*parts)[0].transpose(0, 1))
        o.append(q.new_zeros(tail, q.shape[1], v.shape[2]))
        return torch.cat(o) + 0 * (q.sum() + k.sum() + v.sum())  # sequences without keys have gradients too: zeros

    return function


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_options(backend, name, dtype):
    inputs, do, cu = packed(backend)
    of = arguments(**OPTIONS[name])
    truth = each(lambda q, k, v: reference.attention(q, k, v, **of(q, k))[0], **cu)
    ours = lambda q, k, v: fastllm.attention_varlen(q, k, v, **cu, **OPTIONS[name])  # noqa: E731
    compare(ours, each(torch_attention(of), **cu), truth, inputs, [do], dtype)


@pytest.mark.parametrize("options", ["softcap", "alibi", "alibi per sequence", "sink", "dropout"])
def test_scores(backend, options):
    inputs, do, cu = packed(backend, Dv=17, tail=3)
    N, H = len(cu["cu_seqlens_q"]) - 1, 4
    options = {
        "softcap": dict(softcap=2.0),
        "alibi": dict(alibi_slopes=torch.rand(H, device=backend)),
        "alibi per sequence": dict(alibi_slopes=torch.rand(N, H, device=backend)),
        "sink": dict(sink=torch.randn(H, device=backend)),
        "dropout": dict(dropout_p=0.2),
    }[options]

    def ours(q, k, v, *sink):
        torch.manual_seed(3)
        extra = dict(options, sink=sink[0]) if sink else options
        return fastllm.attention_varlen(q, k, v, **cu, **extra, causal=True, return_lse=True)

    def plain(*inputs):
        with fastllm.backend("reference"):
            return ours(*inputs)

    inputs = [*inputs, *([options["sink"]] if "sink" in options else [])]
    grads = [do, torch.randn(4, len(do), device=backend)]
    compare(ours, plain, plain, inputs, grads, torch.float32)


def test_few_sequences_are_split_over_threads(backend):
    q, k, v, do = (torch.randn(400, 1, 16, device=backend) for _ in range(4))
    cu = dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), torch.tensor([0, 150, 400], device=backend))
    of = arguments(causal=True)
    truth = each(lambda q, k, v: reference.attention(q, k, v, **of(q, k))[0], **cu)
    ours = lambda q, k, v: fastllm.attention_varlen(q, k, v, **cu, causal=True)  # noqa: E731
    compare(ours, each(torch_attention(of), **cu), truth, [q, k, v], [do], torch.float32)


def test_equals_attention_of_a_batch(backend):
    """Bit for bit: the kernels cannot tell a sequence from a batch entry."""
    q, k, v = (torch.randn(3, 40, heads, 16, device=backend) for heads in (4, 2, 2))
    cu = torch.arange(0, 121, 40, device=backend)
    batched = fastllm.attention(*(x.transpose(1, 2) for x in (q, k, v)), causal=True).transpose(1, 2)
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    assert torch.equal(
        fastllm.attention_varlen(*flat, cu_seqlens_q=cu, cu_seqlens_k=cu, causal=True).view(batched.shape), batched
    )


@pytest.mark.parametrize("cu", [[1, 5], [0, 4, 3, 5], [0, 6], []], ids=str)
def test_bad_bounds(cu):
    x = torch.randn(5, 2, 8)
    cu = torch.tensor(cu, dtype=torch.int64)
    with pytest.raises((ValueError, RuntimeError), match="cu_seqlens"):
        fastllm.attention_varlen(x, x, x, cu_seqlens_q=cu, cu_seqlens_k=cu)


def test_bounds_of_any_strides():
    q, k, v = (torch.randn(10, 2, 8) for _ in "qkv")
    cu = torch.tensor([0, 3, 10])
    apart = torch.stack((cu, cu + 99), 1)[:, 0]
    packed, strided = (fastllm.attention_varlen(q, k, v, cu_seqlens_q=x, cu_seqlens_k=x) for x in (cu, apart))
    assert torch.equal(strided, packed)


def test_autocast_is_that_of_attention():
    q, k, v, cu = *(torch.randn(10, 2, 8) for _ in "qkv"), torch.tensor([0, 3, 10])
    with torch.autocast("cpu", torch.bfloat16):
        o = fastllm.attention_varlen(q.bfloat16(), k, v, cu_seqlens_q=cu, cu_seqlens_k=cu)
        one = fastllm.attention(*(x[None, 3:].transpose(1, 2) for x in (q, k, v)))
    assert o.dtype == one.dtype == torch.bfloat16
    rounded = [x[3:].transpose(0, 1).bfloat16() for x in (q, k, v)]
    truth = F.scaled_dot_product_attention(*(x.double() for x in rounded))
    assert_as_accurate(o[3:].transpose(0, 1), F.scaled_dot_product_attention(*rounded), truth)


def test_bad_input():
    x, cu = torch.randn(5, 2, 8), torch.tensor([0, 5])
    with pytest.raises(ValueError, match=r"attention_varlen: q must be \[total"):
        fastllm.attention_varlen(x[0], x, x, cu_seqlens_q=cu, cu_seqlens_k=cu)
    with pytest.raises(TypeError, match="cu_seqlens_q"):
        fastllm.attention_varlen(x, x, x, cu_seqlens_q=cu.float(), cu_seqlens_k=cu)
    with pytest.raises(ValueError, match="one length"):
        fastllm.attention_varlen(x, x, x, cu_seqlens_q=cu, cu_seqlens_k=torch.tensor([0, 2, 5]))


@pytest.mark.skipif(dispatch.extension is None, reason="the C++ extension is not built")
def test_gradcheck_and_opcheck():
    q, k, v = (torch.randn(9, h, 3, dtype=torch.float64, requires_grad=True) for h in (2, 1, 1))
    cu = dict(cu_seqlens_q=torch.tensor([0, 4, 9]), cu_seqlens_k=torch.tensor([0, 2, 9]))
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda *x: fastllm.attention_varlen(*x, **cu, causal=True), (q, k, v))
    q, k, v = (x.detach().float() for x in (q, k, v))
    options = (*cu.values(), None, None, None, 0.3, 0.0, None, -1, 0, 0.0)
    torch.library.opcheck(ops.attention_varlen_fwd.dispatched, (q, k, v, *options))
    o, lse = ops.attention_varlen_fwd.dispatched(q, k, v, *options)
    torch.library.opcheck(ops.attention_varlen_bwd.dispatched, (o, torch.ones_like(lse), q, k, v, o, lse, *options))
    (again,), _ = run(lambda q: fastllm.attention_varlen(q, k, v, **cu, causal=True, scale=0.3), [q])
    assert torch.equal(o, again)
