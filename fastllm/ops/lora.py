"""lora_linear: a frozen matrix product and its low-rank update in one pass, forward and backward."""

import torch

from fastllm import dispatch, reference
from fastllm.ops._common import autocast, check_tensor, drop_all, gradients_through, wants_gradient
from fastllm.ops.linear import addmm_, check_linear, kernels_for, linear_bwd, matmul, product, with_unit_stride


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, lora_a, lora_b, bias, keep, scale, dropout_p, kernels):
        ctx.save_for_backward(x, weight, lora_a, lora_b, bias, keep)
        ctx.numbers = scale, dropout_p, kernels
        return _forward(x, weight, lora_a, lora_b, bias, keep, scale, dropout_p, kernels)

    @staticmethod
    def backward(ctx, dy):
        *inputs, keep = ctx.saved_tensors
        scale, dropout_p, kernels = ctx.numbers
        if torch.is_grad_enabled():

            def plain(*inputs):
                return reference.lora_linear(*inputs, keep, scale=scale, dropout_p=dropout_p)

            return *gradients_through(plain, inputs, (dy,)), *(None,) * 4
        x, weight, lora_a, lora_b, bias = inputs
        needs_dx, needs_dweight, _, _, needs_dbias = needs = ctx.needs_input_grad[:5]
        dy = dy.contiguous()
        flat, dy_flat = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        d, scale = _dropped(flat, keep, scale, dropout_p)
        dv = matmul(dy_flat, lora_b)  # [M, rank]: the gradient of d A^T, but for the scale
        dlora_a = matmul(dv.T, d).mul_(scale) if needs[2] else None
        dlora_b = matmul(dy_flat.T, matmul(d, lora_a.T)).mul_(scale) if needs[3] else None
        dx = None
        if needs_dx:
            own = kernels and kernels[1]
            dx = linear_bwd("cpu", dy, x, weight, True, False, False)[0] if own else dy @ weight
            dx_flat = dx.view(flat.shape)
            if keep is None:
                addmm_(dx_flat, dv, lora_a, scale)
            else:
                dx_flat.add_(matmul(dv, lora_a).mul_(keep.view(flat.shape)), alpha=scale)
        dweight = matmul(dy_flat.T, flat) if needs_dweight else None
        dbias = dy_flat.sum(0) if needs_dbias else None
        return dx, dweight, dlora_a, dlora_b, dbias, *(None,) * 4


def _dropped(x, keep, scale, dropout_p):
    """What goes into A, and the scale with the 1 / (1 - dropout_p) that it lacks."""
    return (x, scale) if keep is None else (x * keep.view(x.shape), scale / (1 - dropout_p))


def _forward(x, weight, lora_a, lora_b, bias, keep, scale, dropout_p, kernels):
    y = product(x, weight, bias, kernels)
    d, scale = _dropped(x.reshape(-1, x.shape[-1]), keep, scale, dropout_p)
    addmm_(y.view(-1, y.shape[-1]), matmul(d, lora_a.T), lora_b.T, scale)
    return y


def lora_linear(x, weight, lora_a, lora_b, bias=None, *, scale=1.0, dropout_p=0.0):
    """y = x W^T + bias + scale * (dropout(x) A^T) B^T.

    x [..., K], weight [N, K], lora_a [rank, K], lora_b [N, rank], bias [N], of one dtype: fp32, bf16, fp16 or fp64;
    returns y [..., N]. dropout_p is in [0, 1]. The update is added where the product stands, and its gradient to that
    of x: no second [..., N] or [..., K] is written, and where weight and bias are frozen nothing is computed for them.
    The products are those of `fastllm.linear` and PyTorch; under autocast they are in its dtype.
    Saves x, and with dropout one byte for each of its elements; x A^T is made again in the backward pass.
    Raises TypeError for dtypes that do not match, ValueError for shapes or devices that do not, or dropout_p.
    Error: at most 1.1 times that of the same in torch's operations in x's dtype (tests/test_lora.py).
    Source: Hu et al. 2021, arXiv:2106.09685.
    """
    op = "lora_linear"
    under_autocast = check_linear(op, x, weight, bias)
    for name, given in (("lora_a", lora_a), ("lora_b", lora_b)):
        check_tensor(op, name, given, like=None if under_autocast else x)
    (N, K), rank = weight.shape, lora_a.shape[0] if lora_a.ndim else 0
    if lora_a.shape != (rank, K) or lora_b.shape != (N, rank):
        raise ValueError(
            f"{op}: expected lora_a [rank, {K}] and lora_b [{N}, rank],"
            f" got {list(lora_a.shape)} and {list(lora_b.shape)}"
        )
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"{op}: dropout_p must be in [0, 1], got {dropout_p}")
    if dropout_p == 1:
        lora_a, dropout_p = drop_all(lora_a)
    if under_autocast:
        x, weight, lora_a, lora_b, bias = autocast(x, weight, lora_a, lora_b, bias)
    keep = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - dropout_p) if dropout_p else None
    kernels = kernels_for(op, x, weight)
    if dispatch.forced() == "reference" or dispatch.transformed():
        return reference.lora_linear(x, weight, lora_a, lora_b, bias, keep, scale=scale, dropout_p=dropout_p)
    x, bias = x.contiguous(), None if bias is None else bias.contiguous()
    keep = None if keep is None else keep.contiguous()
    given = x, with_unit_stride(weight), with_unit_stride(lora_a), with_unit_stride(lora_b), bias
    run = _LoRALinear.apply if wants_gradient(*given) else _forward
    return run(*given, keep, scale, dropout_p, kernels)
