"""Hopper's own attention kernel: which calls it takes, and, on such a GPU alone, what it computes."""

import pytest
import torch
import torch.nn.functional as F
from check import assert_as_accurate, compare

import fastllm

attention = pytest.importorskip("fastllm.kernels.attention", exc_type=ImportError)
attention_sm90 = pytest.importorskip("fastllm.kernels.attention_sm90", exc_type=ImportError)

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
OPTIONS = {
    "plain": {},
    "causal": dict(causal=True),
    "top-left": dict(causal=True, q_offset=0),
    "window": dict(window=(100, 30)),
    "nothing to see": dict(causal=True, q_offset=-70),
}


@pytest.fixture
def chosen(monkeypatch):
    monkeypatch.setitem(attention.WARP_SPECIALISED, "any", (64, 128))


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(attention_sm90, "is_hopper", lambda device: True)


def tensors(B=2, H=4, Hkv=2, T=150, S=150, D=64, dtype=torch.bfloat16, device="cpu"):
    return [torch.randn(B, h, n, D, device=device).to(dtype) for h, n in ((H, T), (Hkv, S), (Hkv, S))]


@pytest.mark.skipif(not HOPPER, reason="wgmma and TMA are Hopper's: no such GPU here, and no interpreter of Gluon")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (64, 128), (127, 300), (300, 127), (1024, 1024)], ids=str)
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("option", OPTIONS)
def test_against_fp64(chosen, option, D, shape, dtype):
    q, k, v = tensors(T=shape[0], S=shape[1], D=D, dtype=dtype, device="cuda")
    q = q.transpose(1, 2).contiguous().transpose(1, 2)  # heads inside positions
    options = dict(return_lse=True) | OPTIONS[option]
    with fastllm.backend("triton"):
        got = fastllm.attention(q, k, v, **options)
    with fastllm.backend("reference"):
        peer = fastllm.attention(q, k, v, **options)
        truth = fastllm.attention(q.double(), k.double(), v.double(), **options)
    for x, y, z in zip(got, peer, truth, strict=True):
        assert_as_accurate(x, y, z)


@pytest.mark.skipif(not HOPPER, reason="wgmma and TMA are Hopper's: no such GPU here, and no interpreter of Gluon")
def test_backward_takes_what_it_leaves(chosen):
    def sdpa(*inputs):
        return F.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)

    def ours(*inputs):
        with fastllm.backend("triton"):
            return fastllm.attention(*inputs, causal=True)

    inputs = tensors(device="cuda")
    compare(ours, sdpa, sdpa, inputs, [torch.randn_like(inputs[0])], torch.bfloat16)


def takes(q, k, v, *, sink=None, packing=None, **options):
    call = attention.call(q, k, v, None, options.pop("scale", 0.1), options.pop("softcap", 0.0), None, 0.0, **options)
    return attention_sm90.takes(q, k, v, call.scoring, sink, packing)


def test_what_it_takes(hopper):
    q, k, v = tensors()
    assert takes(q, k, v)
    assert takes(*tensors(D=128, dtype=torch.float16))
    assert takes(*(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)))
    assert not takes(*tensors(D=80))
    assert not takes(*tensors(dtype=torch.float32))
    assert not takes(q, k, v[..., :32])
    assert not takes(q, k, v, scale=-0.1)
    assert not takes(q, k, v, softcap=30.0)
    assert not takes(q, k, v, bias=torch.zeros(1, 1, 150, 150))
    assert not takes(q, k, v, mask=torch.ones(1, 1, 150, 150, dtype=torch.bool))
    assert not takes(q, k, v, sink=torch.zeros(4))
    assert not takes(q, k, v, packing=())
    assert not takes(q[:1].expand(2, -1, -1, -1), k, v)  # a stride of 0
    assert not takes(torch.randn(2, 4, 150, 65).bfloat16()[..., :64], k, v)  # rows at odd multiples of 2 bytes
    assert not takes(q[:, :, :0], k, v)


@pytest.mark.skipif(HOPPER, reason="this is about other machines")
def test_only_hopper():
    assert not takes(*tensors())


def test_the_table_decides(hopper, monkeypatch):
    """Not chosen where nothing was measured; asked where the table names the head size."""
    ran = []

    class Pointers:
        def __getitem__(self, grid):
            return lambda *given, **sizes: ran.append("pointers")

    monkeypatch.setattr(attention, "_attention_fwd", Pointers())
    monkeypatch.setattr(attention_sm90, "forward", lambda *given: ran.append("hopper"))
    q, k, v = tensors()
    for table, wanted in (({}, "pointers"), ({"any": (128,)}, "pointers"), ({"any": (64, 128)}, "hopper")):
        monkeypatch.setattr(attention, "WARP_SPECIALISED", table)
        attention.attention_fwd(q, k, v, *(None,) * 5, 0.1, 0.0, 0, -1, -1, 0.0)
        assert ran.pop() == wanted and not ran
