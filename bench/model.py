"""`fastllm bench model NAME|PATH`: a whole model before and after `fastllm.accelerate`, beside whoever else runs it.

All contenders share one set of weights and are given the same inputs. What each computes is held against fp64 first:
fastllm may be hardly further from it than PyTorch in the same dtype (`fastllm.verify.accuracy`), and a wrong result is
never timed. Then they run in turn, round after round, in one process; fastllm twice a round, which is the noise.
"""

import argparse
import copy
import json
from pathlib import Path

import torch

import fastllm
from fastllm import text, verify
from fastllm.bench import memory, store, subjects, tasks, timing
from fastllm.bench.show import standing

TASKS = {"encoder": ("encode",), "decoder": ("prefill", "decode", "train")}
RIVALS = ("eager", "sdpa", "compile", "onnxruntime")
PYTORCH = ("eager", "sdpa")  # what says how exact fastllm has to be


def works(subject, models, task, options):
    """The sizes of one task, one after the other."""
    length = options.length or subject.length
    if task == "encode":
        for batch in options.batch or (1, 8, 64):
            yield tasks.encode(subject, batch, options.sentences, models, options.rivals)
    elif task == "prefill":
        yield tasks.prefill(subject, length)
    elif task == "decode" and not subject.is_reference:
        yield tasks.decode(subject, length, models)
    elif task == "train":
        for batch in options.batch or (subject.batch,):
            yield tasks.train(subject, batch, length, getattr(torch, options.dtype), models)


def result_of(call):
    return getattr(call, "checked", call)()


def calls_of(work, models) -> tuple[dict, dict, dict]:
    """Contender -> its call, contender -> what that gives, and contender -> reason for those that cannot."""
    makers = {name: (lambda model=model: work.call(model)) for name, model in models.items()} | work.extra
    found, results, missing = {}, {}, {}
    for name, make in makers.items():
        try:
            call = make()
            results[name] = result_of(call)
            found[name] = call
        except Exception as problem:  # a rival may fail in any way; it is then a missing column that says why
            if name == "fastllm":
                raise
            missing[name] = f"{type(problem).__name__}: {str(problem).strip().partition(chr(10))[0][:200]}"
    return found, results, missing


def check(work, results, exact) -> tuple[dict, str]:
    """Contender -> its error, the norm over that of the fp64 truth; and what is wrong with fastllm's, or "".

    PyTorch is eager and sdpa alike: the one that is further from the truth is the peer of the rule.
    """
    truth = result_of(work.call(exact)).double()
    errors = {name: float((y.double() - truth).norm() / truth.norm()) for name, y in results.items()}
    peer = results[max((name for name in PYTORCH if name in results), key=errors.get)]
    ours = [name for name in results if name.startswith("fastllm")]
    problems = {name: verify.accuracy(results[name].to(peer.dtype), peer, truth).problem for name in ours}
    return errors, "; ".join(f"{name}: {problem}" for name, problem in problems.items() if problem)


def by_op(explanation) -> list[tuple]:
    """`fastllm.explain` of a call, all shapes of an op in one line, what takes longest first."""
    groups = {}
    for call in explanation.calls:
        key = call.op, call.kernel, call.reason or "-"
        n, seconds = groups.get(key, (0, 0.0))
        groups[key] = n + 1, seconds + call.seconds
    found = [(op, n, kernel, seconds, why) for (op, kernel, why), (n, seconds) in groups.items()]
    found.append(("elsewhere", "-", "PyTorch", explanation.elsewhere, "-"))
    whole = explanation.seconds or 1.0
    found.sort(key=lambda line: -line[3])
    return [(op, n, kernel, f"{1e3 * s:.1f}", f"{s / whole:.0%}", why) for op, n, kernel, s, why in found]


def measure(work, models, exact, options) -> dict:
    with torch.set_grad_enabled(work.task == "train"):
        calls, results, missing = calls_of(work, models)
        errors, wrong = check(work, results, exact)
        del results
        row = {"task": work.task, "size": work.size, "dtype": options.dtype, "unit": work.unit, "error": errors}
        row |= {"missing": missing, "wrong": wrong}
        if wrong:
            return row
        row["explained"] = by_op(fastllm.explain(calls["fastllm"]))
        peaks = {} if memory.why_not() else {name: memory.peak(call, tries=1) for name, call in calls.items()}
        row["peak_bytes"] = peaks
        again = {"fastllm again": calls["fastllm"]}
        samples, foreign = timing.interleave(
            {**calls, **again}, options.rounds, options.block_ms / 1e3, patience_s=options.patience
        )
    strays = timing.noise(samples["fastllm"], samples["fastllm again"])
    spreads = {name: timing.Spread.of(samples[name]) for name in calls}
    versus = {name: timing.ratios(samples[name], samples["fastllm"]) for name in calls if name != "fastllm"}
    return row | {
        "ms": {name: {key: value * 1e3 for key, value in vars(spread).items()} for name, spread in spreads.items()},
        "rate": {name: work.amount / spread.median for name, spread in spreads.items()},
        "ratio": {
            name: vars(ratio) | {"tie": timing.is_tie(ratio, strays), "n": len(samples[name]), "at_least": False}
            for name, ratio in versus.items()
        },
        "noise": strays,
        "foreign": foreign,
        "samples_s": samples,
    }


def measure_model(options, rows):
    """Append to `rows` what `options` names of a model; returns a description of it."""
    dtype, subject = getattr(torch, options.dtype), subjects.load(options.model)
    chosen = options.tasks or TASKS[subject.kind]
    if wrong := [task for task in chosen if task not in TASKS[subject.kind]]:
        raise ValueError(
            f"bench model: there is no {wrong[0]} of {options.model}, which is for {', '.join(TASKS[subject.kind])}"
        )
    for task in text.progress(sorted(chosen, key=TASKS[subject.kind].index), f"bench model {options.model}"):
        training = task == "train"
        if not training:  # a training step has fp32 weights, and autocast where another dtype is asked for
            subject.model.to(dtype)
        elif dtype != torch.float32 and len(chosen) > 1:
            subject = subjects.load(options.model)
        subject.model.train(training)
        models = subject.variants(options.rivals)
        exact = copy.deepcopy(subject.model).double()
        if not subject.is_reference:
            exact.set_attn_implementation("eager")
        for work in works(subject, models, task, options):
            rows.append(measure(work, models, exact, options))
    return {"name": subject.name, "source": subject.source, "kind": subject.kind}


def measure_all(options) -> dict:
    """A report; an interrupt keeps what is done."""
    report = {"environment": store.environment(), "options": {k: v for k, v in vars(options).items() if k != "run"}}
    report |= {"interrupted": False, "runs": {}}
    before = torch.get_float32_matmul_precision()
    try:
        for knobs in ("stock", "tuned"):  # tuned last: what glibc is told cannot be taken back
            if options.knobs in (knobs, "both"):
                turned = timing.tune() if knobs == "tuned" else []
                found = report["runs"][knobs] = {"knobs": turned, "rows": []}
                report["model"] = measure_model(options, found["rows"])
    except KeyboardInterrupt:
        report["interrupted"] = True
    finally:
        torch.set_float32_matmul_precision(before)
    return report


# --- showing ---

HEADER = ("task", "who", "ms", "p20-p80", "rate", "peak MB", "error", "fastllm is faster by")


def lines(row):
    """The table of one row: a line for everybody who takes part."""
    order = sorted(row["ms"], key=lambda name: (not name.startswith("fastllm"), name))
    for name in order:
        ms, ratio = row["ms"][name], row["ratio"].get(name)
        shown = standing(ratio) if ratio else "-"
        held = f"{row['peak_bytes'][name] / 2**20:.0f}" if name in row["peak_bytes"] else "-"
        times = f"{ms['median']:.1f}", f"{ms['p20']:.1f}-{ms['p80']:.1f}"
        yield row["task"], name, *times, f"{row['rate'][name]:.1f}", held, f"{row['error'][name]:.1e}", shown


def show(report):
    for knobs, found in report["runs"].items():
        turned = f": {'; '.join(found['knobs'])}" if found["knobs"] else ""
        for row in found["rows"]:
            title = f"{row['task']} {row['size']}, {row['dtype']}, {row['unit']}, {knobs} PyTorch{turned}"
            if row["wrong"]:
                print(f"{title}\nWRONG, so not timed: {row['wrong']}\n")
                continue
            text.show(HEADER, list(lines(row)), title)
            print(f"noise {row['noise']:.1%}; others took {max(row['foreign']):.0%} of the machine at most")
            for name, why in row["missing"].items():
                print(f"missing {name}: {why}")
            text.show(("op", "calls", "kernel", "ms", "time", "why"), row["explained"], "where fastllm's time goes")
            print()
    print(
        "faster by: their time over fastllm's, median (p20-p80) of paired rounds. noise: fastllm against itself; a"
        " difference below it is a tie. n=1: one call, as it took longer than --patience.\nerror: norm of the"
        " difference from fp64, over the norm of that. peak: resident memory of a call, beyond what was there before."
    )


# --- the command ---


def positive(given: str) -> int:
    if not given.isdecimal() or int(given) < 1:
        raise argparse.ArgumentTypeError(f"{given!r} is not a number from 1 on")
    return int(given)


def sizes(given: str) -> list[int]:
    return [positive(one) for one in given.split(",")]


def configure(parser):
    every = tuple(task for kind in TASKS.values() for task in kind)
    parser.add_argument("model", metavar="NAME|PATH", help=f"{', '.join(subjects.NAMES)}, or a Hugging Face folder")
    parser.add_argument("--tasks", type=text.some_of(every), help=f"some of {', '.join(every)} (default: all it has)")
    parser.add_argument("--rivals", type=text.some_of(RIVALS), default=list(RIVALS), help=f"default {','.join(RIVALS)}")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="in training: of autocast")
    parser.add_argument("--batch", type=sizes, help="sentences at a time (default 1,8,64), or in a training step")
    parser.add_argument("--length", type=positive, help="of a prompt, or of a sequence in training")
    parser.add_argument("--sentences", type=positive, default=64, help="how many are encoded (default 64)")
    parser.add_argument("--rounds", type=positive, default=7, help="default 7")
    parser.add_argument("--block-ms", type=float, default=20.0, help="how long one sample lasts at least (default 20)")
    parser.add_argument("--patience", type=float, default=20.0, help="seconds of a contender's rounds (default 20)")
    parser.add_argument("--knobs", choices=("stock", "tuned", "both"), default="stock")
    parser.add_argument("--out", metavar="DIR", help="write model.json, with raw samples, there")
    parser.set_defaults(run=execute)


def execute(options) -> int:
    if not set(PYTORCH) & set(options.rivals):
        raise ValueError("bench model: --rivals must have eager or sdpa, which say how exact fastllm has to be")
    report = measure_all(options)
    show(report)
    if options.out:
        folder = Path(options.out)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model.json").write_text(json.dumps(report, indent=1) + "\n")
        print(f"wrote {folder / 'model.json'}")
    wrong = [row for found in report["runs"].values() for row in found["rows"] if row["wrong"]]
    return 130 if report["interrupted"] else int(bool(wrong))
