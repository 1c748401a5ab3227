"""Half an hour on a GPU, well spent: `python -m fastllm.bench.gpu --stage check|tune|accept --budget SECONDS`.

check: ceilings of this GPU, all kernels compiled side by side, the tests of every op and option on the device, the
riskiest kernels under compute-sanitizer, every bar once beside its rivals, a training step. tune: other launches of
each kernel. accept: correctness once more, every bar twice (the worse run counts), the training step.

A stage is a list of steps. What a step finds is appended to one file of JSON lines at once; a step that fails is a line
that says why; a step for which no time is left is a line that says so. After an error that poisons the CUDA context the
process starts anew and goes on with the next step.
"""

import argparse
import contextlib
import functools
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
import traceback
from pathlib import Path

import torch
import torch.nn.functional as F

import fastllm
from fastllm import text, verify
from fastllm.bench import bars, measure, store, timing, tune

ROOT = Path(__file__).resolve().parents[1]
RIVAL_S = 0.25  # spent on each rival of a bar
STICKY = re.compile(r"CUDA error|illegal memory access|device-side assert|unspecified launch failure")


class Machine:
    """The device, and what differs where there is none: on a CPU the kernels are interpreted, for the tests."""

    def __init__(self, device: str):
        self.device, self.cuda = device, device.startswith("cuda")

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.cuda else "cpu"

    def wait(self):
        if self.cuda:
            torch.cuda.synchronize()

    def sets(self, moved: int) -> int:
        """How many sets of inputs do not fit in four times the L2 cache together."""
        cache = torch.cuda.get_device_properties(self.device).L2_cache_size if self.cuda else 1
        return min(8, math.ceil(4 * cache / max(moved, 1)))

    def peak(self, call) -> int:
        """Bytes that a call takes beyond what was there before."""
        if not self.cuda:
            call()
            return 0
        self.wait()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        self.wait()
        return torch.cuda.max_memory_allocated() - before

    def replayed(self, call):
        """`call` as one replay of a CUDA graph."""
        if not self.cuda:
            return call
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay


class Log:
    """The file of JSON lines: what is done, and what earlier steps found."""

    def __init__(self, path: Path):
        self.path = path
        self.rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def add(self, step: str, **found):
        self.rows.append({"step": step, "at": time.strftime("%H:%M:%S"), **found})
        with self.path.open("a") as file:
            file.write(json.dumps(self.rows[-1]) + "\n")

    def of(self, kind: str) -> list[dict]:
        return [row for row in self.rows if row.get("kind") == kind]

    def begun(self) -> set[str]:
        return {row["step"] for row in self.rows}


class Stage:
    """One run of one stage; its steps are methods that log what they find."""

    def __init__(self, options, log):
        self.options, self.log = options, log
        self.machine = Machine(options.device)

    def left(self) -> float:
        return self.options.deadline - time.time()

    def steps(self):
        """(name, seconds that it should have, function)."""
        yield "environment", 0, self.environment
        yield "ceilings", 5, self.ceilings
        if self.options.stage == "tune":
            for tunable in tune.tunables():
                for case, passes in tunable.cases:
                    step = functools.partial(self.tune, tunable, case, passes)
                    yield f"tune {tunable.name} {case} {passes}", 10, step
            return
        yield "compile", 30, self.compile
        if self.options.stage == "check":
            yield "tests", 30, self.tests
            for file, chosen in bars.RISKIEST:
                for tool in ("memcheck", "racecheck"):
                    yield f"{tool} {file} {chosen}", 60, functools.partial(self.sanitize, tool, file, chosen)
        else:
            yield "smoke", 20, self.smoke
        for bar in bars.BARS:
            yield f"bar {bar.name}", 5, functools.partial(self.bar, bar)
        yield "training step", 20, self.training

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

    # What the steps do

    def environment(self):
        found = store.environment()
        if self.machine.cuda and shutil.which("nvidia-smi"):
            query = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
            asked = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
            found["nvidia-smi"] = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
        self.log.add("environment", kind="environment", device=self.machine.name, **found)

    def seconds(self, call) -> float:
        samples, _ = timing.interleave({"it": call}, 5, self.options.block_s, self.machine.wait)
        return min(samples["it"])  # a ceiling is what is possible

    def ceilings(self):
        """Copy, read, bf16 matrix products, and a graph of one kernel that does next to nothing."""
        device, sizes = self.machine.device, bars.SIZES
        found = {"copy_gb_per_s": sizes.copy_bytes / self.seconds(timing.copy_of(sizes.copy_bytes, device)) / 1e9}
        x = torch.ones(sizes.copy_bytes // 8, device=device)
        found["read_gb_per_s"] = sizes.copy_bytes / 2 / self.seconds(x.sum) / 1e9
        del x
        for M, N, K in sizes.products:
            a, b = (torch.randn(shape, device=device).bfloat16() for shape in ((M, K), (K, N)))
            found[f"matrix_{M}x{N}x{K}_gflop_per_s"] = 2 * M * N * K / self.seconds(lambda a=a, b=b: a @ b) / 1e9
        one = torch.ones(1, device=device)
        found["graph_us"] = self.seconds(self.machine.replayed(lambda: one.mul_(1.0))) * 1e6
        self.log.add("ceilings", kind="ceilings", **found)

    def ceiling(self, what: str) -> float:
        found = {name: value for row in self.log.of("ceilings") for name, value in row.items()}
        return max((value for name, value in found.items() if name.startswith(what)), default=math.nan)

    def compile(self):
        """Every kernel of the bars once, side by side in processes, into Triton's and Inductor's caches on disk."""
        jobs = [(n, self.machine.device, name) for n, bar in enumerate(bars.BARS) for name in ("ours", "compile")]
        jobs = [job for job in jobs if job[2] == "ours" or bars.BARS[job[0]].compile_mode]
        workers, failed = min(self.options.workers, len(jobs)), []
        if workers < 2:
            failed = [f"{name}: {error}" for name, error in map(warm_up, jobs) if error]
        else:
            stop = time.time() + min(120, self.left() / 3)
            with multiprocessing.get_context("spawn").Pool(workers) as pool:  # leaving it ends what still runs
                for job, result in [(job, pool.apply_async(warm_up, (job,))) for job in jobs]:
                    try:
                        name, error = result.get(max(0.0, stop - time.time()))
                    except multiprocessing.TimeoutError:
                        name, error = bars.BARS[job[0]].name, "not finished"
                    if error:
                        failed.append(f"{name}: {error}")
        self.log.add("compile", kind="compile", jobs=len(jobs), workers=workers, failed=failed)

    def tests(self):
        """The test-suite's own cases on this device: every op and option against fp64, runs that repeat."""
        folder = ROOT / "tests"
        if not folder.exists():
            raise FileNotFoundError("no tests here: run from a checkout of the repository")
        pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-o", "addopts="]
        chosen = ["-k", self.options.tests, *map(str, sorted(folder.glob(self.options.test_files)))]
        listed = subprocess.run([*pytest, "--collect-only", "-q", *chosen], cwd=ROOT, capture_output=True, text=True)
        ids = [line for line in listed.stdout.splitlines() if "::" in line]
        if not ids:
            raise RuntimeError(f"no tests were found: {listed.stdout[-500:]}{listed.stderr[-500:]}")
        running = []
        for n in range(min(self.options.workers, len(ids))):
            log = self.log.path.with_suffix(f".tests{n}.txt")
            with log.open("w") as file:
                share = [*pytest, "-v", "--tb=short", *ids[n :: self.options.workers]]
                running.append((subprocess.Popen(share, cwd=ROOT, stdout=file, stderr=file), log))
        stop = time.time() + min(self.left() * 0.5, 240)
        outcomes = {}
        for process, log in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(1, stop - time.time()))
            process.kill()
            outcomes |= outcomes_in(log.read_text())
        count = {word: list(outcomes.values()).count(word) for word in ("PASSED", "FAILED", "ERROR", "SKIPPED")}
        bad = sorted(name for name, outcome in outcomes.items() if outcome in ("FAILED", "ERROR"))
        self.log.add("tests", kind="tests", listed=len(ids), unfinished=len(ids) - len(outcomes), bad=bad, **count)

    def sanitize(self, tool, file, chosen):
        """A few tests under compute-sanitizer; without PyTorch's cache of memory, which would hide bounds."""
        program = shutil.which("compute-sanitizer")
        if program is None:
            self.log.add(f"{tool} {file} {chosen}", kind="sanitizer", tool=tool, skipped="no compute-sanitizer here")
            return
        command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "pytest", "-x", "-q"]
        command += ["-o", "addopts=", "-k", chosen, str(ROOT / "tests" / file)]
        environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=min(60, self.left())
            )
            found = dict(rc=done.returncode, tail=done.stdout[-1500:])
        except subprocess.TimeoutExpired:
            found = dict(rc=None, tail="not finished in 60 s")
        self.log.add(f"{tool} {file} {chosen}", kind="sanitizer", tool=tool, tests=f"{file} -k {chosen}", **found)

    def smoke(self):
        """The cases of `fastllm verify`, which take seconds."""
        with fastllm.backend("triton"):
            rows = verify.run(device=self.machine.device)
        lacking = [row for row in rows if row.accuracy.problem and row.accuracy.problem.startswith("Unsupported")]
        bad = [row for row in rows if row.verdict != "pass" and row not in lacking]
        bad = [f"{row.op} {row.case} {row.dtype} {row.result}: {row.verdict}" for row in bad]
        self.log.add("smoke", kind="smoke", results=len(rows) - len(lacking), bad=bad, lacking=len(lacking))

    def bar(self, bar):
        """Correct first; then ours and every rival in turn. In the stage accept twice, and the worse run counts."""
        checked = self.wrong(bar.case, bar.dtype)
        if checked:
            self.log.add(f"bar {bar.name}", kind="bar", **about(bar), wrong=checked)
            return
        contenders, missing = self.contenders(bar)
        repeats = 2 if self.options.stage == "accept" else 1
        rounds = [self.time(contenders) for _ in range(repeats)]
        ours = max(statistics.median(samples["ours"]) for samples in rounds)
        ratios = {
            name: min(timing.ratios(samples[name], samples["ours"]).median for samples in rounds)
            for name in contenders
            if name not in ("ours", "ours again")
        }
        noise = max(timing.noise(samples["ours"], samples["ours again"]) for samples in rounds)
        reached = {
            "bandwidth": bar.case.bytes(bar.passes, bar.dtype) / ours / 1e9 / self.ceiling("copy"),
            "matrix": bar.case.flops[bar.passes] / ours / 1e9 / self.ceiling("matrix"),
            "sdpa": min((ratio for name, ratio in ratios.items() if name.startswith("sdpa")), default=math.nan),
        }
        missed = {
            name: round(reached.get(name, ratios.get(name, math.nan)), 3)
            for name, target in bar.targets.items()
            if not reached.get(name, ratios.get(name, math.nan)) >= target
        }
        self.log.add(
            f"bar {bar.name}", kind="bar", **about(bar), wrong="", ms=ours * 1e3, noise=noise, **reached, ratio=ratios,
            targets=bar.targets, missed=missed, missing=missing, samples_s=rounds,
        )  # fmt: skip

    def wrong(self, case, dtype) -> str:
        with fastllm.backend("triton"):
            rows = verify.check(case, dtype, self.machine.device)
        return "; ".join(f"{row.result}: {row.accuracy.problem}" for row in rows if row.accuracy.problem)

    def contenders(self, bar):
        """Name -> call; and the rivals that cannot do this, with their reason."""
        copies = 1 if bar.graph else self.machine.sets(bar.case.bytes(bar.passes, bar.dtype))
        inputs = [bar.case.inputs(bar.dtype, self.machine.device, seed) for seed in range(copies)]

        def made(function):
            calls = [measure.contender(function, one, bar.passes) for one in inputs]
            calls[0]()
            self.machine.wait()
            if bar.graph:
                return self.machine.replayed(calls[0])
            turn = itertools.cycle(calls)
            return lambda: next(turn)()

        with fastllm.backend("triton"):
            found, missing = {"ours": made(bar.case.ours)}, {}
        for name, function in bars.rivals_of(bar).items():
            try:
                found[name] = made(function())
            except Exception as problem:  # a rival may fail in any way; it is then a missing column that says why
                if STICKY.search(str(problem)):
                    raise
                missing[name] = f"{type(problem).__name__}: {str(problem).strip().partition(chr(10))[0][:200]}"
        with fastllm.backend("triton"):
            found["ours again"] = made(bar.case.ours)
        return found, missing

    def time(self, contenders, rounds=5) -> dict:
        with fastllm.backend("triton"):
            samples, _ = timing.interleave(contenders, rounds, self.options.block_s, self.machine.wait)
        return samples

    def tune(self, tunable, case, passes):
        """Every change of a launch against the launch that there is."""
        dtype, rows = torch.bfloat16, []
        with fastllm.backend("triton"):
            call = measure.contender(case.ours, case.inputs(dtype, self.machine.device), passes)
        for change in tunable.changes:
            try:
                with fastllm.backend("triton"):
                    wrong = functools.partial(self.wrong, case, dtype)
                    rows.append(tune.against(tunable, change, call, wrong, self.time))
            except Exception as error:  # a launch may be impossible; the others are still worth having
                if STICKY.search(str(error)):
                    raise
                rows.append(dict(change=change, problem=f"{type(error).__name__}: {error}"[:300]))
        name = f"{tunable.name} {case} {passes}"
        self.log.add(f"tune {name}", kind="tune", kernel=name, best=tune.best(rows), rows=rows)

    def training(self):
        """One optimizer step of the reference transformer: kernels, plain PyTorch, and torch.compile of the latter."""
        from fastllm.llm.bytelevel import loss_of
        from fastllm.llm.train import Recipe, Stepper
        from fastllm.model import Config, Transformer

        sizes, device = bars.SIZES, self.machine.device
        modern = dict(norm="rmsnorm", positions="rotary", activation="swiglu", dropout=0.0, scale_embedding=False)
        config = Config(**modern | sizes.model)
        tokens = torch.randint(config.vocab, (sizes.batch, config.max_len + 1), device=device)

        def with_sdpa(model):
            for module in model.modules():
                if isinstance(module, fastllm.nn.Attention):
                    module.attend = lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v, is_causal=True)
            return model

        made = {
            "ours": lambda: Transformer(config),
            "textbook": lambda: Transformer(config, accelerated=False),
            "sdpa": lambda: with_sdpa(Transformer(config, accelerated=False)),
        }
        if self.options.compile:
            made["sdpa compiled"] = lambda: torch.compile(with_sdpa(Transformer(config, accelerated=False)))
        contenders, memory = {}, {}
        for name, model in made.items():
            torch.manual_seed(0)
            with torch.device(device):
                step = Stepper(model().to(sizes.dtype), Recipe(), loss_of)
            contenders[name] = lambda step=step: step([tokens])
            with fastllm.backend("triton"):
                contenders[name]()
                memory[name] = self.machine.peak(contenders[name])
        samples = self.time(contenders, rounds=3)
        ours = statistics.median(samples["ours"])
        ratio = {name: timing.ratios(samples[name], samples["ours"]).median for name in contenders if name != "ours"}
        parameters = sum(p.numel() for p in step.model.parameters())
        self.log.add(
            "training step", kind="training", parameters=parameters, tokens=sizes.batch * config.max_len,
            ms=ours * 1e3, ratio=ratio, step_bytes=memory, samples_s=samples,
        )  # fmt: skip


def about(bar) -> dict:
    return dict(op=bar.case.op, case=bar.case.name, dtype=str(bar.dtype).removeprefix("torch."), **{"pass": bar.passes})


def warm_up(job) -> tuple[str, str]:
    """Compile what one bar needs, in a process of its own: its name, and why that did not go well."""
    n, device, who = job
    bar = bars.BARS[n]
    try:
        function = bar.case.ours if who == "ours" else bars.rivals_of(bar)["compile"]()
        with fastllm.backend("triton"):
            measure.contender(function, bar.case.inputs(bar.dtype, device), bar.passes)()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
    except Exception as error:  # the bar's own step says more
        return f"{who} {bar.name}", f"{type(error).__name__}: {error}"[:300]
    return f"{who} {bar.name}", ""


def outcomes_in(log: str) -> dict[str, str]:
    """Test -> outcome, from what pytest -v wrote, though it may have been stopped."""
    return dict(re.findall(r"^(tests/\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)\b", log, re.MULTILINE))


HEADER = ("op", "case", "pass", "ms", "bandwidth", "matrix", "noise", "rivals (their time / ours)", "bar")


def cells(row) -> tuple[str, ...]:
    start = (row["op"], row["case"], row["pass"])
    if row["wrong"]:
        return *start, "-", "-", "-", "-", "-", f"WRONG: {row['wrong'][:80]}"
    rivals = ", ".join(f"{name} {ratio:.2f}" for name, ratio in row["ratio"].items())
    missed = ", ".join(f"{name} {value:.2f} of {row['targets'][name]:g}" for name, value in row["missed"].items())
    shares = (f"{row['bandwidth']:.2f}", f"{row['matrix']:.2f}")
    return *start, f"{row['ms']:.3f}", *shares, f"{row['noise']:.1%}", rivals, f"missed: {missed}" if missed else "met"


def report(log):
    """One short table, and a line for each other thing that a reader must know."""
    for row in log.of("ceilings"):
        shown = {name: value for name, value in row.items() if isinstance(value, float)}
        print("ceilings:", ", ".join(f"{name} {value:.1f}" for name, value in shown.items()))
    if log.of("bar"):
        text.show(HEADER, [cells(row) for row in log.of("bar")])
    for row in log.of("tests"):
        print(f"tests: {row['PASSED']} passed, {len(row['bad'])} failed, {row['unfinished']} not finished", *row["bad"])
    for row in log.of("smoke"):
        counts = f"{row['results']} results, {len(row['bad'])} bad; {row['lacking']} cases have no Triton kernel"
        print(f"smoke: {counts}", *row["bad"], sep="\n  ")
    for row in log.of("sanitizer"):
        print(f"{row['step']}:", row.get("skipped") or ("clean" if row["rc"] == 0 else f"exit status {row['rc']}"))
    for row in log.of("tune"):
        best = row["best"]
        print(f"{row['kernel']}:", f"{best['change']}, {best['ratio']:.3f} times faster" if best else "nothing better")
    for row in log.of("training"):
        rivals = ", ".join(f"{name} {ratio:.2f}" for name, ratio in row["ratio"].items())
        print(f"training step: {row['ms']:.1f} ms; their time over ours: {rivals}; bytes: {row['step_bytes']}")
    for row in log.of("compile"):
        print(f"compiled: {row['jobs'] - len(row['failed'])} of {row['jobs']}", *row["failed"], sep="\n  ")
    for kind in ("error", "skipped"):
        for row in log.of(kind):
            print(f"{kind}: {row['step']}: {row.get('error') or row.get('reason')}")


def parse(arguments):
    parser = argparse.ArgumentParser(
        prog="python -m fastllm.bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stage", choices=("check", "tune", "accept"), default="check")
    parser.add_argument("--budget", type=float, default=510, help="seconds (default 510)")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder (default bench/results)")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 1) - 2), help="processes that compile")
    parser.add_argument("--block-ms", type=float, default=20.0, help="how long one sample lasts (default 20)")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile's step out")
    parser.add_argument("--tests", default="(triton or cuda) and not compile", help="which tests, as pytest's -k")
    parser.add_argument("--test-files", default="test_*.py", help="which files of tests/")
    parser.add_argument("--resume", type=Path, help="the file of JSON lines of a run to go on with")
    parser.add_argument("--deadline", type=float, help="seconds since the epoch, instead of --budget")
    return parser.parse_args(arguments)


def main(arguments=None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(arguments)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print(f"fastllm.bench.gpu: no CUDA device: {torch.__version__} on this machine", file=sys.stderr)
        return 2
    options.block_s = options.block_ms / 1e3
    options.deadline = options.deadline or time.time() + options.budget
    folder = options.out / re.sub(r"\W+", "-", Machine(options.device).name).strip("-").lower()
    folder.mkdir(parents=True, exist_ok=True)
    path = options.resume or folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{options.stage}.jsonl"
    options.again = [*arguments, "--resume", str(path), "--deadline", str(options.deadline)]
    log = Log(path)
    try:
        Stage(options, log).run()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
    report(log)
    print(f"wrote {path}")
    return int(bool(log.of("error")) or any(row["wrong"] for row in log.of("bar")))


if __name__ == "__main__":
    sys.exit(main())
