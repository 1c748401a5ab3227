"""What launch tables are asked with: a GPU's name and its number of multiprocessors."""

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
