"""Launch configurations against the one that a kernel has now: the stage `tune` of `python -m fastllm.bench.gpu`.

What it finds goes into the table LAUNCHES of the kernel's file, under the GPU's name, by hand: with date and reason.
"""

import contextlib
import importlib
from dataclasses import dataclass

from fastllm.bench import cases, timing


@dataclass(frozen=True)
class Tunable:
    """A launcher's choice and the others that are tried; `cases` are (case, pass) that launch this kernel."""

    module: str
    holder: str | None  # class that has the launch function; None: the module
    function: str
    kernel: str | None  # the launch function's first argument, where it has one
    cases: list
    changes: list[dict]

    @property
    def name(self) -> str:
        return self.module if self.kernel is None else f"{self.module} {self.kernel}"


def tunables() -> list[Tunable]:
    """At most six changes for each kernel, all of them in what compiles without spilling for sm_90."""
    D64, D128 = cases.attention(1, 32, 8192, 64, causal=True), cases.attention(2, 16, 8192, 128, causal=True)

    def blocks(*sizes):
        return [dict(zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), size, strict=True)) for size in sizes]

    fwd = blocks((128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3))
    dkdv = blocks((64, 128, 8, 2), (64, 64, 8, 2), (32, 128, 8, 2), (64, 64, 4, 2))
    dq = blocks((128, 64, 8, 2), (64, 64, 8, 2), (64, 64, 4, 2), (128, 32, 8, 2))
    # By TMA, which leaves registers for larger blocks.
    fwd += [size | dict(tiles=True) for size in blocks((128, 128, 8, 2), (128, 64, 8, 3), (64, 64, 4, 3))]
    dkdv += [size | dict(tiles=True) for size in blocks((32, 128, 8, 2), (64, 64, 8, 2))]
    dq += [size | dict(tiles=True) for size in blocks((128, 64, 8, 2), (64, 64, 4, 2))]
    attend = ("attention", "Call", "launch")
    warps = [dict(num_warps=n) for n in (4, 8, 16, 32)]
    norms = [cases.norm("rms_norm", 16384, D) for D in (4096, 16384)]
    rows = [cases.softmax(32768, S) for S in (1024, 4096)]
    packed = [cases.weight_only(1, 28672, 8192, bits) for bits in (8, 4)]
    panels = [dict(num_warps=2), dict(num_warps=8), dict(num_stages=2), dict(num_stages=4), dict(BLOCK_N=32)]
    activated = cases.linear(8192, 4096, 1024, activation="gelu_tanh")
    products = [dict(BLOCK_N=256), dict(num_stages=2), dict(num_stages=4), dict(num_warps=4, BLOCK_M=64)]
    return [
        Tunable(*attend, "fwd", [(D64, "forward"), (D128, "forward")], fwd),
        Tunable(*attend, "dkdv", [(D64, "backward"), (D128, "backward")], dkdv),
        Tunable(*attend, "dq", [(D64, "backward"), (D128, "backward")], dq),
        Tunable("norm", None, "_launch_for", "fwd", [(case, "forward") for case in norms], warps),
        Tunable("norm", None, "_launch_for", "bwd", [(case, "backward") for case in norms], warps),
        Tunable("softmax", None, "_launch_for", None, [(case, "forward") for case in rows], warps),
        Tunable("weight_only", None, "_launch_for", None, [(case, "forward") for case in packed], panels),
        Tunable("linear", None, "_launch_for", None, [(activated, "forward")], products),
    ]


@contextlib.contextmanager
def launching(tunable: Tunable, change: dict):
    """Inside, the kernel is launched with `change`; the list gets what would have been launched instead."""
    module = importlib.import_module(f"fastllm.kernels.{tunable.module}")
    holder = getattr(module, tunable.holder) if tunable.holder else module
    original, seen = getattr(holder, tunable.function), []

    def launch(*args):
        chosen = original(*args)
        if tunable.kernel is not None and not any(isinstance(x, str) and x == tunable.kernel for x in args):
            return chosen
        seen.append(chosen)
        return chosen | change

    setattr(holder, tunable.function, launch)
    try:
        yield seen
    finally:
        setattr(holder, tunable.function, original)


def against(tunable: Tunable, change: dict, call, wrong, time) -> dict:
    """One change and what it is worth: `wrong()` says what is wrong with a result, `time(contenders)` gives samples."""

    def changed():
        with launching(tunable, change):
            return call()

    with launching(tunable, change) as seen:
        problem = wrong()
    if not seen:
        raise LookupError("this case does not launch the kernel")
    row = dict(change=change, now=seen[0], problem=problem)
    if problem:
        return row
    samples = time({"now": call, "change": changed, "now again": call})
    ratio = timing.ratios(samples["now"], samples["change"])
    tie = timing.is_tie(ratio, timing.noise(samples["now"], samples["now again"]))
    return row | dict(ratio=ratio.median, tie=tie, ms=min(samples["change"]) * 1e3)


def best(rows: list[dict]) -> dict | None:
    """The fastest change that is right and, beyond the noise, faster than what there is."""
    better = [row for row in rows if row.get("ratio", 0) > 1 and not row["tie"]]
    return max(better, key=lambda row: row["ratio"], default=None)
