"""`fastllm bench`: time, share of the floor, and ratio to each rival, measured so that a stranger believes it."""

import argparse
import importlib
import sys
from pathlib import Path

import torch

from fastllm import text, verify
from fastllm.bench import cases, compare, measure, rivals, show, store, timing, tune_linear

CACHES = ("warm", "cold")

# `fastllm bench WORD ...`: what has options of its own. Each module has a `configure(parser)`, as this one has.
WORDS = {"model": "fastllm.bench.model", "scaling": "fastllm.bench.growth"}


def choose(listed, ops):
    return [case for case in listed if not ops or case.op in ops]


def begun(options) -> dict:
    """A report without rows; with --resume, the one that is there, if it was made in the same way."""
    kept = ("ops", "dtype", "passes", "cache", "rivals", "quick", "full", "rounds", "block_ms", "patience")
    kept += ("knobs", "device")
    fresh = {"schema": store.SCHEMA, "environment": store.environment()}
    fresh |= {"options": {name: getattr(options, name) for name in kept}, "interrupted": True, "runs": {}}
    path = Path(options.out) / "report.json" if options.out else None
    return store.resumed(path, fresh) if options.resume and path.exists() else fresh


def run(options) -> dict:
    """Measure everything that `options` names; an interrupt keeps what is done, and every step is saved at once."""
    chosen = choose(cases.QUICK if options.quick else cases.BENCH, options.ops)
    chosen = chosen or choose(cases.BENCH, options.ops)  # an op that --quick leaves out was asked for by name
    wanted = [(passes, cache) for passes in options.passes for cache in options.cache]
    report = begun(options)
    before = torch.get_float32_matmul_precision()
    try:
        for knobs in ("stock", "tuned"):  # tuned last: what glibc is told cannot be taken back
            if options.knobs in (knobs, "both"):
                fill(
                    report,
                    knobs,
                    [(case, getattr(torch, d)) for case in chosen for d in options.dtype],
                    wanted,
                    options,
                )
        report["interrupted"] = False
    except KeyboardInterrupt:
        report["interrupted"] = True
    finally:
        torch.set_float32_matmul_precision(before)
    return report


def fill(report, knobs, work, wanted, options):
    """The rows of stock or tuned PyTorch that the report does not have yet."""
    turned = timing.tune() if knobs == "tuned" else []
    ceilings = timing.ceilings(options.device)
    found = report["runs"].setdefault(knobs, {"knobs": turned, "ceilings": ceilings, "rows": []})
    done = {store.key(row) for row in found["rows"]}

    def left(case, dtype):
        """A case and dtype is measured at a time: one that is only half done is measured again."""
        keys = [(case.op, case.name, str(dtype).removeprefix("torch."), *one) for one in wanted if one[0] in case.flops]
        return not set(keys) <= done

    todo = [(case, dtype) for case, dtype in work if left(case, dtype)]
    guess = lambda item: measure.seconds(*item, wanted, options, ceilings)  # noqa: E731
    for case, dtype in text.progress(todo, f"bench {knobs}", lambda item: f"{item[0]} {item[1]}", seconds=guess):
        found["rows"] += measure.Measured(case, dtype, options, ceilings).rows(wanted)
        if options.out:
            store.save(Path(options.out) / "report.json", report)


def add_arguments(subparsers):
    parser = subparsers.add_parser(
        "bench",
        help="time every op against PyTorch and other rivals, interleaved, with the noise beside it",
        epilog=f"words with options of their own: {', '.join(f'fastllm bench {word}' for word in sorted(WORDS))}",
    )
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
    size.add_argument("--full", action="store_true", help="more rounds, every rival, warm and cold cache")
    words = text.some_of((*rivals.GROUPS, *rivals.RIVALS))
    parser.add_argument(
        "--rivals",
        type=words,
        help=f"quick (default): those that start at once; all (with --full); or some of {', '.join(rivals.RIVALS)}",
    )
    parser.add_argument("--cache", type=text.some_of(CACHES), help="warm (default), cold: empty before every call")
    parser.add_argument("--rounds", type=int, help="how many (default 15; 7 with --quick, 41 with --full)")
    parser.add_argument("--block-ms", type=float, default=20.0, help="how long one sample lasts (default 20)")
    parser.add_argument(
        "--patience",
        type=float,
        default=2.0,
        metavar="S",
        help="seconds of a rival's calls in a row; a slower one has fewer samples, or a lower bound (default 2)",
    )
    parser.add_argument("--knobs", choices=("stock", "tuned", "both"), default="stock")
    parser.add_argument("--threads", type=int, metavar="N", help="of PyTorch and of the kernels (default: as it is)")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--out", metavar="DIR", help="write report.json, report.csv and report.html there")
    parser.add_argument("--resume", action="store_true", help="continue the report in --out DIR")
    parser.add_argument("--base", metavar="REF|FILE", help="say what got slower since that report, or that git ref's")
    parser.add_argument("--fail-on-regression", action="store_true", help="exit code 1 if something did")
    parser.add_argument(
        "--tune", action="store_true", help="measure where our linear is the faster one; write the table"
    )
    parser.set_defaults(run=execute)


def complete(options):
    """What is not given gets its value; what cannot be is a ValueError."""
    known = sorted({case.op for case in cases.BENCH})
    if unknown := sorted(set(options.ops) - set(known)):
        raise ValueError(f"bench: unknown op {', '.join(unknown)}; there are {', '.join(known)}")
    if options.rounds is None:
        options.rounds = 7 if options.quick else 41 if options.full else 15
    options.rivals = options.rivals or (["all"] if options.full else ["quick"])
    options.cache = options.cache or (list(CACHES) if options.full else ["warm"])
    for name in ("rounds", "block_ms", "patience"):
        if not getattr(options, name) > 0:
            raise ValueError(f"bench: {name.replace('_', '-')} must be positive, got {getattr(options, name)}")
    if options.threads is not None and options.threads < 1:
        raise ValueError(f"bench: threads must be positive, got {options.threads}")
    for given, needed in (("resume", "out"), ("fail_on_regression", "base")):
        if getattr(options, given) and not getattr(options, needed):
            raise ValueError(f"bench: --{given.replace('_', '-')} needs --{needed}")


def execute(options) -> int:
    if options.tune:
        if options.ops not in ([], ["linear"]):
            raise ValueError(f"bench --tune: only linear has a table, got {', '.join(options.ops)}")
        return tune_linear.main(options.dtype)
    complete(options)
    if options.threads:
        torch.set_num_threads(options.threads)
    base = compare.base(options.base, store.environment()) if options.base else None  # before an hour is spent
    report = run(options)
    if base:
        name, earlier = base
        report["base"] = compare.compare(report, earlier, name)
    show.report(report)
    if options.out:
        show.write(Path(options.out), report)
    if report["interrupted"]:
        return 130
    wrong = any(row["wrong"] for found in report["runs"].values() for row in found["rows"])
    return int(wrong or bool(options.fail_on_regression and compare.regressed(report["base"])))


def main(arguments=None) -> int:
    from fastllm.cli import main

    return main(["bench", *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    sys.exit(main())
