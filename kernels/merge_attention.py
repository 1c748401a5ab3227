"""Merges attention on parts of the keys in Triton, forward and backward: every part is read once, and written once.

A program has some queries and walks over the parts, whose number is compiled in; their tensors may lie at any strides.
"""

import torch
import triton
import triton.language as tl

from .attention_scores import LOWEST, View


@triton.jit
def _rows(x, row, H, T, columns):
    """Pointers to the rows [BLOCK_M] of x [B, H, T, D], numbered through."""
    b, h, i = row // T // H, row // T % H, row % T
    start = b * x.strides[0] + h * x.strides[1] + i * x.strides[2]
    return x.ptr + (start[:, None] + columns[None, :].to(tl.int64) * x.strides[3])


@triton.jit
def _weights(lse_ptrs, row, N, PARTS: tl.constexpr):
    """The largest lse of a query and the sum of exp(lse_n - largest), 0 where no part has a key."""
    m = tl.full(row.shape, LOWEST, tl.float32)
    for n in tl.static_range(PARTS):
        m = tl.maximum(m, tl.load(lse_ptrs[n] + row, mask=row < N, other=float("-inf")).to(tl.float32))
    total = tl.zeros(row.shape, tl.float32)
    for n in tl.static_range(PARTS):
        total += tl.exp(tl.load(lse_ptrs[n] + row, mask=row < N, other=float("-inf")).to(tl.float32) - m)
    return m, total


@triton.jit
def _merge_attention_fwd(
    o, outs, lse_ptrs, lse_ptr, N, H, T, D, PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr
):
    """o = sum_n exp(lse_n - lse) o_n and lse = log sum_n exp(lse_n); 0 and -inf where every lse_n is -inf."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_D)
    inside = (row < N)[:, None] & (columns < D)[None, :]
    m, total = _weights(lse_ptrs, row, N, PARTS)
    empty = total == 0
    total = tl.where(empty, 1.0, total)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for n in tl.static_range(PARTS):
        lse = tl.load(lse_ptrs[n] + row, mask=row < N, other=float("-inf")).to(tl.float32)
        part = tl.load(_rows(outs[n], row, H, T, columns), mask=inside, other=0.0).to(tl.float32)
        acc += (tl.exp(lse - m) / total)[:, None] * part

    tl.store(lse_ptr + row, tl.where(empty, float("-inf"), m + tl.log(total)), mask=row < N)
    tl.store(_rows(o, row, H, T, columns), acc.to(o.ptr.dtype.element_ty), mask=inside)


@triton.jit
def _merge_attention_bwd(
    do, outs, douts, dlse_ptr, lse_ptrs, dlse_ptrs, N, H, T, D,
    PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """do_n = w_n do and dlse_n = w_n (do . (o_n - o) + dlse), with w_n = exp(lse_n - lse)."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_D)
    inside = (row < N)[:, None] & (columns < D)[None, :]
    m, total = _weights(lse_ptrs, row, N, PARTS)
    total = tl.where(total == 0, 1.0, total)
    do_block = tl.load(_rows(do, row, H, T, columns), mask=inside, other=0.0).to(tl.float32)
    # o from the parts, as it was before it was rounded: the difference to a part would be mostly that rounding.
    o_block = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for n in tl.static_range(PARTS):
        lse = tl.load(lse_ptrs[n] + row, mask=row < N, other=float("-inf")).to(tl.float32)
        part = tl.load(_rows(outs[n], row, H, T, columns), mask=inside, other=0.0).to(tl.float32)
        o_block += (tl.exp(lse - m) / total)[:, None] * part
    dlse = tl.load(dlse_ptr + row, mask=row < N, other=0.0).to(tl.float32)
    for n in tl.static_range(PARTS):
        lse = tl.load(lse_ptrs[n] + row, mask=row < N, other=float("-inf")).to(tl.float32)
        part = tl.load(_rows(outs[n], row, H, T, columns), mask=inside, other=0.0).to(tl.float32)
        weight = tl.exp(lse - m) / total
        dpart = weight[:, None] * do_block
        tl.store(_rows(douts[n], row, H, T, columns), dpart.to(douts[n].ptr.dtype.element_ty), mask=inside)
        dlse_n = weight * (tl.sum(do_block * (part - o_block), 1) + dlse)
        tl.store(dlse_ptrs[n] + row, dlse_n.to(dlse_ptrs[n].dtype.element_ty), mask=row < N)


def _views(tensors):
    """As the kernels take them: [B, H, T, D], with leading dimensions of size 1 where there are fewer."""
    four = [x.reshape(-1, *x.shape[-3:]) if x.ndim > 4 else x[(None,) * (4 - x.ndim)] for x in tensors]
    return tuple(View(x, x.stride()) for x in four)


def _sizes(x, parts):
    """N queries in [B, H, T, D], and the launch: 16 elements of a part a thread. Not measured yet."""
    D = x.shape[-1]
    BLOCK_D = max(16, triton.next_power_of_2(D))
    T, H = x.shape[-2], x.shape[-3] if x.ndim > 2 else 1
    N = x.numel() // max(D, 1)
    return dict(N=N, H=H, T=T, D=D, PARTS=parts, BLOCK_M=max(1, 2048 // BLOCK_D), BLOCK_D=BLOCK_D, num_warps=4)


def _check(x):
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"merge_attention: the Triton kernels take fp32, bf16 and fp16, got {x.dtype}")


def merge_attention_fwd(outs, lses):
    """o in the memory order of outs[0] and lse in fp32."""
    _check(outs[0])
    o, lse = torch.empty_like(outs[0]), torch.empty(lses[0].shape, dtype=torch.float32, device=lses[0].device)
    if o.numel():
        sizes = _sizes(o, len(outs))
        lses = tuple(x.contiguous() for x in lses)
        grid = (triton.cdiv(sizes["N"], sizes["BLOCK_M"]),)
        _merge_attention_fwd[grid](*_views([o]), _views(outs), lses, lse, **sizes)
    return o, lse


def merge_attention_bwd(do, dlse, outs, lses):
    """The gradients of outs, and of lses in their dtypes."""
    _check(do)
    douts = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in outs]
    dlses = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in lses]
    if do.numel():
        sizes = _sizes(do, len(outs))
        grid = (triton.cdiv(sizes["N"], sizes["BLOCK_M"]),)
        _merge_attention_bwd[grid](
            *_views([do]), _views(outs), _views(douts), dlse.contiguous(), tuple(x.contiguous() for x in lses),
            tuple(dlses), **sizes,
        )  # fmt: skip
    return douts, dlses
