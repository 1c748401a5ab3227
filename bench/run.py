"""`fastllm bench`: time, share of the floor, and ratio to each rival, measured so that a stranger believes it.

Correctness first: a wrong result is never timed. Then every contender of a case runs in turn, round after round, in one
process (bench/timing.py); ours runs twice in each round, which is the noise. A difference below it is called a tie.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from fastllm import info, text, verify
from fastllm.bench import cases, timing, tune_linear


def contender(function, case, passes, dtype, device):
    """A call of one pass of `function`; outputs and gradients are allocated by the call, on every side."""
    leaves = [x.requires_grad_(passes != "forward") for x in case.inputs(dtype, device)]
    if passes == "forward":

        def call():
            with torch.no_grad():
                return function(*leaves)

        return call

    def outputs():
        made = function(*leaves)
        return list(made) if isinstance(made, (tuple, list)) else [made]

    kept = outputs()
    grads = [torch.randn_like(y) for y in kept]
    if passes == "both":
        return lambda: torch.autograd.grad(outputs(), leaves, grads)
    return lambda: torch.autograd.grad(kept, leaves, grads, retain_graph=True)


def rivals(case, passes, dtype, device, compiled) -> tuple[dict, dict]:
    """Name -> call for every rival that can do this pass, and name -> reason for those that cannot."""
    functions = {"torch": case.torch, "naive": case.naive}
    if compiled:
        functions["compile"] = torch.compile(case.compiled or case.torch, fullgraph=True, dynamic=False)
    found, missing = {}, {}
    for name, function in functions.items():
        try:
            found[name] = contender(function, case, passes, dtype, device)
            found[name]()
        except Exception as problem:  # a rival may fail in any way; it is then a missing column that says why
            found.pop(name, None)
            missing[name] = f"{type(problem).__name__}: {str(problem).strip().partition(chr(10))[0][:200]}"
    return found, missing


def measure(case, dtype, passes, options, ceilings) -> list[dict]:
    """The rows of one case and dtype, one per pass."""
    checked = verify.check(case, dtype, options.device)
    wrong = [f"{row.result}: {row.accuracy.problem}" for row in checked if row.accuracy.problem and not row.fallback]
    row = {
        "op": case.op,
        "case": case.name,
        "dtype": str(dtype).removeprefix("torch."),
        "kernel": checked[0].kernel,
        "fallback": checked[0].fallback,
        "error": max(r.accuracy.norm for r in checked),
        "torch_error": max(r.accuracy.peer_norm for r in checked),
        "wrong": "; ".join(wrong),
    }
    if wrong:
        return [row]
    return [row | time_pass(case, dtype, one, options, ceilings) for one in passes if one in case.flops]


def time_pass(case, dtype, passes, options, ceilings) -> dict:
    found, missing = rivals(case, passes, dtype, options.device, options.compile)
    moved = case.bytes(passes, dtype)
    contenders = {
        "ours": contender(case.ours, case, passes, dtype, options.device),
        **found,
        "ours again": contender(case.ours, case, passes, dtype, options.device),
        "copy": timing.copy_of(moved, options.device),
    }
    wait = torch.cuda.synchronize if options.device.startswith("cuda") else lambda: None
    samples, foreign = timing.interleave(contenders, options.rounds, options.block_ms / 1e3, wait)
    ours = timing.Spread.of(samples["ours"])
    peak = timing.peak_gflop_per_s(ceilings, dtype)
    floor = max(timing.Spread.of(samples["copy"]).median, case.flops[passes] / peak / 1e9 if peak else 0.0)
    strays = timing.noise(samples["ours"], samples["ours again"])
    versus = {}
    for name in found:
        ratio = timing.ratios(samples[name], samples["ours"])
        versus[name] = {**vars(ratio), "tie": timing.is_tie(ratio, strays)}
    return {
        "pass": passes,
        "ms": {"p20": ours.p20 * 1e3, "median": ours.median * 1e3, "p80": ours.p80 * 1e3},
        "gb_per_s": moved / ours.median / 1e9,
        "gflop_per_s": case.flops[passes] / ours.median / 1e9,
        "bytes": moved,
        "flops": case.flops[passes],
        "share_of_floor": floor / ours.median,
        "noise": strays,
        "ratio": versus,
        "missing": missing,
        "foreign": foreign,
        "samples_s": samples,
    }


HEADER = ("op", "case", "dtype", "pass", "kernel", "ms", "p20-p80", "GB/s", "GFLOP/s", "of floor", "noise")


def cells(row, rival_names) -> tuple[str, ...]:
    start = (row["op"], row["case"], row["dtype"])
    if row["wrong"]:
        blank = ("-",) * (len(HEADER) - 5 + len(rival_names))
        return *start, "WRONG", row["kernel"], *blank
    ms, versus = row["ms"], []
    for name in rival_names:
        ratio = row["ratio"].get(name)
        shown = f"{ratio['median']:.2f}x ({ratio['p20']:.2f}-{ratio['p80']:.2f})" if ratio else "missing"
        versus.append(shown + " tie" * bool(ratio and ratio["tie"]))
    times = (f"{ms['median']:.3f}", f"{ms['p20']:.3f}-{ms['p80']:.3f}")
    rates = (f"{row['gb_per_s']:.1f}", f"{row['gflop_per_s']:.0f}", f"{row['share_of_floor']:.0%}")
    return *start, row["pass"], row["kernel"], *times, *rates, f"{row['noise']:.1%}", *versus


def environment() -> dict:
    """What a reader must know to repeat this: `fastllm info`, the commit, the affinity, the time."""
    root, git = Path(__file__).resolve().parents[1], {"commit": None, "dirty": None}
    if (root / ".git").exists():  # an installed wheel may lie inside somebody else's repository

        def ask(*words):
            return subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True).stdout.strip()

        git = {"commit": ask("rev-parse", "HEAD") or None, "dirty": bool(ask("status", "--porcelain"))}
    affinity = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    return info.collect() | {"git": git, "affinity": affinity, "date": time.strftime("%Y-%m-%dT%H:%M:%S%z")}


def choose(listed, ops):
    return [case for case in listed if not ops or case.op in ops]


def run(options) -> dict:
    """Measure everything that `options` names; an interrupt keeps what is done."""
    chosen = choose(cases.QUICK if options.quick else cases.BENCH, options.ops)
    chosen = chosen or choose(cases.BENCH, options.ops)  # an op that --quick leaves out was asked for by name
    report = {"environment": environment(), "options": {k: v for k, v in vars(options).items() if k != "run"}}
    report |= {"interrupted": False, "runs": {}}
    before = torch.get_float32_matmul_precision()
    try:
        for knobs in ("stock", "tuned"):  # tuned last: what glibc is told cannot be taken back
            if options.knobs not in (knobs, "both"):
                continue
            turned = timing.tune() if knobs == "tuned" else []
            found = {"knobs": turned, "ceilings": timing.ceilings(options.device), "rows": []}
            report["runs"][knobs] = found
            work = [(case, getattr(torch, dtype)) for case in chosen for dtype in options.dtype]
            for case, dtype in text.progress(work, f"bench {knobs}", lambda at: f"{at[0]} {at[1]}"):
                found["rows"] += measure(case, dtype, options.passes, options, found["ceilings"])
    except KeyboardInterrupt:
        report["interrupted"] = True
    finally:
        torch.set_float32_matmul_precision(before)
    return report


def show(report):
    for knobs, found in report["runs"].items():
        measured = {name for row in found["rows"] for name in (*row.get("ratio", {}), *row.get("missing", {}))}
        names = [name for name in ("torch", "naive", "compile") if name in measured]
        header = (*HEADER, *(f"vs {name}" for name in names))
        turned = f": {'; '.join(found['knobs'])}" if found["knobs"] else ""
        text.show(header, [cells(row, names) for row in found["rows"]], f"{knobs} PyTorch{turned}")
        print("ceilings:", ", ".join(f"{name} {value:.0f}" for name, value in found["ceilings"].items()))
        for row in found["rows"]:
            if row["wrong"]:
                print(f"WRONG, so not timed: {row['op']} {row['case']} {row['dtype']}: {row['wrong']}")
        for reason in sorted({f"{name}: {why}" for r in found["rows"] for name, why in r.get("missing", {}).items()}):
            print("missing", reason)
        for reason in sorted({r["fallback"] for r in found["rows"] if r["fallback"]}):
            print("runs on plain PyTorch:", reason)
    print(
        "vs: their time over ours, median (p20-p80) of paired rounds; above 1 we are faster. noise: ours against"
        " itself; a difference below it is a tie.\nof floor: the least time that the copy bandwidth at this size, and"
        " the best measured matrix rate, allow, over our time."
    )


# `fastllm bench WORD ...`: what has options of its own. Each module has a `configure(parser)`, as this one has.
WORDS = {"model": "fastllm.bench.model"}


def add_arguments(subparsers):
    parser = subparsers.add_parser("bench", help="time every op against PyTorch, interleaved, with the noise beside it")
    configure(parser)
    parse_ops = parser.parse_known_args

    def parse(arguments=None, namespace=None):
        word = arguments[0] if arguments else None
        if word not in WORDS:
            return parse_ops(arguments, namespace)
        module = importlib.import_module(WORDS[word])
        own = argparse.ArgumentParser(prog=f"{parser.prog} {word}", description=module.__doc__.partition("\n")[0])
        module.configure(own)
        return own.parse_known_args(arguments[1:], namespace)

    parser.parse_known_args = parse  # an optional subcommand, which argparse has no word for


def configure(parser):
    parser.add_argument("ops", nargs="*", metavar="op", help="attention, layer_norm, ... (default: every op)")
    dtypes, passes = text.some_of(verify.DTYPES), text.some_of(cases.PASSES)
    parser.add_argument("--dtype", type=dtypes, default=["float32", "bfloat16"], help="default float32,bfloat16")
    parser.add_argument("--passes", type=passes, default=list(cases.PASSES), help="default forward,backward,both")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="one or two cases per op, fewer rounds")
    size.add_argument("--full", action="store_true", help="every case, more rounds")
    parser.add_argument("--rounds", type=int, help="how many (default 15; 7 with --quick, 41 with --full)")
    parser.add_argument("--block-ms", type=float, default=20.0, help="how long one sample lasts (default 20)")
    parser.add_argument("--knobs", choices=("stock", "tuned", "both"), default="stock")
    parser.add_argument("--compile", action="store_true", help="torch.compile is a rival too (slow to start)")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--out", metavar="DIR", help="write report.json, with raw samples, there")
    parser.add_argument(
        "--tune", action="store_true", help="measure where our linear is the faster one; write the table"
    )
    parser.set_defaults(run=execute)


def execute(options) -> int:
    if options.tune:
        if options.ops not in ([], ["linear"]):
            raise ValueError(f"bench --tune: only linear has a table, got {', '.join(options.ops)}")
        return tune_linear.main()
    known = sorted({case.op for case in cases.BENCH})
    if unknown := sorted(set(options.ops) - set(known)):
        raise ValueError(f"bench: unknown op {', '.join(unknown)}; there are {', '.join(known)}")
    if options.rounds is None:
        options.rounds = 7 if options.quick else 41 if options.full else 15
    if options.rounds < 1 or options.block_ms <= 0:
        raise ValueError(f"bench: rounds and block-ms must be positive, got {options.rounds} and {options.block_ms}")
    report = run(options)
    show(report)
    if options.out:
        folder = Path(options.out)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
        print(f"wrote {folder / 'report.json'}")
    rows = [row for found in report["runs"].values() for row in found["rows"]]
    return 130 if report["interrupted"] else int(any(row["wrong"] for row in rows))


def main(arguments=None) -> int:
    from fastllm.cli import main

    return main(["bench", *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    sys.exit(main())
