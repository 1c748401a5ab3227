"""Matrix products with a bias and an activation in Triton: one kernel that activates what it has summed, on chip.

What it saves beside PyTorch's product is one reading and (where no gradient is wanted) one writing of x W^T + bias;
where K is large that is little of the whole, and a product by cuBLAS with `bias_act_fwd` behind it may be faster.
Goes into another project together with activation.py.
"""

import torch
import triton
import triton.language as tl

from .activation import GELU_ERF, GELU_TANH, RELU, SILU, _activation, bias_act_backward, bias_act_forward
from .device import entry

ACTIVATIONS = (RELU, GELU_ERF, GELU_TANH, SILU)  # as fastllm/ops/linear.py numbers them


@triton.jit
def _linear_act_fwd(
    x_ptr,
    w_ptr,
    bias_ptr,
    y_ptr,
    z_ptr,
    M,
    N,
    K,
    w_stride_n,
    w_stride_k,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """A block of y = act(x W^T + bias) and, where its gradient is wanted, of z = x W^T + bias."""
    # Programs that run together share rows of x: GROUP blocks of rows, then the next column of blocks.
    blocks_m, blocks_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first = tl.program_id(0) // (GROUP * blocks_n) * GROUP
    height = tl.minimum(blocks_m - first, GROUP)
    place = tl.program_id(0) % (GROUP * blocks_n)
    m = ((first + place % height) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    n = (place // height * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + m[:, None] * K + k[None, :]
    w_ptrs = w_ptr + n[:, None] * w_stride_n + k[None, :].to(tl.int64) * w_stride_k

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in tl.range(0, K, BLOCK_K):
        x = tl.load(x_ptrs, mask=(m < M)[:, None] & (k < K - start)[None, :], other=0.0)
        w = tl.load(w_ptrs, mask=(n < N)[:, None] & (k < K - start)[None, :], other=0.0)
        acc = tl.dot(x, w.T, acc, input_precision="ieee")
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K * w_stride_k

    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    inside = (m < M)[:, None] & (n < N)[None, :]
    at = m[:, None] * N + n[None, :]
    if z_ptr is not None:
        tl.store(z_ptr + at, acc.to(z_ptr.dtype.element_ty), mask=inside)
    y, _ = _activation(acc, ACTIVATION)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


# By GPU name ("any" for the others) and bits of a number: BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages.
# 2026-11-30, not measured: the largest blocks that keep the rules of tests/test_triton_compile.py.
LAUNCHES = {"any": {16: (128, 128, 64, 8, 3), 32: (64, 32, 32, 8, 2)}}


def _launch_for(x):
    names = "BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages"
    if x.device.type == "cpu":  # the interpreter: small blocks, so that short tests cross their borders
        return dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=32)
    return dict(zip(names, entry(LAUNCHES, x.device)[8 * x.element_size()], strict=True))


def linear_act_fwd(x, weight, bias, activation, needs_z):
    """y = act(x W^T + bias) of contiguous x [..., K], and z = x W^T + bias (empty where it is not needed)."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"linear: the Triton kernels take fp32, bf16 and fp16, got {x.dtype}")
    N, K = weight.shape
    y = x.new_empty(*x.shape[:-1], N)
    z = torch.empty_like(y) if needs_z else y.new_empty(0)
    if y.numel():
        M, launch = y.numel() // N, _launch_for(x)
        grid = (triton.cdiv(M, launch["BLOCK_M"]) * triton.cdiv(N, launch["BLOCK_N"]),)
        _linear_act_fwd[grid](
            x, weight, bias, y, z if needs_z else None, M, N, K, *weight.stride(),
            ACTIVATION=ACTIVATIONS[activation].value, GROUP=8, **launch,
        )  # fmt: skip
    return y, z


def bias_act_fwd(x, bias, activation):
    """act(x + bias)."""
    return bias_act_forward(x, bias, ACTIVATIONS[activation].value)


def bias_act_bwd(dy, x, bias, activation, needs_dbias):
    """dx = dy act'(x + bias), and the sum of its rows in bias's dtype (empty where it is not wanted)."""
    dx, dbias = bias_act_backward(dy, x, bias, ACTIVATIONS[activation].value, needs_dbias)
    like = x if bias is None else bias
    return dx, like.new_empty(0) if dbias is None else dbias.to(like.dtype)
