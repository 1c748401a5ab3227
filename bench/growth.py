"""`fastllm bench scaling`: how cost grows over sequence length, batch, vocabulary, threads and ranks, with exponents.

Each point is measured as the rows of the bench are; a training step on several ranks as bench/ranks.py says. An
exponent is the slope of log time, or of log memory, over log size on the larger half of the sizes (three at least,
where there are so many), fitted once per round: the median and the 20th and 80th percentile are those of the rounds'
slopes. A size that took too long for as many rounds lends the others its own again.
"""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from fastllm import text, verify
from fastllm.bench import cases, measure, memory, ranks, show, store, timing

ALL = ("forward", "both")
GROWTH = 4.0  # what the next point of a rival costs at most, in times of the last one


@dataclass(frozen=True)
class Curve:
    """`case(x)` for each x of `sizes`; None stands for the numbers of threads that this process may use.

    Where the axis is "ranks", `case(x)` is what bench/ranks.py is told, in x processes.
    """

    name: str
    axis: str
    title: str
    says: str  # what the axis is
    case: Callable
    sizes: list | None
    passes: tuple = ALL
    rivals: tuple = ("torch", "naive")

    def points(self, most) -> list[int]:
        if self.sizes is None:
            return sorted({*doubling(1, timing.cores()), timing.cores()})
        return [x for x in self.sizes if most is None or x <= most] or self.sizes[:1]


def doubling(first: int, last: int) -> list[int]:
    return [first << n for n in range(int(math.log2(last / first)) + 1)]


CURVES = [
    Curve(
        "attention-T",
        "T",
        "attention, causal, 1x2xTx64",
        "queries and keys",
        lambda T: cases.attention(1, 2, T, 64, causal=True),
        doubling(128, 32768),
    ),
    Curve(
        "window-T",
        "T",
        "attention, window of 512, 1x2xTx64",
        "queries and keys",
        lambda T: cases.attention(1, 2, T, 64, window=(511, 0)),
        doubling(128, 32768),
    ),
    Curve(
        "decode-S",
        "S",
        "a step of decoding, 1x32/8x1/Sx128",
        "keys in the cache",
        lambda S: cases.attention(1, 32, 1, 128, Hkv=8, S=S),
        doubling(256, 65536),
        ("forward",),
    ),
    Curve(
        "attention-B",
        "B",
        "attention, Bx12x128x64",
        "sequences",
        lambda B: cases.attention(B, 12, 128, 64),
        doubling(1, 64),
    ),
    Curve(
        "rms_norm-B",
        "B",
        "rms_norm, B sequences of 128x768",
        "sequences",
        lambda B: cases.norm("rms_norm", 128 * B, 768),
        doubling(1, 256),
    ),
    Curve(
        "cross_entropy-V",
        "V",
        "cross_entropy, 128xV",
        "vocabulary",
        lambda V: cases.cross_entropy(128, V),
        doubling(1024, 262144),
    ),
    Curve(
        "linear_cross_entropy-V",
        "V",
        "linear_cross_entropy, 256x256xV",
        "vocabulary",
        lambda V: cases.linear_cross_entropy(256, 256, V),
        doubling(1024, 262144),
    ),
    Curve(
        "attention-threads",
        "threads",
        "attention, causal, 1x8x1024x64",
        "of PyTorch and of the kernels",
        lambda threads: cases.attention(1, 8, 1024, 64, causal=True),
        None,
        rivals=("torch",),
    ),
    Curve(
        "layer_norm-threads",
        "threads",
        "layer_norm, 8192x2048",
        "of PyTorch and of the kernels",
        lambda threads: cases.norm("layer_norm", 8192, 2048),
        None,
        rivals=("torch",),
    ),
    *(
        Curve(
            f"{name}-ranks",
            "ranks",
            f"a training step, {title}, {ranks.SIZES['batch']}x{ranks.SIZES['length']} tokens in all",
            "processes that share one machine's cores",
            arguments,
            doubling(1, 8),
            ("step",),
            rivals,
        )
        for name, title, arguments, rivals in (
            ("ddp", "DDP", lambda count: ["--parallel", "ddp"], ("naive",)),
            ("fsdp", "FSDP2", lambda count: ["--parallel", "fsdp"], ("naive",)),
            ("sequence", "ring attention", lambda count: ["--sequence-ranks", str(count)], ()),
        )
    ),
]


def point(curve, x, dtype, passes, options, earlier) -> dict:
    """The time and memory of ours and of the rivals at one size; `earlier` are the smaller sizes."""
    case = curve.case(x)
    before = torch.get_num_threads()
    torch.set_num_threads(x if curve.axis == "threads" else before)

    def tries(name):  # a call that takes as much of the limit as a round does is made once
        last = earlier[-1]["ms"].get(name, {"median": 0.0})["median"] if earlier else 0.0
        return 1 if last * GROWTH > 1e3 * options.limit_s / options.rounds else memory.TRIES

    try:
        functions = {"ours": case.ours} | {name: getattr(case, name) for name in curve.rivals}
        left_out = {name: why for name in curve.rivals if (why := too_much(name, earlier, options))}
        inputs = case.inputs(dtype)
        calls = {
            name: measure.contender(function, inputs, passes)
            for name, function in functions.items()
            if name not in left_out
        }
        peaks = {} if memory.why_not() else {name: memory.peak(call, tries=tries(name)) for name, call in calls.items()}
        samples, foreign = timing.interleave(calls, options.rounds, options.block_ms / 1e3, patience_s=options.limit_s)
    finally:
        torch.set_num_threads(before)
    ms = {name: vars(timing.Spread.of([1e3 * s for s in found])) for name, found in samples.items()}
    return {"x": x, "ms": ms, "memory_bytes": peaks, "left_out": left_out, "foreign": foreign, "samples_s": samples}


def too_much(name, earlier, options) -> str | None:
    """Why a contender is not measured at the next size, foreseen from the last one."""
    if not earlier:
        return None
    last = earlier[-1]
    if name in last["left_out"]:
        return last["left_out"][name]
    seconds = GROWTH * last["ms"][name]["median"] / 1e3
    if seconds > options.limit_s:
        return f"a call beyond {last['x']} would take up to {seconds:.0f} s (--limit-s)"
    peak = GROWTH * last["memory_bytes"].get(name, 0)
    if peak > options.limit_gb * 1e9:
        return f"a call beyond {last['x']} would take up to {peak / 1e9:.0f} GB (--limit-gb)"
    return None


def exponents(points, what="ms") -> dict:
    """Contender -> the slope of log `what` over log size, of its larger half of sizes, as a spread over rounds."""
    found = {}
    measured = [(point["x"], point.get("samples_s" if what == "ms" else what, {})) for point in points]
    for name in dict.fromkeys(name for _, values in measured for name in values):
        at = [(x, values[name]) for x, values in measured if values.get(name)]  # 0 has no logarithm
        at = [(x, value if isinstance(value, list) else [value]) for x, value in at]
        at = at[-max(3, math.ceil(len(at) / 2)) :]
        if len(at) < 2:
            continue
        logs = [math.log(x) for x, _ in at]
        rounds = max(len(samples) for _, samples in at)
        times = [[math.log(samples[i % len(samples)]) for _, samples in at] for i in range(rounds)]
        slopes = [statistics.linear_regression(logs, each).slope for each in times]
        found[name] = vars(timing.Spread.of(slopes)) | {"from": at[0][0]}
    return found


def begun(options) -> dict:
    fresh = {"schema": store.SCHEMA, "environment": store.environment(), "options": kept(options), "curves": []}
    path = Path(options.out) / "scaling.json" if options.out else None
    return store.resumed(path, fresh) if options.resume and path.exists() else fresh


def kept(options) -> dict:
    return {name: getattr(options, name) for name in ("rounds", "block_ms", "limit_s", "limit_gb")}


def run(options) -> dict:
    """Measure the chosen curves; an interrupt keeps what is done, and every point is saved at once."""
    report = begun(options) | {"interrupted": True}
    done = {(c["name"], c["dtype"], c["pass"]): c for c in report["curves"]}
    todo = []
    for curve in (curve for curve in CURVES if not options.curves or curve.name in options.curves):
        for dtype in options.dtype if curve.axis != "ranks" else ["float32"]:
            for passes in curve.passes:
                have = done.get((curve.name, dtype, passes), {"points": []})
                xs = {point["x"] for point in have["points"]}
                todo += [(curve, dtype, passes, x) for x in curve.points(options.max) if x not in xs]
    rates = {dtype: timing.product_rate(getattr(torch, dtype)) for dtype in options.dtype} if todo else {}
    named = lambda at: f"{at[0].name} {at[1]} {at[2]} {at[0].axis} {at[3]}"  # noqa: E731
    try:
        for curve, dtype, passes, x in text.progress(
            todo, "scaling", named, seconds=lambda at: seconds(at, options, rates)
        ):
            add(report, curve, dtype, passes, x, options)
            if options.out:
                store.save(Path(options.out) / "scaling.json", report)
        report["interrupted"] = False
    except KeyboardInterrupt:
        pass
    return report


def add(report, curve, dtype, passes, x, options):
    """One more point of a curve. Correctness first: a curve whose smallest size is wrong is never timed."""
    about = {"name": curve.name, "dtype": dtype, "pass": passes}
    found = next((c for c in report["curves"] if about.items() <= c.items()), None)
    if found is None:
        wrong = wrong_at(curve, curve.points(options.max)[0], getattr(torch, dtype))
        found = about | {"axis": curve.axis, "title": curve.title, "says": curve.says, "wrong": wrong}
        found |= {"stopped": None, "points": []}
        report["curves"].append(found)
    if curve.axis != "ranks":  # where the work is the same at every size
        found["stopped"] = too_much("ours", found["points"], options)  # then there is nothing to hold rivals against
    if not found["wrong"] and not found["stopped"]:
        measured = ranks.point if curve.axis == "ranks" else point
        try:
            found["points"].append(measured(curve, x, getattr(torch, dtype), passes, options, found["points"]))
        except ranks.Failed as problem:
            found["stopped"] = str(problem)
        found["points"].sort(key=lambda point: point["x"])
    found["exponents"] = exponents(found["points"])
    left = {f"{name}: {why}" for point in found["points"] for name, why in point["left_out"].items()}
    left |= {f"ours: {found['stopped']}"} if found["stopped"] else set()
    found["missing"] = sorted(left) + [f"WRONG, so not timed: {found['wrong']}"] * bool(found["wrong"])


def wrong_at(curve, x, dtype) -> str:
    """What is wrong with the results at one size, or ""; bench/ranks.py looks at its steps itself."""
    if curve.axis == "ranks":
        return ""
    bad = [row for row in verify.check(curve.case(x), dtype) if row.accuracy.problem and not row.fallback]
    return "; ".join(f"{row.result}: {row.accuracy.problem}" for row in bad)


def seconds(at, options, rates) -> float:
    """About how long a point takes, for the progress line: at the rate of PyTorch's products and at 10 GB/s."""
    curve, dtype, passes, x = at
    if curve.axis == "ranks":
        return 8.0 + 6.0 * x  # each process imports PyTorch
    case = curve.case(x)
    block, moving = options.block_ms / 1e3, case.bytes(passes, getattr(torch, dtype)) / 1e10
    total = 0.1
    for rate in [max(rates.values()), *(rates[dtype] for _ in curve.rivals)]:
        once = max(case.flops[passes] / rate, 1.5 * moving)
        if once <= options.limit_s:
            total += min(
                (options.rounds + 6) * max(block, once), max(options.rounds * block, options.limit_s) + 3 * once
            )
    return total


HEADER = ("curve", "dtype", "pass", "size", "ms", "p20-p80", "MB", "vs torch", "vs naive", "exponent")
GROWING = {"ms": "time", "memory_bytes": "memory", "sent_bytes": "what a rank sends"}


def cells(curve, point) -> tuple[str, ...]:
    ms, peak = point["ms"]["ours"], point["memory_bytes"].get("ours")
    versus = []
    for name in ("torch", "naive"):
        if name in point["samples_s"]:
            ratio = timing.ratios(point["samples_s"][name], point["samples_s"]["ours"])
            versus.append(f"{ratio.median:.2f}x ({ratio.p20:.2f}-{ratio.p80:.2f})")
        else:
            versus.append("-")
    e = curve["exponents"].get("ours") if point is curve["points"][-1] else None
    times = f"{ms['median']:.3f}", f"{ms['p20']:.3f}-{ms['p80']:.3f}"
    size = "-" if peak is None else f"{peak / 1e6:.1f}"
    about = curve["name"], curve["dtype"], curve["pass"], f"{curve['axis']} {point['x']}"
    return *about, *times, size, *versus, fitted(curve, e) if e else ""


def fitted(curve, e) -> str:
    """An exponent, with its spread where there are several rounds."""
    spread = f" ({e['p20']:.2f} to {e['p80']:.2f})" * (e["p20"] < e["p80"])
    return f"{curve['axis']}^{e['median']:.2f}{spread}"


def growing(curve) -> dict[str, dict]:
    """What was measured along a curve -> contender -> how it grows."""
    found = {word: exponents(curve["points"], what) for what, word in GROWING.items()}
    return {word: by for word, by in found.items() if by}


def printed(report):
    text.show(HEADER, [cells(curve, point) for curve in report["curves"] for point in curve["points"]])
    for curve in report["curves"]:
        about = f"{curve['name']} {curve['dtype']} {curve['pass']}"
        for line in curve["missing"]:
            print(f"{about}: {line}")
        for word, by in growing(curve).items():
            print(f"{about}: {word} grows as {', '.join(f'{name} {fitted(curve, e)}' for name, e in by.items())}")


def configure(parser):
    names = [curve.name for curve in CURVES]
    parser.add_argument("curves", nargs="*", metavar="curve", help=f"of {', '.join(names)} (default: all)")
    dtypes = text.some_of(verify.DTYPES)
    parser.add_argument("--dtype", type=dtypes, default=["float32", "bfloat16"], help="default float32,bfloat16")
    parser.add_argument("--max", type=int, metavar="SIZE", help="leave larger sizes out")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--block-ms", type=float, default=20.0, help="how long one sample lasts (default 20)")
    parser.add_argument(
        "--limit-s",
        type=float,
        default=4.0,
        help="a call, and a rival's rounds at one size, may take so long (default 4)",
    )
    parser.add_argument("--limit-gb", type=float, default=4.0, help="and so much memory (default 4)")
    parser.add_argument("--out", metavar="DIR", help="write scaling.json, and the curves into report.html, there")
    parser.add_argument("--resume", action="store_true", help="continue what is in --out DIR")
    parser.set_defaults(run=execute)


def execute(options) -> int:
    if unknown := sorted(set(options.curves) - {curve.name for curve in CURVES}):
        raise ValueError(
            f"bench scaling: unknown curve {', '.join(unknown)}; there are {', '.join(c.name for c in CURVES)}"
        )
    if options.rounds < 1 or options.block_ms <= 0:
        raise ValueError(
            f"bench scaling: rounds and block-ms must be positive, got {options.rounds} and {options.block_ms}"
        )
    if options.resume and not options.out:
        raise ValueError("bench scaling: --resume needs --out")
    report = run(options)
    printed(report)
    if options.out:
        store.save(Path(options.out) / "scaling.json", report)
        print(f"wrote {Path(options.out) / 'scaling.json'}")
        show.write_page(Path(options.out))
    wrong = any(curve["wrong"] for curve in report["curves"])
    return 130 if report["interrupted"] else int(wrong)
