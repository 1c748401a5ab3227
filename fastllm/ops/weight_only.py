"""Linear layers whose weights have fewer bits than their inputs: int8 and int4 with scales, or bf16."""

from dataclasses import dataclass

import torch

from fastllm import dispatch, reference
from fastllm.dispatch import Op, choose, cpu_op
from fastllm.ops import _tuned
from fastllm.ops._common import autocast, check_tensor, wants_gradient
from fastllm.ops.linear import linear, matmul, own_products

PANEL = 16  # rows of a packed weight that lie together
# Rows of x that the kernel reads every weight once for; more are a matrix product.
FEW_ROWS = {"cpu": 16, "triton": 64}
# Weights that are unpacked at a time for a product: what a CPU's caches hold, fewer beside few rows, where reading them
# is all there is to do; on a GPU what keeps a product of all of them in one.
_CHUNK = {"few rows": 1 << 20, "cpu": 1 << 22, "triton": 1 << 26}
NARROW = (torch.float32, torch.bfloat16, torch.float16)

weight_only_linear_fwd = Op(
    "weight_only_linear_fwd(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    "weight_only",
    lambda x, weight, bias: x.new_empty(*x.shape[:-1], weight.shape[0]),
)
quantized_linear_fwd = Op(
    "quantized_linear_fwd(Tensor x, Tensor codes, Tensor scales, Tensor? offsets, Tensor? bias, int rows, int bits,"
    " int group) -> Tensor",
    "weight_only",
    lambda x, codes, scales, offsets, bias, rows, bits, group: x.new_empty(*x.shape[:-1], rows),
)
quantized_linear_bwd = cpu_op(
    "quantized_linear_bwd(Tensor dy, Tensor codes, Tensor scales, Tensor? offsets, int columns, int bits, int group)"
    " -> Tensor",
    lambda dy, codes, scales, offsets, columns, bits, group: dy.new_empty(*dy.shape[:-1], columns),
)
dequantize_fwd = Op(
    "dequantize_fwd(Tensor codes, Tensor scales, Tensor? offsets, Tensor like, int begin, int end, int rows,"
    " int columns, int bits, int group) -> Tensor",
    "weight_only",
    lambda codes, scales, offsets, like, begin, end, rows, columns, bits, group: like.new_empty(end - begin, columns),
)


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A weight [N, K] as 8-bit or 4-bit numbers: w[n, k] = code * scale + offset, one scale (and offset) per group.

    `codes` is int32 [N / 16, K' * bits / 32, 16]: 16 rows side by side, each word holding the next 4 (8 bits) or 8
    (4 bits) numbers of a row; K' is K filled up to whole groups. `scales` and `offsets` (or None) are
    [N / 16, K' / group_size, 16], fp32 for 8 bits and bf16 for 4. N is filled up to whole panels of 16 rows. The
    tensors are all there is to save; one layout serves every instruction set. Made by `fastllm.quantize_weight`.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    offsets: torch.Tensor | None
    shape: tuple[int, int]
    bits: int
    group_size: int

    @classmethod
    def from_codes(cls, codes, scales, offsets=None, *, bits=8):
        """Packs codes [N, K], integers in [-128, 127] or [-8, 7], with scales and offsets [N, groups] or [N].

        For unsigned codes with zero points z, subtract 128 (or 8) from both: offsets = -z * scales. Two codes in a
        byte are to be unpacked first. Raises ValueError for shapes and codes that do not fit.
        """
        low, high = (-128, 127) if bits == 8 else (-8, 7)
        if bits not in (8, 4):
            raise ValueError(f"QuantizedWeight: bits must be 8 or 4, got {bits}")
        if codes.ndim != 2 or codes.is_floating_point() or not codes.numel():
            raise ValueError(f"QuantizedWeight: codes must be integers [N, K], got {codes.dtype} {list(codes.shape)}")
        if codes.min() < low or codes.max() > high:
            raise ValueError(f"QuantizedWeight: codes must be in [{low}, {high}] for {bits} bits")
        N, K = codes.shape
        if scales.ndim not in (1, 2) or len(scales) != N or (offsets is not None and offsets.numel() != scales.numel()):
            raise ValueError(
                f"QuantizedWeight: scales, and offsets like them, must be [{N}, groups] or [{N}],"
                f" got {list(scales.shape)}" + ("" if offsets is None else f" and {list(offsets.shape)}")
            )
        scales = scales.reshape(N, -1)
        groups = scales.shape[1]
        group_size = -(-K // 64) * 64 if groups == 1 else K // groups
        if groups > 1 and (K % groups or group_size % 32):
            raise ValueError(f"QuantizedWeight: groups of {K} / {groups} numbers; they must be a multiple of 32")
        panels, columns = -(-N // PANEL), groups * group_size
        filled = codes.new_zeros(panels * PANEL, columns, dtype=torch.uint8)
        filled[:N, :K] = codes.to(torch.int16).bitwise_and(255 if bits == 8 else 15).to(torch.uint8)
        filled ^= 128 if bits == 8 else 8  # zero is 128 or 8: the kernels multiply unsigned codes
        if bits == 4:
            halves = filled.view(panels * PANEL, columns // 8, 2, 4)
            filled = (halves[:, :, 0] | halves[:, :, 1] << 4).flatten(1)
        words = filled.view(panels, PANEL, -1, 4).transpose(1, 2).contiguous().view(torch.int32).squeeze(-1)

        def rows(x):
            wide = torch.float32 if bits == 8 else torch.bfloat16
            y = torch.zeros(panels * PANEL, groups, dtype=wide, device=codes.device)
            y[:N] = x.reshape(N, groups)
            return y.view(panels, PANEL, groups).transpose(1, 2).contiguous()

        return cls(words, rows(scales), None if offsets is None else rows(offsets), (N, K), bits, group_size)

    @property
    def nbytes(self):
        """Of all its tensors."""
        return sum(x.nbytes for x in (self.codes, self.scales, self.offsets) if x is not None)

    def dequantize(self, dtype=torch.float32):
        """The weight [N, K] that the numbers stand for, rounded once to `dtype`."""
        return self._rows(0, self.shape[0], torch.empty(0, dtype=dtype, device=self.codes.device))

    def rows(self, numbers, dtype=torch.float32):
        """The rows [n, K] of these numbers [n], rounded once to `dtype`: what an embedding is."""
        panel, lane = numbers // PANEL, numbers % PANEL
        packed = (self.codes, self.scales, self.offsets)
        part = [None if x is None else x[panel, :, lane].unsqueeze(-1) for x in packed]
        w = reference.dequantize(*part, bits=self.bits, group_size=self.group_size)
        return w[:, : self.shape[1]].to(dtype)

    def _rows(self, begin, end, like):
        packed = self.codes, self.scales, self.offsets
        backend = choose("dequantize", like)
        if backend == "reference" or like.dtype not in NARROW:
            first, last = begin // PANEL, -(-end // PANEL)
            part = [None if x is None else x[first:last] for x in packed]
            w = reference.dequantize(*part, bits=self.bits, group_size=self.group_size)
            return w[: end - begin, : self.shape[1]].to(like.dtype)
        return dequantize_fwd(backend, *packed, like, begin, end, *self.shape, self.bits, self.group_size)


def quantize_weight(weight, bits=8, group_size=None, *, symmetric=True):
    """`weight` [N, K] in 8 or 4 bits, as a `QuantizedWeight`.

    group_size numbers of a row share a scale: a multiple of 32 that divides K, or None, which is the whole row for 8
    bits and 64 (where it divides K, else 32, else the row) for 4. Symmetric: w = code * scale, the number of largest
    size in a group being exactly the lowest (or highest) code; otherwise w = code * scale + offset, from the smallest
    to the largest number of the group. Numbers are rounded to the nearest code with the scale as it is stored.
    torchao's weights are taken as they are, without torchao: what has `qdata` (integers [N, K], one a byte) and
    `scale`, and perhaps `zero_point`, is repacked, `bits` and `group_size` being its own.
    Raises TypeError for what is no fp32, bf16, fp16 or fp64 tensor, ValueError for sizes that do not fit.
    """
    if hasattr(weight, "qdata") and hasattr(weight, "scale"):
        return _from_torchao(weight)
    check_tensor("quantize_weight", "weight", weight)
    if weight.ndim != 2 or not weight.numel():
        raise ValueError(f"quantize_weight: weight must be [N, K], got {list(weight.shape)}")
    if bits not in (8, 4):
        raise ValueError(f"quantize_weight: bits must be 8 or 4, got {bits}")
    N, K = weight.shape
    if group_size is None:
        group_size = next((g for g in (64, 32) if bits == 4 and K % g == 0), K)
    elif group_size < 1 or K % group_size or (group_size % 32 and group_size != K):
        raise ValueError(f"quantize_weight: group_size must be a multiple of 32 that divides K={K}, got {group_size}")
    stored = torch.float32 if bits == 8 else torch.bfloat16
    top = 127 if bits == 8 else 7
    w = weight.detach().float().view(N, K // group_size, group_size)
    if symmetric:
        largest = w.gather(-1, w.abs().argmax(-1, keepdim=True))
        scale = (largest / (top if bits == 8 else -8)).to(stored).float()  # of 4 bits the lowest code is one more
        offset = None
    else:
        low, high = w.aminmax(dim=-1, keepdim=True)
        scale = ((high - low) / (2 * top + 1)).to(stored).float()
        offset = (low + (top + 1) * scale).to(stored).float()
    codes = (w if offset is None else w - offset) / torch.where(scale == 0, 1.0, scale)
    codes = codes.round().clamp(-top - (bits == 4 or not symmetric), top).to(torch.int8)
    offset = None if offset is None else offset.view(N, -1)
    return QuantizedWeight.from_codes(codes.view(N, K), scale.view(N, -1), offset, bits=bits)


def _from_torchao(weight):
    codes, scales, zeros = weight.qdata, weight.scale, getattr(weight, "zero_point", None)
    if codes.dtype not in (torch.int8, torch.uint8) or codes.shape != weight.shape or codes.ndim != 2:
        raise ValueError(
            "quantize_weight: of torchao's layouts only one code a byte, [N, K], is read;"
            f" got {codes.dtype} {list(codes.shape)} for a weight {list(weight.shape)}"
        )
    bits = 4 if "int4" in str(getattr(weight, "target_dtype", "")) else 8
    codes, scales = codes.to(torch.int16), scales.float().reshape(len(codes), -1)
    zeros = None if zeros is None or not zeros.any() else zeros.float().reshape(len(codes), -1)
    if codes.min() >= 0 and codes.max() > (127 if bits == 8 else 7):  # unsigned
        codes = codes - (128 if bits == 8 else 8)
        zeros = (0 if zeros is None else zeros) - float(128 if bits == 8 else 8)
    return QuantizedWeight.from_codes(codes, scales, None if zeros is None else -zeros * scales, bits=bits)


def weight_only_linear(x, weight, bias=None):
    """y = x w^T + bias, with w a `QuantizedWeight`, or a tensor [N, K] in fp32, bf16 or fp16, of any bits beside x's.

    x [..., K] in fp32, bf16 or fp16 (fp64 on plain PyTorch), under autocast brought to its dtype; bias [N] of any float
    dtype. Returns y [..., N] like x.
    Up to 16 rows of x, or 64 on a GPU, read every weight once; sums are in fp32. Where the CPU has VPDPBUSD, rows of x
    are split into planes of 8 bits, three for fp32 and two for bf16 and fp16, with a scale per 64 (or 32) numbers: an
    error of at most 2^-24 or 2^-16 of the largest of them, and exact products. A GPU multiplies weights rounded to x's
    dtype. More rows are a matrix product. On CPUs with vectors it unpacks weights where it would copy them, a block at
    a time, in fp32 and where 16-bit products are ours (`linear`); else it is one of PyTorch's with weights unpacked to
    x's dtype, 4 million at a time (64 million on a GPU).
    The gradients are those of x and bias. The backward pass keeps nothing but w, and reads it as the forward pass does:
    dx = dy w of up to 8 rows reads every weight once, with sums in fp32; of more, it is a product of the same kind.
    A w that requires a gradient is a plain linear layer, and so is one in x's dtype on a GPU.
    Raises TypeError for dtypes, ValueError for shapes that do not fit.
    Error: at most 1.1 times that of torch.nn.functional.linear on the dequantised weight in x's dtype
    (tests/test_weight_only.py).
    """
    op = "weight_only_linear"
    check_tensor(op, "x", x)
    (x,) = autocast(x)
    quantized = isinstance(weight, QuantizedWeight)
    if not quantized:
        check_tensor(op, "weight", weight)
    if len(weight.shape) != 2 or x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"{op}: x {list(x.shape)} and weight {list(weight.shape)} must be [..., K] and [N, K]")
    if bias is not None:
        check_tensor(op, "bias", bias)
        if bias.shape != (weight.shape[0],):
            raise ValueError(f"{op}: bias must be [{weight.shape[0]}], got {list(bias.shape)}")
    stored = (weight.codes if quantized else weight).device
    if stored != x.device or (bias is not None and bias.device != x.device):
        raise ValueError(f"{op}: weight and bias must be on {x.device} like x")
    # PyTorch's product on a GPU is ours, if it needs no other weight than there is.
    backend = choose(op, x, _lacks(x, weight), optional=not quantized and weight.dtype == x.dtype)
    M = x.numel() // max(x.shape[-1], 1)
    if backend == "reference" or (not quantized and wants_gradient(weight)):
        return _product(x, weight, bias)
    unpacked = M > FEW_ROWS[backend] and not (quantized and _is_own(x, weight, M))
    if wants_gradient(x, bias):
        return _WeightOnlyLinear.apply(x, bias, weight, backend, unpacked)
    return _product(x, weight, bias) if unpacked else _kernel(backend, x, weight, bias)


class _WeightOnlyLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, weight, backend, unpacked):
        ctx.weight, ctx.bias_dtype, ctx.unpacked = weight, None if bias is None else bias.dtype, unpacked
        return _product(x, weight, bias) if unpacked else _kernel(backend, x, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        flat = dy.reshape(-1, dy.shape[-1]).contiguous()
        dbias = None if ctx.bias_dtype is None else flat.sum(0).to(ctx.bias_dtype)
        dx = _gradient(flat, ctx.weight, ctx.unpacked) if ctx.needs_input_grad[0] else None
        dx = None if dx is None else dx.view(*dy.shape[:-1], ctx.weight.shape[1])
        return dx, dbias, None, None, None


def _gradient(dy, weight, unpacked):
    """dy [M, N] times w [N, K]."""
    packed = isinstance(weight, QuantizedWeight) and dy.is_cpu and quantized_linear_bwd and not torch.is_grad_enabled()
    if packed and not unpacked:
        return quantized_linear_bwd(
            dy, weight.codes, weight.scales, weight.offsets, weight.shape[1], weight.bits, weight.group_size
        )
    parts = [matmul(dy[:, begin:end], w) for begin, end, w in _in_chunks(weight, dy.detach())]
    return parts[0] if len(parts) == 1 else sum(part.float() for part in parts).to(dy.dtype)  # rounded once more


def _is_own(x, weight, M):
    """Whether the product of many rows is our kernel, which unpacks weights where it reads them: in fp32 PyTorch's
    would need them all in memory first."""
    N, K = weight.shape
    return x.is_cpu and (own_products(x.dtype, M, N, K)[0] or (x.dtype == torch.float32 and _has_vectors()))


@_tuned.assume_constant_result
def _has_vectors():
    return dispatch.extension is not None and dispatch.extension.selected() != "scalar"


def _kernel(backend, x, weight, bias):
    if isinstance(weight, QuantizedWeight):
        packed = weight.codes, weight.scales, weight.offsets, bias, weight.shape[0], weight.bits, weight.group_size
        return quantized_linear_fwd(backend, x.contiguous(), *packed)
    return weight_only_linear_fwd(backend, x.contiguous(), weight.contiguous(), bias)


def _product(x, weight, bias):
    """A matrix product with rows of the weight in x's dtype, some at a time."""
    bias = None if bias is None else bias.to(x.dtype)
    parts = [
        linear(x, w, None if bias is None else bias[begin:end]) for begin, end, w in _in_chunks(weight, x.detach())
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def _in_chunks(weight, like):
    """(begin, end, rows [begin, end) of the weight in the dtype of `like`), all in one where that is what it has."""
    N, K = weight.shape
    quantized = isinstance(weight, QuantizedWeight)
    few = like.numel() <= FEW_ROWS["cpu"] * like.shape[-1]
    most = _CHUNK["triton" if not like.is_cpu else "few rows" if few else "cpu"] // max(K, 1)
    chunk = max(PANEL, most // PANEL * PANEL) if quantized or weight.dtype != like.dtype else N
    for begin in range(0, N, chunk):
        end = min(begin + chunk, N)
        yield begin, end, weight._rows(begin, end, like) if quantized else weight[begin:end].to(like.dtype)


def _lacks(x, weight):
    """`unsupported` for dispatch.choose."""
    fp64 = torch.float64 in (x.dtype, getattr(weight, "dtype", None))
    plain = not isinstance(weight, QuantizedWeight) and weight.dtype == x.dtype

    def lacks(backend):
        if fp64:
            return "float64: what decoding wants is fewer bits"
        return "PyTorch's product is the kernel on a GPU" if plain and backend == "triton" else None

    return lacks
