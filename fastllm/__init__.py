"""fastllm: fused kernels for PyTorch transformers, forward and backward, on CPU and GPU."""

from fastllm.allocator import tune_allocator
from fastllm.compat import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
    pad_input,
    unpad_input,
)
from fastllm.dispatch import backend
from fastllm.explain import explain
from fastllm.generation import generate
from fastllm.ops.activation import bias_gelu, geglu, swiglu
from fastllm.ops.attention import attention
from fastllm.ops.cross_entropy import cross_entropy
from fastllm.ops.kvcache import attention_with_kvcache
from fastllm.ops.linear import linear
from fastllm.ops.linear_cross_entropy import linear_cross_entropy
from fastllm.ops.lora import lora_linear
from fastllm.ops.merge_attention import merge_attention
from fastllm.ops.norm import layer_norm, rms_norm
from fastllm.ops.ring import ring_attention
from fastllm.ops.rope import rope
from fastllm.ops.softmax import log_softmax, softmax
from fastllm.ops.varlen import attention_varlen
from fastllm.ops.weight_only import QuantizedWeight, quantize_weight, weight_only_linear
from fastllm.patch import accelerate, accelerated, restore

__version__ = "0.1.0"
__all__ = [
    "QuantizedWeight",
    "accelerate",
    "accelerated",
    "attention",
    "attention_varlen",
    "attention_with_kvcache",
    "backend",
    "bias_gelu",
    "cross_entropy",
    "explain",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "geglu",
    "generate",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "log_softmax",
    "lora_linear",
    "merge_attention",
    "pad_input",
    "quantize_weight",
    "restore",
    "ring_attention",
    "rms_norm",
    "rope",
    "softmax",
    "swiglu",
    "tune_allocator",
    "unpad_input",
    "weight_only_linear",
]
