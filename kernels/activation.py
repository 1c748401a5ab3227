"""Gated activations and gelu with a bias in Triton, forward and backward.

A gated activation reads rows of gate and up that may lie at any distance, so that the halves of one projection need no
copy; dense tensors are one long row. The gradient of a bias is summed on chip over a stripe of rows, and the stripes'
sums are added afterwards in a fixed order: no atomics.
"""

import torch
import triton
import triton.language as tl

SILU, GELU_TANH, GELU_ERF, RELU = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


@triton.jit
def _activation(x, ACTIVATION: tl.constexpr):
    """act(x) and its derivative."""
    if ACTIVATION == GELU_ERF:
        phi = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        y = x * phi
        slope = phi + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACTIVATION == RELU:
        y = tl.where(x <= 0.0, 0.0, x)  # NaN stays
        slope = tl.where(x > 0.0, 1.0, 0.0)
    else:
        bounded = tl.minimum(tl.maximum(x, -80.0), 80.0)  # there the sigmoid is 0 or 1, and nothing overflows
        u, du = bounded, 1.0
        if ACTIVATION == GELU_TANH:  # (1 + tanh(u / 2)) / 2 = sigmoid(u), with u = sqrt(8 / pi) (x + 0.044715 x^3)
            u = bounded * (1.5957691216057307 + 0.07135481627260025 * bounded * bounded)
            u = tl.minimum(tl.maximum(u, -80.0), 80.0)
            du = 1.5957691216057307 + 0.21406444881780075 * bounded * bounded
        e = tl.exp(-u)
        s = 1.0 / (1.0 + e)
        y = x * s
        slope = s + bounded * s * du * (e * s)  # e * s is 1 - s, without its cancellation
    return y, slope


@triton.jit
def _piece(D, BLOCK: tl.constexpr):
    """The row of this program, its columns, and which of them exist."""
    blocks = tl.cdiv(D, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    columns = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return row, columns, columns < D


@triton.jit
def _gated_fwd(gate_ptr, up_ptr, y_ptr, gate_stride, up_stride, D, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """y = act(gate) * up."""
    row, columns, inside = _piece(D, BLOCK)
    gate = tl.load(gate_ptr + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + columns, mask=inside, other=0.0).to(tl.float32)

    act, _ = _activation(gate, ACTIVATION)
    y = act * up

    tl.store(y_ptr + row * D + columns, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gated_bwd(
    dy_ptr,
    gate_ptr,
    up_ptr,
    dgate_ptr,
    dup_ptr,
    gate_stride,
    up_stride,
    grad_stride,
    D,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dgate = dy up act'(gate), dup = dy act(gate)."""
    row, columns, inside = _piece(D, BLOCK)
    gate = tl.load(gate_ptr + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + columns, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + row * D + columns, mask=inside, other=0.0).to(tl.float32)

    y, slope = _activation(gate, ACTIVATION)

    offsets = row * grad_stride + columns
    tl.store(dgate_ptr + offsets, (dy * up * slope).to(dgate_ptr.dtype.element_ty), mask=inside)
    tl.store(dup_ptr + offsets, (dy * y).to(dup_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _bias_act_fwd(x_ptr, bias_ptr, y_ptr, D, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """y = act(x + bias)."""
    row, columns, inside = _piece(D, BLOCK)
    x = tl.load(x_ptr + row * D + columns, mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)

    y, _ = _activation(x, ACTIVATION)

    tl.store(y_ptr + row * D + columns, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _bias_act_bwd(
    dy_ptr,
    x_ptr,
    bias_ptr,
    dx_ptr,
    dbias_ptr,
    N,
    D,
    rows_per_stripe,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A stripe of rows in a block of columns: dx = dy act'(x + bias), and its sum over the stripe."""
    stripe = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < D
    bias = tl.zeros((BLOCK,), tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    dbias = tl.zeros((BLOCK,), tl.float32)
    for row in tl.range(stripe * rows_per_stripe, tl.minimum((stripe + 1) * rows_per_stripe, N)):
        offsets = tl.cast(row, tl.int64) * D + columns
        x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32) + bias
        dy = tl.load(dy_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        _, slope = _activation(x, ACTIVATION)
        dx = dy * slope
        tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        dbias += dx
    tl.store(dbias_ptr + stripe * D + columns, dbias, mask=inside)


@triton.jit
def _act_bwd(dy_ptr, x_ptr, dx_ptr, D, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """dx = dy act'(x), where there is no bias."""
    row, columns, inside = _piece(D, BLOCK)
    offsets = row * D + columns
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    _, slope = _activation(x, ACTIVATION)
    dx = dy * slope
    tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=inside)


def _launch_for(D):
    """Columns and warps of a program: 8 elements a thread. Not measured yet."""
    BLOCK = min(1024, max(128, triton.next_power_of_2(D)))
    return dict(BLOCK=BLOCK, num_warps=max(1, BLOCK // 256))


def _check(x):
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"activation: the Triton kernels take fp32, bf16 and fp16, got {x.dtype}")


def _gated_rows(gate, up):
    """gate, up, their row strides, the number of rows and their length."""
    packed = up is None
    if packed:
        gate, up = gate.chunk(2, -1)
    D = gate.shape[-1]
    if gate.is_contiguous() and up.is_contiguous():
        return gate, up, D, D, 1, gate.numel()
    gate, up = gate.view(-1, D), up.view(-1, D)
    return gate, up, gate.stride(0), up.stride(0), gate.shape[0], D


def _gated_forward(gate, up, activation):
    _check(gate)
    y = gate.new_empty((*gate.shape[:-1], gate.shape[-1] // (2 if up is None else 1)))
    if gate.numel():
        gate, up, gate_stride, up_stride, N, D = _gated_rows(gate, up)
        launch = _launch_for(D)
        grid = (N * triton.cdiv(D, launch["BLOCK"]),)
        _gated_fwd[grid](gate, up, y, gate_stride, up_stride, D, ACTIVATION=activation, **launch)
    return y


def _gated_backward(dy, gate, up, activation):
    _check(gate)
    packed = up is None
    dgate, dup = gate.new_empty(gate.shape), gate.new_empty(0 if packed else gate.shape)
    if gate.numel():
        dgate_view, dup_view = dgate.chunk(2, -1) if packed else (dgate, dup)
        gate, up, gate_stride, up_stride, N, D = _gated_rows(gate, up)
        launch = _launch_for(D)
        grid = (N * triton.cdiv(D, launch["BLOCK"]),)
        _gated_bwd[grid](
            dy,
            gate,
            up,
            dgate_view,
            dup_view,
            gate_stride,
            up_stride,
            2 * D if packed else D,
            D,
            ACTIVATION=activation,
            **launch,
        )
    return dgate, dup


def swiglu_fwd(gate, up):
    """silu(gate) * up; packed where there is no up."""
    return _gated_forward(gate, up, SILU.value)


def swiglu_bwd(dy, gate, up):
    """dgate and dup (empty where packed: dgate then has both)."""
    return _gated_backward(dy, gate, up, SILU.value)


def geglu_fwd(gate, up, tanh):
    """gelu(gate) * up; packed where there is no up."""
    return _gated_forward(gate, up, (GELU_TANH if tanh else GELU_ERF).value)


def geglu_bwd(dy, gate, up, tanh):
    """dgate and dup (empty where packed: dgate then has both)."""
    return _gated_backward(dy, gate, up, (GELU_TANH if tanh else GELU_ERF).value)


def bias_act_forward(x, bias, activation):
    """act(x + bias), bias [D] or None; activation is one of the numbers at the top."""
    _check(x)
    y = x.new_empty(x.shape)
    if x.numel():
        D = x.numel() if bias is None else x.shape[-1]
        launch = _launch_for(D)
        grid = (x.numel() // D * triton.cdiv(D, launch["BLOCK"]),)
        bias = None if bias is None else bias.contiguous()
        _bias_act_fwd[grid](x, bias, y, D, ACTIVATION=activation, **launch)
    return y


def bias_act_backward(dy, x, bias, activation, needs_dbias):
    """dx, and the sum of its rows in fp32 (None where it is not wanted)."""
    dx = x.new_empty(x.shape)
    if not x.numel():
        return dx, torch.zeros(x.shape[-1], device=x.device) if needs_dbias else None
    if bias is None and not needs_dbias:
        launch = _launch_for(x.numel())
        grid = (triton.cdiv(x.numel(), launch["BLOCK"]),)
        _act_bwd[grid](dy, x, dx, x.numel(), ACTIVATION=activation, **launch)
        return dx, None
    D = x.shape[-1]
    N = x.numel() // D
    launch = _launch_for(D)
    rows_per_stripe = max(16, triton.cdiv(N, 512))
    stripes = triton.cdiv(N, rows_per_stripe)
    dbiases = torch.empty(stripes, D, dtype=torch.float32, device=x.device)
    grid = (stripes, triton.cdiv(D, launch["BLOCK"]))
    bias = None if bias is None else bias.contiguous()
    _bias_act_bwd[grid](dy, x, bias, dx, dbiases, N, D, rows_per_stripe, ACTIVATION=activation, **launch)
    return dx, dbiases.sum(0)


def bias_gelu_fwd(x, bias, tanh):
    """gelu(x + bias)."""
    return bias_act_forward(x, bias, (GELU_TANH if tanh else GELU_ERF).value)


def bias_gelu_bwd(dy, x, bias, tanh):
    """dx, and dbias in bias's dtype (empty without one)."""
    activation = (GELU_TANH if tanh else GELU_ERF).value
    dx, dbias = bias_act_backward(dy, x, bias, activation, bias is not None)
    return dx, x.new_empty(0) if bias is None else dbias.to(bias.dtype)
