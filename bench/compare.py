"""`--base`: what got slower, or wrong, since an earlier report.

Absolute times of two runs are never compared: what counts is how ours stands beside a yardstick that was timed in the
same rounds, PyTorch where both reports have the same version of it, and the memory floor otherwise. A change is one
when the medians are further apart than both runs' noise together and the spreads do not overlap.
"""

import math
import subprocess
from pathlib import Path

from fastllm.bench import store, timing

RESULTS = "bench/results"


def base(given: str, environment: dict) -> tuple[str, dict]:
    """The report that `--base` means, and what to call it: a file, a folder, or a git ref that has one in RESULTS."""
    path = Path(given)
    path = path / "report.json" if path.is_dir() else path
    if path.exists():
        return str(path), store.load(path)
    if git("rev-parse", "--verify", "--quiet", f"{given}^{{commit}}") is None:
        raise ValueError(f"bench --base: {given} is neither a report, a folder with report.json, nor a git ref here")
    names = (git("ls-tree", "-r", "--name-only", "--full-tree", given, RESULTS) or "").splitlines()
    names = [name for name in names if name.endswith("/report.json")]
    for name in names:
        found = store.parse(git("show", f"{given}:{name}"), f"{given}:{name}")
        if found["environment"]["cpu"] == environment["cpu"] and found["environment"]["gpu"] == environment["gpu"]:
            return f"{given}:{name}", found
    machines = "of another machine: " + ", ".join(names) if names else f"none in {RESULTS}"
    raise ValueError(f"bench --base: {given} has no report of this machine ({machines})")


def git(*words) -> str | None:
    """What git says, or None where it fails."""
    try:
        done = subprocess.run(["git", *words], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def standing(row, yardstick) -> timing.Spread:
    """The yardstick's time over ours, from pairs of the same round: larger is better."""
    return timing.ratios(row["samples_s"][yardstick], row["samples_s"]["ours"])


def compare(report, earlier, name) -> dict:
    """The rows that both reports have: {"base", "rows": [{..., "verdict"}], "missing": how many only the base has}."""
    same_torch = report["environment"]["versions"]["torch"] == earlier["environment"]["versions"]["torch"]
    found, missing = [], 0
    for knobs, before in earlier["runs"].items():
        now = {store.key(row): row for row in report["runs"].get(knobs, {"rows": []})["rows"]}
        for old in before["rows"]:
            row = now.get(store.key(old))
            if row is None:
                missing += 1
                continue
            about = {"knobs": knobs} | {name: row[name] for name in ("op", "case", "dtype", "pass", "cache")}
            found.append(about | change(old, row, same_torch))
    return {"base": name, "commit": earlier["environment"]["git"]["commit"], "rows": found, "missing": missing}


def change(old, row, same_torch) -> dict:
    if row["wrong"] or old["wrong"]:
        verdict = "still wrong" if row["wrong"] and old["wrong"] else "wrong" if row["wrong"] else "right again"
        return {"verdict": verdict}
    if row["slow"] or old["slow"]:
        return {"verdict": "not timed"}
    both = {name for name, ratio in row["ratio"].items() if not ratio["at_least"]}
    both &= {name for name, ratio in old["ratio"].items() if not ratio["at_least"]}
    yardstick = "torch" if same_torch and "torch" in both else "floor"
    before, now = standing(old, yardstick), standing(row, yardstick)
    noise = old["noise"] + row["noise"]
    apart = math.log(now.median / before.median)
    if apart < -noise and now.p80 < before.p20:
        verdict = "slower"
    elif apart > noise and now.p20 > before.p80:
        verdict = "faster"
    else:
        verdict = "same"
    return {
        "verdict": verdict,
        "yardstick": yardstick,
        "before": vars(before),
        "now": vars(now),
        "change": now.median / before.median,
        "noise": noise,
    }


def regressed(found) -> list[dict]:
    return [row for row in found["rows"] if row["verdict"] in ("slower", "wrong")]


HEADER = ("op", "case", "dtype", "pass", "cache", "knobs", "beside", "before", "now", "change", "noise", "verdict")


def cells(row) -> tuple[str, ...]:
    start = tuple(row[name] for name in ("op", "case", "dtype", "pass", "cache", "knobs"))
    if "now" not in row:
        return *start, "-", "-", "-", "-", "-", row["verdict"].upper()
    numbers = f"{row['before']['median']:.2f}", f"{row['now']['median']:.2f}", f"{row['change'] - 1:+.0%}"
    return *start, row["yardstick"], *numbers, f"{row['noise']:.0%}", row["verdict"]


def summary(found) -> str:
    counts = {}
    for row in found["rows"]:
        counts[row["verdict"]] = counts.get(row["verdict"], 0) + 1
    said = ", ".join(f"{n} {verdict}" for verdict, n in sorted(counts.items())) or "no row in common"
    left = f"; {found['missing']} rows of it were not measured now" if found["missing"] else ""
    commit = f" (commit {found['commit'][:7]})" if found["commit"] else ""
    return f"beside {found['base']}{commit}: {said}{left}"
