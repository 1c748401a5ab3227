"""`fastllm quantize`: smaller folders that every command reads, with the answers of what the codes stand for."""

import functools
import json
import shutil

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("tokenizers", reason="tokenizers is not installed")
pytest.importorskip("safetensors", reason="safetensors is not installed")
pytest.importorskip("jinja2", reason="jinja2 is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed")

import fastllm
from fastllm import cli
from fastllm.llm import data, evaluate, generate, measure, prune, quantize
from fastllm.llm.checkpoint import Loaded, load_model, save_model
from fastllm.llm.packed import packing, quantize_model
from fastllm.llm.prompts import ChatTemplate
from fastllm.llm.tokens import Tokenizer
from fastllm.model import Config, Transformer

TOKENS = Tokenizer.bytes()
SIZES = dict(vocab=TOKENS.size, d_model=64, heads=4, kv_heads=2, layers=2, d_ff=128, max_len=200, dropout=0.0)
OURS = {
    "modern": dict(norm="rmsnorm", positions="rotary", activation="swiglu", tie_embeddings=False),
    "tied": dict(positions="learned", activation="gelu"),
}


def ours(name):
    torch.manual_seed(0)
    return Transformer(Config(**SIZES | OURS[name])).eval()


def hugging_face(name):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    sizes = dict(vocab_size=TOKENS.size, hidden_size=64, intermediate_size=96, num_hidden_layers=2)
    sizes |= dict(num_attention_heads=4, max_position_embeddings=200)
    if name == "GPT2":
        config = transformers.GPT2Config(vocab_size=TOKENS.size, n_embd=64, n_layer=2, n_head=4, n_positions=200)
        return transformers.GPT2LMHeadModel(config).eval()
    prefix = f"{name}Text" if name == "Gemma3" else name
    more = dict(num_key_value_heads=2, head_dim=16) if name in ("Llama", "Gemma3") else {}
    config = getattr(transformers, f"{prefix}Config")(**sizes, **more)
    kind = {"Bert": "BertForSequenceClassification"}.get(name, f"{name}ForCausalLM")
    return getattr(transformers, kind)(config).eval()


def unpacked(packed, plain):
    """`plain` with the numbers that the codes of `packed` stand for."""
    for name, module in packed.named_modules():
        if isinstance(module, (fastllm.nn.QuantizedLinear, fastllm.nn.QuantizedEmbedding)):
            target, whole = plain.get_submodule(name), module.weight.dequantize()
            whole = whole.t() if type(target).__name__ == "Conv1D" else whole
            target.weight.data = whole.contiguous()
    return plain


def logits_of(model, tokens):
    with torch.no_grad():
        found = model(tokens)
    return getattr(found, "logits", found)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", [*OURS, "Llama", "GPT2", "Gemma3", "GPTNeoX", "Bert"])
def test_folders_hold_what_was_made(name, bits, tmp_path):
    """The model of the folder is the packed one bit for bit, and close to the one whose weights are the codes'."""
    make = ours if name in OURS else hugging_face
    model, tokens = make(name), torch.randint(5, TOKENS.size, (2, 12))
    save_model(tmp_path / "whole", model, TOKENS)
    ChatTemplate(TOKENS, "{{ messages[0].content }}").save(tmp_path / "whole")
    made = quantize.run(tmp_path / "whole", tmp_path / "packed", bits=bits, group_size=128, measure=False)
    assert made == {}
    found = load_model(tmp_path / "packed", accelerate=False)
    kept = quantize_model(load_model(tmp_path / "whole", accelerate=False).model, bits, 128)
    assert packing(found.model) == packing(kept) and packing(kept)["layers"]
    assert packing(found.model)["tied"] == (name in ("tied", "GPT2", "Gemma3"))
    got, peer = logits_of(found.model, tokens), logits_of(unpacked(kept, model), tokens)
    assert torch.equal(got, logits_of(kept, tokens))
    assert (got - peer).norm() < 1e-3 * peer.norm()
    if name != "Bert":
        (tmp_path / "test.txt").write_text(text := "some text to score\n" * 3)
        scored = evaluate.run(tmp_path / "packed", tmp_path, max_len=len(text))["scores"]["loss"]
        ids = torch.tensor([TOKENS.encode(text)])
        truth = F.cross_entropy(logits_of(unpacked(kept, model), ids)[0, :-1].double(), ids[0, 1:])
        assert abs(scored - truth) < 1e-3 * truth
    size = [(tmp_path / f / "model.safetensors").stat().st_size for f in ("whole", "packed")]
    assert size[1] < size[0] * (0.55 if bits == 8 else 0.45)
    assert not ChatTemplate.load(found.source, found.tokenizer).plain
    if name != "Bert":
        texts = generate.run(tmp_path / "packed", ["ab", "x"], max_tokens=8, temperature=0)
        wanted = fastllm.generate(unpacked(kept, model), torch.tensor([TOKENS.encode("ab")]), max_new_tokens=1)
        assert len(texts) == 2 and texts[0]["tokens"][0] == int(wanted[0, 2])


def test_the_head_keeps_eight_bits_and_groups_fit():
    model = quantize_model(ours("tied"), 4, 128)
    layers = packing(model)["layers"]
    assert layers["head"] == [8, 64, TOKENS.size, 64]
    assert layers["decoder.blocks.0.feed_forward.down"] == [4, 128, 64, 128]
    assert layers["decoder.blocks.0.attention.query"] == [4, 64, 64, 64]  # 128 does not divide a row of 64
    assert packing(quantize_model(ours("tied"), 4, head_bits=4))["layers"]["head"][0] == 4
    assert packing(ours("tied")) == dict(layers={}, tied=False)


def test_the_command_says_what_it_cost_and_brought(tmp_path, capsys):
    save_model(tmp_path / "m", ours("modern"), TOKENS)
    (tmp_path / "text.txt").write_text("some text, some more of it\n" * 20)
    arguments = ["quantize", str(tmp_path / "m"), "--bits", "8", "--text", str(tmp_path / "text.txt")]
    assert cli.main(arguments) == 0
    told = capsys.readouterr().out
    for word in ("size, MB", "tokens/s", "perplexity", "before", "after", f"written: {tmp_path / 'm-int8'}"):
        assert word in told
    before, after = load_model(tmp_path / "m"), load_model(tmp_path / "m-int8")
    text = (tmp_path / "text.txt").read_text()
    whole, packed = (measure.perplexity(x.model, TOKENS, text) for x in (before, after))
    assert f"{whole:.2f}" in told and f"{packed:.2f}" in told and abs(packed / whole - 1) < 0.01
    assert measure.size_of(after.model) < measure.size_of(before.model) / 2


def test_speed_is_measured_within_the_positions_of_the_model():
    model = Transformer(Config(**SIZES | dict(max_len=9)))
    loaded = Loaded(model.eval(), TOKENS, {}, None)
    assert measure.compare(loaded, loaded)["after"]["tokens_per_s"] > 0


def test_perplexity_is_that_of_the_text():
    """Of one window by hand, and of several with the last one shorter."""
    model, text = ours("modern"), "abc" * 100
    tokens = torch.tensor(TOKENS.encode(text))
    total = 0.0
    for start in (0, 200):
        part = tokens[start : start + 201]
        logp = logits_of(model, part[None, :-1])[0].double().log_softmax(-1)
        total -= float(logp.gather(1, part[1:, None]).sum())
    assert measure.perplexity(model, TOKENS, text) == pytest.approx(torch.tensor(total / 299).exp().item())


def test_transformers_alone_refuses_a_packed_folder(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    save_model(tmp_path / "m", hugging_face("Llama"), TOKENS)
    quantize.run(tmp_path / "m", tmp_path / "q", measure=False)
    with pytest.raises(ValueError, match="fastllm"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "q")


def test_nothing_that_is_there_is_lost(tmp_path):
    """Not another model, not the user's files, not what is read."""
    save_model(tmp_path / "m", ours("modern"), TOKENS)
    (tmp_path / "run").mkdir()
    shutil.copytree(tmp_path / "m", tmp_path / "run" / "best")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("three years")
    write = functools.partial(quantize.run, tmp_path / "m", measure=False)
    write(tmp_path / "q")
    for out, fresh, why in (
        ("q", False, "q is there already; --fresh replaces it"),
        ("thesis", False, "thesis has files in it, and no config.json"),
        ("thesis", True, "thesis has files in it, and no config.json"),
        ("m", True, "m is what is read"),
        ("thesis/thesis.tex", True, "thesis.tex is a file"),
    ):
        with pytest.raises(ValueError, match=f"^quantize: .*{why}"):
            write(tmp_path / out, fresh=fresh)
    with pytest.raises(ValueError, match="run is what is read"):
        quantize.run(tmp_path / "run" / "best", tmp_path / "run", measure=False, fresh=True)
    with pytest.raises(ValueError, match=r"^prune: .*thesis has files in it"):
        prune.run(tmp_path / "m", tmp_path / "thesis", layers=0.5, fresh=True)
    with pytest.raises(ValueError, match=r"^data: .*thesis has files in it"):
        data.build_from_files([tmp_path / "thesis" / "thesis.tex"], tmp_path / "thesis", fresh=True)
    write(tmp_path / "q", bits=4, fresh=True)
    assert (tmp_path / "thesis" / "thesis.tex").read_text() == "three years" and (tmp_path / "m").exists()


def test_bad_input(tmp_path, capsys):
    save_model(tmp_path / "m", ours("modern"), TOKENS)
    quantize.run(tmp_path / "m", tmp_path / "q", measure=False)
    assert cli.main(["quantize", str(tmp_path / "q")]) == 2
    assert "is packed already" in capsys.readouterr().err
    assert cli.main(["quantize", str(tmp_path / "nothing")]) == 2
    assert "load_model: " in capsys.readouterr().err
    assert cli.main(["quantize", str(tmp_path / "m"), "--text", str(tmp_path / "none.txt")]) == 2
    assert "none.txt" in capsys.readouterr().err and not (tmp_path / "m-int8").exists()
    with pytest.raises(ValueError, match="bits must be 8 or 4, got 3"):
        quantize.run(tmp_path / "m", tmp_path / "x", bits=3)
    with pytest.raises(ValueError, match="group must be one of 128, 64, 32, got 50"):
        quantize.run(tmp_path / "m", tmp_path / "x", group_size=50)
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    config["packing"]["layers"]["nowhere"] = [8, 64, 64, 64]
    (tmp_path / "q" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="describes no model of this version"):
        load_model(tmp_path / "q")
    assert not (tmp_path / "x").exists()
