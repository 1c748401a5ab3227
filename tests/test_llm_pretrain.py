"""`fastllm pretrain`: settings, packing, the three objectives, and resuming by command."""

import json
from collections import Counter

import pytest
import torch

pytest.importorskip("tokenizers")
pytest.importorskip("safetensors")

from fastllm.cli import main as cli
from fastllm.llm import data, objectives, pretrain, settings, shards
from fastllm.llm.checkpoint import load_model
from fastllm.model import Config

TINY = dict(
    tokenizer="bytes", context=24, d_model=16, heads=2, layers=1, d_ff=32, steps=30, batch=4, lr=1e-2, warmup=3,
    evaluate_every=10, sample_every=0,
)  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def text(tmp_path):
    """A folder of documents."""
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"the cat number {i} sat on the mat" for i in range(120)))
    return data.build_from_files([path], tmp_path / "text")["folder"]


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.tsv"
    words = "one two three four five six".split()
    rows = (f"{a} {b} {c}\t{a.upper()} {b.upper()} {c.upper()}\n" for a in words for b in words for c in words)
    path.write_text("source\ttarget\n" + "".join(rows))
    return data.build_from_files([path], tmp_path / "pairs")["folder"]


@pytest.mark.parametrize("name", settings.names())
def test_presets_are_complete_and_right(name):
    found = settings.read(name)
    model = {key: found[key] for key in settings.SECTIONS["model"]}
    objective = objectives.OBJECTIVES[found["task"]]
    Config(vocab=found["vocab"], kind=objective.kind, masked_lm=objective.masked_lm, **model)
    recipe = settings.defaults(settings.Recipe)
    settings.Recipe(**{key: found[key] for key in recipe})


@pytest.mark.parametrize(
    "content, message",
    [
        ("task = 'language-model'\n[training]\nlrr = 1\n", r"\[training\]: unknown key 'lrr'; did you mean 'lr'\?"),
        ("task = 'language-model'\n[model]\ndmodel = 1\n", "unknown key 'dmodel'; did you mean 'd_model'"),
        ("task = 'language-model'\n[trainig]\nlr = 1\n", "unknown key 'trainig'; did you mean 'training'"),
        ("task = 'language-model'\n[model]\nvocab = 1\n", "unknown key 'vocab'"),
        ("task = 'language-model'\n[training]\nlr = 'big'\n", "lr must be float, got 'big'"),
        ("task = 'language-model'\n[training]\nsteps = 1.5\n", "steps must be int, got 1.5"),
        ("task = 'poetry'\n", "task must be one of language-model, masked-lm, encoder-decoder, got 'poetry'"),
        ("task = \n", "is not TOML"),
    ],
)
def test_a_config_with_a_mistake_is_one_line(tmp_path, text, capsys, content, message):
    path = tmp_path / "my.toml"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        settings.read(str(path))
    assert cli(["pretrain", text, "--config", str(path), "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "run").exists()


def test_settings_override_a_config_and_are_checked():
    found = settings.overridden(settings.read("llama-cpu"), dict(lr=1, window=[8, 0]))
    assert found["lr"] == 1.0 and found["window"] == [8, 0] and found["norm"] == "rmsnorm"
    assert settings.overridden(settings.read("llama-cpu"), dict(head_dim=32))["head_dim"] == 32
    unsaid = {key for keys in settings.SECTIONS.values() for key, value in keys.items() if value is None}
    assert unsaid == settings.OPTIONAL.keys()
    with pytest.raises(ValueError, match="unknown key 'learning_rate'; did you mean"):
        pretrain.run("nowhere", learning_rate=1)
    with pytest.raises(ValueError, match="is no file and no preset; there are bert-base, "):
        settings.read("gpt5")


def test_rows_are_packed_and_documents_begin_with_eos(text):
    task = objectives.NextToken(shards.tokenized(text, "bytes"), 24, 4)
    eos, seen = task.tokenizer.eos, []
    for n in range(task.rows // 4):
        inputs = task.arranged(task[n])
        tokens, targets, bounds = inputs.tokens[0], inputs.targets[0], inputs.cu_seqlens.tolist()
        assert tokens.shape == (4 * 24,) and bounds[0] == 0 and bounds[-1] == 96
        begins = {0, 24, 48, 72} | {i for i in range(96) if tokens[i] == eos}
        assert set(bounds) == begins | {96}
        for row in range(4):
            assert torch.equal(tokens[24 * row + 1 : 24 * row + 24], targets[24 * row : 24 * row + 23])
        seen += [tuple(tokens[24 * row : 24 * row + 24].tolist()) for row in range(4)]
    stream = task.streams["train"][:].tolist()
    passes = [[tuple(stream[i : i + 24]) for i in range(at, len(stream) - 24, 24)] for at in range(24)]
    (rows,) = (rows for rows in passes if set(seen) <= set(rows))  # one shift for a pass, every row once
    assert not Counter(seen) - Counter(rows) and len(seen) >= len(rows) - 5
    assert torch.equal(task[3].tokens, objectives.NextToken(task.folder, 24, 4)[3].tokens)
    with pytest.raises(ValueError, match="tokens, too few for context=100000"):
        objectives.NextToken(task.folder, 100_000, 4)


def test_masking_hides_a_share_and_is_the_same_each_time(text):
    task = objectives.MaskedTokens(shards.tokenized(text, "bytes"), 128, 8)
    rows = torch.randint(5, 261, (400, 129))
    inputs, again, other = (task.inputs(rows, n) for n in (7, 7, 8))
    chosen, before = inputs.targets >= 0, rows[:, :-1]
    assert torch.equal(inputs.tokens, again.tokens) and not torch.equal(inputs.targets, other.targets)
    assert 0.14 < chosen.float().mean() < 0.16
    assert torch.equal(inputs.targets[chosen], before[chosen])
    assert torch.equal(inputs.tokens[~chosen], before[~chosen])
    hidden = inputs.tokens[chosen]
    assert 0.78 < (hidden == task.tokenizer.mask).float().mean() < 0.82
    assert 0.08 < (hidden == before[chosen]).float().mean() < 0.12


@pytest.mark.parametrize("config", ["gpt2-cpu", "llama-cpu", "bert-cpu"])
def test_models_of_text_learn(text, tmp_path, config):
    changes = TINY | dict(checkpointing=config == "gpt2-cpu", precision="bf16" if config == "llama-cpu" else "fp32")
    result = pretrain.run(text, tmp_path / "run", config=config, **changes)
    losses = [found["loss"] for found in result["history"]["evaluations"]]
    assert losses[-1] < losses[0] < 5.6 and result["test"]["perplexity"] < 200
    loaded = load_model(tmp_path / "run")
    assert loaded.meta["task"] == settings.read(config)["task"] and loaded.tokenizer.size == 261
    assert json.loads((tmp_path / "run" / "result.json").read_text())["sample"] == result["sample"] != ""


def test_an_encoder_decoder_learns_pairs(pairs, tmp_path):
    result = pretrain.run(pairs, tmp_path / "run", config="translate-cpu", **TINY | dict(d_model=32))
    losses = [found["loss"] for found in result["history"]["evaluations"]]
    assert losses[-1] < losses[0] and " -> " in result["sample"]
    assert load_model(tmp_path / "run", task="encoder-decoder").model.config.kind == "encoder-decoder"


def test_the_wrong_data_is_one_line(text, pairs, tmp_path, capsys):
    for arguments, message in (
        ([text, "--config", "translate-cpu"], "an encoder-decoder needs pairs"),
        ([str(tmp_path / "nowhere")], "nowhere is not there: a folder that `fastllm data` made is needed"),
        ([], "which data?"),
        (["--resume"], "run has no run in it to resume; --out names the folder of one"),
        ([text, "--tokenizer", "morse"], "tokenizer must be one of bpe, words, bytes"),
        ([text, "--tokenizer", "bytes", "--heads", "5"], "heads must divide d_model"),
        ([text, "--tokenizer", "bytes", "--optimizer", "lion"], "optimizer must be one of"),
    ):
        assert cli(["pretrain", *arguments, "--out", str(tmp_path / "run")]) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_an_option_with_a_mistake_names_the_nearest(capsys):
    for option, nearest in (("--stps", "--steps"), ("--weight_decay=1", "--weight-decay"), ("--fersh", "--fresh")):
        with pytest.raises(SystemExit) as ended:
            cli(["pretrain", "data/x", option])
        said = capsys.readouterr().err
        assert ended.value.code == 2 and f"unrecognized arguments: {option}; did you mean {nearest}?" in said


def test_the_command_resumes(text, tmp_path, capsys):
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in TINY.items() if key != "steps"]
    command = ["pretrain", "--out", str(tmp_path / "run"), "--prompt", "the"]
    assert cli([*command, text, "--steps", "10", *flags]) == 0
    said = capsys.readouterr().out
    assert "perplexity" in said and "tokens/s" in said and "sample: the" in said
    assert cli([*command, text, "--steps", "10", *flags]) == 2
    assert "--resume goes on" in capsys.readouterr().err
    assert cli([*command, "--resume", "--d-model", "32"]) == 2
    assert "was begun with d_model=16, it cannot be resumed with 32" in capsys.readouterr().err
    assert cli([*command, "--resume", "--steps", "20"]) == 0
    assert "all steps done" in capsys.readouterr().out
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert len(result["history"]["loss"]) == 20 and result["history"]["evaluations"][-1]["step"] == 20
    assert cli([*command, "--fresh", text, "--steps", "10", *flags]) == 0
