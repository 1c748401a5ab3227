"""linear: the matrix product with bias and activation, forward and backward, by our kernel where it beats PyTorch's.

Every product of 16-bit matrices on a CPU that is not attention's goes through this file (`linear`, `product`,
`matmul`, `addmm_`): where oneDNN has none, PyTorch's own are plain loops (bench/NOTES.md has what was measured).
"""

import functools
import math

import torch
import torch.nn.functional as F

from fastllm import dispatch, reference
from fastllm.dispatch import Op, choose, cpu_op, differentiable_again, direct, is_free
from fastllm.ops import _tuned
from fastllm.ops._common import FLOATS, check_tensor, gradients_through, is_autocast, is_dense, wants_gradient
from fastllm.ops._common import autocast as in_autocast_dtype

linear_fwd = Op(
    "linear_fwd(Tensor x, Tensor weight, Tensor? bias) -> Tensor y",
    "linear",
    lambda x, weight, bias: x.new_empty((*x.shape[:-1], weight.shape[0])),
)
cpu_op(
    "linear_plain(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
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


linear_act_fwd = Op(
    "linear_act_fwd(Tensor x, Tensor weight, Tensor? bias, int activation, bool needs_z) -> (Tensor y, Tensor z)",
    "linear",
    lambda x, weight, bias, activation, needs_z: (
        x.new_empty((*x.shape[:-1], weight.shape[0])),
        x.new_empty((*x.shape[:-1], weight.shape[0]) if needs_z else 0),
    ),
)
linear_out = cpu_op(
    "linear_out(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) out) -> ()", lambda x, weight, bias, out: None
)
linear_bwd_out = cpu_op(
    "linear_bwd_out(Tensor dy, Tensor x, Tensor weight, Tensor(a!)? dx, Tensor(b!)? dweight, bool add) -> ()",
    lambda dy, x, weight, dx, dweight, add: None,
)
bias_act_fwd = Op(
    "bias_act_fwd(Tensor x, Tensor? bias, int activation) -> Tensor",
    "linear",
    lambda x, bias, activation: x.new_empty(x.shape),
)
bias_act_bwd = Op(
    "bias_act_bwd(Tensor dy, Tensor x, Tensor? bias, int activation, bool needs_dbias) -> (Tensor dx, Tensor dbias)",
    "linear",
    lambda dy, x, bias, activation, needs_dbias: (
        x.new_empty(x.shape),
        (x if bias is None else bias).new_empty(x.shape[-1] if needs_dbias else 0),
    ),
)

ACTIVATIONS = {"relu": 0, "gelu": 1, "gelu_tanh": 2, "silu": 3}  # as csrc/cpu/table.h and kernels/linear.py have them

# GPUs on which the Triton product that activates what it has summed was measured to be faster than PyTorch's product
# and an activation behind it, by name: the largest K of which that is true. Nothing has been measured yet.
FUSED: dict[str, int] = {}


def _again(dy, x, weight, bias):
    return gradients_through(reference.linear, (x, weight, bias), (dy,))


differentiable_again(
    "linear_again(Tensor dy, Tensor x, Tensor weight, Tensor? bias) -> (Tensor dx, Tensor dweight, Tensor dbias)",
    _again,
)
_at_once = direct("linear")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, activation, kernels, backend):
        y, z = activated(x, weight, bias, activation, kernels, backend, keep=True)
        ctx.save_for_backward(x, weight, bias, *([] if activation is None else [z]))
        ctx.activation, ctx.kernels, ctx.backend = activation, kernels, backend
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias, *z = ctx.saved_tensors
        if torch.is_grad_enabled():
            function = functools.partial(reference.linear, activation=ctx.activation)
            return *gradients_through(function, (x, weight, bias), (dy,)), None, None, None
        needs, (_, *own) = ctx.needs_input_grad, ctx.kernels
        needs_dbias, dy = bias is not None and needs[2], dy.contiguous()
        own = [ours and needed for ours, needed in zip(own, needs, strict=False)]
        dx = dweight = dbias = None
        if z:
            dy, dbias = bias_act_bwd(ctx.backend, dy, z[0], None, ACTIVATIONS[ctx.activation], needs_dbias)
            needs_dbias = False
        if any(own) or needs_dbias:
            dx, dweight, *rest = linear_bwd("cpu", dy, x, weight, *own, needs_dbias)
            dbias = dbias if z else rest[0]
        if needs[0] and not own[0]:
            dx = dy @ weight
        if needs[1] and not own[1]:
            dweight = dy.reshape(-1, dy.shape[-1]).T @ x.reshape(-1, x.shape[-1])
        found = (dx, dweight, dbias)
        return *(g if needed else None for g, needed in zip(found, needs[:3], strict=True)), None, None, None


def product(x, weight, bias, kernels):
    """x W^T + bias, by our kernel where kernels_for has chosen it."""
    if kernels and kernels[0]:
        return linear_fwd("cpu", x, weight, bias)
    if x.ndim <= 2 or torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    # No view, which the caller of an autograd.Function could not modify in place.
    return torch.ops.aten._unsafe_view(F.linear(x.flatten(0, -2), weight, bias), (*x.shape[:-1], weight.shape[0]))


def activated(x, weight, bias, activation, kernels, backend, keep=False):
    """y, and what backward needs of the activation: x W^T + bias, or for relu, of which the sign is enough, y."""
    if activation is None:
        return product(x, weight, bias, kernels), None
    number, sign = ACTIVATIONS[activation], activation == "relu"
    if kernels[0]:
        y, z = linear_act_fwd(backend, x, weight, bias, number, keep and not sign)
    else:
        z = product(x, weight, bias, None)
        y = bias_act_fwd(backend, z, None, number)
    return y, y if sign else z


def linear(x, weight, bias=None, *, activation=None):
    """y = activation(x W^T + bias); activation is None, "relu", "gelu", "gelu_tanh" or "silu".

    x [..., K], weight [N, K], bias [N], of one dtype: fp32, bf16, fp16 or fp64; returns y [..., N]. As in
    torch.nn.functional.linear, whose product runs wherever it is as good as ours: on GPUs, in fp64, and in fp32 on
    every CPU and size where nobody has measured that ours is faster (`fastllm info` shows the table, `fastllm bench
    linear --tune` measures). In bf16 and fp16, and under autocast to them, ours is the choice on CPUs where oneDNN has
    no such product (x86 without AVX-512), PyTorch's elsewhere. Ours sums in fp32 (fp64) up to 192 products at a time,
    adds those sums in order, so that y has the same bits for any number of threads, and rounds to 16 bits once; bias
    and activation are applied to a block of y while that is in the cache. Behind PyTorch's product on a CPU a
    gelu is ours. On GPUs the activation is a Triton kernel, whose gradient sums that of the bias while it is on
    chip; a product that activates what it has summed runs where it was measured to be faster (`FUSED`), or with
    backend("triton"). What is sparse or nested is PyTorch's.
    Saves x for the backward pass, and with an activation x W^T + bias (for relu y), as PyTorch does, and nothing else.
    Raises TypeError for dtypes that do not match, ValueError for shapes or devices that do not, or another activation.
    Error: at most 1.1 times that of torch.nn.functional.linear in x's dtype (tests/test_linear.py).
    Source of the blocking: Goto and van de Geijn 2008, doi:10.1145/1356052.1356053.
    """
    if is_free():
        number = -1 if activation is None else ACTIVATIONS.get(activation)
        y = _at_once(x, weight, bias, number, _tuned.ALWAYS_OWN)
        if y is not None:
            return y
    if activation is None and _is_pytorchs(x, weight, bias):
        return reference.linear(x, weight, bias)
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"linear: activation must be None, {', '.join(ACTIVATIONS)}, got {activation!r}")
    if any(isinstance(t, torch.Tensor) and not is_dense(t) for t in (x, weight)):
        return reference.linear(x, weight, bias, activation)
    autocast = check_linear("linear", x, weight, bias)
    kernels = kernels_for("linear", x, weight, autocast, activation)
    if kernels is None:
        return reference.linear(x, weight, bias, activation)
    if autocast:
        x, weight, bias = in_autocast_dtype(x, weight, bias)
    backend = "triton" if dispatch.forced() == "triton" or not x.is_cpu else "cpu"
    x, bias = x.contiguous(), None if bias is None else bias.contiguous()
    weight = with_unit_stride(weight)
    if wants_gradient(x, weight, bias):
        return _Linear.apply(x, weight, bias, activation, kernels, backend)
    return activated(x, weight, bias, activation, kernels, backend)[0]


def _is_pytorchs(x, weight, bias) -> bool:
    """Whether `linear` leaves x W^T to PyTorch for x having so few rows, or in any case. What it asks otherwise took
    11% of the time of a sentence of 30 tokens in MiniLM."""
    if not is_free():
        return False
    for given in (x, weight) if bias is None else (x, weight, bias):
        if not isinstance(given, torch.Tensor) or given.dtype is not x.dtype or not given.is_cpu:
            return False
    if x.dtype not in FLOATS or weight.ndim != 2 or x.ndim == 0 or (bias is not None and bias.ndim != 1):
        return False
    try:
        (N, K), width = weight.shape, x.shape[-1]
    except RuntimeError:  # nested tensors have no shape
        return False
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    fits = width == K and (bias is None or len(bias) == N)
    return fits and x.numel() < K * _tuned.fewest_rows(dtype)


def own_products(dtype, M, N, K) -> tuple[bool, bool, bool]:
    """Whether our kernel makes y [M, N] = x [M, K] W^T, dx and dweight; all of them where "cpu" was forced."""
    if dispatch.forced() == "cpu":
        return (True,) * 3
    return (False,) * 3 if dtype == torch.float64 else _tuned.linear_kernels(M, N, K, dtype)


def kernels_for(op, x, weight, autocast=False, activation=None) -> tuple[bool, bool, bool] | None:
    """own_products of x W^T; None where PyTorch makes all three, and the activation too."""
    K, M = x.shape[-1], math.prod(x.shape[:-1])
    dtype = torch.get_autocast_dtype(x.device.type) if autocast and x.dtype != torch.float64 else x.dtype
    kernels = None

    def unsupported(backend):
        nonlocal kernels
        if backend == "cuda" or (backend == "triton" and activation is None):
            return "PyTorch's product is the kernel on a GPU"
        if activation is not None and not (x.numel() and weight.numel()):
            return "there is nothing to activate"
        if backend == "triton":
            kernels = _fused(x, K), False, False
            return "float64: the GPU kernels compute in fp32" if dtype == torch.float64 else None
        kernels = own_products(dtype, M, weight.shape[0], K)
        return None if any(kernels) else why_pytorchs(dtype)

    return None if choose(op, x, unsupported, optional=True) == "reference" else kernels


def why_pytorchs(dtype) -> str:
    """Why no product of this size is ours."""
    if dtype in (torch.bfloat16, torch.float16) and _tuned.onednn_multiplies(dtype):
        return f"{str(dtype).removeprefix('torch.')}: oneDNN has this product"
    if dtype == torch.float64:
        return "float64: PyTorch's product is the kernel"
    return "PyTorch's product is faster, or nobody has measured this CPU"


def _is_own(a, b) -> bool:
    """Whether our kernel makes the product a [M, K] b [K, N] of 16-bit matrices on a CPU."""
    if not a.is_cpu or dispatch.extension is None or dispatch.forced() == "reference" or not linear_bwd_out:
        return False
    return a.dtype in (torch.bfloat16, torch.float16) and own_products(a.dtype, len(a), b.shape[1], b.shape[0])[0]


def matmul(a, b):
    """a [M, K] @ b [K, N], each of unit stride in one dimension, outside of autograd."""
    return linear_fwd("cpu", a, b.T, None) if _is_own(a, b) else a @ b


def addmm_(c, a, b, alpha=1.0):
    """c += alpha a b, as torch.addmm: c [M, N] contiguous, a [M, K], b [K, N] of unit stride in one dimension."""
    if _is_own(a, b):
        linear_bwd_out((a * alpha).T.contiguous(), b, c, None, c, True)
    else:
        c.addmm_(a, b, alpha=alpha)


def _fused(x, K) -> bool:
    """Whether Triton makes product and activation in one kernel on the GPU that x is on; always where it was forced."""
    if dispatch.forced() == "triton":
        return True
    return bool(FUSED) and K <= FUSED.get(torch.cuda.get_device_name(x.device), 0)


def with_unit_stride(weight):
    """The weight as our kernel takes it."""
    return weight if 1 in weight.stride() else weight.contiguous()


def check_linear(op, x, weight, bias):
    """Whether autocast chooses the dtype; it takes inputs of several."""
    check_tensor(op, "x", x)
    autocast = is_autocast(x)
    for name, given in (("weight", weight), ("bias", bias)):
        if given is not None or name == "weight":
            check_tensor(op, name, given, like=None if autocast else x)
    if x.ndim == 0 or weight.ndim != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"{op}: expected x [..., K] and weight [N, K], got {list(x.shape)} and {list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{op}: bias must be [{weight.shape[0]}] like weight's rows, got {list(bias.shape)}")
    return autocast
