"""cross_entropy: losses and gradients, each backend, against fp64 and beside PyTorch's own kernel."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from check import compare, run

import fastllm
from fastllm import dispatch, reference
from fastllm.ops import cross_entropy as ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BLOCK = 2048  # csrc/cpu/cross_entropy.inl
needs_extension = pytest.mark.skipif(dispatch.extension is None, reason="the C++ extension is not built")


def make(N, V, backend, ignored=0, scale=3.0):
    """Logits, targets of which the first `ignored` are -100, class weights."""
    x, target, weight = scale * torch.randn(N, V), torch.randint(V, (N,)), torch.rand(V) + 0.5
    target[:ignored] = -100
    return x.to(backend), target.to(backend), weight.to(backend)


def upstream(reduction, N, backend):
    return (torch.randn(N) if reduction == "none" else torch.tensor(-0.7)).to(backend)


def check(backend, x, target, dtype, *, softcap=0.0, z_loss=0.0, **options):
    """Beside torch's kernel where it has the options, else beside the reference in the same dtype."""
    ours = lambda x: fastllm.cross_entropy(x, target, softcap=softcap, z_loss=z_loss, **options)  # noqa: E731
    theirs = lambda x: F.cross_entropy(x, target, **options)  # noqa: E731
    truth = lambda x: reference.cross_entropy(x, target, softcap=softcap, z_loss=z_loss, **options)  # noqa: E731
    weight = options.get("weight")
    if not (softcap or z_loss or weight is not None):
        truth = theirs
    peer = truth if softcap or z_loss or (weight is not None and weight.dtype != dtype) else theirs
    compare(ours, peer, truth, [x], [upstream(options.get("reduction", "mean"), len(target), backend)], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", [1, 2, 15, 16, 17, 63, 65, 1000, BLOCK - 1, BLOCK, BLOCK + 1, 5000])
@pytest.mark.parametrize("N", [1, 5])
def test_sizes(backend, N, V, dtype):
    x, target, _ = make(N, V, backend)
    check(backend, x, target, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", [1, 2, 3, 8, 10, 16, 31, 32, 33, 63, 64])
@pytest.mark.parametrize("N", [8, 37])
def test_few_classes(backend, N, V, dtype):
    """Rows that share a vector on CPU."""
    x, target, _ = make(N, V, backend, ignored=2)
    check(backend, x, target, dtype)


@needs_extension
@pytest.mark.parametrize("options", [dict(), dict(softcap=3.0, label_smoothing=0.1)], ids=["plain", "options"])
@pytest.mark.parametrize("V", [2, 10, 40, 64])
def test_rows_of_few_classes_are_no_concern_of_their_neighbours(V, options):
    """The same bits wherever a row stands; an ignored one, whatever it holds, has a gradient of 0."""
    x, target, _ = make(23, V, "cpu")
    target[5], x[5] = -100, float("nan")

    def losses(rows):
        leaf = x[rows].requires_grad_()
        loss = fastllm.cross_entropy(leaf, target[rows], reduction="none", **options)
        return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]

    loss, dx = losses(slice(None))
    assert not dx[5].any() and loss[5] == 0 and loss.isfinite().all() and dx.isfinite().all()
    for rows in (slice(3, 4), slice(4, 7), slice(1, 18), slice(22, None)):
        assert all(map(torch.equal, losses(rows), (loss[rows], dx[rows])))


OPTIONS = {
    "weight": dict(weight=True),
    "ignore_index": dict(ignore_index=3),
    "none": dict(reduction="none"),
    "sum": dict(reduction="sum"),
    "label_smoothing": dict(label_smoothing=0.1),
    "softcap": dict(softcap=4.0),
    "z_loss": dict(z_loss=0.01),
}
PAIRS = [pair for pair in itertools.combinations(OPTIONS, 2) if pair != ("none", "sum")]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("names", [(name,) for name in OPTIONS] + PAIRS, ids=" ".join)
def test_options(backend, names, dtype):
    """Each option and each pair; the mean, and ignored rows, wherever these do not say otherwise."""
    options = {k: v for name in names for k, v in OPTIONS[name].items()}
    x, target, weight = make(9, 37, backend, ignored=2)
    target[4:6] = 3
    if options.get("ignore_index") == 3:
        target[:2] = 3
    if options.pop("weight", False):
        options["weight"] = weight
    check(backend, x, target, dtype, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_all_options_at_once(backend, reduction, dtype):
    x, target, weight = make(7, 2 * BLOCK + 3, backend, ignored=1)
    options = dict(weight=weight, reduction=reduction, label_smoothing=0.2, softcap=5.0, z_loss=0.003)
    check(backend, x, target, dtype, **options)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3, 1.0])
def test_half_precision_weights_are_torchs(backend, reduction, label_smoothing):
    """torch wants class weights in the dtype of the logits; ours may have either."""
    x, target, weight = make(6, 21, backend, ignored=2)
    weight = weight.bfloat16()
    options = dict(weight=weight, reduction=reduction, label_smoothing=label_smoothing)
    exact = lambda x: F.cross_entropy(x, target, **options | dict(weight=weight.double()))  # noqa: E731
    ours = lambda x: fastllm.cross_entropy(x, target, **options)  # noqa: E731
    theirs = lambda x: F.cross_entropy(x, target, **options)  # noqa: E731
    compare(ours, theirs, exact, [x], [upstream(reduction, 6, backend)], torch.bfloat16)


@pytest.mark.parametrize("offset", [0.0, 300.0, -1e4, 1e5])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_large_logits(backend, offset, label_smoothing):
    x, target, _ = make(5, 3000, backend, scale=20.0)
    check(backend, x + offset, target, torch.float32, label_smoothing=label_smoothing)


def test_logits_that_are_minus_infinity(backend):
    """A class that cannot be: probability 0 and gradient 0; as the target, and with smoothing, the loss is infinite."""
    x, target, _ = make(4, 40, backend)
    x[:, 5:20] = -torch.inf
    x[2, :39] = -torch.inf
    target[:] = torch.tensor([0, 30, 39, 39])
    for reduction in ("none", "mean", "sum"):
        check(backend, x, target, torch.float32, reduction=reduction)
    target[1] = 6
    for smoothing in (0.0, 0.1):
        (loss,), (dx,) = run(
            lambda x, s=smoothing: fastllm.cross_entropy(x, target, reduction="none", label_smoothing=s),
            [x],
            [torch.ones(4, device=backend)],
        )
        expected = F.cross_entropy(x, target, reduction="none", label_smoothing=smoothing)
        assert torch.equal(loss.isinf(), expected.isinf()) and dx.isfinite().all()
    nothing = torch.full((1, 3), -torch.inf, device=backend)
    assert fastllm.cross_entropy(nothing, torch.tensor([1], device=backend)).isnan()


@pytest.mark.parametrize("at", [0, 3, 40])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_is_not_lost(backend, value, at):
    x, target, _ = make(2, 41, backend)
    x[0, at] = value
    loss = fastllm.cross_entropy(x, target, reduction="none")
    assert loss[0].isnan() or (value == torch.inf and int(target[0]) != at)
    assert not loss[0].isfinite() and loss[1].isfinite()
    assert fastllm.cross_entropy(x, target).isnan()


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("N", [0, 3])
def test_all_targets_ignored_or_none_there(backend, N, reduction):
    """torch's answer: NaN for the mean, 0 for the sum; the gradient is 0, whatever the logits are."""
    x = torch.full((N, 5), torch.nan, device=backend)
    target = torch.full((N,), -100, device=backend)
    options = dict(reduction=reduction, label_smoothing=0.1, z_loss=0.1)
    grad = torch.ones((N,) if reduction == "none" else (), device=backend)
    (loss,), (dx,) = run(lambda x: fastllm.cross_entropy(x, target, **options), [x], [grad])
    expected = F.cross_entropy(torch.zeros_like(x), target, reduction=reduction)
    assert torch.equal(loss.isnan(), expected.isnan()) and torch.equal(loss.nan_to_num(), expected.nan_to_num())
    assert dx.shape == x.shape and (dx == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_token_accuracy(backend, dtype):
    x, target, _ = make(50, 8, backend, ignored=7)
    x = x.to(dtype)
    x[10:20] = x[10:20].round()  # equal logits: the first counts
    x[20] = torch.nan
    right = (x.argmax(-1) == target).float()
    right[20] = 0.0
    loss, accuracy = fastllm.cross_entropy(x, target, reduction="none", return_token_accuracy=True)
    assert torch.equal(accuracy, right) and accuracy.dtype == torch.float32
    assert torch.equal(loss.nan_to_num(), fastllm.cross_entropy(x, target, reduction="none").nan_to_num())
    for reduction in ("mean", "sum"):
        _, accuracy = fastllm.cross_entropy(x, target, reduction=reduction, return_token_accuracy=True)
        assert accuracy == right.sum() / 43
    x.requires_grad_()
    loss, accuracy = fastllm.cross_entropy(x, target, return_token_accuracy=True)
    assert loss.requires_grad and not accuracy.requires_grad


@pytest.mark.parametrize("shape", [(7,), (3, 7, 4), (2, 7, 3, 5)], ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_other_layouts(backend, shape, reduction):
    """[V] with one target, and [N, V, d1, ...] with the classes in the middle, as torch takes them."""
    without = shape[:1] + shape[2:] if len(shape) > 1 else ()
    x, target = torch.randn(shape).to(backend), torch.randint(7, without).to(backend)
    grad = torch.randn(without if reduction == "none" else ()).to(backend)
    options = dict(reduction=reduction, label_smoothing=0.1)
    theirs = lambda x: F.cross_entropy(x, target, **options)  # noqa: E731
    compare(lambda x: fastllm.cross_entropy(x, target, **options), theirs, theirs, [x], [grad], torch.float32)
    _, accuracy = fastllm.cross_entropy(x, target, **options, return_token_accuracy=True)
    right = (x.argmax(min(x.ndim - 1, 1)) == target).float()
    assert torch.equal(accuracy, right if reduction == "none" else right.mean())


@pytest.mark.parametrize("shape", [(7,), (3, 7), (3, 7, 4)], ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_probabilities_go_to_plain_pytorch(shape, reduction):
    x, target, weight = torch.randn(shape), torch.randn(shape).softmax(min(len(shape) - 1, 1)), torch.rand(7)
    grad = torch.randn(() if reduction != "none" else shape[:1] + shape[2:] if len(shape) > 1 else ())
    options = dict(reduction=reduction, label_smoothing=0.1)
    theirs = lambda x, t, w: F.cross_entropy(x, t, w, **options)  # noqa: E731
    ours = lambda x, t, w: fastllm.cross_entropy(x, t, w.detach(), **options)  # noqa: E731
    compare(ours, lambda x, t, w: theirs(x, t, w.detach()), theirs, [x, target, weight], None, torch.float32)
    compare(
        lambda x, t: ours(x, t, weight),
        lambda x, t: theirs(x, t, weight),
        lambda x, t: theirs(x, t, weight.double()),
        [x, target],
        [grad],
        torch.float32,
    )
    (call,) = fastllm.explain(fastllm.cross_entropy, x, target).calls
    assert call.backend == "reference" and "probabilities" in call.reason


def test_views_and_no_mutation(backend):
    x = torch.randn(2 * 33, 6).to(backend)[::2].T
    target = torch.randint(33, (12,)).to(backend)[::2]
    grad = torch.randn(1).to(backend).expand(6)
    before = x.clone(), target.clone(), grad.clone()
    theirs = lambda x: F.cross_entropy(x, target, reduction="none")  # noqa: E731
    ours = lambda x: fastllm.cross_entropy(x, target, reduction="none")  # noqa: E731
    compare(ours, theirs, theirs, [x], [grad], torch.float32)
    for tensor, copy in zip((x, target, grad), before, strict=True):
        assert torch.equal(tensor, copy)


def test_targets_in_bytes():
    """uint8, which torch takes too; 255 may be what is ignored, -100 is none of them."""
    given, target = [torch.randn(5, 300)], torch.tensor([0, 156, 255, 7, 255], dtype=torch.uint8)
    for ignore_index in (-100, 255):
        options = dict(ignore_index=ignore_index, return_token_accuracy=True)
        got, wanted = (fastllm.cross_entropy(*given, t, **options) for t in (target, target.long()))
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
        with fastllm.backend("reference"):
            fastllm.cross_entropy(*given, target, **options)


def test_backward_twice_gives_the_same(backend):
    x, target, _ = make(4, 50, backend)
    x.requires_grad_()
    loss = fastllm.cross_entropy(x, target)
    first = torch.autograd.grad(loss, x, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, x)[0])


@needs_extension
def test_autocast_computes_the_loss_in_fp32_as_torch_does():
    x, target, _ = make(4, 50, "cpu")
    with torch.autocast("cpu", torch.bfloat16):
        low = x.bfloat16().requires_grad_()
        loss, peer = fastllm.cross_entropy(low, target), F.cross_entropy(low, target)
    assert loss.dtype == peer.dtype == torch.float32
    assert torch.autograd.grad(loss, low)[0].dtype == torch.bfloat16


@needs_extension
def test_threads_do_not_change_the_result():
    x, target, weight = make(301, 700, "cpu", ignored=5)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        made = run(lambda x: fastllm.cross_entropy(x, target, weight, z_loss=0.1), [x], [torch.tensor(1.0)])
        results.append(made[0] + made[1])
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@needs_extension
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_gradcheck(reduction):
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    target, weight = torch.tensor([1, -100, 4, 0]), torch.rand(5, dtype=torch.float64)
    options = dict(reduction=reduction, label_smoothing=0.2, softcap=3.0, z_loss=0.1)
    with fastllm.backend("cpu"):
        for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
            assert check(lambda x: fastllm.cross_entropy(x, target, reduction=reduction), (x,))
            assert check(lambda x: fastllm.cross_entropy(x, target, weight, **options), (x,))


@needs_extension
@pytest.mark.parametrize("reduction", [0, 1, 2])
def test_opcheck(reduction):
    x, target, weight = make(4, 9, "cpu", ignored=1)
    for given, accuracy in ((None, False), (weight, True)):
        options = (-100, reduction, 0.1, 5.0, 0.1)
        torch.library.opcheck(ops.cross_entropy_fwd.dispatched, (x, target, given, *options, accuracy))
        loss, lse, _ = ops.cross_entropy_fwd.dispatched(x, target, given, *options, accuracy)
        torch.library.opcheck(ops.cross_entropy_bwd.dispatched, (loss, x, target, given, lse, *options))


@needs_extension
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_compiles_whole(reduction):
    x, target, weight = make(6, 40, "cpu", ignored=1)
    options = dict(reduction=reduction, label_smoothing=0.1, softcap=9.0, return_token_accuracy=True)

    def step(x):
        loss, accuracy = fastllm.cross_entropy(x, target, weight, **options)
        return torch.autograd.grad(loss.sum(), x)[0], loss, accuracy

    x.requires_grad_()
    eager = step(x)
    compiled = torch.compile(lambda x: fastllm.cross_entropy(x, target, weight, **options), fullgraph=True)
    loss, accuracy = compiled(x)
    for a, b in zip(eager, (torch.autograd.grad(loss.sum(), x)[0], loss, accuracy), strict=True):
        assert torch.equal(a, b)


@needs_extension
@pytest.mark.slow
def test_more_than_two_to_the_31_logits():
    """The last of 2^16 + 1 rows of 2^15 begins past 2^31; the rows before it are one row in memory."""
    V, rows = 2**15, 2**16 + 1
    x = torch.zeros(rows, V, dtype=torch.bfloat16)
    x[-1] = torch.randn(V)
    target = torch.zeros(rows, dtype=torch.int64)
    loss = fastllm.cross_entropy(x, target, reduction="none")
    assert torch.equal(loss[-1:], fastllm.cross_entropy(x[-1:].clone(), target[-1:], reduction="none"))
