"""Modules around the ops. Where torch has the module, its constructor, defaults and state dict are kept."""

from fastllm.nn.attention import Attention, KeyValues, Rotary, sequence_parallel
from fastllm.nn.linear import GeGLU, Linear, LoRALinear, QuantizedEmbedding, QuantizedLinear, SwiGLU
from fastllm.nn.loss import CrossEntropyLoss, LinearCrossEntropyLoss
from fastllm.nn.norm import LayerNorm, RMSNorm
from fastllm.ops.ring import Shards

__all__ = [
    "Attention",
    "CrossEntropyLoss",
    "GeGLU",
    "KeyValues",
    "LayerNorm",
    "Linear",
    "LinearCrossEntropyLoss",
    "LoRALinear",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "RMSNorm",
    "Rotary",
    "Shards",
    "SwiGLU",
    "sequence_parallel",
]
