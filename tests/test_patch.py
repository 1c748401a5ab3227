"""accelerate on plain PyTorch models: attention, norms and linear layers, and what is left alone."""

import copy

import pytest
import torch
import torch.nn.functional as F
from check import assert_as_accurate
from torch import nn
from torch_models import Block, D, H, T, WrittenNorm, check, ops, padding

import fastllm
import fastllm.nn

CAUSAL = torch.ones(T, T, dtype=torch.bool).triu(1)  # True: not allowed
MHA = {
    "plain": ({}, {}),
    "not batch first": (dict(batch_first=False), {}),
    "other sizes": (dict(kdim=20, vdim=12), {}),
    "no bias": (dict(bias=False), {}),
    "padding": ({}, dict(key_padding_mask=padding())),
    "mask": ({}, dict(attn_mask=CAUSAL)),
    "additive": ({}, dict(attn_mask=torch.randn(T, T), key_padding_mask=padding().float() * -9)),
    "mask per head": ({}, dict(attn_mask=torch.randn(2 * H, T, T) > 2)),
    "both masks": ({}, dict(attn_mask=CAUSAL, key_padding_mask=padding())),
    "causal": ({}, dict(attn_mask=CAUSAL, is_causal=True)),
    "causal and padding": ({}, dict(attn_mask=CAUSAL, is_causal=True, key_padding_mask=padding())),
}


@pytest.mark.parametrize("case", MHA)
def test_multihead_attention(case):
    options, given = MHA[case]
    module = nn.MultiheadAttention(D, H, **{"batch_first": True, **options})
    q, k, v = torch.randn(2, T, D), torch.randn(2, T, module.kdim), torch.randn(2, T, module.vdim)
    if not module.batch_first:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    report = check(module, q, k, v, need_weights=False, **given)
    assert [row.runs for row in report.rows] == ["attention", "linear"] and not report.never_called
    assert ops(module, q, k, v, need_weights=False, **given) == {"attention"}


def test_multihead_attention_of_one_tensor():
    """Self-attention, where the three projections are one, and a sequence that is no batch."""

    class Self(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.MultiheadAttention(D, H)

        def forward(self, x):
            return self.inner(x, x, x, need_weights=False)[0]

    check(Self(), torch.randn(T, D))


def test_multihead_attention_gives_its_weights():
    """What has no kernel is what it was: the weights, averaged over the heads."""
    module, x = nn.MultiheadAttention(D, H, batch_first=True), torch.randn(2, T, D)
    expected = module(x, x, x)
    fastllm.accelerate(module)
    for a, b in zip(module(x, x, x), expected):
        assert torch.equal(a, b)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_transformer_encoder(training, norm_first):
    layer = nn.TransformerEncoderLayer(D, H, 48, 0.0, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, nn.LayerNorm(D), enable_nested_tensor=not norm_first).train(training)
    for p in model.parameters():
        nn.init.normal_(p, 0.1, 0.2)
    x = torch.randn(2, T, D)
    report = check(model, x, src_key_padding_mask=padding(), kept=~padding())
    assert not report.never_called and {row.kind for row in report.rows} == {"attention", "norms", "linear"}
    with torch.no_grad():  # where PyTorch takes a road around its modules
        assert ops(model, x, src_key_padding_mask=padding()) == {"attention", "layer_norm"}
        got = model(x, src_key_padding_mask=padding())
        fastllm.restore(model)
        torch.testing.assert_close(got[~padding()], model(x, src_key_padding_mask=padding())[~padding()])
        assert not ops(model, x, src_key_padding_mask=padding())


def test_transformer_decoder():
    layer = nn.TransformerDecoderLayer(D, H, 48, 0.0, batch_first=True)
    model = nn.TransformerDecoder(layer, 2)
    report = check(model, torch.randn(2, T, D), torch.randn(2, 5, D), tgt_mask=CAUSAL, tgt_is_causal=True)
    assert len([row for row in report.rows if row.kind == "attention" and row.calls]) == 4


@pytest.mark.parametrize("through_helper", [False, True])
def test_modules_that_call_sdpa(through_helper):
    model = nn.Sequential(Block(through_helper), Block(through_helper))
    report = check(model, torch.randn(2, T, D))
    assert ops(model, torch.randn(2, T, D)) == {"attention", "layer_norm"}
    assert not report.never_called and len(report.rows) == 4 + 2 * 2
    q = torch.randn(1, 2, 3, 4)
    assert not ops(F.scaled_dot_product_attention, q, q, q), "outside the model it is PyTorch's"


@pytest.mark.parametrize("weights, activations", [(a, b) for a in ("float", "bfloat16") for b in ("float", "bfloat16")])
@pytest.mark.parametrize("order, offset", [("llama", 0.0), ("gemma", 1.0), ("gemma", 0.0), ("t5", 0.0)])
def test_a_written_norm_is_recognised(order, offset, weights, activations):
    """By what it gives on a probe; the dtype of its result stays, also after a later change of its weights' dtype."""
    weights, activations = getattr(torch, weights), getattr(torch, activations)
    module = WrittenNorm(order=order, offset=offset)
    generator = torch.get_rng_state()
    (row,) = fastllm.accelerate(module).rows
    assert row.runs == ("rms_norm, 1 + weight" if offset else "rms_norm")
    assert torch.equal(torch.get_rng_state(), generator)
    module.to(weights)
    x = torch.randn(3, D).to(activations)
    got = module(x)
    assert row.calls == 1 and ops(module, x) == {"rms_norm"}
    fastllm.restore(module)
    expected, exact = module(x), copy.deepcopy(module).double()
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + module.eps).sqrt() * (offset + exact.weight)
    assert_as_accurate(got, expected, exact)


def test_what_is_no_norm_is_left_alone():
    class Gated(WrittenNorm):
        def forward(self, x, gate):
            return super().forward(x) * gate

    class MayBeGated(WrittenNorm):  # Mamba 2's
        def forward(self, x, gate=None):
            return super().forward(x if gate is None else x * F.silu(gate))

    class Broken(WrittenNorm):
        def forward(self, x):
            raise NotImplementedError("on this device")

    class Own(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x) * 2

    model = nn.ModuleDict(
        dict(sigmoid=WrittenNorm(order="?"), gated=Gated(), broken=Broken(), own=Own(D), batch=nn.BatchNorm1d(D))
    )
    model["gate"] = MayBeGated()
    reasons = {row.name: row.reason for row in fastllm.accelerate(model).left_alone}
    assert reasons == {
        "sigmoid": "its forward is neither layer norm nor RMS norm",
        "gated": "its forward takes more than one tensor",
        "gate": "its forward takes more than one tensor",
        "broken": "its forward could not be tried: on this device",
        "own": "its class has a forward of its own",
    }
    x = torch.randn(3, D)
    assert torch.equal(model["own"](x), F.layer_norm(x, (D,), model["own"].weight, model["own"].bias) * 2)


def test_arguments_by_name():
    model = nn.ModuleDict(dict(layer=nn.LayerNorm(D), rms=nn.RMSNorm(D), linear=nn.Linear(D, 3), written=WrittenNorm()))
    calls = dict(layer="input", rms="x", linear="input", written="x")
    x = torch.randn(2, D)
    expected = {name: model[name](**{argument: x}) for name, argument in calls.items()}
    fastllm.accelerate(model)
    for name, argument in calls.items():
        torch.testing.assert_close(model[name](**{argument: x}), expected[name])


def test_weights_without_memory_are_left_alone():
    (row,) = fastllm.accelerate(WrittenNorm().to("meta")).rows
    assert "could not be tried" in row.reason


def test_a_subclass_without_its_own_forward_is_accelerated():
    class Named(nn.LayerNorm):
        pass

    model = Named(D)
    assert fastllm.accelerate(model).accelerated
    assert isinstance(model, Named) and type(model).__name__ == "Named"


def test_our_own_modules_need_nothing():
    assert not fastllm.accelerate(nn.Sequential(fastllm.nn.LayerNorm(D), fastllm.nn.RMSNorm(D))).rows


@pytest.mark.parametrize("shape", [(D,), (3, D)], ids=str)
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_torch_norms(norm, shape):
    report = check(norm(shape), torch.randn(5, 3, D))
    assert [row.runs for row in report.rows] == ["layer_norm" if norm is nn.LayerNorm else "rms_norm"]
    check(norm(shape, elementwise_affine=False), torch.randn(5, 3, D))


def test_linear_layers():
    """fastllm.linear decides by size and CPU whether the product is its own; layers of other classes keep theirs."""

    class Adapted(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    model = nn.Sequential(nn.Linear(D, 48), nn.Linear(48, D, bias=False), Adapted(D, D))
    report = check(model, torch.randn(5, D))
    assert [(row.name, row.runs, row.calls) for row in report.rows] == [("0", "linear", 1), ("1", "linear", 1)]
