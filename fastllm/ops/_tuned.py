"""Where a kernel of ours beats PyTorch's: measured per CPU by `fastllm bench linear --tune`, committed as tuned.json.

An entry is keyed by what decides the speed: the CPU's vendor, family and model, the instruction set that our kernels
use, and the number of threads. What nobody measured gets PyTorch's kernel; but products in bf16 and fp16 get ours on
CPUs where oneDNN has none, and PyTorch is left with plain loops (bench/NOTES.md has what was measured).
"""

import functools
import itertools
import json
import math
import re
from pathlib import Path

import torch

from fastllm import dispatch

PATH = Path(__file__).with_name("tuned.json")
PASSES = ("forward", "dx", "dweight")
MARGIN = 1.02  # of a ratio: what is closer to 1 is PyTorch's, so that noise in the table costs nobody anything


@functools.cache
def cpu() -> str:
    """Vendor, family and model as CPUID gives them, or "" where the system does not say."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
    found = [re.search(rf"^{name}\s*:\s*(.+)$", text, re.MULTILINE) for name in ("vendor_id", "cpu family", "model")]
    return "{} family {} model {}".format(*(m[1].strip() for m in found)) if all(found) else ""


TABLE = json.loads(PATH.read_text())


def assume_constant_result(function):
    """torch.compiler's, which would import torch._dynamo: that takes as long as all of PyTorch."""
    function._dynamo_marked_constant = True
    return function


@assume_constant_result  # a compiled model keeps what held when it was traced
def key() -> str:
    """The entry in use; bf16 instructions change nothing in fp32."""
    isa = dispatch.extension.selected().removesuffix("_bf16") if dispatch.extension else "no extension"
    return f"{cpu()}, {isa}, {torch.get_num_threads()} threads"


def entry_of(key: str) -> str | None:
    """The table's entry that decides for `key`: its own, or on Zen 5, until somebody measures there, Zen 4's. PyTorch's
    BLAS (MKL) keeps to AVX2 on both, and only our kernel gains by vectors that are twice as wide: MKL was measured at
    35 to 40% of that CPU's peak (family 26 model 2). None: nobody has measured."""
    if key in TABLE:
        return key
    zen5 = re.fullmatch(r"AuthenticAMD family 26 model \d+, avx512, (\d+) threads", key)
    alike = zen5 and int(zen5[1]) <= 16 and torch.backends.mkl.is_available()
    return next((k for k in TABLE if alike and k.startswith("AuthenticAMD family 25 model 17, avx512")), None)


def _measured(key, dtype):
    return TABLE.get(entry_of(key), {}).get(linear_entry(dtype))


def points(key: str, dtype=torch.float32) -> list[tuple[int, int, int]]:
    """The sizes (M, N, K) of linear that were measured for an entry."""
    return list(itertools.product(*TABLE[key][linear_entry(dtype)]["grid"].values()))


def linear_entry(dtype) -> str:
    """What an entry calls the measurements of linear in a dtype."""
    return "linear" if dtype == torch.float32 else f"linear {str(dtype).removeprefix('torch.')}"


def linear_kernels(M: int, N: int, K: int, dtype=torch.float32) -> tuple[bool, bool, bool]:
    """For y [M, N] = x [M, K] W^T: whether our kernel does the forward pass, dx, dweight."""
    look_up = _linear_kernels if torch.compiler.is_compiling() else _remembered  # sizes may be symbols in a compiler
    return look_up(key(), dtype, M, N, K)


def fewest_rows(dtype=torch.float32) -> float:
    """With fewer rows of x than these our linear kernel is never chosen."""
    return _fewest_rows(key(), dtype)


@functools.cache
def onednn_multiplies(dtype) -> bool:
    """Whether PyTorch has a product of matrices in bf16 or fp16 on this CPU that is more than a loop."""
    short = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{short}_supported", None)
    return supported is None or supported()


@assume_constant_result
def unmeasured(dtype) -> bool:
    """Whether our product is the choice where nobody has measured: bf16 and fp16 without oneDNN, on vectors."""
    vectors = dispatch.extension is not None and dispatch.extension.selected() != "scalar"
    return vectors and dtype in (torch.bfloat16, torch.float16) and not onednn_multiplies(dtype)


def _always_own() -> int:
    """The 16-bit types in which our product is the choice for every size, as bits: 1 for bf16, 2 for fp16."""
    measured = {name for entry in TABLE.values() for name in entry}
    types = (torch.bfloat16, 1), (torch.float16, 2)
    return sum(bit for dtype, bit in types if unmeasured(dtype) and linear_entry(dtype) not in measured)


ALWAYS_OWN = _always_own()


@functools.cache
def _fewest_rows(key, dtype):
    if unmeasured(dtype):
        return 0
    measured = _measured(key, dtype)
    return measured["grid"]["M"][0] if measured else math.inf


def _linear_kernels(key, dtype, M, N, K):
    measured = _measured(key, dtype)
    corners = measured and _corners(measured["grid"], (M, N, K))
    if not corners:
        return (unmeasured(dtype),) * 3
    return tuple([all([measured[name][m][n][k] >= MARGIN for m, n, k in corners]) for name in PASSES])


_remembered = functools.lru_cache(4096)(_linear_kernels)


def forget() -> None:
    """What was looked up in the table: to be called where the table, the CPU or the instruction set is another one."""
    _remembered.cache_clear()
    _fewest_rows.cache_clear()
    dispatch.direct("choose")(_bits)


def _bits(M, N, K):
    """linear_kernels in fp32, as csrc/products.h has them."""
    return sum(own << i for i, own in enumerate(linear_kernels(M, N, K)))


forget()


def _corners(grid, sizes):
    """The measured points around `sizes`: ours must win at all of them. None below the grid; past it, its last."""
    around = []
    for points, size in zip(grid.values(), sizes, strict=True):
        if size < points[0]:
            return None
        at = sum(size >= point for point in points) - 1
        exact = at == len(points) - 1 or size == points[at]
        around.append((at,) if exact else (at, at + 1))
    return [(m, n, k) for m in around[0] for n in around[1] for k in around[2]]
