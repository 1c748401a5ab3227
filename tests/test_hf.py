"""Hugging Face families on the kernels: tiny random weights, beside the same model on transformers' eager attention."""

import contextlib

import pytest
import torch
from check import assert_as_accurate

import fastllm

transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")

from hf_models import DECODERS, ENCODER_DECODERS, FAMILIES, assert_same, inputs, make, run  # noqa: E402

pytestmark = pytest.mark.usefixtures("every_size")


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family):
    model, batch = make(family), inputs(family)
    expected, state = run(model, batch), model.state_dict()
    classes, configs = [type(m) for m in model.modules()], [getattr(m, "config", None) for m in model.modules()]
    report = fastllm.accelerate(model)
    assert_same(run(model, batch), expected)
    assert not report.never_called and all("Experts" in row.module for row in report.left_alone), report
    assert {"attention", "norms"} <= {row.kind for row in report.accelerated}
    assert list(model.state_dict()) == list(state)
    fastllm.restore(model)
    assert [type(m) for m in model.modules()] == classes
    assert all(a is getattr(m, "config", None) for a, m in zip(configs, model.modules()))
    assert_same(run(model, batch), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_by_name(family):
    """attn_implementation="fastllm" without accelerate: what from_pretrained sets."""
    batch = inputs(family)
    assert_same(run(make(family, "fastllm"), batch), run(make(family), batch))


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_padding_in_front_is_as_with_sdpa(family):
    """Eager attends to everything where nothing is to be seen; for tokens all three agree."""
    batch = inputs(family)
    kept = batch["attention_mask"].bool()
    with torch.no_grad():
        eager, sdpa = (make(family, name)(**batch).logits for name in ("eager", "sdpa"))
        model = make(family)
        fastllm.accelerate(model)
        ours = model(**batch).logits
    assert not kept[:, 0].all() and not torch.allclose(eager[~kept], sdpa[~kept], rtol=1e-3)
    torch.testing.assert_close(ours, sdpa)
    torch.testing.assert_close(ours[kept], eager[kept])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", [None, "cpu"])
def test_conv1d(dtype, backend):
    """GPT-2's linear layer keeps the transpose: its weight is read as it lies, and the gradient lies like it."""
    from transformers.pytorch_utils import Conv1D

    class Adapted(Conv1D):
        def forward(self, x):
            return super().forward(x) + 1

    if backend and fastllm.dispatch.extension is None:
        pytest.skip("the C++ extension is not built")
    model = torch.nn.Sequential(Conv1D(40, 24), Conv1D(24, 40), Adapted(8, 24))
    x, dy = torch.randn(2, 30, 24), torch.randn(2, 30, 8)

    def run(dtype):
        leaf = x.to(dtype).requires_grad_()
        y = model.to(dtype)(leaf)
        return y.detach(), *torch.autograd.grad(y, [leaf, *model.parameters()], dy.to(dtype))

    truth, peer = run(torch.float64), run(dtype)
    report = fastllm.accelerate(model)
    assert [(row.name, row.runs) for row in report.rows] == [("0", "linear"), ("1", "linear")]
    with fastllm.backend(backend) if backend else contextlib.nullcontext():
        found = run(dtype)
    assert not report.never_called
    for ours, theirs, exact in zip(found, peer, truth, strict=True):
        assert_as_accurate(ours, theirs, exact)
    model[0](x.to(dtype)).sum().backward()
    assert model[0].weight.grad.stride() == model[0].weight.stride()
    fastllm.restore(model)
    assert type(model[0]) is Conv1D and all(torch.equal(a, b) for a, b in zip(run(dtype), peer, strict=True))


def generate(model, family, **options):
    batch = inputs(family)
    del batch["labels"]
    model.generation_config.eos_token_id = None
    return model.generate(**batch, max_new_tokens=9, do_sample=False, pad_token_id=0, **options)


HOW = {
    "greedy": {},
    "beams": dict(num_beams=3),
    "static": dict(cache_implementation="static", disable_compile=True),
    "no cache": dict(use_cache=False),
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("family", DECODERS | ENCODER_DECODERS)
def test_generate(family, how):
    model = make(family)
    expected = generate(model, family, **HOW[how])
    with fastllm.accelerated(model) as report:
        assert torch.equal(generate(model, family, **HOW[how]), expected)
    assert not report.never_called


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_oss", "gpt2", "bert", "modernbert", "t5", "bart"])
def test_attention_probabilities(family):
    """Whoever asks for them gets those of the model's own attention, through which gradients go."""
    model, batch = make(family), inputs(family)
    kept = batch["attention_mask"].bool()
    expected = model(**batch, output_attentions=True)
    fastllm.accelerate(model)
    found = model(**batch, output_attentions=True)
    names = [name for name in expected if "attentions" in name]
    for name in names:
        for got, peer in zip(found[name], expected[name], strict=True):
            if got.shape[2] == kept.shape[1] and not name.startswith(("decoder", "cross")):
                got, peer = got.transpose(1, 2)[kept], peer.transpose(1, 2)[kept]
            torch.testing.assert_close(got, peer)
    assert names and found[names[0]][0].requires_grad
