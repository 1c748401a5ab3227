"""rope: both layouts of pairs, part of a head, offsets, packed batches; each backend, against fp64."""

import pytest
import torch
from check import compare, run

import fastllm
from fastllm import dispatch, reference
from fastllm.ops import rope as ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
needs_extension = pytest.mark.skipif(dispatch.extension is None, reason="the C++ extension is not built")


def angles(*shape):
    """cos and sin of some angles: what a table holds."""
    angle = 10 * torch.randn(shape, dtype=torch.float64)
    return angle.cos().float(), angle.sin().float()


def plain(x, cos, sin, interleaved):
    """The formula for one table row per position, cos and sin [.., T, R / 2], in x's dtype: the peer."""
    R = 2 * cos.shape[-1]
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    a, b = (x[..., 0:R:2], x[..., 1:R:2]) if interleaved else (x[..., : R // 2], x[..., R // 2 : R])
    turned = [a * cos - b * sin, b * cos + a * sin]
    turned = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return torch.cat([turned, x[..., R:]], -1)


def with_tables(function, cos, sin, **options):
    """`function` with its tables, in fp64 where the truth is asked for: a table is no input that is rounded."""

    def call(q, k=None):
        return function(q, k, cos.to(q.device), sin.to(q.device), **options)

    return call


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("D, R", [(2, 2), (16, 16), (64, 64), (66, 66), (80, 32), (96, 34), (128, 128), (7, 4)])
def test_rope(backend, D, R, interleaved, dtype):
    B, H, Hkv, T = 2, 3, 1, 5
    q, k, dq, dk = (torch.randn(B, n, T, D).to(backend) for n in (H, Hkv, H, Hkv))
    cos, sin = angles(9, R // 2)
    table = cos[2 : 2 + T].to(backend), sin[2 : 2 + T].to(backend)
    compare(
        with_tables(fastllm.rope, cos, sin, interleaved=interleaved, offset=2),
        lambda q, k: (plain(q, *table, interleaved), plain(k, *table, interleaved)),
        with_tables(reference.rope, cos, sin, interleaved=interleaved, offset=2),
        [q, k],
        [dq, dk],
        dtype,
    )


def test_reference_is_the_formula():
    """The oracle of this file against the formula spelled out with complex numbers."""
    x, angle = torch.randn(1, 1, 4, 6, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    turned = torch.view_as_complex(x.unflatten(-1, (3, 2))) * torch.polar(torch.ones_like(angle), angle)
    expected = torch.view_as_real(turned).flatten(-2)
    torch.testing.assert_close(reference.rope(x, None, angle.cos(), angle.sin(), interleaved=True), expected)
    order = [0, 2, 4, 1, 3, 5]  # pairs that are half a head apart are the same pairs in another order
    torch.testing.assert_close(reference.rope(x[..., order], None, angle.cos(), angle.sin()), expected[..., order])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batches", [1, 2])
def test_hugging_face_tables(backend, batches, dtype):
    """[B, T, D], a number for each element, in the dtype of the model."""
    q, dq = torch.randn(2, 3, 6, 16).to(backend), torch.randn(2, 3, 6, 16).to(backend)
    cos, sin = (x.repeat(1, 1, 2).to(backend) for x in angles(batches, 6, 8))

    def theirs(q):
        c, s = cos.to(q.dtype)[:, None], sin.to(q.dtype)[:, None]
        a, b = q.chunk(2, -1)
        return q * c + torch.cat([-b, a], -1) * s

    def ours(q):
        return fastllm.rope(q, None, cos.to(dtype), sin.to(dtype))

    def truth(q):
        return reference.rope(q, None, cos.to(dtype), sin.to(dtype), whole=True)

    compare(ours, theirs, truth, [q], [dq], dtype)


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_number_for_each_element_may_differ_within_a_pair(backend, interleaved):
    q, dq = torch.randn(2, 3, 6, 16).to(backend), torch.randn(2, 3, 6, 16).to(backend)
    cos, sin = angles(6, 16)
    truth = with_tables(reference.rope, cos, sin, interleaved=interleaved, whole=True)
    compare(with_tables(fastllm.rope, cos, sin, interleaved=interleaved), truth, truth, [q], [dq], torch.float32)


@pytest.mark.parametrize("integers", [torch.int32, torch.int64], ids=str)
def test_offset_of_each_batch_entry(backend, integers):
    q, k, cos_sin = torch.randn(3, 2, 4, 16), torch.randn(3, 2, 4, 16), angles(12, 8)
    offset = torch.tensor([0, 8, 3])
    got = with_tables(fastllm.rope, *cos_sin, offset=offset.to(backend, integers))(q.to(backend), k.to(backend))
    for b, first in enumerate(offset.tolist()):
        alone = with_tables(fastllm.rope, *cos_sin, offset=first)(q[b : b + 1].to(backend), k[b : b + 1].to(backend))
        assert torch.equal(got[0][b], alone[0][0]) and torch.equal(got[1][b], alone[1][0])


@pytest.mark.parametrize("offset", [0, 2, "each"])
@pytest.mark.parametrize("lengths", [[5], [3, 0, 4, 1], [0, 2, 0]], ids=str)
def test_packed_batch(backend, lengths, offset):
    """Every sequence as if it were alone, positions counted from its own beginning."""
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    q, k = torch.randn(sum(lengths), 3, 16).to(backend), torch.randn(sum(lengths), 1, 16).to(backend)
    cos, sin = angles(9, 8)
    offsets = torch.arange(len(lengths)) if offset == "each" else torch.full((len(lengths),), offset)
    given = offsets.to(backend) if offset == "each" else offset
    turn = with_tables(fastllm.rope, cos, sin, offset=given, cu_seqlens=cu_seqlens.to(backend, torch.int32))
    for x, got in zip((q, k), turn(q, k), strict=True):
        for first, last, at in zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:], offsets.tolist(), strict=False):
            alone = x[first:last].transpose(0, 1)[None]
            expected = with_tables(fastllm.rope, cos, sin, offset=at)(alone)[0].transpose(0, 1)
            assert torch.equal(got[first:last], expected)


def test_gradient_of_a_packed_batch(backend):
    cu_seqlens = torch.tensor([0, 3, 7]).to(backend)
    cos, sin = angles(9, 4)
    truth = with_tables(reference.rope, cos, sin, cu_seqlens=cu_seqlens)

    def packed(q):
        return truth(q.transpose(0, 1)[None])[0].transpose(0, 1)

    q, dq = torch.randn(7, 2, 8).to(backend), torch.randn(7, 2, 8).to(backend)
    compare(with_tables(fastllm.rope, cos, sin, cu_seqlens=cu_seqlens), packed, packed, [q], [dq], torch.float32)


def test_views_and_memory_order(backend):
    """Heads inside positions stay there; a view is read where it lies; nothing is changed."""
    flash = torch.randn(2, 5, 3 * 3, 24).to(backend)  # [B, T, q heads | k heads | v heads, D]
    q, k = (x.transpose(1, 2) for x in flash.split(3, 2)[:2])
    cos, sin = angles(5, 12)
    before, turn = flash.clone(), with_tables(fastllm.rope, cos, sin)
    for x, y in zip((q, k), turn(q, k), strict=True):
        assert y.transpose(1, 2).is_contiguous()
        assert torch.equal(y, turn(x.contiguous()))
    assert turn(q.contiguous()).is_contiguous()
    spread = torch.randn(2, 3, 5, 48).to(backend)[..., ::2]
    assert torch.equal(turn(spread), turn(spread.contiguous()))
    one = torch.randn(1, 1, 1, 24).to(backend).expand(2, 3, 5, 24)
    assert torch.equal(turn(one), turn(one.contiguous()))
    assert torch.equal(flash, before)


@pytest.mark.parametrize("used", [(True, False), (False, True)], ids=["q", "k"])
def test_only_one_of_both_is_used(backend, used):
    q, k, dy = (torch.randn(2, 2, 4, 8).to(backend) for _ in range(3))
    cos, sin = angles(4, 4)
    _, grads = run(with_tables(fastllm.rope, cos, sin), [q, k], [dy if u else None for u in used])
    back = with_tables(fastllm.rope, cos, -sin)(dy)
    for grad, u in zip(grads, used, strict=True):
        assert torch.equal(grad, back if u else torch.zeros_like(grad))


def test_gradients_of_the_tables_come_from_the_reference():
    q = torch.randn(1, 2, 4, 8)
    cos, sin = (x.requires_grad_() for x in angles(4, 4))
    told = fastllm.explain(fastllm.rope, q, None, cos, sin)
    (call,) = told.calls
    assert call.backend == "reference" and "gradients of cos and sin" in call.reason
    dcos, dsin = torch.autograd.grad(told.result.sum(), (cos, sin))
    a, b = q.chunk(2, -1)
    torch.testing.assert_close(dcos, (a + b).sum((0, 1)))
    torch.testing.assert_close(dsin, (a - b).sum((0, 1)))


@pytest.mark.parametrize(
    "options",
    [
        dict(offset=torch.tensor([0, 6])),
        dict(offset=torch.tensor([-1, 0])),
        dict(cu_seqlens=torch.tensor([0, 1, 9])),
        dict(cu_seqlens=torch.tensor([0, 4, 8])),
        dict(cu_seqlens=torch.tensor([1, 4, 9])),
    ],
    ids=str,
)
def test_positions_outside_the_tables(cpu_backend, options):
    q = torch.randn(9, 2, 8) if "cu_seqlens" in options else torch.randn(2, 2, 2, 8)
    with pytest.raises(RuntimeError, match="rope_fwd: (positions|cu_seqlens)"):
        fastllm.rope(q, None, *angles(7, 4), **options)


@needs_extension
def test_gradcheck():
    q, k = (torch.randn(2, 2, 3, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    cos, sin = (x.double() for x in angles(5, 3))
    with fastllm.backend("cpu"):
        for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
            for interleaved in (False, True):
                assert check(with_tables(fastllm.rope, cos, sin, interleaved=interleaved, offset=1), (q, k))


@needs_extension
def test_opcheck():
    cos, sin = angles(9, 4)
    heads_inside = torch.randn(2, 5, 3, 10).transpose(1, 2)
    for q, k in ((torch.randn(2, 3, 5, 10), heads_inside), (heads_inside, None)):
        options = (1, False, False, True)
        torch.library.opcheck(ops.rope_fwd.dispatched, (q, k, cos, sin, torch.tensor([0, 3]), None, *options))
    one = torch.randn(1, 3, 5, 10)
    torch.library.opcheck(ops.rope_fwd.dispatched, (one, None, cos, sin, None, torch.tensor([0, 2, 5]), *options))
