"""swiglu, geglu, bias_gelu: outputs and every gradient, each backend, against fp64 and beside PyTorch's own kernels."""

import pytest
import torch
import torch.nn.functional as F
from check import assert_as_accurate, compare, run

import fastllm
from fastllm import dispatch, reference
from fastllm.ops import activation as ops
from fastllm.ops.linear import ACTIVATIONS, bias_act_fwd

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(3,), (3, 4), (2, 7, 16), (5, 31), (9, 65), (70, 100), (2, 3, 768), (3, 1025)]
needs_extension = pytest.mark.skipif(dispatch.extension is None, reason="the C++ extension is not built")


def gated(name):
    """ours, PyTorch's, the reference's, for gate and up."""
    if name == "swiglu":
        return fastllm.swiglu, lambda gate, up: F.silu(gate) * up, reference.swiglu
    options = dict(approximate=name.removeprefix("geglu "))
    return (
        lambda gate, up=None: fastllm.geglu(gate, up, **options),
        lambda gate, up: F.gelu(gate, **options) * up,
        lambda gate, up=None: reference.geglu(gate, up, **options),
    )


GATED = ["swiglu", "geglu tanh", "geglu none"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", GATED)
def test_gated(backend, name, shape, dtype):
    gate, up, dy = (3 * torch.randn(shape).to(backend) for _ in range(3))
    compare(*gated(name), [gate, up], [dy], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2,), (5, 62), (3, 2, 130)], ids=str)
@pytest.mark.parametrize("name", GATED)
def test_packed(backend, name, shape, dtype):
    """One tensor [gate | up], and its gradient in one tensor."""
    ours, theirs, truth = gated(name)
    packed, dy = torch.randn(shape).to(backend), torch.randn(*shape[:-1], shape[-1] // 2).to(backend)
    compare(ours, lambda x: theirs(*x.chunk(2, -1)), truth, [packed], [dy], dtype)


@pytest.mark.parametrize("name", GATED)
def test_autocast_multiplies_as_pytorch_does(cpu_backend, name):
    """A gate from a product is bf16, `up` may be fp32: so is y; each has a gradient of its own dtype. Without autocast
    two dtypes are a mistake."""
    ours, theirs, truth = gated(name)
    gate, up = torch.randn(5, 40).bfloat16().requires_grad_(), torch.randn(5, 40).requires_grad_()
    dy = torch.randn(5, 40)
    with torch.autocast("cpu", torch.bfloat16):
        y, peer = ours(gate, up), theirs(gate, up)
        assert y.dtype == peer.dtype == torch.float32 == ours(up, gate).dtype
    exact = truth(gate.double(), up.double())
    assert_as_accurate(y, peer, exact)
    for got, wanted, true in zip(*(torch.autograd.grad(o, (gate, up), dy.to(o.dtype)) for o in (y, peer, exact))):
        assert got.dtype == wanted.dtype
        assert_as_accurate(got, wanted, true)
    with pytest.raises(TypeError, match="up"):
        ours(gate, up)


@pytest.mark.parametrize("name", GATED)
def test_halves_are_read_where_they_lie(backend, name):
    """Halves of a projection, other views, and an upstream gradient that is one number."""
    ours, theirs, truth = gated(name)
    both = torch.randn(4, 6, 80).to(backend)
    odd = torch.randn(6, 4, 96).to(backend).transpose(0, 1)
    dy = torch.randn(1, 1, 1).to(backend).expand(4, 6, 40)
    before = both.clone(), dy.clone()
    compare(
        lambda x: ours(*x.chunk(2, -1)),
        lambda x: theirs(*x.chunk(2, -1)),
        lambda x: truth(*x.chunk(2, -1)),
        [both],
        [dy],
        torch.float32,
    )
    compare(ours, theirs, truth, [odd[..., ::2], odd[..., 48:]], [torch.randn(4, 6, 48).to(backend)], torch.float32)
    assert torch.equal(both, before[0]) and torch.equal(dy, before[1])


def bias_gelu(approximate):
    return (
        lambda x, b=None: fastllm.bias_gelu(x, b, approximate=approximate),
        lambda x, b=None: F.gelu(x if b is None else x + b, approximate=approximate),
        lambda x, b=None: reference.bias_gelu(x, b, approximate=approximate),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_bias_gelu(backend, approximate, shape, dtype):
    x, dy = torch.randn(shape).to(backend), torch.randn(shape).to(backend)
    compare(*bias_gelu(approximate), [x, torch.randn(shape[-1:]).to(backend)], [dy], dtype)
    compare(*bias_gelu(approximate), [x], [dy], dtype)


@pytest.mark.parametrize("N", [0, 1, 63, 65, 1000])
def test_bias_gradient_over_many_rows(backend, N):
    x, b, dy = torch.randn(N, 24).to(backend), torch.randn(24).to(backend), torch.randn(N, 24).to(backend)
    compare(*bias_gelu("none"), [x, b], [dy], torch.float32)


def test_bias_of_another_dtype(backend):
    x, b = torch.randn(5, 40).bfloat16().to(backend), torch.randn(40).to(backend)
    (y,), (dx, db) = run(fastllm.bias_gelu, [x, b], [torch.ones(5, 40).to(backend)])
    assert (y.dtype, dx.dtype, db.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)


@pytest.mark.parametrize("name", GATED)
def test_large_and_small_gates(backend, name):
    """Far out the activation is the identity or 0, its slope 1 or 0; near 0 nothing cancels."""
    ours, theirs, truth = gated(name)
    sizes = torch.cat([torch.logspace(-30, 9, 40), torch.linspace(0.1, 100, 1000)])
    gate = torch.cat([sizes, -sizes]).to(backend)
    compare(ours, theirs, truth, [gate, torch.ones_like(gate)], [torch.ones_like(gate)], torch.float32)
    small = gate[gate.abs() < 1e-4]  # alone, so that the large ones do not hide them
    compare(ours, theirs, truth, [small, torch.ones_like(small)], [torch.ones_like(small)], torch.float32)


@pytest.mark.parametrize("name", GATED)
def test_infinity_and_nan(cpu_backend, name):
    ours = gated(name)[0]
    gate = torch.tensor([torch.inf, torch.nan, -torch.inf], requires_grad=True)
    y = ours(gate, torch.ones(3))
    (slope,) = torch.autograd.grad(y.sum(), gate)
    assert y[0] == torch.inf and y[1].isnan() and y[2].abs() < 1e-30
    assert slope[0] == 1 and slope[1].isnan() and slope[2].abs() < 1e-30


@needs_extension
def test_bias_gradient_does_not_depend_on_threads():
    x, b, dy = torch.randn(500, 96), torch.randn(96), torch.randn(500, 96)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        results.append(run(fastllm.bias_gelu, [x, b], [dy])[1])
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@needs_extension
def test_gradcheck():
    x, u = (torch.randn(3, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    b = torch.randn(6, dtype=torch.float64, requires_grad=True)
    with fastllm.backend("cpu"):
        for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
            for name in GATED:
                assert check(gated(name)[0], (x, u))
                assert check(gated(name)[0], (x,))
            for approximate in ("tanh", "none"):
                assert check(bias_gelu(approximate)[0], (x, b))
                assert check(bias_gelu(approximate)[0], (x,))


@needs_extension
def test_opcheck():
    gate, up, b = torch.randn(3, 4, 6), torch.randn(3, 4, 6), torch.randn(6)
    half = torch.randn(3, 4, 12).chunk(2, -1)[0]
    for first, second, dy in ((gate, up, up), (gate, None, gate[..., :3].contiguous()), (half, up, up)):
        torch.library.opcheck(ops.swiglu_fwd.dispatched, (first, second))
        torch.library.opcheck(ops.swiglu_bwd.dispatched, (dy, first, second))
        torch.library.opcheck(ops.geglu_fwd.dispatched, (first, second, True))
        torch.library.opcheck(ops.geglu_bwd.dispatched, (dy, first, second, False))
    for bias in (b, None):
        torch.library.opcheck(ops.bias_gelu_fwd.dispatched, (gate, bias, True))
        torch.library.opcheck(ops.bias_gelu_bwd.dispatched, (up, gate, bias, False))


@pytest.mark.parametrize("size", [15, 16, 17, 4096])
def test_bf16_is_rounded_to_nearest_even(cpu_backend, size):
    """As PyTorch rounds: halves between two numbers to the even one, to infinity at the end; NaNs of any bits stay.

    What is below 2^-126 is 0 where AVX512_BF16's instruction rounds.
    """
    upper = torch.randint(0, 0x8000, (size,), generator=torch.Generator().manual_seed(size))
    upper[: size // 4] |= 0x7F80  # infinity and NaNs
    upper[:6] = torch.tensor([0x7FFF, 0x7FC0, 0x7F7F, 0x7F80, 0, 0x3F80])
    for lower in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        x = (upper << 16 | lower).int().view(torch.float32)
        y = bias_act_fwd.dispatched(torch.zeros(1, size, dtype=torch.bfloat16), x, ACTIVATIONS["relu"])
        wanted = x.bfloat16()
        if dispatch.extension.selected() == "avx512_bf16":
            wanted = torch.where(x.abs() < 2.0**-126, 0.0, wanted)
        torch.testing.assert_close(y[0], wanted, rtol=0, atol=0, equal_nan=True)
