"""tune_allocator: a large tensor that is made again does not fault its pages in again; and back; and elsewhere."""

import subprocess
import sys

import pytest

from fastllm import allocator

needs_glibc = pytest.mark.skipif(allocator._glibc() is None, reason="the C library is not glibc")

# In a process of its own: the thresholds belong to the process.
FAULTS = """
import resource, torch, fastllm

def faults(size, before):  # a MiB
    for _ in range(before):
        torch.empty(size).fill_(1.0)
    start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.empty(size).fill_(1.0)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start) / 4 / (size / 2**18)

many = 24  # at first what alignment cuts off blocks keeps them from being merged
stock = faults(2**24, many)
print(*fastllm.tune_allocator(), sep="; ")
kept = faults(2**24, many)
print(*fastllm.tune_allocator(False), sep="; ")
print(stock, kept, faults(3 * 2**26, 1))  # larger than what may be left free between blocks that are in use
"""


@needs_glibc
def test_pages_are_kept_and_given_back():
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    on, off, numbers = done.stdout.splitlines()
    assert on.split("; ") == ["mallopt(M_MMAP_THRESHOLD, 1073741824)", "mallopt(M_TRIM_THRESHOLD, 2147483647)"]
    assert off.split("; ")[:2] == ["mallopt(M_MMAP_THRESHOLD, 33554432)", "mallopt(M_TRIM_THRESHOLD, 67108864)"]
    stock, kept, usual = map(float, numbers.split())
    assert kept < stock / 10, f"{kept} page faults a MiB, {stock} without tune_allocator"
    assert usual > stock / 2, f"{usual} page faults a MiB after tune_allocator(False), {stock} before"


def test_elsewhere_it_does_nothing_and_says_so(monkeypatch):
    monkeypatch.setattr(allocator, "_glibc", lambda: None)
    assert allocator.tune_allocator() == allocator.tune_allocator(False) == []
