"""torch.compile of calls that eager mode takes without a thought; the ops' own files compile them one by one."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch_models import D, WrittenNorm

import fastllm

TWICE = {  # the same tensor in two places, as where keys are the values, or one set of bounds is both
    "attention": lambda x: fastllm.attention(x, x, x),
    "attention_varlen": lambda x: varlen(x[0], torch.tensor([0, 2, 5], dtype=torch.int32)),
    "layer_norm": lambda x: fastllm.layer_norm(x, residual=x)[0],
    "rms_norm": lambda x: fastllm.rms_norm(x, residual=x)[0],
    "rope": lambda x: sum(fastllm.rope(x, x, torch.ones(2, 4), torch.ones(2, 4))),
    "swiglu": lambda x: fastllm.swiglu(x, x),
}


def varlen(x, bounds):
    return fastllm.attention_varlen(x, x, x, cu_seqlens_q=bounds, cu_seqlens_k=bounds)


@pytest.mark.parametrize("op", TWICE)
def test_one_tensor_in_two_places(op):
    found = []
    for compiled in (True, False):
        x = torch.linspace(-1, 1, 80).view(1, 5, 2, 8).requires_grad_()
        function = torch.compile(TWICE[op], backend="eager", fullgraph=True) if compiled else TWICE[op]
        y = function(x)
        y.square().sum().backward()
        found.append((y.detach(), x.grad))
    torch.testing.assert_close(*found)


class Norms(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.first, self.second = WrittenNorm(order="gemma", **options), WrittenNorm(order="gemma", **options)

    def forward(self, x):
        y = self.second(self.first(x))
        return F.scaled_dot_product_attention(x, y, y)


def test_models_whose_norms_differ_in_a_number():
    """Both run through one function of ours, in which Dynamo may take what differs for a variable."""
    x = torch.randn(1, 1, 3, D, requires_grad=True)
    torch._dynamo.reset()
    for offset in (0.0, 1.0):
        model = Norms(offset=offset)
        expected = model(x)
        fastllm.accelerate(model)
        torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), expected)
