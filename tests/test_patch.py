"""accelerate, restore and the report, on plain PyTorch models and in the wrong hands."""

import copy
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from check import assert_as_accurate
from torch import nn

import fastllm
import fastllm.nn

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
    assert_as_accurate(got.half(), peer.half(), exact)
    return report


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


@pytest.mark.parametrize("through_helper", [False, True])
def test_modules_that_call_sdpa(through_helper):
    model = nn.Sequential(Block(through_helper), Block(through_helper))
    report = check(model, torch.randn(2, T, D))
    assert ops(model, torch.randn(2, T, D)) == {"attention", "layer_norm"}
    assert not report.never_called and len(report.rows) == 4 + 2 * 2
    q = torch.randn(1, 2, 3, 4)
    assert not ops(F.scaled_dot_product_attention, q, q, q), "outside the model it is PyTorch's"


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

    class Broken(WrittenNorm):
        def forward(self, x):
            raise NotImplementedError("on this device")

    class Own(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x) * 2

    model = nn.ModuleDict(
        dict(sigmoid=WrittenNorm(order="?"), gated=Gated(), broken=Broken(), own=Own(D), batch=nn.BatchNorm1d(D))
    )
    reasons = {row.name: row.reason for row in fastllm.accelerate(model).left_alone}
    assert reasons == {
        "sigmoid": "its forward is neither layer norm nor RMS norm",
        "gated": "its forward takes more than one tensor",
        "broken": "its forward could not be tried: on this device",
        "own": "its class has a forward of its own",
    }
    x = torch.randn(3, D)
    assert torch.equal(model["own"](x), F.layer_norm(x, (D,), model["own"].weight, model["own"].bias) * 2)


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


# --- the report ---


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


# --- in the wrong hands ---


def test_twice_and_back_twice():
    model, x = nn.Sequential(Block(), nn.LayerNorm(D)), torch.randn(2, T, D)
    before, expected = [type(m) for m in model.modules()], model(x)
    fastllm.accelerate(model)
    report = fastllm.accelerate(model)
    model(x)
    assert all(row.calls == 1 for row in report.rows)
    for _ in range(2):
        assert fastllm.restore(model) is model
        assert [type(m) for m in model.modules()] == before and torch.equal(model(x), expected)
    assert not [name for m in model.modules() for name in vars(m) if "fastllm" in name]


def test_context_puts_back_what_was_there():
    model, x = nn.Sequential(Block(), nn.LayerNorm(D)), torch.randn(2, T, D)
    with fastllm.accelerated(model):
        with fastllm.accelerated(model, attention=False):
            assert ops(model, x) == {"layer_norm"}
        assert ops(model, x) == {"layer_norm", "attention"}
    assert not ops(model, x)
    with pytest.raises(ZeroDivisionError), fastllm.accelerated(model):
        raise ZeroDivisionError
    assert not ops(model, x)


def test_only_this_instance():
    model, other, x = nn.LayerNorm(D), nn.LayerNorm(D), torch.randn(2, D)
    fastllm.accelerate(model)
    assert ops(model, x) and not ops(other, x) and type(other) is nn.LayerNorm


def test_not_a_module():
    with pytest.raises(TypeError, match="must be a torch.nn.Module, got function"):
        fastllm.accelerate(lambda x: x)


def test_hooks_parameters_and_state_stay():
    model, x = nn.Sequential(nn.LayerNorm(D)), torch.randn(2, D)
    seen = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(type(module).__name__))
    state, parameters = model.state_dict(), list(model.parameters())
    fastllm.accelerate(model)
    model(x)
    assert seen == ["LayerNorm"]
    assert list(model.state_dict()) == list(state) and all(a is b for a, b in zip(model.parameters(), parameters))
    model[0].register_forward_pre_hook(lambda module, args: seen.append("before"))
    fastllm.restore(model)
    model(x)
    assert seen == ["LayerNorm", "before", "LayerNorm"]


def test_copies_are_plain():
    model, x = nn.Sequential(nn.LayerNorm(D), nn.MultiheadAttention(D, H)), torch.randn(2, D)
    fastllm.accelerate(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.copy(model[0])):
        assert {type(m) for m in other.modules()} <= {
            type(m) for m in nn.Sequential(nn.LayerNorm(2), nn.MultiheadAttention(2, 1)).modules()
        }
    assert not ops(copy.deepcopy(model[0]), x)
    assert b"fastllm" not in pickle.dumps(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_dtype_later(dtype):
    model, x = nn.Sequential(Block(), nn.RMSNorm(D)), torch.randn(2, T, D, dtype=torch.float64)
    exact = copy.deepcopy(model).double()(x)
    peer = copy.deepcopy(model).to(dtype)(x.to(dtype))
    fastllm.accelerate(model)
    got = model.to(dtype)(x.to(dtype))
    assert got.dtype == dtype
    assert_as_accurate(got.bfloat16(), peer.bfloat16(), exact)


def test_parametrized_weights():
    """torch.nn.utils.parametrize changes the class of a module too, before or after."""

    class Double(nn.Module):
        def forward(self, w):
            return 2 * w

    x = torch.randn(2, D)
    for first in (True, False):
        model = nn.Sequential(nn.LayerNorm(D))
        if first:
            fastllm.accelerate(model)
        nn.utils.parametrize.register_parametrization(model[0], "weight", Double())
        if not first:
            fastllm.accelerate(model)
        torch.testing.assert_close(model(x), F.layer_norm(x, (D,), model[0].weight, model[0].bias))
        assert ops(model, x) == {"layer_norm"}
        fastllm.restore(model)
        torch.testing.assert_close(model(x), F.layer_norm(x, (D,), model[0].weight, model[0].bias))
        assert not ops(model, x)


def test_a_replaced_forward_is_left_alone():
    """As accelerate's device hooks replace it."""
    model, x = nn.Sequential(nn.LayerNorm(D)), torch.randn(2, D)
    model[0].forward = lambda x: x * 0
    (row,) = fastllm.accelerate(model).left_alone
    assert "another library" in row.reason and torch.equal(model(x), x * 0)


def test_a_forward_that_was_kept_is_plain_again():
    """Another library holds the accelerated method beyond restore."""
    model, x = nn.Sequential(nn.LayerNorm(D)), torch.randn(2, D)
    fastllm.accelerate(model)
    kept = model[0].forward
    assert ops(kept, x)
    fastllm.restore(model)
    assert not ops(kept, x) and torch.equal(kept(x), model(x))


def test_scripted_modules_are_left_alone():
    model = nn.Sequential(torch.jit.script(nn.LayerNorm(D)))
    assert not fastllm.accelerate(model).accelerated


def test_patched_while_another_thread_runs():
    model = nn.Sequential(*(Block() for _ in range(3)), nn.LayerNorm(D)).eval()
    x, wrong, stop = torch.randn(2, T, D), [], threading.Event()
    expected = model(x).detach()

    def work():
        with torch.no_grad():
            while not stop.is_set():
                if not torch.allclose(model(x), expected, atol=1e-5):
                    wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for t in threads:
        t.start()
    for _ in range(40):
        fastllm.accelerate(model)
        fastllm.restore(model)
    stop.set()
    for t in threads:
        t.join()
    assert not wrong


@pytest.mark.parametrize("accelerate_first", [False, True])
def test_compile(accelerate_first):
    model, x = nn.Sequential(Block(), WrittenNorm()), torch.randn(2, T, D)
    expected = model(x)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    if not accelerate_first:
        torch.testing.assert_close(compiled(x), expected)
    fastllm.accelerate(model)
    torch.testing.assert_close(compiled(x), expected)
    fastllm.restore(model)
    assert torch.equal(model(x), expected)
    torch.testing.assert_close(compiled(x), expected)
