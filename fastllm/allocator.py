"""How the C library hands out large blocks: page faults in fresh memory cost more than most kernels that fill it."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
KEPT = {M_MMAP_THRESHOLD: 2**30, M_TRIM_THRESHOLD: 2**31 - 1}
# What glibc's own thresholds, which adapt, have become once a block of 32 MiB was freed.
USUAL = {M_MMAP_THRESHOLD: 2**25, M_TRIM_THRESHOLD: 2**26}
NAMES = {M_MMAP_THRESHOLD: "M_MMAP_THRESHOLD", M_TRIM_THRESHOLD: "M_TRIM_THRESHOLD"}


def tune_allocator(keep: bool = True) -> list[str]:
    """Let glibc keep freed blocks of up to 1 GiB for the next allocation, instead of returning them to the system.

    By default every block of 32 MiB and more is mapped anew and given back, so that a tensor of that size costs a page
    fault per 4 KiB each time it is made: more than a norm or an activation takes to fill it. Process-wide, for PyTorch
    and everything else that calls malloc. The price is memory that the process holds until it ends; the first seven or
    so blocks of a size may still be new, until glibc's cache of small blocks has its fill of what alignment cuts off.

    keep=False gives what is free back and sets what glibc's thresholds adapt to by themselves, 32 and 64 MiB; they do
    not adapt any more. Returns what was set, in words: nothing on another C library (musl, macOS, Windows), where this
    does nothing. An allocator that replaces malloc (jemalloc, tcmalloc) is not touched by it.
    Held by tests/test_allocator.py. Source: mallopt(3).
    """
    libc = _glibc()
    if libc is None:
        return []
    wanted = KEPT if keep else USUAL
    done = [f"mallopt({NAMES[which]}, {size})" for which, size in wanted.items() if libc.mallopt(which, size)]
    if not keep and libc.malloc_trim(0):
        done.append("malloc_trim(0)")
    return done


def _glibc():
    """The C library of this process, or None where it is not glibc."""
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018
    except (AttributeError, OSError, TypeError):
        return None
    return libc
