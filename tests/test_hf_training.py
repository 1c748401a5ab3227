"""Hugging Face models in training: checkpointing, autocast, torch.compile, the loss, Trainer and LoRA."""

import pytest
import torch
from check import assert_as_accurate

import fastllm

transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")

from hf_models import V, assert_same, inputs, make, run, without_dropout  # noqa: E402

import fastllm.hf  # noqa: E402

pytestmark = pytest.mark.usefixtures("every_size")


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "bert", "t5"])
def test_gradient_checkpointing(family, reentrant):
    model, batch = make(family).train(), inputs(family)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout", "dropout_prob"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    expected = run(model, batch)
    model.gradient_checkpointing_enable(dict(use_reentrant=reentrant))
    report = fastllm.accelerate(model, loss=False)
    assert_same(run(model, batch), expected)
    layers = [row for row in report.accelerated if row.runs == "attention"]
    assert layers and all(row.calls == 2 for row in layers), "each layer runs again in the backward pass"


# T5 gated: where a ReLU's input is nearly 0, its sign and with it a gradient hang on a rounding, whoever rounds.
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt_oss", "gpt2", "bert", "t5, gated"])
def test_bf16_autocast(family):
    """As far as bf16 tells: beside eager under autocast, against eager in fp32. Of several models together: of the few
    numbers of one, chance decides whose are nearer by a tenth."""
    draws = []
    for seed in range(4):
        model, batch = make(family, seed=seed), inputs(family, seed + 1)
        found = [run(model, batch)]
        for options in (None, {}):
            if options is not None:
                fastllm.accelerate(model)
            with torch.autocast("cpu", torch.bfloat16):
                found.append(run(model, batch))
        exact, peer, got = found
        assert got[0].dtype == peer[0].dtype
        draws.append([(g[0], g[1], torch.cat([g[2][name].flatten() for name in exact[2]])) for g in (got, peer, exact)])
    for kind in zip(*(zip(*draw) for draw in draws)):
        got, peer, exact = (torch.cat([x.flatten() for x in numbers]) for numbers in zip(*kind))
        assert_as_accurate(got.bfloat16(), peer.bfloat16(), exact.double())


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "bert", "gpt2"])
def test_compile_fullgraph(family):
    model, batch = make(family), inputs(family)
    model.loss_type = model.loss_type or "ForCausalLM"  # where there is none, transformers logs it, which is no graph
    expected = run(model, batch)
    fastllm.accelerate(model)
    used = {"attention", "rms_norm" if family == "llama" else "layer_norm"}
    used |= {"llama": {"rope", "swiglu"}, "gpt2": {"bias_gelu"}}.get(family, set())
    used |= {"cross_entropy"} if family != "bert" else set()  # whose class has a loss of its own
    ops = {f"fastllm.{op}_{way}" for op in used for way in ("fwd", "bwd")}
    assert ops_in_graph(model, batch) == ops - {"fastllm.rope_bwd"}, "the gradient of rope is rope"
    torch._dynamo.reset()
    logits, loss, gradients = run(torch.compile(model, fullgraph=True), batch)
    assert_same((logits, loss, {name.removeprefix("_orig_mod."): g for name, g in gradients.items()}), expected)


def ops_in_graph(model, batch):
    """The names of fastllm's ops in the one graph that torch.compile makes of the model, both ways."""
    found = set()

    def backend(graph, example):
        for part in graph.modules():
            if isinstance(part, torch.fx.GraphModule):
                found.update(str(node.target).removesuffix(".default") for node in part.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    torch.compile(model, backend=backend, fullgraph=True)(**batch)
    return {name for name in found if name.startswith("fastllm.") and "linear" not in name}


# --- the loss ---


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "opt"])
def test_head_and_loss_are_one_in_training(family):
    """Loss and gradients as without; logits only in eval() and where they are asked for. gemma2 changes its logits."""
    model, batch = without_dropout(make(family)).train(), inputs(family)
    expected = run(model, batch)
    changed = family == "gemma2"
    with fastllm.accelerated(model, linear=False) as report:
        model.zero_grad()
        told = fastllm.explain(lambda: model(**batch))
        fused = {"linear_cross_entropy"} if not changed else {"cross_entropy"}
        assert {call.op for call in told.calls if "entropy" in call.op} == fused
        assert ("logits" in told.result) == changed
        told.result.loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        assert_same((expected[0], told.result.loss.detach(), gradients), expected)
        assert_same(run(model, batch | dict(skip_logits=False)), expected)
        (row,) = [row for row in report.rows if row.kind == "loss"]
        assert row.calls and row.runs.startswith("cross_entropy" if changed else "linear_cross_entropy")
        assert "logits" in model.eval()(**batch) and "logits" in model.train()(batch["input_ids"])
        with torch.no_grad():
            assert "logits" in model(**batch)
        assert isinstance(model(**batch, return_dict=False)[1], torch.Tensor)
    assert "logits" in model(**batch)


@pytest.mark.parametrize("again", ["as it is", "in a copy of the output"])
def test_logits_are_made_where_they_are_read(again):
    """By a loss of the user's own, whose gradients they have, or a metric; in the dtype that the head gave them. Of a
    copy too: accelerate's mixed precision makes the output anew."""
    model, batch = without_dropout(make("llama")).train(), inputs("llama")
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])

    def gradients(found):
        model.zero_grad()
        (found.loss + found.logits.square().mean()).backward()
        return found.logits.detach(), found.loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}

    expected = gradients(model(**batch))
    fastllm.accelerate(model)
    found = model(**batch)
    if again != "as it is":
        found = type(found)(dict(found.items()))
    assert "logits" not in found
    assert_same(gradients(found), expected)
    assert found["logits"] is found.logits
    with torch.autocast("cpu", torch.bfloat16):
        found = model(**batch)
    assert found.logits.dtype == torch.bfloat16


def test_logits_are_those_of_their_forward_pass():
    """Not of weights that an optimizer has changed since; without gradients where the pass had none."""
    model, batch = make("llama").train(), inputs("llama")
    fastllm.accelerate(model)
    found = model(**batch)
    found.loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    with pytest.raises(RuntimeError, match=r"before optimizer\.step"):
        found.logits  # noqa: B018
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = model.eval()(**batch, skip_logits=True)
        assert not found.logits.requires_grad and found.logits.is_inference() == (mode is torch.inference_mode)


def test_an_output_without_logits_is_stored_as_a_plain_one(tmp_path):
    model, batch = make("llama").train(), inputs("llama")
    fastllm.accelerate(model)
    found = model(**batch)
    torch.save((found.loss, found), tmp_path / "found.pt")
    loss, other = torch.load(tmp_path / "found.pt", weights_only=False)
    assert torch.equal(loss, found.loss) and torch.equal(other.loss, found.loss) and other.logits is None
    assert type(other) is transformers.modeling_outputs.CausalLMOutputWithPast


@pytest.mark.parametrize("training", [False, True])
def test_the_loss_of_a_part_of_a_batch(training):
    """num_items_in_batch is the divisor, as Trainer gives it for accumulated gradients; labels may come shifted."""
    model, batch = without_dropout(make("llama")).train(training), inputs("llama")
    shifted = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:].contiguous()
    for extra in (dict(num_items_in_batch=torch.tensor(7)), dict(num_items_in_batch=7), dict(shift_labels=shifted)):
        expected = model(**batch, **extra).loss
        with fastllm.accelerated(model):
            torch.testing.assert_close(model(**batch, **extra).loss, expected)


@pytest.mark.parametrize("training", [False, True])
def test_the_loss_of_a_bf16_model_is_fp32(training):
    """As transformers computes it, from logits that it copies to fp32."""
    model, batch = without_dropout(make("llama")).train(training), inputs("llama")
    exact = model(**batch).loss
    expected = model.bfloat16()(**batch).loss
    with fastllm.accelerated(model):
        got = model(**batch).loss
    assert got.dtype == expected.dtype == torch.float32
    assert_as_accurate(got.bfloat16(), expected.bfloat16(), exact.double())


def test_a_loss_of_the_users_own_stays():
    model, tokens = make("llama").train(), inputs("llama")["input_ids"]
    model.loss_function = lambda logits, labels, **kwargs: logits.square().mean()
    expected = model(tokens, labels=tokens).loss
    with fastllm.accelerated(model):
        torch.testing.assert_close(model(tokens, labels=tokens).loss, expected)
    model = make("llama").train()
    with fastllm.accelerated(model):
        model.loss_function = lambda logits, labels, **kwargs: logits.square().mean()
        torch.testing.assert_close(model(tokens, labels=tokens).loss, expected)


def test_a_hook_on_the_head_sees_logits():
    model, batch, seen = make("llama").train(), inputs("llama"), []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape[-1]))
    with fastllm.accelerated(model):
        assert "logits" in model(**batch)
    assert seen == [V]


def test_lora():
    peft = pytest.importorskip("peft", reason="the extra hf is not installed")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, lora_dropout=0.0, init_lora_weights=False)
    batch, found = inputs("llama"), []
    for when in ("never", "before", "after"):
        model = make("llama")
        report = fastllm.accelerate(model) if when == "before" else None
        torch.manual_seed(3)
        model = peft.get_peft_model(model, config)
        report = fastllm.accelerate(model) if when == "after" else report
        found.append(run(model, batch))
        assert report is None or not report.never_called
        assert "q_proj.lora_A" in " ".join(found[-1][2])
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])


@pytest.mark.parametrize("bf16", [False, True])
def test_trainer_callback(tmp_path, bf16):
    """In bf16 too, where Trainer puts a wrapper around the model's forward method before it begins."""
    pytest.importorskip("accelerate", reason="the extra hf is not installed")
    losses = []
    rows = [dict(input_ids=tokens, labels=tokens) for tokens in torch.randint(3, V, (16, 12)).tolist()]
    for callback in (None, fastllm.hf.Callback()):
        model = make("llama")
        arguments = transformers.TrainingArguments(
            tmp_path,
            max_steps=4,
            logging_steps=1,
            report_to="none",
            use_cpu=True,
            save_strategy="no",
            seed=1,
            bf16=bf16,
        )
        collate = transformers.DataCollatorWithFlattening(return_tensors="pt")
        trainer = transformers.Trainer(
            model, arguments, train_dataset=rows, data_collator=collate, callbacks=[callback] if callback else []
        )
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 4 and losses[0] == pytest.approx(losses[1], rel=2**-8 if bf16 else 1e-5)
    assert callback.report.accelerated and not callback.report.never_called and not callback.report.left_alone
    assert not fastllm.explain(model, **inputs("llama")).calls, "taken out again at the end"
