"""`fastllm bench linear --tune`: where our matrix product beats PyTorch's on this CPU, written to ops/tuned.json.

The entry is keyed by CPU, instruction set and number of threads (fastllm/ops/_tuned.py), so an entry of another machine
stays as it is. Each ratio is the median over rounds of PyTorch's time over ours, of the product alone, one after the
other in one process; of a product of PyTorch's that takes longer than a second, one call decides. Dtypes are measured
and written one at a time. The smallest sizes are mostly the way to the kernel, of which ours is the longer one in dx
and dweight: what wins there wins in a model too.
"""

import json
import statistics
import time

import torch
import torch.nn.functional as F

import fastllm
from fastllm import text
from fastllm.bench import store, timing
from fastllm.ops import _tuned
from fastllm.ops.linear import linear_bwd, linear_fwd

GRID = {"M": [4, 16, 64, 256, 1024], "N": [64, 128, 256, 512, 1024, 3072], "K": [64, 128, 256, 512, 1024, 3072]}
ROUNDS = 15
BLOCK_S = 2e-3
PATIENCE_S = 1.0


def contenders(M, N, K, dtype) -> dict:
    """Pass -> (PyTorch's call, ours)."""
    x, weight, dy = (torch.randn(*size).to(dtype) for size in ((M, K), (N, K), (M, N)))
    return {
        "forward": (lambda: F.linear(x, weight), lambda: linear_fwd("cpu", x, weight, None)),
        "dx": (lambda: dy @ weight, lambda: linear_bwd("cpu", dy, x, weight, True, False, False)),
        "dweight": (lambda: dy.T @ x, lambda: linear_bwd("cpu", dy, x, weight, False, True, False)),
    }


def ratio(theirs, ours) -> float:
    """The median over rounds of their time over ours."""
    start = time.perf_counter()
    theirs()
    if (once := time.perf_counter() - start) > PATIENCE_S:
        ours()
        start = time.perf_counter()
        ours()
        return round(once / (time.perf_counter() - start), 2)
    calls = [(function, timing.calls_that_last(BLOCK_S, function)) for function in (theirs, ours)]
    found = []
    for _ in range(ROUNDS):
        took = []
        for function, n in calls:
            start = time.perf_counter()
            for _ in range(n):
                function()
            took.append((time.perf_counter() - start) / n)
        found.append(took[0] / took[1])
    return round(statistics.median(found), 2)


def linear(dtype) -> dict:
    """What an entry has for `linear` in a dtype: the grid, and for every pass a ratio at each of its points."""
    sizes = [(M, N, K) for M in GRID["M"] for N in GRID["N"] for K in GRID["K"]]
    at = {}
    with timing.undisturbed(), torch.no_grad():
        for size in text.progress(sizes, f"tune {_tuned.linear_entry(dtype)}", lambda size: "x".join(map(str, size))):
            at[size] = {name: ratio(*pair) for name, pair in contenders(*size, dtype).items()}
    return {"grid": GRID} | {
        name: [[[at[M, N, K][name] for K in GRID["K"]] for N in GRID["N"]] for M in GRID["M"]] for name in _tuned.PASSES
    }


def main(dtypes=("float32",)) -> int:
    """Measure this machine and keep the other entries of the table, and in its own what was not measured again."""
    if fastllm.dispatch.extension is None:
        raise ValueError(f"bench --tune: {fastllm.dispatch.missing_extension}")
    if not _tuned.cpu():
        raise ValueError("bench --tune: this system does not say which CPU it has (/proc/cpuinfo)")
    for dtype in (getattr(torch, name) for name in dtypes):
        measured, name = linear(dtype), _tuned.linear_entry(dtype)
        table = json.loads(_tuned.PATH.read_text())
        about = {"torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
        table[_tuned.key()] = table.get(_tuned.key(), {}) | about | {name: measured}
        rows = json.dumps(dict(sorted(table.items())), indent=1)
        store.replace(_tuned.PATH, store.compact(rows) + "\n")
        print(f"wrote {name} of {_tuned.key()} to {_tuned.PATH}")
        for passes in _tuned.PASSES:
            flat = torch.tensor(measured[passes]).flatten()
            print(f"{passes:<8} ours over PyTorch's {flat.min():.2f} to {flat.max():.2f}, median {flat.median():.2f}")
    return 0
