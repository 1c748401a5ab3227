"""The plain calls of ops, differentiated by nodes in C++ (csrc/autograd.cpp) where the library fits this PyTorch."""

import contextlib
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from check import assert_as_accurate
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fastllm
from fastllm import dispatch, reference
from fastllm.ops import _tuned

LABELS = torch.tensor([1, -100, 3])
OPS = {  # a function, the shapes of what it is differentiated by, and the family whose node it has
    "attention": (
        lambda *x: fastllm.attention(*x, causal=True),
        [(2, 4, 5, 8), (2, 2, 5, 8), (2, 2, 5, 6)],
        "attention",
    ),
    "bias_gelu": (fastllm.bias_gelu, [(3, 8), (8,)], "bias_gelu"),
    "bias_gelu without bias": (lambda x: fastllm.bias_gelu(x, approximate="none"), [(3, 8)], "bias_gelu"),
    "cross_entropy": (lambda x: fastllm.cross_entropy(x, LABELS, label_smoothing=0.1), [(3, 8)], "cross_entropy"),
    "cross_entropy none": (lambda x: fastllm.cross_entropy(x, LABELS, reduction="none"), [(3, 8)], "cross_entropy"),
    "geglu": (fastllm.geglu, [(3, 8), (3, 8)], "geglu"),
    "layer_norm": (fastllm.layer_norm, [(3, 8), (8,), (8,)], "layer_norm"),
    "layer_norm without bias": (fastllm.layer_norm, [(3, 8), (8,)], "layer_norm"),
    "layer_norm bare": (fastllm.layer_norm, [(3, 8)], "layer_norm"),
    "linear": (torch.ops.fastllm.linear_plain, [(2, 3, 8), (5, 8), (5,)], "linear"),
    "linear without bias": (lambda x, w: torch.ops.fastllm.linear_plain(x, w, None), [(3, 8), (5, 8)], "linear"),
    "log_softmax": (fastllm.log_softmax, [(3, 8)], "softmax"),
    "rms_norm": (lambda x, w: fastllm.rms_norm(x, w, weight_offset=1.0), [(3, 8), (8,)], "rms_norm"),
    "softmax": (lambda x: fastllm.softmax(x, scale=0.3), [(3, 8)], "softmax"),
    "swiglu": (fastllm.swiglu, [(3, 8), (3, 8)], "swiglu"),
    "swiglu packed": (fastllm.swiglu, [(3, 8)], "swiglu"),
}
pytestmark = pytest.mark.skipif(not dispatch.has_nodes, reason="the nodes were not compiled for this PyTorch")


@pytest.fixture(params=OPS)
def case(request):
    """A function and fp64 inputs of it that want gradients."""
    function, shapes, family = OPS[request.param]
    torch.manual_seed(0)
    given = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert function(*given).grad_fn.name() == f"fastllm::{family}_bwd"
    return function, given


def test_first_and_second_gradients(case):
    function, given = case
    torch.autograd.gradcheck(function, given)
    torch.autograd.gradgradcheck(function, given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_bits_are_those_of_the_function_in_python(case, dtype, autocast, request):
    """What is recorded goes the long way, past the checks and to the Functions."""
    function, given = case
    if "linear" in request.node.name:
        pytest.skip("the op itself, which has no long way; below is the function")
    found = []
    for nodes in (True, False):
        fresh = [x.detach().to(dtype).requires_grad_() for x in given]
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
            contextlib.nullcontext() if nodes else dispatch.recording([]),
        ):
            y = function(*fresh)
        assert y.grad_fn.name().startswith("fastllm::") is nodes or y.grad_fn.name().startswith("To")
        found.append([y, *torch.autograd.grad(y, fresh, torch.ones_like(y))])
    for node, python in zip(*found, strict=True):
        assert node.dtype == python.dtype
        assert torch.equal(node, python)


def test_only_what_is_asked_for_is_given(case):
    function, given = case
    for x in given:
        for other in given:
            other.requires_grad_(other is x)
        y = function(*given)
        y.backward(torch.ones_like(y))
        assert [other.grad is not None for other in given] == [other is x for other in given]
        x.grad = None
    with torch.no_grad():
        assert function(*given).grad_fn is None
    with torch.inference_mode():
        assert function(*given).is_inference()


def test_what_was_saved_is_given_back(case):
    function, given = case
    y = function(*given)
    y.sum().backward(retain_graph=True)
    y.sum().backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.sum().backward()


def test_hooks_and_checkpoints(case):
    function, given = case
    expected = torch.autograd.grad(function(*given).sum(), given)
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: packed.append(x) or x.clone(), lambda x: x):
        y = function(*given)
    seen = []
    y.register_hook(lambda dy: seen.append("tensor"))
    y.grad_fn.register_hook(lambda dx, dy: seen.append("node"))
    assert packed
    for found in (
        torch.autograd.grad(y.sum(), given),
        torch.autograd.grad(checkpoint(function, *given, use_reentrant=False).sum(), given),
    ):
        assert all(map(torch.equal, found, expected))
    assert seen == ["tensor", "node"]


OPTIONLESS = OPS | {
    "linear": (fastllm.linear, [(3, 8), (5, 8), (5,)], None),
    "linear_cross_entropy": (
        lambda x, w, b: fastllm.linear_cross_entropy(x, w, LABELS, linear_bias=b),
        [(3, 8), (5, 8), (5,)],
        None,
    ),
}
ELSEWHERE = {
    "recorded": lambda: dispatch.recording([]),
    "a mode": lambda: FlopCounterMode(display=False),
    "forced": lambda: fastllm.backend("cpu"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("elsewhere", ELSEWHERE)
@pytest.mark.parametrize("name", OPTIONLESS)
def test_a_checkpoint_is_made_again_where_calls_go_the_long_way(name, elsewhere, dtype):
    """And the other way round: both passes have to save the same tensors."""
    if name == "linear" and elsewhere == "forced":
        pytest.skip("another product is chosen, PyTorch's or ours, each of which saves what it needs")
    function, shapes, _ = OPTIONLESS[name]
    torch.manual_seed(0)
    given = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
    expected = torch.autograd.grad(function(*given).sum(), given)
    exact = [x.detach().double().requires_grad_() for x in given]
    truth = torch.autograd.grad(function(*exact).sum(), exact)
    for forward, backward in ((elsewhere, None), (None, elsewhere)):
        with ELSEWHERE.get(forward, contextlib.nullcontext)():
            total = checkpoint(function, *given, use_reentrant=False).sum()
        with ELSEWHERE.get(backward, contextlib.nullcontext)():
            found = torch.autograd.grad(total, given)
        for result in zip(found, expected, truth, strict=True):  # of another product where one is forced
            assert_as_accurate(*result)


def test_an_input_that_was_written_to_is_noticed():
    x = torch.randn(3, 8, requires_grad=True)
    h = x * 1
    y = fastllm.layer_norm(h)
    h.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_upstream_gradients_of_any_strides(case):
    function, given = case
    y = function(*given)
    wide = torch.randn(*y.shape, 2, dtype=torch.float64)
    found = torch.autograd.grad(y, given, wide[..., 0], retain_graph=True)
    expected = torch.autograd.grad(y, given, wide[..., 0].contiguous())
    assert all(map(torch.equal, found, expected))


def test_compiled_autograd(case):
    function, given = case
    expected = torch.autograd.grad(function(*given).sum(), given)
    torch._dynamo.reset()
    y = function(*given).sum()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        y.backward()
    assert all(torch.equal(x.grad, dx) for x, dx in zip(given, expected, strict=True))


class Labelled(torch.Tensor):
    pass


def test_a_kernel_is_called_at_once_on_plain_tensors_alone():
    layer_norm = dispatch.direct("layer_norm")
    x, w = torch.randn(2, 3), torch.nn.Parameter(torch.randn(3))

    def is_direct(*given):
        return layer_norm(*given, None, 1e-5) is not None

    assert is_direct(x, w) and is_direct(x.T.contiguous().T, None) and is_direct(x.double(), w)
    for context in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu")):
        with context:
            assert is_direct(x, w)
    with torch.inference_mode():
        assert is_direct(torch.randn(2, 3), w)
    fake = FakeTensorMode()
    odd = [1.0], None, x.to("meta"), x.to_sparse(), x.as_subclass(Labelled), fake.from_tensor(x), x.cfloat().conj().imag
    assert not any(is_direct(given, w) or is_direct(x, given) for given in odd if given is not None)
    assert not is_direct(None, w)
    assert not is_direct(x.int(), w) and not is_direct(x, w[:2]) and not is_direct(x[..., :0], None)
    for wrong in ((), (x, w), (x, w, None, "1e-5"), (x, w, None, 1e-5, None), (x, w, None, None), (x, w, None, 2**64)):
        assert layer_norm(*wrong) is None
    for mode in (fake, TorchFunctionMode(), TorchDispatchMode(), forward_ad.dual_level()):
        with mode:
            assert not is_direct(x, w)
    seen = []
    torch.func.vmap(lambda row: seen.append(is_direct(row, None)) or row)(x)
    torch.func.grad(lambda x: seen.append(is_direct(x, None)) or x.sum())(x)
    assert seen == [False, False]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        assert not is_direct(x, w)
    assert is_direct(x, w)


def test_calls_are_at_once_where_nothing_looks():
    assert dispatch.is_free()
    with dispatch.recording([]):
        assert not dispatch.is_free()
    with fastllm.backend("reference"):
        assert not dispatch.is_free()
    assert torch.compile(lambda x: x + dispatch.is_free(), backend="eager", fullgraph=True)(torch.zeros(())) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_small_products_are_pytorchs_at_once(dtype):
    x, w, b = (torch.randn(shape, dtype=dtype, requires_grad=True) for shape in ((2, 3, 5), (7, 5), (7,)))
    target = torch.tensor([[0, 6, -100], [1, 1, 2]])
    linear, loss = dispatch.direct("linear"), dispatch.direct("linear_cross_entropy")
    assert torch.equal(linear(x, w, b, -1, 0), F.linear(x, w, b))
    assert linear(x, w, b, -1, 0).grad_fn.name() == F.linear(x, w, b).grad_fn.name()
    assert linear(x, w, b, 1, 0).grad_fn.name() == "fastllm::bias_gelu_bwd"
    assert loss(x, w, target, b, -100, 1, 0.0, 0).grad_fn.name() == "fastllm::cross_entropy_bwd"
    refused = [
        (x, w.half(), b),
        (x.half(), w.half(), b.half()),
        (x, w[:, :4], None),
        (x, w[0], None),
        (x, w, b[:3]),
        (x, w, w),
        (x.long(), w.long(), None),
        (x[0, 0, 0], w, None),
    ]
    for given in refused:
        assert linear(*given, -1, 0) is None
        assert loss(*given[:2], target, given[2], -100, 1, 0.0, 0) is None
    for given in ((x, w, target[0], b), (x, w, target.int(), b), (x, w, target.T, b), (x, w[:0], target, None)):
        assert loss(*given, -100, 1, 0.0, 0) is None
    assert loss(x, w, target, b, -100, 0, 0.0, 0) is None  # a loss for each row of another shape
    assert loss(x, w, target, b, -100, 1, 1.5, 0) is None and loss(x, w, target + 7, b, -100, 1, 0.0, 0) is None
    many = torch.zeros(2**20 // 6 + 1, 5, dtype=dtype)
    assert loss(x, many, target, None, -100, 1, 0.0, 0) is None and loss(x, many[1:], target, None, -100, 1, 0.0, 0)
    with torch.autocast("cpu"):
        assert linear(x, w, b, -1, 0) is None and loss(x, w, target, b, -100, 1, 0.0, 0) is None


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("whose", range(8))
@pytest.mark.parametrize("activation", [None, "relu", "gelu", "gelu_tanh", "silu"])
def test_products_are_chosen_one_by_one_and_remembered(activation, whose, bias):
    """Ours forward, dx and dweight as bits; forward, backward, and what can be differentiated again."""
    number = -1 if activation is None else ["relu", "gelu", "gelu_tanh", "silu"].index(activation)
    asked, linear = [], dispatch.direct("linear")
    torch.manual_seed(0)
    dispatch.direct("choose")(lambda *size: (asked.append(size), whose)[1])
    try:
        given = [(torch.randn(shape) * 0.1).requires_grad_() for shape in ((2, 61, 520), (70, 520), (70,))]
        given, dy = given[:2] + [given[2] if bias else None], torch.randn(2, 61, 70)
        plain = partial(reference.linear, activation=activation)
        truth = [None if t is None else t.detach().double().requires_grad_() for t in given]
        found = []
        for arguments, run in ((given, lambda *of: linear(*of, number, 0)), (given, plain), (truth, plain)):
            leaves = [t for t in arguments if t is not None]
            y, again = run(*arguments), run(*arguments)
            assert y is not None
            first = torch.autograd.grad(y, leaves, dy.to(y.dtype), create_graph=True)
            second = torch.autograd.grad(first[0].square().sum(), leaves[1])
            found.append([y, *torch.autograd.grad(again, leaves, dy.to(y.dtype)), *first, *second])
            alone = [t if i == whose % len(leaves) else t.detach() for i, t in enumerate(leaves)]
            y = run(*alone, *(() if bias else (None,)))
            found[-1] += torch.autograd.grad(y, alone[whose % len(leaves)], dy.to(y.dtype))
        for i, (got, peer, expected) in enumerate(zip(*found, strict=True)):
            assert_as_accurate(got, peer, expected, f"result {i}")
        with torch.no_grad():
            assert torch.equal(linear(*given, number, 0), found[0][0])
        assert asked == [(122, 70, 520)]
    finally:
        _tuned.forget()


@pytest.mark.parametrize("at_once", [True, False], ids=["at once", "the long way"])
def test_a_product_may_be_modified_in_place(at_once, monkeypatch):
    """Where PyTorch's forward product stands beside our gradients, and x has three dimensions."""
    monkeypatch.setattr(_tuned, "linear_kernels", lambda *size: (False, True, True))
    _tuned.forget()
    try:
        x, w, b = ((torch.randn(shape) * 0.1).requires_grad_() for shape in ((2, 61, 520), (70, 520), (70,)))
        with contextlib.nullcontext() if at_once else dispatch.recording([]):
            y = fastllm.linear(x, w, b)
        y += 1
        y.relu_().sum().backward()
        assert x.grad is not None and torch.equal(y, (F.linear(x, w, b) + 1).relu())
    finally:
        monkeypatch.undo()
        _tuned.forget()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype, bit", [(torch.bfloat16, 1), (torch.float16, 2)], ids=str)
def test_products_that_are_always_ours_are_made_at_once(dtype, bit, autocast, monkeypatch):
    """With the bits of the long way, forward and backward."""
    monkeypatch.setattr(_tuned, "unmeasured", lambda dtype: True)
    monkeypatch.setattr(_tuned, "_linear_kernels", lambda *size: (True,) * 3)
    monkeypatch.setattr(_tuned, "_remembered", lambda *size: (True,) * 3)
    monkeypatch.setattr(_tuned, "ALWAYS_OWN", bit)
    _tuned._fewest_rows.cache_clear()
    found = []
    for x_wants, w_wants in ((True, True), (False, True), (True, False)):
        for at_once in (True, False):
            torch.manual_seed(0)
            x, w, b = torch.randn(2, 7, 3), torch.randn(5, 7), torch.randn(10)
            x, w, b = (t if autocast else t.to(dtype) for t in (x, w, b))
            leaves = x.requires_grad_(x_wants), w.requires_grad_(w_wants), b.requires_grad_(w_wants)
            with (
                torch.autocast("cpu", dtype, enabled=autocast),
                contextlib.nullcontext() if at_once else dispatch.recording([]) as calls,
            ):
                y = fastllm.linear(x.mT, w, b[::2])
            assert (y.grad_fn.name() == "fastllm::linear_bwd") is at_once
            assert at_once or [call.backend for call in calls] == ["cpu"]
            wanted = [leaf for leaf in leaves if leaf.requires_grad]
            found.append([y, *torch.autograd.grad(y, wanted, torch.randn(y.shape).to(y.dtype))])
    _tuned._fewest_rows.cache_clear()
    for ours, long_way in zip(found[::2], found[1::2], strict=True):
        assert all(map(torch.equal, ours, long_way))


def test_an_error_of_a_hook_is_the_callers():
    def pack(x):
        raise KeyError("of the hook")

    x = torch.randn(3, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, pack), pytest.raises(KeyError, match="of the hook"):
        fastllm.layer_norm(x)


def test_another_pytorch_has_none(monkeypatch):
    monkeypatch.setattr(dispatch, "build_info", lambda: {"autograd": {"built": True, "torch": "0.0"}})
    assert dispatch._load_nodes() == "built beside PyTorch 0.0"
    monkeypatch.setattr(dispatch, "has_nodes", False)
    assert dispatch.direct("layer_norm")(torch.randn(2, 3), None, None, 1e-5) is None
