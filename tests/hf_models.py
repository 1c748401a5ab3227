"""Hugging Face families with tiny random weights, and what is asked of them beside transformers' eager attention."""

import torch
import transformers

transformers.logging.set_verbosity_error()

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
    "cohere": ("CohereForCausalLM", "CohereConfig", GQA),
    "glm": ("GlmForCausalLM", "GlmConfig", {**GQA, "head_dim": 8, "pad_token_id": 0}),
    "phi": ("PhiForCausalLM", "PhiConfig", {**GQA, "hidden_act": "gelu_new"}),
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
    "t5, gated": (
        "T5ForConditionalGeneration",
        "T5Config",
        dict(d_model=32, d_ff=48, num_layers=2, num_heads=4, d_kv=8, vocab_size=V, decoder_start_token_id=1, **TOKENS)
        | dict(feed_forward_proj="gated-gelu"),
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


def without_dropout(model):
    for module in model.modules():
        for name in ("p", "attention_dropout", "dropout", "dropout_prob", "layerdrop"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model
