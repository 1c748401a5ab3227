"""swiglu, geglu and bias_gelu: the activations of a transformer's feed-forward block, with what surrounds them."""

import functools

import torch

from fastllm import reference
from fastllm.dispatch import Op, choose, cpu_op, differentiable_again, direct, is_free
from fastllm.ops._common import apart, check_tensor, gradients_through, no_fp64, promoted, wants_gradient


def _fwd_fake(gate, up, *options):
    D = gate.shape[-1] // (2 if up is None else 1)
    return gate.new_empty((*gate.shape[:-1], D))


def _bwd_fake(dy, gate, up, *options):
    return gate.new_empty(gate.shape), gate.new_empty(0 if up is None else gate.shape)


swiglu_fwd = Op("swiglu_fwd(Tensor gate, Tensor? up) -> Tensor y", "activation", _fwd_fake)
swiglu_bwd = Op("swiglu_bwd(Tensor dy, Tensor gate, Tensor? up) -> (Tensor dgate, Tensor dup)", "activation", _bwd_fake)
geglu_fwd = Op("geglu_fwd(Tensor gate, Tensor? up, bool tanh) -> Tensor y", "activation", _fwd_fake)
geglu_bwd = Op(
    "geglu_bwd(Tensor dy, Tensor gate, Tensor? up, bool tanh) -> (Tensor dgate, Tensor dup)", "activation", _bwd_fake
)
bias_gelu_fwd = Op(
    "bias_gelu_fwd(Tensor x, Tensor? bias, bool tanh) -> Tensor y",
    "activation",
    lambda x, bias, tanh: x.new_empty(x.shape),
)
bias_gelu_bwd = Op(
    "bias_gelu_bwd(Tensor dy, Tensor x, Tensor? bias, bool tanh) -> (Tensor dx, Tensor dbias)",
    "activation",
    lambda dy, x, bias, tanh: (x.new_empty(x.shape), x.new_empty(0) if bias is None else bias.new_empty(bias.shape)),
)
cpu_op("swiglu_plain(Tensor gate, Tensor? up) -> Tensor", _fwd_fake)
cpu_op("geglu_plain(Tensor gate, Tensor? up, bool tanh) -> Tensor", _fwd_fake)
cpu_op("bias_gelu_plain(Tensor x, Tensor? bias, bool tanh) -> Tensor", lambda x, bias, tanh: x.new_empty(x.shape))


def _swiglu_again(dy, gate, up):
    return gradients_through(reference.swiglu, (gate, up), (dy,))


def _geglu_again(dy, gate, up, tanh):
    function = functools.partial(reference.geglu, approximate="tanh" if tanh else "none")
    return gradients_through(function, (gate, up), (dy,))


def _bias_gelu_again(dy, x, bias, tanh):
    function = functools.partial(reference.bias_gelu, approximate="tanh" if tanh else "none")
    return gradients_through(function, (x, bias), (dy,))


differentiable_again("swiglu_again(Tensor dy, Tensor gate, Tensor? up) -> (Tensor dgate, Tensor dup)", _swiglu_again)
differentiable_again(
    "geglu_again(Tensor dy, Tensor gate, Tensor? up, bool tanh) -> (Tensor dgate, Tensor dup)", _geglu_again
)
differentiable_again(
    "bias_gelu_again(Tensor dy, Tensor x, Tensor? bias, bool tanh) -> (Tensor dx, Tensor dbias)", _bias_gelu_again
)

_swiglu_at_once, _geglu_at_once, _bias_gelu_at_once = direct("swiglu"), direct("geglu"), direct("bias_gelu")

APPROXIMATIONS = ("tanh", "none")


class _Gated(torch.autograd.Function):
    """swiglu without an `approximate`, geglu with one."""

    @staticmethod
    def forward(ctx, gate, up, approximate, backend):
        ctx.save_for_backward(gate, up)
        ctx.approximate, ctx.backend = approximate, backend
        return _gated(gate, up, approximate, backend)

    @staticmethod
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        if torch.is_grad_enabled():
            if ctx.approximate:
                return *_geglu_again(dy, gate, up, ctx.approximate == "tanh"), None, None
            return *_swiglu_again(dy, gate, up), None, None
        if ctx.approximate:
            dgate, dup = geglu_bwd(ctx.backend, dy.contiguous(), gate, up, ctx.approximate == "tanh")
        else:
            dgate, dup = swiglu_bwd(ctx.backend, dy.contiguous(), gate, up)
        return dgate, None if up is None else dup, None, None


def _gated(gate, up, approximate, backend):
    if approximate:
        return geglu_fwd(backend, gate, up, approximate == "tanh")
    return swiglu_fwd(backend, gate, up)


def _run_gated(gate, up, approximate, backend):
    gate, up = _dense_rows(gate), None if up is None else _dense_rows(up)
    run = _Gated.apply if wants_gradient(gate, up) else _gated
    return run(*apart(gate, up), approximate, backend)


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, approximate, backend):
        ctx.save_for_backward(x, bias)
        ctx.approximate, ctx.backend = approximate, backend
        return bias_gelu_fwd(backend, x, bias, approximate == "tanh")

    @staticmethod
    def backward(ctx, dy):
        x, bias = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *_bias_gelu_again(dy, x, bias, ctx.approximate == "tanh"), None, None
        dx, dbias = bias_gelu_bwd(ctx.backend, dy.contiguous(), x, bias, ctx.approximate == "tanh")
        return dx, None if bias is None else dbias, None, None


def swiglu(gate, up=None):
    """y = silu(gate) * up, with silu(x) = x / (1 + exp(-x)).

    gate and up [..., D], alike, in fp32, bf16, fp16 or fp64 (under autocast in two of them: y has the wider, as in
    PyTorch); any strides (halves of one projection are read where they lie). Without up, gate is packed: [..., 2D] with
    the gate in its first half, and so is its gradient, in one tensor.
    Returns y [..., D]. Computed in fp32 (fp64 for fp64) and rounded once. Saves gate and up.
    Raises TypeError for dtypes that do not match, ValueError for shapes that do not or an odd packed dimension.
    Error: at most 1.1 times that of torch.nn.functional.silu(gate) * up in gate's dtype (tests/test_activation.py).
    Source: Shazeer 2020, arXiv:2002.05202.
    """
    if is_free():
        y = _swiglu_at_once(gate, up)
        if y is not None:
            return y
    gate, up = promoted(gate, up)
    _check_gated("swiglu", gate, up)
    backend = choose("swiglu", gate, no_fp64(gate))
    if backend == "reference":
        return reference.swiglu(gate, up)
    return _run_gated(gate, up, None, backend)


def geglu(gate, up=None, *, approximate="tanh"):
    """y = gelu(gate) * up, with gelu(x) = x Phi(x) ("none") or its approximation by tanh ("tanh").

    Shapes, packing, precision, what is saved and errors are those of `swiglu`; ValueError for another `approximate`.
    The default is what Gemma has, and Liger's geglu; that of torch.nn.functional.gelu is "none".
    Error: at most 1.1 times that of torch.nn.functional.gelu(gate) * up in gate's dtype (tests/test_activation.py).
    Source: Shazeer 2020, arXiv:2002.05202; Hendrycks and Gimpel 2016, arXiv:1606.08415.
    """
    if approximate in APPROXIMATIONS and is_free():
        y = _geglu_at_once(gate, up, approximate == "tanh")
        if y is not None:
            return y
    gate, up = promoted(gate, up)
    _check_gated("geglu", gate, up)
    _check_approximate("geglu", approximate)
    backend = choose("geglu", gate, no_fp64(gate))
    if backend == "reference":
        return reference.geglu(gate, up, approximate=approximate)
    return _run_gated(gate, up, approximate, backend)


def bias_gelu(x, bias=None, *, approximate="tanh"):
    """y = gelu(x + bias), with gelu(x) = x Phi(x) ("none") or its approximation by tanh ("tanh").

    x [..., D] in fp32, bf16, fp16 or fp64, bias [D] in any of these, or None. Returns y like x. Computed in fp32 (fp64
    for fp64) and rounded once: x + bias is not rounded on the way. Saves x and bias. The gradient of bias is summed in
    fp32 in an order that does not depend on the number of threads. The default is what GPT-2 has; that of
    torch.nn.functional.gelu is "none".
    Raises TypeError for other dtypes, ValueError for shapes that do not match or another `approximate`.
    Error: at most 1.1 times that of torch.nn.functional.gelu(x + bias) in x's dtype (tests/test_activation.py).
    Source: Hendrycks and Gimpel 2016, arXiv:1606.08415.
    """
    if approximate in APPROXIMATIONS and is_free():
        y = _bias_gelu_at_once(x, bias, approximate == "tanh")
        if y is not None:
            return y
    check_tensor("bias_gelu", "x", x)
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"bias_gelu: x must be [..., D] with D >= 1, got {list(x.shape)}")
    if bias is not None:
        check_tensor("bias_gelu", "bias", bias)
        if bias.device != x.device:
            raise ValueError(f"bias_gelu: bias must be on {x.device} like x, got {bias.device}")
        if bias.shape != x.shape[-1:]:
            raise ValueError(f"bias_gelu: bias must be [{x.shape[-1]}] like x's last dimension, got {list(bias.shape)}")
    _check_approximate("bias_gelu", approximate)
    backend = choose("bias_gelu", x, no_fp64(x))
    if backend == "reference":
        return reference.bias_gelu(x, bias, approximate=approximate)
    x = x.contiguous()
    if wants_gradient(x, bias):
        return _BiasGelu.apply(x, bias, approximate, backend)
    return bias_gelu_fwd(backend, x, bias, approximate == "tanh")


def _dense_rows(x):
    """x itself where its rows are dense and at one distance from each other, as in half of a projection; or a copy."""
    if x.is_contiguous():
        return x
    regular = all(x.stride(i) == x.stride(i + 1) * x.shape[i + 1] for i in range(x.ndim - 2))
    return x if x.stride(-1) == 1 and regular else x.contiguous()


def _check_gated(op, gate, up):
    check_tensor(op, "gate", gate)
    if gate.ndim == 0 or gate.shape[-1] == 0:
        raise ValueError(f"{op}: gate must be [..., D] with D >= 1, got {list(gate.shape)}")
    if up is None:
        if gate.shape[-1] % 2:
            raise ValueError(f"{op}: without up, gate must be packed, [..., 2D], got {list(gate.shape)}")
        return
    check_tensor(op, "up", up, like=gate)
    if up.shape != gate.shape:
        raise ValueError(f"{op}: up must be {list(gate.shape)} like gate, got {list(up.shape)}")


def _check_approximate(op, approximate):
    if approximate not in APPROXIMATIONS:
        raise ValueError(f'{op}: approximate must be "tanh" or "none", got {approximate!r}')
