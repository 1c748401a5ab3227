"""`fastllm prune`: a smaller model that computes what the whole one does without the parts that went."""

import copy
import json

import pytest
import torch

pytest.importorskip("tokenizers", reason="tokenizers is not installed")
pytest.importorskip("safetensors", reason="safetensors is not installed")
pytest.importorskip("jinja2", reason="jinja2 is not installed")

from check import assert_as_accurate

from fastllm import cli
from fastllm.llm import finetune, generate, prune
from fastllm.llm.checkpoint import load_model, save_model
from fastllm.llm.tokens import Tokenizer
from fastllm.model import Config, Transformer

TOKENS = Tokenizer.bytes()
SIZES = dict(vocab=TOKENS.size, d_model=64, heads=8, kv_heads=4, layers=4, d_ff=256, max_len=200, dropout=0.0)
OURS = {
    "modern": dict(norm="rmsnorm", positions="rotary", activation="swiglu", tie_embeddings=False),
    "tied": dict(positions="learned", activation="gelu", kv_heads=None),
    "encoder": dict(kind="encoder", classes=3),
    "encoder-decoder": dict(kind="encoder-decoder", positions="rotary", layers=3),
}
TWO = {"Bart": "BartForConditionalGeneration", "Marian": "MarianMTModel"}  # stacks


def model_of(name):
    torch.manual_seed(0)
    if name in OURS:
        return randomised(Transformer(Config(**SIZES | OURS[name])).eval())
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    if name in TWO:
        kind, sizes = TWO[name], dict(vocab_size=TOKENS.size, d_model=64, max_position_embeddings=200)
        sizes |= dict(encoder_layers=4, decoder_layers=4, encoder_attention_heads=8, decoder_attention_heads=8)
        sizes |= dict(encoder_ffn_dim=256, decoder_ffn_dim=512, pad_token_id=TOKENS.pad, eos_token_id=TOKENS.eos)
        sizes |= dict(decoder_start_token_id=TOKENS.bos, forced_eos_token_id=None)
        config = getattr(transformers, f"{name}Config")(**sizes)
        return randomised(getattr(transformers, kind)(config).eval())
    sizes = dict(vocab_size=TOKENS.size, hidden_size=64, intermediate_size=256, num_hidden_layers=4)
    sizes |= dict(num_attention_heads=8, max_position_embeddings=200)
    if name == "GPT2":
        config = transformers.GPT2Config(vocab_size=TOKENS.size, n_embd=64, n_layer=4, n_head=8, n_positions=200)
        return randomised(transformers.GPT2LMHeadModel(config).eval())
    prefix = f"{name}Text" if name == "Gemma3" else name
    more = dict(num_key_value_heads=4, head_dim=16) if name != "Bert" else {}
    kind = "BertForSequenceClassification" if name == "Bert" else f"{name}ForCausalLM"
    return randomised(getattr(transformers, kind)(getattr(transformers, f"{prefix}Config")(**sizes, **more)).eval())


def randomised(model):
    """So that biases and norms matter too."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def without(model, shares, batches):
    """The whole model, with nothing coming from the parts that went."""
    model = copy.deepcopy(model)
    for stack, of in zip(prune.family_of(model).stacks, prune.importances(model, batches), strict=True):
        stack_without(model, model.get_submodule(stack), of, shares)
    if hasattr(model.config, "num_hidden_layers") and not model.config.is_encoder_decoder:
        model.config.num_hidden_layers = round(shares["layers"] * model.config.num_hidden_layers)
    return model


def stack_without(model, layers, of, shares):
    family, gone = prune.family_of(model), []
    best = of.layers.argsort(descending=True)
    for n, layer in enumerate(layers):
        parts = [(family.feed_columns, of.channels[n], prune.suited(shares["channels"], of.channels.shape[1]))]
        if shares.get("heads", 1) < 1:
            for names, heads in zip(family.attentions_of(layer), of.heads, strict=True):
                parts.append((names[-1], heads[n], round(shares["heads"] * heads.shape[1])))
        for name, importance, count in parts:
            module = layer.get_submodule(name)
            weight = module.weight.data.t() if type(module).__name__ == "Conv1D" else module.weight.data
            least = importance.argsort()[: len(importance) - count]
            size = weight.shape[1] // len(importance)
            for i in least.tolist():
                weight[:, i * size : (i + 1) * size] = 0
        if n not in best[: round(shares["layers"] * len(layers))]:
            gone.append(n)
    for n in reversed(gone):
        del layers[n]
    for n, layer in enumerate(layers):  # Hugging Face's layers know their number
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = n


def logits_of(model, tokens):
    two = isinstance(model, Transformer) and model.config.kind == "encoder-decoder"
    given = dict(source=tokens.flip(1)) if two else {}
    if getattr(model.config, "is_encoder_decoder", False):
        given = dict(decoder_input_ids=tokens.flip(1))
    with torch.no_grad():
        found = model(tokens, **given)
    return getattr(found, "logits", found)


@pytest.mark.parametrize("calibrated", [False, True], ids=["by size", "by gradients"])
@pytest.mark.parametrize("name", [*OURS, "Llama", "Qwen2", "Gemma3", "GPT2", "Bert", *TWO])
def test_what_is_left_computes_what_the_whole_does_without_the_rest(name, calibrated):
    model = model_of(name)
    tokens = torch.randint(5, TOKENS.size, (2, 12)) if calibrated else None
    if calibrated and name in ("encoder-decoder", *TWO):
        padding = torch.arange(12) < torch.tensor([[12], [7]])
        tokens = [dict(tokens=tokens, mask=padding, begun=tokens[:, :9], labels=tokens[:, 1:10].contiguous())]
    shares = dict(channels=0.5, layers=0.5) | ({} if name in ("GPT2", "Bert", *TWO) else dict(heads=0.5))
    before = copy.deepcopy(model.state_dict())
    small, x = prune.prune_model(model, batches=tokens, **shares), torch.randint(5, TOKENS.size, (2, 20))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    peer = without(model, shares, tokens)
    assert_as_accurate(logits_of(small, x).half(), logits_of(peer, x).half(), logits_of(peer.double(), x), name)
    inner = [parameter for key, parameter in small.named_parameters() if ".0." in key and parameter.ndim == 2]
    whole = [parameter for key, parameter in model.named_parameters() if ".0." in key and parameter.ndim == 2]
    assert sum(p.numel() for p in inner) <= (0.5 if "heads" in shares else 0.72) * sum(p.numel() for p in whole)
    assert {len(small.get_submodule(stack)) for stack in prune.family_of(small).stacks} == {2}


def test_the_gradient_finds_what_matters():
    """A channel that does nothing goes although its weights are the largest."""
    model = model_of("modern")
    feed = model.decoder.blocks[0].feed_forward
    with torch.no_grad():
        feed.up.weight[7] *= 100
        feed.down.weight[:, 7] = 0
    tokens = torch.randint(5, TOKENS.size, (4, 16))
    (by_size,), (by_gradient,) = prune.importances(model), prune.importances(model, tokens)
    assert by_size.channels[0].argmax() == 7 and by_gradient.channels[0].argmin() == 7
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("share", "width", "count"),
    [(1.0, 100, 100), (0.5, 1024, 512), (0.3, 1000, 320), (0.01, 512, 64), (0.6, 80, 48), (0.5, 40, 20)],
)
def test_sizes_that_suit_the_kernels(share, width, count):
    assert prune.suited(share, width) == count


@pytest.mark.parametrize("name", ["modern", "Llama"])
def test_folders_are_read_and_generate(name, tmp_path, capsys):
    save_model(tmp_path / "m", model_of(name), TOKENS)
    (tmp_path / "text.txt").write_text("some text, some more of it\n" * 20)
    text = str(tmp_path / "text.txt")
    shares = ["--heads", "0.5", "--channels", "0.5", "--layers", "0.75"]
    assert cli.main(["prune", str(tmp_path / "m"), *shares, "--calibrate", text, "--text", text]) == 0
    told = capsys.readouterr().out
    for word in ("size, MB", "tokens/s", "perplexity", f"written: {tmp_path / 'm-pruned'}"):
        assert word in told
    sizes = [(tmp_path / f / "model.safetensors").stat().st_size for f in ("m", "m-pruned")]
    assert sizes[1] < 0.7 * sizes[0]
    found = load_model(tmp_path / "m-pruned")
    assert len(found.model.get_submodule(prune.family_of(found.model).stacks[0])) == 3
    assert len(generate.run(found, ["ab"], max_tokens=8)[0]["tokens"]) > 0


def test_what_is_left_is_trained(tmp_path, capsys):
    """One command: the loss that pruning cost comes back, and the folder holds the trained model."""
    pytest.importorskip("sklearn")
    folder, data = tmp_path / "m", tmp_path / "data"
    data.mkdir()
    for split, count in (("train", 60), ("valid", 6), ("test", 6)):
        (data / f"{split}.txt").write_text("the cat sat on the mat; the dog lay on the log.\n" * count)
    save_model(folder, model_of("modern"), TOKENS)
    options = ["--heads", "0.5", "--channels", "0.5", "--finetune", str(data), "--lr", "3e-3", "--max-len", "32"]
    (tmp_path / "m-pruned").mkdir()  # what `fastllm prune` alone writes is not in the way
    assert cli.main(["prune", str(folder), *options]) == 0
    (tmp_path / "m-pruned-finetuned").rename(tmp_path / "small")
    told = capsys.readouterr().out
    assert "loss on test" in told and "between pruning and training" in told
    result = json.loads((tmp_path / "small" / "result.json").read_text())
    pruned, tuned = load_model(tmp_path / "small" / "pruned"), load_model(tmp_path / "small")
    assert tuned.model.config == pruned.model.config and tuned.model.config.heads == 4
    losses = [prune.on_test(loaded, data, 32)["test_loss"] for loaded in (tuned, pruned)]
    assert losses[0] == result["test"]["loss"] < losses[1] / 2
    # Again, over what is there; and bad data leaves nothing.
    training = dict(finetune=data, epochs=1, max_len=32, measure=False)
    with pytest.raises(ValueError, match="small is there already; --fresh replaces it"):
        prune.run(folder, tmp_path / "small", heads=0.5, **training)
    found = prune.run(folder, tmp_path / "small", heads=0.5, fresh=True, **training)
    assert set(found) == {"before", "pruned", "after"}
    (data / "test.txt").write_text("\n")
    for given, why in ((["--finetune", str(data)], "has no text"), (["--lr", "1e-3"], "lr is for --finetune DATA")):
        assert cli.main(["prune", str(folder), "--heads", "0.5", "--out", str(tmp_path / "bad"), *given]) == 2
        assert why in capsys.readouterr().err and not (tmp_path / "bad").exists()


def test_an_encoder_decoder_by_command(tmp_path, capsys):
    """Both stacks and cross-attention are smaller; loss and BLEU are measured, and come back with training."""
    for package in ("sklearn", "sacrebleu", "rouge_score"):
        pytest.importorskip(package)
    data, folder = tmp_path / "pairs", tmp_path / "m"
    data.mkdir()
    table = "source\ttarget\n" + "".join(f"{x} cat\tthe cat is {x}\n" for x in ("red", "blue", "green") * 8)
    for split in ("train", "valid", "test"):
        (data / f"{split}.tsv").write_text(table)
    torch.manual_seed(0)
    words = Tokenizer.train_words(["the cat is red blue green"] * 2, 50)
    sizes = SIZES | dict(kind="encoder-decoder", vocab=words.size, layers=1, d_model=32)
    save_model(folder, Transformer(Config(**sizes)), words)
    training = dict(lr=1e-2, batch=8, max_len=32, patience=0, evaluations=1)
    finetune.run("seq2seq", folder, data, tmp_path / "taught", epochs=8, **training)
    pairs = str(data / "test.tsv")
    given = ["prune", str(tmp_path / "taught"), "--heads", "0.5", "--channels", "0.5", "--calibrate", pairs]
    assert cli.main([*given, "--text", pairs, "--out", str(tmp_path / "small")]) == 0
    told = capsys.readouterr().out
    for word in ("size, MB", "tokens/s", "loss", "BLEU", f"written: {tmp_path / 'small'}"):
        assert word in told
    small = load_model(tmp_path / "small").model
    assert (small.config.heads, small.config.kv_heads, small.config.d_ff, small.config.head_dim) == (4, 2, 128, 4)
    block = small.decoder.blocks[0]
    assert block.cross_attention.query.weight.shape == (16, 32) and block.attention.key.weight.shape == (8, 32)
    assert small.encoder.blocks[0].attention.out.weight.shape == (32, 16)
    shares = dict(heads=0.5, channels=0.5, calibrate=pairs, text=pairs)
    found = prune.run(tmp_path / "taught", tmp_path / "tuned", finetune=data, epochs=6, **shares, **training)
    before, after = found["before"], found["after"]
    assert before["test_bleu"] == before["text_bleu"] > 80 and after["test_bleu"] == after["text_bleu"] > 60
    assert after["test_loss"] < found["pruned"]["test_loss"] / 2 and found["pruned"]["test_bleu"] < after["test_bleu"]
    (data / "text.txt").write_text("no pairs")
    assert cli.main([*given, "--text", str(data / "text.txt"), "--out", str(tmp_path / "bad")]) == 2
    assert "must be a .tsv or .jsonl file of pairs" in capsys.readouterr().err and not (tmp_path / "bad").exists()


def test_a_hugging_face_encoder_decoder_by_command(tmp_path, capsys):
    """Sizes of both stacks are in its config, and what it came with to generate is there afterwards."""
    for package in ("sklearn", "sacrebleu", "rouge_score"):
        pytest.importorskip(package)
    model, pairs = model_of("Bart"), str(tmp_path / "pairs.tsv")
    model.generation_config.num_beams = 3
    save_model(tmp_path / "m", model, TOKENS)
    (tmp_path / "pairs.tsv").write_text("source\ttarget\nred cat\tthe cat is red\nblue cat\tthe cat is blue\n")
    given = ["prune", str(tmp_path / "m"), "--layers", "0.5", "--channels", "0.25", "--calibrate", pairs]
    assert cli.main([*given, "--text", pairs, "--out", str(tmp_path / "small")]) == 0
    told = capsys.readouterr().out
    for word in ("size, MB", "tokens/s", "loss", f"written: {tmp_path / 'small'}"):
        assert word in told
    small = load_model(tmp_path / "small", accelerate=False).model
    config = small.config
    assert (config.encoder_layers, config.decoder_layers, config.num_hidden_layers) == (2, 2, 2)
    assert (config.encoder_ffn_dim, config.decoder_ffn_dim, small.generation_config.num_beams) == (64, 128, 3)
    with pytest.raises(ValueError, match="the config of BartForConditionalGeneration cannot say that there are fewer"):
        prune.prune_model(model, heads=0.5)


def test_bad_input(tmp_path, capsys):
    save_model(tmp_path / "m", model_of("modern"), TOKENS)
    for arguments, why in (
        ([], "nothing would go"),
        (["--heads", "0"], "heads must be in (0, 1]"),
        (["--channels", "1.5", "--layers", "0.5"], "channels must be in (0, 1]"),
        (["--layers", "0.5", "--text", str(tmp_path / "none.txt")], "none.txt"),
    ):
        assert cli.main(["prune", str(tmp_path / "m"), *arguments]) == 2
        told = capsys.readouterr().err
        assert why in told and told.count("\n") == 1
    assert not (tmp_path / "m-pruned").exists()
    with pytest.raises(ValueError, match="the config of GPT2LMHeadModel cannot say that there are fewer heads"):
        prune.prune_model(model_of("GPT2"), heads=0.5)
    transformers = pytest.importorskip("transformers")
    sizes = dict(vocab_size=TOKENS.size, d_model=8, d_ff=8, d_kv=8, num_layers=1, num_heads=1)
    save_model(tmp_path / "t5", transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)), TOKENS)
    assert cli.main(["prune", str(tmp_path / "t5"), "--layers", "0.5", "--text", str(tmp_path / "none.tsv")]) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert "prune: T5ForConditionalGeneration is not supported; our own models are, and Llama" in told
    assert not (tmp_path / "t5-pruned").exists()
    with pytest.raises(ValueError, match="prune: Linear is not supported; our own models are, and Llama"):
        prune.prune_model(torch.nn.Linear(3, 3), layers=0.5)
