"""A quarter of an hour on a GPU, well spent: `python -m fastllm.bench.gpu --stage check|tune|accept --budget SECONDS`.

check: every op looked at in a process of its own, the riskiest kernels under compute-sanitizer, the tests of every op
and option on the device, ceilings of this GPU, all kernels compiled side by side, every bar once beside its rivals, a
training step. tune: other launches of each kernel. accept: every op looked at once more, every bar twice (the worse run
counts), the training step.

A stage is a list of steps. What a step finds is appended to one file of JSON lines at once; a step that fails is a line
that says why; a step for which no time is left is a line that says so. Steps run in a process that this one watches:
one that poisons its CUDA context, dies, or hangs on a kernel that never ends, is followed by a new one, which goes on
with the next step. docs/gpu.md has the first minutes, step by step.
"""

import argparse
import os
import re
import sys
import time
from pathlib import Path

import torch

from fastllm.bench.gpu import show
from fastllm.bench.gpu.machine import Log, Machine
from fastllm.bench.gpu.stage import Stage
from fastllm.bench.gpu.watching import watch

ROOT = Path(__file__).resolve().parents[2]


def parse(arguments):
    parser = argparse.ArgumentParser(
        prog="python -m fastllm.bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stage", choices=("check", "tune", "accept"), default="check")
    parser.add_argument("--budget", type=float, default=510, help="seconds (default 510)")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder (default bench/results)")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 1) - 2), help="processes side by side")
    parser.add_argument("--block-ms", type=float, default=20.0, help="how long one sample lasts (default 20)")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    parser.add_argument("--only", default="", help="steps whose name this regular expression finds")
    parser.add_argument(
        "--tests", default="(triton or cuda or hopper) and not compile", help="which tests, as pytest's -k"
    )
    parser.add_argument("--test-files", default="test_*.py", help="which files of tests/")
    parser.add_argument("--resume", type=Path, help="the file of JSON lines of a run to go on with")
    parser.add_argument("--deadline", type=float, help="seconds since the epoch, instead of --budget")
    parser.add_argument("--unwatched", action="store_true", help="run the steps in this process")
    return parser.parse_args(arguments)


def main(arguments=None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(arguments)
    on_gpu = options.device.startswith("cuda")
    if on_gpu and not torch.cuda.is_available():
        print(f"fastllm.bench.gpu: no CUDA device: {torch.__version__} on this machine", file=sys.stderr)
        return 2
    options.block_s = options.block_ms / 1e3
    options.deadline = options.deadline or time.time() + options.budget
    folder = options.out / re.sub(r"\W+", "-", Machine(options.device).name).strip("-").lower()
    folder.mkdir(parents=True, exist_ok=True)
    path = options.resume or folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{options.stage}.jsonl"
    if on_gpu and not options.unwatched:
        own = ["--resume", str(path), "--deadline", str(options.deadline), "--unwatched"]
        watch([sys.executable, "-m", "fastllm.bench.gpu", *arguments, *own], path, options.deadline)
    else:
        try:
            Stage(options, Log(path)).run()
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
    if options.unwatched:
        return 0
    log = Log(path)
    show.report(log)
    print(f"wrote {path}")
    return int(bool(log.of("error")) or any(row["wrong"] for row in log.of("bar")))
