"""Plain PyTorch models as people write them, and what is asked of them when they are accelerated."""

import copy

import torch
import torch.nn.functional as F
from check import assert_as_accurate
from torch import nn

import fastllm

D, H, T = 32, 4, 11


def padding():
    return torch.arange(T) >= torch.tensor([[T], [7]])  # True: ignored


def ops(function, *args, **kwargs):
    """The ops that ran, but for linear, which has a test of its own."""
    return {call.op for call in fastllm.explain(function, *args, **kwargs).calls} - {"linear"}


def check(model, *args, kept=None, **kwargs):
    """The accelerated model's outputs and gradients are the model's own, beside it against fp64."""

    def run(model, dtype):
        given = [x.detach().to(dtype).requires_grad_() if x.is_floating_point() else x for x in args]
        found = model.to(dtype)(*given, **kwargs)
        found = found[0] if isinstance(found, tuple) else found
        found = found if kept is None else found[kept]
        torch.manual_seed(1)
        found.backward(torch.randn(found.shape).to(dtype))
        gradients = [x.grad for x in given if x.requires_grad] + [p.grad for p in model.parameters()]
        return torch.cat([found.flatten(), *(g.flatten() for g in gradients if g is not None)]).detach()

    exact, peer = run(copy.deepcopy(model), torch.float64), run(copy.deepcopy(model), torch.float32)
    report = fastllm.accelerate(model)
    got = run(model, torch.float32)
    assert_as_accurate(got, peer, exact)
    return report


def helper(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class Block(nn.Module):
    """Attention as people write it, by the module or by a function beside it."""

    def __init__(self, through_helper=False):
        super().__init__()
        self.qkv, self.out, self.norm = nn.Linear(D, 3 * D), nn.Linear(D, D), nn.LayerNorm(D)
        self.through_helper = through_helper

    def attend(self, q, k, v):
        if self.through_helper:
            return helper(q, k, v)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).view(*x.shape[:2], 3, H, D // H).permute(2, 0, 3, 1, 4)
        return x + self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))


class WrittenNorm(nn.Module):
    """RMS norm, or what the tests make of it, as in transformers' models."""

    def __init__(self, size=D, offset=0.0, order="llama", eps=1e-3):
        super().__init__()
        self.weight, self.eps, self.offset, self.order = nn.Parameter(torch.randn(size)), eps, offset, order

    def forward(self, x):
        y = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        if self.order == "llama":
            return self.weight * y.to(x.dtype)
        if self.order == "gemma":
            return (y * (self.offset + self.weight.float())).to(x.dtype)
        if self.order == "t5":
            return self.weight * (y.to(self.weight.dtype) if self.weight.dtype in (torch.half, torch.bfloat16) else y)
        return y * self.weight.sigmoid()


class GatedMLP(nn.Module):
    """down(drop(act(gate(x)) * value(x))) in the ways that people write it."""

    def __init__(self, act=F.silu, packed=False, swapped=False, drop=None, hidden=48, bias=True):
        super().__init__()
        self.act = act
        self.w1 = nn.Linear(D, 2 * hidden if packed else hidden, bias)
        if not packed:
            self.w3 = nn.Linear(D, hidden, bias)
        self.w2 = nn.Linear(hidden, D, bias)
        if drop is not None:
            self.drop = nn.Dropout(0.5)
        self.packed, self.swapped, self.where = packed, swapped, drop

    def forward(self, x):
        gate, value = self.w1(x).chunk(2, -1) if self.packed else (self.w1(x), self.w3(x))
        gate, value = (value, gate) if self.swapped else (gate, value)
        y = self.act(gate) * value
        y = self.w2(self.drop(y) if self.where == "before" else y)
        return self.drop(y) if self.where == "after" else y
