"""bench/gpu on a CPU, with interpreted kernels, tiny sizes and made-up rivals: no minute on a GPU goes to a typo."""

import dataclasses
import json
import multiprocessing.dummy
import os
import sys
import threading
import time
import types

import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("this is for machines without a GPU", allow_module_level=True)

import interpreter  # noqa: F401

from fastllm.bench import bars, cases, gpu, tune
from fastllm.bench.bars import Bar
from fastllm.bench.gpu import checks, show, timed
from fastllm.bench.tune import Tunable

FP32 = torch.float32
TINY = [
    Bar(cases.attention(1, 1, 18, 16, causal=True), "forward", {"sdpa": 1e9, "matrix": 0.0}, FP32),
    Bar(cases.varlen([3, 5], 1, 16, causal=True), "forward", {"torch": 0.0}, FP32),
    Bar(cases.kvcache(1, 2, 1, 32, 16, page_size=16), "forward", {"bandwidth": 0.0}, FP32),
    Bar(cases.norm("rms_norm", 4, 24), "backward", {"bandwidth": 0.0, "compile": 0.0}, FP32, compile_mode="default"),
    Bar(cases.norm("layer_norm", 4, 24), "forward", {"torch": 0.0}, FP32),
    Bar(cases.softmax(4, 40), "forward", {"bandwidth": 0.0}, FP32, graph=True),
]
TINY_TUNABLES = [
    Tunable("attention", "Call", "launch", "dq", [(TINY[0].case, "backward")], [dict(BLOCK_M=16)]),
    Tunable("softmax", None, "_launch_for", None, [(TINY[-1].case, "forward")], [dict(ROWS=1), dict(BLOCK=16)]),
]
MODEL = dict(vocab=11, d_model=16, heads=2, layers=1, d_ff=16, max_len=8)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(bars, "BARS", TINY)
    monkeypatch.setattr(cases, "VERIFY", [bar.case for bar in TINY[-2:]])
    monkeypatch.setattr(tune, "tunables", lambda: TINY_TUNABLES)
    sizes = bars.Sizes(copy_bytes=1 << 16, products=((8, 8, 8),), model=MODEL, batch=1, dtype=FP32)
    monkeypatch.setattr(bars, "SIZES", sizes)
    interleave = timed.timing.interleave
    monkeypatch.setattr(timed.timing, "interleave", lambda calls, rounds, *rest: interleave(calls, 1, *rest))
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    attend = lambda q, k, v, causal: torch.nn.functional.scaled_dot_product_attention(  # noqa: E731
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal
    ).transpose(1, 2)
    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(flash_attn_func=attend))
    norm = types.SimpleNamespace(apply=lambda x, w, eps: torch.nn.functional.rms_norm(x, w.shape, w, eps))
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", types.ModuleType("liger_kernel.ops"))
    liger = types.SimpleNamespace(LigerRMSNormFunction=norm)
    monkeypatch.setitem(sys.modules, "liger_kernel.ops.rms_norm", liger)


def arguments(folder, *more):
    fast = ["--device", "cpu", "--budget", "100000", "--block-ms", "0.01", "--workers", "1"]
    return [*fast, "--out", str(folder), "--tests", "nearest_even", "--test-files", "test_interpreter.py", *more]


def rows(folder):
    (path,) = (folder / "cpu").glob("*.jsonl")
    return path, [json.loads(line) for line in path.read_text().splitlines()]


def of(found, kind):
    return [row for row in found if row.get("kind") == kind]


def test_check(tiny, tmp_path, capsys):
    assert gpu.main(arguments(tmp_path)) == 0
    path, found = rows(tmp_path)
    shown = capsys.readouterr().out
    assert not of(found, "error") and not of(found, "skipped")
    (ceilings,) = of(found, "ceilings")
    assert {"copy_gb_per_s", "read_gb_per_s", "matrix_8x8x8_gflop_per_s", "graph_us"} < set(ceilings)
    (tests,) = of(found, "tests")
    assert (tests["PASSED"], tests["listed"], tests["unfinished"], tests["bad"]) == (1, 1, 0, [])
    assert of(found, "compile")[0]["failed"] == [] and of(found, "compile")[0]["jobs"] == len(TINY) + 1
    assert len(of(found, "sanitizer")) == 2 * len(bars.RISKIEST)
    attention, packed, cache, rms, layer, softmax = of(found, "bar")
    assert {"torch", "flash-attn-2"} <= set(attention["ratio"]) and "flash-attn-3" in attention["missing"]
    assert set(attention["missed"]) == {"sdpa"} and not packed["missed"] and not cache["missed"]
    assert {"torch", "compile", "liger"} == set(rms["ratio"]) and "liger" in layer["missing"]
    assert all(row["wrong"] == "" and row["ms"] > 0 and row["noise"] >= 0 for row in of(found, "bar"))
    (training,) = of(found, "training")
    assert set(training["ratio"]) == {"textbook", "sdpa", "sdpa compiled"} and training["parameters"] > 0
    assert "missed: sdpa" in shown and "tests: 1 passed" in shown and "training step" in shown
    before = path.read_text()
    assert gpu.main(arguments(tmp_path, "--resume", str(path))) == 0  # everything is done already
    assert path.read_text() == before


def test_compiling_side_by_side_waits_for_nobody(tiny, tmp_path, monkeypatch):
    never = threading.Event()

    def made_up(job):
        if job[0] == 1:
            never.wait(30)
        return f"bar {job[0]}", "RuntimeError: no" if job[0] == 0 else ""

    monkeypatch.setattr(checks, "warm_up", made_up)
    threads = types.SimpleNamespace(
        get_context=lambda kind: multiprocessing.dummy, TimeoutError=multiprocessing.TimeoutError
    )
    monkeypatch.setattr(checks, "multiprocessing", threads)
    stage = stage_of(tmp_path)
    stage.options.workers, stage.options.deadline = 3, time.time() + 3
    checks.compile_kernels(stage)
    never.set()
    (row,) = stage.log.of("compile")
    assert (
        row["failed"] == ["bar 0: RuntimeError: no", f"{TINY[1].name}: not finished"] and row["jobs"] == len(TINY) + 1
    )


def test_accept_takes_the_worse_of_two_runs(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(bars, "BARS", TINY[-1:])
    monkeypatch.setattr(checks.verify, "run", lambda device: [])
    times = iter([1.0, 2.0])

    def made_up(stage, contenders, rounds=5):
        ours = next(times, 1.0)
        return {name: [ours if name.startswith("ours") else 4.0] * 3 for name in contenders}

    monkeypatch.setattr(timed, "rounds_of", made_up)
    gpu.main(arguments(tmp_path, "--stage", "accept", "--no-compile"))
    (bar,) = of(rows(tmp_path)[1], "bar")
    assert bar["ms"] == 2e3 and bar["ratio"] == {"torch": 2.0} and len(bar["samples_s"]) == 2


def test_tune(tiny, tmp_path, capsys):
    from fastllm.kernels import softmax

    before = softmax._launch_for
    assert gpu.main(arguments(tmp_path, "--stage", "tune")) == 0
    dq, rows_of_softmax = of(rows(tmp_path)[1], "tune")
    assert [row["problem"] for row in dq["rows"]] == [""] and dq["rows"][0]["now"]["BLOCK_M"] == 32
    fits, wrong = rows_of_softmax["rows"]
    assert fits["ratio"] > 0 and "ratio" not in wrong and wrong["problem"]  # 16 columns cannot hold 40
    assert softmax._launch_for is before


def test_best_change_is_right_and_faster_than_noise():
    rows = [
        dict(problem="wrong"),
        dict(ratio=1.5, tie=True),
        dict(ratio=0.9, tie=False),
        dict(ratio=1.1, tie=False),
        dict(ratio=1.2, tie=False),
    ]
    assert tune.best(rows) is rows[4] and tune.best(rows[:3]) is None


def test_no_time_left(tiny, tmp_path, capsys):
    assert gpu.main(arguments(tmp_path, "--budget", "0.0")) == 0
    found = rows(tmp_path)[1]
    assert len(of(found, "skipped")) == len(found) > len(TINY)
    assert "skipped: ceilings: " in capsys.readouterr().out


def test_a_wrong_result_is_not_timed(tiny, tmp_path, monkeypatch, capsys):
    case = dataclasses.replace(TINY[-1].case, ours=lambda x: TINY[-1].case.torch(x) * 1.01)
    monkeypatch.setattr(bars, "BARS", [dataclasses.replace(TINY[-1], case=case)])
    stage = stage_of(tmp_path)
    timed.time_bar(stage, bars.BARS[0])
    (bar,) = stage.log.of("bar")
    assert "y: norm of the error" in bar["wrong"] and "ms" not in bar
    show.report(stage.log)
    assert "WRONG: y: norm" in capsys.readouterr().out


def stage_of(folder):
    options = gpu.parse(arguments(folder))
    options.block_s, options.deadline, options.again = 1e-5, 1e12, ["--again"]
    return gpu.Stage(options, gpu.Log(folder / "log.jsonl"))


def test_a_step_that_fails_is_a_line(tmp_path):
    stage = stage_of(tmp_path)
    stage.steps = lambda: [("one", 0, lambda: 1 / 0), ("two", 0, lambda: stage.log.add("two", kind="made"))]
    stage.run()
    assert of(stage.log.rows, "error")[0]["error"].startswith("ZeroDivisionError") and of(stage.log.rows, "made")


def test_a_poisoned_context_starts_the_process_anew(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(os, "execv", lambda program, command: started.append(command))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    stage = stage_of(tmp_path)
    stage.machine.cuda = True

    def poisoned():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    stage.steps = lambda: [("one", 0, poisoned)]
    stage.run()
    assert started == [[sys.executable, "-m", "fastllm.bench.gpu", "--again"]]
    assert "one" in gpu.Log(tmp_path / "log.jsonl").begun()  # so that it is not tried again


def test_outcomes_of_a_log_that_was_cut():
    log = "tests/test_a.py::test_x[triton-a b] PASSED [ 10%]\ntests/test_a.py::test_y FAILED\ntests/test_a.py::test_z "
    assert checks.outcomes_in(log) == {
        "tests/test_a.py::test_x[triton-a b]": "PASSED",
        "tests/test_a.py::test_y": "FAILED",
    }


def test_the_real_bars():
    """Every rival can be named, every tunable kernel exists, and names are unique: a log knows steps by them."""
    import importlib

    names = [bar.name for bar in bars.BARS]
    assert len(set(names)) == len(names)
    for bar in bars.BARS:
        known = {"bandwidth", "matrix", "sdpa", *bars.rivals_of(bar)}
        assert set(bar.targets) <= known, bar.name
    for tunable in tune.tunables():
        module = importlib.import_module(f"fastllm.kernels.{tunable.module}")
        assert callable(getattr(getattr(module, tunable.holder) if tunable.holder else module, tunable.function))
        assert len(tunable.changes) <= 6
    lengths = bars.log_uniform(128, 8192, 32)
    assert (lengths[0], lengths[-1], len(lengths)) == (128, 8192, 32)


def test_without_a_gpu(capsys):
    assert gpu.main(["--stage", "check"]) == 2
    assert "no CUDA device" in capsys.readouterr().err
