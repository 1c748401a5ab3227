"""Other libraries' function signatures on fastllm's ops, so that their callers run: flash-attn's, PyTorch's, Liger's.

Layouts, defaults and alignments are those of the library a name comes from. Every function runs on CPU and GPU, forward
and backward, also in fp32 and for head sizes that the original refuses.
"""

from fastllm.compat.flash_attn import (
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
from fastllm.compat.flash_attn_ops import apply_rotary_emb, cross_entropy_loss, layer_norm_fn, rms_norm_fn
from fastllm.compat.liger import (
    apply_rotary_pos_emb,
    liger_cross_entropy,
    liger_fused_linear_cross_entropy,
    liger_geglu,
    liger_layer_norm,
    liger_rms_norm,
    liger_rope,
    liger_softmax,
    liger_swiglu,
)
from fastllm.compat.pytorch import scaled_dot_product_attention
from fastllm.compat.stand_in import install_flash_attn, uninstall_flash_attn

__all__ = [
    "apply_rotary_emb",
    "apply_rotary_pos_emb",
    "cross_entropy_loss",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "install_flash_attn",
    "layer_norm_fn",
    "liger_cross_entropy",
    "liger_fused_linear_cross_entropy",
    "liger_geglu",
    "liger_layer_norm",
    "liger_rms_norm",
    "liger_rope",
    "liger_softmax",
    "liger_swiglu",
    "pad_input",
    "rms_norm_fn",
    "scaled_dot_product_attention",
    "uninstall_flash_attn",
    "unpad_input",
]
