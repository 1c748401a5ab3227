"""The same cases and rivals under pytest-benchmark: `pytest bench --benchmark-only`, `-k "attention and forward"`.

Its times are not paired: compare contenders within a group, and trust `fastllm bench` where the difference is small.
"""

import pytest
import torch

from fastllm import verify
from fastllm.bench import cases, measure, rivals, timing

pytest.importorskip("pytest_benchmark")


def function_of(who, case, dtype):
    """A contender's function; skips where it cannot do the case."""
    if who == "ours":
        wrong = [row for row in verify.check(case, dtype) if row.verdict.startswith("FAIL")]
        assert not wrong, f"a wrong result is not timed: {wrong}"
        return case.ours
    found, missing = rivals.found([rivals.RIVALS[who]], case, dtype, "cpu")
    if who not in found:
        pytest.skip(missing.get(who, "no rival in this case"))
    return found[who]


@pytest.mark.parametrize("who", ["ours", *(rival.name for rival in rivals.chosen(["quick"], "cpu"))])
@pytest.mark.parametrize("passes", cases.PASSES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", cases.BENCH, ids=str)
def test_bench(benchmark, case, dtype, passes, who):
    benchmark.group = f"{case} {dtype} {passes}"
    if passes not in case.flops:
        pytest.skip("this op has no backward pass")
    dtype = getattr(torch, dtype)
    call = measure.contender(function_of(who, case, dtype), case.inputs(dtype), passes)
    benchmark.extra_info.update(bytes=case.bytes(passes, dtype), flops=case.flops[passes])
    benchmark.pedantic(call, warmup_rounds=1, rounds=7, iterations=timing.calls_that_last(0.02, call))
