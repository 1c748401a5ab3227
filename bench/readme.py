"""`make readme`, `make readme-figures`: what the README says in tables and figures is generated, never typed.

The support matrix comes from the code, the demo's tables from report/demo.json, and the figures and the table of speeds
from the reports that are committed under bench/results, one folder per machine.
"""

import json
import re
import statistics
from pathlib import Path

from fastllm import info

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"


def fill(text: str, name: str, block: str) -> str:
    """`text` with `block` between the markers <!-- name --> and <!-- /name -->."""
    pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
    filled, n = re.subn(pattern, lambda m: f"{m[1]}{block.rstrip()}\n{m[2]}", text, flags=re.DOTALL)
    if n != 1:
        raise ValueError(f"expected one pair of markers <!-- {name} --> ... <!-- /{name} -->, found {n}")
    return filled


def markdown(header, rows) -> list[str]:
    return ["| " + " | ".join(map(str, line)) + " |" for line in (header, ["---"] * len(header), *rows)]


LONG = 12  # rows of a table that the README shows when it is asked to


def demo_block(demo: dict) -> str:
    """Markdown of the tables of report/demo.json: {"machine", "git", "tables": [{"title", "header", "rows"}, ...]}."""
    from fastllm.bench import store

    out = [f"Printed by `make demo`{store.commit_line(demo['git'])}, on: {demo['machine']}."]
    for table in demo["tables"]:
        title, lines = table["title"], markdown(table["header"], table["rows"])
        if len(table["rows"]) > LONG:
            out += ["", f"<details><summary><b>{title}</b></summary>", "", *lines, "", "</details>"]
        else:
            out += ["", f"**{title}**", "", *lines]
    return "\n".join(out)


def reports(results: Path = RESULTS) -> dict[Path, dict]:
    """Folder -> what is committed there: {"report": ..., "scaling": ...}, of the schema that this code reads."""
    from fastllm.bench import store

    found = {}
    for path in sorted(results.glob("*/*.json")):
        kept = json.loads(path.read_text())
        if path.stem in ("report", "scaling") and kept.get("schema") == store.SCHEMA:
            found.setdefault(path.parent, {})[path.stem] = kept
    return {folder: kept for folder, kept in found.items() if "report" in kept}


def figures(kept: dict) -> dict[str, tuple[str, str]]:
    """Name -> (alternative text, SVG in the page's colours) of one machine."""
    from fastllm.bench import plots

    drawn = {}
    for knobs, run in kept["report"]["runs"].items():
        rows = [row for row in plots.right(run["rows"], cache="warm") if plots.speed_up(row)]
        if rows:
            says = f"{knobs} PyTorch's time over ours"
            drawn[f"speed-{knobs}"] = (f"{says}, every row a dot, per op", plots.overview(rows, says))
    for curve in kept.get("scaling", {"curves": []})["curves"]:
        if (curve["name"], curve["dtype"], curve["pass"]) == ("attention-T", "float32", "both") and curve["points"]:
            drawn["growth"] = ("time of attention over the sequence length", plots.curve(curve, "ms"))
            if any(any(point["memory_bytes"].values()) for point in curve["points"]):
                drawn["memory"] = (
                    "peak memory of attention over the sequence length",
                    plots.curve(curve, "memory_bytes"),
                )
    return drawn


def write_figures(folder: Path, kept: dict):
    """Each figure twice: light and dark."""
    from fastllm import drawing
    from fastllm.bench import store

    (folder / "figures").mkdir(exist_ok=True)
    for name, (_, drawn) in figures(kept).items():
        for theme, colours in (("light", drawing.LIGHT), ("dark", drawing.DARK)):
            store.replace(folder / "figures" / f"{name}-{theme}.svg", drawing.themed(drawn, colours))


def bench_block(found: dict[Path, dict], root: Path = ROOT) -> str:
    """Markdown of the committed reports: figures in light and dark, and per op the speed-ups, those below 1 too."""
    from fastllm.bench import page, store

    out = []
    for folder, kept in found.items():
        report, place = kept["report"], folder.relative_to(root).as_posix()
        about = report["environment"]
        where = f"{store.machine(about)}, {about['date'][:10]}{store.commit_line(about['git'])}"
        out += ["" if out else None, f"**{folder.name}**, by `fastllm bench`: {where}; raw samples in `{place}`.", ""]
        for name, (says, _) in figures(kept).items():
            base = f"{place}/figures/{name}"
            out.append(
                f'<picture><source media="(prefers-color-scheme: dark)" srcset="{base}-dark.svg">'
                f'<img alt="{says}" src="{base}-light.svg" width="49%"></picture>'
            )
        for knobs, run in report["runs"].items():
            ops, dtypes = page.by_op(run["rows"])
            turned = f" ({'; '.join(run['knobs'])})" if run["knobs"] else ""
            out += [
                "",
                f"**{knobs} PyTorch's time over ours{turned}: geometric mean, and from the worst row to the best**",
                "",
            ]
            header = ["op", *dtypes, "rows slower than PyTorch's", "of the floor, median"]
            rows = [
                [op["op"], *(f"{mean} ({span})" if span else mean for mean, span in op["cells"])]
                + [f"{op['losses']} of {op['rows']}", op["floor"]]
                for op in ops
            ]
            out += markdown(header, rows)
    return (
        "\n".join(line for line in out if line is not None)
        or "No report is committed yet; `make bench` measures yours."
    )


def headline(found: dict[Path, dict]) -> str:
    """One sentence of the newest committed report: fp32 against PyTorch as it is."""
    from fastllm.bench import page, store

    kept = max((kept["report"] for kept in found.values()), key=lambda report: report["environment"]["date"])
    rows = [row for row in kept["runs"]["stock"]["rows"] if row["dtype"] == "float32"]
    ops, _ = page.by_op(rows)
    means = ", ".join(f"{op['op']} {op['cells'][0][0]}" for op in ops)
    losses, compared = sum(op["losses"] for op in ops), sum(op["rows"] for op in ops)
    return (
        f"PyTorch's time over ours ({store.machine(kept['environment'])}, fp32, geometric means): {means}; "
        f"slower in {losses or 'none'} of {compared} rows. More under [Numbers](#numbers)."
    )


LOWER_IS_BETTER = ("bits_per_character",)
SCORES = {"bits_per_character": "bits per character", "bleu": "BLEU", "rougeL": "ROUGE-L"}


def llm_block(kept: dict) -> str:
    """Markdown of bench/results/llm.json, which `python -m fastllm.bench.llm` writes, and what is worse than beside."""
    lines, worse = [], []
    for name, found in kept["results"].items():
        seeds, beside = found.get("of_seeds", [found["test"][found["score"]]]), found["beside"]
        ours = statistics.mean(seeds)
        spread = f" ± {statistics.stdev(seeds):.4f} ({len(seeds)} seeds)" if len(seeds) > 1 else ""
        score = SCORES.get(found["score"], found["score"])
        if (ours > beside["value"]) == (found["score"] in LOWER_IS_BETTER):
            worse.append(f"`{name}`")
        timed = found.get("time")
        speed = f"{timed['ratios'][0]:.2f} to {timed['ratios'][-1]:.2f}" if timed else "not measured"
        lines.append(
            [
                f"`{name}`: {found['title']}",
                score,
                f"{ours:.4g}{spread}",
                f"{beside['value']:.4g}",
                beside["name"],
                speed,
            ]
        )
    header = [
        "",
        "on test",
        "ours: one run, or mean and standard deviation",
        "beside",
        "which is",
        "time a step, plain PyTorch's over ours",
    ]
    said = ["", f"Below what it stands beside: {', '.join(worse)}."] if worse else []
    return "\n".join(markdown(header, lines) + said)


def main():
    readme, demo, found = ROOT / "README.md", ROOT / "report" / "demo.json", reports()
    for folder, kept in found.items():
        write_figures(folder, kept)
    text = fill(readme.read_text(), "matrix", info.matrix())
    text = fill(text, "bench", bench_block(found))
    text = fill(text, "headline", headline(found))
    text = fill(text, "llm", llm_block(json.loads((RESULTS / "llm.json").read_text())))
    if demo.exists():
        text = fill(text, "demo", demo_block(json.loads(demo.read_text())))
    readme.write_text(text)


if __name__ == "__main__":
    main()
