"""Steps that find what is wrong, and compile what is timed later."""

import concurrent.futures
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import fastllm
from fastllm import dispatch
from fastllm.bench import bars, cases, measure

ROOT = Path(__file__).resolve().parents[2]


def compile_kernels(stage):
    """Every kernel of the bars once, side by side in processes, into Triton's and Inductor's caches on disk."""
    jobs = [(n, stage.machine.device, name) for n, bar in enumerate(bars.BARS) for name in ("ours", "compile")]
    jobs = [job for job in jobs if job[2] == "ours" or (bars.BARS[job[0]].compile_mode and stage.options.compile)]
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


# An error shows where it was made, not at some later call.
BLOCKING = {"CUDA_LAUNCH_BLOCKING": "1"}


def side_by_side(stage, jobs, each_s):
    """Runs commands, `workers` at a time: yields (name, exit status or None, output, seconds) as they end.

    `jobs` are (name, command, environment). One that takes longer than each_s is killed: it may hang on the GPU.
    """

    def run(job):
        name, command, environment = job
        start = time.time()
        left = min(each_s, stage.left())
        if left <= 0:
            return name, None, "no time was left", 0.0
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            output, _ = process.communicate(timeout=left)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            return name, None, f"{output}\nno end after {left:.0f} s", time.time() - start
        return name, process.returncode, output, time.time() - start

    with concurrent.futures.ThreadPoolExecutor(stage.options.workers) as pool:
        for done in concurrent.futures.as_completed([pool.submit(run, job) for job in jobs]):
            yield done.result()


def looks() -> list[tuple[str, str]]:
    """(op, backend) of all that `look` can be asked for."""
    ops = sorted({case.op for case in cases.VERIFY})
    both = [(op, "triton") for op in ops] + [(op, "cuda") for op in ops if op in dispatch.CUDA_OPS]
    return [*both, ("attention", "hopper")]


def look_at_ops(stage):
    """Every op on every backend, each in a process of its own, so that one that crashes or hangs costs no other."""
    command = [sys.executable, "-m", "fastllm.bench.gpu.look"]
    jobs = [(f"{op} {own}", [*command, op, own, stage.machine.device], BLOCKING) for op, own in looks()]
    for name, status, output, seconds in side_by_side(stage, jobs, each_s=90):
        seen = {}
        for line in output.splitlines():
            if line.startswith("{"):
                seen |= json.loads(line)
        problem = "" if "results" in seen else f"exit status {status}: {output[-1500:]}"
        op, backend = name.split()
        row = dict(op=op, backend=backend, seconds=round(seconds, 1), problem=problem) | seen
        stage.log.add(f"look {name}", kind="look", **row)


def trouble(stage, op, backend) -> str:
    """How the step `look` saw an op end on a backend, if that was not well: what hangs there would hang again."""
    for row in stage.log.of("look"):
        if (row["op"], row["backend"]) == (op, backend):
            return row["problem"][:300]
    return ""


def run_tests(stage):
    """The test-suite's own cases on this device: every op and option against fp64, runs that repeat."""
    folder = ROOT / "tests"
    if not folder.exists():
        raise FileNotFoundError("no tests here: run from a checkout of the repository")
    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-o", "addopts="]
    chosen = ["-k", stage.options.tests, *map(str, sorted(folder.glob(stage.options.test_files)))]
    listed = subprocess.run([*pytest, "--collect-only", "-q", *chosen], cwd=ROOT, capture_output=True, text=True)
    ids = a_few_of_each([line for line in listed.stdout.splitlines() if "::" in line])
    if not ids:
        raise RuntimeError(f"no tests were found: {listed.stdout[-500:]}{listed.stderr[-500:]}")
    workers = min(stage.options.workers, len(ids))
    stop = time.time() + min(stage.left() * 0.4, 240)
    with tempfile.TemporaryDirectory() as logs, concurrent.futures.ThreadPoolExecutor(workers) as pool:
        shares = [
            pool.submit(run_share, [*pytest, "-v", "--tb=short"], ids[n::workers], Path(logs, f"{n}.txt"), stop)
            for n in range(workers)
        ]
        outcomes = {name: outcome for share in shares for name, outcome in share.result().items()}
        whole = "".join(path.read_text() for path in sorted(Path(logs).glob("*.txt")))
    stage.log.path.with_suffix(".tests.txt").write_text(whole)  # one file: a machine may give few back
    count = {word: list(outcomes.values()).count(word) for word in ("PASSED", "FAILED", "ERROR", "SKIPPED", "KILLED")}
    bad = sorted(name for name, outcome in outcomes.items() if outcome in ("FAILED", "ERROR", "KILLED"))
    stage.log.add("tests", kind="tests", listed=len(ids), unfinished=len(ids) - len(outcomes), bad=bad, **count)


def a_few_of_each(ids) -> list[str]:
    """Tests in an order in which each file has the same share of its tests at any time: the time may not be enough."""
    place, count = {}, {}
    for name in ids:
        file = name.partition("::")[0]
        place[name] = count[file] = count.get(file, -1) + 1
    return sorted(ids, key=lambda name: place[name] / (count[name.partition("::")[0]] + 1))


def run_share(pytest, ids, log, stop, patience_s=60.0) -> dict[str, str]:
    """Test -> outcome. A process that dies, or waits for a kernel that hangs, loses the test it was at, no other."""
    outcomes: dict[str, str] = {}
    while time.time() < stop and (left := [name for name in ids if name not in outcomes]):
        before = log.stat().st_size if log.exists() else 0
        with log.open("a") as file:
            process = subprocess.Popen([*pytest, *left], cwd=ROOT, env=os.environ | BLOCKING, stdout=file, stderr=file)
        size, since = before, time.time()
        while process.poll() is None and time.time() < stop and time.time() - since < patience_s:
            time.sleep(0.2)
            if log.stat().st_size != size:
                size, since = log.stat().st_size, time.time()
        ended = process.poll() is not None
        process.kill()
        process.wait()
        new = outcomes_in(log.read_text()[before:])
        outcomes |= new
        if time.time() >= stop:
            break
        if ended and process.returncode in (0, 1) and set(left) <= outcomes.keys():
            break
        if ended and process.returncode == 2 and new:  # conftest stopped it: its context is poisoned
            continue
        killed = next((name for name in left if name not in outcomes), None)
        if killed is None:
            break
        outcomes[killed] = "KILLED"
    return outcomes


def outcomes_in(log: str) -> dict[str, str]:
    """Test -> outcome, from what pytest -v wrote, though it may have been stopped."""
    return dict(re.findall(r"^(tests/\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)\b", log, re.MULTILINE))


def sanitize(stage):
    """A few tests under compute-sanitizer; without PyTorch's cache of memory, which would hide bounds."""
    places = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
    program = shutil.which("compute-sanitizer", path=places)
    jobs = []
    for file, chosen in bars.RISKIEST:
        for tool in ("memcheck", "racecheck"):
            command = [str(program), "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "pytest", "-x"]
            command += ["-q", "-o", "addopts=", "-k", chosen, str(ROOT / "tests" / file)]
            jobs.append((f"{tool} {file} {chosen}", command, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}))
    if program is None:
        for name, *_ in jobs:
            stage.log.add(name, kind="sanitizer", skipped="no compute-sanitizer here")
        return
    for name, status, output, seconds in side_by_side(stage, jobs, each_s=110):
        stage.log.add(name, kind="sanitizer", rc=status, seconds=round(seconds, 1), tail=output[-1500:])
