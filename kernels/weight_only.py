"""Linear layers with packed int8 and int4 weights, or narrow ones, in Triton: few rows at once, and unpacking for many.

A program has some rows of the weight and a range of their columns. It unpacks words of 4 or 8 numbers where they were
loaded, byte by byte, so that a tile of words becomes a tile of numbers in the order (byte, word); x is put into that
order instead, which is much smaller. Where there are fewer programs than the GPU could run, columns are cut into
ranges, whose sums are added afterwards in a fixed order: no atomics.
"""

import torch
import triton
import triton.language as tl

from .device import entry, processors

PANEL = tl.constexpr(16)  # rows of a packed weight that lie together


@triton.jit
def _unpacked(codes, scales, offsets, BITS: tl.constexpr):
    """Numbers [32 / BITS, words, rows] in fp32 of words [words, rows]; scales and offsets are of the same shape."""
    PER: tl.constexpr = 32 // BITS
    n = tl.arange(0, PER)
    # A byte of 4-bit words holds number i in its low half and i + 4 in its high half.
    shift = n * 8 if BITS == 8 else n % 4 * 8 + n // 4 * 4
    w = (codes[None, :, :] >> shift[:, None, None]) & ((1 << BITS) - 1)
    w = (w - (1 << (BITS - 1))).to(tl.float32) * scales[None, :, :]
    return w if offsets is None else w + offsets[None, :, :]


@triton.jit
def _groups(values_ptr, word, row, stop, groups, group_words, N):
    """The scales or offsets of words [words, rows]."""
    place = (row // PANEL * groups)[None, :] * PANEL + (word // group_words)[:, None] * PANEL + (row % PANEL)[None, :]
    return tl.load(values_ptr + place, mask=(word < stop)[:, None] & (row < N)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _weights(codes_ptr, scales_ptr, offsets_ptr, word, stop, row, N, words, groups, group_words, BITS: tl.constexpr):
    """Numbers [32 / BITS, words, rows] of a packed weight whose rows have so many `words`; 0 from stop and N on."""
    inside = (word < stop)[:, None] & (row < N)[None, :]
    place = (row // PANEL * words)[None, :] * PANEL + word[:, None] * PANEL + (row % PANEL)[None, :]
    codes = tl.load(codes_ptr + place, mask=inside, other=0)
    scales = _groups(scales_ptr, word, row, stop, groups, group_words, N)
    offsets = None
    if offsets_ptr is not None:
        offsets = _groups(offsets_ptr, word, row, stop, groups, group_words, N)
    return _unpacked(codes, scales, offsets, BITS)


@triton.jit
def _store_sums(out_ptr, bias_ptr, acc, part, m, row, M, N):
    """A range's sums [M, N], or where there is one range y, with its bias."""
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + row, mask=row < N, other=0.0).to(tl.float32)[None, :]
    place = (part.to(tl.int64) * M + m[:, None]) * N + row[None, :]
    tl.store(out_ptr + place, acc.to(out_ptr.dtype.element_ty), mask=(m < M)[:, None] & (row < N)[None, :])


@triton.jit
def _quantized_linear(
    x_ptr,
    codes_ptr,
    scales_ptr,
    offsets_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    words,
    groups,
    group_words,
    range_words,
    BITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """x [M, K] times some rows of the weight, over one range of its words."""
    PER: tl.constexpr = 32 // BITS
    BLOCK_K: tl.constexpr = PER * BLOCK_W
    row = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    part = tl.program_id(1)
    m = (tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    stop = tl.minimum((part + 1) * range_words, words)
    for start in tl.range(part * range_words, stop, BLOCK_W):
        word = start + tl.arange(0, BLOCK_W)
        w = _weights(codes_ptr, scales_ptr, offsets_ptr, word, stop, row, N, words, groups, group_words, BITS)
        w = tl.reshape(w.to(x_ptr.dtype.element_ty), (BLOCK_K, BLOCK_N))
        k = start * PER + tl.arange(0, BLOCK_K)
        inside = (m < M)[:, None] & ((k < K) & (k < stop * PER))[None, :]
        x = tl.load(x_ptr + m[:, None] * K + k[None, :], mask=inside, other=0.0)
        x = tl.reshape(tl.permute(tl.reshape(x, (BLOCK_M, BLOCK_W, PER)), (0, 2, 1)), (BLOCK_M, BLOCK_K))
        acc += tl.dot(x, w, input_precision="ieee")  # in fp32 sums of sums: shorter chains, smaller errors
    _store_sums(out_ptr, bias_ptr, acc, part, m, row, M, N)


@triton.jit
def _narrow_linear(
    x_ptr,
    w_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    range_columns,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """x [M, K] times some rows of a weight [N, K] of another dtype, over one range of its columns."""
    row = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    part = tl.program_id(1)
    m = (tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    stop = tl.minimum((part + 1) * range_columns, K)
    for start in tl.range(part * range_columns, stop, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        w = tl.load(w_ptr + row[:, None] * K + k[None, :], mask=(row < N)[:, None] & (k < stop)[None, :], other=0.0)
        x = tl.load(x_ptr + m[:, None] * K + k[None, :], mask=(m < M)[:, None] & (k < stop)[None, :], other=0.0)
        w = w.to(tl.float32).to(x.dtype)  # from fp16 to bf16 too
        acc += tl.dot(x, w.T, input_precision="ieee")
    _store_sums(out_ptr, bias_ptr, acc, part, m, row, M, N)


@triton.jit
def _sum_ranges(parts_ptr, bias_ptr, y_ptr, size, N, RANGES, BLOCK: tl.constexpr):
    """y = sum of the ranges' sums, in order, + bias."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    y = tl.zeros((BLOCK,), tl.float32)
    for n in tl.range(0, RANGES):
        y += tl.load(parts_ptr + tl.cast(n, tl.int64) * size + at, mask=at < size, other=0.0)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + at % N, mask=at < size, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=at < size)


@triton.jit
def _dequantize(
    w_ptr,
    codes_ptr,
    scales_ptr,
    offsets_ptr,
    begin,
    end,
    K,
    words,
    groups,
    group_words,
    BITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Rows [begin, end) of a packed weight, a block of them and of their words."""
    PER: tl.constexpr = 32 // BITS
    row = (begin + tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    word = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    w = _weights(codes_ptr, scales_ptr, offsets_ptr, word, words, row, end, words, groups, group_words, BITS)
    w = tl.reshape(tl.permute(w, (2, 1, 0)), (BLOCK_N, PER * BLOCK_W))
    k = tl.program_id(1) * PER * BLOCK_W + tl.arange(0, PER * BLOCK_W)
    place = (row - begin)[:, None] * K + k[None, :]
    tl.store(w_ptr + place, w.to(w_ptr.dtype.element_ty), mask=(row < end)[:, None] & (k < K)[None, :])


# By GPU name ("any" for the others) and bits of x: BLOCK_N, BLOCK_K, num_warps, num_stages for up to 16 rows of x.
# 2026-11-30, not measured: a step of decoding is bound by reading the weight, so that a program has 16 to 32 KiB of it
# under way. fp32 has no matrix units and keeps both tiles in registers.
LAUNCHES = {"any": {16: (64, 128, 4, 3), 32: (32, 64, 4, 2)}}


def _launch_for(x, M):
    """Blocks of rows of x, of rows and of columns of the weight; warps, stages."""
    if x.device.type == "cpu":  # the interpreter: small blocks, so that short tests cross their borders
        return dict(BLOCK_M=16, BLOCK_N=64, BLOCK_K=32 if x.dtype == torch.float32 else 64)
    BLOCK_N, BLOCK_K, warps, stages = entry(LAUNCHES, x.device)[8 * x.element_size()]
    most = 16 if x.dtype == torch.float32 else 64
    BLOCK_M = min(most, max(16, triton.next_power_of_2(M)))
    return dict(BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, num_warps=warps, num_stages=stages)


def _ranges(x, programs, blocks):
    """How many ranges of columns give every multiprocessor about four programs; none is shorter than four blocks."""
    if x.device.type == "cpu":
        return min(2, blocks)
    return max(1, min(triton.cdiv(4 * processors(x.device), programs), blocks // 4, 16))


def _check(x):
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"weight_only_linear: the Triton kernels take fp32, bf16 and fp16, got {x.dtype}")


def _run(x, N, columns, bias, launch, kernel):
    """y [..., N]: kernel(grid, out, bias or None, columns of a range), then the sum over the ranges."""
    K = x.shape[-1]
    y = x.new_empty(*x.shape[:-1], N)
    if not y.numel():
        return y
    M = y.numel() // N
    blocks = triton.cdiv(columns, launch["BLOCK_K"])
    grid = triton.cdiv(N, launch["BLOCK_N"]), triton.cdiv(M, launch["BLOCK_M"])
    ranges = _ranges(x, grid[0] * grid[1], blocks) if K else 1
    range_columns = triton.cdiv(blocks, ranges) * launch["BLOCK_K"]
    ranges = max(1, triton.cdiv(columns, max(range_columns, 1)))
    bias = None if bias is None else bias.contiguous()
    parts = y if ranges == 1 else x.new_empty(ranges, M, N, dtype=torch.float32)
    kernel((grid[0], ranges, grid[1]), parts, bias if ranges == 1 else None, M, range_columns)
    if ranges > 1:
        size, BLOCK = M * N, 1024
        _sum_ranges[(triton.cdiv(size, BLOCK),)](parts, bias, y, size, N, ranges, BLOCK=BLOCK, num_warps=4)
    return y


def weight_only_linear_fwd(x, weight, bias):
    """x w^T + bias for a weight [N, K] of another dtype."""
    _check(x)
    N, K = weight.shape
    launch = _launch_for(x, x.numel() // max(K, 1))

    def kernel(grid, out, bias, M, range_columns):
        _narrow_linear[grid](x, weight, bias, out, M, N, K, range_columns, **launch)

    return _run(x, N, K, bias, launch, kernel)


def quantized_linear_fwd(x, codes, scales, offsets, bias, rows, bits, group):
    """x w^T + bias for a packed weight of `rows` rows."""
    _check(x)
    K, words, groups = x.shape[-1], codes.shape[1], scales.shape[1]
    launch = _launch_for(x, x.numel() // max(K, 1))
    per = 32 // bits
    blocks = {name: value for name, value in launch.items() if name != "BLOCK_K"}

    def kernel(grid, out, bias, M, range_columns):
        _quantized_linear[grid](
            x, codes, scales, offsets, bias, out, M, rows, K, words, groups, group // per, range_columns // per,
            BITS=bits, BLOCK_W=launch["BLOCK_K"] // per, **blocks,
        )  # fmt: skip

    return _run(x, rows, words * per, bias, launch, kernel)


def dequantize_fwd(codes, scales, offsets, like, begin, end, rows, columns, bits, group):
    """Rows [begin, end) of a packed weight [rows, columns], rounded once to the dtype of `like`."""
    _check(like)
    w = like.new_empty(end - begin, columns)
    if w.numel():
        per = 32 // bits
        BLOCK_N, BLOCK_W = 16, 128 // per
        words, groups = codes.shape[1], scales.shape[1]
        grid = triton.cdiv(end - begin, BLOCK_N), triton.cdiv(words, BLOCK_W)
        _dequantize[grid](
            w, codes, scales, offsets, begin, end, columns, words, groups, group // per,
            BITS=bits, BLOCK_N=BLOCK_N, BLOCK_W=BLOCK_W, num_warps=4,
        )  # fmt: skip
    return w
