"""The modules: torch's own constructors and state dicts, torch's own answers."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from check import assert_as_accurate, compare

import fastllm
import fastllm.nn as fnn
from fastllm.nn.linear import activated

NORMS = [
    (fnn.LayerNorm, torch.nn.LayerNorm, {}),
    (fnn.LayerNorm, torch.nn.LayerNorm, dict(eps=1e-3, bias=False)),
    (fnn.LayerNorm, torch.nn.LayerNorm, dict(elementwise_affine=False)),
    (fnn.RMSNorm, torch.nn.RMSNorm, {}),
    (fnn.RMSNorm, torch.nn.RMSNorm, dict(eps=1e-3)),
    (fnn.RMSNorm, torch.nn.RMSNorm, dict(elementwise_affine=False)),
]

MIRRORED = {  # ours, and what is left out of torch's, as our docstrings say
    "cross_entropy": (fastllm.cross_entropy, ()),
    "linear_cross_entropy": (fastllm.linear_cross_entropy, ("options",)),
    "CrossEntropyLoss": (fnn.CrossEntropyLoss, ()),
    "LayerNorm": (fnn.LayerNorm, ()),
    "Linear": (fnn.Linear, ()),
    "LinearCrossEntropyLoss": (fnn.LinearCrossEntropyLoss, ("out_features", "options")),
    "RMSNorm": (fnn.RMSNorm, ()),
}


def parameters(function, without=()):
    return [
        (p.name, p.kind, p.default)
        for p in inspect.signature(function).parameters.values()
        if p.name not in ("self", *without)
    ]


@pytest.mark.parametrize("name", MIRRORED)
def test_arguments_are_torchs_in_torchs_order(name):
    """What more there is of ours stands behind them, so that any call of torch's means the same here. (None, torch's
    ignore_index of linear_cross_entropy, stands for our default there.)"""
    ours, without = MIRRORED[name]
    theirs = getattr(F, name, None) or getattr(torch.nn, name, None)
    if theirs is None:
        pytest.skip(f"this PyTorch has no {name}")
    for a, b in [(ours, theirs)] if inspect.isfunction(ours) else [(ours, theirs), (ours.forward, theirs.forward)]:
        wanted, given = parameters(b, without), parameters(a)
        by_position = [p for p in wanted if p[1] is inspect.Parameter.POSITIONAL_OR_KEYWORD]
        assert given[: len(by_position)] == by_position
        assert {(name, kind) for name, kind, _ in wanted} <= {(name, kind) for name, kind, _ in given}


@pytest.mark.parametrize("arguments", [(None, True), (None, None, 3, False)], ids=str)
def test_what_torch_deprecated_is_refused(arguments):
    """The 4th and 6th argument of F.cross_entropy; the module takes them as torch's does, which warns."""
    x, target = torch.randn(4, 5), torch.tensor([0, 4, 3, 1])
    with pytest.raises(ValueError, match="size_average and reduce are deprecated"):
        fastllm.cross_entropy(x, target, *arguments)
    with pytest.warns(UserWarning, match="size_average and reduce"):
        loss = fnn.CrossEntropyLoss(*arguments)
    assert torch.equal(
        loss(x, target), fastllm.cross_entropy(x, target, ignore_index=loss.ignore_index, reduction=loss.reduction)
    )
    with pytest.raises(ValueError, match="-100"):
        fastllm.cross_entropy(x, target, None, -100)


def functional(module, x, *weights):
    if isinstance(module, torch.nn.LayerNorm):
        return F.layer_norm(x, module.normalized_shape, *weights, eps=module.eps)
    return F.rms_norm(x, module.normalized_shape, *weights, eps=module.eps)


@pytest.mark.parametrize("shape", [(33,), (3, 7)], ids=str)
@pytest.mark.parametrize("ours, theirs, options", NORMS)
def test_norm_is_torchs(ours, theirs, options, shape):
    a, b = ours(shape, **options), theirs(shape, **options)
    assert isinstance(a, theirs) and repr(a) == repr(b)
    assert a.state_dict().keys() == b.state_dict().keys()
    for parameter in b.parameters():
        torch.nn.init.normal_(parameter)
    a.load_state_dict(b.state_dict())
    weights = [w for w in (a.weight, getattr(a, "bias", None)) if w is not None]
    inputs = [torch.randn(4, 5, *shape), *weights]

    def call(x, *given):
        return torch.func.functional_call(a, dict(zip(("weight", "bias"), given)), (x,))

    def peer(x, *given):
        return functional(b, x, *given)

    compare(call, peer, peer, inputs, [torch.randn(4, 5, *shape)], torch.float32)


@pytest.mark.parametrize("module", [fnn.LayerNorm((3, 7)), fnn.RMSNorm((3, 7)), fnn.LayerNorm(7)], ids=str)
def test_norm_adds_the_residual(module):
    x, r = torch.randn(2, 5, 3, 7), torch.randn(2, 5, 3, 7)
    y, h = module(x, r)
    assert torch.equal(h, x + r)
    assert y.shape == x.shape
    weights = [w for w in (module.weight, getattr(module, "bias", None)) if w is not None]
    truth = functional(module, h.double(), *(w.double() for w in weights))
    assert_as_accurate(y, functional(module, h, *weights), truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rms_norm_without_eps_is_torchs_on_tiny_rows(dtype):
    """The default eps decides the result here: torch takes that of the dtype it computes in."""
    x = torch.full((2, 8), 1e-4, dtype=dtype)
    peer = torch.nn.RMSNorm(8)(x.float()).to(dtype)
    truth = F.rms_norm(x.double(), (8,), eps=torch.finfo(torch.float32).eps)
    assert_as_accurate(fnn.RMSNorm(8, dtype=dtype)(x), peer, truth)
    assert_as_accurate(torch.nn.RMSNorm(8, dtype=dtype)(x), peer, truth)


@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_torchs(bias):
    torch.manual_seed(3)
    a = fnn.Linear(20, 30, bias=bias)
    torch.manual_seed(3)
    b = torch.nn.Linear(20, 30, bias=bias)
    assert isinstance(a, torch.nn.Linear) and repr(a) == repr(b)
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    inputs = [torch.randn(4, 5, 20), *a.parameters()]
    with fastllm.backend("cpu"):

        def call(x, *given):
            return torch.func.functional_call(a, dict(zip(("weight", "bias"), given)), (x,))

        compare(call, F.linear, F.linear, inputs, [torch.randn(4, 5, 30)], torch.float32)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_activated_is_one_op_on_our_linear(activation):
    """Another layer in its place, which knows no activation, is followed by one."""
    torch.manual_seed(3)
    ours, theirs, x = fnn.Linear(20, 30), torch.nn.Linear(20, 30), torch.randn(4, 20)
    theirs.load_state_dict(ours.state_dict())
    calls = fastllm.explain(activated, ours, x, activation).calls
    assert [call.op for call in calls] == ["linear"]
    with fastllm.backend("cpu"):
        y = activated(ours, x, activation)
    exact = getattr(F, activation)(F.linear(x.double(), ours.weight.double(), ours.bias.double()))
    assert_as_accurate(y, activated(theirs, x, activation), exact)
    assert_as_accurate(activated(theirs, x, activation), activated(ours, x, activation), exact)


def test_norm_names_the_shape_it_wants():
    for x in (torch.randn(2, 7, 3), torch.randn(7)):
        with pytest.raises(ValueError, match=r"LayerNorm: x must be \[..., 3, 7\]"):
            fnn.LayerNorm((3, 7))(x)


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(weight=torch.rand(9)),
        dict(ignore_index=2, reduction="sum"),
        dict(reduction="none", label_smoothing=0.1),
    ],
    ids=lambda options: " ".join(options) or "plain",
)
def test_cross_entropy_is_torchs(options):
    ours, theirs = fnn.CrossEntropyLoss(**options), torch.nn.CrossEntropyLoss(**options)
    assert isinstance(ours, torch.nn.CrossEntropyLoss) and repr(ours) == repr(theirs).replace("torch", "fastllm")
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    target = torch.randint(9, (12,))
    exact = torch.nn.CrossEntropyLoss(**{k: v.double() if k == "weight" else v for k, v in options.items()})
    grad = torch.randn(12 if options.get("reduction") == "none" else ())
    inputs = [torch.randn(12, 9)]
    compare(
        lambda x: ours(x, target),
        lambda x: theirs(x, target),
        lambda x: exact(x, target),
        inputs,
        [grad],
        torch.float32,
    )


def test_cross_entropy_hands_its_own_options_on():
    x, target = torch.randn(5, 9), torch.randint(9, (5,))
    options = dict(softcap=2.0, z_loss=0.1, return_token_accuracy=True)
    for a, b in zip(
        fnn.CrossEntropyLoss(**options)(x, target), fastllm.cross_entropy(x, target, **options), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.skipif(not hasattr(torch.nn, "LinearCrossEntropyLoss"), reason="torch has the class from 2.13 on")
@pytest.mark.parametrize(
    "options",
    [{}, dict(bias=True), dict(weight=torch.rand(9), ignore_index=2), dict(reduction="none", label_smoothing=0.1)],
    ids=lambda options: " ".join(options) or "plain",
)
def test_linear_cross_entropy_is_torchs(options):
    ours, theirs = fnn.LinearCrossEntropyLoss(6, 9, **options), torch.nn.LinearCrossEntropyLoss(6, 9, **options)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    names = [name for name in theirs.state_dict() if name != "weight"]
    target = torch.randint(9, (12,))

    def with_module(module):
        def call(x, *given):
            classes = {} if module.weight is None else {"weight": options["weight"].to(x.dtype)}
            return torch.func.functional_call(module, dict(zip(names, given, strict=True)) | classes, (x, target))

        return call

    grad = torch.randn(12 if options.get("reduction") == "none" else ())
    inputs = [torch.randn(12, 6), *(theirs.state_dict()[name] for name in names)]
    compare(with_module(ours), with_module(theirs), with_module(theirs), inputs, [grad], torch.float32)


class TorchAttention(fnn.Attention):
    """The same block around torch's kernel."""

    def attend(self, q, k, v, mask):
        T, S = q.shape[2], k.shape[2]
        i, j = torch.arange(T)[:, None] + S - T, torch.arange(S)
        seen = torch.ones(T, S, dtype=torch.bool)
        if self.causal:
            seen = seen & (j <= i)
        if self.window:
            seen = seen & (j >= i - self.window[0]) & (j <= i + self.window[1])
        seen = seen if mask is None else seen & mask
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(causal=True),
        dict(kv_heads=2),
        dict(kv_heads=1, causal=True),
        dict(window=(3, 2)),
        dict(head_dim=12),
        dict(causal=True, rotary=fnn.Rotary(8, 64)),
        dict(mask=True),
        dict(context=True),
    ],
    ids=lambda options: " ".join(options) or "plain",
)
def test_attention_forward_and_backward(options):
    options = dict(options)
    masked, cross = options.pop("mask", False), options.pop("context", False)
    ours, theirs = fnn.Attention(32, 4, **options), TorchAttention(32, 4, **options)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    # A bias of the keys shifts all scores of a row alike: its gradient is 0, and what is computed is rounding alone.
    names = [name for name in ours.state_dict() if name != "key.bias"]
    key_bias = torch.randn_like(ours.key.bias).detach()
    theirs.load_state_dict(ours.state_dict())
    mask = torch.arange(9) < torch.tensor([[9], [5]]) if masked else None
    inputs = [torch.randn(2, 9, 32), torch.randn(2, 6, 32), *(ours.state_dict()[name] for name in names)]

    def with_module(module):
        def call(x, context, *weights):
            given = dict(zip(names, weights, strict=True)) | {"key.bias": key_bias.to(x.dtype)}
            return torch.func.functional_call(module, given, (x,), dict(context=context if cross else None, mask=mask))

        return call

    compare(with_module(ours), with_module(theirs), with_module(theirs), inputs, [torch.randn(2, 9, 32)], torch.float32)


def test_attention_with_a_cache_continues():
    attention = fnn.Attention(32, 4, 2, causal=True, rotary=fnn.Rotary(8, 64)).double()
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    cache, parts = fnn.KeyValues(), []
    for part in x.split([4, 1, 3, 1], dim=1):
        parts.append(attention(part, cache=cache))
    assert len(cache) == 9
    assert_as_accurate(torch.cat(parts, 1).float(), attention.float()(x.float()), attention.double()(x))


def test_cross_attention_projects_its_context_once():
    attention, cache = fnn.Attention(32, 4), fnn.KeyValues()
    x, context = torch.randn(2, 3, 32), torch.randn(2, 5, 32)
    first = attention(x, context, cache=cache)
    attention.key = None  # a second projection would fail
    assert torch.equal(first, attention(x, context, cache=cache))


def test_rotary_depends_on_the_distance_alone():
    rotary = fnn.Rotary(16, 64).double()
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64).unbind(0)
    exact = fnn.Rotary(16, 64)(q.float(), 0)
    assert torch.equal(exact, q.float())  # position 0 is not turned
    near, far = ((rotary(q, p) * rotary(k, p - 3)).sum() for p in (5, 50))
    peer = (rotary(q.float(), 50).double() * rotary(k.float(), 47).double()).sum()
    assert_as_accurate(far.float(), peer.float(), near)


@pytest.mark.parametrize(
    "function, message",
    [
        (lambda: fnn.Attention(30, 4), "multiple of heads=4"),
        (lambda: fnn.Attention(32, 4, 3), "multiple of kv_heads=3"),
        (lambda: fnn.Rotary(7), "head_dim must be even"),
        (lambda: fnn.Rotary(8, 4)(torch.randn(1, 1, 5, 8)), "past max_len=4"),
        (lambda: fnn.Attention(8, 2, causal=True)(torch.randn(1, 2, 8), torch.randn(1, 2, 8)), "a context was given"),
    ],
)
def test_wrong_use_is_named(function, message):
    with pytest.raises(ValueError, match=message):
        function()


def test_attention_dropout_is_off_in_eval():
    attention = fnn.Attention(8, 2, dropout=0.5)
    x = torch.randn(1, 6, 8)
    assert not torch.equal(attention(x), attention(x))
    attention.eval()
    assert torch.equal(attention(x), attention(x))
    calls = fastllm.explain(attention, x).calls
    assert [call.op for call in calls] == ["linear"] * 3 + ["attention", "linear"]


@pytest.mark.parametrize(
    "module, activation",
    [
        (fnn.SwiGLU(8, 24), F.silu),
        (fnn.SwiGLU(8, 24, bias=True), F.silu),
        (fnn.GeGLU(8, 24), lambda x: F.gelu(x, approximate="tanh")),
        (fnn.GeGLU(8, 24, approximate="none"), F.gelu),
    ],
    ids=["silu", "silu bias", "gelu tanh", "gelu"],
)
def test_gated_feed_forward(module, activation):
    names = list(module.state_dict())
    assert names == [f"{part}.{x}" for part in ("gate", "up", "down") for x in ("weight", "bias")[: len(names) // 3]]

    def call(x, *weights):
        return torch.func.functional_call(module, dict(zip(names, weights, strict=True)), (x,))

    def plain(x, *weights):
        w = dict(zip(names, weights, strict=True))
        gate, up = (F.linear(x, w[f"{part}.weight"], w.get(f"{part}.bias")) for part in ("gate", "up"))
        return F.linear(activation(gate) * up, w["down.weight"], w.get("down.bias"))

    inputs = [torch.randn(3, 5, 8), *module.state_dict().values()]
    compare(call, plain, plain, inputs, [torch.randn(3, 5, 8)], torch.float32)


@pytest.mark.parametrize("module", [fnn.LayerNorm((3, 7)), fnn.RMSNorm(7)], ids=str)
def test_norm_drops_before_it_adds(module):
    x, r = torch.ones(2, 5, 3, 7), torch.full((2, 5, 3, 7), 10.0)
    _, h = module(x, r, dropout_p=0.5)
    assert set(h.unique().tolist()) == {10.0, 12.0}
