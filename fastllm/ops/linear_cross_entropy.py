"""linear_cross_entropy: the loss of a language model's head, whose logits never are in memory all at once."""

import torch

from fastllm.dispatch import Composite, Op, choose, direct, is_free
from fastllm.ops import _tuned
from fastllm.ops._common import autocast, check_tensor, gradients_through, in_dtype, wants_gradient
from fastllm.ops.cross_entropy import (
    REDUCTIONS,
    check_loss,
    empty,
    lacks,
    loss_dtype,
    reduction_number,
    reference_loss,
    token_accuracy,
    wide,
)
from fastllm.ops.linear import linear_bwd_out, linear_out, own_products

cross_entropy_total = Op(
    "cross_entropy_total(Tensor target, Tensor? weight, int classes, int ignore_index) -> Tensor",
    "cross_entropy",
    lambda target, *rest: empty(target, (2,), torch.float64),
)
cross_entropy_rows = Op(
    "cross_entropy_rows(Tensor(a!) x, Tensor target, Tensor? weight, Tensor? total, Tensor? dloss, int ignore_index,"
    " float label_smoothing, float softcap, float z_loss, bool accuracy) -> (Tensor loss, Tensor right)",
    "cross_entropy",
    lambda x, target, weight, total, dloss, ignore_index, label_smoothing, softcap, z_loss, accuracy: (
        empty(x, target.shape, torch.float64),
        empty(x, target.shape if accuracy else (0,), torch.bool),
    ),
)


def rows_at_once(N, device):
    """How many rows' logits are in memory at a time: 128 on CPU.

    On a GPU an eighth of them, where that is more: a product of 128 rows reads and writes the gradient of the weights,
    V x D, for too little arithmetic. Logits of N / 8 rows are still a 24th of what torch keeps.
    """
    return 128 if device == "cpu" else max(128, -(-N // 8))


class _Products:
    """The three products of a chunk of rows, written to memory that is there; ours where they were measured to win."""

    def __init__(self, backend, x, linear_weight, rows):
        there = backend == "cpu" and linear_out is not None
        self.own = own_products(x.dtype, rows, *linear_weight.shape) if there else (False,) * 3
        self.weight = linear_weight

    def logits(self, x, bias, out):
        if self.own[0]:
            linear_out(x, self.weight, bias, out)
        elif bias is None:
            torch.mm(x, self.weight.mT, out=out)
        else:
            torch.addmm(bias, x, self.weight.mT, out=out)

    def dx(self, dlogits, x, out):
        if self.own[1]:
            linear_bwd_out(dlogits, x, self.weight, out, None, False)
        else:
            torch.mm(dlogits, self.weight, out=out)

    def dweight(self, dlogits, x, out, add):
        if self.own[2]:
            linear_bwd_out(dlogits, x, self.weight, None, out, add)
        else:
            torch.addmm(out, dlogits.mT, x, beta=int(add), out=out)


def _forward(
    backend,
    x,
    linear_weight,
    linear_bias,
    target,
    weight,
    dloss,
    ignore_index,
    reduction,
    label_smoothing,
    softcap,
    z_loss,
    accuracy,
    wanted,
):
    """The loss and, as `wanted` of (x, linear_weight, linear_bias), gradients: of dloss times it, or of the loss.

    A chunk of rows at a time: its logits, their losses, and in the place of the logits their gradients, from which the
    gradients of the inputs follow while they are in the cache. Three products in all, as many as torch has.
    """
    N, V = len(x), len(linear_weight)
    R = min(rows_at_once(N, x.device.type), max(N, 1))
    losses, right = empty(x, (N,), torch.float64), empty(x, (N if accuracy else 0,), torch.bool)
    dx, dweight, dbias = (
        empty(x, like.shape if want else (0,), dtype)
        for like, want, dtype in zip(
            (x, linear_weight, linear_weight[:, 0]), wanted, (x.dtype, x.dtype, wide(x)), strict=True
        )
    )
    total = cross_entropy_total(backend, target, weight, V, ignore_index) if reduction == REDUCTIONS["mean"] else None
    if dloss is None and any(wanted):
        dloss = torch.ones((), dtype=wide(x), device=x.device)
    buffer, products = empty(x, (R, V), x.dtype), _Products(backend, x, linear_weight, R)
    for start in range(0, N, R):
        rows = slice(start, min(start + R, N))
        logits = buffer[: rows.stop - start]
        products.logits(x[rows], linear_bias, logits)
        given = dloss[rows] if dloss is not None and dloss.ndim else dloss
        options = ignore_index, label_smoothing, softcap, z_loss, accuracy
        losses[rows], found = cross_entropy_rows(backend, logits, target[rows], weight, total, given, *options)
        if accuracy:
            right[rows] = found
        if wanted[0]:
            products.dx(logits, x[rows], dx[rows])
        if wanted[1]:
            products.dweight(logits, x[rows], dweight, add=start > 0)
        if wanted[2]:
            sums = logits.sum(0)  # added up in fp32, whatever its dtype; asked for fp32, it would copy the logits
            dbias.copy_(sums) if start == 0 else dbias.add_(sums)
    if not N:
        for gradient in (dweight, dbias):
            gradient.zero_()
    if reduction:
        losses = losses.sum() / total[0] if total is not None else losses.sum()
    return losses.to(wide(x)), right, dx, dweight, dbias


def _backward(backend, dloss, x, linear_weight, linear_bias, target, weight, *options):
    *numbers, wanted = options
    return _forward(backend, x, linear_weight, linear_bias, target, weight, dloss, *numbers, False, wanted)[2:]


def _gradients(x, linear_weight, wanted):
    shapes = x.shape, linear_weight.shape, linear_weight.shape[:1]
    dtypes = x.dtype, x.dtype, wide(x)
    return tuple(empty(x, s if want else (0,), d) for s, d, want in zip(shapes, dtypes, wanted, strict=True))


_NUMBERS = "int ignore_index, int reduction, float label_smoothing, float softcap, float z_loss"
linear_cross_entropy_fwd = Composite(
    "linear_cross_entropy_fwd(Tensor x, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor? weight,"
    f" Tensor? dloss, {_NUMBERS}, bool accuracy, bool[3] wanted)"
    " -> (Tensor loss, Tensor right, Tensor dx, Tensor dlinear_weight, Tensor dlinear_bias)",
    _forward,
    lambda x, linear_weight, linear_bias, target, weight, dloss, ignore_index, reduction, *rest: (
        empty(x, () if reduction else target.shape, wide(x)),
        empty(x, target.shape if rest[3] else (0,), torch.bool),
        *_gradients(x, linear_weight, rest[4]),
    ),
)
linear_cross_entropy_bwd = Composite(
    "linear_cross_entropy_bwd(Tensor dloss, Tensor x, Tensor linear_weight, Tensor? linear_bias, Tensor target,"
    f" Tensor? weight, {_NUMBERS}, bool[3] wanted) -> (Tensor dx, Tensor dlinear_weight, Tensor dlinear_bias)",
    _backward,
    lambda dloss, x, linear_weight, *rest: _gradients(x, linear_weight, rest[-1]),
)


_at_once = direct("linear_cross_entropy")


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradients of one number are known but for a factor, so forward makes them while it has the logits.

    Three products then, not four, and backward multiplies and gives them away; asked a second time, it makes them
    again. Losses row by row have a factor each, and fp16 wants the factor first (a loss scale is there to keep small
    gradients from becoming 0): backward makes the logits anew.
    """

    @staticmethod
    def forward(ctx, x, linear_weight, linear_bias, target, weight, options, accuracy, wanted, dtype, backend):
        early = wanted if options[1] and x.dtype != torch.float16 else (False,) * 3
        loss, right, *gradients = linear_cross_entropy_fwd(
            backend, x, linear_weight, linear_bias, target, weight, None, *options, accuracy, early
        )
        ctx.mark_non_differentiable(right)
        ctx.options, ctx.wanted, ctx.early, ctx.dtype, ctx.backend = options, wanted, any(early), dtype, backend
        inputs = x, linear_weight, linear_bias, target, weight
        if torch.compiler.is_compiling():
            ctx.save_for_backward(*inputs, *gradients)
        else:  # what save_for_backward keeps cannot be given away: a parameter would have to copy its gradient
            ctx.save_for_backward(*inputs)
            ctx.gradients = gradients if ctx.early else None
        return in_dtype(loss, dtype), right

    @staticmethod
    def backward(ctx, dloss, _):
        x, linear_weight, linear_bias, target, weight, *gradients = ctx.saved_tensors
        if torch.is_grad_enabled():

            def loss(x, linear_weight, linear_bias):
                logits = torch.nn.functional.linear(x, linear_weight, linear_bias)
                return reference_loss(ctx.options)(logits.to(ctx.dtype), target, weight=weight)

            made = gradients_through(loss, (x, linear_weight, linear_bias), (dloss,))
            return *made, *(None,) * 7
        if torch.compiler.is_compiling():
            gradients = [g * dloss for g in gradients] if ctx.early else None
        else:
            gradients, ctx.gradients = ctx.gradients, None
            if gradients is not None and (x.is_cuda or dloss != 1):
                for g in gradients:
                    g.mul_(dloss)
        if gradients is None:
            gradients = linear_cross_entropy_bwd(
                ctx.backend, dloss.contiguous(), x, linear_weight, linear_bias, target, weight, *ctx.options, ctx.wanted
            )
        dx, dweight, dbias = (g.to(x.dtype) if want else None for g, want in zip(gradients, ctx.wanted, strict=True))
        return dx, dweight, dbias, *(None,) * 7


def linear_cross_entropy(
    input,
    linear_weight,
    target,
    *,
    linear_bias=None,
    weight=None,
    ignore_index=-100,
    reduction="mean",
    label_smoothing=0.0,
    softcap=0.0,
    z_loss=0.0,
    return_token_accuracy=False,
):
    """cross_entropy(input @ linear_weight.T + linear_bias, target, ...), but the logits are never all in memory.

    input [..., D] (hidden states), linear_weight [V, D], linear_bias [V], all of one dtype: fp32, bf16, fp16, or fp64;
    target [...] int64 or uint8. The other options, and what is returned, are those of `fastllm.cross_entropy`;
    ignore_index=None stands for -100. Under autocast the products are in its dtype and the loss in fp32. Probabilities
    as targets are [..., V] and go to plain PyTorch.

    The rows are taken 128 at a time (on a GPU an eighth of them): products in input's dtype, the loss in fp32 (fp64).
    With reduction "mean" or "sum" the gradients are made in the forward pass, while the logits are there, so that
    forward and backward are three products as in torch; for "none" and for fp16, backward makes the logits again.
    Beside inputs, outputs and gradients 128 x V numbers are allocated (tested), and in bf16 and fp16, by oneDNN, a copy
    of an operand for the time of its product. The gradient of linear_weight is rounded there once per chunk of rows.
    On CPU up to 2^20 logits (4 MiB in fp32) are kept until backward instead: one product is faster than one for every
    128 rows, and fusing saves little there.
    Raises what `fastllm.cross_entropy` raises, and TypeError or ValueError for weights that do not fit input.
    Error: at most 1.1 times that of torch's linear and cross_entropy (tests/test_linear_cross_entropy.py).
    Source: Hsu et al. 2024, arXiv:2410.10989 (Liger Kernel).
    """
    ignore_index = -100 if ignore_index is None else ignore_index
    if weight is None and softcap == z_loss == 0 and not return_token_accuracy and is_free():
        numbers = ignore_index, reduction_number(reduction), label_smoothing
        loss = _at_once(input, linear_weight, target, linear_bias, *numbers, _tuned.ALWAYS_OWN)
        if loss is not None:
            return loss
    op = "linear_cross_entropy"
    if isinstance(input, torch.Tensor) and (input.is_cpu or torch.amp.is_autocast_available(input.device.type)):
        dtype = loss_dtype(input)
        input, linear_weight, linear_bias = autocast(input, linear_weight, linear_bias)
    else:
        dtype = None
    check_tensor(op, "input", input)
    check_tensor(op, "linear_weight", linear_weight, like=input)
    if input.ndim == 0 or linear_weight.ndim != 2 or input.shape[-1] != linear_weight.shape[1]:
        raise ValueError(
            f"{op}: input must be [..., D] and linear_weight [V, D],"
            f" got {list(input.shape)} and {list(linear_weight.shape)}"
        )
    V, D = linear_weight.shape
    if V == 0 or D == 0:
        raise ValueError(f"{op}: linear_weight must be [V, D] with V >= 1 and D >= 1, got {[V, D]}")
    if linear_bias is not None:
        check_tensor(op, "linear_bias", linear_bias, like=input)
        if linear_bias.shape != (V,):
            raise ValueError(f"{op}: linear_bias must be [{V}], got {list(linear_bias.shape)}")
    leading = list(input.shape[:-1])
    numbers = weight, ignore_index, reduction, label_smoothing, softcap, z_loss
    options = check_loss(op, input, leading, target, *numbers, classes=V)
    if target.dtype == torch.uint8:  # as torch takes them
        target = target.long()
    dtype = dtype or input.dtype
    x, probabilities = input.reshape(-1, D), target.is_floating_point()
    backend = choose(op, x, lacks(x, probabilities))
    if backend == "reference":
        logits = torch.nn.functional.linear(x, linear_weight, linear_bias).to(dtype)
        flat = target.reshape(logits.shape if probabilities else -1)
        result = reference_loss(options)(logits, flat, weight=weight, return_token_accuracy=return_token_accuracy)
        loss, accuracy = result if return_token_accuracy else (result, None)
    else:
        x, linear_weight, flat = x.contiguous(), linear_weight.contiguous(), target.reshape(-1).contiguous()
        if wants_gradient(x, linear_weight, linear_bias):
            wanted = tuple(t is not None and t.requires_grad for t in (x, linear_weight, linear_bias))
            loss, right = _LinearCrossEntropy.apply(
                x, linear_weight, linear_bias, flat, weight, options, return_token_accuracy, wanted, dtype, backend
            )
        else:
            loss, right, *_ = linear_cross_entropy_fwd(
                backend,
                x,
                linear_weight,
                linear_bias,
                flat,
                weight,
                None,
                *options,
                return_token_accuracy,
                (False,) * 3,
            )
            loss = loss.to(dtype)
        accuracy = token_accuracy(right, flat, options) if return_token_accuracy else None
    if reduction == "none":
        loss, accuracy = loss.view(leading), accuracy.view(leading) if return_token_accuracy else None
    return (loss, accuracy) if return_token_accuracy else loss
