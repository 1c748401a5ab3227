"""The reference transformer: the naive and the accelerated one are one model."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from check import assert_as_accurate

import fastllm
from fastllm import dispatch
from fastllm.llm.meter import LiveBytes
from fastllm.model import ACTIVATIONS, KINDS, NORMS, POSITIONS, Config, Transformer, add_norm
from fastllm.sampling import sample

SMALL = dict(vocab=41, d_model=32, heads=4, kv_heads=2, layers=2, d_ff=48, max_len=64, dropout=0.0)


def make(accelerated=True, seed=0, **options):
    torch.manual_seed(seed)
    return Transformer(Config(**SMALL | options), accelerated)


def data(kind):
    """tokens and the other arguments of forward; the second sequence of each batch ends in padding."""
    tokens = torch.randint(1, 41, (2, 10))
    mask = torch.arange(10) < torch.tensor([[10], [6]])
    if kind != "encoder-decoder":
        return tokens, dict(mask=mask if kind == "encoder" else None)
    return tokens, dict(source=torch.randint(1, 41, (2, 7)), source_mask=torch.arange(7) < torch.tensor([[7], [4]]))


def outputs_and_gradients(model, tokens, others):
    """Logits and loss in one vector, and the gradients by name."""
    logits = model(tokens, **others).flatten(0, -2)
    targets = tokens[:, 0] if len(logits) == len(tokens) else tokens.flatten()
    loss = F.cross_entropy(logits, targets % logits.shape[-1])
    # The bias of the keys shifts all scores of a row alike: its gradient is 0, and what is computed is rounding alone.
    parameters = {
        name: p for name, p in getattr(model, "_orig_mod", model).named_parameters() if not name.endswith("key.bias")
    }
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    return torch.cat([logits.flatten(), loss[None]]), dict(zip(parameters, gradients, strict=True))


def assert_same_training(ours, peer, exact, kind, seen_as):
    """Logits, loss and gradients of `ours` are those of `exact`, as far as the dtype `seen_as` can tell.

    check.py's rule is for one op, and tests of the ops hold it; in a model the roundings of many ops meet, and either
    side can be lucky. So what comes out is rounded to a coarser dtype first, each gradient scaled to unit norm.
    """
    tokens, others = data(kind)
    found = [outputs_and_gradients(model, tokens, others) for model in (ours, peer, exact)]
    assert_as_accurate(*(output.to(seen_as) for output, _ in found[:2]), found[2][0], "logits and loss")
    for name, truth in found[2][1].items():
        scaled = [by_name[name].double() / truth.norm() for _, by_name in found]
        assert_as_accurate(*(gradient.to(seen_as) for gradient in scaled[:2]), scaled[2], name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        dict(norm=n, positions=p, activation=a)
        for n, p, a in zip((*NORMS, "rmsnorm"), POSITIONS, ACTIVATIONS, strict=True)
    ]
    + [dict(window=(3, 3), tie_embeddings=False, scale_embedding=False, pooling="mean-max")],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_accelerated_is_naive(kind, options):
    options = dict(options, kind=kind, classes=3 if kind == "encoder" else 0)
    naive, ours, exact = make(False, **options), make(True, **options), make(False, **options).double()
    assert naive.state_dict().keys() == ours.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(naive.state_dict().values(), ours.state_dict().values(), strict=True))
    assert_same_training(ours, naive, exact, kind, torch.float16)
    assert_same_training(ours.double(), naive, exact, kind, torch.float32)


def test_shapes():
    tokens = torch.randint(41, (2, 10))
    assert make(kind="encoder")(tokens).shape == (2, 10, 32)
    assert make(kind="encoder", classes=3)(tokens).shape == (2, 3)
    assert make(kind="encoder", classes=3, pooling="mean-max").head.weight.shape == (3, 64)
    assert make(kind="encoder", classes=3, per_token=True, pooling="mean-max")(tokens).shape == (2, 10, 3)
    assert make(kind="decoder")(tokens).shape == (2, 10, 41)
    assert make(kind="encoder-decoder")(tokens, source=tokens[:, :4]).shape == (2, 10, 41)


@pytest.mark.parametrize(
    "kind, pooling", [("encoder", "mean"), ("encoder", "mean-max"), ("encoder-decoder", "mean")], ids=" ".join
)
@pytest.mark.parametrize("accelerated", [False, True])
def test_padding_changes_nothing(accelerated, kind, pooling):
    """A sequence alone and the same one padded in a batch agree in fp64 far better than fp32 knows."""
    model = make(accelerated, kind=kind, classes=3 if kind == "encoder" else 0, pooling=pooling)
    tokens, others = data(kind)
    inputs = dict(tokens=tokens, **others)
    name, mask = ("tokens", "mask") if kind == "encoder" else ("source", "source_mask")
    length = int(inputs[mask][1].sum())
    alone = dict(tokens=tokens[1:], source=others.get("source", tokens)[1:]) | {name: inputs[name][1:, :length]}
    if kind == "encoder":
        del alone["source"]
    peer = model(**alone)
    model.double()
    padded = model(**inputs)[1:]
    assert_as_accurate(padded.float(), peer, model(**alone))
    inputs[name] = torch.where(inputs[mask], inputs[name], 7)
    assert torch.equal(model(**inputs)[1:], padded), "what is padded is seen"


@pytest.mark.parametrize("accelerated", [False, True])
def test_a_decoder_does_not_look_ahead(accelerated):
    model = make(accelerated)
    tokens = torch.randint(41, (1, 10))
    changed = tokens.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % 41
    assert torch.equal(model(tokens)[:, :6], model(changed)[:, :6])


@pytest.mark.parametrize("kind", ["decoder", "encoder-decoder"])
@pytest.mark.parametrize("positions", POSITIONS)
def test_generation_with_and_without_a_cache(kind, positions):
    model = make(kind=kind, positions=positions).double()
    tokens, others = data(kind)
    others.pop("mask", None)
    with_cache = model.generate(tokens, 12, **others)
    assert with_cache.shape == (2, 22)
    assert torch.equal(with_cache[:, :10], tokens)
    assert torch.equal(with_cache, model.generate(tokens, 12, cache=False, **others))
    assert torch.equal(with_cache[:, 10], model.eval()(tokens, **others)[:, -1].argmax(-1))


def test_sampling():
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).expand(4000, 4)
    drawn = sample(logits, 1.0, 2, generator=torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == {2, 3}
    model = make()
    start = torch.randint(41, (2, 3))
    made = [model.generate(start, 8, temperature=1.0, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(model.generate(start, 8, temperature=1.0, top_k=1), model.generate(start, 8))
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


def test_generation_stops_and_keeps_the_mode():
    model = make().train()
    start = torch.randint(41, (2, 3))
    stop = int(model.generate(start, 1)[0, -1])
    made = model.generate(start[:1], 9, stop=stop)
    assert made.shape == (1, 4) and made[0, -1] == stop
    assert model.training


@pytest.mark.parametrize("kind", ["decoder", "encoder-decoder"])
@pytest.mark.parametrize("large", [1, 10**9], ids=["fused", "not fused"])
def test_targets_give_the_loss_of_the_logits(monkeypatch, kind, large):
    monkeypatch.setattr(fastllm.model, "LARGE_VOCAB", large)
    tokens, others = data(kind)
    targets = torch.randint(41, (2, 10))
    targets[1, 6:] = -100
    exact, models = make(False, kind=kind).double(), [make(accelerated, kind=kind) for accelerated in (True, False)]
    expected = F.cross_entropy(exact(tokens, **others).flatten(0, 1), targets.flatten())
    losses = [model(tokens, **others, targets=targets) for model in models]
    assert_as_accurate(*losses, expected)
    ops = [call.op for call in fastllm.explain(models[0], tokens, **others, targets=targets).calls]
    assert ("linear_cross_entropy" in ops) == (large == 1) and "cross_entropy" in ops[-1]
    truth = torch.autograd.grad(expected, exact.head.weight)[0]
    gradients = [torch.autograd.grad(loss, model.head.weight)[0] for loss, model in zip(losses, models, strict=True)]
    assert_as_accurate(*(g.bfloat16() for g in gradients), truth)
    with pytest.raises(ValueError, match="takes no targets"):
        make(kind="encoder")(tokens, targets=targets)


def test_overfits_a_tiny_batch():
    model = make(positions="rotary")
    tokens = torch.randint(41, (2, 12))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
    assert loss < 0.1 < math.log(41)
    assert torch.equal(model.generate(tokens[:, :3], 9), tokens)


def test_explain_names_the_ops():
    ops = {call.op for call in fastllm.explain(make(True), torch.randint(41, (1, 4))).calls}
    assert ops == {"attention", "layer_norm", "linear"}
    assert not fastllm.explain(make(False), torch.randint(41, (1, 4))).calls


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=() if k == "encoder-decoder" else pytest.mark.slow) for k in KINDS]
)
def test_compiles_whole(kind):
    """fullgraph=True: a graph break is an error. Compiled and eager run the same kernels on the same numbers."""
    if dispatch.extension is None:
        pytest.skip(f"the C++ extension is needed: {dispatch.missing_extension}")
    torch.use_deterministic_algorithms(False)  # inductor does not fill fresh memory
    options = dict(kind=kind, classes=3 if kind == "encoder" else 0, layers=1)
    model, exact = make(**options), make(False, **options).double()
    assert_same_training(torch.compile(model, fullgraph=True), model, exact, kind, torch.float16)


@pytest.mark.parametrize(
    "function, message",
    [
        (lambda: Config(vocab=5, kind="sideways"), "kind must be one of"),
        (lambda: Config(vocab=5, norm="batchnorm"), "norm must be one of"),
        (lambda: Config(vocab=5, pooling="max"), "pooling must be one of mean, mean-max"),
        (lambda: Config(vocab=0), "vocab must be at least 1"),
        (lambda: Config(vocab=5, d_model=30, heads=4), "heads must divide d_model"),
        (lambda: Config(vocab=5, kv_heads=3), "kv_heads divide heads"),
        (lambda: Config(vocab=5, classes=2), "only an encoder classifies"),
        (lambda: make()(torch.zeros(1, 65, dtype=torch.int64)), "65 positions, but max_len=64"),
        (lambda: make()(torch.zeros(1, 4, dtype=torch.int64), source=torch.zeros(1, 4)), "takes no source"),
        (lambda: make(kind="encoder-decoder")(torch.zeros(1, 4, dtype=torch.int64)), "needs a source"),
        (lambda: make(kind="encoder").generate(torch.zeros(1, 4, dtype=torch.int64), 1), "does not generate"),
        (lambda: make(kind="encoder-decoder").generate(torch.zeros(1, 4, dtype=torch.int64), 1), "needs a source"),
        (lambda: make().generate(torch.zeros(1, 4, dtype=torch.int64), 1, source=torch.zeros(1, 4)), "no source"),
        (lambda: make().generate(torch.zeros(1, 0, dtype=torch.int64), 1), "the prompt is empty"),
        (lambda: Config(vocab=5, kv_heads=0), "kv_heads must be at least 1, got 0"),
        (
            lambda: make(kind="encoder", classes=2)(torch.zeros(1, 4).long(), cu_seqlens=torch.tensor([0, 1, 4])),
            "cannot be pooled",
        ),
    ],
)
def test_wrong_use_is_named(function, message):
    with pytest.raises(ValueError, match=message):
        function()


def packed(lengths, vocab=41):
    tokens = [torch.randint(vocab, (n,)) for n in lengths]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    return tokens, torch.cat(tokens)[None], bounds


@pytest.mark.parametrize("positions", ["sinusoidal", "learned", "rotary"])
@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_packed_sequences_see_nothing_of_each_other(kind, positions):
    """Each as accurate as it is alone, on the kernels and on plain PyTorch."""
    options = dict(kind=kind, masked_lm=kind == "encoder", positions=positions, max_len=12)
    alone, together, bounds = packed([12, 1, 5, 7])
    models = [make(accelerated, **options) for accelerated in (True, False)]
    exact = copy.deepcopy(models[1]).double()
    truth = torch.cat([exact(tokens[None])[0] for tokens in alone])
    peer = torch.cat([models[1](tokens[None])[0] for tokens in alone])
    for model in models:
        got = model(together, cu_seqlens=bounds)[0]
        assert_as_accurate(got.detach().half(), peer.detach().half(), truth.detach())
    losses = [model(together, cu_seqlens=bounds, targets=together, label_smoothing=0.1) for model in (*models, exact)]
    # Roundings of several layers add up, luckily or not: fp16 sees what is more than that.
    assert_as_accurate(losses[0].detach().half(), losses[1].detach().half(), losses[2].detach())
    for loss in losses:
        loss.backward()
    for (name, ours), theirs, true in zip(models[0].named_parameters(), models[1].parameters(), exact.parameters()):
        if not name.endswith("key.bias"):  # 0 but for rounding
            assert_as_accurate(ours.grad.half(), theirs.grad.half(), true.grad)
    with pytest.raises(ValueError, match="13 positions, but max_len=12"):
        models[0](together, cu_seqlens=torch.tensor([0, 13, 25]))


def test_checkpointing_changes_nothing_but_memory():
    tokens, gradients, kept = torch.randint(41, (2, 40)), [], []
    for checkpointing in (False, True):
        model = make(layers=4, dropout=0.1, attention_dropout=0.1).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(1)
        with LiveBytes(model.parameters()) as memory:
            loss = model(tokens, targets=tokens)
            kept.append(memory.live)
        loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
    assert kept[1] < kept[0] / 2


@pytest.mark.parametrize("accelerated", [False, True])
def test_dropout_is_on_all_that_blocks_add(accelerated, monkeypatch):
    """Of what is added, each number is left out or has twice its value; in eval() all are there."""
    model, seen = make(accelerated, dropout=0.5).train(), []

    def spied(norm, stream, added, dropout_p):
        found = add_norm(norm, stream, added, dropout_p)
        if added is not None:
            seen.append((stream, added, found[1]))
        return found

    monkeypatch.setattr(fastllm.model, "add_norm", spied)
    tokens = torch.randint(41, (2, 20))
    model(tokens)
    assert len(seen) == 4
    for stream, added, h in seen:
        kept = h != stream
        assert 0.4 < kept.double().mean() < 0.6
        assert_as_accurate(h, stream + 2 * added * kept, stream.double() + 2 * added.double() * kept)
    model.eval()
    model(tokens)
    for stream, added, h in seen[4:]:
        assert_as_accurate(h, stream + added, stream.double() + added.double())


def test_masked_lm_has_a_head_for_every_position():
    model = make(kind="encoder", masked_lm=True)
    assert (
        model(torch.zeros(2, 5, dtype=torch.long)).shape == (2, 5, 41) and model.head.weight is model.embedding.weight
    )
    with pytest.raises(ValueError, match="are two heads"):
        Config(vocab=5, kind="encoder", classes=2, masked_lm=True)
    with pytest.raises(ValueError, match="a source cannot be packed"):
        make(kind="encoder-decoder")(
            torch.zeros(1, 3).long(), source=torch.zeros(1, 3).long(), cu_seqlens=torch.tensor([0, 3])
        )
