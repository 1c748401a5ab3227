"""weight_only_linear: packed and narrow weights, each instruction set, against fp64 on the weights they stand for."""

import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from check import assert_as_accurate

import fastllm
import fastllm.nn
from fastllm import dispatch, reference
from fastllm.ops import weight_only as ops
from fastllm.verify import NORM_SLACK

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(1, 1, 1), (1, 16, 64), (2, 33, 100), (3, 17, 96), (1, 50, 256), (7, 48, 320), (16, 100, 160), (5, 1024, 96)]
KINDS = {
    "int8": dict(bits=8),
    "int8 grouped": dict(bits=8, group_size=32),
    "int8 asymmetric": dict(bits=8, symmetric=False),
    "int4": dict(bits=4),
    "int4 groups of 32": dict(bits=4, group_size=32),
    "int4 asymmetric": dict(bits=4, symmetric=False),
}


@pytest.fixture
def own_backend(own_backend):
    """Also the device of every tensor that a test here makes."""
    with torch.device(own_backend):
        yield own_backend


def quantize(w, kind):
    options = dict(KINDS[kind])
    if w.shape[1] % options.get("group_size", 1):
        options.pop("group_size")
    return fastllm.quantize_weight(w, **options)


def hold(x, weight, exact, bias):
    """`exact` is the weight in fp64. PyTorch is given it rounded to x's dtype, as it would have to be."""
    truth = F.linear(x.double(), exact, None if bias is None else bias.double())
    peer = F.linear(x, exact.to(x.dtype), None if bias is None else bias.to(x.dtype))
    got = fastllm.weight_only_linear(x, weight, bias)
    assert got.dtype == x.dtype and got.is_contiguous()
    assert_as_accurate(got, peer, truth)


def hold_gradients(x, weight, exact, bias):
    dy = torch.randn(*x.shape[:-1], len(exact)).to(x.dtype)

    def gradients(linear, w, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (x, bias)]
        return torch.autograd.grad(linear(leaves[0], w, leaves[1]), leaves, dy.to(dtype))

    ours = gradients(fastllm.weight_only_linear, weight, x.dtype)
    peers = gradients(F.linear, exact.to(x.dtype), x.dtype)
    for got, peer, truth in zip(ours, peers, gradients(F.linear, exact, torch.float64), strict=True):
        assert got.dtype == peer.dtype and got.shape == peer.shape
        assert_as_accurate(got, peer, truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_packed(own_backend, size, kind, dtype):
    M, N, K = size
    packed = quantize(torch.randn(N, K, device=own_backend), kind)
    exact = packed.dequantize().double()
    x = torch.randn(M, K, device=own_backend).to(dtype)
    hold(x, packed, exact, None)
    hold(x, packed, exact, torch.randn(N, device=own_backend))


@pytest.mark.parametrize("kind", KINDS)
def test_sums_are_in_short_pieces(cpu_backend, kind):
    """Nearer to fp64 than one chain of all 64 products, which a cube (y^3) shows in its gradients."""
    if dispatch.extension.selected() == "avx512_bf16":
        pytest.skip("its products are exact, of x in 24 bits")
    packed, x = quantize(torch.randn(128, 64), kind), torch.randn(16, 64)
    w, chain = packed.dequantize(), torch.zeros(16, 128)
    for k in range(64):
        chain.addcmul_(x[:, k, None], w[:, k])
    truth = F.linear(x.double(), w.double())
    assert NORM_SLACK * (fastllm.weight_only_linear(x, packed) - truth).norm() < (chain - truth).norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stored", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_narrow(own_backend, size, stored, dtype):
    M, N, K = size
    w = torch.randn(N, K).to(stored)
    hold(torch.randn(M, K).to(dtype), w, w.double(), None)
    hold(torch.randn(M, K).to(dtype), w, w.double(), torch.randn(N).to(dtype))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1), (16, 32), (40, 100), (33, 256)], ids=str)
def test_dequantize_is_the_reference(own_backend, shape, kind):
    packed = quantize(torch.randn(shape), kind)
    tensors = packed.codes, packed.scales, packed.offsets
    plain = reference.dequantize(*tensors, bits=packed.bits, group_size=packed.group_size)[: shape[0], : shape[1]]
    # The kernel rounds code * scale + offset once, the reference twice where there is an offset.
    torch.testing.assert_close(packed.dequantize(), plain, rtol=0, atol=2e-7 * float(plain.abs().max()) + 1e-38)
    assert packed.offsets is not None or torch.equal(packed.dequantize(), plain)
    for dtype in (torch.bfloat16, torch.float16):
        if packed.offsets is None:
            assert torch.equal(packed.dequantize(dtype), plain.to(dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_every_number_has_the_nearest_code(kind):
    w = torch.randn(32, 128)
    packed = quantize(w, kind)

    def spread(x):
        return x.float().transpose(1, 2).flatten(0, 1).repeat_interleave(packed.group_size, -1)[..., None]

    codes = torch.arange(-128, 128) if packed.bits == 8 else torch.arange(-8, 8)
    values = codes * spread(packed.scales) + (0 if packed.offsets is None else spread(packed.offsets))
    nearest = (values - w[..., None]).abs().amin(-1)
    assert ((packed.dequantize() - w).abs() <= nearest + 1e-6).all()


@pytest.mark.parametrize("kind", KINDS)
def test_zero_and_constant_weights(own_backend, kind):
    for w in (torch.zeros(20, 64), torch.full((20, 64), 0.5), torch.full((20, 64), -3.0)):
        assert torch.equal(quantize(w, kind).dequantize(), w)


@pytest.mark.parametrize("own", [True, False], ids=["ours", "PyTorch's"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_rows_are_a_matrix_product(own_backend, dtype, own, monkeypatch):
    for rows in ("few rows", "cpu"):
        monkeypatch.setitem(ops._CHUNK, rows, 32 * 96)  # several chunks of rows
    monkeypatch.setattr(ops, "_is_own", lambda x, weight, M: own and x.is_cpu and own_backend == "cpu")
    packed = quantize(torch.randn(100, 96), "int8 grouped")
    hold(torch.randn(3, 11, 96).to(dtype), packed, packed.dequantize().double(), torch.randn(100))
    hold_gradients(torch.randn(3, 11, 96).to(dtype), packed, packed.dequantize().double(), torch.randn(100))
    w = torch.randn(100, 96).bfloat16()
    hold(torch.randn(33, 96).to(dtype), w, w.double(), torch.randn(100))
    hold_gradients(torch.randn(33, 96).to(dtype), w, w.double(), torch.randn(100))


# Rows of x: those of decoding, those whose gradient alone is a product, and a product both ways; then weights of more
# than one block of it, down and across.
GRADIENT_SIZES = [(1, 1, 1), (1, 100, 96), (2, 33, 256), (7, 250, 100), (12, 50, 96), (33, 100, 160), (20, 401, 450)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", GRADIENT_SIZES, ids=str)
def test_gradients(own_backend, size, kind, dtype):
    M, N, K = size
    packed = quantize(torch.randn(N, K), kind)
    hold_gradients(torch.randn(M, K).to(dtype), packed, packed.dequantize().double(), torch.randn(N))


@pytest.mark.parametrize("rows", [2, 40])
def test_backward_keeps_no_unpacked_weight(rows):
    kept, packed = [], quantize(torch.randn(64, 96), "int4")
    x = torch.randn(rows, 96, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()), lambda t: t):
        y = fastllm.weight_only_linear(x, packed)
    assert not kept and y.requires_grad


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_outliers_and_small_numbers(own_backend, kind):
    """One huge activation may not cost the others their bits: the scale is per step, not per row."""
    packed = quantize(torch.randn(64, 512), kind)
    x = torch.randn(2, 512)
    x[:, 100], x[:, 200:300] = 3e4, x[:, 200:300] * 1e-4
    hold(x, packed, packed.dequantize().double(), None)
    hold(torch.cat([x[:, :64] * 1e-36, torch.zeros(2, 448)], 1) * 0, packed, packed.dequantize().double(), None)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(own_backend, kind, value):
    packed, x = quantize(torch.randn(16, 128), kind), torch.randn(2, 128)
    x[1, 70] = value
    y = fastllm.weight_only_linear(x, packed)
    assert y[0].isfinite().all() and not y[1].isfinite().any()


def test_views_leading_dimensions_and_no_rows(own_backend):
    packed = quantize(torch.randn(24, 64), "int8")
    x = torch.randn(64, 2, 3).permute(2, 1, 0)
    flat = fastllm.weight_only_linear(x.reshape(6, 64), packed)
    assert torch.equal(fastllm.weight_only_linear(x, packed), flat.view(3, 2, 24))
    assert fastllm.weight_only_linear(torch.randn(0, 64), packed).shape == (0, 24)
    assert fastllm.weight_only_linear(torch.randn(64), packed).shape == (24,)
    w = torch.randn(64, 24).bfloat16().t()
    assert torch.equal(fastllm.weight_only_linear(x, w), fastllm.weight_only_linear(x, w.contiguous()))


@pytest.mark.skipif(dispatch.extension is None, reason="the C++ extension is not built")
def test_same_for_any_number_of_threads():
    packed, x, many = quantize(torch.randn(3000, 256), "int4"), torch.randn(3, 256), torch.randn(40, 256)
    w, before, found = torch.randn(3000, 256).bfloat16(), torch.get_num_threads(), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        ys = [fastllm.weight_only_linear(t.requires_grad_(), packed) for t in (x, many)]
        gradients = [torch.autograd.grad(y, t, y)[0] for y, t in zip(ys, (x, many), strict=True)]
        found.append((*ys, *gradients, fastllm.weight_only_linear(x, w)))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_gradients_of_x_and_bias(own_backend):
    packed = quantize(torch.randn(24, 64), "int4")
    x, bias = torch.randn(2, 64, requires_grad=True), torch.randn(24, requires_grad=True)
    fastllm.weight_only_linear(x, packed, bias).sum().backward()
    assert torch.allclose(x.grad, packed.dequantize().sum(0).expand(2, 64), atol=1e-5)
    assert torch.equal(bias.grad, torch.full((24,), 2.0))


def test_torchao_layouts():
    """The attributes that torchao's tensors have, in its conventions; the values follow from them alone."""
    codes = torch.randint(-128, 128, (32, 64), dtype=torch.int8)
    scale = torch.rand(32, 1) + 0.1
    symmetric = SimpleNamespace(qdata=codes, scale=scale, shape=codes.shape)
    assert torch.equal(fastllm.quantize_weight(symmetric).dequantize(), codes * scale)
    four = torch.randint(-8, 8, (32, 64), dtype=torch.int8)
    scale, zero = (torch.rand(32, 2) + 0.1).bfloat16(), torch.randint(-8, 8, (32, 2), dtype=torch.int8)
    grouped = SimpleNamespace(qdata=four, scale=scale, zero_point=zero, target_dtype="torch.int4", shape=four.shape)
    packed = fastllm.quantize_weight(grouped)
    assert packed.bits == 4 and packed.group_size == 32
    wanted = (four.view(32, 2, 32) - zero[..., None].float()) * scale[..., None].float()
    offset = (zero.float() * scale.float()).abs().max() * 2**-8  # offsets are stored in bf16
    assert (packed.dequantize() - wanted.view(32, 64)).abs().max() <= offset
    two_a_byte = SimpleNamespace(qdata=four[:, :32], scale=scale, shape=four.shape)
    with pytest.raises(ValueError, match="one code a byte"):
        fastllm.quantize_weight(two_a_byte)


def test_unsigned_codes_of_torch_int4():
    """PyTorch's own convention (torch.ops.aten._weight_int4pack_mm): w = (code - 8) * scale + zero."""
    codes, scale, zero = torch.randint(0, 16, (16, 64)), torch.rand(16, 2).bfloat16(), torch.randn(16, 2).bfloat16()
    packed = fastllm.QuantizedWeight.from_codes(codes - 8, scale, zero, bits=4)
    wanted = (codes.view(16, 2, 32) - 8) * scale[..., None].float() + zero[..., None].float()
    torch.testing.assert_close(packed.dequantize(), wanted.view(16, 64), rtol=1e-6, atol=1e-6)


def test_module_and_state_dict(own_backend):
    linear = torch.nn.Linear(96, 40)
    for options in (dict(bits=8), dict(bits=4, group_size=32, symmetric=False)):
        module = fastllm.nn.QuantizedLinear.from_linear(linear, **options)
        again = fastllm.nn.QuantizedLinear.from_linear(torch.nn.Linear(96, 40), **options)
        again.load_state_dict(module.state_dict())
        x = torch.randn(2, 96)
        assert torch.equal(module(x), again(x))
        exact = module.weight.dequantize().double()
        truth = F.linear(x.double(), exact, linear.bias.double())
        assert_as_accurate(module(x), F.linear(x, exact.float(), linear.bias), truth)


def test_errors():
    packed = quantize(torch.randn(16, 64), "int8")
    with pytest.raises(ValueError, match=r"must be \[\.\.\., K\] and \[N, K\]"):
        fastllm.weight_only_linear(torch.randn(2, 65), packed)
    with pytest.raises(ValueError, match=r"bias must be \[16\]"):
        fastllm.weight_only_linear(torch.randn(2, 64), packed, torch.randn(15))
    with pytest.raises(TypeError, match="x must be one of"):
        fastllm.weight_only_linear(torch.ones(2, 64, dtype=torch.int32), packed)
    with pytest.raises(ValueError, match="group_size must be a multiple of 32"):
        fastllm.quantize_weight(torch.randn(16, 64), group_size=48)
    with pytest.raises(ValueError, match="bits must be 8 or 4"):
        fastllm.quantize_weight(torch.randn(16, 64), bits=3)
    with pytest.raises(ValueError, match=r"codes must be in \[-8, 7\]"):
        fastllm.QuantizedWeight.from_codes(torch.full((16, 64), 8), torch.ones(16), bits=4)


@pytest.mark.skipif(dispatch.extension is None, reason="the C++ extension is not built")
def test_opcheck():
    x, bias = torch.randn(2, 64), torch.randn(40)
    for kind in ("int8", "int4 asymmetric"):
        p = quantize(torch.randn(40, 64), kind)
        tensors = p.codes, p.scales, p.offsets
        torch.library.opcheck(ops.quantized_linear_fwd.dispatched, (x, *tensors, bias, 40, p.bits, p.group_size))
        torch.library.opcheck(
            ops.dequantize_fwd.dispatched, (*tensors, x.bfloat16(), 16, 40, 40, 64, p.bits, p.group_size)
        )
        torch.library.opcheck(ops.quantized_linear_bwd, (torch.randn(2, 40), *tensors, 64, p.bits, p.group_size))
    torch.library.opcheck(ops.weight_only_linear_fwd.dispatched, (x, torch.randn(40, 64).bfloat16(), None))


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64)])
def test_no_rows_have_a_gradient(shape):
    x = torch.randn(shape, requires_grad=True)
    fastllm.weight_only_linear(x, fastllm.quantize_weight(torch.randn(5, 64))).sum().backward()
    assert x.grad.shape == shape


@pytest.mark.parametrize("rows", [1, 40])
def test_autocast_gives_its_dtype_for_few_and_for_many_rows(rows):
    packed, x = fastllm.quantize_weight(torch.randn(20, 64)), torch.randn(rows, 64)
    with torch.autocast("cpu", torch.bfloat16):
        y = fastllm.weight_only_linear(x, packed)
    assert torch.equal(y, fastllm.weight_only_linear(x.bfloat16(), packed))


def test_second_derivative_does_not_warn():
    packed, x = fastllm.quantize_weight(torch.randn(20, 64)), torch.randn(3, 64)
    dy, direction = torch.randn(3, 20), torch.randn(3, 64)

    def second(linear, dtype):
        leaf, upstream = (t.to(dtype).requires_grad_() for t in (x, dy))
        (dx,) = torch.autograd.grad(linear(leaf), leaf, upstream, create_graph=True)
        return torch.autograd.grad(dx, upstream, direction.to(dtype))[0]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = second(lambda x: fastllm.weight_only_linear(x, packed), torch.float32)
    weight = packed.dequantize()
    assert_as_accurate(
        found, *(second(lambda x: F.linear(x, weight.to(x.dtype)), t) for t in (torch.float32, torch.float64))
    )


def test_packed_weights_are_compared_by_identity():
    w = torch.randn(5, 64)
    packed = fastllm.quantize_weight(w)
    assert packed == packed and packed != fastllm.quantize_weight(w)


@pytest.mark.parametrize(
    "scales, offsets", [(torch.ones(7), None), (torch.tensor(1.0), None), (torch.ones(5, 2), torch.ones(5))]
)
def test_scales_that_do_not_fit_codes(scales, offsets):
    with pytest.raises(ValueError, match=r"must be \[5, groups\]"):
        fastllm.QuantizedWeight.from_codes(torch.zeros(5, 64, dtype=torch.int8), scales, offsets)


@pytest.mark.parametrize("token", [-1, 20, 31, 32])
def test_a_packed_embedding_has_no_row_beyond_its_last(token):
    packed = fastllm.nn.QuantizedEmbedding(fastllm.quantize_weight(torch.randn(20, 64)))
    with pytest.raises(IndexError, match=r"tokens must be in \[0, 20\)"):
        packed(torch.tensor([[3, token]]))
