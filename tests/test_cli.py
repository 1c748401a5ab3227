"""The command: what it prints, exit codes, one clear line for bad input, no other package for the plain part."""

import json
import os
import re
import shlex
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch

import fastllm
from fastllm import cli, dispatch, info, text, verify
from fastllm.bench import readme

ROOT = Path(__file__).resolve().parents[1]


def test_info_says_what_is_there_and_what_is_not(capsys):
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    for word in (
        fastllm.__version__,
        torch.__version__,
        info.cpu_model(),
        "reference ready",
        "not yet measured on hardware",
    ):
        assert word in out
    if dispatch.extension is None:
        assert dispatch.missing_extension in out
    else:
        assert dispatch.extension.selected() in out


def test_info_json_is_for_programs(capsys):
    assert cli.main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["backends"]) == set(dispatch.BACKENDS)
    assert all(state["ready"] or state["why_not"] for state in found["backends"].values())
    assert found["backends"]["cpu"]["ready"] == (dispatch.extension is not None)
    assert found["cpu"]["threads"] == torch.get_num_threads()


def test_matrix_of_the_readme_is_the_one_of_the_code():
    """`make readme` writes it."""
    written = (ROOT / "README.md").read_text()
    assert readme.fill(written, "matrix", info.matrix()) == written


def test_matrix_has_every_public_op_and_every_keyword():
    table = info.matrix()
    for name in ("attention", "layer_norm", "rms_norm", "softmax", "log_softmax"):
        assert f"| `{name}` |" in table
    for keyword in ("causal", "window", "q_offset", "softcap", "mask", "bias", "alibi_slopes", "sink", "dropout_p"):
        assert f"| {keyword}" in table


def test_the_readme_fills_in_numbers_from_the_report():
    git = {"commit": "0123456789", "dirty": True}
    tables = [{"title": "Speed", "header": ["op", "ratio"], "rows": [["softmax", 2]]}]
    demo = {"machine": "a machine", "git": git, "tables": tables}
    filled = readme.fill("a\n<!-- demo -->\nold\n<!-- /demo -->\nb", "demo", readme.demo_block(demo))
    assert "old" not in filled and "| softmax | 2 |" in filled and filled.startswith("a\n") and filled.endswith("\nb")
    assert "commit 0123456 with changes, on: a machine" in filled
    with pytest.raises(ValueError, match="<!-- demo -->"):
        readme.fill("no markers", "demo", "x")


PYTHON_BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("code", PYTHON_BLOCKS, ids=["accelerate", "functions", "generation", "modules"])
def test_the_examples_of_the_readme_run(code):
    exec(compile(code, "README.md", "exec"), {})


@pytest.mark.parametrize("page", ["README.md", "docs/from-scratch.md"])
def test_the_commands_of_the_pages_are_some(page):
    pytest.importorskip("tokenizers")
    lines = re.findall(r"^ *(fastllm [a-z].*)", (ROOT / page).read_text(), re.MULTILINE)
    parser = cli.build_parser()
    for line in lines:
        parser.parse_args(shlex.split(line, comments=True)[1:])
    assert len(lines) > 10


def test_verify_exits_0_and_1(capsys, monkeypatch):
    fine = verify.Row("softmax", "3x3", "float32", "y", "C++", "", verify.Accuracy())
    monkeypatch.setattr(verify, "run", lambda *args: [fine])
    assert cli.main(["verify", "softmax"]) == 0
    assert "1 results pass, 0 fail" in capsys.readouterr().out
    broken = verify.Row("softmax", "4x4", "float32", "y", "C++", "", verify.Accuracy(problem="far off"))
    monkeypatch.setattr(verify, "run", lambda *args: [fine, broken])
    assert cli.main(["verify"]) == 1
    assert "FAIL: far off" in capsys.readouterr().out


def test_verify_says_when_there_was_nothing_to_verify(capsys, monkeypatch):
    row = verify.Row("softmax", "3x3", "float32", "y", "PyTorch", "no compiler", verify.Accuracy(problem="far off"))
    monkeypatch.setattr(verify, "run", lambda *args: [row])
    assert cli.main(["verify"]) == 0
    assert "1 ran on plain PyTorch, which is not ours to verify: no compiler" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["verify", "nope"], ["bench", "nope"], ["bench", "softmax", "--rounds", "0"]])
def test_bad_input_is_one_line_and_exit_code_2(capsys, arguments):
    assert cli.main(arguments) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.startswith("fastllm: error: ") and told.err.count("\n") == 1
    assert arguments[-1] in told.err


@pytest.mark.parametrize("arguments", [["nope"], [], ["info", "--nope"], ["verify", "--dtype", "int8"]])
def test_usage_errors_exit_with_2(capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    said = capsys.readouterr().err
    assert caught.value.code == 2 and said.count("\n") == 2, said
    assert re.match(r"(fastllm[a-z ]*): error: .*\n\1 --help says what there is\n", said)


@pytest.mark.parametrize(
    "typed, meant",
    [
        ("pretrian", "pretrain"),
        ("classify DATA --epohcs=3", "--epochs"),
        ("finetune clasification --model M --data D", "classification"),
        ("finetune language --modle M --data D", "--model"),  # whose absence is noticed first
        ("finetune language --model M --data D --optimizer adamv", "adam"),
        ("zzz", None),
    ],
)
def test_a_mistyped_word_is_named(capsys, typed, meant):
    pytest.importorskip("tokenizers")
    with pytest.raises(SystemExit) as caught:
        cli.main(typed.split())
    said = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2 and len(said) == 2
    assert said[0].endswith(f"; did you mean {meant}?") if meant else "did you mean" not in said[0]


def test_traceback_on_request():
    with pytest.raises(ValueError, match="nope"):
        cli.main(["--traceback", "verify", "nope"])


def fake_command(name, run):
    def add_arguments(subparsers):
        subparsers.add_parser(name).set_defaults(run=run)

    return types.SimpleNamespace(add_arguments=add_arguments)


@pytest.fixture
def llm_modules(monkeypatch):
    """Stands in for the modules of fastllm.llm; a value that is an exception is raised by the import."""
    modules = {}

    def load(name):
        found = modules.get(name.removeprefix("fastllm.llm."))
        if isinstance(found, Exception):
            raise found
        return found or __import__("importlib").import_module(name)

    monkeypatch.setattr(
        cli.pkgutil, "iter_modules", lambda path: [types.SimpleNamespace(name=name) for name in modules]
    )
    monkeypatch.setattr(cli, "importlib", types.SimpleNamespace(import_module=load))
    return modules


def test_llm_modules_add_commands(llm_modules, capsys):
    llm_modules["demo"] = fake_command("demo", lambda args: print("ran"))
    llm_modules["helpers"] = types.SimpleNamespace()
    assert cli.main(["demo"]) == 0
    assert capsys.readouterr().out == "ran\n"


def test_llm_modules_are_not_touched_by_the_plain_commands(llm_modules):
    llm_modules["demo"] = RuntimeError("must not be imported")
    assert cli.main(["info"]) == 0


def test_a_missing_package_is_named(llm_modules, capsys):
    llm_modules["demo"] = ModuleNotFoundError("No module named 'sklearn'", name="sklearn")
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert "demo: No module named 'sklearn'" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(SystemExit):
        cli.main(["demo"])
    assert "demo is not available here: demo: No module named 'sklearn'" in capsys.readouterr().err


def test_a_broken_llm_module_is_not_hidden(llm_modules, capsys):
    llm_modules["demo"] = ModuleNotFoundError("No module named 'fastllm.nowhere'", name="fastllm.nowhere")
    assert cli.main(["demo"]) == 2
    assert "fastllm.nowhere" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error", [FileNotFoundError(2, "No such file", "a.tsv"), ValueError("a.tsv: line 3\nhas no label")]
)
def test_errors_of_commands_are_one_line(llm_modules, capsys, error):
    def run(args):
        raise error

    llm_modules["train"] = fake_command("train", run)
    assert cli.main(["train"]) == 2
    told = capsys.readouterr().err
    assert "a.tsv" in told and told.count("\n") == 1


def test_a_warning_is_a_line_without_our_code(llm_modules, capsys, monkeypatch):
    # As outside of pytest, which has its own.
    monkeypatch.setattr(
        warnings, "showwarning", lambda *args: sys.stderr.write(warnings.formatwarning(*args)), raising=False
    )
    llm_modules["train"] = fake_command("train", lambda args: warnings.warn("it is\nslow", stacklevel=1))
    before = warnings.formatwarning
    assert cli.main(["train"]) == 0 and capsys.readouterr().err == "warning: it is slow\n"
    assert warnings.formatwarning is before


def test_interrupt_exits_with_130(llm_modules, capsys):
    def run(args):
        raise KeyboardInterrupt

    llm_modules["train"] = fake_command("train", run)
    assert cli.main(["train"]) == 130


def test_plain_commands_need_no_third_party_package():
    """As after `pip install .` alone: no rich, numpy, scikit-learn, matplotlib; Triton is missing too."""
    code = (
        "import sys\n"
        "for name in ('rich', 'numpy', 'sklearn', 'matplotlib', 'jinja2', 'triton'): sys.modules[name] = None\n"
        "from fastllm import cli\n"
        "assert cli.main(['info']) == 0\n"
        "assert cli.main(['verify', 'softmax', '--dtype', 'float32']) == 0\n"
        "assert cli.main(['bench', 'softmax', '--quick', '--rounds', '1', '--block-ms', '0.1', '--dtype', 'float32',"
        " '--passes', 'forward']) == 0\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "Triton does not import" in done.stdout and "vs torch" in done.stdout


def test_module_and_pipe():
    done = subprocess.run([sys.executable, "-m", "fastllm", "--version"], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == f"fastllm {fastllm.__version__}\n", done.stderr
    command = f"{sys.executable} -m fastllm info --matrix | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.startswith("| op ") and "Traceback" not in done.stderr


class Terminal:
    """What a stream on a terminal looks like."""

    def __init__(self):
        self.written = ""

    def write(self, some):
        self.written += some

    def flush(self):
        pass

    def isatty(self):
        return True


def test_tables_are_plain_without_rich(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    terminal = Terminal()
    text.show(("op", "ms"), [("softmax", "1.5"), ("norm", "12.25")], "times", terminal)
    assert terminal.written == "times\nop          ms\nsoftmax    1.5\nnorm     12.25\n"


def test_tables_of_rich_show_brackets_as_they_are():
    pytest.importorskip("rich")
    terminal = Terminal()
    text.show(("case", "verdict"), [("[2, 3]", "FAIL: [bold]")], file=terminal)
    assert "[2, 3]" in terminal.written and "[bold]" in terminal.written


def test_progress_is_silent_without_a_terminal(capsys):
    assert list(text.progress([1, 2], "work")) == [1, 2]
    assert capsys.readouterr() == ("", "")
    terminal = Terminal()
    assert list(text.progress("ab", "work", file=terminal)) == ["a", "b"]
    assert "work 2/2: b" in terminal.written


def test_makefile_lists_every_command():
    done = subprocess.run(["make", "-s"], capture_output=True, text=True, cwd=ROOT, env=os.environ)
    for verb in ("setup", "build", "test", "test-all", "lint", "bench", "demo", "clean"):
        assert f"make {verb} " in done.stdout
