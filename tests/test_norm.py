"""layer_norm and rms_norm: outputs and every gradient, each backend, against fp64 and beside PyTorch's own kernel."""

import pytest
import torch
import torch.nn.functional as F
from check import compare, run

import fastllm
from fastllm import dispatch, reference
from fastllm.ops import norm as ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 3), (3, 5), (2, 7, 16), (5, 31), (4, 64), (9, 65), (70, 100), (2, 3, 768), (3, 1025)]


def layer_norm_pair(D):
    return (
        lambda x, w, b: fastllm.layer_norm(x, w, b),
        lambda x, w, b: F.layer_norm(x, (D,), w, b),
        lambda x, w, b: reference.layer_norm(x, w, b),
    )


def rms_norm_pair(D):
    return (
        lambda x, w: fastllm.rms_norm(x, w),
        lambda x, w: F.rms_norm(x, (D,), w, 1e-6),
        lambda x, w: reference.rms_norm(x, w),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 1), *SHAPES], ids=str)
def test_layer_norm(backend, shape, dtype):
    x, w, b, dy = torch.randn(shape), torch.randn(shape[-1:]), torch.randn(shape[-1:]), torch.randn(shape)
    compare(*layer_norm_pair(shape[-1]), [t.to(backend) for t in (x, w, b)], [dy.to(backend)], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rms_norm(backend, shape, dtype):
    x, w, dy = torch.randn(shape), torch.randn(shape[-1:]), torch.randn(shape)
    compare(*rms_norm_pair(shape[-1]), [t.to(backend) for t in (x, w)], [dy.to(backend)], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_weights(backend, dtype):
    x, dy = torch.randn(6, 50).to(backend), torch.randn(6, 50).to(backend)
    compare(fastllm.layer_norm, lambda x: F.layer_norm(x, (50,)), reference.layer_norm, [x], [dy], dtype)
    compare(fastllm.rms_norm, lambda x: F.rms_norm(x, (50,), eps=1e-6), reference.rms_norm, [x], [dy], dtype)
    w = torch.randn(50).to(backend)
    compare(fastllm.layer_norm, lambda x, w: F.layer_norm(x, (50,), w), reference.layer_norm, [x, w], [dy], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("uses_h", [True, False])
def test_residual(backend, dtype, uses_h):
    x, r, dy, dh = (torch.randn(11, 72).to(backend) for _ in range(4))
    w, b = torch.randn(72).to(backend), torch.randn(72).to(backend)
    grads = [dy, dh if uses_h else None]

    def naive(norm):
        return lambda x, r, *w: (norm(x + r, *w), x + r)

    compare(
        lambda x, r, w, b: fastllm.layer_norm(x, w, b, residual=r),
        naive(lambda h, w, b: F.layer_norm(h, (72,), w, b)),
        lambda x, r, w, b: reference.layer_norm(x, w, b, residual=r),
        [x, r, w, b],
        grads,
        dtype,
    )
    compare(
        lambda x, r, w: fastllm.rms_norm(x, w, residual=r, weight_offset=1.0),
        naive(lambda h, w: F.rms_norm(h, (72,), w + 1, 1e-6)),
        lambda x, r, w: reference.rms_norm(x, w, residual=r, weight_offset=1.0),
        [x, r, w],
        grads,
        dtype,
    )


DROPPED = 0.3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("shape", [(1, 3), (5, 31), (3, 64), (2, 5, 65), (4, 130)], ids=str)
def test_dropout(backend, shape, residual, dtype):
    """On x alone, before the residual; which elements, the seed decides, as it does for the reference."""
    D = shape[-1]
    x, r, dy, dh = (torch.randn(shape).to(backend) for _ in range(4))
    w, b = torch.randn(D).to(backend), torch.randn(D).to(backend)
    torch.manual_seed(3)
    seed = torch.randint(2**62, (), device=backend)
    keep = reference.dropout_keep(seed, DROPPED, 1, 1, x.numel() // D, D).view(shape)
    inputs, grads = ([x, r, w, b], [dy, dh]) if residual else ([x, w, b], [dy])

    def ours(norm, **options):
        def call(x, *rest):
            torch.manual_seed(3)  # the seed that the op draws is the one above
            r, weights = (rest[0], rest[1:]) if residual else (None, rest)
            return norm(x, *weights, residual=r, dropout_p=DROPPED, **options)

        return call

    def plain(norm):
        def call(x, *rest):
            x = x * keep.to(x.dtype)
            r, weights = (rest[0], rest[1:]) if residual else (None, rest)
            return norm(x, *weights) if r is None else (norm(x + r, *weights), x + r)

        return call

    layer_norm = plain(lambda h, w, b: F.layer_norm(h, (D,), w, b))
    rms_norm = plain(lambda h, w: F.rms_norm(h, (D,), w, 1e-6))
    compare(ours(fastllm.layer_norm), layer_norm, ours(reference.layer_norm, seed=seed), inputs, grads, dtype)
    compare(ours(fastllm.rms_norm), rms_norm, ours(reference.rms_norm, seed=seed), inputs[:-1], grads, dtype)


@pytest.mark.parametrize("D", [33000])
def test_dropout_of_rows_that_do_not_fit_on_chip(backend, D):
    x, r, dy = (torch.randn(2, D).to(backend) for _ in range(3))
    w = torch.randn(D).to(backend)
    torch.manual_seed(3)
    seed = torch.randint(2**62, (), device=backend)

    def call(norm, **options):
        def seeded(x, r, w):
            torch.manual_seed(3)
            return norm(x, w, residual=r, dropout_p=DROPPED, **options)

        return seeded

    truth = call(reference.layer_norm, seed=seed)
    compare(call(fastllm.layer_norm), truth, truth, [x, r, w], [dy, None], torch.float32)


@pytest.mark.parametrize("residual", [True, False])
def test_dropout_of_everything(cpu_backend, residual):
    x, r, dy, dh, w, b = torch.randn(6, 5, 20).unbind()
    inputs, grads = ([x, w[0], b[0], r], [dy, dh]) if residual else ([x, w[0], b[0]], [dy])

    def ours(x, w, b, r=None):
        return fastllm.layer_norm(x, w, b, residual=r, dropout_p=1.0)

    def plain(x, w, b, r=None):
        h = F.dropout(x, 1.0) if r is None else F.dropout(x, 1.0) + r
        y = F.layer_norm(h, w.shape, w, b)
        return y if r is None else (y, h)

    def of_squares(x, w, r=None):
        return fastllm.rms_norm(x, w, residual=r, dropout_p=1.0)

    def plain_of_squares(x, w, r=None):
        h = F.dropout(x, 1.0) if r is None else F.dropout(x, 1.0) + r
        y = F.rms_norm(h, w.shape, w, 1e-6)
        return y if r is None else (y, h)

    compare(ours, plain, plain, inputs, grads, torch.float32)
    del inputs[2]
    compare(of_squares, plain_of_squares, plain_of_squares, inputs, grads, torch.float32)


def test_dropout_drops_its_share(cpu_backend):
    x = torch.ones(400, 500)
    torch.manual_seed(1)
    _, h = fastllm.rms_norm(x, residual=torch.zeros_like(x), dropout_p=0.25)
    torch.manual_seed(2)
    _, other = fastllm.rms_norm(x, residual=torch.zeros_like(x), dropout_p=0.25)
    assert set(h.unique().tolist()) == {0.0, float(torch.tensor(1 / 0.75))}
    both = (h == 0) & (other == 0)
    for drawn, expected in ((h == 0, 0.25), (other == 0, 0.25), (both, 0.25**2)):  # other seeds draw independently
        assert abs(float(drawn.float().mean()) - expected) < 5 * (expected / x.numel()) ** 0.5


def test_only_the_sum_is_used(backend):
    x, r, dh = (torch.randn(4, 8).to(backend) for _ in range(3))
    for norm in (fastllm.layer_norm, fastllm.rms_norm):
        _, grads = run(lambda x, r, norm=norm: norm(x, residual=r), [x, r], [None, dh])
        assert torch.equal(grads[0], dh) and torch.equal(grads[1], dh)
        (y, h), grads = run(lambda x, r, norm=norm: norm(x, residual=r, dropout_p=DROPPED), [x, r], [None, dh])
        kept = (h != r).to(dh.dtype) / (1 - DROPPED)
        torch.testing.assert_close(grads[0], dh * kept)
        assert torch.equal(grads[1], dh)


@pytest.mark.parametrize("mean", [100.0, 1e4])
def test_large_mean(backend, mean):
    """One-pass variance, E[x^2] - E[x]^2, loses everything here."""
    x, w, b, dy = torch.randn(8, 512) + mean, torch.randn(512), torch.randn(512), torch.randn(8, 512)
    compare(*layer_norm_pair(512), [t.to(backend) for t in (x, w, b)], [dy.to(backend)], torch.float32)


@pytest.mark.parametrize("value", [0.0, 3.1, 1e6 + 0.3])
def test_constant_rows(backend, value):
    """The variance is 0, and rounding may not make it negative: with a tiny eps that would be a NaN."""
    x = torch.full((3, 777), value, device=backend)
    y = fastllm.layer_norm(x, eps=1e-12)
    assert y.isfinite().all()


def test_mixed_dtypes(backend):
    """bf16 activations with fp32 weights, as under autocast: outputs like x, gradients like the weights."""
    x, w, b = torch.randn(5, 40).bfloat16(), torch.randn(40), torch.randn(40)
    (y,), (dx, dw, db) = run(fastllm.layer_norm, [t.to(backend) for t in (x, w, b)], [torch.ones(5, 40).to(backend)])
    assert (y.dtype, dx.dtype, dw.dtype, db.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32, torch.float32)
    (y,), (dx, dw) = run(fastllm.rms_norm, [t.to(backend) for t in (x, w)], [torch.ones(5, 40).to(backend)])
    assert (y.dtype, dx.dtype, dw.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)


@pytest.mark.parametrize("N", [0, 1, 63, 64, 65, 1000])
def test_weight_gradients_over_many_rows(backend, N):
    x, w, b, dy = torch.randn(N, 24), torch.randn(24), torch.randn(24), torch.randn(N, 24)
    compare(*layer_norm_pair(24), [t.to(backend) for t in (x, w, b)], [dy.to(backend)], torch.float32)


def test_views_and_no_mutation(backend):
    x = torch.randn(6, 4, 2 * 32).to(backend)[..., ::2].transpose(0, 1)
    dy = torch.randn(1, 1, 32).to(backend).expand(4, 6, 32)
    w, before = torch.randn(32).to(backend), (x.clone(), dy.clone())
    compare(
        fastllm.layer_norm, lambda x, w: F.layer_norm(x, (32,), w), reference.layer_norm, [x, w], [dy], torch.float32
    )
    assert torch.equal(x, before[0]) and torch.equal(dy, before[1])


@pytest.mark.skipif(dispatch.extension is None, reason="the C++ extension is not built")
def test_weight_gradients_do_not_depend_on_threads():
    x, w, b, dy = torch.randn(500, 96), torch.randn(96), torch.randn(96), torch.randn(500, 96)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        results.append(run(fastllm.layer_norm, [x, w, b], [dy])[1])
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.skipif(dispatch.extension is None, reason="the C++ extension is not built")
def test_gradcheck():
    x, r = (torch.randn(3, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    w, b = (torch.randn(6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    with fastllm.backend("cpu"):
        for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
            assert check(fastllm.layer_norm, (x, w, b))
            assert check(lambda x, w, r: fastllm.layer_norm(x, w, residual=r), (x, w, r))
            assert check(lambda x, w, r: fastllm.rms_norm(x, w, residual=r, weight_offset=1.0), (x, w, r))

            def dropped(norm):
                def call(x, w, r):
                    torch.manual_seed(0)
                    return norm(x, w, residual=r, dropout_p=DROPPED)

                return call

            assert check(dropped(fastllm.layer_norm), (x, w, r)) and check(dropped(fastllm.rms_norm), (x, w, r))


@pytest.mark.skipif(dispatch.extension is None, reason="the C++ extension is not built")
def test_opcheck():
    x, r, dy, w, b = torch.randn(3, 4, 6), torch.randn(3, 4, 6), torch.randn(3, 4, 6), torch.randn(6), torch.randn(6)
    seed = torch.tensor(7)
    for residual in (None, r):
        torch.library.opcheck(ops.layer_norm_fwd.dispatched, (x, w, b, residual, None, 1e-5, 0.0))
        torch.library.opcheck(ops.layer_norm_fwd.dispatched, (x, w, b, residual, seed, 1e-5, DROPPED))
        torch.library.opcheck(ops.rms_norm_fwd.dispatched, (x, w, residual, None, 1e-5, 1.0, 0.0))
        torch.library.opcheck(ops.rms_norm_fwd.dispatched, (x, w, residual, seed, 1e-5, 1.0, DROPPED))
    _, _, mean, rstd = ops.layer_norm_fwd.dispatched(x, w, b, None, None, 1e-5, 0.0)
    torch.library.opcheck(ops.layer_norm_plain, (x, w, b, 1e-5))
    torch.library.opcheck(ops.rms_norm_plain, (x, w, 1e-5, 1.0))
    torch.library.opcheck(ops.layer_norm_bwd.dispatched, (dy, r, x, w, mean, rstd, None, 0.0, True, True))
    torch.library.opcheck(ops.layer_norm_bwd.dispatched, (dy, None, x, None, mean, rstd, None, 0.0, False, False))
    torch.library.opcheck(ops.layer_norm_bwd.dispatched, (dy, r, x, w, mean, rstd, seed, DROPPED, True, True))
    torch.library.opcheck(ops.rms_norm_bwd.dispatched, (dy, r, x, w, rstd, None, 1.0, 0.0, False))
    torch.library.opcheck(ops.rms_norm_bwd.dispatched, (dy, r, x, w, rstd, seed, 1.0, DROPPED, True))


@pytest.mark.parametrize("op", [fastllm.layer_norm, fastllm.rms_norm])
def test_autocast_adds_as_pytorch_does(cpu_backend, op):
    """A product's output is bf16, the residual fp32: so is their sum. Without autocast two dtypes are a mistake."""
    x, residual, w = torch.randn(5, 40).bfloat16(), torch.randn(5, 40), torch.randn(40)
    with torch.autocast("cpu", torch.bfloat16):
        y, h = op(x, w, residual=residual)
    assert torch.equal(h, x + residual) and torch.equal(y, op(x.float(), w, residual=residual)[0])
    with pytest.raises(TypeError, match="residual"):
        op(x, w, residual=residual)


@pytest.mark.parametrize("norm", [fastllm.layer_norm, fastllm.rms_norm], ids=lambda f: f.__name__)
def test_outputs_past_the_caches(cpu_backend, norm):
    """From 12 MiB on rows are stored past the caches; a row does not know."""
    x, w = torch.randn(3600, 1024), torch.randn(1024)
    (y,), (dx, _) = run(norm, [x, w], [x])
    for part in (slice(0, 1800), slice(1800, None)):
        (some,), (dsome, _) = run(norm, [x[part], w], [x[part]])
        assert torch.equal(y[part], some) and torch.equal(dx[part], dsome)
