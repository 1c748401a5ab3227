"""Layers of an encoder without padding: the same for real tokens, gradients too; as they were for whoever looks in."""

import copy

import pytest
import torch
from check import assert_as_accurate

import fastllm

transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")

import hf_models  # noqa: E402

import fastllm.hf  # noqa: E402

FAMILIES = ["bert", "roberta", "distilbert"]
LENGTHS = [17, 9, 1, 12]


def make(family, **changes):
    model, config, sizes = hf_models.ENCODERS[family]
    torch.manual_seed(0)
    made = getattr(transformers, config)(**{**sizes, **changes})
    return getattr(transformers, model)(made).eval()


def batch(lengths=LENGTHS, length=17):
    random = torch.Generator().manual_seed(1)
    kept = torch.arange(length) < torch.tensor(lengths)[:, None]
    return {"input_ids": torch.randint(3, hf_models.V, kept.shape, generator=random), "attention_mask": kept.long()}


def seen_by_layers(model):
    """The shapes in which hidden states reach the first linear layer of attention from now on."""
    found = []
    linear = next(m for name, m in model.named_modules() if name.endswith(("query", "q_lin")))
    plain = type(linear).forward
    object.__setattr__(linear, "forward", lambda x: (found.append(tuple(x.shape)), plain(linear, x))[1])
    return found


def stack_of(report):
    (row,) = [row for row in report.rows if row.runs == "its layers without padding"]
    return row


@pytest.mark.parametrize("family", FAMILIES)
def test_real_tokens_and_gradients(family):
    given, found = batch(), []
    labels = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
    for accelerate in (False, True):
        model = make(family)
        if accelerate:
            shapes = seen_by_layers(model)
            report = fastllm.accelerate(model)
        out = model(**given, labels=labels)
        out.loss.backward()
        found.append((out.logits[given["attention_mask"].bool()], out.loss, [p.grad for p in model.parameters()]))
    assert shapes == [(1, sum(LENGTHS), 32)] and stack_of(report).calls == 1 and not report.never_called
    expected, got = found
    torch.testing.assert_close(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1])
    least = max(g.norm() for g in expected[2]) / 100
    for mine, theirs in zip(got[2], expected[2], strict=True):
        scale = theirs.norm().clamp(min=least)
        torch.testing.assert_close(mine / scale, theirs / scale)


def last_hidden(model, given):
    return model.base_model(**given).last_hidden_state


def calls_of(report, runs):
    (row,) = [row for row in report.rows if row.runs == runs]
    return row.calls


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_layers_in_one_call(family):
    """With and without padding, and as sequences that the caller has packed; eager attention's error in fp32 counts."""
    model = make(family)
    exact, ours = copy.deepcopy(model).double(), copy.deepcopy(model)
    report = fastllm.accelerate(ours)
    unpadded = {name: x[:1] for name, x in batch().items()}
    for n, given in enumerate((batch(), unpadded, {"input_ids": unpadded["input_ids"]}), 1):
        kept = given.get("attention_mask", torch.ones(1, 17)).bool()
        found = [last_hidden(m, given)[kept] for m in (ours, model, exact)]
        assert_as_accurate(*found)
        assert calls_of(report, "its layers in one call") == n
        assert not [row for row in report.never_called if row.name.startswith("encoder")]
    padded, kept = batch(), batch()["attention_mask"].bool()
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    packed = dict(input_ids=padded["input_ids"][kept][None], cu_seq_lens_q=bounds, cu_seq_lens_k=bounds)
    if family == "bert":
        packed["position_ids"] = torch.arange(17).expand(4, 17)[kept][None]
        found = [last_hidden(ours, packed)[0], *(last_hidden(m, padded)[kept] for m in (model, exact))]
        assert_as_accurate(*found)


def test_modules_run_where_somebody_needs_them():
    model, given = make("bert"), batch()
    report = fastllm.accelerate(model)

    def in_one_call(**options):
        before = sum("encoder" == call.op for call in fastllm.explain(model, **given, **options).calls)
        return before == 1

    assert not in_one_call(), "gradients may be wanted"
    with torch.no_grad():
        assert in_one_call()
        assert not in_one_call(output_hidden_states=True)
        model.train()
        assert not in_one_call()
        model.eval()
        expected = model(**given).logits
        model.bert.encoder.layer[0].output.dense = torch.nn.Linear(48, 32)
        assert not torch.equal(model(**given).logits, expected), "another layer was put there"
        with torch.autocast("cpu", torch.bfloat16):
            assert not in_one_call()
        fastllm.restore(model)
        assert not in_one_call() and report.accelerated


@torch.no_grad()
def test_the_whole_needs_what_is_inside():
    for left_out in ("norms", "linear", "attention"):
        report = fastllm.accelerate(make("bert"), **{left_out: False})
        assert all(row.runs != "its layers in one call" for row in report.rows)


def test_what_stands_for_padding_is_zero():
    model, given = make("bert").bert, batch()
    kept = given["attention_mask"].bool()
    fastllm.accelerate(model)
    hidden = model(**given).last_hidden_state
    assert (hidden[~kept] == 0).all() and (hidden[kept] != 0).any(-1).all()


@pytest.mark.parametrize("head", ["QuestionAnswering", "TokenClassification"])
def test_a_loss_that_reads_padding_has_it(head):
    """Spans are chosen among all positions; and labels may count where there is padding."""
    given = batch()
    labels = given["input_ids"] % 2
    spans = dict(start_positions=torch.tensor([3, 2, 0, 5]), end_positions=torch.tensor([9, 4, 0, 6]))
    asked, found = spans if head == "QuestionAnswering" else dict(labels=labels), []
    for accelerate in (False, True):
        torch.manual_seed(0)
        config = transformers.BertConfig(**hf_models.ENCODERS["bert"][2])
        model = getattr(transformers, f"BertFor{head}")(config).eval()
        if accelerate:
            fastllm.accelerate(model)
        loss = model(**given, **asked).loss
        loss.backward()
        found.append((loss.detach(), model.bert.embeddings.word_embeddings.weight.grad))
        with torch.no_grad():
            torch.testing.assert_close(model(**given, **asked).loss, loss)
    torch.testing.assert_close(*found)
    shapes = seen_by_layers(model)
    model(**given)
    if "labels" in asked:
        model(**given, labels=labels.masked_fill(given["attention_mask"] == 0, -100))
    assert set(shapes) == {(1, sum(LENGTHS), 32)}, "nothing else reads it"


def test_a_later_choice_of_attention_sees_the_sequences_apart():
    model, given = make("bert"), batch()
    kept = given["attention_mask"].bool()
    expected = model(**given).logits[kept]
    fastllm.accelerate(model)
    shapes = seen_by_layers(model)
    for module in model.modules():
        if hasattr(module, "config") and "SelfAttention" in type(module).__name__:
            module.config = type(make("bert").config)(**hf_models.ENCODERS["bert"][2], attn_implementation="sdpa")
    torch.testing.assert_close(model(**given).logits[kept], expected)
    assert shapes == [(1, sum(LENGTHS), 32)]


@pytest.mark.parametrize(
    "why", ["no padding", "padding in front", "hidden states", "attentions", "hook", "mask", "compile"]
)
def test_left_as_it_is(why):
    given, options = batch([17, 17] if why == "no padding" else LENGTHS), {}
    if why == "padding in front":
        given["attention_mask"] = given["attention_mask"].flip(1)
    if why == "mask":
        given["attention_mask"] = given["attention_mask"].bool()[:, None, None].expand(-1, 1, 17, 17)
    if why == "hidden states":
        options = {"output_hidden_states": True}
    eager, ours = make("bert"), make("bert")
    fastllm.accelerate(ours)
    shapes = [] if why == "compile" else seen_by_layers(ours)
    if why == "hook":
        ours.bert.encoder.layer[1].register_forward_hook(lambda module, args, y: None)
    if why == "attentions":
        ours.set_attn_implementation("eager")
        options = {"output_attentions": True}
    call = torch.compile(ours, backend="eager", fullgraph=True) if why == "compile" else ours
    expected, got = eager(**given), call(**given, **options)
    where = torch.ones(len(given["input_ids"]), 17, dtype=torch.bool)
    where = given["attention_mask"].bool() if given["attention_mask"].ndim == 2 else where
    torch.testing.assert_close(got.logits[where], expected.logits[where])
    assert all(shape == (len(given["input_ids"]), 17, 32) for shape in shapes) and (shapes or why == "compile")
    if why == "hidden states":
        assert got.hidden_states[1].shape == (4, 17, 32)


def test_layers_that_look_at_positions_are_not_packed():
    assert fastllm.accelerate(make("bert", is_decoder=True)).accelerated
    for model in (make("bert", is_decoder=True), make("modernbert"), make("vit")):
        assert all(row.runs != "its layers without padding" for row in fastllm.accelerate(model).rows)
    model = make("bert", chunk_size_feed_forward=1)
    report = fastllm.accelerate(model)
    assert any("chunk_size_feed_forward" in row.reason for row in report.left_alone)


def test_a_sequence_of_padding_alone():
    model, given = make("bert").bert, batch([5, 0, 2], 5)
    expected = model(**given).last_hidden_state[0]
    fastllm.accelerate(model)
    hidden = model(**given).last_hidden_state
    torch.testing.assert_close(hidden[0], expected)
    assert (hidden[1] == 0).all()


def test_gradient_checkpointing_and_restore():
    model, given = make("distilbert").train(), batch()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    labels = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
    grads = []
    for checkpointed in (False, True):
        with fastllm.accelerated(model, loss=False):
            if checkpointed:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            model.zero_grad()
            model(**given, labels=labels).loss.backward()
            grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    shapes = seen_by_layers(model)
    model(**given)
    assert shapes == [(4, 17, 32)], "restored"


def test_few_rows_are_not_asked_about(monkeypatch):
    """Where our product is never the faster one, a linear layer is PyTorch's without a look at the table."""
    from fastllm.ops import _tuned, linear

    model, given, asked = make("bert"), batch([5], 5), []
    fastllm.accelerate(model)
    plain = linear.kernels_for
    monkeypatch.setattr(
        linear, "kernels_for", lambda op, x, *rest: (asked.append(x.numel() // x.shape[-1]), plain(op, x, *rest))[1]
    )
    model(**given)
    assert not asked
    monkeypatch.setattr(linear, "_at_once", lambda *given: None)
    monkeypatch.setattr(_tuned, "fewest_rows", lambda dtype: 6)
    model(**given)
    assert not asked
    monkeypatch.setattr(_tuned, "fewest_rows", lambda dtype: 5)
    model(**given)
    assert set(asked) == {5}
    asked.clear()
    monkeypatch.setattr(_tuned, "fewest_rows", lambda dtype: 6)
    assert any(call.op == "linear" for call in fastllm.explain(model, **given).calls) and asked
