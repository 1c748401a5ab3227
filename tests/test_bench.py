"""The bench: its arithmetic, its order, its statistics, and that a wrong result is never timed."""

import argparse
import dataclasses
import json
import math

import pytest
import torch

from fastllm import cli, verify
from fastllm.bench import cases, measure, run, show, store, timing

TINY = [
    cases.attention(1, 2, 8, 16, Hkv=1, causal=True),
    cases.norm("layer_norm", 4, 8),
    cases.norm("rms_norm", 4, 8, residual=True),
    cases.softmax(3, 8, causal=True),
]


def options(*arguments):
    parser = argparse.ArgumentParser()
    run.configure(parser)
    made = parser.parse_args(["--rounds", "2", "--block-ms", "0.05", "--dtype", "float32", *arguments])
    run.complete(made)
    return made


@pytest.fixture(autouse=True)
def one_thread():
    """On a machine that others use too, threads that wait for each other cost more than these sizes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(cases, "BENCH", TINY)
    monkeypatch.setattr(cases, "QUICK", TINY[1:2])
    monkeypatch.setattr(timing, "last_level_cache", lambda device: 1 << 18)  # what is evicted, hundreds of times
    monkeypatch.setattr(
        timing,
        "ceilings",
        lambda device: {"copy_gb_per_s": 30.0, "read_gb_per_s": 33.0, "mm_float32_gflop_per_s": 200.0},
    )


@pytest.mark.parametrize("case", cases.BENCH + cases.VERIFY, ids=str)
def test_cases_say_what_they_cost(case):
    assert set(case.flops) == set(case.values) and set(case.flops) in (set(cases.PASSES), {"forward"})
    for costs in (case.flops, case.values):
        whole = costs["forward"] + costs.get("backward", 0)
        assert costs["forward"] > 0 and costs.get("both", whole) == whole
    floating = sum(math.prod(shape) for shape in case.shapes.values())
    assert case.values["forward"] >= 0.9 * floating  # every input is read, but small weights are not counted


def test_cases_have_different_names():
    for listed in (cases.BENCH, cases.VERIFY):
        assert len({str(case) for case in listed}) == len(listed)
    assert set(map(id, cases.QUICK)) <= set(map(id, cases.BENCH))
    assert {case.op for case in cases.QUICK} >= {"attention", "layer_norm", "rms_norm", "softmax"}


@pytest.mark.parametrize("T", [1, 5, 8])
@pytest.mark.parametrize("S", [1, 6, 8])
@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (2, 0), (0, 3), (1, 1)])
def test_pairs_are_counted_exactly(T, S, window):
    left, right = window
    for offset in (S - T, 0, 3):
        seen = [
            (left < 0 or j >= i + offset - left) and (right < 0 or j <= i + offset + right)
            for i in range(T)
            for j in range(S)
        ]
        assert cases.visible_pairs(T, S, left, right, offset) == sum(seen)


def test_attention_costs_are_the_textbook_ones():
    full, causal = cases.attention(2, 4, 64, 32), cases.attention(2, 4, 64, 32, causal=True)
    assert full.flops["forward"] == 4 * 2 * 4 * 64 * 64 * 32
    assert full.flops["backward"] == 2.5 * full.flops["forward"]
    assert causal.flops["forward"] == 4 * 2 * 4 * (64 * 65 // 2) * 32
    assert full.bytes("forward", torch.bfloat16) == 4 * 2 * 4 * 64 * 32 * 2


@pytest.mark.parametrize("case", cases.BENCH, ids=str)
def test_what_is_written_is_part_of_what_is_moved(case):
    for passes in case.flops:
        assert 0 <= case.written(passes, torch.bfloat16) <= 1
    assert cases.kvcache(1, 32, 8, 4096, 128).written("forward", torch.float32) < 0.01
    assert cases.softmax(8, 16).written("forward", torch.float32) == 0.5


@pytest.mark.parametrize("passes", cases.PASSES)
@pytest.mark.parametrize("case", TINY, ids=str)
def test_contenders_do_the_pass_they_are_asked_for(case, passes):
    leaves = case.inputs(torch.float32)
    made = measure.contender(case.ours, leaves, passes)
    for _ in range(2):  # a backward pass can be taken again
        got = made()
    if passes == "forward":
        first = got[0] if isinstance(got, tuple) else got
        assert not first.requires_grad
    else:
        assert [g.shape for g in got] == [x.shape for x in leaves]


def test_a_whole_run(tiny, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cases, "BENCH", TINY[:2])
    arguments = ["bench", "--rounds", "2", "--block-ms", "0.05", "--dtype", "float32", "--cache", "warm,cold"]
    assert cli.main([*arguments, "--out", str(tmp_path)]) == 0
    report = store.load(tmp_path / "report.json")
    rows = report["runs"]["stock"]["rows"]
    wanted = [(case.op, p, cache) for case in TINY[:2] for p in cases.PASSES for cache in run.CACHES]
    assert [(row["op"], row["pass"], row["cache"]) for row in rows] == wanted
    for row in rows:
        assert len(row["samples_s"]["ours"]) == len(row["samples_s"]["ours again"]) == len(row["foreign"]) >= 2
        names = {"torch", "naive"} | ({"sdpa-flash", "sdpa-math"} if row["op"] == "attention" else set())
        assert set(row["ratio"]) == names == set(row["errors"]) - {"ours"} and row["noise"] >= 0
        assert row["ms"]["p20"] <= row["ms"]["median"] <= row["ms"]["p80"]
        assert max(row["errors"].values()) < 1e-5 and min(row["errors"].values()) >= 0
        assert row["floor_ms"] > 0 and row["sets"] == 2 and row["slow"] == ""
        assert all(not ratio["at_least"] and ratio["n"] >= 2 for ratio in row["ratio"].values())
        assert not row["memory_bytes"] or set(row["memory_bytes"]) == names | {"ours"}
    assert {"versions", "cpu", "git", "date", "affinity"} <= set(report["environment"]) and not report["interrupted"]
    out = capsys.readouterr().out
    assert "vs torch" in out and "ceilings: copy_gb_per_s 30" in out and out.count("attention") == 6


def test_quick_and_named_ops(tiny):
    named = [row["op"] for row in run.run(options("--quick", "--passes", "forward"))["runs"]["stock"]["rows"]]
    assert named == ["layer_norm"]
    report = run.run(options("softmax", "--quick", "--passes", "forward"))  # --quick has none, so every case of it
    assert [row["op"] for row in report["runs"]["stock"]["rows"]] == ["softmax"]


def test_a_wrong_result_is_never_timed(tiny, monkeypatch, capsys):
    wrong = dataclasses.replace(TINY[3], ours=lambda x: TINY[3].torch(x) * 1.01)
    monkeypatch.setattr(cases, "BENCH", [wrong, TINY[1]])
    timed = []
    monkeypatch.setattr(timing, "interleave", lambda contenders, *rest: timed.append(contenders) or _fake(contenders))
    monkeypatch.setattr(measure.verify, "examine", _never_a_fallback(measure.verify.examine))
    assert cli.main(["bench", "--dtype", "float32", "--passes", "forward", "--rounds", "2"]) == 1
    assert len(timed) == 1  # the right one
    assert "WRONG, so not timed: softmax" in capsys.readouterr().out


def with_naive(case, seconds, monkeypatch):
    """A naive rival that takes `seconds` for every key head, on a clock where all else takes 1 ms; and its calls."""
    now, heads = [0.0], []

    def clock():
        now[0] += 1e-3
        return now[0]

    monkeypatch.setattr(timing.Foreign, "share", lambda self: 0.0)
    monkeypatch.setattr(measure.time, "perf_counter", clock)

    def naive(*inputs):
        if inputs[0].dtype != torch.float64:  # the truth
            heads.append(inputs[0].shape[1])
            now[0] += seconds * inputs[0].shape[1]
        return case.naive(*inputs)

    return dataclasses.replace(case, naive=naive), heads


@pytest.mark.parametrize(
    ("seconds", "heads", "n", "bound"),
    [
        (0.3, 4, 1, False),  # 1.2 s: every pass once, within the patience of a second
        (1.5, 1, 1, False),
        (0.6, 4, 1, False),  # longer, but not by so much that it is not called whole
        (4.0, 4, 1, True),  # a head is enough
    ],
)
def test_a_slow_rival_costs_what_the_patience_says(tiny, monkeypatch, seconds, heads, n, bound):
    case, called = with_naive(cases.attention(1, heads, 8, 16), seconds, monkeypatch)
    monkeypatch.setattr(cases, "BENCH", [case])
    report = run.run(options("--rivals", "torch,naive", "--patience", "1"))
    forward, backward, both = report["runs"]["stock"]["rows"]
    assert sum(called) * seconds <= 6 * measure.FORESEEN
    naive = forward["ratio"]["naive"]
    assert (naive["n"], naive["at_least"]) == (n, bound)
    assert forward["samples_s"]["naive"][0] == pytest.approx(seconds * (1 if bound else heads), rel=0.01)
    assert both["ratio"]["naive"]["at_least"] and both["ratio"]["naive"]["median"] > 100
    assert "longer than --patience 1 s" in backward["missing"]["naive"] and "naive" not in backward["ratio"]
    assert forward["ratio"]["torch"]["n"] >= 2 and 0 < forward["errors"]["naive"] < 1e-5


def test_ours_that_takes_too_long_is_said_not_timed(tiny, monkeypatch, capsys):
    case = TINY[3]
    now = [0.0]
    monkeypatch.setattr(verify.time, "perf_counter", lambda: now[0])

    def slow(x):
        now[0] += 5.0
        return case.ours(x)

    monkeypatch.setattr(cases, "BENCH", [dataclasses.replace(case, ours=slow)])
    report = run.run(options("--passes", "forward"))
    (row,) = report["runs"]["stock"]["rows"]
    assert row["slow"] == "a call takes 5 s" and "ms" not in row and now == [5.0]
    show.report(report)
    assert "slow, so not timed: softmax 3x8 causal float32: a call takes 5 s" in capsys.readouterr().out


def test_where_16_bit_calls_are_slow_the_peer_is_no_laxer(monkeypatch):
    """PyTorch in fp32, rounded once: what PyTorch's own 16-bit result may not be, ours may not be either."""
    case = cases.linear(16, 24, 32)
    now, dtypes = [0.0], []
    monkeypatch.setattr(verify.time, "perf_counter", lambda: now[0])

    def slow(*inputs):
        dtypes.append(inputs[0].dtype)
        now[0] += 0.5 if inputs[0].dtype == torch.bfloat16 else 0.0
        return case.torch(*inputs)

    watched = dataclasses.replace(case, torch=slow, ours=case.torch)
    seen = verify.examine(watched, torch.bfloat16, patience_s=2.0)
    assert dtypes == [torch.bfloat16, torch.float32] and not any(row.accuracy.problem for row in seen.rows)
    off = dataclasses.replace(watched, ours=lambda *x: case.torch(*x) * 1.02)
    assert {row.result for row in verify.check(off, torch.bfloat16)} <= {
        row.result for row in verify.examine(off, torch.bfloat16, patience_s=2.0).rows if row.accuracy.problem
    }
    dtypes.clear()
    verify.examine(watched, torch.bfloat16)
    assert dtypes == [torch.bfloat16]


def _fake(contenders):
    return {name: [1.0, 1.0] for name in contenders}, [0.0, 0.0]


def _never_a_fallback(examine):
    """Holds the rule even where the extension is missing and the results are plain PyTorch's."""

    def call(*args, **options):
        found = examine(*args, **options)
        found.rows = [dataclasses.replace(row, fallback="") for row in found.rows]
        return found

    return call


def test_a_rival_that_fails_is_a_named_missing_column(tiny, monkeypatch, capsys):
    def unable(x, w, b):
        if x.dtype == torch.float32:
            raise NotImplementedError("not on this machine\nmore")
        return TINY[1].naive(x, w, b)  # the fp64 truth

    monkeypatch.setattr(cases, "BENCH", [dataclasses.replace(TINY[1], naive=unable)])
    report = run.run(options("--passes", "forward"))
    (row,) = report["runs"]["stock"]["rows"]
    assert row["missing"] == {"naive": "NotImplementedError: not on this machine"} and set(row["ratio"]) == {"torch"}
    show.report(report)
    assert "missing naive: NotImplementedError: not on this machine" in capsys.readouterr().out


def test_an_interrupt_keeps_what_is_done_and_resume_goes_on(tiny, monkeypatch, tmp_path):
    once, again = options("--passes", "forward", "--out", str(tmp_path)), ["--out", str(tmp_path), "--resume"]
    measured, rows = [], measure.Measured.rows

    def interrupted(self, wanted):
        measured.append(self.case)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return rows(self, wanted)

    monkeypatch.setattr(measure.Measured, "rows", interrupted)
    report = run.run(once)
    assert report["interrupted"] and len(report["runs"]["stock"]["rows"]) == 1
    kept = store.load(tmp_path / "report.json")  # written when the row was done, not at the end
    assert kept["interrupted"] and len(kept["runs"]["stock"]["rows"]) == 1
    with pytest.raises(ValueError, match=r"another options \(rounds\)"):
        run.run(options("--passes", "forward", *again, "--rounds", "3"))
    report = run.run(options("--passes", "forward", *again))
    assert not report["interrupted"] and len(report["resumed"]) == 1
    assert [row["op"] for row in report["runs"]["stock"]["rows"]] == [case.op for case in TINY]
    assert measured == [TINY[0], *TINY[1:2], *TINY[1:]]  # the first is not measured twice


def test_tuned_comes_after_stock_and_precision_is_restored(tiny, monkeypatch):
    turned = []

    def tune():  # the real one tells glibc what it cannot take back
        torch.set_float32_matmul_precision("medium")
        turned.append(torch.get_float32_matmul_precision())
        return ["a knob"]

    monkeypatch.setattr(timing, "tune", tune)
    report = run.run(options("softmax", "--passes", "forward", "--knobs", "both"))
    assert list(report["runs"]) == ["stock", "tuned"] and turned == ["medium"]
    assert report["runs"]["tuned"]["knobs"] == ["a knob"]
    assert torch.get_float32_matmul_precision() == "highest"


def test_tuning_writes_an_entry_and_keeps_the_others(tmp_path, monkeypatch):
    from fastllm.bench import tune_linear
    from fastllm.ops import _tuned

    path = tmp_path / "tuned.json"
    path.write_text('{"another CPU": {"linear": {}}}')
    monkeypatch.setattr(_tuned, "PATH", path)
    monkeypatch.setattr(tune_linear, "GRID", {"M": [8, 16], "N": [4], "K": [4, 8]})
    monkeypatch.setattr(tune_linear, "ROUNDS", 1)
    assert tune_linear.main() == 0
    monkeypatch.setattr(tune_linear, "PATIENCE_S", 0.0)  # one call decides
    assert tune_linear.main(["bfloat16"]) == 0
    table = json.loads(path.read_text())
    assert set(table) == {"another CPU", _tuned.key()} and table["another CPU"] == {"linear": {}}
    for entry in ("linear", "linear bfloat16"):
        measured = table[_tuned.key()][entry]
        assert all(torch.tensor(measured[name]).shape == (2, 1, 2) for name in _tuned.PASSES)
