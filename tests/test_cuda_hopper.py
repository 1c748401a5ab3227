"""Attention's CUDA C++ kernel for Hopper: what it computes, in the emulator or on such a GPU, and what it leaves."""

import conftest
import emulator
import pytest
import torch
from check import assert_as_accurate

import fastllm
from fastllm import dispatch

# Smaller and larger than a tile, the same, one more, several: queries are taken by 128, keys by 128 or 176.
SHAPES = [(1, 1), (64, 128), (127, 176), (128, 177), (129, 353), (300, 127), (257, 600)]
OPTIONS = {
    "plain": {},
    "causal": dict(causal=True),
    "top-left": dict(causal=True, q_offset=0),
    "window": dict(window=(100, 30)),
    "window left": dict(window=(150, None)),
    "nothing to see": dict(causal=True, q_offset=-70),
    "scale": dict(scale=0.37),
}


@pytest.fixture
def hopper():
    """The device of the tensors that the CUDA C++ kernels take, forced: an emulated Hopper where there is no GPU."""
    if not torch.cuda.is_available():
        yield from conftest.emulated_cuda(90)
    elif torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("wgmma and TMA are Hopper's, and this GPU is another")
    elif reason := dispatch.missing_cuda():
        pytest.skip(reason)
    else:
        with fastllm.backend("cuda"):
            yield "cuda"


def tensors(device, B=2, H=4, Hkv=2, T=150, S=150, D=64, dtype=torch.bfloat16):
    """Heads inside positions, and NaN where a kernel that reads past the end would look."""
    made = []
    for heads, rows in ((H, T), (Hkv, S), (Hkv, S)):
        whole = torch.full((B, rows + 200, heads, D), float("nan"), dtype=dtype)
        whole[:, :rows] = torch.randn(B, rows, heads, D)
        made.append(whole.to(device)[:, :rows].transpose(1, 2))
    return made


def check(q, k, v, **options):
    """Twice: in the emulator tiles come late and products early the one time, and the other way round the other."""
    options = dict(return_lse=True) | options
    with fastllm.backend("reference"):
        peer = fastllm.attention(q, k, v, **options)
        truth = fastllm.attention(q.double(), k.double(), v.double(), **options)
    for _ in range(2):
        before = tiles()
        got = fastllm.attention(q, k, v, **options)
        assert tiles() > before or torch.cuda.is_available()
        for x, y, z in zip(got, peer, truth, strict=True):
            assert_as_accurate(x, y, z)


def tiles():
    return 0 if torch.cuda.is_available() else emulator.fetched_tiles()


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_against_fp64(hopper, option, shape, D):
    T, S = shape
    dtype = torch.float16 if T % 2 else torch.bfloat16
    if option == "nothing to see" and T <= 70:
        pytest.skip("then nobody sees anything, and no tile is fetched: test_no_keys_to_see")
    check(*tensors(hopper, B=1, H=2, Hkv=1, T=T, S=S, D=D, dtype=dtype), **OPTIONS[option])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_heads_and_batches(hopper, dtype):
    check(*tensors(hopper, B=3, H=6, Hkv=3, T=40, S=70, dtype=dtype))
    check(*(x.contiguous() for x in tensors(hopper, H=3, Hkv=1, T=40, S=70, D=128, dtype=dtype)))


def test_no_keys_to_see(hopper):
    q, k, v = tensors(hopper, T=5)
    o, lse = fastllm.attention(q, k, v, causal=True, q_offset=-70, return_lse=True)
    assert (o == 0).all() and (lse == float("-inf")).all()


def test_large_scores(hopper):
    """One key has nearly all of the weight, and later tiles move the maximum."""
    q, k, v = tensors(hopper, T=130, S=400, D=128)
    check(30 * q, k * torch.linspace(0, 1, 400, device=hopper)[:, None].bfloat16(), v)


def test_what_it_leaves_to_the_other_kernel(hopper):
    if torch.cuda.is_available():
        pytest.skip("which kernel ran is something that only the emulator tells")
    q, k, v = tensors(hopper, T=20, S=20)
    left = [
        (tensors(hopper, T=20, S=20, D=80), {}),
        ((q, k, v[..., :32]), {}),
        ((q, k, v), dict(scale=-0.1)),
        ((q, k, v), dict(softcap=30.0)),
        ((q, k, v), dict(sink=torch.zeros(4))),
        ((q, k, v), dict(bias=torch.zeros(1, 1, 20, 20))),
        ((q, k, v), dict(mask=torch.ones(1, 1, 20, 20, dtype=torch.bool))),
        ((q, k[:, :1, :1].expand(2, 2, 20, 64), v), {}),  # no map has rows in one place
    ]
    before = tiles()
    for inputs, options in left:
        fastllm.attention(*inputs, **options)
    emulator.load()(80)
    fastllm.attention(q, k, v)
    assert tiles() == before
    emulator.load()(90)
    fastllm.attention(q, k, v)
    assert tiles() > before
