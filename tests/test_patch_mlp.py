"""accelerate on MLPs: which forms are recognised, by trial, and when the kernel runs."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from check import assert_as_accurate
from torch import nn
from torch_models import D, GatedMLP, check, ops

import fastllm
from fastllm import mlp, trial

EXACT, TANH = F.gelu, functools.partial(F.gelu, approximate="tanh")
FORMS = {
    "two layers": ({}, "swiglu"),
    "one layer": (dict(packed=True), "swiglu"),
    "one layer, the value first": (dict(packed=True, swapped=True), "swiglu"),
    "the value first": (dict(swapped=True), "swiglu"),
    "no bias": (dict(bias=False), "swiglu"),
    "as wide as the stream": (dict(hidden=D), "swiglu"),
    "a module": (dict(act=nn.SiLU()), "swiglu"),
    "exact": (dict(act=EXACT), "geglu"),
    "tanh": (dict(act=TANH), "geglu, tanh"),
    "a module, tanh": (dict(act=nn.GELU("tanh"), packed=True), "geglu, tanh"),
}


@pytest.mark.usefixtures("every_size")
@pytest.mark.parametrize("form", FORMS)
def test_forms(form):
    options, runs = FORMS[form]
    report = check(GatedMLP(**options), torch.randn(2, 7, D))
    (row,) = [row for row in report.rows if row.kind == "mlp"]
    assert (row.runs, row.calls) == (runs, 1)
    module = GatedMLP(**options)
    fastllm.accelerate(module)
    assert ops(module, torch.randn(2, 7, D)) == {runs.partition(",")[0]}


@pytest.mark.usefixtures("every_size")
@pytest.mark.parametrize("where", ["before", "after"])
def test_dropout_stands_where_it_stood(where):
    """The same elements fall, by the same seed, and none in eval()."""
    module, x = GatedMLP(drop=where), torch.randn(3, D)
    for training in (True, False):
        fastllm.restore(module).train(training)
        torch.manual_seed(1)
        expected = module(x)
        assert [row.runs for row in fastllm.accelerate(module, linear=False).rows] == ["swiglu"]
        torch.manual_seed(1)
        got = module(x)
        torch.manual_seed(1)
        truth = copy.deepcopy(module).double()(x.double())
        assert_as_accurate(got, expected, truth)


def test_trials_draw_no_random_numbers():
    module = GatedMLP(drop="before")
    before = torch.get_rng_state()
    fastllm.accelerate(module)
    assert torch.equal(torch.get_rng_state(), before) and module.training


class Scaled(GatedMLP):
    def forward(self, x):
        return super().forward(x) * 2


class Functional(GatedMLP):
    """Its dropout is no layer."""

    def forward(self, x):
        return self.w2(F.dropout(F.silu(self.w1(x)) * self.w3(x), 0.5, self.training))


class Between(GatedMLP):
    def __init__(self, **options):
        super().__init__(**options)
        self.norm = nn.LayerNorm(48)

    def forward(self, x):
        return self.w2(self.norm(self.act(self.w1(x)) * self.w3(x)))


@pytest.mark.parametrize("other", [Scaled, Functional, Between, functools.partial(GatedMLP, act=F.relu)])
def test_other_forwards_stay(other):
    """What has an activation of the known ones, and another forward, is reported; the rest is no business of this."""
    module, x = other(), torch.randn(3, D)
    torch.manual_seed(2)
    expected = module(x)
    report = fastllm.accelerate(module, linear=False, norms=False)
    assert not report.accelerated
    torch.manual_seed(2)
    assert torch.equal(module(x), expected)
    (row,) = fastllm.accelerate(Scaled(act=nn.SiLU()), linear=False).rows
    assert row.reason == "its forward is not that of a gated MLP"


@pytest.mark.usefixtures("every_size")
def test_hooks_of_an_activation_are_called():
    module, seen = GatedMLP(act=nn.SiLU()), []
    fastllm.accelerate(module)
    handle = module.act.register_forward_hook(lambda *a: seen.append(1))
    assert not ops(module, torch.randn(3, D)) and seen == [1]
    handle.remove()
    assert ops(module, torch.randn(3, D)) == {"swiglu"} and seen == [1]
    assert ops(module, x=torch.randn(3, D)) == set(), "by keyword, as the module's own forward has it"


@pytest.mark.parametrize("act, runs", [(F.silu, "swiglu"), (TANH, "geglu"), (EXACT, "geglu")])
def test_small_calls_are_pytorchs(act, runs):
    """Where calling is what takes the time, and where PyTorch's activation is the faster one."""
    module = GatedMLP(act=act)
    fastllm.accelerate(module)
    least = next(a.least for a in mlp.ACTIVATIONS if trial.same(a.written(torch.ones(3)), act(torch.ones(3))))
    rows = -(-least // 48)
    assert ops(module, torch.randn(rows - 1, D)) == set() and ops(module, torch.randn(rows, D)) == {runs}
    low = ops(module.bfloat16(), torch.randn(rows, D).bfloat16())
    assert low == (set() if act is EXACT else {runs})


class NewGELU(nn.Module):
    """As minGPT has it."""

    def forward(self, x):
        return 0.5 * x * (1.0 + torch.tanh((2.0 / torch.pi) ** 0.5 * (x + 0.044715 * torch.pow(x, 3.0))))


@pytest.mark.usefixtures("every_size")
@pytest.mark.parametrize("act", [NewGELU, functools.partial(nn.GELU, "tanh")])
def test_gelu(act):
    report = check(nn.Sequential(nn.Linear(D, 48), act(), nn.Linear(48, D)), torch.randn(5, D))
    assert [row.runs for row in report.rows if row.kind == "mlp"] == ["gelu, tanh"]


def test_exact_and_other_gelus_are_left_to_pytorch():
    class QuickGELU(nn.Module):
        def forward(self, x):
            return x * torch.sigmoid(1.702 * x)

    assert not fastllm.accelerate(nn.Sequential(nn.GELU(), QuickGELU(), nn.ReLU())).rows
