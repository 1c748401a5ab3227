"""The CUDA C++ kernels where they differ from the other backends: the ways through rows, the emulator, the choice."""

import contextlib
import subprocess
import sys
from types import SimpleNamespace

import conftest
import emulator
import pytest
import test_attention
import torch
import torch.nn.functional as F
from check import compare

import fastllm
from fastllm import dispatch, info, reference
from fastllm.ops import attention, cross_entropy, linear_cross_entropy, norm, softmax

needs_compiler = pytest.mark.skipif(emulator.compiler() is None, reason="no C++ compiler for the emulator")


@pytest.fixture(params=[80, 90], ids="sm_{}".format)
def arch(request):
    if not torch.cuda.is_available():
        yield from conftest.emulated_cuda(request.param)
    elif request.param < 90:
        pytest.skip("a real GPU has one architecture")
    elif reason := dispatch.missing_cuda():
        pytest.skip(reason)
    else:
        with torch.device("cuda"), fastllm.backend("cuda"):
            yield


# One row a warp or less, a block, a cluster of blocks (on sm_90), too long for that; in 16-byte packs or by element.
ROWS = [(5, 8), (5, 24), (9, 520), (3, 4100), (2, 4099), (1, 20000), (1, 33000), (1, 17001)]


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", ROWS, ids=str)
def test_ways_through_a_row(arch, shape, dtype):
    N, D = shape
    x, w, b, dy = torch.randn(N, D), torch.randn(D), torch.randn(D), torch.randn(N, D)
    compare(
        lambda x, w, b: fastllm.layer_norm(x, w, b),
        lambda x, w, b: F.layer_norm(x, (D,), w, b),
        reference.layer_norm,
        [x, w, b],
        [dy],
        dtype,
    )
    compare(fastllm.rms_norm, lambda x, w: F.rms_norm(x, (D,), w, 1e-6), reference.rms_norm, [x, w], [dy], dtype)
    for ours, theirs in ((fastllm.softmax, torch.softmax), (fastllm.log_softmax, torch.log_softmax)):
        compare(ours, lambda x, f=theirs: f(x, -1), lambda x, f=theirs: f(x, -1), [3 * x], [dy], dtype)


@needs_compiler
def test_masked_rows_that_are_walked(arch):
    x, dy = torch.randn(1, 2, 3, 70001), torch.randn(1, 2, 3, 70001)
    options = dict(causal=True, mask=torch.rand(1, 1, 3, 70001) > 0.5, scale=0.3)
    exact = lambda x: reference.softmax(x, **options)  # noqa: E731
    compare(lambda x: fastllm.softmax(x, **options), exact, exact, [x], [dy], torch.float32)


@needs_compiler
def test_rows_that_do_not_start_at_a_multiple_of_16_bytes(arch):
    whole = torch.randn(1 + 6 * 64)
    x = whole[1:].view(6, 64)
    assert x.is_contiguous() and x.data_ptr() % 16
    torch.testing.assert_close(fastllm.rms_norm(x), reference.rms_norm(x))


@needs_compiler
def test_the_long_rows_of_a_vocabulary(arch):
    """The longest that has to work. On sm_90 eight blocks share a row, on sm_80 one walks over it."""
    x, target = torch.randn(1, 262144).bfloat16(), torch.tensor([123456])
    options = dict(label_smoothing=0.1, reduction="none")
    compare(
        lambda x: fastllm.cross_entropy(x, target, **options),
        lambda x: F.cross_entropy(x, target, **options),
        lambda x: reference.cross_entropy(x, target, **options),
        [x],
        [torch.randn(1)],
        x.dtype,
    )
    compare(fastllm.softmax, lambda x: x.softmax(-1), lambda x: x.softmax(-1), [x], [torch.randn(x.shape)], x.dtype)


# On sm_90: rows that a cluster keeps, of 2 or 4 blocks, or of 8 by element (the last may have nothing), and one that
# eight blocks walk over, as 50001 are too many to keep by element. On sm_80 a block walks over each.
LONG_ROWS = [
    (3, 33000, torch.bfloat16),
    (2, 70000, torch.float16),
    (1, 20001, torch.float32),
    (1, 50001, torch.bfloat16),
]


@needs_compiler
@pytest.mark.parametrize("options", [{}, dict(label_smoothing=0.1, z_loss=0.01), dict(softcap=3.0)], ids=str)
@pytest.mark.parametrize("shape", LONG_ROWS, ids=str)
def test_losses_of_long_rows(arch, shape, options):
    """Forward alone, backward alone, and both in one kernel over the logits, as linear_cross_entropy has it."""
    N, V, dtype = shape
    x, target = 3 * torch.randn(N, V), torch.randint(V, (N,))
    target[0] = -100 if N == 3 else V - 1
    ours = lambda x: fastllm.cross_entropy(x, target, **options)  # noqa: E731
    exact = lambda x: reference.cross_entropy(x, target, **options)  # noqa: E731
    compare(ours, exact, exact, [x], [torch.tensor(0.7)], dtype)

    # With one hidden number, which is 1, the weights of the layer are the logits of every row.
    logits, target = 3 * torch.randn(V, 1), torch.tensor([V - 1, 5])
    ours = lambda w: fastllm.linear_cross_entropy(w.new_ones(2, 1), w, target, **options)  # noqa: E731
    exact = lambda w: reference.linear_cross_entropy(w.new_ones(2, 1), w, target, **options)  # noqa: E731
    compare(ours, exact, exact, [logits], [torch.tensor(0.7)], dtype)


@needs_compiler
def test_token_accuracy_of_long_rows(arch):
    x = torch.randn(4, 40000).bfloat16()
    largest = x.float().argmax(1)
    x[1, 39999] = x[1, largest[1]]  # of equals the first is the largest
    target = torch.tensor([largest[0], 39999, largest[2], (largest[3] + 1) % 40000])
    _, right = fastllm.cross_entropy(x, target, reduction="none", return_token_accuracy=True)
    assert right.tolist() == [1, float(largest[1] == 39999), 1, 0]


@needs_compiler
@pytest.mark.parametrize("options", [dict(causal=True), dict(window=(70, 20), softcap=2.0)], ids=str)
@pytest.mark.parametrize("gpu, D", [(80, 64), (80, 128), (86, 128)])
def test_attention_over_several_tiles(gpu, D, options):
    """Blocks of queries and of keys, whole tiles and cut ones; on sm_86 without a second stage of tiles in flight."""
    if torch.cuda.is_available():
        pytest.skip("for the emulator, which can be another GPU; test_attention.py runs on the real one")
    emulated = conftest.emulated_cuda(gpu)
    device = next(emulated)
    try:
        shape = dict(B=1, H=2, Hkv=1, T=200, S=280, D=D)
        if "softcap" in options:
            test_attention.check_scores(device, torch.bfloat16, options, shape)
        else:
            test_attention.check(shape, torch.float16, device, lse=True, **options)
    finally:
        next(emulated, None)


@needs_compiler
def test_opcheck(arch):
    """Schemas, fake kernels and what the kernels return agree, strides too."""
    check = torch.library.opcheck
    x, dy, w = torch.randn(3, 4, 8), torch.randn(3, 4, 8), torch.randn(8)
    _, _, mean, rstd = norm.layer_norm_fwd.cuda(x, w, w, None, None, 1e-5, 0.0)
    check(norm.layer_norm_fwd.cuda, (x, w, w, dy, None, 1e-5, 0.0))
    check(norm.layer_norm_bwd.cuda, (dy, None, x, w, mean, rstd, None, 0.0, True, False))
    check(norm.rms_norm_fwd.cuda, (x, None, None, None, 1e-5, 1.0, 0.0))
    check(norm.rms_norm_bwd.cuda, (dy, dy, x, w, rstd, None, 1.0, 0.0, True))
    rows, mask = torch.randn(2, 3, 4, 5), torch.rand(1, 1, 4, 5) > 0.5
    check(softmax.softmax_fwd.cuda, (rows, mask, 0.5, True, False))
    check(softmax.softmax_bwd.cuda, (rows, rows.softmax(-1), 0.5, False))
    logits, target = torch.randn(4, 7), torch.tensor([0, 3, -100, 6])
    for reduction, accuracy in ((0, True), (1, False)):
        loss, lse, _ = cross_entropy.cross_entropy_fwd.cuda(logits, target, None, -100, reduction, 0.0, 0.0, 0.0, True)
        check(cross_entropy.cross_entropy_fwd.cuda, (logits, target, None, -100, reduction, 0.1, 2.0, 0.1, accuracy))
        check(cross_entropy.cross_entropy_bwd.cuda, (loss, logits, target, None, lse, -100, reduction, 0.1, 2.0, 0.1))
    total = linear_cross_entropy.cross_entropy_total.cuda(target, None, 7, -100)
    check(linear_cross_entropy.cross_entropy_total.cuda, (target, torch.rand(7), 7, -100))
    for dloss in (None, torch.tensor(2.0), torch.randn(4)):
        check(
            linear_cross_entropy.cross_entropy_rows.cuda, (logits, target, None, total, dloss, -100, 0.1, 0, 0.1, True)
        )
    q, do = (torch.randn(2, 5, 4, 8).bfloat16().transpose(1, 2) for _ in range(2))  # heads inside positions
    k, bias, sink = torch.randn(2, 2, 6, 8).bfloat16(), torch.randn(1, 4, 5, 6), torch.randn(4)
    options = (None, bias, None, sink, None, 0.3, 0.0, 1, -1, 0, 0.0)
    check(attention.attention_fwd.cuda, (q, k, k, *options))
    o, lse = attention.attention_fwd.cuda(q, k, k, *options)
    for bias_grad in (True, False):
        check(attention.attention_bwd.cuda, (do, lse, q, k, k, o, lse, *options, bias_grad, False))


EMULATED = """
#include "cuda/device.cuh"
namespace fastllm::cuda {
namespace {
struct A { float* out; };
__global__ void kernel(A a) {
  float* x = (float*)shared_memory();
  const int t = threadIdx.x;
  %s
}
}
}
int main() {
  float out[64];
  fastllm::cuda::launch(fastllm::cuda::kernel, {2, 64, 64 * 4}, fastllm::cuda::A{out}, nullptr);
  fastllm::cuda::launch(fastllm::cuda::kernel, {1, 64, 64 * 4}, fastllm::cuda::A{out}, nullptr);
  for (int t = 0; t < 64; ++t) if (out[t] != float((t + 1) %% 64)) return 1;
  return 0;
}
"""


@needs_compiler
@pytest.mark.parametrize(
    "body, what",
    [
        ("x[t] = t; sync_block(); a.out[t] = x[(t + 1) % 64];", "runs"),
        ("x[t] = t; a.out[t] = x[(t + 1) % 64];", "is wrong"),  # no barrier: half of the neighbours are not there yet
        ("x[t] = t; if (t < 32) sync_block(); a.out[t] = x[(t + 1) % 64];", "a barrier that not all threads reach"),
        ("x[t + 1] = t; sync_block(); a.out[t] = x[t];", "a write past the end of shared memory"),
        ("arrive_at<128>(1); sync_at<128>(1); a.out[t] = x[t];", "a thread arrives twice in one phase of a barrier"),
    ],
    ids=["barrier", "no barrier", "half a barrier", "overflow", "two arrivals"],
)
def test_the_emulator_finds(tmp_path, body, what):
    """What is wrong on a GPU is wrong here: a test of the tests."""
    source, program = tmp_path / "kernel.cu", tmp_path / "kernel"
    source.write_text(EMULATED % body)
    command = [emulator.compiler(), *emulator.FLAGS.split(), "-I", emulator.ROOT / "csrc", "-include", emulator.HEADER]
    subprocess.run([*command, "-x", "c++", source, "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    if what == "runs":
        assert done.returncode == 0, done.stderr
    elif what == "is wrong":
        assert done.returncode == 1 and not done.stderr
    else:
        assert done.returncode < 0 and what in done.stderr


def on_gpu(dtype=torch.bfloat16):
    """All that the choice of a backend looks at in a tensor on a GPU."""
    return SimpleNamespace(device=torch.device("cuda", 0), is_cpu=False, shape=(4, 8), dtype=dtype)


@pytest.fixture
def built(monkeypatch):
    monkeypatch.setattr(dispatch, "missing_cuda", lambda: None)
    monkeypatch.setattr(dispatch, "missing_triton", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100")


def test_triton_runs_until_something_is_measured(built):
    assert dispatch.choose("rms_norm", on_gpu()) == "triton"
    with fastllm.backend("cuda"):
        assert dispatch.choose("rms_norm", on_gpu()) == "cuda"
    with fastllm.backend("triton"):
        assert dispatch.choose("rms_norm", on_gpu()) == "triton"


def test_the_measured_table_chooses(built, monkeypatch):
    monkeypatch.setitem(dispatch.MEASURED, ("rms_norm", "NVIDIA H100"), "cuda")
    monkeypatch.setitem(dispatch.MEASURED, ("rope", "NVIDIA H100"), "cuda")
    with dispatch.recording([]) as calls:
        assert dispatch.choose("rms_norm", on_gpu()) == "cuda"
        assert dispatch.choose("softmax", on_gpu()) == "triton"  # not in the table
        assert dispatch.choose("rope", on_gpu()) == "triton"  # no such kernel
        lacking = {"cuda": "an option"}.get
        assert dispatch.choose("rms_norm", on_gpu(), lacking) == "triton"  # what it cannot do goes to Triton
    assert [call.kernel for call in calls] == ["CUDA C++", "Triton", "Triton", "Triton"]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA A100")
    assert dispatch.choose("rms_norm", on_gpu()) == "triton"  # measured on another GPU


@pytest.mark.parametrize("is_list", [False, True])
@pytest.mark.parametrize("current, guarded", [(0, [torch.device("cuda", 1)]), (1, [])])
def test_triton_launches_on_the_gpu_of_its_tensors(monkeypatch, current, guarded, is_list):
    made, seen = [], []
    x = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 1))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "device", lambda device: made.append(device) or contextlib.nullcontext())
    launcher = SimpleNamespace(rms_norm_fwd=lambda *args: seen.append(list(made)))
    monkeypatch.setattr(dispatch.importlib, "import_module", lambda name: launcher)
    norm.rms_norm_fwd.triton([x] if is_list else x)
    assert seen == [guarded]


def test_a_forced_call_that_cuda_cannot_do_says_why(built):
    with fastllm.backend("cuda"), pytest.raises(dispatch.Unsupported, match="forced, but rope has no CUDA C.. kernel"):
        dispatch.choose("rope", on_gpu())


def test_the_reason_for_missing_kernels_is_shown(monkeypatch):
    monkeypatch.setattr(dispatch, "missing_cuda", lambda: "no nvcc that day")
    assert "cuda      no: no nvcc that day" in info.lines(info.collect())


@needs_compiler
def test_explain_names_the_kernel():
    emulated = conftest.emulated_cuda()
    next(emulated)
    try:
        (call,) = fastllm.explain(fastllm.rms_norm, torch.ones(2, 3)).calls
    finally:
        next(emulated, None)
    assert (call.backend, call.kernel) == ("cuda", "CUDA C++")


@needs_compiler
def test_emulated_kernels_do_not_outlive_the_tests():
    """Importing fastllm alone registers nothing for CPU tensors under fastllm_cuda."""
    code = "import torch, fastllm; torch.ops.fastllm_cuda.softmax_bwd(torch.ones(2), torch.ones(2), 1.0, False)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=emulator.ROOT)
    assert done.returncode and "NotImplementedError" in done.stderr
