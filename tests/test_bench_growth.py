"""`fastllm bench scaling`: curves, their exponents, and steps of training on several ranks."""

import argparse
import json
import re
from types import SimpleNamespace

import pytest
import ranks as processes
import torch

from fastllm import cli
from fastllm.bench import cases, growth, page, ranks, store, timing
from fastllm.llm.distributed import start
from fastllm.model import Config


def curve_options(*arguments):
    parser = argparse.ArgumentParser()
    growth.configure(parser)
    return parser.parse_args(["--rounds", "2", "--block-ms", "0.05", "--dtype", "float32", *arguments])


def test_exponents_are_slopes_of_the_larger_half():
    xs = [1, 2, 4, 8, 16, 32]
    times = {x: (x / 8) ** 2 if x >= 8 else (1 / 8) ** 2 for x in xs}  # flat first, then quadratic
    points = [{"x": x, "samples_s": {"ours": [times[x], 3 * times[x]], "torch": [1.0 * x] * 2}} for x in xs]
    found = growth.exponents(points)
    assert found["ours"]["median"] == pytest.approx(2.0) and found["ours"]["from"] == 8
    assert found["torch"]["median"] == pytest.approx(1.0)
    two = growth.exponents(points[3:5])
    assert two["ours"]["median"] == pytest.approx(2.0) and growth.exponents(points[:1]) == {}
    fewer = [dict(x=x, samples_s={"ours": [t] * n}) for x, t, n in ((1, 1.0, 3), (2, 2.0, 3), (4, 4.0, 1))]
    fewer[0]["samples_s"]["ours"][0] = 5.0  # one round of many, though the largest size has no other
    assert growth.exponents(fewer)["ours"]["median"] == pytest.approx(1.0)


def test_a_rival_that_would_take_too_long_or_too_much_is_left_out():
    options = SimpleNamespace(limit_s=1.0, limit_gb=1.0)
    last = {"x": 64, "ms": {"naive": {"median": 300.0}}, "memory_bytes": {"naive": 1000}, "left_out": {}}
    assert "beyond 64 would take up to 1 s" in growth.too_much("naive", [last], options)
    last["ms"]["naive"]["median"] = 1.0
    assert growth.too_much("naive", [last], options) is None and growth.too_much("naive", [], options) is None
    last["memory_bytes"]["naive"] = 10**9
    assert "4 GB" in growth.too_much("naive", [last], options)
    last["left_out"] = {"naive": "as before"}
    assert growth.too_much("naive", [last], options) == "as before"


@pytest.fixture(autouse=True)
def threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def two_curves(monkeypatch):
    """Two curves of tiny sizes."""
    rows = lambda N: cases.softmax(N, 8)  # noqa: E731
    tiny = [
        growth.Curve("rows", "N", "softmax", "rows", rows, [2, 4, 8]),
        growth.Curve("threads", "threads", "softmax", "of PyTorch", lambda n: cases.softmax(8, 8), None, ("forward",)),
    ]
    monkeypatch.setattr(growth, "CURVES", tiny)
    torch.set_num_threads(1)
    monkeypatch.setattr(timing.Foreign, "share", lambda self: 0.0)  # a busy machine would be measured three times


def test_curves_are_measured_saved_and_continued(two_curves, monkeypatch, tmp_path, capsys):
    threads = torch.get_num_threads()
    point, seen = growth.point, []

    def interrupted(curve, x, *rest):
        seen.append(x)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return point(curve, x, *rest)

    monkeypatch.setattr(growth, "point", interrupted)
    arguments = ["rows", "--rounds", "2", "--block-ms", "0.05", "--dtype", "float32", "--out", str(tmp_path)]
    assert cli.main(["bench", "scaling", *arguments]) == 130
    kept = store.load(tmp_path / "scaling.json")
    assert kept["interrupted"] and [p["x"] for p in kept["curves"][0]["points"]] == [2, 4]
    assert cli.main(["bench", "scaling", *arguments, "--resume"]) == 0
    found = store.load(tmp_path / "scaling.json")
    assert seen == [2, 4, 8, 8, 2, 4, 8] and not found["interrupted"]
    assert [(c["pass"], [p["x"] for p in c["points"]]) for c in found["curves"]] == [
        ("forward", [2, 4, 8]),
        ("both", [2, 4, 8]),
    ]
    assert set(found["curves"][0]["exponents"]) == {"ours", "torch", "naive"}
    assert "time grows as ours N^" in capsys.readouterr().out
    assert torch.get_num_threads() == threads


def test_threads_are_set_and_given_back(two_curves, monkeypatch):
    monkeypatch.setattr(timing.os, "sched_getaffinity", lambda pid: {0, 1, 2}, raising=False)
    before, inside = torch.get_num_threads(), []
    interleave = timing.interleave

    def watched(*args, **options):
        inside.append(torch.get_num_threads())
        return interleave(*args, **options)

    monkeypatch.setattr(timing, "interleave", watched)
    report = growth.run(curve_options("threads"))
    assert inside == [1, 2, 3] == [p["x"] for p in report["curves"][0]["points"]]
    assert torch.get_num_threads() == before


def test_curves_are_drawn(two_curves):
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    html = page.html(None, growth.run(curve_options()))
    assert "<script" not in html and not re.findall(r'(?:src|href)="(?!#)[^"]*"', html)
    assert "How cost grows" in html and "softmax, fp32, forward" in html


def test_wrong_curves_are_not_timed(two_curves, monkeypatch):
    good = growth.CURVES[0].case
    monkeypatch.setattr(growth.verify, "check", lambda *args: [bad()])

    def bad():
        from fastllm.verify import Accuracy, Row

        return Row("softmax", "x", "float32", "y", "C++", "", Accuracy(problem="far off"))

    monkeypatch.setattr(growth, "point", lambda *args: pytest.fail("timed"))
    report = growth.run(curve_options("rows"))
    assert good and report["curves"][0]["points"] == [] and "far off" in report["curves"][0]["missing"][0]


@pytest.mark.parametrize("arguments", [["nope"], ["--rounds", "0"], ["--resume"]])
def test_bad_words_of_scaling_are_refused(arguments, capsys):
    assert cli.main(["bench", "scaling", *arguments]) == 2
    assert capsys.readouterr().err.startswith("fastllm: error: bench scaling:")


def test_sizes_reach_what_the_curves_promise():
    last = {curve.name: curve.sizes[-1] for curve in growth.CURVES if curve.sizes}
    assert last["attention-T"] == 32768 and last["cross_entropy-V"] == 262144
    assert len({curve.name for curve in growth.CURVES}) == len(growth.CURVES)
    assert growth.CURVES[0].points(500) == [128, 256]


# Ranks


TINY = Config(64, d_model=16, heads=2, layers=1, d_ff=32, positions="rotary", dropout=0.0, max_len=8)


def measured(folder):
    with start() as group:
        found = ranks.measure(group, TINY, 4, 8, 2, naive=True)
        if group.first:
            (folder / "found.json").write_text(json.dumps(found))


def test_what_ranks_send_is_the_formula_of_the_docs(tmp_path):
    """docs/scaling.md: DDP sends 8 N (P - 1) / P bytes a step."""
    processes.run_launched(measured, 2, tmp_path)
    two = json.loads((tmp_path / "found.json").read_text())
    alone = ranks.measure(ranks_of_one(), TINY, 4, 8, 2, naive=True)
    for name in ("ours", "naive"):
        N = two[name]["parameters"]
        assert 4 * N < two[name]["sent"] < 4 * N + 4096  # and a few numbers, the loss for example
        assert alone[name]["sent"] == 0 and len(two[name]["samples_s"]) == 2
        assert abs(two[name]["loss"] - alone[name]["loss"]) < ranks.SAME * alone[name]["loss"]
    assert two["ours"]["loss"] == pytest.approx(two["naive"]["loss"], rel=ranks.SAME)


def ranks_of_one():
    from fastllm.llm.ranks import Ranks

    return Ranks()


@pytest.fixture
def one_curve(monkeypatch):
    """DDP's curve, of processes that are not started; returns what they find, by their number."""
    monkeypatch.setattr(growth, "CURVES", [curve for curve in growth.CURVES if curve.name == "ddp-ranks"])
    found = {
        count: {
            name: dict(parameters=8, loss=2.0, sent=8 * (count - 1) * 1e6, held=8e6 / count, samples_s=[slow, 2 * slow])
            for name, slow in (("ours", 1.0), ("naive", 2.0))
        }
        for count in (1, 2, 4, 8)
    }
    monkeypatch.setattr(ranks, "why_not", lambda: None)
    monkeypatch.setattr(ranks, "launched", lambda count, arguments: found[count])
    return found


def test_curves_over_ranks_have_exponents_of_time_memory_and_what_is_sent(one_curve, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    assert cli.main(["bench", "scaling", "--dtype", "bfloat16", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "time grows as ours ranks^0.00" in printed and "memory grows as ours ranks^-1.00" in printed
    assert "what a rank sends grows as ours ranks^1." in printed and "2.00x" in printed
    (curve,) = store.load(tmp_path / "scaling.json")["curves"]
    assert curve["dtype"] == "float32" and [point["x"] for point in curve["points"]] == [1, 2, 4, 8]
    html = (tmp_path / "report.html").read_text()
    assert "What the rank that sends most sends in a step." in html and "The most a rank held in a step." in html


def test_a_step_that_is_another_on_more_ranks_is_not_timed(one_curve):
    one_curve[4]["naive"]["loss"] = 2.01
    (curve,) = growth.run(curve_options())["curves"]
    assert [point["x"] for point in curve["points"]] == [1, 2]
    assert curve["missing"] == ["ours: WRONG, so not timed: naive has loss 2.01 on 4 processes, 2.0 on one"]


def test_ranks_that_cannot_be_measured_are_said(one_curve, monkeypatch):
    monkeypatch.setattr(ranks, "why_not", lambda: "no /proc here")
    (curve,) = growth.run(curve_options())["curves"]
    assert curve["points"] == [] and curve["missing"] == ["ours: no /proc here"]


def test_processes_that_end_badly_are_said(monkeypatch):
    monkeypatch.setattr(ranks.sys, "executable", "false")
    with pytest.raises(ranks.Failed, match="2 processes ended with status 1: it printed nothing"):
        ranks.launched(2, [])
