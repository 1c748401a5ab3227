"""softmax and log_softmax: outputs and gradients, each backend, against fp64 and beside PyTorch's own kernel."""

import pytest
import torch
from check import compare, run

import fastllm
from fastllm import dispatch, reference
from fastllm.ops import softmax as ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PAIRS = {"softmax": (fastllm.softmax, torch.softmax), "log_softmax": (fastllm.log_softmax, torch.log_softmax)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1,), (7,), (5, 16), (3, 17), (2, 3, 63), (4, 64), (2, 65), (1, 2, 3, 4, 130), (3, 1025)], ids=str
)
@pytest.mark.parametrize("name", PAIRS)
def test_shapes(backend, name, shape, dtype):
    ours, theirs = PAIRS[name]
    x, dy = (3 * torch.randn(shape)).to(backend), torch.randn(shape).to(backend)
    compare(ours, lambda x: theirs(x, -1), lambda x: theirs(x, -1), [x], [dy], dtype)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("dim", [0, 1, -2])
def test_dim(backend, name, dim):
    ours, theirs = PAIRS[name]
    x, dy = torch.randn(4, 5, 6).to(backend), torch.randn(4, 5, 6).to(backend)
    compare(lambda x: ours(x, dim=dim), lambda x: theirs(x, dim), lambda x: theirs(x, dim), [x], [dy], torch.float32)
    mask = torch.rand(4, 5, 6).to(backend) > 0.3
    truth = lambda x: reference.softmax(  # noqa: E731
        x.movedim(dim, -1), mask=mask.movedim(dim, -1), log=name == "log_softmax"
    ).movedim(-1, dim)
    compare(lambda x: ours(x, dim=dim, mask=mask), truth, truth, [x], [dy], torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("options", ["scale", "causal", "mask", "row mask", "causal mask", "tall causal"])
def test_options(backend, name, options, dtype):
    shape = (2, 3, 21, 9) if options == "tall causal" else (2, 3, 9, 21)
    x, dy = torch.randn(shape).to(backend), torch.randn(shape).to(backend)
    arguments = {
        "scale": dict(scale=-1.7),
        "causal": dict(causal=True),
        "mask": dict(mask=torch.rand(2, 1, 9, 21) > 0.5),
        "row mask": dict(mask=torch.rand(2, 1, 1, 21) > 0.5, scale=0.3),
        "causal mask": dict(causal=True, mask=torch.rand(9, 21) > 0.5),
        "tall causal": dict(causal=True),
    }[options]
    arguments = {k: v.to(backend) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    truth = lambda x: reference.softmax(x, log=name == "log_softmax", **arguments)  # noqa: E731
    compare(lambda x: PAIRS[name][0](x, **arguments), truth, truth, [x], [dy], dtype)


def test_row_that_sees_nothing(backend):
    x = torch.randn(2, 1, 3, 4).to(backend)
    mask = torch.zeros(1, 1, 3, 4, dtype=torch.bool, device=backend)
    mask[0, 0, 1] = True
    (y,), (dx,) = run(lambda x: fastllm.softmax(x, mask=mask), [x], [torch.ones_like(x)])
    assert (y[:, :, [0, 2]] == 0).all() and (dx[:, :, [0, 2]] == 0).all() and not y.isnan().any()
    (y,), (dx,) = run(lambda x: fastllm.log_softmax(x, mask=mask), [x], [torch.ones_like(x)])
    assert (y[:, :, [0, 2]] == -torch.inf).all() and (dx[:, :, [0, 2]] == 0).all()


@pytest.mark.parametrize("name", PAIRS)
def test_extreme_values(backend, name):
    ours, theirs = PAIRS[name]
    x = torch.tensor([[1e4, 1e4 - 1, -1e4], [-1e30, 0.0, 3.0], [5e3, 5e3 + 2, 5e3 + 1]]).to(backend)
    dy = torch.randn(3, 3).to(backend)
    compare(ours, lambda x: theirs(x, -1), lambda x: theirs(x, -1), [x], [dy], torch.float32)
    assert ours(torch.tensor([0.0, torch.nan, 1.0], device=backend)).isnan().all()


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 0, 4)], ids=str)
def test_empty(backend, shape):
    (y,), (dx,) = run(fastllm.softmax, [torch.zeros(shape, device=backend)], [torch.zeros(shape, device=backend)])
    assert y.shape == dx.shape == shape


def test_views_and_no_mutation(backend):
    x = torch.randn(4, 6, 64).to(backend)[..., ::2].transpose(0, 1)
    dy = torch.randn(1, 1, 32).to(backend).expand(6, 4, 32)
    before = x.clone(), dy.clone()
    compare(fastllm.softmax, lambda x: torch.softmax(x, -1), lambda x: torch.softmax(x, -1), [x], [dy], torch.float32)
    assert torch.equal(x, before[0]) and torch.equal(dy, before[1])


@pytest.mark.skipif(dispatch.extension is None, reason="the C++ extension is not built")
def test_gradcheck():
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([True, True, False, True])
    with fastllm.backend("cpu"):
        for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
            assert check(lambda x: fastllm.softmax(x, scale=0.7, mask=mask), (x,))
            assert check(lambda x: fastllm.log_softmax(x, scale=0.7), (x,))


@pytest.mark.skipif(dispatch.extension is None, reason="the C++ extension is not built")
def test_opcheck():
    x, dy, mask = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5), torch.rand(1, 1, 4, 5) > 0.5
    for log in (False, True):
        torch.library.opcheck(ops.softmax_fwd.dispatched, (x, mask, 0.5, True, log))
        torch.library.opcheck(ops.softmax_bwd.dispatched, (dy, torch.softmax(x, -1), 0.5, log))


@pytest.mark.parametrize("log", [False, True], ids=["softmax", "log_softmax"])
def test_outputs_past_the_caches(cpu_backend, log):
    """From 12 MiB on rows are stored past the caches; a row does not know."""
    function = fastllm.log_softmax if log else fastllm.softmax
    x = torch.randn(3600, 1024)
    (y,), (dx,) = run(function, [x], [x])
    for part in (slice(0, 1800), slice(1800, None)):
        (some,), (dsome,) = run(function, [x[part]], [x[part]])
        assert torch.equal(y[part], some) and torch.equal(dx[part], dsome)


def test_dim_by_position_as_torch_takes_it():
    x = torch.randn(3, 4)
    assert torch.equal(fastllm.softmax(x, 0), fastllm.softmax(x, dim=0))
    assert torch.equal(fastllm.log_softmax(x, 0), fastllm.log_softmax(x, dim=0))
