"""Reports: files that are whole, tables and figures that say what the rows say, and comparison with an earlier one."""

import copy
import csv
import io
import json
import math
import re
import subprocess

import pytest
import torch

from fastllm import cli, drawing, text
from fastllm.bench import cases, compare, measure, page, plots, readme, show, store, timing

CEILINGS = {
    "copy_gb_per_s": 30.0,
    "read_gb_per_s": 33.0,
    "fma_float32_gflop_per_s": 200.0,
    "fma_bfloat16_gflop_per_s": 400.0,
}
NORM, ATTENTION = cases.norm("layer_norm", 64, 32), cases.attention(1, 2, 64, 16, causal=True)


def row(case, ratio=2.0, dtype="float32", passes="forward", cache="warm", noise=0.01, others=(), at_least=(), n=5):
    """A row whose samples are exact: ours takes 1 ms, PyTorch `ratio` ms (n times), others what is said."""
    made = object.__new__(measure.Measured)
    made.case, made.dtype, made.ceilings = case, getattr(torch, dtype), CEILINGS
    rounds = 5
    samples = {"ours": [1e-3] * rounds, "torch": [ratio * 1e-3] * n}
    samples |= {name: [seconds] * rounds for name, seconds in others}
    samples |= {"ours again": [1e-3 * math.exp(noise)] * rounds, "floor": [0.5e-3] * rounds}
    about = {"op": case.op, "case": case.name, "dtype": dtype, "kernel": "C++", "fallback": "", "wrong": "", "slow": ""}
    about |= {"pass": passes, "cache": cache, "sets": 2, "missing": {"liger": "ModuleNotFoundError: no Liger"}}
    about |= {"memory_bytes": {"ours": 1 << 20, "torch": 3 << 20}, "errors": {"ours": 1e-7, "torch": 2e-7}}
    figures = made.figures(passes, case.bytes(passes, made.dtype), "copy", samples, [0.0] * rounds, at_least)
    return about | figures


def wrong(case):
    about = {"op": case.op, "case": case.name, "dtype": "float32", "kernel": "C++", "fallback": ""}
    return about | {"pass": "forward", "cache": "warm", "wrong": "y: largest error 1.0, allowed 0.1", "slow": ""}


def report(*rows, **runs):
    found = {"stock": {"knobs": [], "ceilings": CEILINGS, "rows": list(rows)}}
    found |= {knobs: {"knobs": ["a knob"], "ceilings": CEILINGS, "rows": rows} for knobs, rows in runs.items()}
    options = {"rounds": 5, "block_ms": 1.0, "patience": 2.0}
    return {"schema": store.SCHEMA, "environment": store.environment(), "options": options, "interrupted": False} | {
        "runs": found
    }


FULL = (
    row(NORM, 2.5, others=[("naive", 4e-3)]),
    row(NORM, 0.5),
    row(NORM, 1.005),
    row(NORM, 3.0, cache="cold"),
    row(ATTENTION, 1.5, "bfloat16", "both", others=[("sdpa-math", 7e-3), ("compile", 2e-3)]),
)


def test_figures_of_a_row():
    found = row(NORM, 2.0, noise=0.02)
    assert found["ms"] == {"p20": 1.0, "median": 1.0, "p80": 1.0} and found["noise"] == pytest.approx(0.02)
    assert found["share_of_floor"] == 0.5 and found["bound_by"] == "copy"
    assert found["ratio"]["torch"] == {"p20": 2.0, "median": 2.0, "p80": 2.0} | {
        "tie": False,
        "n": 5,
        "at_least": False,
    }
    assert found["gb_per_s"] == pytest.approx(NORM.bytes("forward", torch.float32) / 1e-3 / 1e9)
    assert row(NORM, 1.01, noise=0.02)["ratio"]["torch"]["tie"]


def test_files_are_whole_and_samples_are_kept(tmp_path):
    path = tmp_path / "deep" / "report.json"
    store.save(path, report(*FULL))
    found = store.load(path)
    assert found["runs"]["stock"]["rows"][0]["samples_s"]["torch"] == [2.5e-3] * 5
    assert re.search(r'"torch": \[0.0025(, 0.0025){4}\]', path.read_text())  # samples on one line
    before = path.read_text()
    with pytest.raises(TypeError):
        store.save(path, report() | {"what": object()})
    assert path.read_text() == before and [p.name for p in path.parent.iterdir()] == ["report.json"]


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": 2}', "{}"])
def test_another_schema_is_refused(text, tmp_path):
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(ValueError, match=r"report\.json (is not JSON|has schema)"):
        store.load(tmp_path / "report.json")


def test_csv_has_a_line_for_each_contender_and_reason():
    lines = list(csv.DictReader(io.StringIO(store.table(report(*FULL, wrong(ATTENTION))))))
    first = [line for line in lines if line["op"] == "layer_norm"][:4]
    assert [line["contender"] for line in first] == ["ours", "torch", "naive", "liger"]
    assert float(first[1]["ratio_median"]) == 2.5 and float(first[1]["ms_median"]) == 2.5
    assert first[1]["peak_memory_bytes"] == str(3 << 20) and first[1]["error_vs_fp64"] == "2e-07"
    assert first[3]["problem"] == "ModuleNotFoundError: no Liger" and first[3]["ms_median"] == ""
    assert lines[-1]["problem"].startswith("y: largest error")


def standalone(html):
    """Nothing is fetched: no script, and no address but the names of XML's vocabularies."""
    assert "<script" not in html and "@import" not in html and "<link" not in html
    assert not re.findall(r'(?:src|href)="(?!#)[^"]*"', html)


def test_the_page_says_what_the_rows_say():
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    html = page.html(report(*FULL, wrong(ATTENTION), tuned=[row(NORM, 4.0)]))
    standalone(html)
    assert "2 / 1 / 1" in html and "rows faster / tied / slower" in html  # warm ones
    lost = html[html.index("Where PyTorch is faster") :]
    assert "64x32" in lost[: lost.index("</table>")] and "0.50" in lost[: lost.index("</table>")]
    assert "WRONG, so not timed" in html and "5 / 6" in html and "PyTorch, tuned" in html and "a knob" in html
    assert "missing liger: ModuleNotFoundError: no Liger" in html
    assert "prefers-color-scheme: dark" in html and drawing.DARK["card"] in html
    assert not re.search(r"#0102|#01030", html)  # every placeholder has its colour
    for heading in ("Warm and cold caches", "Memory", "Accuracy", "How close", "Every row"):
        assert heading in html


def slow(case):
    return wrong(case) | {"wrong": "", "slow": "a call takes 20 s"}


BOUNDS = (
    row(NORM, 12.0, n=1, others=[("naive", 3.0)]),
    row(NORM, 40.0, passes="both", at_least={"torch", "naive"}, others=[("naive", 3.0)]),
    slow(ATTENTION),
)


def test_one_call_and_a_lower_bound_are_said_to_be_so():
    first, second = (found["ratio"] for found in BOUNDS[:2])
    assert [show.standing(r) for r in (first["torch"], second["torch"])] == ["12.00x (n=1)", "> 40.00x"]
    assert plots.in_short(first["torch"]) == "12.00x (n=1)" and plots.in_short(second["torch"]) == "> 40.00x"
    assert show.cells(BOUNDS[2], ["torch"])[3] == "slow"
    assert show.reasons(BOUNDS)[0] == "slow, so not timed: attention 1x2x64x16 causal float32: a call takes 20 s"
    lines = list(csv.DictReader(io.StringIO(store.table(report(*BOUNDS)))))
    assert [(line["contender"], line["samples"], line["at_least"]) for line in lines][:3] == [
        ("ours", "5", ""),
        ("torch", "1", "False"),
        ("naive", "5", "False"),
    ]
    assert lines[5]["at_least"] == "True" and lines[-1]["problem"] == "a call takes 20 s"
    (op, other), _ = page.by_op(BOUNDS)
    assert op["cells"] == [("> 21.91x", "12.00 to 40.00")] and other["cells"] == [("-", "")]


def test_a_rival_far_out_does_not_squeeze_the_others():
    pytest.importorskip("matplotlib")
    drawn = plots.bars(plots.right(BOUNDS), "x")
    assert ">3,000<" in drawn.replace("&gt; ", "") and "&gt; 40.00x" in drawn
    assert ">1000<" not in drawn  # no tick there


def test_a_bound_is_no_yardstick_for_a_later_report():
    found = compare.compare(report(*BOUNDS), report(*BOUNDS), "base")["rows"]
    assert [row.get("yardstick") for row in found] == ["torch", "floor", None]
    assert [row["verdict"] for row in found] == ["same", "same", "not timed"] and not compare.regressed({"rows": found})


def test_a_page_of_nothing_but_wrong_rows():
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    html = page.html(report(wrong(ATTENTION)) | {"interrupted": True})
    assert "0 / 1" in html and "was interrupted" in html


def test_without_the_extra_there_is_no_page_but_a_reason(tmp_path, monkeypatch, capsys):
    import sys

    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.delitem(sys.modules, "fastllm.bench.page", raising=False)
    import fastllm.bench

    monkeypatch.delattr(fastllm.bench, "page", raising=False)
    show.write(tmp_path, report(*FULL))
    assert {p.name for p in tmp_path.iterdir()} == {"report.json", "report.csv"}
    assert "fastllm-kernels[bench]" in capsys.readouterr().out


# Comparison


def verdicts(before, after):
    found = compare.compare(report(*after), report(*before), "base")
    return [row["verdict"] for row in found["rows"]]


def test_slower_is_what_exceeds_the_noise_of_both():
    assert verdicts([row(NORM, 2.0)], [row(NORM, 1.9)]) == ["slower"]  # 5%, noise 1% each
    assert verdicts([row(NORM, 2.0)], [row(NORM, 2.2)]) == ["faster"]
    assert verdicts([row(NORM, 2.0, noise=0.03)], [row(NORM, 1.9, noise=0.03)]) == ["same"]
    assert verdicts([row(NORM)], [wrong(NORM)]) == ["wrong"]
    assert verdicts([wrong(NORM)], [row(NORM)]) == ["right again"]
    assert verdicts([wrong(NORM)], [wrong(NORM)]) == ["still wrong"]


def test_another_pytorch_is_no_yardstick():
    old = report(row(NORM, 2.0))
    old["environment"] = copy.deepcopy(old["environment"])
    old["environment"]["versions"]["torch"] = "2.11.0"
    found = compare.compare(report(row(NORM, 1.0)), old, "base")  # PyTorch became twice as fast, ours did not change
    assert found["rows"][0]["verdict"] == "same" and found["rows"][0]["yardstick"] == "floor"


def test_rows_that_were_not_measured_are_counted():
    found = compare.compare(report(row(NORM)), report(row(NORM), row(ATTENTION)), "base")
    assert found["missing"] == 1 and "1 rows of it were not measured" in compare.summary(found)


def test_base_is_a_file_a_folder_or_a_commit(tmp_path, monkeypatch):
    store.save(tmp_path / "bench/results/mine/report.json", report(row(NORM)))
    other = report(row(NORM))
    other["environment"]["cpu"] = other["environment"]["cpu"] | {"model": "another"}
    store.save(tmp_path / "bench/results/another/report.json", other)
    here = store.environment()
    for given in (tmp_path / "bench/results/mine", tmp_path / "bench/results/mine/report.json"):
        assert compare.base(str(given), here)[1]["runs"]["stock"]["rows"]
    monkeypatch.chdir(tmp_path)
    for words in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "x"]):
        subprocess.run(["git", *words], check=True)
    assert compare.base("HEAD", here)[0] == "HEAD:bench/results/mine/report.json"
    with pytest.raises(ValueError, match="no report of this machine"):
        compare.base("HEAD", here | {"gpu": ["something"]})
    with pytest.raises(ValueError, match="neither a report"):
        compare.base("nothing-of-this-name", here)


def test_a_regression_is_an_exit_code_on_request(tmp_path, monkeypatch, capsys):
    case = cases.softmax(3, 8)
    monkeypatch.setattr(cases, "BENCH", [case])
    monkeypatch.setattr(timing, "ceilings", lambda device: dict(CEILINGS))
    monkeypatch.setattr(timing, "tune", lambda: [])

    def rows(ratio):
        return lambda self, wanted: [row(case, ratio, cache=cache, passes=passes) for passes, cache in wanted]

    common = ["bench", "--dtype", "float32", "--passes", "forward"]
    monkeypatch.setattr(measure.Measured, "rows", rows(2.0))
    assert cli.main([*common, "--out", str(tmp_path)]) == 0
    monkeypatch.setattr(measure.Measured, "rows", rows(1.0))
    against = [*common, "--base", str(tmp_path)]
    assert cli.main(against) == 0
    assert "1 slower" in capsys.readouterr().out
    assert cli.main([*against, "--fail-on-regression", "--out", str(tmp_path / "new")]) == 1
    assert store.load(tmp_path / "new/report.json")["base"]["rows"][0]["verdict"] == "slower"
    for arguments in (["--fail-on-regression"], ["--resume"], ["--base", str(tmp_path / "no")], ["--threads", "0"]):
        assert cli.main([*common, *arguments]) == 2


# The README, and the progress line


def test_readme_takes_figures_and_tables_from_committed_reports(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    folder = tmp_path / "bench/results/mine"
    store.save(folder / "report.json", report(*FULL))
    store.save(folder.with_name("old") / "report.json", {"schema": 1})
    found = readme.reports(tmp_path / "bench/results")
    assert list(found) == [folder]
    readme.write_figures(folder, found[folder])
    light, dark = ((folder / f"figures/speed-stock-{theme}.svg").read_text() for theme in ("light", "dark"))
    assert drawing.LIGHT["ours"] in light and drawing.DARK["ours"] in dark and "var(--" not in light + dark
    block = readme.bench_block(found, tmp_path)
    assert "| layer_norm | 1.08x (0.50 to 2.50) | - | 1 of 3 | 50% |" in block
    assert 'srcset="bench/results/mine/figures/speed-stock-dark.svg"' in block
    assert "layer_norm 1.08x" in readme.headline(found) and "slower in 1 of 3 rows" in readme.headline(found)
    assert readme.bench_block({}) == "No report is committed yet; `make bench` measures yours."


def test_what_several_seeds_reach_is_a_mean_and_a_deviation():
    """And the mean, not the first run, is what is held against the other."""
    kept = dict(title="T", score="accuracy", test={"accuracy": 0.9}, beside=dict(name="B", value=0.85))
    assert "| 0.9 | 0.85 | B |" in readme.llm_block({"results": {"t": kept}})
    block = readme.llm_block({"results": {"t": kept | dict(of_seeds=[0.9, 0.8, 0.82])}})
    assert "| 0.84 ± 0.0529 (3 seeds) | 0.85 | B |" in block and block.endswith("Below what it stands beside: `t`.")


def test_the_readme_says_what_the_committed_reports_say():
    """`make readme-figures` writes it."""
    pytest.importorskip("jinja2")
    written = (readme.ROOT / "README.md").read_text()
    found = readme.reports()
    assert readme.fill(written, "bench", readme.bench_block(found)) == written
    assert readme.fill(written, "headline", readme.headline(found)) == written
    trained = json.loads((readme.RESULTS / "llm.json").read_text())
    assert readme.fill(written, "llm", readme.llm_block(trained)) == written
    for folder, kept in found.items():
        for name in readme.figures(kept):
            assert (folder / f"figures/{name}-light.svg").exists() and (folder / f"figures/{name}-dark.svg").exists()


def test_progress_says_how_long_it_will_be(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(text.time, "monotonic", lambda: now[0])
    out = io.StringIO()
    for _ in text.progress(range(5), "work", file=out, seconds=lambda item: 60.0):
        now[0] += 120.0  # twice as long as foreseen
    lines = out.getvalue().splitlines()
    assert lines[0] == "work: 5 steps, about 5 min"
    assert lines[1:] == [
        "work 2/5, 4 min left: 1",
        "work 3/5, 3 min left: 2",
        "work 4/5, 4 min left: 3",
        "work 5/5, 2 min left: 4",
    ]
    assert [text.duration(s) for s in (3, 89, 600, 7300)] == ["3 s", "89 s", "10 min", "2 h 2 min"]
