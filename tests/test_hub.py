"""The layers that Hugging Face's package `kernels` loads, from memory and from a folder."""

import pytest
import torch

import fastllm

kernels = pytest.importorskip("kernels", reason="the package kernels is not installed")
transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")

import fastllm.hub  # noqa: E402

marked = pytest.mark.skipif(
    not transformers.utils.is_kernels_available(),
    reason=f"transformers {transformers.__version__} does not accept kernels {kernels.__version__}",
)


def model():
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=99)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))


def gradients(model):
    tokens = torch.arange(30).view(2, 15)
    found = model(tokens, labels=tokens)
    found.loss.backward()
    return [found.logits, *(p.grad for p in model.parameters())]


@marked
@pytest.mark.parametrize("folder", [False, True], ids=["memory", "folder"])
def test_kernelize(folder, tmp_path):
    expected, ours = gradients(model()), model()
    mapping = fastllm.hub.mapping()
    if folder:
        repository = kernels.LocalLayerRepository(fastllm.hub.write_repository(tmp_path), layer_name="RMSNorm")
        mapping = {"RMSNorm": {"cpu": repository}}
    with kernels.use_kernel_mapping(mapping, inherit_mapping=False):
        kernels.kernelize(ours, mode=kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE, device="cpu")
    told = fastllm.explain(gradients, ours)
    assert [call.op for call in told.calls] == ["rms_norm"] * 5 + ["rms_norm backward"] * 5
    for a, b in zip(told.result, expected):
        torch.testing.assert_close(a, b)


@marked
@pytest.mark.parametrize("mode", ["INFERENCE", "TRAINING"])
def test_every_mode_is_served(mode):
    ours = model()
    with kernels.use_kernel_mapping(fastllm.hub.mapping(), inherit_mapping=False):
        kernels.kernelize(ours, mode=getattr(kernels.Mode, mode), device="cpu")
    assert [call.op for call in fastllm.explain(ours, torch.arange(6)[None]).calls] == ["rms_norm"] * 5


def test_a_version_that_marks_nothing_is_told(monkeypatch):
    monkeypatch.setattr(transformers.utils, "is_kernels_available", lambda: False)
    with pytest.warns(UserWarning, match=f"does not accept kernels {kernels.__version__}"):
        fastllm.hub.mapping()


def test_the_wider_dtype_is_kept():
    """As the layer's own forward: bf16 activations and fp32 weights give fp32."""
    norm, x = model().model.norm, torch.randn(3, 32).bfloat16()
    expected = norm(x)
    got = fastllm.hub.RMSNorm.forward(norm, x)
    assert got.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(got.bfloat16(), expected.bfloat16())
