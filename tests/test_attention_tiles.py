"""attention whose Triton kernels read q, k, v and do by TMA, which a launch table may choose, in both passes.

Where there is no GPU, Triton's interpreter reads by descriptors too.
"""

import pytest
import torch
from check import compare
from conftest import use_backend
from test_attention import SCORES, arguments, check, check_scores, tensors, torch_attention

import fastllm
from fastllm import reference

attention = pytest.importorskip("fastllm.kernels.attention", exc_type=ImportError)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RULES = {
    "full": {},
    "causal": dict(causal=True),
    "top-left": dict(causal=True, q_offset=0),
    "window": dict(window=(7, 3)),
}
SMALL = dict(B=1, H=2, Hkv=1, T=33, S=47, D=24)


@pytest.fixture
def described(monkeypatch):
    """Every launch asks for tiles; the list gets the shapes of the blocks for which descriptors were made."""
    blocks, launch, descriptor = [], attention.Call.launch, attention.TensorDescriptor

    def describe(x, *shape):
        blocks.append(shape[-1])
        return descriptor(x, *shape)

    monkeypatch.setattr(attention.Call, "launch", lambda *args: launch(*args) | dict(tiles=True))
    monkeypatch.setattr(attention, "TensorDescriptor", describe)
    return blocks


@pytest.fixture
def device():
    yield from use_backend("triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_options(device, described, rule, dtype):
    check(SMALL, dtype, device, **RULES[rule])
    assert len(described) == 3 + 4 + 4  # forward, dq, dk and dv


@pytest.mark.parametrize("shape", [(1, 1, 1, 17, 8, 8), (2, 2, 33, 96, 64, 40), (4, 2, 70, 50, 24, 24)], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_as_with_pointers(device, described, monkeypatch, rule, shape):
    if device == "cuda":
        pytest.skip("registers hold other elements there, which may change the order of a sum")
    H, Hkv, T, S, D, Dv = shape
    inputs, do = tensors(H=H, Hkv=Hkv, T=T, S=S, D=D, Dv=Dv)

    def run():
        leaves = [x.bfloat16().requires_grad_() for x in inputs]
        o = fastllm.attention(*leaves, **RULES[rule])
        return [o, *torch.autograd.grad(o, leaves, do.bfloat16())]

    got = run()
    assert described
    monkeypatch.undo()
    for x, y in zip(got, run(), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("name", ["softcap", "bias per batch", "alibi", "sink"])
def test_scores(device, described, name):
    check_scores(device, torch.float32, SCORES[name] | dict(causal=True), SMALL | dict(B=2, H=8, Hkv=4))
    assert described


def test_heads_inside_positions(device, described):
    """As models have them: a head's rows lie H * D apart."""

    def inside(x):
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    inputs, do = tensors(device=device, D=16)
    of = arguments(causal=True)
    exact = lambda q, k, v: reference.attention(q, k, v, **of(q, k))[0]  # noqa: E731
    ours = lambda *x: fastllm.attention(*map(inside, x), causal=True)  # noqa: E731
    compare(ours, torch_attention(of), exact, inputs, [inside(do)], torch.bfloat16)
    assert described


def test_what_is_read_by_pointers(device, described):
    """Rows that do not begin at multiples of 16 bytes, rows that are one and the same, packed sequences."""
    (q, k, v), _ = tensors(T=20, S=20, D=16, device=device)
    wide = torch.randn(2, 4, 20, 20, device=device)
    fastllm.attention(wide[..., 1:17], k, v)
    fastllm.attention(q, k[:, :, :1].expand(k.shape), v)
    fastllm.attention(*tensors(T=20, S=20, D=3, device=device)[0])
    rows, cu = torch.randn(20, 2, 16, device=device), torch.tensor([0, 7, 20], dtype=torch.int32, device=device)
    fastllm.attention_varlen(rows, rows, rows, cu_seqlens_q=cu, cu_seqlens_k=cu)
    assert not described
