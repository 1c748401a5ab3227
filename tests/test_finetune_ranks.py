"""Fine-tuning and evaluation on several ranks: the steps and the scores of one process."""

import json
from pathlib import Path

import pytest
import ranks as processes
import torch
from check import assert_as_accurate
from conftest import tiny_corpus

pytest.importorskip("tokenizers")
pytest.importorskip("safetensors")
pytest.importorskip("sklearn")
pytest.importorskip("sacrebleu")
pytest.importorskip("rouge_score")
pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from fastllm.llm import distributed, evaluate, finetune
from fastllm.llm.checkpoint import load_model, save_model
from fastllm.llm.tokens import Tokenizer
from fastllm.model import Config, Transformer

ROOT = Path(__file__).resolve().parents[1]
SIZES = dict(d_model=16, heads=2, layers=2, d_ff=32, dropout=0.0, max_len=64)
# 33 rows in batches of 8: the last batch of each pass has one row for two ranks.
ROWS, OPTIONS = 33, dict(batch=8, epochs=2, optimizer="sgd", lr=0.05, evaluations=1, patience=0, max_len=48)
TASKS = {"classification": ("encoder", {}), "language": ("decoder", {}), "seq2seq": ("encoder-decoder", {})}
TASKS |= {"classification, lora": ("encoder", dict(lora=2, optimizer="adamw", lr=1e-2, accumulate=2))}
TASKS |= {
    "classification, bert": ("bert", {}),
    "classification, fsdp": ("encoder", {}),
    "language, fsdp": TASKS["language"],
    "seq2seq, fsdp": TASKS["seq2seq"],
    "seq2seq, t5, fsdp": ("t5", {}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models and data of every task."""
    folder = tmp_path_factory.mktemp("ranks")
    corpus = tiny_corpus(n=ROWS)
    tokenizer = Tokenizer.train_words([text for text, _ in corpus["train"]], 100)
    for kind in ("encoder", "decoder", "encoder-decoder"):
        torch.manual_seed(0)
        save_model(folder / kind, Transformer(Config(vocab=tokenizer.size, kind=kind, **SIZES)), tokenizer)
    for name, columns in (
        ("classification", "text\tlabel"),
        ("language", "prompt\tresponse"),
        ("seq2seq", "source\ttarget"),
    ):
        (folder / name).mkdir()
        for split, table in corpus.items():
            lines = "".join(f"{text}\t{label}\n" for text, label in table)
            (folder / name / f"{split}.tsv").write_text(f"{columns}\n{lines}")
    return folder


def bert(folder):
    transformers = pytest.importorskip("transformers")
    if not (folder / "bert").exists():
        tokenizer = Tokenizer.load(folder / "encoder")
        sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
        sizes |= dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, max_position_embeddings=64)
        torch.manual_seed(0)
        save_model(
            folder / "bert",
            transformers.BertModel(transformers.BertConfig(vocab_size=tokenizer.size, **sizes)),
            tokenizer,
        )


def t5(folder):
    """Of transformers, with tied embeddings, and its own generate."""
    transformers = pytest.importorskip("transformers")
    if not (folder / "t5").exists():
        tokenizer = Tokenizer.load(folder / "encoder")
        sizes = dict(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0)
        special = dict(pad_token_id=tokenizer.pad, eos_token_id=tokenizer.eos, decoder_start_token_id=tokenizer.pad)
        config = transformers.T5Config(vocab_size=tokenizer.size, **sizes, **special)
        torch.manual_seed(0)
        save_model(folder / "t5", transformers.T5ForConditionalGeneration(config), tokenizer)


def one_rank(folder, name, out, more, mode="ddp"):
    model, options = TASKS[name]
    task = name.partition(",")[0]
    with distributed.start(mode) as ranks:
        evaluated, share = [], ranks.share
        ranks.share = lambda rows: (evaluated.append(row) or row for row in share(rows))
        given = OPTIONS | options | more
        found = finetune.run(task, folder / model, folder / task, out, **given, ranks=ranks)
    splits = ["valid"] * len(found["history"]["evaluations"]) + ["test"]
    count = sum(len(range(ranks.rank, len(tiny_corpus(n=ROWS)[split]), ranks.ranks)) for split in splits)
    assert len(evaluated) == count


def outcome(out):
    found = json.loads((out / "result.json").read_text())
    history, state = found["history"], load_model(out).model.state_dict()
    return dict(
        losses=torch.tensor(history["loss"], dtype=torch.float64),
        evaluations=torch.tensor([e["loss"] for e in history["evaluations"]] + [found["test"]["loss"]]).double(),
        scores=floats(found["test"]),
        parameters=torch.cat([state[key].flatten().double() for key in sorted(state)]),
    ), history["tokens"]


def in_fp64(monkeypatch, module, name):
    """What `module.name` loads from now on computes in fp64."""
    load = getattr(module, name)

    def exact(*args, **options):
        loaded = load(*args, **options)
        loaded.model.double()
        return loaded

    monkeypatch.setattr(module, name, exact)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if "t5" in n else n for n in TASKS])
def test_two_ranks_take_the_steps_of_one(folder, name, monkeypatch):
    if "bert" in name:
        bert(folder)
    if "t5" in name:
        t5(folder)
    one_rank(folder, name, folder / f"one {name}", {})
    mode = "fsdp" if "fsdp" in name else "ddp"
    processes.run_launched(one_rank, 2, folder, name, folder / f"two {name}", {}, mode)
    in_fp64(monkeypatch, finetune, "prepare")
    one_rank(folder, name, folder / f"exact {name}", {})
    (two, tokens), (one, expected), (truth, _) = (outcome(folder / f"{n} {name}") for n in ("two", "one", "exact"))
    assert tokens == expected
    for key, value in two.items():
        assert_as_accurate(value.float(), one[key].float(), truth[key], f"{name}: {key}")


HEADS = {
    "classification": dict(kind="encoder", classes=2),
    "language": dict(kind="decoder"),
    "seq2seq": dict(kind="encoder-decoder"),
    "questions": dict(kind="encoder", classes=2, per_token=True),
}


def evaluated(folder, name):
    with distributed.start(cure="nothing was written") as ranks:
        out = folder / f"evaluated {name} by {ranks.ranks}"
        options = dict(out=out, batch=4, max_len=48, fresh=True)
        return evaluate.run(folder / f"{name} model", folder / name, **options, ranks=ranks)


def floats(scores):
    found = [scores[key] for key in sorted(scores) if isinstance(scores[key], float)]
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("name", HEADS)
def test_two_ranks_score_what_one_does(folder, name, monkeypatch):
    tokenizer = Tokenizer.load(folder / "encoder")
    meta = dict(classification=dict(classes=["bad", "good"]), questions=dict(task="question-answering")).get(name, {})
    torch.manual_seed(0)
    model = Transformer(Config(vocab=tokenizer.size, **SIZES | HEADS[name]))
    save_model(folder / f"{name} model", model, tokenizer, **meta)
    if name == "questions":
        (folder / name).mkdir()
        table = [(text, text, text.split()[n % 2]) for n, (text, _) in enumerate(tiny_corpus()["test"])]
        lines = "".join("\t".join(row) + "\n" for row in table)
        (folder / name / "test.tsv").write_text(f"question\tcontext\tanswer\n{lines}")
    processes.run_launched(evaluated, 3, folder, name)
    result = json.loads((folder / f"evaluated {name} by 3" / "result.json").read_text())
    several, one = result["scores"], evaluated(folder, name)["scores"]
    assert result["settings"]["processes"] == 3 and several.keys() == one.keys()
    for key, value in one.items():
        if not isinstance(value, float) and key != "examples":
            assert several[key] == value, key
    in_fp64(monkeypatch, evaluate, "load_model")
    truth = floats(evaluated(folder, name)["scores"])
    assert_as_accurate(floats(several).float(), floats(one).float(), truth, name)
    assert len(several.get("examples", [])) == len(one.get("examples", []))


def in_step(folder, mode):
    """Rank n has n batches, and of another pass each has none; and pretraining's evaluation, of five batches."""
    from fastllm.llm.objectives import NextToken

    with distributed.start(mode) as ranks:
        own = [f"{ranks.rank}{n}" for n in range(ranks.rank)]
        taken = list(ranks.in_step(own))
        assert [batch for batch, counts in taken if counts] == own
        extra = [batch for batch, counts in taken if not counts]
        last = (own or ["10"])[-1]  # of the first rank that has any
        assert extra == ([last] * (ranks.ranks - 1 - ranks.rank) if mode == "fsdp" else [])
        assert list(ranks.in_step([])) == []
        objective = NextToken(folder / "text" / "bytes", 16, 4)
        torch.manual_seed(0)
        model = Transformer(Config(vocab=objective.tokenizer.size, **SIZES)).eval()
        ranks.spread(model)
        batches = []
        objective.arranged = lambda inputs: batches.append(inputs) or NextToken.arranged(objective, inputs)
        with ranks.evaluating(model):
            found = objective.evaluate(model, "valid", None, ranks)
        assert len(batches) == (2 if mode == "fsdp" or ranks.rank < 2 else 1)
        if ranks.first:
            (folder / f"evaluated {mode}.json").write_text(json.dumps(found))


@pytest.mark.parametrize("mode", distributed.MODES)
def test_batches_are_taken_in_step_where_they_must(folder, mode):
    from fastllm.llm import shards
    from fastllm.llm.objectives import NextToken

    if not (folder / "text").exists():
        (folder / "text").mkdir()
        for split in ("train", "valid", "test"):
            (folder / "text" / f"{split}.txt").write_text("the cat sat on the mat.\n" * 13 + "the end")
        shards.tokenized(folder / "text", "bytes")
    processes.run_launched(in_step, 3, folder, mode)
    objective, several = (
        NextToken(folder / "text" / "bytes", 16, 4),
        json.loads((folder / f"evaluated {mode}.json").read_text()),
    )
    torch.manual_seed(0)
    model = Transformer(Config(vocab=objective.tokenizer.size, **SIZES)).eval()
    assert len(list(objective.passes("valid", None))) == 5
    one, truth = objective.evaluate(model, "valid", None), objective.evaluate(model.double(), "valid", None)
    assert several["tokens"] == one["tokens"]
    assert_as_accurate(floats(several).float(), floats(one).float(), floats(truth), mode)
