"""Cases of rope."""

import functools

import torch

import fastllm
from fastllm import reference
from fastllm.bench.cases.case import Case, both


def rope(B, T, H, D, *, Hkv=None, R=None, interleaved=False):
    """q and k [B, T, heads, D], as a projection leaves them; R of D elements are turned. The rival is Llama's code."""
    Hkv, R = Hkv or H, R or D

    @functools.cache
    def tables(device):
        frequencies = 10000.0 ** (-torch.arange(0, R, 2, dtype=torch.float64) / R)
        angles = torch.arange(T, dtype=torch.float64)[:, None] * frequencies
        return angles.cos().float().to(device), angles.sin().float().to(device)

    @functools.cache
    def wide_tables(device, dtype):  # a number for each element, in the model's dtype
        return tuple((x.repeat_interleave(2, -1) if interleaved else x.repeat(1, 2)).to(dtype) for x in tables(device))

    def ours(q, k):
        turned = fastllm.rope(q.transpose(1, 2), k.transpose(1, 2), *tables(q.device), interleaved=interleaved)
        return tuple(x.transpose(1, 2) for x in turned)

    def rival(*both):
        cos, sin = (table[:, None] for table in wide_tables(both[0].device, both[0].dtype))
        found = []
        for x in both:
            head = x[..., :R]
            if interleaved:
                partner = torch.stack([-head[..., 1::2], head[..., ::2]], -1).flatten(-2)
            else:
                partner = torch.cat([-head[..., R // 2 :], head[..., : R // 2]], -1)
            turned = head * cos + partner * sin
            found.append(turned if R == D else torch.cat([turned, x[..., R:]], -1))
        return tuple(found)

    def naive(q, k):
        turned = reference.rope(q.transpose(1, 2), k.transpose(1, 2), *tables(q.device), interleaved=interleaved)
        return tuple(x.transpose(1, 2) for x in turned)

    size = B * T * (H + Hkv) * D
    words = [f"{B}x{T}x{H if H == Hkv else f'{H}/{Hkv}'}x{D}"] + [f"R {R}"] * (R != D) + ["interleaved"] * interleaved
    return Case(
        op="rope",
        name=" ".join(words),
        shapes={"q": (B, T, H, D), "k": (B, T, Hkv, D)},
        outputs=("q", "k"),
        ours=ours,
        torch=rival,
        naive=naive,
        flops=both({"forward": 3.0 * size, "backward": 3.0 * size}),
        values=both({"forward": 2 * size, "backward": 2 * size}),
    )
