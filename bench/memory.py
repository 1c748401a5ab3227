"""Peak memory of one call: what it needs beyond its inputs, its outputs and gradients included.

On a GPU PyTorch's allocator counts. On a CPU the operating system does, so that memory which no allocator of PyTorch
knows of, scratch of C++ code for example, is in the figure: the highest resident size during the call less the one
before it, after free memory went back to the system. It counts whole pages.
"""

import ctypes
import gc
import re
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
TRIES = 3  # calls, unless they are slow; the least counts: a page that something else touched is not the call's


def why_not(device="cpu") -> str | None:
    """Why peak memory cannot be measured here, or None."""
    if device.startswith("cuda"):
        return None
    try:
        forget_peak()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError) as problem:
        return f"this system does not say how much memory a call takes ({type(problem).__name__}: {problem})"
    return None


def peak(call, device="cpu", tries=TRIES) -> int:
    """Bytes."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    gc.collect()
    return max(0, min(_grown(call) for _ in range(tries)))


def _grown(call) -> int:
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    forget_peak()
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


def forget_peak():
    """The highest resident size starts anew."""
    CLEAR.write_text("5")


def resident(name: str) -> int:
    """Bytes: "VmRSS" is what is resident now, "VmHWM" the most that was."""
    return int(re.search(rf"^{name}:\s+(\d+) kB", STATUS.read_text(), re.MULTILINE)[1]) << 10
