"""The demo's result as tables, plots and one self-contained HTML page."""

import math
from pathlib import Path

from fastllm.drawing import INK, LEGEND, NAIVE, OURS, figure, svg
from fastllm.llm import require

SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}
TASKS = (("classifier", "classifier"), ("language", "language model"))


def counted(rows) -> tuple[int, int, int]:
    """How many results of the verification passed, failed, and ran on plain PyTorch."""
    failed = sum(row["verdict"].startswith("FAIL") for row in rows)
    plain = sum(bool(row["fallback"]) for row in rows)
    return len(rows) - failed - plain, failed, plain


def worst_of_each_op(rows) -> list[dict]:
    """Per op and dtype, the result that is closest to breaking the rule."""
    chosen = {}
    for row in rows:
        key = row["op"], row["dtype"]
        if key not in chosen or row["accuracy"]["share"] > chosen[key]["accuracy"]["share"]:
            chosen[key] = row
    return list(chosen.values())


def speed_row(name, found) -> list[str]:
    first, second = found["tokens_per_s"].values()
    ratio = found["ratio"]
    return [
        name,
        found["shape"],
        f"{first['median']:,.0f}",
        f"{second['median']:,.0f}",
        f"{ratio['median']:.2f}x",
        f"{ratio['p20']:.2f} to {ratio['p80']:.2f}",
        f"{found['largest_difference']:.1e}",
    ]


def tables(result) -> list[dict]:
    """Title, header and rows of everything that the demo prints; the README takes them too."""
    steps = " and ".join(str(result[key]["steps"]) for key, _ in TASKS)
    data, prose = result["data"]["classifier"], result["data"]["language"]
    scores, perplexity = result["classifier_training"]["test"], result["language_training"]["test"]
    errors = []
    for row in worst_of_each_op(result["verify"]):
        found = row["accuracy"]
        where = f"{row['result']}, {row['case']}"
        numbers = f"{found['norm']:.1e}", f"{found['peer_norm']:.1e}", f"{found['share']:.0%}"
        errors.append([row["op"], row["dtype"], where, *numbers, row["kernel"], row["verdict"]])
    return [
        dict(
            title="Error against fp64: of each op and dtype, the result closest to what the rule allows",
            header=["op", "dtype", "result", "error", "PyTorch's", "of allowed", "kernel", "verdict"],
            rows=errors,
        ),
        dict(
            title=f"Training, {steps} steps each, blocks of both in turn, same seed and batches, dropout 0",
            header=[
                "model",
                "batch",
                "naive PyTorch, tokens/s",
                "fastllm, tokens/s",
                "ratio, median of blocks",
                "ratio, 20th to 80th percentile",
                "largest loss difference",
            ],
            rows=[speed_row(name, result[key]) for key, name in TASKS],
        ),
        dict(
            title=f"Classifier trained from scratch on {data['name']}, {data['splits']['test']} test texts",
            header=["", "accuracy", "precision", "recall", "F1 (macro)"],
            rows=[
                [who, *(f"{found[name]:.3f}" for name in ("accuracy", "precision", "recall", "f1"))]
                for who, found in scores.items()
            ],
        ),
        dict(
            title=f"Byte-level language model trained from scratch on {prose['name']}, test text",
            header=["", "perplexity per byte", "bits per byte"],
            rows=[[who, f"{f['perplexity']:.2f}", f"{f['bits_per_byte']:.3f}"] for who, f in perplexity.items()],
        ),
    ]


def summary(result) -> list[str]:
    """The findings in sentences, good or bad."""
    passed, failed, plain = counted(result["verify"])
    lines = [f"{passed} results of the kernels are as accurate as PyTorch's, {failed} are not."]
    if plain:
        reasons = dict.fromkeys(row["fallback"] for row in result["verify"] if row["fallback"])
        lines[0] += f" {plain} ran on plain PyTorch: {'; '.join(reasons)}."
    for key, name in TASKS:
        found, trained = result[key], result[f"{key}_training"]["history"]
        ratio = found["ratio"]["median"]
        word = "faster" if ratio >= 1 else "slower"
        lines.append(
            f"The {name} trains {max(ratio, 1 / ratio):.2f} times {word} on fastllm than on naive PyTorch here; over "
            f"{found['steps']} steps the two losses differ by {found['largest_difference']:.1e} at most. Trained on: "
            f"{len(trained['loss'])} steps at {trained['tokens_per_s']:,.0f} tokens/s, {trained['stopped']}."
        )
    lines += [meta["fallback"] for meta in result["data"].values() if "fallback" in meta]
    if result["quick"]:
        lines.append("This was --quick: sizes are too small for a measurement.")
    return lines


def loss_plot(found, name) -> str:
    """Both losses over the steps, and below them how far they are apart."""
    made, (top, bottom) = figure(5.2, 3.6, 2, sharex=True, gridspec_kw={"height_ratios": [3, 1]})
    (first, a), (second, b) = found["loss"].items()
    steps = range(1, len(a) + 1)
    top.plot(steps, a, color=NAIVE, linewidth=4, alpha=0.55, label=first, solid_capstyle="round")
    top.plot(steps, b, color=OURS, linewidth=1.2, label=second)
    top.set_ylabel("training loss")
    top.legend(ncols=2, **LEGEND)
    apart = [(n, abs(x - y)) for n, x, y in zip(steps, a, b, strict=True) if x != y]  # 0 has no logarithm
    bottom.set_yscale("log")
    bottom.plot([n for n, _ in apart], [d for _, d in apart], "o", color=OURS, markersize=2.5)
    bottom.set_ylim(1e-9, max([1e-5, *(10 * d for _, d in apart)]))
    bottom.set_ylabel("difference")
    bottom.xaxis.set_major_locator(require("matplotlib.ticker", "matplotlib").MaxNLocator(integer=True))
    bottom.set_xlabel("step")
    made.align_ylabels()
    return svg(made, f"loss {name}")


def speed_plot(result) -> str:
    """The median of the blocks' ratios with their spread, naive PyTorch being 1; the numbers are median tokens/s.

    Ratios of one block at a time, because the batches of two blocks differ in length and the machine in its load.
    """
    made, axis = figure(5.2, 2.6)
    labels = []
    for n, (key, name) in enumerate(TASKS):
        ratio = result[key]["ratio"]
        same = dict(median=1.0, p20=1.0, p80=1.0)
        speeds = result[key]["tokens_per_s"].items()
        for offset, colour, bar, (who, speed) in zip((0.19, -0.19), (NAIVE, OURS), (same, ratio), speeds, strict=True):
            at, width = len(TASKS) - 1 - n + offset, bar["median"]
            axis.barh(at, width, 0.34, color=colour, label=who if n == 0 else None)
            if bar is ratio:
                error = [[width - bar["p20"]], [bar["p80"] - width]]
                axis.errorbar(width, at, xerr=error, color=INK, linewidth=1, capsize=2.5)
            axis.annotate(
                f"{speed['median']:,.0f} tokens/s",
                (bar["p80"], at),
                (6, 0),
                textcoords="offset points",
                va="center",
                color=INK,
            )
        labels.append(name)
    axis.set_yticks(range(len(labels)), reversed(labels), color=INK)
    axis.set_xlim(0, axis.get_xlim()[1] * 1.35)
    axis.grid(False, axis="y")
    axis.set_xlabel("training speed, naive PyTorch = 1")
    axis.legend(ncols=2, **LEGEND)
    return svg(made, "speed")


def error_plot(result) -> str:
    """Of each op and dtype, the error closest to the rule beside PyTorch's own on the same input."""
    rows = worst_of_each_op(result["verify"])[::-1]
    made, axis = figure(5.2, 0.8 + 0.36 * len(rows))
    # An exact result has no place on a logarithmic axis: it is drawn at the left edge.
    values = [row["accuracy"][kind] for row in rows for kind in ("norm", "peer_norm")]
    left = 10 ** math.floor(math.log10(min([v for v in values if v > 0], default=1e-8)) - 0.5)
    for offset, colour, kind, label in (
        (0.19, NAIVE, "peer_norm", "PyTorch's kernel"),
        (-0.19, OURS, "norm", "fastllm"),
    ):
        widths = [max(left, row["accuracy"][kind]) for row in rows]
        axis.barh([n + offset for n in range(len(rows))], widths, 0.34, color=colour, label=label)
    axis.set_xscale("log")
    axis.set_xlim(left=left)
    axis.set_ylim(-0.7, len(rows) - 0.3)
    axis.set_yticks(range(len(rows)), [f"{row['op']} {SHORT[row['dtype']]} {row['result']}" for row in rows], color=INK)
    axis.grid(False, axis="y")
    axis.set_xlabel("relative error against fp64")
    axis.legend(ncols=2, **LEGEND | dict(loc="lower right", bbox_to_anchor=(1.0, 1.0)))
    return svg(made, "error")


def training_plot(found, name) -> str:
    """Loss of every step and the validation loss of the long run on the kernels."""
    made, axis = figure(5.2, 3.0)
    history, wide = found["history"], 10
    losses = history["loss"]
    means = [sum(losses[max(0, n - wide) : n]) / min(n, wide) for n in range(1, len(losses) + 1)]
    label = f"training batches, mean of the last {wide}"
    axis.plot(range(1, len(losses) + 1), means, color=NAIVE, linewidth=1.4, label=label)
    evaluations = history["evaluations"]
    steps, losses = [e["step"] for e in evaluations], [e["loss"] for e in evaluations]
    axis.plot(steps, losses, color=OURS, marker="o", markersize=4, linewidth=1.4, label="validation text")
    best = history["best"]
    axis.annotate("kept", (best["step"], best["loss"]), (0, -13), textcoords="offset points", ha="center", color=INK)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("step")
    axis.set_ylabel("loss")
    axis.legend(ncols=2, **LEGEND)
    return svg(made, f"training {name}")


def render(template, **values) -> str:
    """One of the pages in this folder."""
    jinja2 = require("jinja2")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    return environment.get_template(template).render(**values)


def html(result) -> str:
    """The page. Everything is in it: no script, no font, no picture is fetched."""
    require("matplotlib")
    plots = dict(speed=speed_plot(result), error=error_plot(result))
    for key, _ in TASKS:
        plots[key] = loss_plot(result[key], key)
        plots[f"{key}_training"] = training_plot(result[f"{key}_training"], key)
    passed, failed, plain = counted(result["verify"])
    return render(
        "demo.html",
        result=result,
        plots=plots,
        passed=passed,
        failed=failed,
        plain=plain,
        tables=dict(zip(("error", "speed", "scores", "perplexity"), result["tables"], strict=True)),
    )
