"""Layer norm and RMS norm in Triton, forward and backward, with dropout and the residual addition in front.

One pair of kernels serves both: RMS norm is layer norm without the mean, and a mean_ptr of None says so. Rows that fit
on chip are read once; longer ones are walked in blocks. Backward sums the weight gradients of a stripe of
rows on chip, and the stripes' sums are added afterwards in a fixed order: no atomics.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .device import processors


class Dropout(NamedTuple):
    """Elements whose random word is below `threshold` are dropped, the others weighted."""

    seed_ptr: Any
    threshold: Any
    weight: Any


@triton.jit
def _keep(dropout, row, group):
    """0 or dropout.weight for each of the four columns of every group: word column % 4 of counter (row, column // 4).

    Place and seed alone decide, so that forward and backward agree, and every other backend with them.
    Source: Philox4x32-7, Salmon et al. 2011, doi:10.1145/2063384.2063405.
    """
    row = tl.cast(row, tl.int64)
    counter = (row & 0xFFFFFFFF).to(tl.uint32), group.to(tl.uint32), (row >> 32).to(tl.uint32), 0
    w0, w1, w2, w3 = tl.philox(tl.load(dropout.seed_ptr), *counter, n_rounds=7)
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    return tl.where(words < tl.cast(dropout.threshold, tl.uint32), 0.0, dropout.weight)


@triton.jit
def _load_sum(x_ptr, residual_ptr, offsets, mask, dropout, row, group):
    """x, or dropout(x) + residual rounded to x's dtype: what the rest of the network sees is what is normalised."""
    stored = tl.load(x_ptr + offsets, mask=mask, other=0.0)
    x = stored.to(tl.float32)
    if dropout is not None:
        x *= _keep(dropout, row, group)
    if residual_ptr is not None:
        x += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    return x.to(stored.dtype).to(tl.float32)


@triton.jit
def _load_weight(weight_ptr, weight_offset, columns, inside):
    """weight + weight_offset in fp32, ones where there is no weight."""
    if weight_ptr is None:
        return tl.full(columns.shape, 1.0, tl.float32)
    else:  # behind a return code is compiled still, and here it loads from None
        return tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32) + weight_offset


@triton.jit
def _norm_fwd(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    h_ptr,
    mean_ptr,
    rstd_ptr,
    dropout,
    N,
    D,
    eps,
    weight_offset,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """ROWS whole rows: h = x + residual, y = (h - mean) rstd (weight + weight_offset) + bias."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_D)
    mask = (rows < N)[:, None] & (columns < D)[None, :]
    offsets = rows[:, None] * D + columns[None, :]
    group = tl.arange(0, BLOCK_D // 4)[None, :]
    h = _load_sum(x_ptr, residual_ptr, offsets, mask, dropout, rows[:, None], group)  # [ROWS, BLOCK_D]

    centred = h
    if mean_ptr is not None:
        mean = tl.sum(h, 1) / D
        centred = tl.where(mask, h - mean[:, None], 0.0)
        tl.store(mean_ptr + rows, mean, mask=rows < N)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / D + eps)
    y = centred * rstd[:, None] * _load_weight(weight_ptr, weight_offset, columns, columns < D)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)[None, :]

    tl.store(rstd_ptr + rows, rstd, mask=rows < N)
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)
    if h_ptr is not None:
        tl.store(h_ptr + offsets, h.to(h_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _norm_fwd_long(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    h_ptr,
    mean_ptr,
    rstd_ptr,
    dropout,
    D,
    eps,
    weight_offset,
    BLOCK_D: tl.constexpr,
):
    """One row that does not fit on chip, read again (from L2) for each of mean, variance and y."""
    row = tl.program_id(0).to(tl.int64)
    first_group = tl.arange(0, BLOCK_D // 4)
    mean = 0.0
    if mean_ptr is not None:
        total = tl.zeros((BLOCK_D,), tl.float32)
        for start in tl.range(0, D, BLOCK_D):
            columns = start + tl.arange(0, BLOCK_D)
            group = start // 4 + first_group
            total += _load_sum(x_ptr, residual_ptr, row * D + columns, columns < D, dropout, row, group)
        mean = tl.sum(total, 0) / D
        tl.store(mean_ptr + row, mean)

    squares = tl.zeros((BLOCK_D,), tl.float32)
    for start in tl.range(0, D, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        h = _load_sum(x_ptr, residual_ptr, row * D + columns, columns < D, dropout, row, start // 4 + first_group)
        centred = tl.where(columns < D, h - mean, 0.0)
        squares += centred * centred
    rstd = tl.rsqrt(tl.sum(squares, 0) / D + eps)
    tl.store(rstd_ptr + row, rstd)

    for start in tl.range(0, D, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        inside = columns < D
        h = _load_sum(x_ptr, residual_ptr, row * D + columns, inside, dropout, row, start // 4 + first_group)
        y = (h - mean) * rstd * _load_weight(weight_ptr, weight_offset, columns, inside)
        if bias_ptr is not None:
            y += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(y_ptr + row * D + columns, y.to(y_ptr.dtype.element_ty), mask=inside)
        if h_ptr is not None:
            tl.store(h_ptr + row * D + columns, h.to(h_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _norm_bwd(
    dy_ptr,
    dh_ptr,
    h_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    dresidual_ptr,
    dweight_ptr,
    dbias_ptr,
    dropout,
    N,
    D,
    rows_per_stripe,
    weight_offset,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A stripe of rows: dresidual = rstd (g - xhat mean(g xhat) - mean(g)) + dh, with g = dy weight; dweight and dbias.

    dx is dresidual where it was not dropped.
    """
    stripe = tl.program_id(0).to(tl.int64)
    stop = tl.minimum((stripe + 1) * rows_per_stripe, N)
    columns = tl.arange(0, BLOCK_D)
    weight = _load_weight(weight_ptr, weight_offset, columns, columns < D)[None, :]
    dweight = tl.zeros((ROWS, BLOCK_D), tl.float32)
    dbias = tl.zeros((ROWS, BLOCK_D), tl.float32)

    for start in tl.range(0, rows_per_stripe, ROWS):
        rows = stripe * rows_per_stripe + start + tl.arange(0, ROWS)
        mask = (rows < stop)[:, None] & (columns < D)[None, :]
        offsets = rows[:, None] * D + columns[None, :]
        xhat = tl.load(h_ptr + offsets, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK_D]
        dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + rows, mask=rows < stop, other=0.0)[:, None]
        if mean_ptr is not None:
            xhat -= tl.load(mean_ptr + rows, mask=rows < stop, other=0.0)[:, None]
        xhat = tl.where(mask, xhat * rstd, 0.0)

        g = dy * weight
        dx = g - xhat * (tl.sum(g * xhat, 1) / D)[:, None]
        if mean_ptr is not None:
            dx -= (tl.sum(g, 1) / D)[:, None]
        dx *= rstd
        if dh_ptr is not None:
            dx += tl.load(dh_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if dresidual_ptr is not None:
            tl.store(dresidual_ptr + offsets, dx.to(dresidual_ptr.dtype.element_ty), mask=mask)
        if dropout is not None:
            dx *= _keep(dropout, rows[:, None], tl.arange(0, BLOCK_D // 4)[None, :])
        tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        dweight += dy * xhat
        dbias += dy

    if dweight_ptr is not None:
        tl.store(dweight_ptr + stripe * D + columns, tl.sum(dweight, 0), mask=columns < D)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + stripe * D + columns, tl.sum(dbias, 0), mask=columns < D)


@triton.jit
def _norm_bwd_long(
    dy_ptr,
    dh_ptr,
    h_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    dresidual_ptr,
    dweight_ptr,
    dbias_ptr,
    dropout,
    N,
    D,
    rows_per_stripe,
    weight_offset,
    BLOCK_D: tl.constexpr,
):
    """`_norm_bwd` for rows that do not fit on chip: the stripe's dweight and dbias lie in memory, which begins as 0."""
    stripe = tl.program_id(0).to(tl.int64)
    for row in tl.range(stripe * rows_per_stripe, tl.minimum((stripe + 1) * rows_per_stripe, N)):
        offset = tl.cast(row, tl.int64) * D
        rstd = tl.load(rstd_ptr + row)
        mean = 0.0
        if mean_ptr is not None:
            mean = tl.load(mean_ptr + row)
        sum_g_xhat = tl.zeros((BLOCK_D,), tl.float32)
        sum_g = tl.zeros((BLOCK_D,), tl.float32)
        for start in tl.range(0, D, BLOCK_D):
            columns = start + tl.arange(0, BLOCK_D)
            inside = columns < D
            xhat = (tl.load(h_ptr + offset + columns, mask=inside, other=0.0).to(tl.float32) - mean) * rstd
            dy = tl.load(dy_ptr + offset + columns, mask=inside, other=0.0).to(tl.float32)
            g = dy * _load_weight(weight_ptr, weight_offset, columns, inside)
            sum_g_xhat += g * xhat
            sum_g += g
            if dweight_ptr is not None:
                ptrs = dweight_ptr + stripe * D + columns
                tl.store(ptrs, tl.load(ptrs, mask=inside, other=0.0) + dy * xhat, mask=inside)
            if dbias_ptr is not None:
                ptrs = dbias_ptr + stripe * D + columns
                tl.store(ptrs, tl.load(ptrs, mask=inside, other=0.0) + dy, mask=inside)

        mean_g_xhat = tl.sum(sum_g_xhat, 0) / D
        mean_g = tl.sum(sum_g, 0) / D if mean_ptr is not None else 0.0
        for start in tl.range(0, D, BLOCK_D):
            columns = start + tl.arange(0, BLOCK_D)
            inside = columns < D
            xhat = (tl.load(h_ptr + offset + columns, mask=inside, other=0.0).to(tl.float32) - mean) * rstd
            dy = tl.load(dy_ptr + offset + columns, mask=inside, other=0.0).to(tl.float32)
            g = dy * _load_weight(weight_ptr, weight_offset, columns, inside)
            dx = (g - xhat * mean_g_xhat - mean_g) * rstd
            if dh_ptr is not None:
                dx += tl.load(dh_ptr + offset + columns, mask=inside, other=0.0).to(tl.float32)
            if dresidual_ptr is not None:
                tl.store(dresidual_ptr + offset + columns, dx.to(dresidual_ptr.dtype.element_ty), mask=inside)
            if dropout is not None:
                dx *= _keep(dropout, row, start // 4 + tl.arange(0, BLOCK_D // 4))
            tl.store(dx_ptr + offset + columns, dx.to(dx_ptr.dtype.element_ty), mask=inside)


_LONGEST_ROW = {"fwd": 32768, "bwd": 16384}  # bytes on chip; backward also keeps dy, dweight and dbias of the row


def _launch_for(direction, x):
    """Rows, columns and warps of a program. Not measured yet, chosen from the compile table (registers)."""
    D = x.shape[-1]
    if D * x.element_size() > _LONGEST_ROW[direction]:
        return dict(BLOCK_D=4096, num_warps=8)
    BLOCK_D = max(4, triton.next_power_of_2(D))  # dropout draws four numbers at a time
    warps = min(max(BLOCK_D // (1024 if direction == "fwd" else 512), 4), 16)  # 32 or 16 elements a thread, or fewer
    return dict(ROWS=max(1, 2048 // BLOCK_D), BLOCK_D=BLOCK_D, num_warps=warps)


def _stripes(N, device):
    """Stripes of rows in the backward pass: a few for each multiprocessor, so that none waits long for the last."""
    rows_per_stripe = triton.cdiv(N, 4 * processors(device, elsewhere=2))
    return triton.cdiv(N, rows_per_stripe), rows_per_stripe


def _dropout(seed, dropout_p):
    return Dropout(seed, int(dropout_p * 2**32), 1 / (1 - dropout_p)) if dropout_p else None


def _forward(x, weight, bias, residual, seed, eps, weight_offset, dropout_p, centre):
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"norm: the Triton kernels take fp32, bf16 and fp16, got {x.dtype}")
    D = x.shape[-1]
    N = x.numel() // D
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    has_h = residual is not None or dropout_p > 0
    h = torch.empty(x.shape if has_h else (0,), dtype=x.dtype, device=x.device)
    mean = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device) if centre else None
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if N:
        weight, bias = (None if w is None else w.contiguous() for w in (weight, bias))
        dropout = _dropout(seed, dropout_p)
        tensors = x, residual, weight, bias, y, h if has_h else None, mean, rstd, dropout
        launch = _launch_for("fwd", x)
        if "ROWS" in launch:
            _norm_fwd[(triton.cdiv(N, launch["ROWS"]),)](*tensors, N, D, eps, weight_offset, **launch)
        else:
            _norm_fwd_long[(N,)](*tensors, D, eps, weight_offset, **launch)
    return y, h, mean, rstd


def _backward(dy, dh, h, weight, mean, rstd, seed, weight_offset, dropout_p, has_bias, has_residual):
    D = h.shape[-1]
    N = h.numel() // D
    dx = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    two = has_residual and dropout_p > 0
    dresidual = torch.empty(h.shape if two else (0,), dtype=h.dtype, device=h.device)
    if not N:
        dweight = h.new_zeros(0) if weight is None else torch.zeros_like(weight)
        return dx, dresidual, dweight, rstd.new_zeros(D if has_bias else 0)
    stripes, rows_per_stripe = _stripes(N, h.device)
    launch = _launch_for("bwd", h)
    new = rstd.new_empty if "ROWS" in launch else rstd.new_zeros
    dweights = None if weight is None else new(stripes, D)
    dbiases = new(stripes, D) if has_bias else None
    kernel = _norm_bwd if "ROWS" in launch else _norm_bwd_long
    kernel[(stripes,)](
        dy,
        dh,
        h,
        None if weight is None else weight.contiguous(),
        mean,
        rstd,
        dx,
        dresidual if two else None,
        dweights,
        dbiases,
        _dropout(seed, dropout_p),
        N,
        D,
        rows_per_stripe,
        weight_offset,
        **launch,
    )
    dweight = h.new_empty(0) if weight is None else dweights.sum(0).to(weight.dtype)
    return dx, dresidual, dweight, dbiases.sum(0) if has_bias else rstd.new_empty(0)


def layer_norm_fwd(x, weight, bias, residual, seed, eps, dropout_p):
    """y, h (empty where it would be x), and mean and rstd of every row in fp32."""
    return _forward(x, weight, bias, residual, seed, eps, 0.0, dropout_p, centre=True)


def layer_norm_bwd(dy, dh, h, weight, mean, rstd, seed, dropout_p, has_bias, has_residual):
    """dx, dresidual (empty where it would be dx), dweight in weight's dtype and dbias in fp32 (empty without one)."""
    return _backward(dy, dh, h, weight, mean, rstd, seed, 0.0, dropout_p, has_bias, has_residual)


def rms_norm_fwd(x, weight, residual, seed, eps, weight_offset, dropout_p):
    """y, h (empty where it would be x), and rstd of every row in fp32."""
    y, h, _, rstd = _forward(x, weight, None, residual, seed, eps, weight_offset, dropout_p, centre=False)
    return y, h, rstd


def rms_norm_bwd(dy, dh, h, weight, rstd, seed, weight_offset, dropout_p, has_residual):
    """dx, dresidual (empty where it would be dx), and dweight in weight's dtype (empty without one)."""
    return _backward(dy, dh, h, weight, None, rstd, seed, weight_offset, dropout_p, False, has_residual)[:3]
