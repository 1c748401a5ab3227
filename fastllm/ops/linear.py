"""linear: the matrix product with a bias, forward and backward, by our kernel where it beats PyTorch's."""

import math

import torch
import torch.nn.functional as F

from fastllm import dispatch, reference
from fastllm.dispatch import Op, choose
from fastllm.ops import _tuned
from fastllm.ops._common import check_tensor, gradients_through, wants_gradient

linear_fwd = Op(
    "linear_fwd(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    "linear",
    lambda x, weight, bias: x.new_empty((*x.shape[:-1], weight.shape[0])),
)
linear_bwd = Op(
    "linear_bwd(Tensor dy, Tensor x, Tensor weight, bool needs_dx, bool needs_dweight, bool needs_dbias)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias)",
    "linear",
    lambda dy, x, weight, needs_dx, needs_dweight, needs_dbias: (
        x.new_empty(x.shape if needs_dx else (0,)),
        x.new_empty(weight.shape if needs_dweight else (0,)),
        x.new_empty(weight.shape[0] if needs_dbias else 0),
    ),
)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, kernels):
        ctx.save_for_backward(x, weight, bias)
        ctx.kernels = kernels
        return product(x, weight, bias, kernels)

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *gradients_through(reference.linear, (x, weight, bias), (dy,)), None
        dy = dy.contiguous()
        needs, (_, own_dx, own_dweight) = ctx.needs_input_grad, ctx.kernels
        dx, dweight, dbias = linear_bwd(
            "cpu", dy, x, weight, needs[0] and own_dx, needs[1] and own_dweight, bias is not None and needs[2]
        )
        if needs[0] and not own_dx:
            dx = dy @ weight
        if needs[1] and not own_dweight:
            dweight = dy.flatten(0, -2).T @ x.flatten(0, -2)
        found = (dx, dweight, dbias)
        return *(g if needed else None for g, needed in zip(found, needs[:3], strict=True)), None


def product(x, weight, bias, kernels):
    """x W^T + bias, by our kernel where kernels_for has chosen it."""
    return linear_fwd("cpu", x, weight, bias) if kernels and kernels[0] else F.linear(x, weight, bias)


def linear(x, weight, bias=None):
    """y = x W^T + bias.

    x [..., K], weight [N, K], bias [N], of one dtype: fp32, bf16, fp16 or fp64; returns y [..., N]. As in
    torch.nn.functional.linear, whose product runs wherever it is as good as ours: for 16-bit types, under autocast, on
    GPUs, and on every CPU and size where nobody has measured that ours is faster (`fastllm info` shows the table,
    `fastllm bench linear --tune` measures). In fp32 ours sums up to 192 products at a time and adds those sums in
    order, so that y has the same bits for any number of threads.
    Saves x for the backward pass, as PyTorch does, and nothing else.
    Raises TypeError for dtypes that do not match, ValueError for shapes or devices that do not.
    Error: at most 1.1 times that of torch.nn.functional.linear in x's dtype (tests/test_linear.py).
    Source of the blocking: Goto and van de Geijn 2008, doi:10.1145/1356052.1356053.
    """
    kernels = kernels_for("linear", x, weight, check_linear("linear", x, weight, bias))
    if kernels is None:
        return reference.linear(x, weight, bias)
    x, bias = x.contiguous(), None if bias is None else bias.contiguous()
    weight = with_unit_stride(weight)
    if wants_gradient(x, weight, bias):
        return _Linear.apply(x, weight, bias, kernels)
    return product(x, weight, bias, kernels)


def kernels_for(op, x, weight, autocast=False) -> tuple[bool, bool, bool] | None:
    """Whether our kernel makes y, dx and dweight of x W^T; None where PyTorch makes all three."""
    K, M = x.shape[-1], math.prod(x.shape[:-1])
    kernels = None

    def unsupported(backend):
        nonlocal kernels
        if backend != "cpu":
            return "PyTorch's product is the kernel on a GPU"
        if autocast:
            return "autocast: our product is for float32"
        if dispatch.forced() == "cpu" and x.dtype in (torch.float32, torch.float64):
            kernels = (True, True, True)
        elif x.dtype != torch.float32:
            return f"{str(x.dtype).removeprefix('torch.')}: our product is for float32"
        else:
            kernels = _tuned.linear_kernels(M, weight.shape[0], K)
        return None if any(kernels) else "PyTorch's product is faster, or nobody has measured this CPU"

    return None if choose(op, x, unsupported, optional=True) == "reference" else kernels


def with_unit_stride(weight):
    """The weight as our kernel takes it."""
    return weight if 1 in weight.stride() else weight.contiguous()


def check_linear(op, x, weight, bias):
    """Whether autocast chooses the dtype; it takes inputs of several."""
    check_tensor(op, "x", x)
    autocast = torch.is_autocast_enabled(x.device.type)
    for name, given in (("weight", weight), ("bias", bias)):
        if given is not None or name == "weight":
            check_tensor(op, name, given, like=None if autocast else x)
    if x.ndim == 0 or weight.ndim != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"{op}: expected x [..., K] and weight [N, K], got {list(x.shape)} and {list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{op}: bias must be [{weight.shape[0]}] like weight's rows, got {list(bias.shape)}")
    return autocast
