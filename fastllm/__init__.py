"""fastllm: fused kernels for PyTorch transformers, forward and backward, on CPU and GPU."""

from fastllm.dispatch import backend
from fastllm.explain import explain
from fastllm.ops.attention import attention
from fastllm.ops.norm import layer_norm, rms_norm
from fastllm.ops.softmax import log_softmax, softmax
from fastllm.ops.varlen import attention_varlen

__version__ = "0.1.0"
__all__ = ["attention", "attention_varlen", "backend", "explain", "layer_norm", "log_softmax", "rms_norm", "softmax"]
