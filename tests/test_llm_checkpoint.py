"""Model folders: written whole or not at all, read back as they were, refused in one line."""

import errno
import json
import shutil

import pytest
import torch

pytest.importorskip("tokenizers")
pytest.importorskip("safetensors")

from fastllm.llm import checkpoint, files
from fastllm.llm.checkpoint import load_model, save_model
from fastllm.llm.tokens import Tokenizer
from fastllm.model import Config, Transformer

SIZES = dict(vocab=261, d_model=16, heads=2, layers=1, d_ff=32)


def saved(folder, **meta):
    model = Transformer(Config(**SIZES, window=(8, 0)))
    save_model(folder, model, Tokenizer.bytes(), **meta)
    return model


@pytest.mark.parametrize(
    "changes, task",
    [
        (dict(), "language-model"),
        (dict(tie_embeddings=False), "language-model"),
        (dict(kind="encoder-decoder"), "encoder-decoder"),
        (dict(kind="encoder", classes=3, positions="learned"), "classification"),
    ],
    ids=lambda value: str(value),
)
def test_a_model_comes_back_as_it_was(tmp_path, changes, task):
    model = Transformer(Config(**SIZES | changes)).eval()
    save_model(tmp_path / "m", model, Tokenizer.bytes(), classes=["a", "b", "c"])
    assert not list(tmp_path.glob(".*"))
    loaded = load_model(tmp_path / "m", task=task)
    assert loaded.meta == dict(task=task, classes=["a", "b", "c"]) and loaded.source == tmp_path / "m"
    assert loaded.model.config == model.config and not loaded.model.training
    state = loaded.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("\u00e9t\u00e9")) == "\u00e9t\u00e9"
    assert not load_model(tmp_path / "m", accelerate=False).model.accelerated
    if model.config.tie_embeddings and task == "language-model":
        assert loaded.model.head.weight is loaded.model.embedding.weight


def test_a_run_folder_means_its_best_or_its_latest_model(tmp_path):
    for step in (9, 10, 100):
        saved(tmp_path / f"step-{step:06d}")
    (tmp_path / "step-000200").mkdir()  # no model in it
    assert load_model(tmp_path).source.name == "step-000100"
    (tmp_path / "best").symlink_to("step-000009")
    assert load_model(tmp_path).source.name == "best"
    assert [path.name for path in checkpoint.steps(tmp_path)][-2:] == ["step-000100", "step-000200"]


def test_replacing_a_folder_is_all_or_nothing(tmp_path, monkeypatch):
    before = saved(tmp_path / "m", number=1)

    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files, "sync", full)
        with pytest.raises(OSError, match="No space left"):
            saved(tmp_path / "m", number=2)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    loaded = load_model(tmp_path / "m")
    assert loaded.meta["number"] == 1 and torch.equal(loaded.model.head.weight, before.head.weight)
    saved(tmp_path / "m", number=3)
    assert load_model(tmp_path / "m").meta["number"] == 3 and [path.name for path in tmp_path.iterdir()] == ["m"]


def cut(path, to):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * to)])


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda m: shutil.rmtree(m), "is no folder"),
        (lambda m: (m / "config.json").unlink(), "has no config.json, no `best`"),
        (lambda m: cut(m / "config.json", 0.5), "config.json cannot be read"),
        (lambda m: (m / "config.json").write_text("[]"), "holds no JSON object"),
        (lambda m: (m / "config.json").write_text("{}"), "neither a model of fastllm nor one of Hugging Face"),
        (lambda m: (m / "model.safetensors").unlink(), "model.safetensors is missing or damaged"),
        (lambda m: cut(m / "model.safetensors", 0.9), "model.safetensors is missing or damaged"),
        (lambda m: cut(m / "model.safetensors", 0), "model.safetensors is missing or damaged"),
        (lambda m: (m / "tokenizer.json").unlink(), "there is no .*tokenizer.json"),
        (lambda m: cut(m / "tokenizer.json", 0.5), "tokenizer.json is not a tokenizer"),
    ],
)
def test_what_is_damaged_is_one_line(tmp_path, damage, message):
    saved(tmp_path / "m")
    damage(tmp_path / "m")
    with pytest.raises(ValueError, match=message) as caught:
        load_model(tmp_path / "m")
    assert "\n" not in str(caught.value)


def test_a_config_that_does_not_fit_is_one_line(tmp_path):
    saved(tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    config = json.loads(path.read_text())
    for change, message in (
        (dict(d_ff=64), "does not fit its config.json, see decoder.blocks.0.feed_forward.down.weight"),
        (dict(layers=2), "does not fit"),
        (dict(heads=3), "describes no model of this version: Config: heads must divide"),
        (dict(depth=2), "describes no model of this version"),
    ):
        path.write_text(json.dumps(config | dict(model=config["model"] | change)))
        with pytest.raises(ValueError, match=message):
            load_model(tmp_path / "m")
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="holds a model for language-model, one for classification is needed"):
        load_model(tmp_path / "m", task="classification")
    with pytest.raises(ValueError, match="num_labels is for folders of Hugging Face"):
        load_model(tmp_path / "m", num_labels=2)


def test_hugging_face_folders(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = dict(vocab_size=261, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()
    ids = torch.tensor([[5, 6, 7]])
    expected = model(ids).logits
    save_model(tmp_path / "m", model, Tokenizer.bytes(), note="ours")
    plain = load_model(tmp_path / "m", accelerate=False)
    assert torch.equal(plain.model(ids).logits, expected)
    assert plain.meta == dict(task="language-model", note="ours", new=[])
    assert "Llama" in type(plain.model).__name__ and plain.tokenizer.size == 261
    accelerated = load_model(tmp_path / "m")
    save_model(tmp_path / "again", accelerated.model, accelerated.tokenizer)
    assert torch.equal(load_model(tmp_path / "again", accelerate=False).model(ids).logits, expected)
    classifier = load_model(tmp_path / "m", task="classification", num_labels=3)
    assert classifier.meta["new"] == ["score.weight"] and classifier.meta["task"] == "classification"
    cut(tmp_path / "m" / "model.safetensors", 0.9)
    with pytest.raises(ValueError, match="cannot be loaded as LlamaForCausalLM") as caught:
        load_model(tmp_path / "m")
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="task must be one of"):
        load_model(tmp_path / "m", task="poetry")
