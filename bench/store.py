"""The files of a report: report.json with every raw sample, report.csv for spreadsheets; whole or not at all."""

import csv
import io
import json
import os
import re
import subprocess
import time
from pathlib import Path

from fastllm import info

SCHEMA = 3  # of report.json and scaling.json; a reader refuses any other


def git() -> dict:
    """The commit of this code and whether something is changed in it; None and None outside a checkout."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():  # an installed wheel may lie inside somebody else's repository
        return {"commit": None, "dirty": None}

    def ask(*words):
        return subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True).stdout.strip()

    return {"commit": ask("rev-parse", "HEAD") or None, "dirty": bool(ask("status", "--porcelain"))}


def commit_line(git: dict) -> str:
    """A comma and the commit, or nothing where there is none."""
    if not git["commit"]:
        return ""
    return f", commit {git['commit'][:7]}" + (" with changes" if git["dirty"] else "")


def environment() -> dict:
    """What a reader must know to repeat this: `fastllm info`, the commit, the affinity, the time."""
    affinity = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    return info.collect() | {"git": git(), "affinity": affinity, "date": time.strftime("%Y-%m-%dT%H:%M:%S%z")}


def machine(environment: dict) -> str:
    """One line: what was measured, and with how many threads."""
    cpu, versions = environment["cpu"], environment["versions"]
    device = environment["gpu"][0] if environment["gpu"] else cpu["model"]
    threads = f"{cpu['threads']} thread{'s' * (cpu['threads'] != 1)}"
    return f"{device}, {threads}, {cpu['instruction_set'] or 'no C++ kernels'}, PyTorch {versions['torch']}"


def compact(text: str) -> str:
    """JSON with the innermost lists of numbers on one line."""
    return re.sub(r"\[\s+([-\d.,\se+]+?)\s+\]", lambda m: "[" + re.sub(r"\s+", " ", m[1]) + "]", text)


def replace(path: Path, text: str):
    """The file has the old text or the new one, whenever the process ends."""
    fresh = path.with_name(path.name + ".new")
    with fresh.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


def save(path: Path, report: dict):
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, compact(json.dumps(shorter(report), indent=1)) + "\n")


def shorter(value):
    """Six digits of every number: more than any clock has here."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {name: shorter(one) for name, one in value.items()}
    return [shorter(one) for one in value] if isinstance(value, (list, tuple)) else value


def parse(text: str, name: str) -> dict:
    """A report, or a ValueError that names it."""
    try:
        found = json.loads(text)
    except ValueError as problem:
        raise ValueError(f"bench: {name} is not JSON: {problem}") from None
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        has = found.get("schema", "none") if isinstance(found, dict) else type(found).__name__
        raise ValueError(f"bench: {name} has schema {has}, expected {SCHEMA}: measure again")
    return found


def load(path: Path) -> dict:
    return parse(path.read_text(), str(path))


def resumed(path: Path, fresh: dict) -> dict:
    """The report of `path`, to be continued, if it was made in the way of `fresh` and of the same code."""
    found = load(path)
    for what in ("options", "versions", "cpu", "gpu", "git"):
        there, here = (r["options"] if what == "options" else r["environment"][what] for r in (found, fresh))
        if there != here:
            names = [name for name in here if here[name] != there.get(name)] if isinstance(here, dict) else []
            changed = f" ({', '.join(sorted(names))})" if names else ""
            raise ValueError(f"bench --resume: {path} was measured with another {what}{changed}")
    found["resumed"] = [*found.get("resumed", []), fresh["environment"]["date"]]
    return found


def untimed(row) -> str:
    """Why a row has no times, or ""."""
    return row["wrong"] or row["slow"]


def key(row) -> tuple:
    """What a row is about; two reports are compared, and one is continued, by it."""
    return row["op"], row["case"], row["dtype"], row["pass"], row["cache"]


FIELDS = ("knobs", "op", "case", "dtype", "pass", "cache", "contender", "kernel", "ms_p20", "ms_median", "ms_p80")
FIELDS += ("gb_per_s", "gflop_per_s", "share_of_floor", "bound_by", "noise", "ratio_p20", "ratio_median", "ratio_p80")
FIELDS += ("tie", "samples", "at_least", "error_vs_fp64", "peak_memory_bytes", "problem")


def table(report) -> str:
    """CSV, a line for each row and contender; `ratio` is the contender's time over ours."""
    from fastllm.bench.timing import Spread

    out = io.StringIO()
    writer = csv.DictWriter(out, FIELDS, lineterminator="\n")
    writer.writeheader()
    for knobs, found in report["runs"].items():
        for row in found["rows"]:
            about = {"knobs": knobs} | {name: row[name] for name in ("op", "case", "dtype", "pass", "cache")}
            if problem := untimed(row):
                writer.writerow(about | {"contender": "ours", "kernel": row["kernel"], "problem": problem})
                continue
            for name in ("ours", *row["ratio"]):
                ms = vars(Spread.of([1e3 * s for s in row["samples_s"][name]]))
                line = {f"ms_{what}": value for what, value in ms.items()} | {"samples": len(row["samples_s"][name])}
                if name == "ours":
                    line |= {w: row[w] for w in ("kernel", "share_of_floor", "bound_by", "noise")}
                    line["problem"] = row["fallback"]
                else:
                    ratio = row["ratio"][name]
                    line |= {f"ratio_{what}": ratio[what] for what in ms} | {w: ratio[w] for w in ("tie", "at_least")}
                line["gb_per_s"] = row["bytes"] / ms["median"] / 1e6
                line["gflop_per_s"] = row["flops"] / ms["median"] / 1e6
                line["error_vs_fp64"] = row["errors"].get(name)
                line["peak_memory_bytes"] = row["memory_bytes"].get(name)
                writer.writerow(about | {"contender": name} | line)
            for name, why in row["missing"].items():
                writer.writerow(about | {"contender": name, "problem": why})
    return out.getvalue()
