"""The stages check, tune and accept: which steps they are made of, and how those are run."""

import functools
import os
import sys
import time
import traceback

import torch

from fastllm.bench import bars, tune
from fastllm.bench.gpu import checks, timed
from fastllm.bench.gpu.machine import STICKY, Machine


class Stage:
    """One run of one stage; its steps are functions of it that log what they find."""

    def __init__(self, options, log):
        self.options, self.log = options, log
        self.machine = Machine(options.device)

    def left(self) -> float:
        return self.options.deadline - time.time()

    def steps(self):
        """(name, seconds that it should have, function)."""
        for name, seconds, step, *given in self.named_steps():
            yield name, seconds, functools.partial(step, self, *given)

    def named_steps(self):
        yield "environment", 0, timed.environment
        yield "ceilings", 5, timed.ceilings
        if self.options.stage == "tune":
            for tunable in tune.tunables():
                for case, passes in tunable.cases:
                    yield f"tune {tunable.name} {case} {passes}", 10, timed.tune_launches, tunable, case, passes
            return
        yield "compile", 30, checks.compile_kernels
        if self.options.stage == "check":
            yield "tests", 30, checks.run_tests
            for file, chosen in bars.RISKIEST:
                for tool in ("memcheck", "racecheck"):
                    yield f"{tool} {file} {chosen}", 60, checks.sanitize, tool, file, chosen
        else:
            yield "smoke", 20, checks.smoke
        for bar in bars.BARS:
            yield f"bar {bar.name}", 5, timed.time_bar, bar
        yield "training step", 20, timed.time_training

    def run(self):
        begun = self.log.begun()
        for name, seconds, step in self.steps():
            if name in begun:
                continue
            if self.left() < seconds:
                self.log.add(name, kind="skipped", reason=f"{self.left():.0f} s left, {seconds} wanted")
                continue
            self.log.add(name, kind="start")
            print(f"{self.left():6.0f} s left  {name}", file=sys.stderr, flush=True)
            start = time.time()
            try:
                step()
            except Exception as error:  # whatever it is, the other steps are still worth having
                trace = "".join(traceback.format_exception(error)[-3:])
                self.log.add(name, kind="error", error=f"{type(error).__name__}: {error}"[:2000], trace=trace[-2000:])
                if self.machine.cuda and STICKY.search(str(error)):
                    os.execv(sys.executable, [sys.executable, "-m", "fastllm.bench.gpu", *self.options.again])
            self.log.add(name, kind="end", seconds=round(time.time() - start, 2))
            if self.machine.cuda:
                torch.cuda.empty_cache()
