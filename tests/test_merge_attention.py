"""merge_attention: against fp64, on plain PyTorch and on Triton, forward and backward."""

import pytest
import torch
from check import compare

import fastllm
from fastllm import dispatch, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["reference", "triton"])
def merging(request):
    """The device for tensors that merge_attention merges by plain PyTorch, as on a CPU, or by the kernel."""
    if request.param == "reference":
        with fastllm.backend("reference"):
            yield "cpu"
    else:
        from conftest import use_backend

        yield from use_backend("triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parts_of_attention(merging, dtype):
    q, k, v = (torch.randn(2, 3, n, 16, device=merging) for n in (9, 50, 50))

    def merged(q, k, v):
        spans = [(0, 10), (10, 11), (11, 50)]
        with fastllm.backend("reference"):
            parts = [fastllm.attention(q, k[:, :, a:b], v[:, :, a:b], return_lse=True) for a, b in spans]
        return fastllm.merge_attention(*zip(*parts, strict=True))

    def whole(q, k, v):
        with fastllm.backend("reference"):
            return fastllm.attention(q, k, v, return_lse=True)

    in_parts = merged if dtype != torch.float32 else whole  # parts are rounded to the dtype before they are merged
    grads = [torch.randn(2, 3, 9, 16, device=merging), torch.randn(2, 3, 9, device=merging)]
    compare(merged, in_parts, whole, (q, k, v), grads, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("parts", [1, 2, 5])
@pytest.mark.parametrize("shape", [(1, 1), (7, 20), (2, 70, 64), (2, 3, 11, 33), (2, 1, 3, 5, 8)], ids=str)
def test_shapes(merging, shape, parts, dtype):
    outs = [torch.randn(shape, device=merging) for _ in range(parts)]
    lses = [4 * torch.randn(shape[:-1], device=merging) for _ in range(parts)]
    lses[0][..., 0] = -torch.inf  # one query that the first part, or none, has keys for

    def call(function):
        return lambda *x: function(x[:parts], x[parts:])

    grads = [torch.randn(shape, device=merging), torch.randn(shape[:-1], device=merging)]
    plain = call(reference.merge_attention)
    compare(call(fastllm.merge_attention), plain, plain, [*outs, *lses], grads, dtype)


def test_views(merging):
    outs = [torch.randn(2, 9, 3, 16, device=merging).transpose(1, 2), torch.randn(2, 3, 16, 9, device=merging).mT]
    lses = [torch.randn(3, 2, 9, device=merging).transpose(0, 1), torch.randn(2, 3, 1, device=merging).expand(2, 3, 9)]
    o, lse = fastllm.merge_attention(outs, [x.double() for x in lses])
    wanted = reference.merge_attention([x.double() for x in outs], lses)
    torch.testing.assert_close((o, lse), tuple(x.float() for x in wanted))


def test_nothing(merging):
    o = torch.randn(2, 4, 8, device=merging, requires_grad=True)
    lse = torch.full((2, 4), -torch.inf, device=merging, requires_grad=True)
    merged, total = fastllm.merge_attention([o, o], [lse, lse])
    assert not merged.any() and torch.equal(total, lse)
    merged.sum().backward()
    assert not o.grad.any() and not lse.grad.any()
    empty = o[:, :0].detach()
    assert fastllm.merge_attention([empty], [lse[:, :0].detach()])[0].shape == (2, 0, 8)


def test_second_derivative(merging):
    outs = [torch.randn(3, 4, device=merging, requires_grad=True) for _ in "ab"]
    lses = [torch.randn(3, device=merging, requires_grad=True) for _ in "ab"]
    twice = []
    for function in (fastllm.merge_attention, reference.merge_attention):
        (first,) = torch.autograd.grad(function(outs, lses)[0].square().sum(), lses[0], create_graph=True)
        twice.append(torch.autograd.grad(first.sum(), [*outs, *lses]))
    torch.testing.assert_close(*twice)


def test_many_parts_and_fp64_are_plain_pytorch(merging):
    calls = []
    with dispatch.recording(calls):
        fastllm.merge_attention([torch.randn(2, 3, device=merging)] * 33, [torch.randn(2, device=merging)] * 33)
        fastllm.merge_attention([torch.randn(2, 3, device=merging).double()], [torch.randn(2, device=merging)])
    assert [call.backend for call in calls] == ["reference"] * 2


def test_errors():
    o, lse = torch.randn(2, 4, 8), torch.randn(2, 4)
    with pytest.raises(ValueError, match="one lse per output"):
        fastllm.merge_attention([o], [])
    with pytest.raises(ValueError, match=r"lses\[1\]"):
        fastllm.merge_attention([o, o], [lse, lse[:1]])
