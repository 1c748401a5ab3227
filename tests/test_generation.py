"""Generation in one C++ call per token: logits and tokens are those of the model itself, for every family."""

import copy
import warnings

import pytest
import torch
from check import assert_as_accurate

import fastllm
from fastllm import decoder, dispatch, generation, sampling
from fastllm.model import Config, Transformer

pytestmark = pytest.mark.skipif(dispatch.extension is None, reason="the C++ extension is not built")

SMALL = dict(vocab=61, d_model=48, heads=6, kv_heads=2, layers=2, d_ff=80, max_len=700, dropout=0.0)
OURS = {
    "layernorm sinusoidal relu": dict(positions="sinusoidal", activation="relu", tie_embeddings=True),
    "rmsnorm rotary swiglu": dict(norm="rmsnorm", positions="rotary", activation="swiglu", kv_heads=6),
    "learned gelu window": dict(positions="learned", activation="gelu", window=(7, 0)),
    "one key head": dict(positions="rotary", kv_heads=1, scale_embedding=False),
}
HF_SIZES = dict(
    vocab_size=67,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=512,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
HF = {
    "Llama": {},
    "Mistral": dict(sliding_window=6),
    "Qwen2": {},
    "Qwen3": {},
    "Gemma": {},
    "Gemma2": dict(sliding_window=6, layer_types=KINDS, query_pre_attn_scalar=24, final_logit_softcapping=5.0),
    "Gemma3": dict(sliding_window=6, layer_types=KINDS, query_pre_attn_scalar=24),
    "GPT2": {},
    "GPTNeoX": dict(rotary_pct=0.5),
    "GPTNeoX sequential": dict(rotary_pct=1.0, use_parallel_residual=False),
}


@pytest.fixture
def one_thread():
    """Where PyTorch's many small calls take the time: on a busy machine its threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def ours(name, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return Transformer(Config(**SMALL | dict(tie_embeddings=False) | OURS[name])).eval().to(dtype)


def hugging_face(name):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    family = name.split()[0]
    sizes = HF_SIZES | HF[name]
    if family == "GPT2":
        config = transformers.GPT2Config(
            vocab_size=67, n_embd=48, n_layer=3, n_head=6, n_positions=512, eos_token_id=2, bos_token_id=1
        )
        kind = transformers.GPT2LMHeadModel
    else:
        if family == "GPTNeoX":
            sizes = {k: v for k, v in sizes.items() if k not in ("num_key_value_heads", "head_dim")}
        prefix = family + "Text" if family == "Gemma3" else family
        config = getattr(transformers, f"{prefix}Config")(**sizes)
        kind = getattr(transformers, f"{family}ForCausalLM")
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # so that norms, biases and positions all matter, and tokens vary
            parameter.add_(torch.randn_like(parameter) * (0.15 if parameter.ndim == 1 else 0.1))
    return model


def logits_of(model, tokens):
    found = model(tokens)
    return getattr(found, "logits", found)


def step_logits(model, tokens, lengths, weights="model"):
    """Logits behind each prompt of `lengths` and behind every token that follows it in `tokens` [B, T]."""
    session = generation.Plan(model, weights).session(len(tokens), tokens.shape[1])
    found = [session.prefill([row[:n] for row, n in zip(tokens, lengths, strict=True)]).clone()]
    for n in range(tokens.shape[1] - max(lengths)):
        column = torch.stack([row[length + n] for row, length in zip(tokens, lengths, strict=True)])
        found.append(session.step(column).clone())
    return torch.stack(found, 1)


def hold(model, tokens, lengths, seen_as, weights="model", peer=None):
    """The rule of check.py is for one op: in a model the roundings of many meet, so it is held at a coarser dtype."""
    peer = model if peer is None else peer
    with torch.no_grad():
        other, exact = logits_of(peer, tokens), logits_of(copy.deepcopy(peer).double(), tokens)
    got = step_logits(model, tokens, lengths, weights)
    for b, length in enumerate(lengths):
        part = slice(length - 1, length - 1 + got.shape[1])
        assert_as_accurate(got[b].to(seen_as), other[b, part].to(seen_as), exact[b, part], f"sequence {b}")


@pytest.mark.parametrize("name", OURS)
def test_logits_of_the_reference_model(cpu_backend, name):
    hold(ours(name), torch.randint(61, (1, 30)), [9], torch.float16)
    hold(ours(name), torch.randint(61, (3, 40)), [20, 1, 13], torch.float16)


def test_logits_over_several_parts_of_the_cache(cpu_backend):
    """Keys are worked on 512 at a time: just below, at and beyond that, with a prompt on either side of it."""
    model = ours("one key head")
    hold(model, torch.randint(61, (1, 519)), [508], torch.float16)
    hold(model, torch.randint(61, (2, 520)), [510, 505], torch.float16)


@pytest.mark.parametrize("name", HF)
def test_logits_of_hugging_face(one_thread, name):
    hold(hugging_face(name), torch.randint(3, 67, (1, 18)), [7], torch.float16)
    hold(hugging_face(name), torch.randint(3, 67, (2, 20)), [12, 1], torch.float16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_models_of_fewer_bits(cpu_backend, dtype):
    model = ours("rmsnorm rotary swiglu", dtype)
    hold(model, torch.randint(61, (2, 20)), [9, 5], torch.bfloat16, peer=copy.deepcopy(model).float())


def with_quantised_weights(model, bits):
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight = torch.nn.Parameter(fastllm.quantize_weight(module.weight, bits).dequantize())
    return model


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_weights(cpu_backend, bits):
    """The logits are those of the model whose linear layers have the numbers that the codes stand for."""
    model = ours("one key head")  # tied, the embedding would be quantised in the model that is the peer
    hold(model, torch.randint(61, (2, 20)), [9, 5], torch.bfloat16, f"int{bits}", with_quantised_weights(model, bits))


def test_bf16_weights(cpu_backend):
    model = ours("rmsnorm rotary swiglu")
    peer = copy.deepcopy(model)
    for parameter in peer.parameters():
        parameter.data = parameter.data.bfloat16().float() if parameter.ndim == 2 else parameter.data
    hold(model, torch.randint(61, (2, 20)), [9, 5], torch.bfloat16, "bf16", peer)


@pytest.mark.parametrize("name", OURS)
def test_greedy_tokens_of_the_reference_model(one_thread, name):
    model, tokens = ours(name), torch.randint(61, (3, 11))
    assert torch.equal(fastllm.generate(model, tokens, max_new_tokens=15), model.generate(tokens, 15))


@pytest.mark.parametrize("name", HF)
def test_greedy_tokens_of_hugging_face(one_thread, name):
    """With padding on the left, as Hugging Face wants it, and sequences that end before others."""
    model, tokens = hugging_face(name), torch.randint(3, 67, (4, 10))
    mask = (torch.arange(10) >= torch.tensor([[0], [4], [9], [1]])).long()
    tokens = tokens * mask
    options = dict(max_new_tokens=14, attention_mask=mask, pad_token_id=0)
    for eos in (2, [2, 31, 5, 44]):
        wanted = model.generate(tokens, do_sample=False, eos_token_id=eos, **options)
        assert torch.equal(fastllm.generate(model, tokens, eos_token_id=eos, **options), wanted)
    wanted = model.generate(tokens, do_sample=False, repetition_penalty=1.7, eos_token_id=2, **options)
    assert torch.equal(fastllm.generate(model, tokens, repetition_penalty=1.7, eos_token_id=2, **options), wanted)


@pytest.mark.parametrize("name", ["Llama", "GPT2", "Gemma2"])
def test_beams_of_hugging_face(one_thread, name):
    """With padding, texts that end early, and the options that decide which of them is best."""
    model, tokens = hugging_face(name), torch.randint(3, 67, (3, 8))
    mask = (torch.arange(8) >= torch.tensor([[0], [3], [7]])).long()
    options = dict(max_new_tokens=12, attention_mask=mask, pad_token_id=1, do_sample=False)
    for eos in (2, [2, 31, 5, 44, 12, 20]):
        for more in (
            dict(num_beams=2),
            dict(num_beams=4, length_penalty=2.0),
            dict(num_beams=3, early_stopping=True, length_penalty=-0.5),
            dict(num_beams=3, repetition_penalty=1.5),
        ):
            wanted = model.generate(tokens * mask, eos_token_id=eos, **options, **more)
            found = fastllm.generate(model, tokens * mask, eos_token_id=eos, **options, **more)
            assert torch.equal(found, wanted), more


@pytest.mark.parametrize("beams", [1, 3])
def test_penalty_on_padding_is_that_of_hugging_face(one_thread, beams):
    """The padding is the token that would come next: whether it is penalised, versions of transformers disagree."""
    model, prompt = hugging_face("Llama"), torch.randint(3, 67, (1, 6))
    pad = int(logits_of(model, prompt)[0, -1].argmax())
    tokens = torch.cat([torch.full((1, 4), pad), prompt], 1)
    mask = (torch.arange(10) >= 4).long()[None]
    options = dict(max_new_tokens=6, attention_mask=mask, pad_token_id=pad, eos_token_id=2, num_beams=beams)
    wanted = model.generate(tokens, do_sample=False, repetition_penalty=3.0, **options)
    assert torch.equal(fastllm.generate(model, tokens, repetition_penalty=3.0, **options), wanted)


@pytest.mark.parametrize("beams", [1, 3])
def test_padding_is_not_penalised_where_no_other_generate_does(one_thread, beams):
    model, prompt = ours("learned gelu window"), torch.randint(61, (1, 6))
    pad = int(logits_of(model, prompt)[0, -1].argmax())
    options = dict(max_new_tokens=6, repetition_penalty=3.0, num_beams=beams)
    alone = fastllm.generate(model, prompt, **options)[:, 6:]
    for padding, place in (
        (torch.tensor([[0] * 4 + [1] * 6]), slice(4, 10)),
        (torch.tensor([[1] * 6 + [0] * 4]), slice(6)),
    ):
        tokens = torch.full((1, 10), pad)
        tokens[:, place] = prompt
        assert torch.equal(fastllm.generate(model, tokens, padding, **options)[:, 10:], alone)


def test_sampling_draws_what_hugging_face_draws(one_thread):
    model, tokens = hugging_face("Llama"), torch.randint(3, 67, (3, 10))
    for options in (
        dict(),
        dict(temperature=0.7, top_k=5),
        dict(temperature=1.5, top_k=0, top_p=0.6),
        dict(top_k=0, min_p=0.4),
    ):
        torch.manual_seed(3)
        ones = torch.ones_like(tokens)
        wanted = model.generate(tokens, attention_mask=ones, do_sample=True, max_new_tokens=12, **options)
        torch.manual_seed(3)
        assert torch.equal(fastllm.generate(model, tokens, do_sample=True, max_new_tokens=12, **options), wanted)
    generator = torch.Generator().manual_seed(5)
    once = fastllm.generate(model, tokens, do_sample=True, generator=generator)
    assert torch.equal(once, fastllm.generate(model, tokens, do_sample=True, generator=generator.manual_seed(5)))


def test_top_p_keeps_the_fewest_that_hold_it():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(2000, 4)
    drawn = sampling.sample(logits, top_k=0, top_p=0.75)
    assert set(drawn.tolist()) == {0, 1}
    assert set(sampling.sample(logits, top_k=3).tolist()) == {0, 1, 2}
    assert set(sampling.sample(logits, top_k=0, top_p=0.01).tolist()) == {0}


def test_padding_on_the_right_is_none_either(one_thread):
    model, tokens = ours("rmsnorm rotary swiglu"), torch.randint(61, (2, 8))
    mask = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
    found = fastllm.generate(model, tokens, mask, max_new_tokens=6)
    assert torch.equal(found[1, 8:], fastllm.generate(model, tokens[1:, :5], max_new_tokens=6)[0, 5:])
    assert torch.equal(found[0], fastllm.generate(model, tokens[:1], max_new_tokens=6)[0])


def test_streamer(one_thread):
    model, tokens, seen = ours("learned gelu window"), torch.randint(61, (2, 5)), []
    found = fastllm.generate(model, tokens, max_new_tokens=4, streamer=seen.append)
    assert torch.equal(torch.cat([seen[0], *(t[:, None] for t in seen[1:])], 1), found)

    class Streamer:
        ended, tokens = False, 0

        def put(self, value):
            self.tokens += value.numel()

        def end(self):
            self.ended = True

    streamer = Streamer()
    fastllm.generate(model, tokens, max_new_tokens=4, streamer=streamer)
    assert streamer.ended and streamer.tokens == 10 + 8


def test_same_for_any_number_of_threads():
    model, tokens = ours("rmsnorm rotary swiglu"), torch.randint(61, (2, 300))
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        session = generation.Plan(model, "int8").session(2, 310)
        session.prefill(list(tokens))
        if found:  # prompts may round differently with other threads in PyTorch's products
            session.keys.copy_(found[0][0]), session.values.copy_(found[0][1])
        logits = [session.step(tokens[:, n]).clone() for n in range(3)]
        found.append((session.keys.clone(), session.values.clone(), torch.stack(logits)))
    torch.set_num_threads(before)
    assert found[0][2].isfinite().all() and all(torch.equal(found[0][2], other[2]) for other in found[1:])


def test_changed_weights_are_seen():
    model, tokens = ours("one key head"), torch.randint(61, (1, 5))
    for weights in ("model", "int8"):
        before = fastllm.generate(model, tokens, weights=weights)
        assert generation.plan(model, weights) is generation.plan(model, weights)
        with torch.no_grad():
            model.head.weight.add_(torch.randn_like(model.head.weight))
        after = fastllm.generate(model, tokens, weights=weights)
        assert not torch.equal(before, after)
        if weights == "model":
            assert torch.equal(after, model.generate(tokens, 20))


def test_what_it_cannot_do_goes_to_the_model_and_is_said():
    model, tokens = hugging_face("Llama"), torch.randint(3, 67, (1, 6))
    beams = dict(num_beams=2, max_new_tokens=5, pad_token_id=0)
    wanted = model.generate(tokens, no_repeat_ngram_size=2, do_sample=False, **beams)
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        said = fastllm.explain(fastllm.generate, model, tokens, no_repeat_ngram_size=2, **beams)
    assert torch.equal(said.result, wanted)
    assert "no_repeat_ngram_size" in str(said)
    model.model.layers[1].self_attn.q_proj = torch.nn.Sequential(model.model.layers[1].self_attn.q_proj)
    with pytest.raises(decoder.Unsupported, match="Sequential where a torch.nn.Linear"):
        generation.plan(model)
    with pytest.raises(decoder.Unsupported, match="of kind 'encoder'"):
        generation.plan(Transformer(Config(vocab=9, kind="encoder", d_model=16, heads=2, layers=1)))


def test_errors():
    model, tokens = ours("rmsnorm rotary swiglu"), torch.randint(61, (1, 5))
    with pytest.raises(ValueError, match="not empty"):
        fastllm.generate(model, tokens[:, :0])
    with pytest.raises(ValueError, match="leaves nothing"):
        fastllm.generate(model, tokens, torch.zeros_like(tokens))
    with pytest.raises(ValueError, match="positions, but the model has 700"):
        fastllm.generate(model, tokens, max_new_tokens=700)
    with pytest.raises(ValueError, match="weights must be one of"):
        fastllm.generate(model, tokens, weights="int3")
    session = generation.plan(model).session(1, 6)
    session.prefill([tokens[0]])
    with pytest.raises(IndexError, match=r"tokens must be in \[0, 61\)"):
        session.step(torch.tensor([61]))
    session.step(torch.tensor([60]))
    with pytest.raises(ValueError, match="all 6 positions"):
        session.step(torch.tensor([1]))
