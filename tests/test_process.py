"""What the CPU kernels may do to the process they run in: memory, pages next to tensors, threads, forks.

Each test runs a program in a process of its own, which a stray access would kill.
"""

import subprocess
import sys
import textwrap

import pytest
import torch

from fastllm import dispatch

pytestmark = pytest.mark.skipif(dispatch.extension is None, reason="the C++ extension is not built")
AVAILABLE = dispatch.extension.available() if dispatch.extension else []


def program(text, **environment):
    """Run `text`; its standard output."""
    import os

    code = textwrap.dedent(text)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment, timeout=300
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.parametrize("isa", AVAILABLE)
@pytest.mark.parametrize("side", ["before", "after"])
def test_nothing_is_touched_beside_an_input(isa, side):
    """Every case of `verify`, with a page that may not be read right before or right after every input."""
    program(
        f"""
        import ctypes, mmap, torch
        from fastllm import verify
        from fastllm.bench import cases

        libc, page, kept = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE, []

        def guarded(x):
            pages = -(-x.nbytes // page)
            memory = mmap.mmap(-1, (pages + 2) * page)
            start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
            at = page if {side!r} == "before" else (pages + 1) * page - x.nbytes
            y = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=at).view(x.shape)
            y.copy_(x)
            for guard in (start, start + (pages + 1) * page):
                assert libc.mprotect(ctypes.c_void_p(guard), page, 0) == 0
            kept.append(memory)
            return y

        for case in cases.VERIFY:
            for dtype in (torch.float32, torch.bfloat16):
                inputs = [guarded(x) if x.is_floating_point() else x for x in case.inputs(dtype)]
                backward = "backward" in case.flops
                leaves = [x.requires_grad_(backward) if x.is_floating_point() else x for x in inputs]
                outputs = case.ours(*leaves)
                outputs = outputs if isinstance(outputs, (tuple, list)) else [outputs]
                if backward:
                    outputs = [y for y in outputs if y.requires_grad]
                    torch.autograd.backward(outputs, [guarded(torch.ones_like(y)) for y in outputs])
        """,
        FASTLLM_CPU=isa,
    )


@pytest.mark.parametrize(
    "shape, option, beside",
    [
        # the scores alone would take 256 MiB; keys are cut into four ranges for two threads, each with a dq of 2 MiB
        ((1, 1, 8192, 64), "softcap=20.0", 16),
        # packed queries of a whole head and sums of its keys would take 30 MiB a thread
        ((1, 4, 16384, 64), "window=(1000, 0)", 8),
    ],
)
def test_memory_grows_with_the_rows_alone(shape, option, beside):
    """What forward and backward need beside o and three gradients, in MiB."""
    grown = program(
        f"""
        import resource, torch, fastllm
        torch.set_num_threads(2)
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

        def grown(shape):
            q, k, v, do = (torch.randn(shape) for _ in range(4))
            leaves = [x.requires_grad_() for x in (q, k, v)]
            before = peak()
            o, lse = fastllm.attention(q, k, v, causal=True, {option}, return_lse=True)
            torch.autograd.grad([o, lse], leaves, [do, torch.ones_like(lse)])
            return peak() - before - 4 * q.numel() * 4 / 2**20

        grown((1, 1, 128, 64))  # what is imported at the first call
        print(grown({shape}))
        """
    )
    assert float(grown) < beside, f"{grown} MiB beside the outputs"


def test_one_openmp_runtime_and_no_more_threads_than_told():
    out = program(
        """
        import os, torch, fastllm
        torch.set_num_threads(1)
        x = torch.randn(4, 8, 256, 64, requires_grad=True)
        before = len(os.listdir("/proc/self/task"))
        fastllm.attention(x, x, x, causal=True).sum().backward()
        fastllm.layer_norm(x).sum().backward()
        assert len(os.listdir("/proc/self/task")) <= before + 1  # autograd's own
        names = {line.split()[-1] for line in open("/proc/self/maps") if "omp" in line.rpartition("/")[2]}
        print(len({n for n in names if any(s in n for s in ("libgomp", "libomp", "libiomp"))}))
        """
    )
    assert int(out) <= 1, "a second OpenMP runtime costs milliseconds a call"


def test_workers_forked_after_a_call_can_call():
    out = program(
        """
        import torch, fastllm
        from torch.utils.data import DataLoader

        x = torch.randn(2, 4, 200, 32)

        class Attended(torch.utils.data.Dataset):
            def __len__(self):
                return 4

            def __getitem__(self, i):
                return fastllm.rms_norm(fastllm.attention(x * i, x, x, causal=True))

        expected = torch.stack([Attended()[i] for i in range(4)])
        found = torch.cat(list(DataLoader(Attended(), num_workers=2, multiprocessing_context="fork")))
        print(torch.equal(found, expected))
        """
    )
    assert out.split() == ["True"]


def test_python_threads_do_not_disturb_each_other():
    out = program(
        """
        import concurrent.futures, torch, fastllm

        def work(n):
            random = torch.Generator().manual_seed(n)
            q = torch.randn(1, 4, 50 + 13 * n, 32, generator=random, requires_grad=True)
            k = torch.randn(1, 2, 300, 32, generator=random, requires_grad=True)
            o = fastllm.softmax(fastllm.attention(q, k, k, causal=True)) + fastllm.attention(q[:, :, :1], k, k)
            return o.detach(), *torch.autograd.grad(o.square().sum(), (q, k))

        expected = [work(n) for n in range(8)]
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            for _ in range(5):
                for got, wanted in zip(pool.map(work, range(8)), expected):
                    assert all(torch.equal(x, y) for x, y in zip(got, wanted))
        print("same")
        """
    )
    assert out.split() == ["same"]


def test_an_index_beyond_2_to_the_31():
    """Keys that are a view with stride 0: 2^31 elements and more in the arithmetic, a page in memory."""
    S = 2**31 // 64 + 100
    q, k = torch.randn(1, 1, 1, 64), torch.randn(1, 1, 1, 64).expand(1, 1, S, 64)
    import fastllm

    o, lse = fastllm.attention(q, k, k, window=(50, 0), causal=True, return_lse=True)
    assert torch.allclose(o, k[:, :, :1]) and torch.isfinite(lse).all()
    x = torch.randn(1, 1, 1, 8).expand(1, 1, 2**29, 8)[:, :, -40:]
    o = fastllm.attention(x, x, x, causal=True)
    assert torch.allclose(o, x)
