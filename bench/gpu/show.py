"""What a run on a GPU found, on the terminal."""

from fastllm import text

HEADER = ("op", "case", "pass", "ms", "bandwidth", "matrix", "noise", "rivals (their time / ours)", "bar")


def cells(row) -> tuple[str, ...]:
    start = (row["op"], row["case"], row["pass"])
    if row["wrong"]:
        return *start, "-", "-", "-", "-", "-", f"WRONG: {row['wrong'][:80]}"
    rivals = ", ".join(f"{name} {ratio:.2f}" for name, ratio in row["ratio"].items())
    missed = ", ".join(f"{name} {value:.2f} of {row['targets'][name]:g}" for name, value in row["missed"].items())
    shares = (f"{row['bandwidth']:.2f}", f"{row['matrix']:.2f}")
    return *start, f"{row['ms']:.3f}", *shares, f"{row['noise']:.1%}", rivals, f"missed: {missed}" if missed else "met"


def report(log):
    """One short table, and a line for each other thing that a reader must know."""
    for row in log.of("ceilings"):
        shown = {name: value for name, value in row.items() if isinstance(value, float)}
        print("ceilings:", ", ".join(f"{name} {value:.1f}" for name, value in shown.items()))
    if log.of("bar"):
        text.show(HEADER, [cells(row) for row in log.of("bar")])
    for row in log.of("tests"):
        print(f"tests: {row['PASSED']} passed, {len(row['bad'])} failed, {row['unfinished']} not finished", *row["bad"])
    if looks := log.of("look"):
        print(f"looked at {len(looks)} ops and backends, {sum(row.get('results', 0) for row in looks)} results")
    for row in looks:
        bad = row.get("bad", [])
        if row["problem"] or bad:
            print(f"{row['step']}:", row["problem"] or f"{len(bad)} bad: {'; '.join(bad[:3])}")
    for row in log.of("sanitizer"):
        print(f"{row['step']}:", row.get("skipped") or ("clean" if row["rc"] == 0 else f"exit status {row['rc']}"))
    for row in log.of("tune"):
        best = row["best"]
        print(f"{row['kernel']}:", f"{best['change']}, {best['ratio']:.3f} times faster" if best else "nothing better")
    for row in log.of("training"):
        rivals = ", ".join(f"{name} {ratio:.2f}" for name, ratio in row["ratio"].items())
        print(f"training step: {row['ms']:.1f} ms; their time over ours: {rivals}; bytes: {row['step_bytes']}")
    for row in log.of("compile"):
        print(f"compiled: {row['jobs'] - len(row['failed'])} of {row['jobs']}", *row["failed"], sep="\n  ")
    for kind in ("error", "skipped"):
        for row in log.of(kind):
            print(f"{kind}: {row['step']}: {row.get('error') or row.get('reason')}")
