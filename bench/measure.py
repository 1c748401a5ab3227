"""One row of the bench: a case in one dtype and pass, ours beside its rivals.

Correctness first: a wrong result is never timed. Then every contender runs in turn, round after round, in one process
(bench/timing.py); ours runs twice in each round, which is the noise. A difference below it is called a tie.

A rival may be thousands of times slower, where PyTorch has no kernel for a dtype. `--patience` bounds what it costs: it
takes part in fewer rounds, or its first call is its only sample; one that a part of the input keeps busy as long has a
lower bound of its time (`at_least`).
"""

import math
import time
from dataclasses import dataclass

import torch

from fastllm import verify
from fastllm.bench import memory, rivals, timing

SETS = 2  # of inputs, which calls take in turn, so that no result hangs on the values or the place of one of them
SETS_BYTES = 128 << 20  # larger ones are not held twice
FORESEEN = 4  # times the patience: a rival that would take longer, going by a part of the input, is not called on all
READ_SHARE = 0.75  # what reads more of its traffic than this is held to the bandwidth of reading, not of copying


def contender(function, inputs, passes):
    """A call of one pass of `function`; outputs and gradients are allocated by the call, on every side, but by a
    function that is `steady`, which works in place."""
    if hasattr(function, "steady"):
        return function.steady(*inputs)
    if passes == "forward":

        def call():
            with torch.no_grad():
                return function(*inputs)

        return call

    leaves = [x.detach().requires_grad_() for x in inputs]

    def outputs():
        made = function(*leaves)
        return list(made) if isinstance(made, (tuple, list)) else [made]

    kept = outputs()
    grads = [torch.randn_like(y) for y in kept]
    if passes == "both":
        del kept
        return lambda: torch.autograd.grad(outputs(), leaves, grads)
    return lambda: torch.autograd.grad(kept, leaves, grads, retain_graph=True)


@dataclass(frozen=True)
class Slow:
    """A rival's forward call that took longer than the patience."""

    seconds: float
    whole: bool  # or on a part of the input, as the whole would take several times the patience


class Measured:
    """A case in one dtype: checked at once, then timed pass by pass."""

    def __init__(self, case, dtype, options, ceilings):
        self.case, self.dtype, self.options, self.ceilings = case, dtype, options, ceilings
        self.device = options.device
        self.rivals = rivals.chosen(options.rivals, self.device)
        self.slow = {}  # name -> Slow
        self.wait = torch.cuda.synchronize if self.device.startswith("cuda") else lambda: None

    def rows(self, wanted) -> list[dict]:
        """A row for each (pass, cache) that is wanted; one that says what is wrong, if something is."""
        seen = verify.examine(self.case, self.dtype, self.device, patience_s=self.options.patience)
        bad = [
            f"{row.result}: {row.accuracy.problem}" for row in seen.rows if row.accuracy.problem and not row.fallback
        ]
        about = {
            "op": self.case.op,
            "case": self.case.name,
            "dtype": str(self.dtype).removeprefix("torch."),
            "kernel": seen.rows[0].kernel,
            "fallback": seen.rows[0].fallback,
            "wrong": "; ".join(bad),
            "slow": seen.slow,
        }
        wanted = [(passes, cache) for passes, cache in wanted if passes in self.case.flops]
        if bad or seen.slow:
            return [about | {"pass": passes, "cache": cache} for passes, cache in wanted]
        functions, missing = rivals.found(self.rivals, self.case, self.dtype, self.device)
        errors = {"ours": max(row.accuracy.norm for row in seen.rows)}
        for name, function in functions.items():
            try:
                error = self.look(name, function, seen)
            except Exception as problem:  # as above
                missing[name] = rivals.reason(problem)
                continue
            if self.case.peer is None or name == "naive":  # the others draw other random numbers
                errors[name] = error
        del seen  # the fp64 truth is large
        functions = {name: function for name, function in functions.items() if name not in missing}
        return [about | self.row(*one, functions, missing) | {"errors": errors} for one in wanted]

    def timed(self, function, *inputs):
        """What a forward call returns, and its seconds."""
        self.wait()
        start = time.perf_counter()
        with torch.no_grad():
            made = function(*inputs)
        self.wait()
        return list(made) if isinstance(made, (tuple, list)) else [made], time.perf_counter() - start

    def look(self, name, function, seen) -> float:
        """A rival's error; of its outputs alone, on the part that the truth is of, where it is too slow for more."""
        rival, part, patience = rivals.RIVALS[name], seen.part(), self.options.patience
        times = math.prod(seen.inputs[0].shape) / math.prod(part[0].shape)
        if rival.slow_to_start:  # whatever its size, it is made for one
            function(*seen.inputs)
            part, times = seen.inputs, 1.0
        outputs, seconds = self.timed(function, *part)
        if seconds <= patience and 1 < times <= FORESEEN * patience / seconds:
            part, times = seen.inputs, 1.0
            outputs, seconds = self.timed(function, *part)
        if seconds > patience or times > 1:
            self.slow[name] = Slow(seconds, whole=times == 1)
            return seen.error_in([self.case.part(y) if part is seen.inputs else y for y in outputs])
        return seen.error_of(function, rival.backward)

    def row(self, passes, cache, functions, missing) -> dict:
        case, moved = self.case, self.case.bytes(passes, self.dtype)
        sets = SETS if moved <= SETS_BYTES else 1
        inputs = [case.inputs(self.dtype, self.device, seed) for seed in range(sets)]
        missing = dict(missing)

        def made(function):
            return timing.in_turn([contender(function, one, passes) for one in inputs])

        found, samples, at_least, lengthy = {}, {}, set(), set()
        for name, function in functions.items():
            slow = self.slow.get(name)
            if passes != "forward" and not rivals.RIVALS[name].backward:
                missing[name] = "has no backward pass"
            elif slow and passes == "backward":
                missing[name] = f"not timed: a forward call takes longer than --patience {self.options.patience:g} s"
            elif slow:  # forward and backward take at least as long as forward
                samples[name] = [slow.seconds]
                at_least |= set() if slow.whole and passes == "forward" else {name}
            else:
                try:
                    found[name] = made(function)
                    start = time.perf_counter()
                    found[name]()
                    self.wait()
                    lengthy |= {name} if time.perf_counter() - start > self.options.patience / 8 else set()
                except Exception as problem:  # a rival may fail in any way; it is then a missing column that says why
                    found.pop(name, None)
                    missing[name] = rivals.reason(problem)
        ours = made(case.ours)
        peaks = {}
        if not memory.why_not(self.device):
            for name, call in {"ours": ours, **found}.items():
                peaks[name] = memory.peak(call, self.device, 1 if name in lengthy else memory.TRIES)
        reading = case.written(passes, self.dtype) < 1 - READ_SHARE
        floor = (timing.read_of if reading else timing.copy_of)(moved, self.device, sets)
        contenders = {"ours": ours, **found, "ours again": made(case.ours), "floor": floor}
        evict = timing.evictor(self.device) if cache == "cold" else None
        options = self.options
        timed, foreign = timing.interleave(
            contenders, options.rounds, options.block_ms / 1e3, self.wait, evict, options.patience
        )
        yardstick = "read" if reading else "copy"
        return {"pass": passes, "cache": cache, "sets": sets, "missing": missing, "memory_bytes": peaks} | self.figures(
            passes, moved, yardstick, timed | samples, foreign, at_least
        )

    def figures(self, passes, moved, yardstick, samples, foreign, at_least=()) -> dict:
        """What the samples say."""
        ours = timing.Spread.of(samples["ours"])
        flops = self.case.flops[passes]
        peak = timing.peak_gflop_per_s(self.ceilings, self.dtype)
        by_memory = timing.Spread.of(samples["floor"]).median
        by_arithmetic = flops / peak / 1e9 if peak else 0.0
        floor = max(by_memory, by_arithmetic)
        strays = timing.noise(samples["ours"], samples["ours again"])
        versus = {}
        for name in samples.keys() - {"ours", "ours again", "floor"}:
            ratio = timing.ratios(samples[name], samples["ours"])
            bound = name in at_least
            tie = not bound and timing.is_tie(ratio, strays)
            versus[name] = {**vars(ratio), "tie": tie, "n": len(samples[name]), "at_least": bound}
        return {
            "ms": {"p20": ours.p20 * 1e3, "median": ours.median * 1e3, "p80": ours.p80 * 1e3},
            "gb_per_s": moved / ours.median / 1e9,
            "gflop_per_s": flops / ours.median / 1e9,
            "bytes": moved,
            "flops": flops,
            "floor_ms": floor * 1e3,
            "bound_by": yardstick if by_memory >= by_arithmetic else "arithmetic",
            "share_of_floor": floor / ours.median,
            "noise": strays,
            "ratio": {name: versus[name] for name in rivals.RIVALS if name in versus},
            "foreign": foreign,
            "samples_s": samples,
        }


def seconds(case, dtype, wanted, options, ceilings) -> float:
    """About how long `rows` takes: a guess that only the progress line uses."""
    block, patience, copy = options.block_ms / 1e3, options.patience, ceilings["copy_gb_per_s"] * 1e9
    peak = timing.peak_gflop_per_s(ceilings, dtype) * 1e9 or 5e10
    low = dtype in (torch.bfloat16, torch.float16)
    products = ceilings.get("mm_bfloat16_gflop_per_s", peak / 1e9) * 1e9 if low else peak
    taking = [rival for rival in rivals.chosen(options.rivals, options.device) if rival.takes(case, options.device)]
    plain = sum(rival.name in ("naive", "sdpa-math") for rival in taking)

    def rounds_of(once):
        """Of all calls of one contender in one pass, those that warm up and measure memory too."""
        return min((options.rounds + 6) * max(block, once), max(block * options.rounds, patience) + 4 * once)

    total = 0.3 + sum(15.0 for rival in taking if rival.slow_to_start)
    total += 8 * max(case.flops["forward"] / peak, case.bytes("forward", dtype) / copy)  # the truth and the check
    for passes, cache in wanted:
        if passes in case.flops:
            moving = 1.5 * case.bytes(passes, dtype) / copy + (0.02 if cache == "cold" else 0.0)
            ours, theirs = (max(2 * case.flops[passes] / rate, moving) for rate in (peak, products))
            total += (3 + len(taking) - plain) * rounds_of(ours)
            if theirs <= patience:
                total += plain * rounds_of(theirs)
            elif passes == "forward":
                total += plain * min(theirs, FORESEEN * patience)
    return total
