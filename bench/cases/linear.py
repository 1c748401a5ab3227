"""Cases of linear layers, and of those whose weights are packed."""

import functools

import torch
import torch.nn.functional as F

import fastllm
from fastllm import reference
from fastllm.bench.cases.case import Case, both


def weight_only(M, N, K, bits):
    """A linear layer of M rows on a weight [N, K] of 16 (bf16), 8 or 4 bits; PyTorch's has it in the dtype of x."""

    @functools.cache
    def weight(device):
        w = torch.randn(N, K, generator=torch.Generator().manual_seed(1)).to(device) * K**-0.5
        return w.bfloat16() if bits == 16 else fastllm.quantize_weight(w, bits)

    @functools.cache
    def plain(device, dtype):
        w = weight(device)
        return w.to(dtype) if bits == 16 else w.dequantize().to(dtype)

    def rival(x):
        return F.linear(x, plain(x.device, x.dtype))

    size = {16: 2 * N * K, 8: N * (K + 4), 4: N * (K // 2 + K // 64 * 2)}[bits]
    return Case(
        op="weight_only_linear",
        name=f"{M}x{N}x{K} {'bf16' if bits == 16 else f'int{bits}'}",
        shapes={"x": (M, K)},
        ours=lambda x: fastllm.weight_only_linear(x, weight(x.device)),
        torch=rival,
        naive=rival,
        flops=both({"forward": 2.0 * M * N * K, "backward": 2.0 * M * N * K}),
        values=both({"forward": M * (N + K), "backward": M * (N + K)}),
        fixed_bytes=size,
    )


def linear(M, N, K):
    """x [M, K] times the transpose of weight [N, K], with a bias; backward is both products of the gradient."""
    flops = 2.0 * M * N * K
    return Case(
        op="linear",
        name=f"{M}x{N}x{K}",
        shapes={"x": (M, K), "weight": (N, K), "bias": (N,)},
        ours=fastllm.linear,
        torch=F.linear,
        naive=reference.linear,
        flops=both({"forward": flops, "backward": 2 * flops}),
        values=both({"forward": M * K + N * K + M * N, "backward": M * N + 2 * (M * K + N * K)}),
    )
