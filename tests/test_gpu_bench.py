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
from fastllm.bench.gpu import checks, look, show, timed, watching
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
LOOKED = 'a warning\n{"results": 3, "bad": ["y: wrong"], "lacking": 0}\n{"kernels": ["one"]}\n'
MODEL = dict(vocab=11, d_model=16, heads=2, layers=1, d_ff=16, max_len=8)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(bars, "BARS", TINY)
    monkeypatch.setattr(cases, "VERIFY", [bar.case for bar in TINY[-2:]])
    monkeypatch.setattr(checks, "side_by_side", lambda stage, jobs, each_s: [(jobs[0][0], 0, LOOKED, 0.1)])
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
    (looked,) = of(found, "look")
    assert (looked["op"], looked["backend"], looked["results"], looked["kernels"]) == (
        "layer_norm",
        "triton",
        3,
        ["one"],
    )
    assert "look layer_norm triton: 1 bad: y: wrong" in shown
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
    options.block_s, options.deadline = 1e-5, 1e12
    return gpu.Stage(options, gpu.Log(folder / "log.jsonl"))


def test_a_step_that_fails_is_a_line(tmp_path):
    stage = stage_of(tmp_path)
    stage.steps = lambda: [("one", 0, 9, lambda: 1 / 0), ("two", 0, 9, lambda: stage.log.add("two", kind="made"))]
    stage.run()
    assert of(stage.log.rows, "error")[0]["error"].startswith("ZeroDivisionError") and of(stage.log.rows, "made")


def test_a_poisoned_context_ends_the_process(tmp_path, monkeypatch):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    stage = stage_of(tmp_path)
    stage.machine.cuda = True

    def poisoned():
        raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")

    stage.steps = lambda: [("one", 0, 9, poisoned)]
    stage.run()
    assert ended == [3]
    assert "one" in gpu.Log(tmp_path / "log.jsonl").begun()  # so that it is not tried again


# A process that takes the steps one after the other, as Stage.run does; each is Python.
STEPS = """
import json, os, sys, time
path = sys.argv[1]
def add(**row):
    with open(path, "a") as file:
        file.write(json.dumps(row) + chr(10))
done = {json.loads(line)["step"] for line in open(path)} if os.path.exists(path) else set()
for name, code in json.loads(sys.argv[2]):
    if name not in done:
        add(step=name, kind="start", limit=0.0)
        exec(code)
        add(step=name, kind="end")
"""


@pytest.mark.parametrize(
    "steps, errors",
    [
        ([("a", ""), ("b", "")], {}),
        ([("a", "os._exit(3)"), ("b", "os.kill(os.getpid(), 9)"), ("c", "")], {"a": "status 3", "b": "status -9"}),
        ([("a", "time.sleep(60)"), ("b", "")], {"a": "a kernel that hangs?"}),
    ],
    ids=["well", "dies", "hangs"],
)
def test_a_watched_process(tmp_path, monkeypatch, steps, errors):
    monkeypatch.setattr(watching, "PATIENCE_S", 1.5)
    path = tmp_path / "log.jsonl"
    watching.watch([sys.executable, "-c", STEPS, str(path), json.dumps(steps)], path, time.time() + 50)
    log = gpu.Log(path)
    found = {row["step"]: row["error"] for row in log.of("error")}
    assert found.keys() == errors.keys() and all(text in found[name] for name, text in errors.items())
    assert [row["step"] for row in log.of("end")] == [name for name, _ in steps if name not in errors]


def test_a_process_that_begins_nothing_is_not_tried_for_ever(tmp_path, capsys):
    path = tmp_path / "log.jsonl"
    path.write_text(json.dumps({"step": "before", "kind": "end"}) + "\n")
    watching.watch([sys.executable, "-c", "raise SystemExit(1)"], path, time.time() + 50)
    assert "no more steps" in capsys.readouterr().err


def test_the_time_of_a_watched_process_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(watching, "PATIENCE_S", 0.0)
    path = tmp_path / "log.jsonl"
    steps = json.dumps([("a", "add(step='a', limit=60, kind='start'); time.sleep(60)")])
    watching.watch([sys.executable, "-c", STEPS, str(path), steps], path, time.time() + 1)
    assert [row["error"] for row in gpu.Log(path).of("error")][-1:] in (["the time is over"], [])


FAKE_PYTEST = """
import os, sys, time
for name in sys.argv[1:]:
    if "hangs" in name:
        print(name, end=" ", flush=True); time.sleep(60)
    if "dies" in name:
        os._exit(11)
    print(name, "FAILED" if "poisons" in name else "PASSED", flush=True)
    if "poisons" in name:
        sys.exit(2)
"""


def test_a_share_of_tests_goes_on_behind_what_hangs_dies_or_poisons(tmp_path):
    names = [f"tests/test_a.py::{name}" for name in ("one", "poisons", "two", "hangs", "three", "dies", "four")]
    pytest_ = [sys.executable, "-c", FAKE_PYTEST]
    found = checks.run_share(pytest_, names, tmp_path / "log.txt", time.time() + 50, patience_s=1.5)
    ends = dict(zip(names, "PASSED FAILED PASSED KILLED PASSED KILLED PASSED".split(), strict=True))
    assert found == ends


def test_each_file_has_its_share_of_tests_at_any_time():
    ids = [f"a::{n}" for n in range(4)] + [f"b::{n}" for n in range(2)]
    assert checks.a_few_of_each(ids) == ["a::0", "b::0", "a::1", "a::2", "b::1", "a::3"]


def test_looking_at_an_op(tiny):
    found = look.found("softmax", "triton", "cpu")
    assert found["results"] > 0 and found["lacking"] == 0 and not found["bad"]
    assert {"attention", "softmax"} <= {op for op, _ in checks.looks()} | {"attention"}


def test_jobs_side_by_side(tmp_path):
    stage = stage_of(tmp_path)
    stage.options.workers = 2
    jobs = [(name, [sys.executable, "-c", code], {"WORD": "hello"}) for name, code in JOBS.items()]
    found = {name: (status, output) for name, status, output, _ in checks.side_by_side(stage, jobs, each_s=3)}
    assert found["well"] == (0, "hello\n") and found["dies"][0] == 7
    assert found["hangs"][0] is None and "begun" in found["hangs"][1] and "no end after 3 s" in found["hangs"][1]


JOBS = {
    "well": "import os; print(os.environ['WORD'])",
    "dies": "raise SystemExit(7)",
    "hangs": "import time; print('begun', flush=True); time.sleep(60)",
}


def test_what_ended_badly_is_not_timed(tiny, tmp_path, monkeypatch):
    stage = stage_of(tmp_path)
    stage.log.add("look softmax triton", kind="look", op="softmax", backend="triton", problem="no end after 90 s")
    timed.time_bar(stage, TINY[-1])
    assert stage.log.of("bar")[0]["wrong"] == "no end after 90 s"


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
