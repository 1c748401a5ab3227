"""linear_cross_entropy: losses and gradients, each backend, against fp64 and beside PyTorch's; memory, options."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from check import compare, run

import fastllm
from fastllm import dispatch, reference
from fastllm.ops import linear_cross_entropy as ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
R, FEW = 128, 16  # rows at a time on CPU
needs_extension = pytest.mark.skipif(dispatch.extension is None, reason="the C++ extension is not built")


@pytest.fixture
def chunk(request, monkeypatch):
    """Rows at a time; fewer where Triton's interpreter runs a program for each, so that a test has fewer in all."""
    if request.node.callspec.params["backend"] != "triton" or torch.cuda.is_available():
        return R
    monkeypatch.setattr(ops, "rows_at_once", lambda N, device: FEW)
    return FEW


def make(N, D, V, backend, ignored=0):
    """Hidden states, weights, bias, targets of which the first `ignored` are -100, class weights."""
    x, w, b = torch.randn(N, D), torch.randn(V, D) * 2 / D**0.5, torch.randn(V)
    target, weight = torch.randint(V, (N,)), torch.rand(V) + 0.5
    target[:ignored] = -100
    return [t.to(backend) for t in (x, w, b, target, weight)]


def check(backend, inputs, target, dtype, *, softcap=0.0, z_loss=0.0, **options):
    """Beside torch's linear and cross_entropy where that has the options, else beside the reference in the dtype."""

    def ours(x, w, b=None):
        return fastllm.linear_cross_entropy(x, w, target, linear_bias=b, softcap=softcap, z_loss=z_loss, **options)

    def theirs(x, w, b=None):
        return F.cross_entropy(F.linear(x, w, b), target, **options)

    def truth(x, w, b=None):
        return reference.linear_cross_entropy(x, w, target, linear_bias=b, softcap=softcap, z_loss=z_loss, **options)

    weight = options.get("weight")
    peer = truth if softcap or z_loss or (weight is not None and weight.dtype != dtype) else theirs
    none = options.get("reduction") == "none"
    grad = (torch.randn(len(target)) if none else torch.tensor(-0.7)).to(backend)
    compare(ours, peer, truth, inputs, [grad], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chunks, more", [(0, 1), (1, -1), (1, 0), (1, 1), (3, 5)])
def test_rows(backend, chunk, chunks, more, dtype):
    x, w, b, target, _ = make(chunks * chunk + more, 24, 50, backend)
    check(backend, [x, w], target, dtype)
    check(backend, [x, w, b], target, dtype, reduction="none")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D, V", [(1, 1), (3, 1), (1, 2), (7, 2047), (16, 2048), (33, 2049)])
def test_sizes(backend, D, V, dtype):
    """Without a bias: of two classes its gradient is a sum that cancels, and rounding alone would be compared."""
    x, w, _, target, _ = make(R + 3, D, V, backend)
    check(backend, [x, w], target, dtype)


OPTIONS = {
    "bias": dict(bias=True),
    "weight": dict(weight=True),
    "ignore_index": dict(ignore_index=3),
    "none": dict(reduction="none"),
    "sum": dict(reduction="sum"),
    "label_smoothing": dict(label_smoothing=0.1),
    "softcap": dict(softcap=2.0),
    "z_loss": dict(z_loss=0.01),
}
PAIRS = [pair for pair in itertools.combinations(OPTIONS, 2) if pair != ("none", "sum")]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("names", [(name,) for name in OPTIONS] + PAIRS, ids=" ".join)
def test_options(backend, chunk, names, dtype):
    """Each option and each pair; the mean, and ignored rows, wherever these do not say otherwise; two chunks."""
    options = {k: v for name in names for k, v in OPTIONS[name].items()}
    x, w, b, target, weight = make(chunk + 8, 12, 37, backend, ignored=2)
    target[4:6] = 3
    if options.get("ignore_index") == 3:
        target[:2] = 3
    if options.pop("weight", False):
        options["weight"] = weight
    check(backend, [x, w, b] if options.pop("bias", False) else [x, w], target, dtype, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_many_chunks_in_low_precision(cpu_backend, dtype):
    """The gradient of the weights is rounded with every chunk: over 16 of them the rule still holds."""
    x, w, b, target, _ = make(16 * R, 32, 300, cpu_backend)
    check(cpu_backend, [x, w, b], target, dtype)


def test_fp16_under_a_loss_scale(backend, chunk):
    """Without the factor the gradients of a mean over many rows are too small for fp16: it comes first, as in torch."""
    x, w, _, target, _ = make(2 * chunk, 8, 1000, backend)
    scale = torch.tensor(2.0**15, device=backend)
    theirs = lambda x, w: F.cross_entropy(F.linear(x / 64, w), target)  # noqa: E731
    ours = lambda x, w: fastllm.linear_cross_entropy(x / 64, w, target)  # noqa: E731
    compare(lambda *a: ours(*a).float(), lambda *a: theirs(*a).float(), theirs, [x, w], [scale], torch.float16)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("N", [0, 3])
def test_all_targets_ignored_or_none_there(backend, N, reduction):
    x, w, b, target, _ = make(N, 6, 5, backend, ignored=N)
    grad = torch.ones((N,) if reduction == "none" else (), device=backend)
    options = dict(reduction=reduction, z_loss=0.1)
    ours = lambda x, w, b: fastllm.linear_cross_entropy(x, w, target, linear_bias=b, **options)  # noqa: E731
    (loss,), gradients = run(ours, [x, w, b], [grad])
    expected = F.cross_entropy(F.linear(x, w, b), target, reduction=reduction)
    assert torch.equal(loss.isnan(), expected.isnan()) and torch.equal(loss.nan_to_num(), expected.nan_to_num())
    for got, like in zip(gradients, (x, w, b), strict=True):
        assert got.shape == like.shape and (got == 0).all()


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_only_the_gradients_that_are_wanted(backend, chunk, wanted, reduction):
    x, w, b, target, _ = make(chunk + 2, 6, 9, backend)

    def gradients(wanted):
        inputs = [t.detach().requires_grad_(i in wanted) for i, t in enumerate((x, w, b))]
        loss = fastllm.linear_cross_entropy(*inputs[:2], target, linear_bias=inputs[2], reduction=reduction)
        return torch.autograd.grad(loss.sum(), [inputs[i] for i in wanted])

    whole = gradients((0, 1, 2))
    for i, got in zip(wanted, gradients(wanted), strict=True):
        assert torch.equal(got, whole[i])


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_backward_twice_gives_the_same(backend, chunk, reduction):
    """The first pass gives away what the forward pass has made; the second makes it again."""
    x, w, _, target, _ = make(chunk + 5, 8, 20, backend)
    leaves = [t.requires_grad_() for t in (x, w)]
    loss = fastllm.linear_cross_entropy(x, w, target, reduction=reduction).sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    kept = [g.clone() for g in first]
    for a, c, again in zip(first, kept, torch.autograd.grad(loss, leaves), strict=True):
        assert torch.equal(a, again) and torch.equal(a, c)


@needs_extension
def test_a_parameter_gets_the_gradient_itself_not_a_copy():
    x, w, _, target, _ = make(4, 8, 20, "cpu")
    w, made = torch.nn.Parameter(w), []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found = function(*args, **(kwargs or {}))
            if "linear_cross_entropy_fwd" in str(function):
                made.append(found[3].data_ptr())
            return found

    with Spy():
        loss = fastllm.linear_cross_entropy(x, w, target)
    loss.backward()
    assert made == [w.grad.data_ptr()]


def test_views_leading_dimensions_and_no_mutation(backend):
    x = torch.randn(5, 3, 2 * 8).to(backend)[..., ::2].transpose(0, 1)
    w, target = torch.randn(8, 11).to(backend).T, torch.randint(11, (5, 3)).to(backend).T
    before = x.clone(), w.clone(), target.clone()
    for reduction in ("none", "mean"):
        theirs = lambda x, w, r=reduction: F.cross_entropy(F.linear(x, w).mT, target, reduction=r)  # noqa: E731
        ours = lambda x, w, r=reduction: fastllm.linear_cross_entropy(x, w, target, reduction=r)  # noqa: E731
        grad = torch.randn((3, 5) if reduction == "none" else ()).to(backend)
        compare(ours, theirs, theirs, [x, w], [grad], torch.float32)
    for tensor, copy in zip((x, w, target), before, strict=True):
        assert torch.equal(tensor, copy)
    one = fastllm.linear_cross_entropy(x[0, 0], w, target[0, 0])
    assert torch.equal(one, fastllm.linear_cross_entropy(x[0, :1], w, target[0, :1]))


def test_token_accuracy(backend, chunk):
    x, w, b, target, _ = make(chunk + 30, 4, 6, backend, ignored=5)
    right = (F.linear(x, w, b).argmax(-1) == target).float()
    call = lambda **options: fastllm.linear_cross_entropy(  # noqa: E731
        x, w, target, linear_bias=b, return_token_accuracy=True, **options
    )
    assert torch.equal(call(reduction="none")[1], right)
    assert call()[1] == right.sum() / (chunk + 25)
    w.requires_grad_()
    loss, accuracy = call()
    assert loss.requires_grad and not accuracy.requires_grad and accuracy == right.sum() / (chunk + 25)


def test_probabilities_go_to_plain_pytorch():
    x, w, b, _, _ = make(6, 4, 9, "cpu")
    target = torch.randn(6, 9).softmax(-1)
    ours = lambda x, w, b, t: fastllm.linear_cross_entropy(x, w, t, linear_bias=b)  # noqa: E731
    theirs = lambda x, w, b, t: F.cross_entropy(F.linear(x, w, b), t)  # noqa: E731
    compare(ours, theirs, theirs, [x, w, b, target], [torch.tensor(1.5)], torch.float32)
    (call,) = fastllm.explain(ours, x, w, b, target).calls
    assert call.backend == "reference" and "probabilities" in call.reason
    stacked = fastllm.linear_cross_entropy(x.view(2, 3, 4), w, target.view(2, 3, 9), linear_bias=b)
    assert torch.equal(stacked, ours(x, w, b, target))
    with pytest.raises(ValueError, match=r"target must be \[2, 3, 9\]"):  # the classes are last, not after the batch
        fastllm.linear_cross_entropy(x.view(2, 3, 4), w, target.view(2, 9, 3), linear_bias=b)


@needs_extension
def test_targets_in_bytes():
    """uint8, which torch takes too; 255 may be what is ignored, -100 is none of them."""
    given = torch.randn(5, 8), torch.randn(300, 8)
    target = torch.tensor([0, 156, 255, 7, 255], dtype=torch.uint8)
    for ignore_index in (-100, 255):
        options = dict(ignore_index=ignore_index, return_token_accuracy=True)
        got, wanted = (fastllm.linear_cross_entropy(*given, t, **options) for t in (target, target.long()))
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
        with fastllm.backend("reference"):
            fastllm.linear_cross_entropy(*given, target, **options)


def test_autocast_multiplies_in_bf16_and_returns_fp32():
    x, w, _, target, _ = make(R - 1, 16, 40, "cpu")

    def under_autocast(function):
        def call(x, w):
            with torch.autocast("cpu", torch.bfloat16):
                return function(x, w)

        return call

    ours = lambda x, w: fastllm.linear_cross_entropy(x, w, target)  # noqa: E731
    theirs = lambda x, w: F.cross_entropy(F.linear(x, w), target)  # noqa: E731
    compare(under_autocast(ours), under_autocast(theirs), theirs, [x, w], [torch.tensor(1.5)], torch.float32)
    with torch.no_grad():
        in_fp32 = under_autocast(ours)(x, w)
        assert in_fp32.dtype == torch.float32 and in_fp32 != ours(x, w)
        assert in_fp32.bfloat16() == ours(x.bfloat16(), w.bfloat16())


def peak_bytes(function):
    """The most that torch's CPU allocator has given out inside `function` beyond what was there."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = function()
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    assert changes and kept is not None
    return max(itertools.accumulate(change for _, change in changes))


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_memory(reduction, dtype):
    """128 x V numbers beside inputs, outputs and gradients, for ten times as many rows; torch takes far more."""
    N, D, V = 10 * R, 16, 8000
    x, w, b, target, _ = make(N, D, V, "cpu")
    leaves = [t.to(dtype).requires_grad_() for t in (x, w, b)]
    grad = torch.ones(N if reduction == "none" else ())

    def step(f):
        loss = f(leaves[0], leaves[1], target, linear_bias=leaves[2], reduction=reduction)
        return torch.autograd.grad(loss, leaves, grad.to(loss.dtype))

    for f in (fastllm.linear_cross_entropy, reference.linear_cross_entropy):
        step(f)  # what is made once, on the first call
    size = dtype.itemsize
    packed = 0 if dtype == torch.float32 else V * (D + 8) * size  # oneDNN's copy of an operand, for each product anew
    gradients = (N * D + V * D) * size + 2 * V * 4  # the bias's in fp32, and then in dtype
    rows = N * 64 + 4096  # losses, log-sum-exps and the like
    assert peak_bytes(lambda: step(fastllm.linear_cross_entropy)) <= gradients + R * V * size + rows + packed
    assert peak_bytes(lambda: step(reference.linear_cross_entropy)) >= gradients + 2 * N * V * size


@needs_extension
def test_threads_do_not_change_the_result():
    """Of one call at a time; the products are torch's."""
    x, w, _, target, _ = make(3 * R, 16, 500, "cpu")
    first, second = (
        run(lambda x, w: fastllm.linear_cross_entropy(x, w, target), [x, w], [torch.tensor(1.0)]) for _ in "ab"
    )
    for a, b in zip(first[0] + first[1], second[0] + second[1], strict=True):
        assert torch.equal(a, b)


@needs_extension
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_gradcheck(reduction):
    x, w, b = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((4, 3), (5, 3), (5,)))
    target, weight = torch.tensor([1, -100, 4, 0]), torch.rand(5, dtype=torch.float64)
    options = dict(reduction=reduction, label_smoothing=0.2, softcap=3.0, z_loss=0.1)
    with fastllm.backend("cpu"):
        for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
            assert check(lambda x, w: fastllm.linear_cross_entropy(x, w, target, reduction=reduction), (x, w))
            assert check(
                lambda x, w, b: fastllm.linear_cross_entropy(x, w, target, linear_bias=b, weight=weight, **options),
                (x, w, b),
            )


@needs_extension
@pytest.mark.parametrize("reduction", [0, 1, 2])
def test_opcheck(reduction):
    x, w, b, target, weight = make(R + 2, 4, 9, "cpu", ignored=1)
    options = (-100, reduction, 0.1, 5.0, 0.1)
    total = ops.cross_entropy_total.dispatched(target, weight, 9, -100)
    torch.library.opcheck(ops.cross_entropy_total.dispatched, (target, weight, 9, -100))
    for dloss in (None, torch.tensor(1.0)):
        given = (x @ w.T, target, weight, total, dloss, -100, 0.1, 5.0, 0.1, True)
        torch.library.opcheck(ops.cross_entropy_rows.dispatched, given)
    loss = torch.ones(R + 2 if not reduction else ())
    for bias, wanted in ((None, [True, True, False]), (b, [True] * 3), (b, [False] * 3)):
        torch.library.opcheck(
            ops.linear_cross_entropy_fwd.dispatched, (x, w, bias, target, weight, None, *options, True, wanted)
        )
        torch.library.opcheck(
            ops.linear_cross_entropy_bwd.dispatched, (loss, x, w, bias, target, weight, *options, wanted)
        )


@needs_extension
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_compiles_whole(reduction):
    x, w, b, target, weight = make(R + 2, 6, 40, "cpu", ignored=1)
    leaves = [t.requires_grad_() for t in (x, w, b)]
    options = dict(weight=weight, reduction=reduction, label_smoothing=0.1, return_token_accuracy=True)

    def call(x, w, b):
        return fastllm.linear_cross_entropy(x, w, target, linear_bias=b, **options)

    def step(f):
        loss, accuracy = f(*leaves)
        return *torch.autograd.grad(2 * loss.sum(), leaves), loss, accuracy

    for a, b in zip(step(call), step(torch.compile(call, fullgraph=True)), strict=True):
        assert torch.equal(a, b)
