"""torch.func and forward-mode differentiation of the ops, for which no kernel has a rule: never a tangent of 0."""

import pytest
import torch
from torch.autograd import forward_ad

import fastllm
from fastllm import dispatch

BOUNDS = torch.tensor([0, 2, 5], dtype=torch.int32)
LABELS = torch.tensor([1, -100, 3])


def varlen(q, k, v):
    return fastllm.attention_varlen(q, k, v, cu_seqlens_q=BOUNDS, cu_seqlens_k=BOUNDS, causal=True)


OPS = {  # a function, and the shapes of what it is differentiated by
    "attention": (lambda q, k, v, b: fastllm.attention(q, k, v, causal=True, bias=b), [(2, 4, 5, 8)] * 3 + [(5, 5)]),
    "attention_varlen": (varlen, [(5, 4, 8), (5, 2, 8), (5, 2, 8)]),
    "bias_gelu": (fastllm.bias_gelu, [(3, 8), (8,)]),
    "cross_entropy": (lambda x: fastllm.cross_entropy(x, LABELS, label_smoothing=0.1), [(3, 8)]),
    "geglu": (fastllm.geglu, [(3, 8)]),
    "layer_norm": (fastllm.layer_norm, [(3, 8), (8,), (8,)]),
    "linear": (lambda x, w, b: fastllm.linear(x, w, b, activation="silu"), [(3, 8), (5, 8), (5,)]),
    "linear_cross_entropy": (lambda x, w: fastllm.linear_cross_entropy(x, w, LABELS), [(3, 8), (5, 8)]),
    "log_softmax": (fastllm.log_softmax, [(3, 8)]),
    "lora_linear": (fastllm.lora_linear, [(3, 8), (5, 8), (2, 8), (5, 2)]),
    "rms_norm": (lambda x, w, r: sum(fastllm.rms_norm(x, w, residual=r)), [(3, 8), (8,), (3, 8)]),
    "rope": (lambda q: fastllm.rope(q, None, torch.full((5, 4), 0.3), torch.ones(5, 4))[0], [(1, 2, 5, 8)]),
    "softmax": (lambda x: fastllm.softmax(x, scale=0.3, causal=True), [(8, 8)]),
    "swiglu": (fastllm.swiglu, [(3, 8), (3, 8)]),
}


@pytest.mark.parametrize("op", OPS)
def test_func_and_forward_mode(op):
    function, shapes = OPS[op]
    torch.manual_seed(0)
    given = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    tangents = tuple(torch.randn_like(x) for x in given)
    y = function(*given)
    dy = torch.randn_like(y)
    gradients = torch.autograd.grad(y, given, dy)
    plain = tuple(x.detach() for x in given)
    value, tangent = torch.func.jvp(function, plain, tangents)
    torch.testing.assert_close(value, y)
    along = sum((g * t).sum() for g, t in zip(gradients, tangents, strict=True))
    torch.testing.assert_close((tangent * dy).sum(), along)
    with forward_ad.dual_level():
        dual = function(*map(forward_ad.make_dual, plain, tangents))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, tangent)
    found = torch.func.grad(lambda *x: (function(*x) * dy).sum(), argnums=tuple(range(len(plain))))(*plain)
    torch.testing.assert_close(found, gradients)
    batch = torch.func.vmap(function)(*(torch.stack([x, 2 * x]) for x in plain))
    torch.testing.assert_close(batch, torch.stack([y, function(*(2 * x for x in given))]))


def test_the_reason_is_told():
    x = torch.randn(3, 8)
    (call,) = fastllm.explain(torch.func.grad(lambda x: fastllm.rms_norm(x).sum()), x).calls
    assert call.backend == "reference" and "torch.func" in call.reason
    with (
        dispatch.backend("cpu"),
        pytest.raises(RuntimeError, match=r"rms_norm: backend 'cpu' was forced, but torch.func"),
    ):
        torch.func.vmap(fastllm.rms_norm)(x)
