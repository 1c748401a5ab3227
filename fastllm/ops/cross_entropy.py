"""cross_entropy: torch's loss, with soft-cap, z-loss and token accuracy."""

import functools

import torch

from fastllm import reference
from fastllm.dispatch import Op, choose, cpu_op, differentiable_again, direct, is_free
from fastllm.ops._common import FLOATS, check_tensor, gradients_through, in_dtype, is_autocast, no_fp64, wants_gradient

REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


def reduction_number(reduction):
    """`reduction` as the ops take it; None for what is none."""
    return REDUCTIONS.get(reduction) if isinstance(reduction, str) else None


def wide(x):
    """The dtype that `x` is computed in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def empty(x, shape, dtype):
    """Fresh memory on the device of `x`."""
    return torch.empty(shape, dtype=dtype, device=x.device)


cross_entropy_fwd = Op(
    "cross_entropy_fwd(Tensor x, Tensor target, Tensor? weight, int ignore_index, int reduction,"
    " float label_smoothing, float softcap, float z_loss, bool accuracy) -> (Tensor loss, Tensor lse, Tensor right)",
    "cross_entropy",
    lambda x, target, weight, ignore_index, reduction, label_smoothing, softcap, z_loss, accuracy: (
        empty(x, () if reduction else target.shape, wide(x)),
        empty(x, target.shape, torch.float64),
        empty(x, target.shape if accuracy else (0,), torch.bool),
    ),
)
cross_entropy_bwd = Op(
    "cross_entropy_bwd(Tensor dloss, Tensor x, Tensor target, Tensor? weight, Tensor lse, int ignore_index,"
    " int reduction, float label_smoothing, float softcap, float z_loss) -> Tensor dx",
    "cross_entropy",
    lambda dloss, x, *rest: empty(x, x.shape, x.dtype),
)
cpu_op(
    "cross_entropy_plain(Tensor x, Tensor target, int ignore_index, int reduction, float label_smoothing) -> Tensor",
    lambda x, target, ignore_index, reduction, label_smoothing: empty(x, () if reduction else target.shape, wide(x)),
)


def _again(dloss, x, target, ignore_index, reduction, label_smoothing):
    loss = reference_loss((ignore_index, reduction, label_smoothing, 0.0, 0.0))
    return gradients_through(lambda x: loss(x.to(dloss.dtype), target), (x,), (dloss,))[0]


differentiable_again(
    "cross_entropy_again(Tensor dloss, Tensor x, Tensor target, int ignore_index, int reduction,"
    " float label_smoothing) -> Tensor dx",
    _again,
)
_at_once = direct("cross_entropy")


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, target, weight, options, accuracy, dtype, backend):
        loss, lse, right = cross_entropy_fwd(backend, x, target, weight, *options, accuracy)
        ctx.save_for_backward(x, target, weight, lse)
        ctx.mark_non_differentiable(right)
        ctx.options, ctx.dtype, ctx.backend = options, dtype, backend
        return in_dtype(loss, dtype), right

    @staticmethod
    def backward(ctx, dloss, _):
        x, target, weight, lse = ctx.saved_tensors
        if torch.is_grad_enabled():
            loss = reference_loss(ctx.options)
            (dx,) = gradients_through(lambda x: loss(x.to(ctx.dtype), target, weight=weight), (x,), (dloss,))
        else:
            dx = cross_entropy_bwd(ctx.backend, dloss.contiguous(), x, target, weight, lse, *ctx.options)
        return dx, None, None, None, None, None, None


def reference_loss(options):
    """reference.cross_entropy with `options` as the ops take them."""
    ignore_index, reduction, label_smoothing, softcap, z_loss = options
    return functools.partial(
        reference.cross_entropy,
        ignore_index=ignore_index,
        reduction=next(name for name, number in REDUCTIONS.items() if number == reduction),
        label_smoothing=label_smoothing,
        softcap=softcap,
        z_loss=z_loss,
    )


def cross_entropy(
    input,
    target,
    weight=None,
    size_average=None,
    ignore_index=-100,
    reduce=None,
    reduction="mean",
    label_smoothing=0.0,
    *,
    softcap=0.0,
    z_loss=0.0,
    return_token_accuracy=False,
):
    """loss = -log p[target] with p = softmax(input) over the classes, as torch.nn.functional.cross_entropy has it.

    The arguments stand in its order; size_average and reduce, which it has deprecated, must be None.

    input [N, V], [V] or [N, V, d1, ...] in fp32, bf16, fp16 or fp64 (the classes of the last are brought to the end,
    which copies); target int64 or uint8 [N], [] or [N, d1, ...]. weight [V], a constant, multiplies the loss of each
    class, and the mean divides by its sum over the targets. Rows with target == ignore_index have loss 0 and gradient
    0. label_smoothing s mixes targets with the uniform distribution. Probabilities as targets, of input's shape, go to
    plain PyTorch.
    softcap c > 0 makes logits c * tanh(input / c). z_loss adds z_loss * lse^2 (PaLM), unweighted, over the same rows.
    Returns the loss in input's dtype (fp32 under autocast): a number, or with reduction="none" one per target. With
    return_token_accuracy (loss, accuracy): the share of the kept targets that have the largest logit, the first of
    equals; with reduction="none" 1.0 or 0.0 each. If all targets are ignored the mean is NaN and gradients are 0.

    Computed in fp32 (fp64 for fp64) in one pass over the logits, the sums over rows in fp64. Saves the logits, and 8
    bytes a row, for the backward pass: nothing else of size N x V is made but the gradient.
    Raises TypeError for dtypes, ValueError for shapes, devices and ranges. A target that is no class raises
    RuntimeError on CPU; on a GPU, where looking would wait for it, it makes the loss NaN.
    Error: at most 1.1 times that of torch's cross_entropy in input's dtype (tests/test_cross_entropy.py).
    Source: Milakov and Gimelshein 2018, arXiv:1805.02867; Chowdhery et al. 2022, arXiv:2204.02311 (z-loss).
    """
    if not (size_average is reduce is None):
        raise ValueError(
            'cross_entropy: size_average and reduce are deprecated in PyTorch and not taken here: say reduction="mean",'
            f' "sum" or "none" (they are the 4th and 6th argument, got {size_average!r} and {reduce!r})'
        )
    if weight is None and softcap == z_loss == 0 and not return_token_accuracy and is_free():
        loss = _at_once(input, target, ignore_index, reduction_number(reduction), label_smoothing)
        if loss is not None:
            return loss
    op = "cross_entropy"
    check_tensor(op, "input", input)
    if input.ndim == 0 or input.shape[min(input.ndim - 1, 1)] == 0:
        raise ValueError(f"{op}: input must be [N, V, ...] or [V] with V >= 1, got {list(input.shape)}")
    wanted = [n for i, n in enumerate(input.shape) if i != min(input.ndim - 1, 1)]
    x = input.movedim(1, -1) if input.ndim > 2 else input
    options = check_loss(op, x, wanted, target, weight, ignore_index, reduction, label_smoothing, softcap, z_loss)
    if target.dtype == torch.uint8:  # as torch takes them
        target = target.long()
    x = x.reshape(-1, x.shape[-1])
    probabilities = target.is_floating_point()
    backend = choose(op, x, lacks(x, probabilities))
    dtype = loss_dtype(x)
    if backend == "reference":
        flat = (target.movedim(1, -1) if target.ndim > 2 else target).reshape(x.shape if probabilities else -1)
        result = reference_loss(options)(x.to(dtype), flat, weight=weight, return_token_accuracy=return_token_accuracy)
        loss, accuracy = result if return_token_accuracy else (result, None)
    else:
        x, flat = x.contiguous(), target.reshape(-1).contiguous()
        if wants_gradient(x):
            loss, right = _CrossEntropy.apply(x, flat, weight, options, return_token_accuracy, dtype, backend)
        else:
            loss, _, right = cross_entropy_fwd(backend, x, flat, weight, *options, return_token_accuracy)
            loss = loss.to(dtype)
        accuracy = token_accuracy(right, flat, options) if return_token_accuracy else None
    if reduction == "none":
        loss, accuracy = loss.view(wanted), accuracy.view(wanted) if return_token_accuracy else None
    return (loss, accuracy) if return_token_accuracy else loss


def token_accuracy(right, target, options):
    """The share of kept targets that are right; with reduction="none" all of them in fp32."""
    ignore_index, reduction, *_ = options
    return right.sum() / (target != ignore_index).sum() if reduction else right.float()


def loss_dtype(x):
    """What torch's losses return: x's dtype, fp32 at least under autocast."""
    return wide(x) if is_autocast(x) else x.dtype


def lacks(x, probabilities):
    """`unsupported` for dispatch.choose."""
    if probabilities:
        return lambda backend: "target: there is no kernel for probabilities"
    return no_fp64(x)


def check_loss(op, x, wanted, target, weight, ignore_index, reduction, label_smoothing, softcap, z_loss, classes=None):
    """Checks what both losses take; returns the numbers in the order of the ops' schemas.

    x [..., V], or [..., D] with its `classes` V; `wanted` is the shape of targets. Probabilities have V beside them:
    after the first dimension, where x came from logits that have it there, and last where `classes` is given.
    """
    V = classes or x.shape[-1]
    check_tensor(op, "target", target, like=x, dtypes=(torch.int64, torch.uint8, *FLOATS))
    if target.is_floating_point():
        first = len(wanted) if classes else 1
        wanted = [*wanted[:first], V, *wanted[first:]]
    if list(target.shape) != wanted:
        raise ValueError(f"{op}: target must be {wanted} for input {list(x.shape)}, got {list(target.shape)}")
    if weight is not None:
        check_tensor(op, "weight", weight)
        if weight.device != x.device or weight.shape != (V,):
            raise ValueError(f"{op}: weight must be [{V}] on {x.device}, got {list(weight.shape)} on {weight.device}")
        if weight.requires_grad:
            raise ValueError(f"{op}: weight is a constant: it may not require a gradient")
    if reduction_number(reduction) is None:
        raise ValueError(f"{op}: reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{op}: label_smoothing must be in [0, 1], got {label_smoothing}")
    if not 0.0 <= softcap < float("inf"):
        raise ValueError(f"{op}: softcap must be at least 0 (0 = none), got {softcap}")
    if not 0.0 <= z_loss < float("inf"):
        raise ValueError(f"{op}: z_loss must be at least 0, got {z_loss}")
    return int(ignore_index), REDUCTIONS[reduction], float(label_smoothing), float(softcap), float(z_loss)
