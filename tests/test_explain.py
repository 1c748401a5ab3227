"""Which kernel ran, why not, and what strictness does about it."""

import dataclasses
import doctest
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import fastllm
import fastllm.nn
from fastllm import dispatch, info, reference

ROOT = Path(__file__).resolve().parents[1]
Q = (1, 2, 4, 8)
needs_extension = pytest.mark.skipif(dispatch.extension is None, reason=f"{dispatch.missing_extension}")


def run(code, **environment):
    environment = {"PYTHONPATH": str(ROOT), **os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


def public_objects():
    """Every public name of the package and of its parts that have names to import."""
    pytest.importorskip("transformers", reason="the extra hf is not installed")
    import fastllm.hf

    return {id(x): x for m in (fastllm, fastllm.nn, fastllm.compat, fastllm.hf) for x in map(vars(m).get, m.__all__)}


def test_examples_in_help_run(tmp_path, capsys):
    pytest.importorskip("accelerate", reason="which transformers' Trainer needs, is not installed")
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=30
    )
    names = dict(zip("qkv", qkv(), strict=True), fastllm=fastllm, Trainer=transformers.Trainer, data=[])
    names |= dict(model=transformers.LlamaForCausalLM(config), input_ids=torch.arange(6)[None])
    names |= dict(args=transformers.TrainingArguments(tmp_path, use_cpu=True, report_to="none"))
    sources = [
        example.source
        for x in public_objects().values()
        for test in doctest.DocTestFinder(recurse=False).find(x, x.__name__, globs={})
        for example in test.examples
    ]
    assert len(sources) >= 4
    for source in sources:
        exec(source, names)
    printed = capsys.readouterr().out
    assert "LlamaForCausalLM" in printed and "attention" in printed


def test_help_says_what_every_name_is():
    for x in public_objects().values():
        assert x.__doc__ and not x.__doc__.startswith(f"{x.__name__}("), x  # a dataclass is given its signature


def qkv():
    return [torch.randn(Q) for _ in "qkv"]


def test_explanation_returns_what_the_function_returned():
    q, k, v = qkv()
    told = fastllm.explain(fastllm.attention, q, k, v, causal=True)
    torch.testing.assert_close(told.result, fastllm.attention(q, k, v, causal=True))
    (call,) = told.calls
    assert (call.op, call.shape, call.dtype) == ("attention", Q, "float32")


@needs_extension
def test_explanation_names_the_kernel():
    (call,) = fastllm.explain(fastllm.rms_norm, torch.randn(3, 8)).calls
    assert call.backend == "cpu" and call.reason == ""
    assert call.kernel == f"C++ {dispatch.extension.selected()}"


def test_explanation_counts_equal_calls():
    def model(x):
        return fastllm.softmax(fastllm.layer_norm(fastllm.layer_norm(x)))

    text = str(fastllm.explain(model, torch.randn(3, 8)))
    rows = [line.split() for line in text.splitlines()]
    assert rows[0][:2] == ["op", "calls"]
    assert [row[:2] for row in rows[1:]] == [["layer_norm", "2"], ["softmax", "1"], ["elsewhere", "-"]]


def test_explanation_has_the_time_of_every_call():
    """All of the run's time is some call's or went elsewhere; a nested call's is its own."""
    x, slow = torch.randn(300, 512), []

    def model():
        y = fastllm.softmax(fastllm.layer_norm(x))
        time.sleep(0.05)
        slow.append(1)
        return y

    told = fastllm.explain(model)
    assert slow == [1] and all(call.seconds > 0 for call in told.calls)
    assert 0.05 <= told.elsewhere <= told.seconds
    assert told.elsewhere + sum(call.seconds for call in told.calls) == pytest.approx(told.seconds)
    *_, last = str(told).splitlines()
    assert last.split()[0] == "elsewhere" and last.split()[-2].endswith("%")


def test_a_fallback_has_its_time(monkeypatch):
    """Also what plain PyTorch did for a call is that call's time."""
    softmax = reference.softmax
    monkeypatch.setattr(reference, "softmax", lambda *a, **k: time.sleep(0.02) or softmax(*a, **k))
    with fastllm.backend("reference"):
        (call,) = fastllm.explain(fastllm.softmax, torch.randn(3, 8)).calls
    assert call.seconds > 0.02


def test_explanation_of_a_training_step():
    """The backward passes are calls too, of the kernel that runs them, and of a model they come in order."""
    model = torch.nn.Sequential(torch.nn.LayerNorm(8), torch.nn.RMSNorm(8))
    fastllm.accelerate(model)
    told = fastllm.explain(lambda: model(torch.randn(3, 8)).sum().backward())
    assert [call.op for call in told.calls] == ["layer_norm", "rms_norm", "rms_norm backward", "layer_norm backward"]
    assert len({call.kernel for call in told.calls}) == 1 and all(call.shape == (3, 8) for call in told.calls)


@needs_extension
def test_a_backward_pass_of_a_call_from_before():
    x, q = torch.randn(3, 8, requires_grad=True), torch.randn(1, 2, 3, 4, requires_grad=True)
    loss = fastllm.layer_norm(x).sum() + fastllm.attention(q, q, q).sum()
    told = fastllm.explain(loss.backward)
    assert sorted((call.op, call.shape) for call in told.calls) == [
        ("attention backward", (1, 2, 3, 4)),
        ("layer_norm backward", (3, 8)),
    ]
    assert all(call.kernel.startswith("C++") and 0 < call.seconds < told.seconds for call in told.calls)
    loss = fastllm.layer_norm(x).sum()
    with dispatch.recording([]) as outer:
        with dispatch.recording([]) as inner:
            pass
        loss.backward(retain_graph=True)
    loss.backward()
    assert len(outer) == 1 and not inner


@pytest.mark.skipif(not dispatch.has_nodes, reason="the nodes were not compiled for this PyTorch")
def test_a_backward_pass_has_the_name_of_the_op_that_was_called():
    x, weight = torch.randn(3, 8, requires_grad=True), torch.randn(5, 8)
    for dtype in (torch.float32, torch.bfloat16):  # of the latter the product is ours too, on some CPUs
        loss = fastllm.linear_cross_entropy(x.to(dtype), weight.to(dtype), torch.arange(3))
        assert {call.op for call in fastllm.explain(loss.backward).calls} == {"linear_cross_entropy backward"}


@pytest.mark.skipif(not dispatch.has_nodes, reason="the nodes were not compiled for this PyTorch")
def test_a_backward_pass_that_can_be_differentiated_is_pytorchs():
    x = torch.randn(3, 8, requires_grad=True)
    y = fastllm.layer_norm(x).square().sum()
    told = fastllm.explain(torch.autograd.grad, y, x, create_graph=True)
    (call,) = told.calls
    assert (call.op, call.backend, call.kernel) == ("layer_norm backward", "reference", "PyTorch")
    assert 0 < call.seconds < told.seconds
    assert told.result[0].requires_grad


def test_the_time_of_a_call_loses_nothing_to_another_thread(monkeypatch):
    """A backward pass there, while a call is open here."""
    x, softmax = torch.randn(3, 8), reference.softmax

    def while_another_is_busy(*given, **options):
        there = threading.Thread(target=dispatch._recorder.node, args=("layer_norm", x, 1000.0, False))
        there.start()
        there.join()
        return softmax(*given, **options)

    monkeypatch.setattr(reference, "softmax", while_another_is_busy)
    with fastllm.backend("reference"):
        here, there = fastllm.explain(fastllm.softmax, x).calls
    assert (here.op, there.op) == ("softmax", "layer_norm backward")
    assert 0 < here.seconds < 1000 == there.seconds


def test_a_product_is_a_forward_call():
    """Its choice of a kernel is made by a helper, which returns before the product runs."""
    x, weight = torch.randn(4, 8, requires_grad=True), torch.randn(16, 8)
    with fastllm.backend("cpu"):
        told = fastllm.explain(lambda: fastllm.linear(x, weight).sum().backward())
    assert [call.op for call in told.calls] == ["linear", "linear backward"]


def test_explanation_leaves_a_profiler_alone():
    seen = []

    def profiler(frame, event, argument):
        seen.append(event)

    before = sys.getprofile()
    try:
        sys.setprofile(profiler)
        fastllm.explain(fastllm.softmax, torch.randn(3, 8))
        assert sys.getprofile() is profiler
    finally:
        sys.setprofile(before)
    with pytest.raises(ZeroDivisionError):
        fastllm.explain(lambda: 1 / 0)
    assert sys.getprofile() is before and dispatch._recorder is None


def test_nothing_to_explain():
    assert str(fastllm.explain(torch.relu, torch.randn(3))) == "no fastllm op was called"


def test_fallback_for_a_missing_extension(monkeypatch):
    monkeypatch.setattr(dispatch, "extension", None)
    monkeypatch.setattr(dispatch, "missing_extension", "no compiler on this machine")
    with pytest.warns(UserWarning, match="no compiler on this machine"):
        dispatch._warn_once.cache_clear()
        (call,) = fastllm.explain(fastllm.softmax, torch.randn(3, 8)).calls
    assert (call.backend, call.kernel, call.reason) == ("reference", "PyTorch", "no compiler on this machine")


def test_fallback_for_a_device():
    (call,) = fastllm.explain(fastllm.softmax, torch.empty(3, 8, device="meta")).calls
    assert call.backend == "reference" and "meta" in call.reason


def test_fallback_for_an_option_names_it():
    """Whatever the matrix calls plain PyTorch is also what explain reports, with the option's name."""
    for option, (args, keywords) in info._options(torch.float32)[fastllm.attention].items():
        reason = info.kernels_for(fastllm.attention, *args, **keywords)["cpu"]
        if reason:
            (call,) = fastllm.explain(fastllm.attention, *args, **keywords).calls
            assert call.backend == "reference" and call.reason, option
            assert any(name in reason for name in keywords), f"{option}: {reason}"


def test_forced_reference():
    with fastllm.backend("reference"):
        (call,) = fastllm.explain(fastllm.layer_norm, torch.randn(3, 8)).calls
    assert (call.backend, call.reason) == ("reference", "")


def test_forced_backend_that_cannot_is_an_error():
    with fastllm.backend("cuda"), pytest.raises(RuntimeError, match=r"rms_norm: backend 'cuda' was forced, but .*"):
        fastllm.rms_norm(torch.randn(3, 8))
    with fastllm.backend("cpu"), pytest.raises(RuntimeError, match="meta"):
        fastllm.rms_norm(torch.empty(3, 8, device="meta"))


def test_forcing_ends_with_the_block():
    for _ in range(2):
        with fastllm.backend("reference"), pytest.raises(KeyError), fastllm.backend("cuda"):
            raise KeyError
    assert dispatch._forced is None


@needs_extension
def test_backward_runs_where_forward_ran():
    x = torch.randn(3, 8, requires_grad=True)
    with fastllm.backend("cpu"):
        y = fastllm.softmax(x)
    with fastllm.backend("reference"):
        (dx,) = torch.autograd.grad(y[:, 0].sum(), x)
    (truth,) = torch.autograd.grad(torch.softmax(x.double(), -1)[:, 0].sum(), x)
    torch.testing.assert_close(dx, truth)


def test_strict_turns_a_fallback_into_an_error():
    code = "import torch, fastllm; fastllm.softmax(torch.empty(3, 8, device='meta')); print('answered')"
    assert run(code, FASTLLM_STRICT="0").stdout == "answered\n"
    strict = run(code, FASTLLM_STRICT="1")
    assert strict.returncode == 1
    assert "Unsupported: softmax: FASTLLM_STRICT is set and there is no kernel for this call" in strict.stderr


@needs_extension
def test_strict_lets_kernels_run():
    done = run("import torch, fastllm; print(fastllm.softmax(torch.zeros(1, 2)).tolist())", FASTLLM_STRICT="1")
    assert done.stdout == "[[0.5, 0.5]]\n", done.stderr


@needs_extension
@pytest.mark.parametrize("name", ["scalar", "avx2", "avx512", "avx512_bf16"])
def test_instruction_set_from_the_environment(name):
    done = run("from fastllm import dispatch; print(dispatch.extension.selected())", FASTLLM_CPU=name)
    if name in dispatch.extension.available():
        assert done.stdout == name + "\n", done.stderr
    else:
        assert done.returncode and name in done.stderr


@needs_extension
def test_unknown_instruction_set_is_an_error_that_names_the_choices():
    done = run("import fastllm", FASTLLM_CPU="sse9")
    assert done.returncode and "sse9" in done.stderr and "scalar" in done.stderr


def on_device(x, device):
    """Tensors, and what has some, on a device; the rest as it is."""
    if isinstance(x, fastllm.QuantizedWeight):
        tensors = {name: on_device(getattr(x, name), device) for name in ("codes", "scales", "offsets")}
        return dataclasses.replace(x, **tensors)
    if isinstance(x, dict):
        return {key: on_device(value, device) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return type(x)(on_device(value, device) for value in x)
    return x.to(device) if isinstance(x, torch.Tensor) else x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_what_the_matrix_claims_runs(backend, dtype):
    """Every option with a kernel in the README's table runs on it, forward and backward; `backend` forces which."""
    name = dispatch._forced
    for function, options in info._options(dtype).items():
        for option, (args, keywords) in options.items():
            if info.kernels_for(function, *args, **keywords)[name]:
                continue
            args, keywords = on_device(args, backend), on_device(keywords, backend)
            has_backward = function.__name__ not in ("attention_with_kvcache", "optim.AdamW")
            x, *rest = args[0] if isinstance(args[0], list) else args
            x = x.detach().requires_grad_(has_backward)  # not the tensor itself, which is other options' input too
            given = ([x, *rest], *args[1:]) if isinstance(args[0], list) else (x, *rest)
            made = fastllm.explain(function, *given, **keywords)
            first = made.result[0] if isinstance(made.result, tuple) else made.result
            (dx,) = torch.autograd.grad(first.sum(), x) if has_backward else (first,)
            assert [call.backend for call in made.calls] == [name], f"{function.__name__}, {option}"
            assert first.dtype == dx.dtype == dtype and dx.isfinite().all(), f"{function.__name__}, {option}"


@needs_extension
def test_both_ways_to_a_kernel_give_the_same():
    q, k, v, x, w = torch.randn(1, 4, 5, 8), *torch.randn(2, 1, 2, 7, 8), torch.randn(3, 4, 9), torch.randn(9)
    target = torch.tensor([0, 8, -100, 3])

    def results():
        return [
            fastllm.attention(q, k, v),
            fastllm.attention(q, k, v, causal=True),
            fastllm.layer_norm(x.mT.contiguous().mT, w, w),
            fastllm.rms_norm(x, w, weight_offset=1.0),
            fastllm.softmax(x, scale=0.5),
            fastllm.log_softmax(x),
            fastllm.swiglu(x, x),
            fastllm.geglu(x[..., :8], approximate="none"),
            fastllm.bias_gelu(x, w),
            fastllm.linear(x, x[0], w[:4]),
            fastllm.cross_entropy(x[0], target, reduction="none"),
        ]

    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32), dispatch.recording([]) as calls:
            recorded = results()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            at_once = results()
        assert len(calls) == len(at_once)
        for ours, long_way in zip(at_once, recorded, strict=True):
            torch.testing.assert_close(ours, long_way, rtol=0, atol=0)
