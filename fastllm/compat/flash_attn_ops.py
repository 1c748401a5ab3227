"""flash-attn's functions around attention: norms with residual and dropout, rotary positions, the loss."""

import contextlib

import torch
import torch.nn.functional as F

from fastllm.compat.flash_attn import with_signature_of
from fastllm.ops.cross_entropy import cross_entropy
from fastllm.ops.norm import layer_norm, rms_norm
from fastllm.ops.rope import rope


def layer_norm_fn(
    x,
    weight,
    bias,
    residual=None,
    x1=None,
    weight1=None,
    bias1=None,
    eps=1e-6,
    dropout_p=0.0,
    rowscale=None,
    prenorm=False,
    residual_in_fp32=False,
    zero_centered_weight=False,
    is_rms_norm=False,
    return_dropout_mask=False,
    out_dtype=None,
    out=None,
    residual_out=None,
):
    """flash-attn's: y = norm(h) * weight + bias with h = dropout(x * rowscale) + dropout(x1) + residual.

    Returns y; (y, y1) with a second weight for the same h; with prenorm also h, as the last. h has residual's dtype,
    and where there is none x's, or fp32 with residual_in_fp32. zero_centered_weight adds 1 to the weights. Dropout,
    addition and norm are one kernel, which draws what it drops as `fastllm.layer_norm` does. Raises ValueError for
    return_dropout_mask, because no mask is stored, and for out and residual_out, whose memory the caller would own.
    """
    name = "rms_norm_fn" if is_rms_norm else "layer_norm_fn"
    if return_dropout_mask or out is not None or residual_out is not None:
        raise ValueError(f"{name}: return_dropout_mask, out and residual_out are not supported")
    wide = residual.dtype if residual is not None else torch.float32 if residual_in_fp32 else x.dtype
    h = (x if rowscale is None else x * rowscale.unsqueeze(-1)).to(wide)
    if x1 is not None:  # what is added to x1 in the kernel
        h = F.dropout(h, dropout_p) if dropout_p else h
        h, residual = x1.to(wide), h if residual is None else h + residual
    elif dropout_p and residual is None and (prenorm or weight1 is not None):  # so that h comes back
        residual = torch.zeros_like(h)

    def norm(h, weight, bias, residual=None, dropout_p=0.0):
        options = dict(eps=eps, residual=residual, dropout_p=dropout_p)
        if is_rms_norm:
            y = rms_norm(h, weight, weight_offset=float(zero_centered_weight), **options)
        else:
            y = layer_norm(h, weight + 1 if zero_centered_weight else weight, bias, **options)
        y, h = (y, h) if residual is None else y
        return (y + bias if is_rms_norm and bias is not None else y), h

    y, h = norm(h, weight, bias, residual, dropout_p)
    found = [y] if weight1 is None else [y, norm(h, weight1, bias1)[0]]
    found = [y.to(out_dtype or x.dtype) for y in found] + [h] * prenorm
    return found[0] if len(found) == 1 else tuple(found)


@with_signature_of(layer_norm_fn, without=("is_rms_norm",))
def rms_norm_fn(*given, **named):
    """flash-attn's: `layer_norm_fn` with y = h / rms(h) * weight + bias."""
    before, after = given[:13], given[13:]  # the parameters on both sides of is_rms_norm
    return layer_norm_fn(*before, **dict(zip(AFTER, after, strict=False)), **named, is_rms_norm=True)


AFTER = "return_dropout_mask", "out_dtype", "out", "residual_out"


def apply_rotary_emb(x, cos, sin, interleaved=False, inplace=False, seqlen_offsets=0, cu_seqlens=None, max_seqlen=None):
    """flash-attn's: x [B, T, H, D], or packed [total, H, D] with cu_seqlens; cos and sin [S, R / 2].

    seqlen_offsets is an integer or has one for each sequence. inplace=True also writes the result into x. max_seqlen is
    not needed. The rest is `fastllm.rope`.
    """
    if cos.ndim != 2 or 2 * cos.shape[-1] > x.shape[-1]:
        raise ValueError(f"apply_rotary_emb: cos must be [S, R / 2], R at most {x.shape[-1]}, got {list(cos.shape)}")
    options = dict(interleaved=interleaved, offset=seqlen_offsets)
    if cu_seqlens is not None:
        y = rope(x, None, cos, sin, cu_seqlens=cu_seqlens, **options)
    else:
        y = rope(x.transpose(1, 2), None, cos, sin, **options).transpose(1, 2)
    return x.copy_(y) if inplace else y


def cross_entropy_loss(
    logits,
    labels,
    precomputed_lse=None,
    label_smoothing=0.0,
    logit_scale=1.0,
    lse_square_scale=0.0,
    ignore_index=-100,
    inplace_backward=False,
    process_group=None,
):
    """flash-attn's: (losses [N], z_losses [N]) in fp32 of logits [N, V] * logit_scale, 0 where a label is ignored.

    The losses contain the z-losses, lse_square_scale * lse^2, which have no gradient of their own. precomputed_lse is
    not needed and not looked at; with inplace_backward too the logits stay as they are. With a process_group of
    several, each has its part of the classes, in the order of the ranks, and all get the same losses; that is plain
    PyTorch around the collectives. The rest is `fastllm.cross_entropy`.
    """
    logits = logits if logit_scale == 1.0 else logits * logit_scale
    if process_group is not None and torch.distributed.get_world_size(process_group) > 1:
        return _OverProcesses.apply(logits, labels, label_smoothing, lse_square_scale, ignore_index, process_group)
    options = dict(ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing)
    losses = losses_in_fp32(logits, labels, z_loss=lse_square_scale, **options)
    if not lse_square_scale:
        return losses, torch.zeros_like(losses)
    with torch.no_grad():
        z_losses = lse_square_scale * log_sum_exp(logits).square()
    return losses, z_losses.masked_fill(labels == ignore_index, 0.0)


def losses_in_fp32(logits, labels, **options):
    """`fastllm.cross_entropy` without rounding to the logits' dtype: under autocast it returns what it computed."""
    low = logits.dtype in (torch.bfloat16, torch.float16)
    with torch.autocast(logits.device.type, logits.dtype) if low else contextlib.nullcontext():
        return cross_entropy(logits, labels, **options).float()


def log_sum_exp(logits):
    """The loss of class 0 is lse - logits[0]: one pass of the kernel, nothing of the size of the logits is made."""
    first = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    return losses_in_fp32(logits, first, reduction="none") + logits[:, 0].float()


class _OverProcesses(torch.autograd.Function):
    """The loss where each process has a part of the classes: of whole rows, only three numbers are exchanged."""

    @staticmethod
    def forward(ctx, logits, labels, smoothing, z, ignore_index, group):
        world, V = torch.distributed.get_world_size(group), logits.shape[-1]
        labels = labels - torch.distributed.get_rank(group) * V  # as this process counts
        ignored = labels == ignore_index - torch.distributed.get_rank(group) * V
        largest = logits.amax(-1, keepdim=True).float()
        # In fp64, since what is lost of a log-sum-exp is lost of all probabilities of its row.
        part = largest[:, 0].double() + (logits - largest).exp_().sum(-1).double().log()
        everyones = [torch.empty_like(part) for _ in range(world)]
        torch.distributed.all_gather(everyones, part, group=group)
        lse = torch.stack(everyones).logsumexp(0)
        share = (largest[:, 0].double() - lse).exp().float()
        lse = lse.float()
        mine = (labels >= 0) & (labels < V) & ~ignored
        picked = logits.gather(-1, labels.clamp(0, V - 1)[:, None])[:, 0].float().where(mine, 0.0)
        found = (1 - smoothing) * picked + smoothing / (world * V) * logits.sum(-1, dtype=torch.float32)
        torch.distributed.all_reduce(found, group=group)
        z_losses = (z * lse.square()).masked_fill(ignored, 0.0)
        losses = (lse - found).masked_fill(ignored, 0.0) + z_losses
        ctx.save_for_backward(logits, labels, largest, share, lse, mine, ignored)
        ctx.smoothing, ctx.z, ctx.classes = smoothing, z, world * V
        ctx.mark_non_differentiable(z_losses)
        return losses, z_losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dlosses, _):
        logits, labels, largest, share, lse, mine, ignored = ctx.saved_tensors
        share = share * (1 + 2 * ctx.z * lse)
        grad = (logits - largest).exp_().mul_(share[:, None]).sub_(ctx.smoothing / ctx.classes)
        at = labels.clamp(0, logits.shape[-1] - 1)[:, None]
        grad.scatter_add_(-1, at, -(1 - ctx.smoothing) * mine[:, None].float())
        grad *= dlosses.masked_fill(ignored, 0.0)[:, None]
        return grad.to(logits.dtype), None, None, None, None, None
