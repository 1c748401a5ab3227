"""Rotary positions in Triton: every pair of a head's first R elements is turned by the angle of its position.

The inverse rotation, which is the gradient, is the same kernel.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _rope(
    x_ptr,
    y_ptr,
    cos_ptr,
    sin_ptr,
    rows_ptr,
    x_strides,
    y_strides,
    table_strides,
    rows_stride,
    H,
    T,
    D,
    R,
    S,
    offset,
    INTERLEAVED: tl.constexpr,
    WHOLE: tl.constexpr,
    INVERSE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
):
    """BLOCK_T positions of one head. A position that the tables do not have is passed on as it is."""
    blocks = tl.cdiv(T, BLOCK_T)
    head, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    t = block.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    x_rows = x_ptr + b * x_strides[0] + h * x_strides[1] + t[:, None] * x_strides[2]
    y_rows = y_ptr + b * y_strides[0] + h * y_strides[1] + t[:, None] * y_strides[2]
    row = t + offset
    if rows_ptr is not None:
        row = tl.load(rows_ptr + b * rows_stride + t, mask=t < T, other=0)

    pair = tl.arange(0, PAIRS)[None, :]
    i = 2 * pair if INTERLEAVED else pair
    j = i + 1 if INTERLEAVED else pair + R // 2
    mask = (t < T)[:, None] & (pair < R // 2)
    known = mask & ((row >= 0) & (row < S))[:, None]
    table = b * table_strides[0] + row[:, None] * table_strides[1]
    at_i = table + (i if WHOLE else pair)
    cos_i = tl.load(cos_ptr + at_i, mask=known, other=1.0).to(tl.float32)  # [BLOCK_T, PAIRS]
    sin_i = tl.load(sin_ptr + at_i, mask=known, other=0.0).to(tl.float32)
    cos_j, sin_j = cos_i, sin_i
    if WHOLE:
        cos_j = tl.load(cos_ptr + table + j, mask=known, other=1.0).to(tl.float32)
        sin_j = tl.load(sin_ptr + table + j, mask=known, other=0.0).to(tl.float32)
    if INVERSE:
        sin_i, sin_j = -sin_j, -sin_i
    xi = tl.load(x_rows + i, mask=mask, other=0.0).to(tl.float32)
    xj = tl.load(x_rows + j, mask=mask, other=0.0).to(tl.float32)

    tl.store(y_rows + i, (xi * cos_i - xj * sin_i).to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(y_rows + j, (xj * cos_j + xi * sin_j).to(y_ptr.dtype.element_ty), mask=mask)
    if REST > 0:
        column = R + tl.arange(0, REST)[None, :]
        mask = (t < T)[:, None] & (column < D)
        tl.store(y_rows + column, tl.load(x_rows + column, mask=mask), mask=mask)


def _launch_for(D, R):
    """Positions, pairs and warps of a program: 16 elements a thread. Not measured yet."""
    PAIRS = triton.next_power_of_2(R // 2)
    REST = triton.next_power_of_2(D - R) if D > R else 0
    return dict(BLOCK_T=max(1, 1024 // max(PAIRS, REST)), PAIRS=PAIRS, REST=REST, num_warps=4)


def _table_rows(q, offsets, cu_seqlens, offset):
    """[B, T]: the row of the tables of every position, or None where it is t + offset."""
    if offsets is None and cu_seqlens is None:
        return None
    B, _, T, _ = q.shape
    t = torch.arange(T, device=q.device)
    if cu_seqlens is None:
        return t + (offsets[:, None] + offset)
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), t, right=True).clamp(max=len(cu_seqlens) - 2)
    t = t - cu_seqlens[sequence] + offset
    return (t if offsets is None else t + offsets[sequence])[None]


def rope_fwd(q, k, cos, sin, offsets, cu_seqlens, offset, interleaved, whole, inverse):
    """q and k (empty where there is none) [B, H, T, D], turned or turned back, in the memory order they came in."""
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"rope: the Triton kernels take fp32, bf16 and fp16, got {q.dtype}")
    D, (S, width) = q.shape[-1], cos.shape[-2:]
    R = width if whole else 2 * width
    rows = _table_rows(q, offsets, cu_seqlens, offset)
    table_strides = (cos.stride(0) if cos.ndim == 3 and cos.shape[0] > 1 else 0, cos.stride(-2))
    launch = _launch_for(D, R)
    turned = []
    for x in (q, k):
        if x is None:
            turned.append(q.new_empty(0))
            continue
        B, H, T, _ = x.shape
        heads_inside = x.stride(1) < x.stride(2)
        y = x.new_empty(B, T, H, D).transpose(1, 2) if heads_inside else x.new_empty(B, H, T, D)
        if y.numel():
            _rope[(triton.cdiv(T, launch["BLOCK_T"]) * B * H,)](
                x,
                y,
                cos,
                sin,
                rows,
                x.stride()[:3],
                y.stride()[:3],
                table_strides,
                0 if rows is None else rows.stride(0),
                H,
                T,
                D,
                R,
                S,
                offset,
                INTERLEAVED=interleaved,
                WHOLE=whole,
                INVERSE=inverse,
                **launch,
            )
        turned.append(y)
    return tuple(turned)
