"""report.html: one self-contained page from report.json and scaling.json; no script, no font, no picture is fetched."""

from pathlib import Path
from statistics import geometric_mean, median

import jinja2

from fastllm import drawing
from fastllm.bench import compare, growth, plots, rivals, show, store


def write(folder: Path):
    """The page of what the folder has."""
    found = {
        name: store.load(folder / f"{name}.json")
        for name in ("report", "scaling")
        if (folder / f"{name}.json").exists()
    }
    store.replace(folder / "report.html", html(found.get("report"), found.get("scaling")))


def html(report=None, scaling=None) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    about = (report or scaling)["environment"]
    runs = {knobs: of_run(knobs, found) for knobs, found in (report["runs"] if report else {}).items() if found["rows"]}
    return environment.get_template("page.html").render(
        light=drawing.variables(drawing.LIGHT),
        dark=drawing.variables(drawing.DARK),
        machine=store.machine(about),
        about=about,
        report=report,
        runs=runs,
        base=of_base(report["base"]) if report and "base" in report else None,
        curves=[of_curve(curve) for curve in scaling["curves"] if curve["points"]] if scaling else [],
        rivals=rivals.RIVALS,
    )


def by_op(rows) -> tuple[list[dict], list[str]]:
    """The lines of the summary and its dtypes; of warm rows, where there are some."""
    timed = [row for row in plots.right(rows) if plots.speed_up(row)]
    warm = [row for row in timed if row["cache"] == "warm"] or timed
    dtypes = list(dict.fromkeys(row["dtype"] for row in timed))
    ops = dict.fromkeys(row["op"] for row in rows)
    return [of_op(op, [row for row in warm if row["op"] == op], dtypes) for op in ops], [plots.SHORT[d] for d in dtypes]


def of_run(knobs, found) -> dict:
    """What the page says about stock or tuned PyTorch."""
    rows = found["rows"]
    timed = plots.right(rows)
    versus = [row for row in timed if plots.speed_up(row)]
    warm = [row for row in versus if row["cache"] == "warm"] or versus
    dtypes = list(dict.fromkeys(row["dtype"] for row in timed))
    ops, short = by_op(rows)
    return {
        "knobs": found["knobs"],
        "ceilings": found["ceilings"],
        "rows": len(rows),
        "facts": facts(rows, timed, warm),
        "ops": ops,
        "dtypes": short,
        "losses": sorted((row for row in versus if lost(row)), key=plots.speed_up),
        "reasons": show.reasons(rows),
        "overview": plots.overview(warm, f"{knobs} PyTorch's time over ours") if warm else None,
        "caches": plots.caches(rows),
        "roofs": [plots.roofline(timed, found["ceilings"], dtype) for dtype in dtypes],
        "memory": list(filter(None, (plots.memory(rows, dtype) for dtype in dtypes))),
        "errors": [plots.errors(rows, dtype) for dtype in dtypes],
        "bars": {op["op"]: bars_of(knobs, op, rows, dtypes) for op in ops},
        "table": table(rows),
    }


def bars_of(knobs, op, rows, dtypes) -> dict:
    """An op's figures by dtype, and its means in words."""
    chosen = {dtype: plots.right(rows, op=op["op"], dtype=dtype) for dtype in dtypes}
    drawn = [
        (plots.SHORT[dtype], plots.bars(found, f"{knobs} {op['op']} {dtype}"))
        for dtype, found in chosen.items()
        if found
    ]
    means = zip(map(plots.SHORT.get, dtypes), op["cells"], strict=False)
    return {"figures": drawn, "means": ", ".join(f"{dtype} {mean}" for dtype, (mean, _) in means)}


def lost(row) -> bool:
    ratio = row["ratio"]["torch"]
    return ratio["median"] < 1 and not ratio["tie"]


def won(row) -> bool:
    ratio = row["ratio"]["torch"]
    return ratio["median"] > 1 and not ratio["tie"]


def facts(rows, timed, versus) -> list[tuple[str, str, str]]:
    """(figure, what it is, class) for the cards at the top."""
    wins, losses = sum(map(won, versus)), sum(map(lost, versus))
    ties = len(versus) - wins - losses
    examined = [row for row in rows if not row["slow"]]
    wrong = sum(bool(row["wrong"]) for row in examined)
    made = []
    if versus:
        bound = "> " * any(map(plots.is_bound, versus))
        made.append(
            (
                f"{bound}{geometric_mean(map(plots.speed_up, versus)):.2f}x",
                "PyTorch's time over ours, geometric mean",
                "",
            )
        )
        made.append(
            (f"{wins} / {ties} / {losses}", "rows faster / tied / slower than PyTorch", "bad" if losses > wins else "")
        )
    made.append(
        (
            f"{len(examined) - wrong} / {len(examined)}",
            "rows as accurate as PyTorch against fp64",
            "bad" if wrong else "good",
        )
    )
    if timed:
        made.append(
            (
                f"{median(row['share_of_floor'] for row in timed):.0%}",
                "of the floor of memory and arithmetic, median",
                "",
            )
        )
        made.append((f"{plots.noise(timed):.1%}", "noise: the same code against itself, median", ""))
    return made


def of_op(op, rows, dtypes) -> dict:
    """A line of the summary: per dtype the geometric mean and the range of the ratio to PyTorch."""
    cells = []
    for dtype in dtypes:
        found = [row for row in rows if row["dtype"] == dtype]
        ratios, bound = [plots.speed_up(row) for row in found], any(plots.is_bound(row) for row in found)
        mean = f"{'> ' * bound}{geometric_mean(ratios):.2f}x" if found else "-"
        cells.append((mean, f"{min(ratios):.2f} to {max(ratios):.2f}" if found else ""))
    shares = [row["share_of_floor"] for row in rows]
    return {
        "op": op,
        "cells": cells,
        "rows": len(rows),
        "losses": sum(map(lost, rows)),
        "floor": f"{median(shares):.0%}" if shares else "-",
    }


def table(rows) -> dict:
    names = show.named(rows)
    return {
        "header": [*show.HEADER, *(f"vs {name}" for name in names)],
        "rows": [show.cells(row, names) for row in rows],
    }


def of_base(found) -> dict:
    changed = [row for row in found["rows"] if row["verdict"] != "same"]
    return {
        "summary": compare.summary(found),
        "header": compare.HEADER,
        "rows": [compare.cells(row) for row in sorted(changed, key=lambda row: row.get("change", 0.0))],
        "regressed": len(compare.regressed(found)),
    }


CURVE_SAYS = {  # what is drawn over the size -> what the figure says below the exponents
    "ms": "",
    "memory_bytes": "Peak memory of one call beyond its inputs.",
    "sent_bytes": "What the rank that sends most sends in a step.",
}


def of_curve(curve) -> dict:
    """The figures of a curve, each with its fitted exponents in words."""
    says = CURVE_SAYS | ({"memory_bytes": "The most a rank held in a step."} if curve["axis"] == "ranks" else {})
    figures = []
    for what, word in says.items():
        if any(any(point.get(what, {}).values()) for point in curve["points"]):
            exponents = growth.exponents(curve["points"], what)
            figures.append((plots.curve(curve, what), in_words(curve, exponents, word)))
    return curve | {"figures": figures, "short": plots.SHORT[curve["dtype"]]}


def in_words(curve, exponents, says) -> str:
    fitted = []
    for name, e in exponents.items():
        who = {"ours": "fastllm", "torch": "PyTorch"}.get(name, name)
        fitted.append(f"{who} {growth.fitted(curve, e)} from {e['from']} on")
    return " ".join(filter(None, [says, "; ".join(fitted)]))
