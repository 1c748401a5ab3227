"""Liger's functional names, and Hugging Face's rotary function, whose signature Liger's has too."""

from dataclasses import dataclass

import torch

from fastllm.compat.flash_attn_ops import log_sum_exp
from fastllm.ops.activation import geglu, swiglu
from fastllm.ops.cross_entropy import cross_entropy
from fastllm.ops.linear_cross_entropy import linear_cross_entropy
from fastllm.ops.norm import layer_norm, rms_norm
from fastllm.ops.rope import rope
from fastllm.ops.softmax import softmax


def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1, rotary_dim=None):
    """Hugging Face's: q and k [B, H, T, D] (unsqueeze_dim=1) or [B, T, H, D] (2) turned, cos and sin [B, T, D].

    rotary_dim=R turns the first R elements of a head, by tables [B, T, R].
    """
    if unsqueeze_dim == 1:
        return rope(q, k, cos, sin, rotary_dim=rotary_dim)
    if unsqueeze_dim != 2:
        raise ValueError(f"apply_rotary_pos_emb: unsqueeze_dim must be 1 or 2, got {unsqueeze_dim}")
    q, k = rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin, rotary_dim=rotary_dim)
    return q.transpose(1, 2), k.transpose(1, 2)


def liger_rope(q, k, cos, sin, position_ids=None, unsqueeze_dim=1, rotary_dim=None):
    """Liger's: `apply_rotary_pos_emb`, of the first rotary_dim elements; position_ids are not looked at, as there."""
    return apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim, rotary_dim)


def liger_swiglu(a, b):
    """Liger's: silu(a) * b."""
    return swiglu(a, b)


def liger_geglu(a, b):
    """Liger's: gelu(a) * b, gelu by tanh."""
    return geglu(a, b, approximate="tanh")


def liger_rms_norm(X, W, eps, offset=0.0, casting_mode="llama", in_place=True):
    """Liger's: X / rms(X) * (W + offset). Every casting_mode rounds once, at the end; no gradient is overwritten."""
    return rms_norm(X, W, eps=eps, weight_offset=offset)


def liger_layer_norm(X, W, B, eps):
    """Liger's: layer norm over the last dimension of X."""
    return layer_norm(X, W, B, eps=eps)


def liger_softmax(x):
    """Liger's: softmax over the last dimension."""
    return softmax(x)


@dataclass
class CrossEntropyOutput:
    """What Liger's losses return where more than the loss is asked for; None is what was not."""

    loss: torch.Tensor
    z_loss: torch.Tensor | None = None
    token_accuracy: torch.Tensor | None = None
    predicted_tokens: torch.Tensor | None = None


def liger_cross_entropy(
    input,
    target,
    weight=None,
    size_average=None,
    ignore_index=-100,
    reduce=None,
    reduction="mean",
    label_smoothing=0.0,
    lse_square_scale=0.0,
    softcap=None,
    return_z_loss=False,
    return_token_accuracy=False,
    return_predicted_tokens=False,
):
    """Liger's: `fastllm.cross_entropy` of input [N, V] with z_loss=lse_square_scale; the logits are not overwritten.

    Returns the loss, or a `CrossEntropyOutput` of what is asked for: the part of the loss that is z-loss (a number to
    look at, without a gradient of its own), the share of tokens that are right, the class with the largest logit of
    each token (-1 where the target is ignored).
    """
    options = dict(softcap=softcap or 0.0, z_loss=lse_square_scale)
    loss = cross_entropy(
        input,
        target,
        weight,
        size_average,
        ignore_index,
        reduce,
        reduction,
        label_smoothing,
        return_token_accuracy=return_token_accuracy,
        **options,
    )
    loss, accuracy = loss if return_token_accuracy else (loss, None)
    found = CrossEntropyOutput(loss, token_accuracy=accuracy)
    kept = target != ignore_index
    with torch.no_grad():
        if return_z_loss:
            capped = softcap * torch.tanh(input / softcap) if softcap else input
            z = (lse_square_scale * log_sum_exp(capped).square()).masked_fill(~kept, 0.0)
            found.z_loss = z if reduction == "none" else z.sum() / (kept.sum() if reduction == "mean" else 1)
        if return_predicted_tokens:
            found.predicted_tokens = input.argmax(-1).masked_fill(~kept, -1)
    return found if return_z_loss or return_token_accuracy or return_predicted_tokens else loss


def liger_fused_linear_cross_entropy(
    input,
    weight,
    target,
    bias=None,
    ce_weight=None,
    ignore_index=-100,
    lse_square_scale=0.0,
    label_smoothing=0.0,
    reduction="mean",
    softcap=None,
    return_z_loss=False,
    accum_dtype=None,
    use_token_scaling=False,
    return_token_accuracy=False,
    return_predicted_tokens=False,
    chunk_mem_const=1,
):
    """Liger's: `fastllm.linear_cross_entropy`, weight [V, D] being the head's and ce_weight [V] that of the classes.

    Returns the loss, or with return_token_accuracy a `CrossEntropyOutput`. Sums are kept in fp32 whatever accum_dtype
    says, and the size of pieces is the kernel's to choose. Raises ValueError for use_token_scaling, return_z_loss and
    return_predicted_tokens: what they need is never in memory.
    """
    for name, asked in (
        ("use_token_scaling", use_token_scaling),
        ("return_z_loss", return_z_loss),
        ("return_predicted_tokens", return_predicted_tokens),
    ):
        if asked:
            raise ValueError(f"liger_fused_linear_cross_entropy: {name} is not supported")
    found = linear_cross_entropy(
        input,
        weight,
        target,
        linear_bias=bias,
        weight=ce_weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        softcap=softcap or 0.0,
        z_loss=lse_square_scale,
        return_token_accuracy=return_token_accuracy,
    )
    return CrossEntropyOutput(found[0], token_accuracy=found[1]) if return_token_accuracy else found
