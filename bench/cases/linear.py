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
    def unpacked(device, dtype):
        w = weight(device)
        return w.to(dtype) if bits == 16 else w.dequantize().to(dtype)

    @torch.compiler.assume_constant_result  # torch.compile looks into a cached function and would draw the weight again
    def plain(device, dtype):
        return unpacked(device, dtype)

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


def linear(M, N, K, *, activation=None):
    """x [M, K] times the transpose of weight [N, K], with a bias; backward is both products of the gradient."""
    flops, activate = 2.0 * M * N * K, reference.ACTIVATIONS.get(activation, lambda y: y)
    extra = M * N if activation else 0  # what the activation was applied to is kept for the backward pass
    return Case(
        op="linear",
        name=f"{M}x{N}x{K}" + (f" {activation}" if activation else ""),
        shapes={"x": (M, K), "weight": (N, K), "bias": (N,)},
        ours=lambda x, w, b: fastllm.linear(x, w, b, activation=activation),
        torch=lambda x, w, b: activate(F.linear(x, w, b)),
        naive=lambda x, w, b: reference.linear(x, w, b, activation),
        flops=both({"forward": flops, "backward": 2 * flops}),
        values=both({"forward": M * K + N * K + M * N, "backward": M * N + extra + 2 * (M * K + N * K)}),
    )


def lora_linear(M, N, K, rank):
    """x [M, K] through a frozen weight [N, K] with a bias, and an update of `rank` that trains."""

    @functools.cache
    def frozen(device, dtype):
        random = torch.Generator().manual_seed(1)
        made = torch.randn(N, K, generator=random), torch.randn(N, generator=random)
        return [w.bfloat16().to(device, dtype) for w in made]  # numbers that every dtype has

    def plain(x, a, b):
        return F.linear(x, *frozen(x.device, x.dtype)) + 2.0 * F.linear(F.linear(x, a), b)

    def with_function(function):
        def run(x, a, b):
            weight, bias = frozen(x.device, x.dtype)
            return function(x, weight, a, b, bias, scale=2.0)

        return run

    products, updates = 2.0 * M * N * K, 2.0 * M * rank * (N + K)
    moved, weights = M * (N + K) + rank * (N + K), N * K
    return Case(
        op="lora_linear",
        name=f"{M}x{N}x{K} rank {rank}",
        shapes={"x": (M, K), "lora_a": (rank, K), "lora_b": (N, rank)},
        ours=with_function(fastllm.lora_linear),
        torch=plain,
        naive=with_function(reference.lora_linear),
        flops=both({"forward": products + updates, "backward": products + 3 * updates}),
        values=both({"forward": moved + weights, "backward": moved + weights + M * K + rank * (N + K)}),
    )
