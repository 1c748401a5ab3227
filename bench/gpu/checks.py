"""Steps that find what is wrong, and compile what is timed later."""

import contextlib
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

import fastllm
from fastllm import verify
from fastllm.bench import bars, measure

ROOT = Path(__file__).resolve().parents[2]


def compile_kernels(stage):
    """Every kernel of the bars once, side by side in processes, into Triton's and Inductor's caches on disk."""
    jobs = [(n, stage.machine.device, name) for n, bar in enumerate(bars.BARS) for name in ("ours", "compile")]
    jobs = [job for job in jobs if job[2] == "ours" or bars.BARS[job[0]].compile_mode]
    workers, failed = min(stage.options.workers, len(jobs)), []
    if workers < 2:
        failed = [f"{name}: {error}" for name, error in map(warm_up, jobs) if error]
    else:
        stop = time.time() + min(120, stage.left() / 3)
        with multiprocessing.get_context("spawn").Pool(workers) as pool:  # leaving it ends what still runs
            for job, result in [(job, pool.apply_async(warm_up, (job,))) for job in jobs]:
                try:
                    name, error = result.get(max(0.0, stop - time.time()))
                except multiprocessing.TimeoutError:
                    name, error = bars.BARS[job[0]].name, "not finished"
                if error:
                    failed.append(f"{name}: {error}")
    stage.log.add("compile", kind="compile", jobs=len(jobs), workers=workers, failed=failed)


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


def run_tests(stage):
    """The test-suite's own cases on this device: every op and option against fp64, runs that repeat."""
    folder = ROOT / "tests"
    if not folder.exists():
        raise FileNotFoundError("no tests here: run from a checkout of the repository")
    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-o", "addopts="]
    chosen = ["-k", stage.options.tests, *map(str, sorted(folder.glob(stage.options.test_files)))]
    listed = subprocess.run([*pytest, "--collect-only", "-q", *chosen], cwd=ROOT, capture_output=True, text=True)
    ids = [line for line in listed.stdout.splitlines() if "::" in line]
    if not ids:
        raise RuntimeError(f"no tests were found: {listed.stdout[-500:]}{listed.stderr[-500:]}")
    running = []
    for n in range(min(stage.options.workers, len(ids))):
        log = stage.log.path.with_suffix(f".tests{n}.txt")
        with log.open("w") as file:
            share = [*pytest, "-v", "--tb=short", *ids[n :: stage.options.workers]]
            running.append((subprocess.Popen(share, cwd=ROOT, stdout=file, stderr=file), log))
    stop = time.time() + min(stage.left() * 0.5, 240)
    outcomes = {}
    for process, log in running:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(1, stop - time.time()))
        process.kill()
        outcomes |= outcomes_in(log.read_text())
    count = {word: list(outcomes.values()).count(word) for word in ("PASSED", "FAILED", "ERROR", "SKIPPED")}
    bad = sorted(name for name, outcome in outcomes.items() if outcome in ("FAILED", "ERROR"))
    stage.log.add("tests", kind="tests", listed=len(ids), unfinished=len(ids) - len(outcomes), bad=bad, **count)


def outcomes_in(log: str) -> dict[str, str]:
    """Test -> outcome, from what pytest -v wrote, though it may have been stopped."""
    return dict(re.findall(r"^(tests/\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)\b", log, re.MULTILINE))


def sanitize(stage, tool, file, chosen):
    """A few tests under compute-sanitizer; without PyTorch's cache of memory, which would hide bounds."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        stage.log.add(f"{tool} {file} {chosen}", kind="sanitizer", tool=tool, skipped="no compute-sanitizer here")
        return
    command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "pytest", "-x", "-q"]
    command += ["-o", "addopts=", "-k", chosen, str(ROOT / "tests" / file)]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=min(60, stage.left())
        )
        found = dict(rc=done.returncode, tail=done.stdout[-1500:])
    except subprocess.TimeoutExpired:
        found = dict(rc=None, tail="not finished in 60 s")
    stage.log.add(f"{tool} {file} {chosen}", kind="sanitizer", tool=tool, tests=f"{file} -k {chosen}", **found)


def smoke(stage):
    """The cases of `fastllm verify`, which take seconds."""
    with fastllm.backend("triton"):
        rows = verify.run(device=stage.machine.device)
    lacking = [row for row in rows if row.accuracy.problem and row.accuracy.problem.startswith("Unsupported")]
    bad = [row for row in rows if row.verdict != "pass" and row not in lacking]
    bad = [f"{row.op} {row.case} {row.dtype} {row.result}: {row.verdict}" for row in bad]
    stage.log.add("smoke", kind="smoke", results=len(rows) - len(lacking), bad=bad, lacking=len(lacking))
