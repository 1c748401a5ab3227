"""What launch tables are asked with, a GPU's name and its number of multiprocessors, and what TMA can fetch."""

import functools

import torch


@functools.cache
def gpu_name(device):
    """The GPU's name; "any" where there is none, in the interpreter and on meta tensors."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "any"


def entry(table, device):
    """A table's entry for this GPU, or for any."""
    return table.get(gpu_name(device), table["any"])


@functools.cache
def processors(device, elsewhere=132):
    """Multiprocessors of the GPU; `elsewhere` (an H100's) where there is none."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else elsewhere


@functools.cache
def shared_bytes(device):
    """Shared memory that one program may have: 227 KiB on an H100, 163 on an A100, 99 on GPUs for workstations."""
    if device.type != "cuda":
        return 227 << 10
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def is_fetchable(x):
    """Whether TMA can fetch tiles of x [B, H, rows, columns]: rows at multiples of 16 bytes, and something to fetch."""
    unit = 16 // x.element_size()
    strides = all(x.stride(n) % unit == 0 and x.stride(n) > 0 for n in range(3) if x.shape[n] > 1)
    return x.numel() > 0 and x.stride(3) == 1 and strides and x.data_ptr() % 16 == 0


def fetchable_strides(x):
    """The strides of a fetchable x, and those of dimensions of size 1, which may be anything, as TMA wants them."""
    unit = 16 // x.element_size()
    columns = -(-x.shape[3] // unit) * unit
    return [*(n if size > 1 else columns for n, size in zip(x.stride()[:3], x.shape)), 1]
