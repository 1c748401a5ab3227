"""The figures of the bench's page, drawn from a report and nothing else."""

import math
from statistics import geometric_mean, median

import torch

from fastllm.bench import growth
from fastllm.bench.rivals import RIVALS
from fastllm.bench.show import times
from fastllm.bench.store import untimed
from fastllm.bench.timing import peak_gflop_per_s
from fastllm.drawing import BAD, CARD, GRID, INK, LEGEND, MUTED, NAIVE, OURS, SERIES, figure, svg

WIDTH = 5.4  # inches: two fit beside each other on a wide page, one on a telephone
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
PASSES = {"forward": "forward", "backward": "backward", "both": "both"}
MARKERS = {  # rival -> marker, colour; PyTorch's own kernel is the bar
    "naive": ("o", NAIVE),
    "sdpa-flash": ("D", SERIES[2]),
    "sdpa-math": ("s", SERIES[5]),
    "sdpa-efficient": ("v", SERIES[6]),
    "sdpa-cudnn": ("p", SERIES[7]),
    "compile": ("^", SERIES[1]),
    "onnxruntime": ("P", SERIES[0]),
    "flash-attn-2": ("X", SERIES[4]),
    "flash-attn-3": ("*", SERIES[6]),
    "xformers": ("h", SERIES[7]),
    "liger": ("d", SERIES[3]),
}
BEYOND = 8.0  # times the median ratio to PyTorch: what is further out stands at the edge, with its number
PAPER = dict(facecolor=CARD, edgecolor="none", pad=0.5)  # behind a text that a line would cross


def right(rows, **wanted) -> list[dict]:
    """The rows that were timed and have these values."""
    return [row for row in rows if not untimed(row) and all(row[name] == value for name, value in wanted.items())]


def speed_up(row) -> float | None:
    """PyTorch's time over ours."""
    return row["ratio"]["torch"]["median"] if "torch" in row["ratio"] else None


def is_bound(row) -> bool:
    """Whether that is a lower bound."""
    return row["ratio"]["torch"]["at_least"]


def plain(axis, which="x"):
    """Numbers as people write them on a logarithmic axis."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    one = axis.xaxis if which == "x" else axis.yaxis
    one.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    one.set_minor_formatter(NullFormatter())


def round_numbers(low, high) -> list[float]:
    """The numbers of a logarithmic axis: as round as leaves three of them in view, where any do."""
    fine = [1 + i / 5 for i in range(10)] + [3 + i / 2 for i in range(14)]
    for mantissas in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7), fine):
        inside = [m * 10.0**e for e in range(-6, 10) for m in mantissas if low <= m * 10.0**e <= high]
        if len(inside) >= 3:
            break
    return inside[:: math.ceil(len(inside) / 7)] if inside else []


def ratio_axis(axis, low, high):
    """Ratios on a logarithmic axis with 1 in view, and ticks that are easy to read; returns where the axis ends."""
    from matplotlib.ticker import FixedLocator, NullLocator

    low, high = min(low, 0.8) / 1.12, max(high, 1.6) * 1.12
    axis.set_xscale("log")
    axis.set_xlim(low, high)
    axis.xaxis.set_major_locator(FixedLocator(round_numbers(low, high)))
    axis.xaxis.set_minor_locator(NullLocator())
    plain(axis)
    axis.axvline(1.0, color=MUTED, linewidth=1.2)
    axis.grid(False, axis="y")
    return high


def overview(rows, title) -> str:
    """Every measured row as a dot: right of the line we are faster than PyTorch; the bar is an op's geometric mean."""
    rows = [row for row in right(rows) if speed_up(row)]
    ops = list(dict.fromkeys(row["op"] for row in rows))
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    made, axis = figure(WIDTH, 0.9 + 0.42 * len(ops))
    furthest = BEYOND * max(2.0, median(map(speed_up, rows)))
    edge = ratio_axis(axis, min(map(speed_up, rows)), min(furthest, max(map(speed_up, rows))))
    colours = dict(zip(dtypes, (OURS, SERIES[0], SERIES[1]), strict=False))
    for n, op in enumerate(ops):
        for m, dtype in enumerate(dtypes):
            y = n + 0.32 * (m - (len(dtypes) - 1) / 2)
            found = [speed_up(row) for row in rows if row["op"] == op and row["dtype"] == dtype]
            if found:
                inside = [v for v in found if v <= edge]
                axis.plot(inside, [y] * len(inside), "o", color=colours[dtype], markersize=3.8, alpha=0.6, mew=0)
                if len(inside) < len(found):  # further out than the axis goes
                    axis.plot(edge, y, ">", color=colours[dtype], markersize=6, mew=0, clip_on=False)
                axis.plot(
                    [min(geometric_mean(found), edge)] * 2, [y - 0.15, y + 0.15], color=colours[dtype], linewidth=2.4
                )
    for dtype in dtypes:
        axis.plot([], [], "o", color=colours[dtype], markersize=4, label=SHORT[dtype])
    axis.plot([], [], "|", color=MUTED, markersize=9, markeredgewidth=2.2, label="geometric mean")
    axis.set_ylim(len(ops) - 0.4, -0.6)
    axis.set_yticks(range(len(ops)), ops, color=INK)
    axis.tick_params(axis="y", length=0)
    axis.set_xlabel(title)
    axis.legend(ncols=3, **LEGEND)
    return svg(made, f"overview {title}")


def bars(rows, name) -> str:
    """PyTorch's time over ours, row by row, with the spread; the other rivals as marks; a grey band is the noise."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    each = {case: [row for row in rows if row["case"] == case] for case in cases}
    slots = sum(1.3 + len(found) for found in each.values())
    names = [one for one in RIVALS if any(one in row["ratio"] for row in rows) and one != "torch"]
    tall = math.ceil((len(names) + 1) / 3)
    made, axis = figure(WIDTH, 0.75 + 0.19 * slots + 0.2 * tall)
    bars_to = [row["ratio"]["torch"][p] for row in rows if "torch" in row["ratio"] for p in ("p20", "p80")]
    marks = [ratio["median"] for row in rows for ratio in row["ratio"].values()]
    furthest = BEYOND * max([2.0, *map(median, [bars_to] if bars_to else [])])
    edge = ratio_axis(axis, min([*bars_to, *marks], default=1.0), min(furthest, max([*bars_to, *marks], default=1.0)))
    y, ticks = 0.0, []
    for case, found in each.items():
        axis.text(0.0, y, case, transform=axis.get_yaxis_transform(), va="center", fontsize=9, color=INK, bbox=PAPER)
        y += 1.1
        for row in found:
            one_bar(axis, y, row, edge)
            ticks.append((y, PASSES[row["pass"]] + (" cold" if row["cache"] == "cold" else "")))
            y += 1.0
        y += 0.2
    axis.barh([0], [0], color=OURS, label="PyTorch")
    for one in names:
        marker, colour = MARKERS[one]
        axis.plot([], [], marker, color=colour, markersize=5, mew=0, label=one)
    axis.set_ylim(y, -0.8)
    axis.set_yticks([at for at, _ in ticks], [word for _, word in ticks], fontsize=8.5)
    axis.tick_params(axis="y", length=0)
    axis.set_xlabel("their time over ours (above 1 we are faster)")
    axis.legend(ncols=3, fontsize=9, **LEGEND)
    return svg(made, f"bars {name}")


def one_bar(axis, y, row, edge):
    noise = math.exp(row["noise"])
    axis.barh(y, noise - 1 / noise, 0.9, left=1 / noise, color=GRID, alpha=0.8, linewidth=0)
    ratio = row["ratio"].get("torch")
    if ratio:
        colour = NAIVE if ratio["tie"] else OURS if ratio["median"] > 1 else BAD
        axis.barh(y, ratio["median"] - 1, 0.62, left=1.0, color=colour, linewidth=0)
        if ratio["at_least"] or ratio["median"] > edge:
            axis.plot(min(ratio["median"], edge), y, ">", color=colour, markersize=7, mew=0, clip_on=False)
        elif ratio["n"] > 1:
            spread = [[ratio["median"] - ratio["p20"]], [ratio["p80"] - ratio["median"]]]
            axis.errorbar(ratio["median"], y, xerr=spread, color=INK, linewidth=0.9, capsize=1.8, capthick=0.9)
    others = {name: other for name, other in row["ratio"].items() if name != "torch"}
    beyond = [name for name, other in others.items() if other["median"] > edge / 1.06]
    width = (edge / axis.get_xlim()[0]) ** 0.14  # of a mark and its number, on this axis
    for name, other in others.items():
        at = edge / 1.06 / width ** beyond.index(name) if name in beyond else other["median"]
        other_mark(axis, (at, y), name, other, name in beyond)
    lost = bool(ratio) and not ratio["tie"] and ratio["median"] < 1
    axis.text(
        *(1.01, y, in_short(ratio)),
        transform=axis.get_yaxis_transform(),
        va="center",
        fontsize=8.5,
        color=BAD if lost else INK,
        weight="bold" if lost else "normal",
    )


def other_mark(axis, at, name, ratio, beyond):
    """A rival's mark; one beyond the axis stands at its edge with its number on the left; ">" is a lower bound."""
    marker, colour = MARKERS[name]
    axis.plot(*at, marker, color=colour, markersize=4.8, mec=CARD, mew=0.5, zorder=3)
    said = "> " * ratio["at_least"] + f"{ratio['median']:,.0f}" * beyond
    left = dict(xytext=(-4, 0), ha="right", bbox=PAPER) if beyond else dict(xytext=(4, 0))
    if said:
        where = dict(textcoords="offset points", va="center", annotation_clip=False)
        axis.annotate(said.strip(), at, color=colour, fontsize=7.5, **where, **left)


def in_short(ratio) -> str:
    """PyTorch's ratio beside its bar."""
    if not ratio:
        return "no rival"
    if ratio["tie"]:
        return "tie"
    return "> " * ratio["at_least"] + times(ratio["median"]) + " (n=1)" * (ratio["n"] == 1 and not ratio["at_least"])


def roofline(rows, ceilings, dtype) -> str:
    """Operations a second against operations per byte, under what this machine's memory and arithmetic allow."""
    rows = right(rows, dtype=dtype)
    made, axis = figure(WIDTH, 4.0)
    intensity = [row["flops"] / row["bytes"] for row in rows]
    peak = peak_gflop_per_s(ceilings, getattr(torch, dtype))
    low, high = min(intensity) / 2, max([*intensity, 2 * peak / ceilings["copy_gb_per_s"]]) * 2
    bandwidths = {name: ceilings[key] for name in ("read", "copy") if (key := f"{name}_gb_per_s") in ceilings}
    for name, bandwidth in bandwidths.items():  # older reports have one alone
        style = "-" if name == "read" else "--"
        knee = peak / bandwidth
        axis.plot(
            [low, min(knee, high)], [low * bandwidth, min(knee, high) * bandwidth], style, color=MUTED, linewidth=1.2
        )
    axis.plot([peak / next(iter(bandwidths.values())), high], [peak, peak], color=MUTED, linewidth=1.2)
    axis.annotate(
        f"{peak:,.0f} GFLOP/s", (high, peak), (-4, 5), textcoords="offset points", ha="right", color=MUTED, fontsize=9
    )
    ops = list(dict.fromkeys(row["op"] for row in rows))
    for n, op in enumerate(ops):
        for passes, marker in (("forward", "o"), ("backward", "s"), ("both", "D")):
            at = [(x, row["gflop_per_s"]) for x, row in zip(intensity, rows, strict=True)]
            at = [one for one, row in zip(at, rows, strict=True) if row["op"] == op and row["pass"] == passes]
            axis.plot([x for x, _ in at], [y for _, y in at], marker, **mark(n))
        axis.plot([], [], "o", label=op, **mark(n))
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlim(low, high)
    axis.set_ylim(min(row["gflop_per_s"] for row in rows) / 2, peak * 2)
    plain(axis), plain(axis, "y")
    axis.set_xlabel("operations per byte that must be moved")
    axis.set_ylabel(f"GFLOP/s, {SHORT[dtype]}")
    axis.legend(ncols=3, fontsize=8.5, **LEGEND)
    return svg(made, f"roofline {dtype}")


def mark(n) -> dict:
    """Of the nth op: nine colours, filled first, then open."""
    colour = (OURS, *SERIES)[n % (1 + len(SERIES))]
    filled = n <= len(SERIES)
    return dict(
        color=colour, markersize=5.2, alpha=0.85, mec=colour, mew=0 if filled else 1.2, mfc=colour if filled else CARD
    )


def largest_of_each_op(rows, passes) -> list[dict]:
    chosen = {}
    for row in right(rows, **{"pass": passes, "cache": "warm"}):
        if row["memory_bytes"] and row["bytes"] > chosen.get(row["op"], {"bytes": 0})["bytes"]:
            chosen[row["op"]] = row
    return list(chosen.values())


def memory(rows, dtype) -> str | None:
    """Peak memory of a call beyond its inputs, of the largest case of each op."""
    rows = right(rows, dtype=dtype)
    chosen = largest_of_each_op(rows, "both") or largest_of_each_op(rows, "forward")
    sizes = [size for row in chosen for size in row["memory_bytes"].values() if size]
    if not sizes:  # nobody took a page more, or there is nothing to show
        return None
    made, axis = figure(WIDTH, 0.8 + 0.5 * len(chosen))
    axis.set_xscale("log")
    axis.set_xlim(min(sizes) / 2e6, max(sizes) * 1.6 / 1e6)
    for n, row in enumerate(chosen):
        own = max(row["memory_bytes"]["ours"] / 1e6, min(sizes) / 2e6)
        axis.plot([axis.get_xlim()[0], own], [n + 0.2] * 2, color=OURS, linewidth=5, solid_capstyle="butt")
        for name, size in row["memory_bytes"].items():
            if name == "torch":
                axis.plot(size / 1e6, n + 0.2, "|", color=INK, markersize=11, mew=2)
            elif name != "ours":
                marker, colour = MARKERS[name]
                axis.plot(size / 1e6, n + 0.2, marker, color=colour, markersize=5, mec=CARD, mew=0.5)
        axis.text(
            0.0,
            n - 0.2,
            f"{row['op']} {row['case']}",
            transform=axis.get_yaxis_transform(),
            va="center",
            fontsize=9,
            color=INK,
        )
    axis.barh([0], [0], color=OURS, label="fastllm")
    axis.plot([], [], "|", color=INK, markersize=9, mew=2, label="PyTorch")
    for name in [one for one in RIVALS if one in MARKERS and any(one in row["memory_bytes"] for row in chosen)]:
        axis.plot([], [], MARKERS[name][0], color=MARKERS[name][1], markersize=5, mew=0, label=name)
    axis.set_ylim(len(chosen) - 0.4, -0.6)
    axis.set_yticks([])
    axis.grid(False, axis="y")
    plain(axis)
    axis.set_xlabel(f"MB, {SHORT[dtype]}, logarithmic; shorter is better")
    axis.legend(ncols=3, fontsize=9, **LEGEND)
    return svg(made, f"memory {dtype}")


def errors(rows, dtype) -> str:
    """Error against fp64 of the worst case of each op, ours beside every rival's."""
    worst = {}
    for row in right(rows, dtype=dtype):
        if "torch" in row["errors"]:
            share = row["errors"]["ours"] / (row["errors"]["torch"] or math.inf)
            if row["op"] not in worst or share > worst[row["op"]][0]:
                worst[row["op"]] = share, row
    chosen = [row for _, row in worst.values()]
    made, axis = figure(WIDTH, 0.9 + 0.32 * len(chosen))
    names = [one for one in RIVALS if any(one in row["errors"] for row in chosen)]
    values = [v for row in chosen for v in row["errors"].values() if v > 0]
    left = min(values, default=1e-8) / 2  # an exact result has no place on a logarithmic axis: the left edge
    axis.set_xscale("log")
    axis.set_xlim(left, max(values, default=1.0) * 2)
    for n, row in enumerate(chosen):
        pair = [max(left, row["errors"][name]) for name in ("ours", "torch")]
        axis.plot(pair, [n, n], color=GRID, linewidth=3, zorder=1)
        for name in names:
            if name in row["errors"]:
                marker, colour = MARKERS.get(name, ("|", INK))
                size = dict(markersize=12, mew=2) if name == "torch" else dict(markersize=5, mew=0)
                axis.plot(max(left, row["errors"][name]), n, marker, color=colour, **size)
        axis.plot(max(left, row["errors"]["ours"]), n, "o", color=OURS, markersize=6.5, mec=CARD, mew=0.8, zorder=4)
    axis.plot([], [], "o", color=OURS, markersize=6, label="fastllm")
    for name in names:
        marker, colour = MARKERS.get(name, ("|", INK))
        size = dict(markersize=9, mew=2) if name == "torch" else dict(markersize=5, mew=0)
        axis.plot([], [], marker, color=colour, label="PyTorch" if name == "torch" else name, **size)
    axis.set_ylim(len(chosen) - 0.5, -0.5)
    axis.set_yticks(range(len(chosen)), [row["op"] for row in chosen], color=INK)
    axis.tick_params(axis="y", length=0)
    axis.set_xlabel(f"norm of the error over norm of the fp64 truth, {SHORT[dtype]}; left is better")
    axis.legend(ncols=3, fontsize=9, **LEGEND)
    return svg(made, f"errors {dtype}")


def caches(rows) -> str | None:
    """Speed-up with warm caches and with cold ones, per op."""
    pairs = {}
    for row in right(rows):
        if speed_up(row):
            pairs.setdefault((row["op"], row["cache"]), []).append(speed_up(row))
    ops = [op for op, cache in pairs if cache == "cold" and (op, "warm") in pairs]
    if not ops:
        return None
    made, axis = figure(WIDTH, 0.9 + 0.3 * len(ops))
    values = [geometric_mean(pairs[op, cache]) for op in ops for cache in ("warm", "cold")]
    ratio_axis(axis, min(values), max(values))
    for n, op in enumerate(ops):
        warm, cold = (geometric_mean(pairs[op, cache]) for cache in ("warm", "cold"))
        axis.plot([warm, cold], [n, n], color=GRID, linewidth=3, zorder=1)
        axis.plot(warm, n, "o", color=SERIES[0], markersize=6.5, label="warm" if not n else None)
        axis.plot(cold, n, "o", color=OURS, markersize=6.5, label="cold" if not n else None)
    axis.set_ylim(len(ops) - 0.5, -0.5)
    axis.set_yticks(range(len(ops)), ops, color=INK)
    axis.tick_params(axis="y", length=0)
    axis.set_xlabel("PyTorch's time over ours, geometric mean of the op's rows")
    axis.legend(ncols=2, **LEGEND)
    return svg(made, "caches")


UNITS = {"ms": (1.0, "ms"), "memory_bytes": (1e-6, "MB held"), "sent_bytes": (1e-6, "MB sent in a step")}
PAGE = 4096  # memory of less is drawn as one: an axis in logarithms has no 0


def curve(found, what) -> str:
    """One curve of `fastllm bench scaling`: `what`, of UNITS, against the size, with its exponent in the legend."""
    exponents = growth.exponents(found["points"], what)
    made, axis = figure(WIDTH, 3.4)
    scale, unit = UNITS[what]
    names = list(dict.fromkeys(name for point in found["points"] for name in point[what]))
    for name in sorted(names, key=lambda one: one != "ours"):
        colour = {"ours": OURS, "torch": INK}.get(name) or MARKERS[name][1]
        at = [(point["x"], point[what][name]) for point in found["points"] if name in point[what]]
        if what == "sent_bytes":
            at = [(x, y) for x, y in at if y]  # one process sends nothing, which has no place on this axis
        xs = [x for x, _ in at]
        middle = [(y["median"] if what == "ms" else max(y, PAGE)) * scale for _, y in at]
        label = {"ours": "fastllm", "torch": "PyTorch"}.get(name, name)
        if what == "ms":
            axis.fill_between(xs, *([y[p] for _, y in at] for p in ("p20", "p80")), color=colour, alpha=0.18, lw=0)
        if e := exponents.get(name):
            label += f"  {found['axis']}^{e['median']:.2f}"
        axis.plot(xs, middle, "-o", color=colour, markersize=3.6, linewidth=1.6, label=label)
    xs = [point["x"] for point in found["points"]]
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    step = math.ceil(len(xs) / 8)
    axis.xaxis.set_major_locator(FixedLocator(xs[::-1][::step]))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v / 1024:g}k" if v >= 1024 else f"{v:g}"))
    axis.yaxis.set_major_locator(FixedLocator(round_numbers(*axis.get_ylim())))
    axis.yaxis.set_minor_locator(NullLocator())
    plain(axis, "y")
    axis.set_xlabel(f"{found['axis']}: {found['says']}")
    axis.set_ylabel(unit)
    axis.legend(ncols=2, fontsize=9, **LEGEND)
    return svg(made, f"{found['name']} {found['dtype']} {found['pass']} {what}")


def noise(rows) -> float:
    return median(row["noise"] for row in rows) if rows else 0.0
