"""The plain calls of ops, differentiated by nodes in C++ (csrc/autograd.cpp) where the library fits this PyTorch."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fastllm
from fastllm import dispatch

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
def test_the_bits_are_those_of_the_function_in_python(case, dtype, monkeypatch):
    function, given = case
    found = []
    for nodes in (True, False):
        monkeypatch.setattr(dispatch, "has_nodes", nodes)
        fresh = [x.detach().to(dtype).requires_grad_() for x in given]
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


def test_another_pytorch_has_none(monkeypatch):
    monkeypatch.setattr(dispatch, "build_info", lambda: {"autograd": {"built": True, "torch": "0.0"}})
    assert dispatch._load_nodes() == "built beside PyTorch 0.0"
