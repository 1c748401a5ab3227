"""Timing that a stranger can believe: interleaved rounds in one process, paired ratios, and the noise beside them."""

import contextlib
import functools
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

from fastllm import dispatch, tune_allocator

COLD = 5  # calls of a sample at most, where each one finds the caches empty
UNKNOWN_CACHE = 64 << 20  # bytes, where the system does not say
LARGEST, ENOUGH_S = 2048, 0.05  # of the matrix products that are ceilings: size, and a call that is long enough
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
    """How many times faster ours is than the rival, from pairs of the same round.

    Whoever was too slow to take part in every round has fewer samples; they stand beside the other's median.
    """
    if len(rival) < len(ours):
        ours = [statistics.median(ours)] * len(rival)
    elif len(ours) < len(rival):
        rival = [statistics.median(rival)] * len(ours)
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


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


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


def seconds_of(function, block_s=0.02, patience_s=math.inf, synchronize=lambda: None) -> float:
    """Of a call, after a first one; the least of three, as one that was interrupted says nothing.

    One that fills a block is not repeated, and one that takes longer than patience_s not even after the first call:
    what only the first call does is nothing beside it.
    """
    least = _once(function, synchronize)
    if least <= patience_s:
        least = math.inf
        for _ in range(3):
            least = min(least, _once(function, synchronize))
            if least >= block_s:
                break
    return max(least, 1e-9)


def _once(function, synchronize=lambda: None) -> float:
    start = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - start


def calls_that_last(block_s: float, function, synchronize=lambda: None) -> int:
    """How many calls fill a block."""
    return max(1, round(block_s / seconds_of(function, block_s, synchronize=synchronize)))


@dataclass
class Turn:
    """One contender's part in the rounds."""

    calls: int  # of a sample
    rounds: float  # that it takes part in; infinity: in all

    @classmethod
    def of(cls, seconds: float, rounds: int, block_s: float, patience_s: float):
        short = seconds <= block_s or seconds * rounds <= patience_s
        return cls(max(1, round(block_s / seconds)), math.inf if short else int(patience_s / seconds))


def interleave(contenders, rounds, block_s=0.02, synchronize=lambda: None, evict=None, patience_s=math.inf):
    """Seconds per call of each contender, one sample per round: A B C, then C B A, and so on.

    A sample is a block of calls that lasts about block_s; with `evict`, a few calls, each of which finds the caches as
    evict() leaves them. Rounds in which other processes took more than BUSY of the machine are measured again, up to
    three times as many; if too few stay, all are used. A contender takes part in as many rounds as fit in patience_s;
    of one whose first call took longer, that call is the only sample. Returns the samples and the share of the machine
    that others took in each round.
    """
    seconds = {name: seconds_of(call, block_s, patience_s, synchronize) for name, call in contenders.items()}
    turns = {name: Turn.of(seconds[name], rounds, block_s, patience_s) for name in contenders}
    order = list(contenders)
    measured = []
    foreign = Foreign()
    with undisturbed():
        while sum(share <= BUSY for _, share in measured) < rounds and len(measured) < 3 * rounds:
            took = {}
            foreign.share()
            for name in order:
                function, turn = contenders[name], turns[name]
                if len(measured) >= turn.rounds:
                    continue
                if evict:
                    cold = [_cold(function, evict, synchronize) for _ in range(min(turn.calls, COLD))]
                    took[name] = statistics.median(cold)
                    continue
                if turn.calls > 1:
                    function()  # the previous contender's data leave the cache before the clock starts
                    synchronize()
                start = time.perf_counter()
                for _ in range(turn.calls):
                    function()
                synchronize()
                took[name] = (time.perf_counter() - start) / turn.calls
            measured.append((took, foreign.share()))
            order.reverse()
    quiet = [m for m in measured if m[1] <= BUSY]
    kept = quiet if len(quiet) >= max(3, rounds // 2) else measured

    def samples(name):
        of_all = math.isinf(turns[name].rounds)
        return [took[name] for took, _ in (kept if of_all else measured) if name in took] or [seconds[name]]

    return {name: samples(name) for name in contenders}, [share for _, share in kept]


def _cold(function, evict, synchronize) -> float:
    evict()
    synchronize()
    return _once(function, synchronize)


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
    """What this machine can do, measured now: bandwidth of memory, rates of matrix products and of multiply-adds.

    The last are the hardware's own, in registers alone (csrc/cpu/peak.inl); a product may be far below them.
    """
    found = {
        f"{name}_gb_per_s": (256 << 20) / _best(call(256 << 20, device), seconds) / 1e9
        for name, call in (("copy", copy_of), ("read", read_of))
    }
    before = torch.get_float32_matmul_precision()
    try:
        for dtype, precision in ((torch.float32, "highest"), (torch.float32, "medium"), (torch.bfloat16, before)):
            torch.set_float32_matmul_precision(precision)
            name = "mm_bfloat16" if dtype == torch.bfloat16 else f"mm_float32_{precision}"
            found[f"{name}_gflop_per_s"] = product_rate(dtype, device, seconds) / 1e9
    finally:
        torch.set_float32_matmul_precision(before)
    if device == "cpu" and dispatch.extension:
        for bf16, dtype in ((False, "float32"), (True, "bfloat16")):
            call = functools.partial(dispatch.extension.multiply_adds, 200_000, bf16)
            found[f"fma_{dtype}_gflop_per_s"] = call() / _best(call, seconds) / 1e9
    return found


def product_rate(dtype, device="cpu", seconds=0.3) -> float:
    """Operations a second of PyTorch's matrix product, in the faster of both layouts of a weight.

    The size grows until a call takes ENOUGH_S: where PyTorch has no kernel for a dtype, one of 2048^3 takes a minute.
    """
    n = 256
    while True:
        x, weight = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        calls = [functools.partial(torch.mm, x, y) for y in (weight, weight.T)]
        took = [_best(call, 0.0) for call in calls]
        if n == LARGEST or max(took) > ENOUGH_S:
            faster = took.index(min(took))
            return 2.0 * n**3 / min(took[faster], _best(calls[faster], seconds))
        n *= 2


def peak_gflop_per_s(found: dict, dtype) -> float:
    """The highest measured rate of a dtype. From a matrix product it is a lower bound of what the hardware can do.

    A rate of fp32 is one of 16-bit numbers too, which can be widened and rounded.
    """
    low = dtype in (torch.bfloat16, torch.float16)
    named = ("float32", "bfloat16") if low else ("float32",)
    return max((rate for name, rate in found.items() if any(f"_{one}_" in name for one in named)), default=0.0)


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
