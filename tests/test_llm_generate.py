"""`fastllm generate` and `fastllm chat`, as they are typed and from Python."""

import io
import json
import sys

import pytest
import torch

pytest.importorskip("tokenizers", reason="tokenizers is not installed")
pytest.importorskip("safetensors", reason="safetensors is not installed")
pytest.importorskip("jinja2", reason="jinja2 is not installed")

import fastllm
from fastllm import cli, dispatch
from fastllm.llm import chat, generate
from fastllm.llm.checkpoint import load_model, save_model
from fastllm.llm.tokens import Tokenizer
from fastllm.model import Config, Transformer

TOKENS = Tokenizer.bytes()
SIZES = dict(vocab=TOKENS.size, d_model=48, heads=4, layers=2, d_ff=80, max_len=200, dropout=0.0)
SIZES |= dict(norm="rmsnorm", positions="rotary", activation="swiglu", tie_embeddings=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    model = Transformer(Config(**SIZES)).eval()
    with torch.no_grad():
        model.head.weight.mul_(4)  # so that tokens vary
        model.head.weight[TOKENS.eos] = 0
    return save(tmp_path_factory.mktemp("models") / "tiny", model)


def save(path, model):
    save_model(path, model, TOKENS)
    return path


def test_prompts_of_different_lengths_are_continued_as_each_alone(folder):
    prompts = ["a", "The quick brown fox", "né"]
    seen = [""] * 3
    together = generate.run(folder, prompts, max_tokens=20, write=lambda n, text: seen.__setitem__(n, seen[n] + text))
    alone = [generate.run(folder, [prompt], max_tokens=20)[0] for prompt in prompts]
    assert [r["text"] for r in together] == [r["text"] for r in alone] == seen
    assert [r["prompt"] for r in together] == prompts and {r["finish"] for r in together} == {"length"}
    again = generate.run(load_model(folder), prompts, max_tokens=20, seed=1)
    assert [r["tokens"] for r in again] != [r["tokens"] for r in together]


@pytest.mark.skipif(dispatch.extension is None, reason="the C++ extension is not built")
@pytest.mark.parametrize("weights", ["model", "int8"])
def test_greedy_and_beams_are_those_of_generate(folder, weights):
    loaded, prompt = load_model(folder), torch.tensor([TOKENS.encode("ab")])
    options = dict(max_tokens=15, weights=weights)
    wanted = fastllm.generate(loaded.model, prompt, max_new_tokens=15, eos_token_id=TOKENS.eos, weights=weights)
    assert generate.run(loaded, ["ab"], temperature=0, **options)[0]["tokens"] == wanted[0, 2:].tolist()
    beams = dict(num_beams=3, eos_token_id=TOKENS.eos, weights=weights)
    wanted = fastllm.generate(loaded.model, prompt, max_new_tokens=15, **beams)
    found = generate.run(loaded, ["ab", "xyz"], beams=3, **options)
    assert found[0]["tokens"] == wanted[0, 2:].tolist() and found[0]["text"] == TOKENS.decode(found[0]["tokens"])


def test_beams_of_an_encoder_decoder_beat_the_greedy_text(tmp_path):
    torch.manual_seed(0)
    changes = dict(kind="encoder-decoder", positions="sinusoidal", tie_embeddings=True)
    loaded = load_model(save(tmp_path / "pair", Transformer(Config(**SIZES | changes))))

    def score(tokens):
        target = torch.tensor([[TOKENS.bos, *tokens]])
        logp = loaded.model(target[:, :-1], source=torch.tensor([TOKENS.encode("hello")])).log_softmax(-1)
        return float(logp[0].gather(1, target[0, 1:, None]).sum()) / len(tokens)

    greedy = generate.run(loaded, ["hello"], temperature=0, max_tokens=8)[0]
    beams = generate.run(loaded, ["hello"], beams=4, max_tokens=8)[0]
    assert score(beams["tokens"]) >= score(greedy["tokens"])


def test_the_command(folder, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe"))
    assert cli.main(["generate", str(folder), "Once", "-", "--max-tokens", "10", "--seed", "4"]) == 0
    told = capsys.readouterr()
    found = generate.run(folder, ["Once", "from a pipe"], max_tokens=10, seed=4)
    wanted = "\n\n".join(r["prompt"] + generate.printable(r["text"]) for r in found)
    assert told.out == wanted + "\n" and "20 tokens" in told.err and "tokens/s" in told.err
    assert cli.main(["generate", str(folder), "Once", "--max-tokens", "10", "--seed", "4", "--json"]) == 0
    line = json.loads(capsys.readouterr().out)
    assert {key: line[key] for key in ("prompt", "text", "tokens")} == {
        key: found[0][key] for key in ("prompt", "text", "tokens")
    }


def test_a_model_does_not_steer_the_terminal():
    assert generate.printable("a\x1b[2Jb\x07\n\tc\x9bé") == "a[2Jb\n\tcé"


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ([""], "has no tokens"),
        (["x" * 200], "the prompt has 200 tokens"),
        (["x", "--max-tokens", "200"], "200 more are wanted, but there are 200 positions"),
        (["x", "--max-tokens", "200", "--beams", "2"], "there is room for 199 tokens"),
        (["x", "--beams", "0"], "beams must be at least 1"),
        (["x", "--temperature", "-1"], "temperature must be at least 0"),
        (["x", "--positions", "500"], "positions must be in [2, 200]"),
    ],
    ids=str,
)
def test_bad_input(folder, capsys, arguments, why):
    assert cli.main(["generate", str(folder), *arguments]) == 2
    told = capsys.readouterr()
    assert told.out == "" and why in told.err and told.err.count("\n") == 1


def test_folders_that_do_not_generate(tmp_path, capsys):
    encoder = Transformer(Config(**SIZES | dict(kind="encoder", classes=2)))
    for command in (["generate", str(save(tmp_path / "encoder", encoder)), "x"], ["generate", str(tmp_path), "x"]):
        assert cli.main(command) == 2
    told = capsys.readouterr().err
    assert "is not a language model" in told and "load_model: " in told


def test_a_conversation(folder, capsys):
    said = []
    talk = chat.run(folder, ["Hi", "/nonsense", "/system Be brief.", "More"], said.append, max_tokens=10, seed=1)
    assert [turn["role"] for turn in talk.turns] == ["user", "assistant"] * 2 and talk.system == "Be brief."
    assert "".join(said).startswith(generate.printable(talk.turns[1]["content"])) and chat.HELP in "".join(said)
    again = chat.run(folder, ["Hi", "/new", "Hi", "/quit", "Unheard"], said.append, max_tokens=10, seed=1)
    assert again.turns == talk.turns[:2]


def test_a_long_conversation_forgets_its_beginning(folder):
    said = []
    talk = chat.run(folder, ["x" * 60] * 6, said.append, max_tokens=10, seed=1)
    assert talk.forgotten and "turns were left behind" in "".join(said) and talk.turns[-1]["role"] == "assistant"
    talk = chat.run(folder, ["x" * 250, "Hi"], said.append, max_tokens=10, seed=1)
    assert "leave no room for an answer" in "".join(said) and len(talk.turns) == 2


def test_an_interrupted_answer_is_kept_as_far_as_it_went(folder):
    said = []

    def write(text):
        said.append(text)
        if len(said) == 3:
            raise KeyboardInterrupt

    talk = chat.run(folder, ["Hi", "More"], write, max_tokens=30, seed=1, temperature=0.0)
    assert len(talk.turns) == 4 and len(talk.turns[1]["content"]) < 30


def test_the_chat_command(folder, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n"))
    assert cli.main(["chat", str(folder), "--max-tokens", "5", "--seed", "1"]) == 0
    assert capsys.readouterr().out.endswith("\n\n")
