"""softmax and log-softmax over the last dimension in Triton, scaled, masked and causal, forward and backward.

Rows of up to 16384 elements are read once and kept on chip, several short ones to a program; longer rows are walked in
blocks, twice. Source for the walk (maximum and sum in one pass): Milakov and Gimelshein 2018, arXiv:1805.02867.
"""

import torch
import triton
import triton.language as tl

from .device import entry

# Where a running maximum starts. Finite: exp(-inf - LOWEST) is 0, but exp(-inf - -inf) would be NaN.
LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def _load_scores(x_ptr, mask_ptr, mask_strides, rows, columns, N, H, T, S, scale, CAUSAL: tl.constexpr):
    """scale * x of rows [.., 1] and columns [1, ..] of x [B, H, T, S] seen as [N, S], -inf where hidden or outside."""
    visible = (rows < N) & (columns < S)
    t = rows % T
    if CAUSAL:  # the last row sees everything
        visible &= columns <= t + S - T
    if mask_ptr is not None:
        b, h = rows // T // H, rows // T % H
        row_ptrs = mask_ptr + b * mask_strides[0] + h * mask_strides[1] + t * mask_strides[2]
        visible &= tl.load(row_ptrs + columns.to(tl.int64) * mask_strides[3], mask=visible, other=0) != 0
    x = tl.load(x_ptr + rows * S + columns, mask=visible, other=0.0)
    return tl.where(visible, x.to(tl.float32) * scale, float("-inf"))


@triton.jit
def _softmax_fwd(
    x_ptr,
    mask_ptr,
    mask_strides,
    y_ptr,
    N,
    H,
    T,
    S,
    scale,
    CAUSAL: tl.constexpr,
    LOG: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ROWS whole rows."""
    rows = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    s = _load_scores(x_ptr, mask_ptr, mask_strides, rows, columns, N, H, T, S, scale, CAUSAL)  # [ROWS, BLOCK]

    # exp and not exp2: log2(e) * s would round s, and only the difference to the maximum is small.
    s -= tl.maximum(tl.max(s, 1), LOWEST)[:, None]
    p = tl.exp(s)
    l = tl.sum(p, 1)[:, None]
    l = tl.where(l == 0, 1.0, l)
    y = s - tl.log(l) if LOG else p / l

    tl.store(y_ptr + rows * S + columns, y.to(y_ptr.dtype.element_ty), mask=(rows < N) & (columns < S))


@triton.jit
def _softmax_fwd_long(
    x_ptr,
    mask_ptr,
    mask_strides,
    y_ptr,
    N,
    H,
    T,
    S,
    scale,
    CAUSAL: tl.constexpr,
    LOG: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row that does not fit on chip: every lane keeps a maximum and a sum of its own, joined at the end."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    m = tl.full((BLOCK,), LOWEST, tl.float32)
    l = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, S, BLOCK):
        s = _load_scores(x_ptr, mask_ptr, mask_strides, row, start + columns, N, H, T, S, scale, CAUSAL)
        m_next = tl.maximum(m, s)
        l = l * tl.exp(m - m_next) + tl.exp(s - m_next)
        m = m_next
    m_row = tl.max(m, 0)
    l_row = tl.sum(l * tl.exp(m - m_row), 0)
    l_row = tl.where(l_row == 0, 1.0, l_row)

    for start in tl.range(0, S, BLOCK):
        s = _load_scores(x_ptr, mask_ptr, mask_strides, row, start + columns, N, H, T, S, scale, CAUSAL) - m_row
        y = s - tl.log(l_row) if LOG else tl.exp(s) / l_row
        tl.store(y_ptr + row * S + start + columns, y.to(y_ptr.dtype.element_ty), mask=start + columns < S)


@triton.jit
def _grad(dy, y, total, scale, LOG: tl.constexpr):
    """dx, given the row's total of y * dy, or of dy for the logarithm, which is -inf where x was hidden."""
    if LOG:
        return tl.where(y == float("-inf"), 0.0, dy - tl.exp(y) * total) * scale
    return y * (dy - total) * scale


@triton.jit
def _softmax_bwd(dy_ptr, y_ptr, dx_ptr, N, S, scale, LOG: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """ROWS whole rows: dx = scale y (dy - sum(y dy)), or scale (dy - exp(y) sum(dy)) for the logarithm."""
    rows = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    mask = (rows < N) & (columns < S)
    y = tl.load(y_ptr + rows * S + columns, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
    dy = tl.load(dy_ptr + rows * S + columns, mask=mask, other=0.0).to(tl.float32)

    total = tl.sum(dy if LOG else y * dy, 1)[:, None]
    if not LOG:  # where one y is nearly 1, dy - total cancels: a second step takes the rounding out of total
        total += tl.sum(y * (dy - total), 1)[:, None]
    dx = _grad(dy, y, total, scale, LOG)

    tl.store(dx_ptr + rows * S + columns, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _softmax_bwd_long(dy_ptr, y_ptr, dx_ptr, S, scale, LOG: tl.constexpr, BLOCK: tl.constexpr):
    """One row that does not fit on chip."""
    offset = tl.program_id(0).to(tl.int64) * S
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, S, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        dy = tl.load(dy_ptr + offset + columns, mask=columns < S, other=0.0).to(tl.float32)
        if LOG:
            sums += dy
        else:
            sums += dy * tl.load(y_ptr + offset + columns, mask=columns < S, other=0.0).to(tl.float32)
    total = tl.sum(sums, 0)

    for start in tl.range(0, S, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        dy = tl.load(dy_ptr + offset + columns, mask=columns < S, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + offset + columns, mask=columns < S, other=0.0).to(tl.float32)
        dx = _grad(dy, y, total, scale, LOG)
        tl.store(dx_ptr + offset + columns, dx.to(dx_ptr.dtype.element_ty), mask=columns < S)


# By GPU name ("any" for the others): the longest row that stays on chip, elements a program takes in whole rows, those
# a warp takes, the most warps; block and warps for longer rows.
# 2026-11-24, not measured: reasoned from the compile table (32 elements a thread leave registers for a second block on
# the multiprocessor) and from what others published (a row per block reaches the copy bandwidth up to 32768 elements).
LAUNCHES = {"any": dict(longest=16384, program=2048, warp=1024, most_warps=16, long=dict(BLOCK=4096, num_warps=8))}


def _launch_for(S, device):
    """Rows, columns and warps of a program."""
    table = entry(LAUNCHES, device)
    if S > table["longest"]:
        return dict(table["long"])
    BLOCK = triton.next_power_of_2(S)
    warps = min(max(BLOCK // table["warp"], 4), table["most_warps"])
    return dict(ROWS=max(1, table["program"] // BLOCK), BLOCK=BLOCK, num_warps=warps)


def softmax_fwd(x, mask, scale, causal, log):
    """softmax, or its logarithm, of scale * x [B, H, T, S] over what mask and causal leave."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"softmax: the Triton kernels take fp32, bf16 and fp16, got {x.dtype}")
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        _, H, T, S = x.shape
        N = x.numel() // S
        launch = _launch_for(S, x.device)
        strides = None if mask is None else mask.expand(x.shape).stride()
        kernel, grid = (_softmax_fwd, triton.cdiv(N, launch["ROWS"])) if "ROWS" in launch else (_softmax_fwd_long, N)
        kernel[(grid,)](x, mask, strides, y, N, H, T, S, scale, CAUSAL=causal, LOG=log, **launch)
    return y


def softmax_bwd(dy, y, scale, log):
    """dx from y."""
    dx = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    if y.numel():
        S = y.shape[-1]
        N = y.numel() // S
        launch = _launch_for(S, y.device)
        if "ROWS" in launch:
            _softmax_bwd[(triton.cdiv(N, launch["ROWS"]),)](dy, y, dx, N, S, scale, LOG=log, **launch)
        else:
            _softmax_bwd_long[(N,)](dy, y, dx, S, scale, LOG=log, **launch)
    return dx
