"""The rule that every other test leans on: what it lets through, what it catches, what `verify` makes of it."""

import dataclasses

import pytest
import torch
from check import assert_as_accurate

from fastllm import verify
from fastllm.bench import cases

TRUTH = torch.linspace(-1, 1, 101, dtype=torch.float64)
TRUTH[50] = 0.0


def off_by(error, dtype=torch.float32):
    """The truth in `dtype` with one element wrong by `error`."""
    x = TRUTH.to(dtype)
    x[50] += error
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_alone_passes_even_beside_an_exact_peer(dtype):
    exact = TRUTH.to(dtype).double()
    assert verify.accuracy(TRUTH.to(dtype), TRUTH.to(dtype), exact).problem is None
    assert verify.accuracy(off_by(torch.finfo(dtype).eps, dtype), TRUTH.to(dtype), exact).problem is None


@pytest.mark.parametrize(("factor", "passes"), [(0.5, True), (1.0, True), (1.05, True), (1.2, False), (3.0, False)])
def test_norm_of_the_error_against_the_peers(factor, passes):
    error = torch.full_like(TRUTH, 1e-3)
    found = verify.accuracy((TRUTH + factor * error).float(), (TRUTH + error).float(), TRUTH)
    assert (found.problem is None) == passes
    assert (found.share <= 1) == passes
    assert passes or "norm of the error" in found.problem


@pytest.mark.parametrize(("factor", "passes"), [(1.8, True), (2.2, False)])
def test_largest_error_against_the_peers(factor, passes):
    """One bad element in many: the norm does not see it, the largest error does."""
    error = torch.full_like(TRUTH, 1e-3)
    spiked = error * 0.9
    spiked[7] = factor * 1e-3
    found = verify.accuracy((TRUTH + spiked).float(), (TRUTH + error).float(), TRUTH)
    assert (found.problem is None) == passes
    assert passes or "largest error" in found.problem


def test_what_is_never_right():
    good = TRUTH.float()
    bad = {
        "NaN": off_by(float("nan")),
        "infinities": off_by(float("inf")),
        "shape": good[:-1],
        "dtype": good.bfloat16(),
    }
    truth_with_infinity = TRUTH.clone()
    truth_with_infinity[50] = -torch.inf
    for word, got in bad.items():
        truth = truth_with_infinity if word == "infinities" else TRUTH
        assert word in verify.accuracy(got, good, truth).problem
        with pytest.raises(AssertionError, match=word):
            assert_as_accurate(got, good, truth, "here")
    assert verify.accuracy(off_by(-torch.inf), good, truth_with_infinity).problem is None
    assert "NaN" in verify.accuracy(off_by(float("nan")), off_by(float("nan")), TRUTH).problem


def test_an_empty_result_is_right():
    assert verify.accuracy(torch.zeros(0), torch.zeros(0), torch.zeros(0, dtype=torch.float64)).problem is None


def case_named(op):
    return next(case for case in cases.VERIFY if case.op == op)


def with_call(case, function):
    return dataclasses.replace(case, ours=function)


def problems(case, dtype=torch.float32):
    return {row.result for row in verify.check(case, dtype) if row.accuracy.problem}


@pytest.mark.parametrize("case", cases.VERIFY, ids=str)
def test_pytorch_passes_its_own_rule(case):
    """Where ours is PyTorch's own kernel there is nothing to find, for every result of every case."""
    assert not problems(with_call(case, case.peer or case.torch))


def test_planted_faults_are_found():
    norm, rms, attention = case_named("layer_norm"), case_named("rms_norm"), case_named("attention")
    assert problems(with_call(norm, lambda x, w, b: norm.torch(x, w, b) * 1.00001)) >= {"y", "dx"}
    assert problems(with_call(norm, lambda x, w, b: norm.torch(x, w.detach(), b))) == {"dweight"}
    assert problems(with_call(rms, lambda x, w: rms.torch(x, w).nan_to_num(0) + 0 * x.new_tensor(float("nan")))) >= {
        "y"
    }
    assert "dv" in problems(with_call(attention, lambda q, k, v: attention.torch(q, k, v.roll(1, 2))))


def test_a_call_that_raises_is_a_failure_of_its_case_alone():
    def broken(x, w):
        raise RuntimeError("out of luck")

    (row,) = verify.check(with_call(case_named("rms_norm"), broken), torch.float32)
    assert row.verdict == "FAIL: RuntimeError: out of luck"


def test_run_returns_rows_and_restores_the_settings():
    rows = verify.run(["softmax"], ["float32", "bfloat16"], cases=[case_named("softmax")])
    assert [(row.dtype, row.result) for row in rows] == [
        ("float32", "y"),
        ("float32", "dx"),
        ("bfloat16", "y"),
        ("bfloat16", "dx"),
    ]
    assert all(len(verify.cells(row)) == len(verify.HEADER) for row in rows)
    assert torch.are_deterministic_algorithms_enabled()  # as conftest.py left it


def test_worst_keeps_one_row_per_result_and_every_failure():
    good, near, bad = (
        verify.Accuracy(share=0.1),
        verify.Accuracy(share=0.9),
        verify.Accuracy(share=2, problem="far off"),
    )
    rows = [verify.Row("op", str(n), "float32", "y", "C++", "", a) for n, a in enumerate((good, near, good, bad, bad))]
    assert [row.case for row in verify.worst(rows)] == ["3", "4"]
    assert [row.case for row in verify.worst(rows[:3])] == ["1"]
    assert "3 results pass, 2 fail" in verify.summary(rows)
