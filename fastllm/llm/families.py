"""Families of models: where each keeps its layers, and what in them is one head's or one channel's."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Family:
    """Where a model keeps its stacks of layers, and what is one head's or one channel's in each layer.

    feed_rows are modules of which a channel is an output, feed_columns one of which it is an input. attentions are the
    modules (query, key, value, out) of each attention that a layer may have; without any the config cannot say that
    there are fewer heads of the same size. fields name the sizes in the config, which are those of all stacks, or with
    "{}" for the name of one.
    """

    stacks: tuple[str, ...]
    feed_rows: tuple[str, ...]
    feed_columns: str
    fields: dict[str, str]
    attentions: tuple[tuple[str, str, str, str], ...] = ()

    def attentions_of(self, layer):
        return [names for names in self.attentions if hasattr(layer, names[0].partition(".")[0])]

    def field(self, name, stack) -> str:
        return self.fields[name].format(stack.split(".")[-2])


LLAMA = Family(
    ("model.layers",),
    ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj",
    dict(
        heads="num_attention_heads",
        kv_heads="num_key_value_heads",
        feed="intermediate_size",
        layers="num_hidden_layers",
    ),
    (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),),
)
GPT2 = Family(("transformer.h",), ("mlp.c_fc",), "mlp.c_proj", dict(feed="n_inner", layers="n_layer"))
BART = Family(
    ("model.encoder.layers", "model.decoder.layers"), ("fc1",), "fc2", dict(feed="{}_ffn_dim", layers="{}_layers")
)


def bert(prefix=""):
    fields = dict(feed="intermediate_size", layers="num_hidden_layers")
    return Family((f"{prefix}encoder.layer",), ("intermediate.dense",), "output.dense", fields)


FAMILIES = {
    **{f"{name}ForCausalLM": LLAMA for name in "Llama Mistral Qwen2 Qwen3 Gemma Gemma2 Gemma3".split()},
    "GPT2LMHeadModel": GPT2,
    "BartForConditionalGeneration": BART,
    "MarianMTModel": BART,
    "BertForSequenceClassification": bert("bert."),
    "BertForMaskedLM": bert("bert."),
    "BertModel": bert(),
}


def family_of(model) -> Family:
    """Raises ValueError for a model of none of them."""
    name = type(model).__name__
    if name in FAMILIES:
        return FAMILIES[name]
    if name != "Transformer":
        raise ValueError(f"prune: {name} is not supported; our own models are, and {', '.join(FAMILIES)}")
    rows = ("feed_forward.gate", "feed_forward.up") if model.config.activation == "swiglu" else ("feed_forward.up",)
    parts = ("query", "key", "value", "out")
    attentions = tuple(tuple(f"{kind}.{part}" for part in parts) for kind in ("attention", "cross_attention"))
    fields = dict(heads="heads", kv_heads="kv_heads", feed="d_ff", layers="layers")
    stacks = tuple(f"{stack}.blocks" for stack in model.config.kind.split("-"))
    return Family(stacks, rows, "feed_forward.down", fields, attentions)
