"""What accelerate says it did, and what it is told to do."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch_models import Block, D, H, T

import fastllm
import fastllm.nn


def test_report_is_a_table():
    model = nn.Sequential(Block(), Block(), nn.LayerNorm(D))
    report = fastllm.accelerate(model)
    model(torch.randn(1, T, D))
    model(torch.randn(1, T, D))
    header, *lines = str(report).splitlines()
    assert header.split()[:6] == ["modules", "class", "number", "kind", "runs", "calls"]
    rows = [line.split() for line in lines]
    assert ["*", "Block", "2", "attention"] == rows[0][:4] and "4" in rows[0]
    assert ["*.norm", "LayerNorm", "2", "norms", "layer_norm", "4", "-"] in rows
    assert ["*", "LayerNorm", "1", "norms", "layer_norm", "2", "-"] in rows
    assert str(fastllm.accelerate(nn.Embedding(2, 2))) == "nothing to accelerate was found"


def test_report_tells_what_no_call_reached():
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(D)

        def forward(self, x):
            return F.layer_norm(x, (D,), self.norm.weight, self.norm.bias)

    model = Around()
    report = fastllm.accelerate(model)
    model(torch.randn(2, D))
    assert [row.name for row in report.never_called] == ["norm"]


def test_kinds_are_chosen():
    model = nn.Sequential(Block(), nn.MultiheadAttention(D, H))
    assert {row.kind for row in fastllm.accelerate(model, norms=False).rows} == {"attention", "linear"}
    assert {row.kind for row in fastllm.accelerate(model, attention=False, linear=False).rows} == {"norms"}
    with pytest.raises(TypeError, match="atention"):
        fastllm.accelerate(model, atention=False)


def test_strict_changes_nothing_where_it_refuses():
    class Own(nn.LayerNorm):
        def forward(self, x):
            return x

    model = nn.Sequential(nn.LayerNorm(D), Own(D))
    before = [type(m) for m in model.modules()]
    with pytest.raises(RuntimeError, match="a forward of its own"):
        fastllm.accelerate(model, strict=True)
    assert [type(m) for m in model.modules()] == before
    fastllm.accelerate(model[:1], strict=True)
