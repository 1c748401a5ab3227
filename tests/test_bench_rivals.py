"""The bench's rivals and its measure of memory: who is asked for, who is missing and why, and what they compute."""

import subprocess
import sys
import types

import pytest
import torch

from fastllm import verify
from fastllm.bench import cases, measure, memory, rivals

ATTENTION = cases.attention(1, 2, 8, 16, causal=True)
NORM = cases.norm("rms_norm", 4, 8)


def names(*words, device="cpu"):
    return [rival.name for rival in rivals.chosen(words, device)]


def test_groups_and_names_choose():
    assert names("quick")[:4] == ["torch", "naive", "sdpa-flash", "sdpa-math"]
    assert names("torch", "compile") == ["torch", "compile"] and names("all") == list(rivals.RIVALS)
    assert not {"compile", "onnxruntime", "liger"} & set(names("quick"))
    assert "liger" in names("quick", device="cuda")


@pytest.mark.parametrize("backend", ["flash", "math"])
def test_forced_backends_compute_attention_and_are_let_go(backend):
    rival = rivals.RIVALS[f"sdpa-{backend}"]
    assert rival.takes(ATTENTION, "cpu") and not rival.takes(NORM, "cpu")
    before = [enabled() for _, enabled in rivals.SWITCHES.values()]
    function = rival.make(ATTENTION, torch.float32, "cpu")
    seen = verify.examine(ATTENTION, torch.float32)
    assert seen.error_of(function) < 1e-5
    assert [enabled() for _, enabled in rivals.SWITCHES.values()] == before


def test_a_backend_that_cannot_is_named():
    wide = cases.attention(1, 2, 8, 16, S=8, Dv=24)  # the CPU's flash kernel wants heads of one size
    function = rivals.RIVALS["sdpa-flash"].make(wide, torch.float32, "cpu")
    with pytest.raises(RuntimeError) as problem:
        function(*wide.inputs(torch.float32))
    assert rivals.reason(problem.value).startswith("RuntimeError: ") and "\n" not in rivals.reason(problem.value)
    assert all(enabled() for _, enabled in rivals.SWITCHES.values())


def test_what_is_not_installed_is_missing_with_the_reason(monkeypatch):
    for module in ("liger_kernel", "flash_attn", "xformers"):
        monkeypatch.setitem(sys.modules, module, None)
    _, missing = rivals.found(
        rivals.chosen(["liger", "flash-attn-2", "xformers"], "cpu"), ATTENTION, torch.float32, "cpu"
    )
    assert set(missing) == {"flash-attn-2", "xformers"}  # Liger has no attention: it is no rival here
    assert missing["flash-attn-2"].startswith("ModuleNotFoundError: ") and "flash_attn" in missing["flash-attn-2"]
    _, missing = rivals.found(rivals.chosen(["liger"], "cpu"), NORM, torch.float32, "cpu")
    assert "liger_kernel" in missing["liger"]


def test_packages_are_called_as_they_want_it(monkeypatch):
    """With made-up packages of the same signatures, the answers are those of PyTorch."""
    transposed = lambda q, k, v, **options: torch.nn.functional.scaled_dot_product_attention(  # noqa: E731
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=bool(options.get("causal") or options.get("attn_bias"))
    ).transpose(1, 2)
    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(flash_attn_func=transposed))
    monkeypatch.setitem(sys.modules, "xformers", types.ModuleType("xformers"))
    ops = types.SimpleNamespace(memory_efficient_attention=transposed, LowerTriangularMask=lambda: "lower")
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    seen = verify.examine(ATTENTION, torch.float32)
    for name in ("flash-attn-2", "xformers"):
        assert seen.error_of(rivals.RIVALS[name].make(ATTENTION, torch.float32, "cpu")) < 1e-5


def test_compile_is_a_rival_in_every_pass():
    from fastllm.bench import measure

    case = cases.softmax(3, 8)
    function = rivals.RIVALS["compile"].make(case, torch.float32, "cpu")
    for passes in cases.PASSES:
        call = measure.contender(function, case.inputs(torch.float32), passes)
        call()
        call()  # a backward pass can be taken again


@pytest.mark.parametrize("case", [NORM, cases.softmax(3, 8)], ids=str)
def test_onnxruntime_runs_the_exported_graph(case):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    function = rivals.RIVALS["onnxruntime"].make(case, torch.float32, "cpu")
    assert verify.examine(case, torch.float32).error_of(function, backward=False) < 1e-5


# In a process of its own: what tests before it freed may still be the process's.
PEAKS = """
import torch
from fastllm.bench import memory

n = 1 << 24  # blocks that go back to the system when they are freed
print(memory.peak(lambda: torch.ones(n)))
print(memory.peak(lambda: torch.ones(n) + torch.ones(n)))
print(memory.peak(lambda: [torch.ones(n) for _ in range(1)] and torch.ones(n)))
"""


@pytest.mark.skipif(memory.why_not() is not None, reason=str(memory.why_not()))
def test_peak_memory_counts_what_lives_at_the_same_time():
    done = subprocess.run([sys.executable, "-c", PEAKS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    sizes = [int(line) / (4 << 24) for line in done.stdout.split()]
    page = 1 / 32  # room for what else a process touches
    assert all(abs(size - tensors) < page for size, tensors in zip(sizes, (1, 3, 1), strict=True)), sizes


def test_memory_that_cannot_be_measured_says_why(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "CLEAR", tmp_path / "nothing" / "clear_refs")
    assert "FileNotFoundError" in memory.why_not()


def test_an_optimisers_step_is_timed_where_the_parameters_lie():
    case = cases.adamw(3, 5)
    inputs = case.inputs(torch.float32)
    before = [x.clone() for x in inputs]
    step, moved = measure.contender(case.ours, inputs, "forward"), []
    optimizer = step.__self__
    for _ in range(2):
        step()
        moved.append(optimizer.param_groups[0]["params"][1].clone())
    assert not torch.equal(moved[0], moved[1]) and not torch.equal(moved[0], inputs[0][1])
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))
    assert {rival.name for rival in rivals.chosen(["all"], "cpu") if rival.takes(case, "cpu")} == {"torch", "naive"}
