"""One row of the bench: a case in one dtype and pass, ours beside its rivals.

Correctness first: a wrong result is never timed. Then every contender runs in turn, round after round, in one process
(bench/timing.py); ours runs twice in each round, which is the noise. A difference below it is called a tie.
"""

import torch

from fastllm import verify
from fastllm.bench import memory, rivals, timing

SETS = 2  # of inputs, which calls take in turn, so that no result hangs on the values or the place of one of them
SETS_BYTES = 128 << 20  # larger ones are not held twice
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


class Measured:
    """A case in one dtype: checked at once, then timed pass by pass."""

    def __init__(self, case, dtype, options, ceilings):
        self.case, self.dtype, self.options, self.ceilings = case, dtype, options, ceilings
        self.device = options.device
        self.rivals = rivals.chosen(options.rivals, self.device)

    def rows(self, wanted) -> list[dict]:
        """A row for each (pass, cache) that is wanted; one that says what is wrong, if something is."""
        seen = verify.examine(self.case, self.dtype, self.device)
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
        }
        wanted = [(passes, cache) for passes, cache in wanted if passes in self.case.flops]
        if bad:
            return [about | {"pass": passes, "cache": cache} for passes, cache in wanted]
        functions, missing = rivals.found(self.rivals, self.case, self.dtype, self.device)
        errors = {"ours": max(row.accuracy.norm for row in seen.rows)}
        for name, function in functions.items():
            if self.case.peer is not None and name != "naive":
                continue  # it draws other random numbers
            try:
                errors[name] = seen.error_of(function, rivals.RIVALS[name].backward)
            except Exception as problem:  # as above
                missing[name] = rivals.reason(problem)
        del seen  # the fp64 truth is large
        functions = {name: function for name, function in functions.items() if name not in missing}
        return [about | self.row(*one, functions, missing) | {"errors": errors} for one in wanted]

    def row(self, passes, cache, functions, missing) -> dict:
        case, moved = self.case, self.case.bytes(passes, self.dtype)
        sets = SETS if moved <= SETS_BYTES else 1
        inputs = [case.inputs(self.dtype, self.device, seed) for seed in range(sets)]
        missing = dict(missing)

        def made(function):
            return timing.in_turn([contender(function, one, passes) for one in inputs])

        found = {}
        for name, function in functions.items():
            if passes != "forward" and not rivals.RIVALS[name].backward:
                missing[name] = "has no backward pass"
                continue
            try:
                found[name] = made(function)
                found[name]()
            except Exception as problem:  # a rival may fail in any way; it is then a missing column that says why
                found.pop(name, None)
                missing[name] = rivals.reason(problem)
        ours = made(case.ours)
        no_memory = memory.why_not(self.device)
        peaks = {} if no_memory else {n: memory.peak(f, self.device) for n, f in {"ours": ours, **found}.items()}
        reading = case.written(passes, self.dtype) < 1 - READ_SHARE
        floor = (timing.read_of if reading else timing.copy_of)(moved, self.device, sets)
        contenders = {"ours": ours, **found, "ours again": made(case.ours), "floor": floor}
        wait = torch.cuda.synchronize if self.device.startswith("cuda") else lambda: None
        evict = timing.evictor(self.device) if cache == "cold" else None
        samples, foreign = timing.interleave(contenders, self.options.rounds, self.options.block_ms / 1e3, wait, evict)
        return {"pass": passes, "cache": cache, "sets": sets, "missing": missing, "memory_bytes": peaks} | self.figures(
            passes, moved, "read" if reading else "copy", samples, foreign
        )

    def figures(self, passes, moved, yardstick, samples, foreign) -> dict:
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
            versus[name] = {**vars(ratio), "tie": timing.is_tie(ratio, strays)}
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
            "ratio": {name: versus[name] for name in samples if name in versus},
            "foreign": foreign,
            "samples_s": samples,
        }


def seconds(case, dtype, wanted, options, ceilings) -> float:
    """About how long `rows` takes: a guess that only the progress line uses."""
    count = 4 + 2 * len([rival for rival in options.rivals if rival in rivals.RIVALS]) or 8
    peak = timing.peak_gflop_per_s(ceilings, dtype) or 50.0
    total = 0.5
    for passes, cache in wanted:
        if passes in case.flops:
            once = max(case.flops[passes] / peak, case.bytes(passes, dtype) / ceilings["copy_gb_per_s"]) / 1e9
            each = max(options.block_ms / 1e3 if cache == "warm" else 5 * 0.02, 6 * once)
            total += (options.rounds + 3) * count * each + 40 * once
    return total
