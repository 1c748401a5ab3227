"""A report on the terminal, and its files."""

from pathlib import Path

from fastllm import text
from fastllm.bench import compare, rivals, store

HEADER = (
    "op",
    "case",
    "dtype",
    "pass",
    "cache",
    "kernel",
    "ms",
    "p20-p80",
    "GB/s",
    "GFLOP/s",
    "of floor",
    "noise",
    "MB",
)
LEGEND = (
    "vs: their time over ours, median (p20-p80) of paired rounds; above 1 we are faster. noise: ours against itself; a"
    " difference below it is a tie.\nn=1: one call, as it took longer than --patience. >: a lower bound, as forward"
    " alone, or a part of the input, took longer.\nof floor: the least time that the memory at this size, and the best"
    " measured arithmetic rate, allow, over our time. MB: peak memory of the call beyond its inputs."
)


def cells(row, names) -> tuple[str, ...]:
    start = (row["op"], row["case"], row["dtype"])
    if store.untimed(row):
        word = "WRONG" if row["wrong"] else "slow"
        return *start, word, row["cache"], row["kernel"], *("-",) * (len(HEADER) - 6 + len(names))
    ms, versus = row["ms"], []
    for name in names:
        absent = "missing" if name in row["missing"] else "-"
        versus.append(standing(row["ratio"][name]) if name in row["ratio"] else absent)
    times = (f"{ms['median']:.3f}", f"{ms['p20']:.3f}-{ms['p80']:.3f}")
    rates = (f"{row['gb_per_s']:.1f}", f"{row['gflop_per_s']:.0f}", f"{row['share_of_floor']:.0%}")
    peak = row["memory_bytes"].get("ours")
    size = "-" if peak is None else f"{peak / 1e6:.1f}"
    return *start, row["pass"], row["cache"], row["kernel"], *times, *rates, f"{row['noise']:.1%}", size, *versus


def times(ratio: float) -> str:
    return f"{ratio:.2f}x" if ratio < 100 else f"{ratio:,.0f}x"


def standing(ratio) -> str:
    """A ratio, and how sure it is: its spread, "n=1" for a single sample, ">" for a lower bound."""
    middle = times(ratio["median"])
    if ratio["at_least"]:
        return f"> {middle}"
    spread = "n=1" if ratio["n"] == 1 else f"{ratio['p20']:.2f}-{ratio['p80']:.2f}"
    return f"{middle} ({spread})" + " tie" * ratio["tie"]


def named(rows) -> list[str]:
    """The rivals that some row has, or lacks with a reason, in the order of their list."""
    seen = {name for row in rows for name in (*row.get("ratio", {}), *row.get("missing", {}))}
    return [name for name in rivals.RIVALS if name in seen]


def report(found):
    for knobs, run in found["runs"].items():
        names = named(run["rows"])
        turned = f": {'; '.join(run['knobs'])}" if run["knobs"] else ""
        header = (*HEADER, *(f"vs {name}" for name in names))
        text.show(header, [cells(row, names) for row in run["rows"]], f"{knobs} PyTorch{turned}")
        print("ceilings:", ", ".join(f"{name} {value:.0f}" for name, value in run["ceilings"].items()))
        for line in reasons(run["rows"]):
            print(line)
    print(LEGEND)
    if "base" in found:
        changed = [row for row in found["base"]["rows"] if row["verdict"] != "same"]
        if changed:
            text.show(compare.HEADER, [compare.cells(row) for row in changed])
        print(compare.summary(found["base"]))


def reasons(rows) -> list[str]:
    """What is missing, wrong or not a kernel, once each."""
    untimed = {
        f"{'WRONG' if r['wrong'] else 'slow'}, so not timed: {r['op']} {r['case']} {r['dtype']}: {why}"
        for r in rows
        if (why := store.untimed(r))
    }
    missing = {f"{name}: {why}" for row in rows for name, why in row.get("missing", {}).items()}
    plain = {row["fallback"] for row in rows if row["fallback"]}
    lines = sorted(untimed)
    lines += [f"missing {line}" for line in sorted(missing)]
    return lines + [f"runs on plain PyTorch: {line}" for line in sorted(plain)]


def write(folder: Path, found):
    """report.json, report.csv and, where matplotlib and jinja2 are installed, report.html."""
    store.save(folder / "report.json", found)
    store.replace(folder / "report.csv", store.table(found))
    print(f"wrote {folder / 'report.json'} and report.csv")
    write_page(folder)


def write_page(folder: Path):
    """report.html from the json files that the folder has."""
    try:
        from fastllm.bench import page

        page.write(folder)
    except ModuleNotFoundError as lacking:
        print(f"no report.html: {lacking} (pip install 'fastllm-kernels[bench]')")
        return
    print(f"wrote {folder / 'report.html'}")
