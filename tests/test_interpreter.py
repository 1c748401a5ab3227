"""The repaired interpreter: bf16 as a GPU rounds it, and guards that see what a kernel does outside of its tensors."""

import pytest
import torch

if torch.cuda.is_available():
    pytest.skip("kernels run on the GPU, not in the interpreter", allow_module_level=True)
triton = pytest.importorskip("triton")

import interpreter  # noqa: E402, F401
import triton.language as tl  # noqa: E402


@triton.jit
def _double(x_ptr, y_ptr, shift_x, shift_y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + shift_y + i, tl.load(x_ptr + shift_x + i) * 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_guards(dtype):
    x = torch.arange(16, dtype=dtype)
    y = torch.zeros(18, dtype=dtype)[1:-1]  # guards stand round the storage, not round the view
    _double[(1,)](x, y, 0, 0, BLOCK=16)
    assert torch.equal(y, 2 * x)
    for shift in (-1, 1):
        _double[(1,)](x, y, shift, 0, BLOCK=16)
        assert y.isnan().sum() == 1
        _double[(1,)](x, y, 0, shift, BLOCK=16)
        with pytest.raises(AssertionError, match="_double wrote outside"):
            _double[(1,)](x, y, 0, 2 * shift, BLOCK=16)


def test_bf16_rounds_to_nearest_even():
    x = torch.randn(64).bfloat16()
    y = torch.empty_like(x)
    _double[(1,)](x, y, 0, 0, BLOCK=64)
    assert torch.equal(y, x * 2)
