"""Evaluation: streamed, without logits in memory, as a JSON file and a page that needs nothing else."""

import json

import pytest
import torch

pytest.importorskip("tokenizers")
pytest.importorskip("safetensors")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

import fastllm
from fastllm.cli import main as cli
from fastllm.llm.checkpoint import save_model
from fastllm.llm.meter import LiveBytes
from fastllm.llm.tasks import TASKS, base
from fastllm.llm.tokens import Tokenizer
from fastllm.model import Config, Transformer

SIZES = dict(d_model=16, heads=2, layers=1, d_ff=32, dropout=0.0, max_len=64)


@pytest.fixture
def classifier(tmp_path):
    tokenizer = Tokenizer.bytes()
    model = Transformer(Config(vocab=tokenizer.size, kind="encoder", classes=3, **SIZES))
    save_model(tmp_path / "model", model, tokenizer, classes=["good", "bad", "<script>"])
    (tmp_path / "test.tsv").write_text("text\tlabel\n" + "a text & <b>\tgood\nanother\tbad\n" * 9)
    return tmp_path / "model"


def test_the_page_needs_nothing_else(classifier, tmp_path, capsys):
    assert cli(["evaluate", str(classifier), str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    assert "accuracy" in capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert sum(map(sum, result["scores"]["confusion"])) == result["scores"]["rows"] == 18
    page = (tmp_path / "out" / "index.html").read_text()
    assert page.count("<svg") == 1 and "&lt;script&gt;" in page and "<script" not in page
    for leftover in ("{{", "{%", "#01020", 'src="http', 'href="http://fonts'):
        assert leftover not in page
    assert (tmp_path / "out" / "confusion.png").read_bytes()[1:4] == b"PNG"

    # Another one is not mixed into it, nor into what is no evaluation.
    again = ["evaluate", str(classifier), str(tmp_path), "--out", str(tmp_path / "out")]
    assert cli(again) == 2 and "is there already; --fresh replaces it" in capsys.readouterr().err
    (tmp_path / "out" / "confusion.png").write_text("of before")
    assert cli([*again, "--fresh", "--batch", "5"]) == 0
    assert json.loads((tmp_path / "out" / "result.json").read_text())["settings"]["batch"] == 5
    assert (tmp_path / "out" / "confusion.png").read_bytes()[1:4] == b"PNG"
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert cli([*again, "--fresh"]) == 2 and "would be lost (notes.txt)" in capsys.readouterr().err
    assert len(list((tmp_path / "out").iterdir())) == 4


def test_memory_does_not_grow_with_the_data(classifier, monkeypatch):
    monkeypatch.setattr(base, "POOL", 3)
    task = TASKS["classification"](Tokenizer.bytes(), 64, dict(classes=["a", "b"]))
    model = Transformer(Config(vocab=261, kind="encoder", classes=2, **SIZES)).eval()
    made = [0]

    def rows():
        for n in range(200):
            made[0] = n + 1
            yield dict(text="x" * (1 + n % 7), label="ab"[n % 2])

    ahead, seen, collate = [], [0], task.collate

    def counting(examples):
        ahead.append(made[0] - seen[0])
        seen[0] += len(examples)
        return collate(examples)

    monkeypatch.setattr(task, "collate", counting)
    assert task.scores(model, rows(), 8)["rows"] == seen[0] == 200
    assert max(ahead) == 3 * 8


@pytest.mark.parametrize("kind", ["decoder", "encoder-decoder"])
def test_no_logits_are_kept(kind):
    """A vocabulary so large that logits would be most of the memory."""
    torch.manual_seed(0)
    tokenizer, V = Tokenizer.bytes(), 20000
    model = Transformer(Config(vocab=V, kind=kind, **SIZES)).eval()
    task = TASKS["language-model" if kind == "decoder" else kind](tokenizer, 64)
    if kind == "decoder":
        rows = [dict(tokens=torch.randint(261, (64,)).tolist(), bytes=64) for _ in range(16)]
    else:
        rows = [dict(source="x" * 60, target="y" * 60)] * 16
    with LiveBytes() as memory:
        got = task.scores(model, rows, 16, quick=True)
    tokens = got["tokens"]
    assert memory.peak < 4 * tokens * V / 4, f"{memory.peak} bytes for {tokens} tokens"
    plain = Transformer(model.config, accelerated=False).eval()
    plain.load_state_dict(model.state_dict())
    with LiveBytes() as memory:
        expected = task.scores(plain, rows, 16, quick=True)
    assert memory.peak >= 4 * tokens * V
    exact = task.scores(plain.double(), rows, 16, quick=True)["loss"]
    error, peers = abs(got["loss"] - exact), abs(expected["loss"] - exact)
    assert error <= 2 * peers + torch.finfo(torch.float32).eps * exact


SEQ2SEQ = {
    "t5": ("T5", "T5ForConditionalGeneration", dict(d_kv=8, d_ff=32, num_layers=1, num_heads=2)),
    "untied": ("T5", "T5ForConditionalGeneration", dict(d_ff=32, num_layers=1, num_heads=2, tie_word_embeddings=False)),
    "bias": ("Marian", "MarianMTModel", dict(encoder_layers=1, decoder_layers=1, pad_token_id=0)),
}


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_no_logits_are_kept_of_encoder_decoders_of_transformers(name, monkeypatch):
    transformers = pytest.importorskip("transformers")
    family, cls, sizes = SEQ2SEQ[name]
    torch.manual_seed(0)
    sizes = dict(vocab_size=20000, d_model=16, decoder_start_token_id=0) | sizes
    if family == "Marian":
        sizes |= {
            f"{side}_{what}": n
            for side in ("encoder", "decoder")
            for what, n in (("attention_heads", 2), ("ffn_dim", 32))
        }
    model = getattr(transformers, cls)(getattr(transformers, f"{family}Config")(**sizes)).eval()
    if family == "Marian":
        model.final_logits_bias.normal_()
    task, rows = TASKS["encoder-decoder"](Tokenizer.bytes(), 64), [dict(source="x" * 60, target="yz" * 20)] * 16
    peer = task.scores(model, rows, 16, quick=True)["loss"]
    fastllm.accelerate(model)
    with LiveBytes() as memory:
        got = task.scores(model, rows, 16, quick=True)
    assert memory.peak < 4 * got["tokens"] * 20000 / 4
    exact = task.scores(fastllm.restore(model).double(), rows, 16, quick=True)["loss"]
    assert abs(got["loss"] - exact) <= 2 * abs(peer - exact) + torch.finfo(torch.float32).eps * exact
    # One that does more behind its head is asked for its own loss.
    model.float()
    forward = type(model).forward

    def capped(self, *args, **kwargs):
        found = forward(self, *args, **kwargs)
        found.logits = found.logits.tanh()
        found.loss = found.logits.sum()
        return found

    monkeypatch.setattr(type(model), "forward", capped)
    fastllm.accelerate(model)
    other = TASKS["encoder-decoder"](Tokenizer.bytes(), 64)
    batch = other.collate(other.encode(rows[0]))
    assert torch.equal(other.loss_sum(model, batch), other.loss(model, batch) * other.weight(batch))


@pytest.mark.parametrize(
    "given, message",
    [
        (["gone", "test.tsv"], "is no folder"),
        (["model", "gone.tsv"], "no such file"),
        (["model", "model/config.json"], "is no file for classification: .tsv or .jsonl"),
        (["model", ".", "--split", "valid"], "there is no valid.tsv or valid.jsonl in it"),
        (["model", "test.tsv", "--task", "questions"], "holds a model for classification, one for question-answering"),
    ],
)
def test_bad_input_is_one_line(classifier, tmp_path, capsys, monkeypatch, given, message):
    monkeypatch.chdir(tmp_path)
    assert cli(["evaluate", *given, "--out", "out"]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_model_that_is_for_no_task(tmp_path, capsys):
    save_model(tmp_path / "m", Transformer(Config(vocab=261, kind="encoder", **SIZES)), Tokenizer.bytes())
    (tmp_path / "test.tsv").write_text("text\tlabel\na\tb\n")
    assert cli(["evaluate", str(tmp_path / "m"), str(tmp_path / "test.tsv")]) == 2
    assert "holds a model for encoder, which is none of the tasks" in capsys.readouterr().err
