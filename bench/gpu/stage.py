"""The stages check, tune and accept: which steps they are made of, and how those are run."""

import functools
import os
import re
import sys
import time
import traceback

import torch

from fastllm.bench import bars, tune
from fastllm.bench.gpu import checks, timed
from fastllm.bench.gpu.machine import STICKY, Machine

POISONED = 3  # exit status: another process is to go on


class Stage:
    """One run of one stage; its steps are functions of it that log what they find."""

    def __init__(self, options, log):
        self.options, self.log = options, log
        self.machine = Machine(options.device)

    def left(self) -> float:
        return self.options.deadline - time.time()

    def steps(self):
        """(name, seconds that it should have, seconds after which it hangs, function)."""
        for name, seconds, limit, step, *given in self.named_steps():
            if re.search(self.options.only, name):
                yield name, seconds, limit, functools.partial(step, self, *given)

    def named_steps(self):
        """What says most in the least time first: a run may end at any step."""
        yield "environment", 0, 30, timed.environment
        if self.options.stage == "tune":
            yield "ceilings", 5, 60, timed.ceilings
            for tunable in tune.tunables():
                for case, passes in tunable.cases:
                    yield f"tune {tunable.name} {case} {passes}", 10, 120, timed.tune_launches, tunable, case, passes
            return
        yield "look", 30, 180, checks.look_at_ops
        if self.options.stage == "check":
            yield "sanitizer", 30, 150, checks.sanitize
            yield "tests", 30, 300, checks.run_tests
        yield "ceilings", 5, 60, timed.ceilings
        yield "compile", 30, 150, checks.compile_kernels
        for bar in in_turn(bars.BARS):
            yield f"bar {bar.name}", 5, 60, timed.time_bar, bar
        yield "training step", 20, 180, timed.time_training

    def run(self):
        begun = self.log.begun()
        for name, seconds, limit, step in self.steps():
            if name in begun:
                continue
            if self.left() < seconds:
                self.log.add(name, kind="skipped", reason=f"{self.left():.0f} s left, {seconds} wanted")
                continue
            self.log.add(name, kind="start", limit=limit)
            print(f"{self.left():6.0f} s left  {name}", file=sys.stderr, flush=True)
            start = time.time()
            try:
                step()
            except Exception as error:  # whatever it is, the other steps are still worth having
                trace = "".join(traceback.format_exception(error)[-3:])
                self.log.add(name, kind="error", error=f"{type(error).__name__}: {error}"[:2000], trace=trace[-2000:])
                if self.machine.cuda and STICKY.search(str(error)):
                    os._exit(POISONED)  # at once: what would be cleaned up is in the context that is lost
            self.log.add(name, kind="end", seconds=round(time.time() - start, 2))
            if self.machine.cuda:
                torch.cuda.empty_cache()


def in_turn(found):
    """The first bar of each op and pass, then the second of each, and so on."""
    seen: dict[tuple, int] = {}
    turns = []
    for bar in found:
        key = bar.case.op, bar.passes
        seen[key] = seen.get(key, 0) + 1
        turns.append(seen[key])
    return [bar for _, bar in sorted(zip(turns, found, strict=True), key=lambda pair: pair[0])]
