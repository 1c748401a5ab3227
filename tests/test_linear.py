"""linear: output and gradients on every instruction set, against fp64 and beside PyTorch's own product."""

import contextlib
import math

import pytest
import torch
import torch.nn.functional as F
from check import assert_as_accurate, compare, run

import fastllm
from fastllm import dispatch, reference
from fastllm.ops import _tuned
from fastllm.ops import linear as ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# [M, N, K]: single elements, nothing, one short of, at and past tiles (6 rows, 8 to 64 columns), blocks of rows (96),
# of columns (384) and of k (192), and sizes at which two threads share the work.
SIZES = [(1, 1, 1), (0, 3, 4), (3, 0, 4), (3, 4, 0), (1, 70, 33), (5, 7, 1), (6, 64, 16), (7, 65, 17), (8, 63, 15)]
SIZES += [(95, 15, 191), (96, 17, 192), (97, 383, 193), (25, 385, 577), (200, 384, 384), (131, 260, 300)]

needs_extension = pytest.mark.skipif(dispatch.extension is None, reason="the C++ extension is not built")


def tensors(M, N, K, leading=None):
    return torch.randn(*(leading or (M,)), K), torch.randn(N, K), torch.randn(N)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(cpu_backend, size):
    dy = torch.randn(size[:2])
    compare(fastllm.linear, F.linear, reference.linear, tensors(*size), [dy], torch.float32)
    compare(fastllm.linear, F.linear, reference.linear, tensors(*size)[:2], [dy], torch.float32)


# Few rows, which are multiplied with the weight where it lies (16), and those past them; several blocks of k and of
# columns; and more rows than sums wait for (1536).
NARROW_SIZES = [(1, 1, 1), (1, 70, 33), (4, 63, 15), (7, 389, 400), (16, 65, 17), (17, 64, 200), (50, 33, 20)]
NARROW_SIZES += [(0, 3, 4), (3, 4, 0), (97, 383, 193), (25, 385, 577), (1541, 18, 200)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", NARROW_SIZES, ids=str)
def test_narrow_sizes(cpu_backend, size, dtype):
    """The products are summed in fp32 and rounded once, for every output."""
    (x, w, b), dy = tensors(*size), torch.randn(size[:2])
    x, w = x * 4**-1, w * 4**-1
    compare(fastllm.linear, F.linear, reference.linear, [x, w, b], [dy], dtype)
    y = fastllm.linear(x.to(dtype), w.to(dtype))
    truth = x.to(dtype).double() @ w.to(dtype).double().T
    assert torch.all((y.double() - truth).abs() <= torch.finfo(dtype).eps * (truth.abs() + 1e-3 * size[2] ** 0.5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_special_values(cpu_backend, dtype):
    """Subnormals, infinities and NaN keep their places, for few rows and many; what is too large becomes infinity."""
    for M in (5, 40):
        x, w = torch.randn(M, 24), torch.randn(30, 24)
        x[1, 3], x[2, 0], x[3], x[4], x[4, 0] = torch.nan, torch.inf, 2.0**-14, 0, torch.finfo(dtype).max
        w[7], w[8] = torch.finfo(dtype).tiny / 4, 16.0
        given = x.to(dtype), w.to(dtype)
        y, peer = fastllm.linear(*given), F.linear(given[0].float(), given[1].float()).to(dtype)
        assert torch.equal(y.isnan(), peer.isnan()) and torch.equal(y.isinf(), peer.isinf())
        finite = peer.isfinite()
        torch.testing.assert_close(y[finite], peer[finite])


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_added_to_what_is_there(dtype):
    """dweight += dy^T x, for the losses that take rows in chunks, and c += alpha a b, for low-rank updates."""
    dy, x, c = (torch.randn(*size).to(dtype) for size in ((40, 30), (40, 50), (30, 50)))
    truth = c.double() + dy.double().T @ x.double()
    got = c.clone()
    ops.linear_bwd_out(dy, x, c, None, got, True)
    assert_as_accurate(got, torch.addmm(c, dy.T, x), truth, "linear_bwd_out")
    with fastllm.backend("cpu"):
        got = c.clone()
        ops.addmm_(got, dy.T, x, 0.5)
        made = ops.matmul(dy.T, x)
    assert_as_accurate(got, torch.addmm(c, dy.T, x, alpha=0.5), c.double() + 0.5 * (truth - c.double()), "addmm_")
    assert_as_accurate(made, dy.T @ x, dy.double().T @ x.double(), "matmul")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(cpu_backend, dtype):
    x, w, b = tensors(50, 33, 20)
    compare(fastllm.linear, F.linear, reference.linear, [x, w, b], [torch.randn(50, 33)], dtype)


@pytest.mark.parametrize("leading", [(), (4,), (2, 3, 5), (3, 0, 2)], ids=str)
def test_leading_dimensions(cpu_backend, leading):
    x, w, b = torch.randn(*leading, 37), torch.randn(21, 37), torch.randn(21)
    compare(fastllm.linear, F.linear, reference.linear, [x, w, b], [torch.randn(*leading, 21)], torch.float32)


def views():
    """What is strange about the operands, and the operands."""
    x, w, b = torch.randn(40, 3, 50), torch.randn(60, 60), torch.randn(60)
    yield "x transposed", x.transpose(0, 1), w[:, :50].clone(), b
    yield "x strided", torch.randn(20, 100)[:, ::2], w[:, :50].clone(), b
    yield "x expanded", torch.randn(1, 50).expand(9, 50), w[:, :50].clone(), b
    yield "weight transposed", x, w[:50].clone().T, b
    yield "rows of a wider weight", x, w[:, 5:55], b
    yield "weight strided", x, torch.randn(60, 100)[:, ::2], b
    yield "weight expanded", x, torch.randn(60, 1).expand(60, 50), b
    yield "one row of weight", x, torch.randn(1, 50).expand(60, 50), b
    yield "bias strided", x, w[:, :50].clone(), torch.randn(120)[::2]


@pytest.mark.parametrize("what, x, w, b", list(views()), ids=lambda v: v if isinstance(v, str) else "")
def test_views_and_no_mutation(cpu_backend, what, x, w, b):
    dy = torch.randn(1, 60).expand(*x.shape[:-1], 60)
    before = [t.clone() for t in (x, w, b, dy)]
    assert torch.equal(fastllm.linear(x, w, b), fastllm.linear(*before[:3]))
    compare(fastllm.linear, F.linear, reference.linear, [x, w, b], [dy], torch.float32)
    assert all(torch.equal(t, kept) for t, kept in zip((x, w, b, dy), before, strict=True))


@pytest.mark.parametrize("wanted", ["x", "w", "b", "xb", "wb", "xw"])
def test_only_the_gradients_that_are_wanted(cpu_backend, wanted):
    leaves = {n: t.requires_grad_(n in wanted) for n, t in zip("xwb", tensors(30, 20, 10), strict=True)}
    dy = torch.randn(30, 20)
    fastllm.linear(*leaves.values()).backward(dy)
    F_leaves = [t.detach().clone().requires_grad_(t.requires_grad) for t in leaves.values()]
    F.linear(*F_leaves).backward(dy)
    for got, peer in zip(leaves.values(), F_leaves, strict=True):
        assert (got.grad is None) == (peer.grad is None)
        assert got.grad is None or torch.allclose(got.grad, peer.grad, rtol=1e-4, atol=1e-4)


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_same_bits_for_any_number_of_threads(dtype):
    x, w, b = (t.to(dtype) for t in tensors(301, 517, 403))
    dy, before, results = torch.randn(301, 517, dtype=dtype), torch.get_num_threads(), []
    with fastllm.backend("cpu"):
        for threads in (1, 2, 3, 4, 7, 2):
            torch.set_num_threads(threads)
            outputs, grads = run(fastllm.linear, [x, w, b], [dy])
            results.append(outputs + grads)
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_rows_do_not_depend_on_their_neighbours(cpu_backend):
    """A row of y has the same bits in a batch and alone: tiles of other heights sum in the same order."""
    x, w, b = tensors(61, 90, 400)
    together = fastllm.linear(x, w, b)
    for i in (0, 5, 60):
        assert torch.equal(together[i], fastllm.linear(x[i], w, b))


def test_nan_and_inf_stay_where_they_are(cpu_backend):
    x, w, _ = tensors(13, 70, 20)
    x[4, 3], x[7, 0], w[66, 2] = torch.nan, torch.inf, -torch.inf
    y, peer = fastllm.linear(x, w), F.linear(x, w)
    assert torch.equal(y.isnan(), peer.isnan()) and torch.equal(y.isinf(), peer.isinf())


@needs_extension
def test_gradcheck():
    x, w, b = (t.double().requires_grad_() for t in tensors(5, 4, 3))
    with fastllm.backend("cpu"):
        for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
            assert check(fastllm.linear, (x, w, b))
            assert check(fastllm.linear, (x, w))


@needs_extension
def test_opcheck():
    x, w, b = tensors(0, 6, 5, leading=(2, 3))
    dy = torch.randn(2, 3, 6)
    torch.library.opcheck(ops.linear_fwd.dispatched, (x, w, b))
    torch.library.opcheck(ops.linear_fwd.dispatched, (x, torch.randn(5, 6).T, None))
    for needs in ((True, True, True), (False, True, False), (True, False, True)):
        torch.library.opcheck(ops.linear_bwd.dispatched, (dy, x, w, *needs))


ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


def activated(name):
    """Ours, PyTorch's, and the reference's, of x, weight and bias."""
    return (
        lambda *given: fastllm.linear(*given, activation=name),
        lambda *given: ACTIVATIONS[name](F.linear(*given)),
        lambda *given: reference.linear(*given, activation=name),
    )


class TestActivation:
    @pytest.mark.parametrize("size", [(5, 7, 1), (7, 65, 17), (97, 383, 193), (131, 260, 300)], ids=str)
    @pytest.mark.parametrize("name", ACTIVATIONS)
    def test_sizes(self, cpu_backend, name, size):
        x, w, b = tensors(*size)
        dy, w = torch.randn(size[:2]), w * size[2] ** -0.5
        for dtype in (torch.float32, torch.bfloat16):
            compare(*activated(name), [x, w, b], [dy], dtype)
            compare(*activated(name), [x, w], [dy], dtype)

    @pytest.mark.parametrize("fused", [True, False], ids=["one kernel", "product, then activation"])
    @pytest.mark.parametrize("size", [(9, 20, 7), (70, 65, 33), (130, 60, 40)], ids=str)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("name", ACTIVATIONS)
    @pytest.mark.parametrize("own_backend", ["triton"], indirect=True)
    def test_triton(self, own_backend, monkeypatch, name, dtype, size, fused):
        monkeypatch.setattr(ops, "_fused", lambda x, K: fused)
        x, w, b = (t.to(own_backend) for t in tensors(*size))
        dy, w = torch.randn(size[:2], device=own_backend), w * size[2] ** -0.5
        compare(*activated(name), [x, w, b], [dy], dtype)
        if dtype == torch.float32:
            compare(*activated(name), [x, w.T.contiguous().T], [dy], dtype)

    @pytest.mark.parametrize("size", [(3, 0, 4), (0, 3, 4), (3, 4, 0)], ids=str)
    def test_nothing(self, cpu_backend, size):
        compare(*activated("gelu"), tensors(*size), [torch.randn(size[:2])], torch.float32)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("name", ACTIVATIONS)
    def test_where_all_is_pytorchs(self, name, dtype, monkeypatch):
        """No table has an entry for so small a product."""
        monkeypatch.setattr(_tuned, "unmeasured", lambda dtype: False)
        _tuned.forget()
        for leading in ((9,), (2, 3), ()):
            x, w, b = torch.randn(*leading, 20), torch.randn(33, 20), torch.randn(33)
            compare(*activated(name), [x, w, b], [torch.randn(*leading, 33)], dtype)

    @needs_extension
    @pytest.mark.parametrize("own", [(False, True, False), (False, False, True), (True, False, False)], ids=str)
    @pytest.mark.parametrize("name", ACTIVATIONS)
    def test_passes_mix(self, monkeypatch, name, own):
        """Some of the products are PyTorch's, and the activation is ours."""
        monkeypatch.setattr(_tuned, "linear_kernels", lambda *size: own)
        for leading in ((9,), (2, 3), ()):
            x, w, b = torch.randn(*leading, 20), torch.randn(33, 20), torch.randn(33)
            compare(*activated(name), [x, w, b], [torch.randn(*leading, 33)], torch.float32)

    @pytest.mark.parametrize("wanted", ["x", "w", "b", "xw", "xb"])
    @pytest.mark.parametrize("forced", [True, False], ids=["ours", "pytorchs"])
    def test_only_the_gradients_that_are_wanted(self, wanted, forced):
        leaves = {n: t.requires_grad_(n in wanted) for n, t in zip("xwb", tensors(30, 20, 10), strict=True)}
        with fastllm.backend("cpu") if forced and dispatch.extension else contextlib.nullcontext():
            fastllm.linear(*leaves.values(), activation="silu").sum().backward()
        assert all((t.grad is not None) == (n in wanted) for n, t in leaves.items())

    def test_backward_keeps_no_more_than_pytorch(self, cpu_backend):
        """For relu not even x W^T + bias: its sign is y's."""
        saved = []
        x, w, b = (t.requires_grad_() for t in tensors(20, 30, 10))
        for name in ACTIVATIONS:
            with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
                y = fastllm.linear(x, w, b, activation=name)
            own = set(saved) - {t.data_ptr() for t in (x, w, b)}
            assert len(own) == 1 and (own == {y.data_ptr()}) == (name == "relu")
            saved.clear()

    @needs_extension
    def test_gradcheck(self):
        x, w, b = (t.double().requires_grad_() for t in tensors(5, 4, 3))
        with fastllm.backend("cpu"):
            for name in ("gelu", "gelu_tanh", "silu"):
                for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
                    assert check(activated(name)[0], (x, w, b))

    @needs_extension
    def test_opcheck(self):
        x, w, b = tensors(0, 6, 5, leading=(2, 3))
        for needs_z in (True, False):
            torch.library.opcheck(ops.linear_act_fwd.dispatched, (x, w, b, 1, needs_z))
        z, dy = torch.randn(4, 6), torch.randn(4, 6)
        torch.library.opcheck(ops.bias_act_fwd.dispatched, (z, b, 3))
        torch.library.opcheck(ops.bias_act_bwd.dispatched, (dy, z, None, 2, True))
        torch.library.opcheck(ops.linear_out, (x, w, b, torch.empty(2, 3, 6)))
        torch.library.opcheck(
            ops.linear_bwd_out, (torch.randn(2, 3, 6), x, w, torch.ones(2, 3, 5), torch.ones(6, 5), True)
        )

    @pytest.mark.parametrize("name", ["relu", "gelu"])
    def test_compiles_in_one_graph(self, name):
        x, w, b = tensors(8, 6, 4)
        ours, theirs, truth = activated(name)
        compare(torch.compile(ours, fullgraph=True), theirs, truth, [x, w, b], [torch.randn(8, 6)], torch.float32)

    def test_another_is_refused(self):
        with pytest.raises(
            ValueError, match="linear: activation must be None, relu, gelu, gelu_tanh, silu, got 'tanh'"
        ):
            fastllm.linear(*tensors(3, 4, 5), activation="tanh")


class TestTable:
    """Which product runs: ours where the table has measured that it wins, around the size that is asked for."""

    GRID = {"M": [1, 64], "N": [16, 64], "K": [16, 64]}

    @pytest.fixture
    def measured(self, monkeypatch):
        def ratios(small, large):
            return [[[small, small], [small, large]], [[small, large], [large, large]]]

        before = torch.get_num_threads()
        torch.set_num_threads(1)
        passes = {"forward": ratios(0.5, 2.0), "dx": ratios(2.0, 2.0), "dweight": ratios(1.01, 1.01)}
        monkeypatch.setattr(_tuned, "TABLE", {_tuned.key(): {"linear": {"grid": self.GRID, **passes}}})
        _tuned.forget()
        yield
        torch.set_num_threads(before)
        _tuned.forget()

    @pytest.mark.parametrize(
        "sizes, forward",
        [((64, 64, 64), True), ((64, 64, 16), True), ((64, 63, 64), True), ((63, 64, 63), False), ((1, 64, 64), True)]
        + [((1, 16, 64), False), ((64, 16, 16), False), ((5000, 70, 9000), True), ((64, 40, 40), False)],
    )
    def test_all_corners_must_win(self, measured, sizes, forward):
        assert _tuned.linear_kernels(*sizes) == (forward, True, False)

    @pytest.mark.parametrize("sizes", [(0, 64, 64), (64, 15, 64), (64, 64, 15)])
    def test_below_the_grid_is_pytorchs(self, measured, sizes):
        assert _tuned.linear_kernels(*sizes) == (False, False, False)

    def test_what_nobody_measured_is_pytorchs(self, measured, monkeypatch):
        torch.set_num_threads(2)
        assert _tuned.linear_kernels(64, 64, 64) == (False, False, False)
        torch.set_num_threads(1)
        monkeypatch.setattr(_tuned, "cpu", lambda: "an unknown CPU")
        assert _tuned.linear_kernels(64, 64, 64) == (False, False, False)

    def test_zen5_has_the_entry_of_zen4(self, measured, monkeypatch):
        zen4, zen5 = (
            "AuthenticAMD family {}, avx512, {} threads".format(*x) for x in (("25 model 17", 2), ("26 model 2", 4))
        )
        (entry,) = _tuned.TABLE.values()
        monkeypatch.setattr(_tuned, "TABLE", {zen4: entry})
        monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
        assert _tuned.entry_of(zen4) == _tuned.entry_of(zen5) == zen4
        assert _tuned._linear_kernels(zen5, torch.float32, 64, 64, 64) == (True, True, False)
        others = zen5.replace("26", "27"), zen5.replace("avx512", "avx2"), zen5.replace("4", "64")
        assert not any(map(_tuned.entry_of, others))
        monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
        assert _tuned.entry_of(zen5) is None

    @needs_extension
    def test_it_decides_and_is_explained(self, measured):
        large, small = tensors(64, 64, 64), tensors(8, 8, 8)
        told = [fastllm.explain(fastllm.linear, *given).calls[0] for given in (large, small)]
        assert told[0].backend == "cpu" and told[0].reason == ""
        assert told[1].backend == "reference" and "PyTorch's product is faster" in told[1].reason
        assert torch.equal(fastllm.linear(*small), F.linear(*small))

    @needs_extension
    def test_passes_mix(self, measured):
        """dweight is PyTorch's here, bit for bit, and dx ours."""
        x, w, b = tensors(64, 256, 256)
        dy = torch.randn(64, 256)
        _, (dx, dw, _) = run(fastllm.linear, [x, w, b], [dy])
        assert torch.equal(dw, dy.T @ x)
        assert torch.equal(dx, ops.linear_bwd.dispatched(dy, x, w, True, False, False)[0])

    @needs_extension
    @pytest.mark.parametrize("size", [(64, 256, 256), (8, 8, 8)], ids=str)
    def test_compiles_in_one_graph(self, measured, size):
        x, w, b = tensors(*size)
        dy, compiled = torch.randn(size[:2]), torch.compile(fastllm.linear, fullgraph=True)
        compare(compiled, F.linear, reference.linear, [x, w, b], [dy], torch.float32)
        if size[0] == 64:
            for got, eager in zip(run(compiled, [x, w, b], [dy]), run(fastllm.linear, [x, w, b], [dy]), strict=True):
                assert all(torch.equal(x, y) for x, y in zip(got, eager, strict=True))


def test_the_committed_table_is_whole():
    measurements = [entry[name] for entry in _tuned.TABLE.values() for name in entry if name.startswith("linear")]
    assert measurements
    for measured in measurements:
        sizes = [len(points) for points in measured["grid"].values()]
        assert all(points == sorted(set(points)) for points in measured["grid"].values())
        assert all(list(torch.tensor(measured[name]).shape) == sizes for name in _tuned.PASSES)


def test_a_table_without_fp32_leaves_fp32_to_pytorch(monkeypatch):
    """As `bench linear --tune --dtype bfloat16` writes it on a CPU that had no entry."""
    entry = {"grid": {"M": [16], "N": [64], "K": [64]}} | {name: [[[2.0]]] for name in _tuned.PASSES}
    monkeypatch.setattr(_tuned, "TABLE", {_tuned.key(): {"linear bfloat16": entry}})
    assert _tuned._linear_kernels(_tuned.key(), torch.bfloat16, 64, 64, 64) == (True,) * 3
    assert _tuned._linear_kernels(_tuned.key(), torch.float32, 64, 64, 64) == (False,) * 3


@pytest.fixture(params=[True, False], ids=["onednn", "no onednn"])
def onednn(request, monkeypatch):
    """A CPU of which nothing was measured, where oneDNN multiplies 16-bit matrices, or does not."""
    monkeypatch.setattr(_tuned, "TABLE", {})
    monkeypatch.setattr(_tuned, "onednn_multiplies", lambda dtype: request.param)
    _tuned.forget()
    yield request.param
    _tuned.forget()


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_narrow_products_are_ours_where_onednn_has_none(onednn, dtype):
    ours = dtype != torch.float32 and not onednn and dispatch.extension.selected() != "scalar"
    given = [t.to(dtype) for t in tensors(3, 40, 50)]
    told = fastllm.explain(fastllm.linear, *given).calls[0]
    assert told.backend == ("cpu" if ours else "reference")
    assert ("oneDNN has this product" in told.reason) == (onednn and dtype != torch.float32)
    assert _tuned.fewest_rows(dtype) == (0 if ours else math.inf)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        told = fastllm.explain(fastllm.linear, *(t.float() for t in given)).calls[0]
    assert (told.backend == "cpu") == (not onednn and dispatch.extension.selected() != "scalar")


def test_pytorchs_product_is_no_fallback(monkeypatch, onednn):
    monkeypatch.setattr(dispatch, "_strict", True)
    x, w, b = tensors(4, 4, 4)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        given = [t.to(dtype) for t in (x, w, b)]
        y = fastllm.linear(*given)
        assert torch.equal(y, F.linear(*given)) or not onednn
    with fastllm.backend("triton"):
        assert torch.equal(fastllm.linear(x, w, b), F.linear(x, w, b))


def test_autocast_chooses_the_dtype(onednn):
    x, w, b = (t.requires_grad_() for t in tensors(8, 6, 4))

    def under_autocast(function):
        def call(*given):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return function(*given)

        return call

    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = fastllm.linear(x, w, b)
        assert y.dtype == torch.bfloat16 and (torch.equal(y, F.linear(x, w, b)) or not onednn)
        assert torch.equal(fastllm.linear(x.bfloat16(), w, b), y)
    given, dy = [t.detach() for t in (x, w, b)], torch.randn(8, 6)
    grads = [dy.bfloat16()]
    ours, theirs = (sum(run(under_autocast(f), given, grads), []) for f in (fastllm.linear, F.linear))
    exact = sum(run(F.linear, [t.bfloat16() for t in given], grads, dtype=torch.float64), [])
    for got, peer, true in zip(ours, theirs, exact, strict=True):
        assert got.dtype == peer.dtype
        assert_as_accurate(got, peer, true)
