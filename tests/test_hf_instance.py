"""One Hugging Face model is accelerated, and nothing else: its config, copies, other models, and back."""

import copy
import pickle

import pytest
import torch

import fastllm

transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")

from hf_models import GQA, OTHERS, V, assert_same, inputs, make, run  # noqa: E402

import fastllm.hf  # noqa: E402

pytestmark = pytest.mark.usefixtures("every_size")


def test_another_model_of_the_same_config_is_untouched():
    model = make("llama")
    other = type(model)(model.config)
    fastllm.accelerate(model)
    assert other.config._attn_implementation == "eager" and model.config._attn_implementation == "fastllm"
    told = fastllm.explain(other, **inputs("llama"))
    assert not told.calls
    model.config.use_cache = False
    assert other.config.use_cache is False, "it is one config still"


def test_a_later_choice_of_attention_holds():
    model = make("llama")
    report = fastllm.accelerate(model, norms=False, mlp=False, rope=False, linear=False, loss=False)
    model.set_attn_implementation("sdpa")
    assert not fastllm.explain(model, **inputs("llama")).calls and len(report.never_called) == 2
    fastllm.restore(model)
    assert model.config._attn_implementation == "sdpa"


def test_copies_are_plain(tmp_path):
    model, batch = make("bert"), inputs("bert")
    expected = run(model, batch)
    fastllm.accelerate(model)
    torch.save(model, tmp_path / "model.pt")
    model.save_pretrained(tmp_path / "model")
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(tmp_path / "model.pt", weights_only=False),
        type(make("bert")).from_pretrained(tmp_path / "model", attn_implementation="eager").eval(),
    ]
    for other in copies:
        assert [type(m) for m in other.modules()] == [type(m) for m in make("bert").modules()]
        assert type(other.config) is transformers.BertConfig and other.config._attn_implementation == "eager"
        assert not fastllm.explain(other, **batch).calls
        assert_same(run(other, batch), expected)
        assert fastllm.accelerate(other).accelerated
        assert_same(run(other, batch), expected)
    assert "fastllm" not in (tmp_path / "model/config.json").read_text()


def test_the_config_is_saved_as_it_was():
    model = make("gemma3")
    before = model.config.to_dict(), model.config.to_json_string()
    fastllm.accelerate(model)
    assert (model.config.to_dict(), model.config.to_json_string()) == before
    assert repr(model) == repr(make("gemma3")) and isinstance(model.config, transformers.Gemma3TextConfig)


@pytest.mark.parametrize("family", OTHERS)
def test_models_that_no_interface_reaches(family):
    model, batch = make(family), inputs("llama")
    expected = run(model, batch)
    report = fastllm.accelerate(model)
    (refused,) = report.left_alone
    assert refused.kind == "attention" and "AttentionInterface" in refused.reason and refused.reason in str(report)
    assert model.config._attn_implementation == "eager"
    assert_same(run(model, batch), expected)
    fastllm.restore(model)
    with pytest.raises(RuntimeError, match="AttentionInterface"):
        fastllm.accelerate(model, strict=True)
    assert [type(m) for m in model.modules()] == [type(m) for m in make(family).modules()]


@pytest.mark.parametrize("chosen", ["eager", "grouped_mm"])
@pytest.mark.parametrize("family, blocks", [("mixtral", (0, 1)), ("gpt_oss", (0, 1)), ("deepseek_v3", (1,))])
def test_experts_are_reported(family, blocks, chosen):
    """One row per block, with what runs there; the same experts as before run."""
    model, batch = make(family), inputs(family)
    model.config._experts_implementation = chosen
    expected = run(model, batch)
    report = fastllm.accelerate(model)
    assert [row.name for row in report.left_alone] == [f"model.layers.{n}.mlp.experts" for n in blocks]
    runs = "its own loop" if chosen == "eager" else "'grouped_mm' runs"
    assert {row.kind for row in report.left_alone} == {"mlp"} and all(runs in row.reason for row in report.left_alone)
    assert_same(run(model, batch), expected)
    assert not fastllm.accelerate(model, mlp=False).left_alone


HYBRIDS = {
    "mamba 2": (
        "Mamba2ForCausalLM",
        "Mamba2Config",
        dict(hidden_size=32, num_hidden_layers=2, state_size=8, num_heads=8, head_dim=8, n_groups=1, chunk_size=8),
    ),
    "recurrent gemma": (
        "RecurrentGemmaForCausalLM",
        "RecurrentGemmaConfig",
        {**GQA, "num_hidden_layers": 3, "attention_window_size": 8, "lru_width": 32},
    ),
}


@pytest.mark.parametrize("family", HYBRIDS)
def test_recurrent_layers_beside_accelerated_ones(family):
    """A norm that may get a gate stays as it is; matrices of a gate per head are no experts."""
    cls, config, options = HYBRIDS[family]
    torch.manual_seed(0)
    model = getattr(transformers, cls)(getattr(transformers, config)(**options | dict(vocab_size=V))).eval()
    batch = dict(input_ids=inputs("llama")["input_ids"])
    batch["labels"] = batch["input_ids"]
    expected = run(model, batch)
    report = fastllm.accelerate(model)
    assert {row.module for row in report.left_alone} == ({"MambaRMSNormGated"} if family == "mamba 2" else set())
    assert_same(run(model, batch), expected)


def test_bloom_by_name_is_right_all_the_same():
    """It takes the setting, never calls the function, and adds the mask to its scores."""
    batch = inputs("llama")
    model = make("bloom", "fastllm")
    assert {call.op for call in fastllm.explain(model, **batch).calls} == set()
    assert_same(run(model, batch), run(make("bloom"), batch))


def test_continuous_batching_is_refused():
    q = torch.randn(1, 2, 3, 8)
    with pytest.raises(ValueError, match="paged cache"):
        fastllm.hf.attention_forward(torch.nn.Module(), q, q, q, None, cache=object())


def test_transformers_is_not_imported_for_others():
    import subprocess
    import sys

    code = "import sys, torch, fastllm; fastllm.accelerate(torch.nn.LayerNorm(4)); print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
