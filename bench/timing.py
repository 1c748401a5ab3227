"""Timing that a stranger can believe: interleaved rounds in one process, paired ratios, and the noise beside them."""

import contextlib
import gc
import itertools
import math
import os
import re
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from fastllm import tune_allocator

COLD = 5  # calls of a sample at most, where each one finds the caches empty
UNKNOWN_CACHE = 64 << 20  # bytes, where the system does not say
BUSY = 0.12  # of the machine; a round in which others take more is measured again (research: ratios drift beyond it)


@dataclass(frozen=True)
class Spread:
    """The median and the 20th and 80th percentile of some samples."""

    p20: float
    median: float
    p80: float

    @classmethod
    def of(cls, samples):
        ordered = sorted(samples)
        return cls(quantile(ordered, 0.2), statistics.median(ordered), quantile(ordered, 0.8))


def quantile(ordered, q: float) -> float:
    """Linear interpolation between the two nearest of some sorted samples."""
    at = q * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def ratios(rival: list[float], ours: list[float]) -> Spread:
    """How many times faster ours is than the rival, from pairs of the same round."""
    return Spread.of([r / o for r, o in zip(rival, ours, strict=True)])


def noise(once: list[float], again: list[float]) -> float:
    """How far from 1 the same callable against itself strays: the smallest difference that means anything."""
    spread = ratios(again, once)
    return max(abs(math.log(x)) for x in (spread.p20, spread.median, spread.p80))


def is_tie(ratio: Spread, noise: float) -> bool:
    """A median within the noise, or a spread that holds 1, is no difference."""
    return abs(math.log(ratio.median)) <= noise or ratio.p20 <= 1.0 <= ratio.p80


@contextlib.contextmanager
def undisturbed():
    """No garbage collection inside."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Foreign:
    """The share of the machine's time that other processes took since the last look; 0 where it cannot be known."""

    def __init__(self):
        self.last = self._now()

    @staticmethod
    def _now():
        try:
            with open("/proc/stat") as file:
                ticks = [int(n) for n in file.readline().split()[1:]]
        except OSError:
            return None
        used = os.times()
        hertz = os.sysconf("SC_CLK_TCK")
        return sum(ticks[:8]), sum(ticks[:3]) + sum(ticks[5:8]), (used.user + used.system) * hertz

    def share(self) -> float:
        before, self.last = self.last, self._now()
        if before is None or self.last is None:
            return 0.0
        total, busy, own = (b - a for a, b in zip(before, self.last, strict=True))
        return max(0.0, (busy - own) / total) if total else 0.0


def calls_that_last(block_s: float, function, synchronize=lambda: None) -> int:
    """Warm up, and see how many calls fill a block; the least of three, as one that was interrupted says nothing."""
    function()
    synchronize()
    least = math.inf
    for _ in range(3):
        start = time.perf_counter()
        function()
        synchronize()
        least = min(least, max(time.perf_counter() - start, 1e-9))
        if least >= block_s:
            break
    return max(1, round(block_s / least))


def interleave(contenders, rounds: int, block_s: float = 0.02, synchronize=lambda: None, evict=None):
    """Seconds per call of each contender, one sample per round: A B C, then C B A, and so on.

    A sample is a block of calls that lasts about block_s; with `evict`, a few calls, each of which finds the caches as
    evict() leaves them. Rounds in which other processes took more than BUSY of the machine are measured again, up to
    three times as many; if too few stay, all are used. Returns the samples and the share of the machine that others
    took in each round.
    """
    calls = {name: calls_that_last(block_s, function, synchronize) for name, function in contenders.items()}
    order = list(contenders)
    measured = []
    foreign = Foreign()
    with undisturbed():
        while sum(share <= BUSY for _, share in measured) < rounds and len(measured) < 3 * rounds:
            took = {}
            foreign.share()
            for name in order:
                function, n = contenders[name], calls[name]
                if evict:
                    took[name] = statistics.median(_cold(function, evict, synchronize) for _ in range(min(n, COLD)))
                    continue
                if n > 1:
                    function()  # the previous contender's data leave the cache before the clock starts
                    synchronize()
                start = time.perf_counter()
                for _ in range(n):
                    function()
                synchronize()
                took[name] = (time.perf_counter() - start) / n
            measured.append((took, foreign.share()))
            order.reverse()
    quiet = [m for m in measured if m[1] <= BUSY]
    kept = quiet if len(quiet) >= max(3, rounds // 2) else measured
    return {name: [took[name] for took, _ in kept] for name in contenders}, [share for _, share in kept]


def _cold(function, evict, synchronize) -> float:
    evict()
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - start


def evictor(device="cpu"):
    """A call that leaves nothing in the caches but its own memory, twice their size."""
    memory = torch.ones(2 * last_level_cache(device) // 4, device=device)
    return lambda: memory.add_(1.0)


def last_level_cache(device="cpu") -> int:
    """Bytes of the largest cache."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_properties(device).L2_cache_size
    found = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        if size := re.fullmatch(r"(\d+)([KM])", path.read_text().strip()):
            found.append(int(size[1]) << {"K": 10, "M": 20}[size[2]])
    return max(found, default=UNKNOWN_CACHE)


def in_turn(calls):
    """A call that makes the next of the calls."""
    turn = itertools.cycle(calls)
    return lambda: next(turn)()


def copy_of(moved: int, device="cpu", sets=1):
    """A call that copies, so that `moved` bytes are read and written in all: what the memory allows at this size."""

    def one():
        source = torch.ones(max(1, moved // 8), dtype=torch.float32, device=device)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    return in_turn([one() for _ in range(sets)])


def read_of(moved: int, device="cpu", sets=1):
    """A call that reads `moved` bytes and writes next to nothing."""
    return in_turn([torch.ones(max(1, moved // 4), device=device).sum for _ in range(sets)])


def ceilings(device="cpu", seconds=0.3) -> dict:
    """What this machine can do, measured now: bandwidth of memory, rates of matrix products and of plain FMA."""
    from fastllm import dispatch

    found = {
        f"{name}_gb_per_s": (256 << 20) / _best(call(256 << 20, device), seconds) / 1e9
        for name, call in (("copy", copy_of), ("read", read_of))
    }
    before = torch.get_float32_matmul_precision()
    n = 2048
    try:
        for dtype, precision in ((torch.float32, "highest"), (torch.float32, "medium"), (torch.bfloat16, before)):
            torch.set_float32_matmul_precision(precision)
            a, b = (torch.randn(n, n, device=device).to(dtype) for _ in "ab")
            name = "mm_bfloat16" if dtype == torch.bfloat16 else f"mm_float32_{precision}"
            found[f"{name}_gflop_per_s"] = 2.0 * n**3 / _best(lambda a=a, b=b: torch.mm(a, b), seconds) / 1e9
    finally:
        torch.set_float32_matmul_precision(before)
    peak = getattr(dispatch.extension, "peak", None) if device == "cpu" else None
    if peak:
        found |= {"fma_float32_gflop_per_s": peak("fp32"), "fma_bfloat16_gflop_per_s": peak("bf16")}
    return found


def peak_gflop_per_s(found: dict, dtype) -> float:
    """The highest measured rate of a dtype. From a matrix product it is a lower bound of what the hardware can do."""
    low = dtype in (torch.bfloat16, torch.float16)
    return max((rate for name, rate in found.items() if ("bfloat16" if low else "float32") in name), default=0.0)


def _best(function, seconds) -> float:
    """The least time of a call: a ceiling is what is possible, so others' interference is left out."""
    function()
    best, stop = math.inf, time.perf_counter() + seconds
    while best is math.inf or time.perf_counter() < stop:
        start = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def tune() -> list[str]:
    """The documented knobs that make stock PyTorch faster, for the whole process; says which were turned.

    oneDNN instead of the BLAS for fp32 products (on a CPU with bf16 matrix units that is no longer true fp32), and a
    glibc that keeps large blocks, so that an output of 32 MB and more does not cost a page fault per 4 KB.
    """
    torch.set_float32_matmul_precision("medium")
    return ['torch.set_float32_matmul_precision("medium")', *tune_allocator()]
