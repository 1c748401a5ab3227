"""What a decoder-only model computes, read off its modules: one description for every family that generation.py runs.

No model library is imported: a family is known by the name of its class, and its weights by the names of its modules.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import nn

from fastllm.ops.norm import layer_norm, rms_norm
from fastllm.ops.weight_only import NARROW, QuantizedWeight, quantize_weight, weight_only_linear

ACTIVATIONS = {  # name in a configuration -> the kernel's number and PyTorch's function
    "relu": (0, F.relu),
    "gelu": (1, F.gelu),
    "gelu_new": (2, lambda x: F.gelu(x, approximate="tanh")),
    "gelu_pytorch_tanh": (2, lambda x: F.gelu(x, approximate="tanh")),
    "silu": (3, F.silu),
    "swish": (3, F.silu),
}
WEIGHTS = ("model", "fp32", "bf16", "int8", "int4")


class Unsupported(Exception):
    """This model, or this way to generate, is not what the compiled decoder computes; the text says why."""


@dataclass
class Norm:
    """layer_norm (centred) or rms_norm with weight + offset."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    eps: float
    centred: bool
    offset: float = 0.0

    def __call__(self, x):
        if self.centred:
            return layer_norm(x, self.weight, self.bias, eps=self.eps)
        return rms_norm(x, self.weight, eps=self.eps, weight_offset=self.offset)


@dataclass
class Linear:
    """x w^T + bias."""

    weight: torch.Tensor | QuantizedWeight
    bias: torch.Tensor | None

    def __call__(self, x):
        return weight_only_linear(x, self.weight, self.bias)

    def rows(self, numbers, dtype):
        """The weight's rows [n, K] of these numbers [n], in `dtype`: what an embedding is."""
        return self.weight.rows(numbers, dtype) if self.packed else self.weight[numbers].to(dtype)

    @property
    def packed(self):
        return isinstance(self.weight, QuantizedWeight)

    def stored_as(self, weights):
        """The same with its weight as `weights` names it."""
        if self.packed and weights == "model":
            return self
        whole = self.weight.dequantize() if self.packed else self.weight
        if weights in ("int8", "int4"):
            return replace(self, weight=quantize_weight(whole, int(weights[3:])))
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(weights, whole.dtype)
        return replace(self, weight=whole.to(dtype).contiguous())


@dataclass
class Layer:
    """x += after_attention(out(attend(qkv(attention_norm(x))))); x += after_feed(down(act(gate(n)) * up(n))).

    n = feed_norm(x), of the x before attention where the branches are `parallel`. `qkv` are one or three layers whose
    outputs, one after the other, are queries, keys and values; `rope` names the table that turns them.
    """

    attention_norm: Norm
    qkv: list[Linear]
    out: Linear
    feed_norm: Norm
    gate: Linear
    up: Linear | None
    down: Linear
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    after_attention: Norm | None = None
    after_feed: Norm | None = None
    parallel: bool = False
    window: int = 0  # keys that a query sees, itself among them; 0 is all
    rope: str | None = None


@dataclass
class Description:
    """A decoder: embedding, layers, norm, head. `tables(positions)` is {name: (cos, sin)}, [positions, rotated / 2]."""

    family: str
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    activation: str
    embedding: Linear  # of which it is rows
    layers: list[Layer]
    norm: Norm
    head: Linear
    tables: Callable = field(default=lambda positions: {})
    embedding_scale: float = 1.0
    places: torch.Tensor | None = None  # learned or sinusoidal positions [max, width]
    softcap: float = 0.0
    logit_softcap: float = 0.0
    max_positions: int | None = None
    dtype: torch.dtype = torch.float32  # of the model's activations

    @property
    def packed(self):
        """Whether some weight has fewer bits than a float."""
        linear = [self.embedding, self.head, *(x for layer in self.layers for x in (*layer.qkv, layer.out, layer.down))]
        return any(x.packed for x in linear)

    def stored_as(self, weights):
        """The same with the weights of all linear layers as `weights` names it (one of WEIGHTS)."""

        def convert(x):
            if isinstance(x, list):
                return [convert(y) for y in x]
            return x.stored_as(weights) if isinstance(x, Linear) else x

        layers = [replace(layer, **{name: convert(x) for name, x in vars(layer).items()}) for layer in self.layers]
        return replace(self, layers=layers, head=convert(self.head))


def describe(model) -> Description:
    """The description of `model`; raises Unsupported for one that is none of the families here."""
    name = type(model).__name__
    reader = FAMILIES.get(name)
    if reader is None:
        raise Unsupported(f"{name} is none of {', '.join(FAMILIES)}")
    described = reader(model)
    if described.activation not in ACTIVATIONS:
        raise Unsupported(f"activation {described.activation!r} is none of {', '.join(ACTIVATIONS)}")
    own = next(p for p in model.parameters() if p.is_floating_point())
    if own.dtype not in NARROW or own.device.type != "cpu":
        raise Unsupported(f"a model in {own.dtype} on {own.device}")
    described.dtype = own.dtype
    return described


def _embedding(module) -> Linear:
    weight = module.weight
    return Linear(weight if isinstance(weight, QuantizedWeight) else weight.detach().contiguous(), None)


def _linear(module) -> Linear:
    if type(module).__name__ == "QuantizedLinear":
        return Linear(module.weight, _wide(module.bias))
    if type(module).__name__ == "Conv1D":  # GPT-2 keeps the transpose
        return Linear(module.weight.detach().t().contiguous(), _wide(module.bias))
    if not isinstance(module, nn.Linear) or type(module).__name__ != "Linear":  # an accelerated one keeps its name
        raise Unsupported(f"{type(module).__name__} where a torch.nn.Linear was expected")
    return Linear(module.weight.detach(), _wide(module.bias))


def _norm(module, offset=0.0):
    if module is None:
        return None
    weight, eps = module.weight.detach().float().contiguous(), getattr(module, "variance_epsilon", None)
    eps = getattr(module, "eps", None) if eps is None else eps
    bias = _wide(getattr(module, "bias", None))
    eps = torch.finfo(torch.float32).eps if eps is None else eps
    return Norm(weight, bias, eps, isinstance(module, nn.LayerNorm), offset)


def _wide(x):
    return None if x is None else x.detach().float().contiguous()


def _halves(rotary, *arguments):
    """A function from positions to (cos, sin), each [positions, rotated / 2], from a Hugging Face rotary module."""

    def table(positions):
        place = torch.arange(positions)[None]
        cos, sin = rotary(torch.zeros(1), place, *arguments)
        return tuple(x[0, :, : x.shape[-1] // 2].float().contiguous() for x in (cos, sin))

    return table


def _tables(rotary, config, kinds):
    """Description.tables of a Hugging Face rotary module, which may have a table per kind of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [p for p in parameters.values() if isinstance(p, dict)] or [parameters]
    grown = {str(p.get("rope_type")) for p in nested} & {"dynamic", "longrope"}
    if grown:
        raise Unsupported(f"rotary positions of type {grown.pop()} change with the length")
    per_kind = hasattr(rotary, "layer_types")
    made = {kind: _halves(rotary, *([kind] if per_kind else [])) for kind in kinds}
    return lambda positions: {kind: table(positions) for kind, table in made.items()}


def _llama(model) -> Description:
    """Llama, Mistral, Qwen2, Qwen3, Gemma, Gemma2, Gemma3: one skeleton, other norms, windows and caps."""
    config, core, name = model.config, model.model, type(model).__name__
    gemma = name.startswith("Gemma")
    offset = 1.0 if gemma else 0.0
    factor = torch.tensor(config.hidden_size**0.5 if gemma else 1.0)
    layers, kinds = [], set()
    first = core.layers[0].self_attn
    for module in core.layers:
        attention, feed = module.self_attn, module.mlp
        kind = getattr(attention, "layer_type", None) or "full_attention"
        window = getattr(attention, "sliding_window", None)
        if name.startswith("Mistral"):
            window = getattr(config, "sliding_window", None)
        if getattr(attention, "is_causal", True) is False:
            raise Unsupported("attention that is not causal")
        kinds.add(kind)
        second = getattr(module, "pre_feedforward_layernorm", None)  # Gemma2 and 3 norm what they add as well
        layers.append(
            Layer(
                attention_norm=_norm(module.input_layernorm, offset),
                qkv=[_linear(x) for x in (attention.q_proj, attention.k_proj, attention.v_proj)],
                q_norm=_norm(getattr(attention, "q_norm", None), offset),
                k_norm=_norm(getattr(attention, "k_norm", None), offset),
                out=_linear(attention.o_proj),
                after_attention=_norm(module.post_attention_layernorm, offset) if second is not None else None,
                feed_norm=_norm(module.post_attention_layernorm if second is None else second, offset),
                gate=_linear(feed.gate_proj),
                up=_linear(feed.up_proj),
                down=_linear(feed.down_proj),
                after_feed=_norm(module.post_feedforward_layernorm, offset) if second is not None else None,
                window=window or 0,
                rope=kind,
            )
        )
    return Description(
        family=name,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=first.head_dim,
        scale=first.scaling,
        activation=getattr(config, "hidden_activation", None) or config.hidden_act,
        embedding=_embedding(core.embed_tokens),
        embedding_scale=float(factor.to(core.norm.weight.dtype)),  # rounded, as the model's own is
        layers=layers,
        norm=_norm(core.norm, offset),
        head=_linear(model.lm_head),
        tables=_tables(core.rotary_emb, config, kinds),
        softcap=(getattr(config, "attn_logit_softcapping", None) or 0.0) if name.startswith("Gemma2") else 0.0,
        logit_softcap=getattr(config, "final_logit_softcapping", None) or 0.0,
    )


def _gpt2(model) -> Description:
    config, core = model.config, model.transformer
    if config.add_cross_attention or getattr(config, "scale_attn_by_inverse_layer_idx", False):
        raise Unsupported("GPT-2 with cross-attention, or with scores scaled by the number of the layer")
    layers = [
        Layer(
            attention_norm=_norm(module.ln_1),
            qkv=[_linear(module.attn.c_attn)],
            out=_linear(module.attn.c_proj),
            feed_norm=_norm(module.ln_2),
            gate=_linear(module.mlp.c_fc),
            up=None,
            down=_linear(module.mlp.c_proj),
        )
        for module in core.h
    ]
    return Description(
        family="GPT-2",
        heads=config.n_head,
        kv_heads=config.n_head,
        head_dim=config.n_embd // config.n_head,
        scale=core.h[0].attn.scaling,
        activation=config.activation_function,
        embedding=_embedding(core.wte),
        places=_wide(core.wpe.weight),
        layers=layers,
        norm=_norm(core.ln_f),
        head=_linear(model.lm_head),
        max_positions=config.n_positions,
    )


def _gpt_neox(model) -> Description:
    config, core = model.config, model.gpt_neox
    H, D = config.num_attention_heads, config.hidden_size // config.num_attention_heads

    def qkv(module):
        """Its rows are [head][query, key, value][D]; taken apart, for queries of all heads come first here."""
        whole = _linear(module)
        if whole.packed:  # in panels of 16 rows, which heads need not begin with
            whole = replace(whole, weight=whole.weight.dequantize())
        weights = whole.weight.view(H, 3, D, -1).unbind(1)
        biases = [None] * 3 if whole.bias is None else whole.bias.view(H, 3, D).unbind(1)
        flat = zip(weights, biases, strict=True)
        return [Linear(w.reshape(H * D, -1), None if b is None else b.reshape(-1)) for w, b in flat]

    layers = [
        Layer(
            attention_norm=_norm(module.input_layernorm),
            qkv=qkv(module.attention.query_key_value),
            out=_linear(module.attention.dense),
            feed_norm=_norm(module.post_attention_layernorm),
            gate=_linear(module.mlp.dense_h_to_4h),
            up=None,
            down=_linear(module.mlp.dense_4h_to_h),
            parallel=module.use_parallel_residual,
            rope="full_attention",
        )
        for module in core.layers
    ]
    return Description(
        family="GPT-NeoX",
        heads=H,
        kv_heads=H,
        head_dim=D,
        scale=core.layers[0].attention.scaling,
        activation=config.hidden_act,
        embedding=_embedding(core.embed_in),
        layers=layers,
        norm=_norm(core.final_layer_norm),
        head=_linear(getattr(model, "embed_out", None) or model.lm_head),
        tables=_tables(core.rotary_emb, config, {"full_attention"}),
    )


def _transformer(model) -> Description:
    """fastllm.model.Transformer, accelerated or not."""
    config, blocks = model.config, model.decoder.blocks if hasattr(model, "decoder") else []
    if config.kind != "decoder":
        raise Unsupported(f"a Transformer of kind {config.kind!r}")
    rotary = blocks[0].attention.rotary
    layers = [
        Layer(
            attention_norm=_norm(block.attention_norm),
            qkv=[_linear(x) for x in (block.attention.query, block.attention.key, block.attention.value)],
            out=_linear(block.attention.out),
            feed_norm=_norm(block.feed_forward_norm),
            gate=_linear(block.feed_forward.gate if config.activation == "swiglu" else block.feed_forward.up),
            up=_linear(block.feed_forward.up) if config.activation == "swiglu" else None,
            down=_linear(block.feed_forward.down),
            window=0 if config.window is None or config.window[0] in (None, -1) else config.window[0] + 1,
            rope=None if rotary is None else "rotary",
        )
        for block in blocks
    ]
    return Description(
        family="Transformer",
        heads=config.heads,
        kv_heads=config.kv_heads or config.heads,
        head_dim=blocks[0].attention.head_dim,
        scale=blocks[0].attention.head_dim ** -0.5,
        activation={"swiglu": "silu"}.get(config.activation, config.activation),
        embedding=_embedding(model.embedding),
        embedding_scale=config.d_model**0.5 if config.scale_embedding else 1.0,
        places=None if rotary is not None else _wide(model.positions),
        layers=layers,
        norm=_norm(model.decoder.norm),
        head=_linear(model.head),
        tables=lambda n: {} if rotary is None else {"rotary": (rotary.cos[:n].float(), rotary.sin[:n].float())},
        max_positions=config.max_len,
    )


FAMILIES = {
    "Transformer": _transformer,
    "GPT2LMHeadModel": _gpt2,
    "GPTNeoXForCausalLM": _gpt_neox,
    **{f"{name}ForCausalLM": _llama for name in "Llama Mistral Qwen2 Qwen3 Gemma Gemma2 Gemma3".split()},
}
