"""`fastllm bench model`: one set of weights for everybody; who is wrong or missing is said to be so."""

import json

import pytest
import torch

from fastllm import cli
from fastllm.bench import model as bench
from fastllm.bench import subjects, tasks

QUICK = ["--rounds", "1", "--block-ms", "0.01", "--rivals", "sdpa"]


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(subjects.REFERENCE, "tiny", (32, 1, 16, 2, 2, 8))
    sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    monkeypatch.setitem(subjects.CONFIGS, "tiny-llama", ("llama", sizes))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A folder with a BERT of one layer and a tokenizer of whole words."""
    transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

    words = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words.train_from_iterator(["the value of an object is a name"], trainers.WordLevelTrainer(special_tokens=marks))
    words.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    folder = tmp_path_factory.mktemp("bert")
    given = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token"), marks, strict=True))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **given).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    transformers.BertModel(transformers.BertConfig(**sizes)).save_pretrained(folder)
    return folder


def run(tmp_path, *arguments, expected=0):
    assert cli.main(["bench", "model", *arguments, *QUICK, "--out", str(tmp_path)]) == expected
    return json.loads((tmp_path / "model.json").read_text())


def test_reference(tiny, tmp_path, capsys):
    report = run(tmp_path, "tiny")
    rows = report["runs"]["stock"]["rows"]
    assert [row["task"] for row in rows] == ["prefill", "train"] and report["model"]["kind"] == "decoder"
    for row in rows:
        assert row["ms"].keys() == row["error"].keys() == row["peak_bytes"].keys() == {"fastllm", "sdpa"}
        assert row["ratio"].keys() == {"sdpa"} and len(row["samples_s"]["fastllm again"]) >= 1
        assert 0 < row["error"]["fastllm"] < 1e-5
        assert {"attention", "rms_norm", "elsewhere"} <= {line[0] for line in row["explained"]}
    assert rows[0]["rate"]["sdpa"] == pytest.approx(8e3 / rows[0]["ms"]["sdpa"]["median"])
    shown = capsys.readouterr().out
    assert "train 2x8, float32, tokens/s" in shown and "where fastllm's time goes" in shown


def test_hugging_face_decoder(tiny, tmp_path):
    pytest.importorskip("transformers", reason="the extra hf is not installed")
    report = run(tmp_path, "tiny-llama", "--length", "6", "--dtype", "bfloat16")
    prefill, decode, train = report["runs"]["stock"]["rows"]
    assert decode["ms"].keys() == {"fastllm", "sdpa", "fastllm.generate"} and train["task"] == "train"
    assert prefill["size"] == "1x6" and all(1e-4 < row["error"]["sdpa"] < 0.1 for row in (prefill, decode, train))


def test_encoder(encoder, tmp_path):
    report = run(tmp_path, str(encoder), "--batch", "1,3", "--sentences", "6")
    one, three = report["runs"]["stock"]["rows"]
    assert one["ms"].keys() == {"fastllm", "sdpa"}, "there is no padding to leave out"
    assert three["ms"].keys() == {"fastllm", "sdpa", "fastllm, packed"} and "padded" in three["size"]
    assert one["unit"] == "sentences/s" and not three["wrong"]


def test_a_wrong_model_is_not_timed(tiny, tmp_path, monkeypatch, capsys):
    made = subjects.Subject.variants

    def spoilt(self, wanted):
        found = made(self, wanted)
        found["fastllm"].decoder.norm.register_forward_hook(lambda module, args, y: (y[0] * 1.001, y[1]))
        return found

    monkeypatch.setattr(subjects.Subject, "variants", spoilt)
    (row,) = run(tmp_path, "tiny", "--tasks", "prefill", expected=1)["runs"]["stock"]["rows"]
    assert "norm of the error" in row["wrong"] and "ms" not in row
    assert "WRONG, so not timed" in capsys.readouterr().out


def test_a_rival_that_fails_is_named(tiny):
    def fail():
        raise RuntimeError("no such engine\nand more")

    work = tasks.Work("prefill", "", 1, "tokens/s", lambda model: lambda: model, {"other": fail})
    calls, results, missing = bench.calls_of(work, {"fastllm": torch.ones(1)})
    assert calls.keys() == results.keys() == {"fastllm"} and missing == {"other": "RuntimeError: no such engine"}


def test_contenders_share_their_weights(tiny):
    subject = subjects.load("tiny")
    variants = subject.variants(["eager", "sdpa"])
    assert variants.keys() == {"fastllm", "eager", "sdpa"}
    for model in variants.values():
        assert all(a is b for a, b in zip(model.parameters(), subject.model.parameters(), strict=True))
        assert model.head.weight is model.embedding.weight
    assert variants["fastllm"].accelerated and not variants["sdpa"].accelerated


def test_dropout_is_off():
    transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")
    config = transformers.GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=1)
    assert config.attn_pdrop == 0.1
    model = subjects.without_dropout(transformers.GPT2LMHeadModel(config)).train()
    x = torch.arange(8)[None]
    assert torch.equal(model(x).logits, model(x).logits) and torch.equal(model(x).logits, model.eval()(x).logits)


def test_sentences_are_the_same_every_time():
    def words(text):
        return {"input_ids": text.split()}

    chosen = subjects.sentences(20, words, 8, 12)
    assert chosen == subjects.sentences(30, words, 8, 12)[:20] and len(set(chosen)) == 20
    assert all(8 <= len(sentence.split()) <= 12 for sentence in chosen)
    with pytest.raises(ValueError, match="10000000 are needed"):
        subjects.sentences(10**7, words, 8, 12)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["no-such-model"], "expected minilm, gpt2"),
        (["tiny", "--rivals", "compile"], "eager or sdpa"),
        (["tiny", "--tasks", "encode"], "there is no encode of tiny"),
    ],
)
def test_bad_input_is_one_line(tiny, arguments, said, capsys):
    pytest.importorskip("transformers", reason="the extra hf is not installed")
    assert cli.main(["bench", "model", *arguments]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1
