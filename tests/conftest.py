"""A kernel's tests run once per backend: each C++ instruction set, Triton and CUDA C++.

Where there is no GPU, Triton's kernels are interpreted and the CUDA C++ kernels run in an emulator (emulator.py).
"""

import gc
import math
import os

# Before PyTorch is imported, and for subprocesses too: OpenMP's threads sleep between two parallel regions. They would
# spin, and where several processes share the cores, that took three quarters of the tests' CPU time.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no processes for it, each of which imports PyTorch

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import fastllm
from fastllm import dispatch
from fastllm.bench.gpu.machine import STICKY
from fastllm.llm import data, sources

ISAS = ["scalar", "avx2", "avx512", "avx512_bf16"]


def cpu(isa):
    """The backend of an instruction set, as a parameter; a mark skips faster than a fixture, thousands of times."""
    reason = None
    if dispatch.extension is None:
        reason = f"no C++ extension: {dispatch.missing_extension}"
    elif isa not in dispatch.extension.available():
        reason = f"this CPU or this build has no {isa} (available: {dispatch.extension.available()})"
    return pytest.param(f"cpu-{isa}", marks=[pytest.mark.skip(reason=reason)] if reason else [])


BACKENDS = [cpu(isa) for isa in ISAS] + ["triton", "cuda"]


SHARE = 7  # of the tests named below, one in this many: coprime to the number of dtypes, rules and options


def pytest_collection_modifyitems(items):
    """These take long without a GPU: of the interpreted and of the emulated ones, the fast suite has a share
    across all options, the slow one all."""
    if torch.cuda.is_available():
        return
    for backend in ("triton", "cuda"):
        tests = [
            item
            for item in items
            if item.path.name
            in (
                "test_attention.py",
                "test_varlen.py",
                "test_kvcache.py",
                "test_linear.py",
                "test_linear_cross_entropy.py",
                "test_weight_only.py",
            )
            and hasattr(item, "callspec")
            and backend in (item.callspec.params.get("backend"), item.callspec.params.get("own_backend"))
        ]
        for n, item in enumerate(tests):
            if n % SHARE:
                item.add_marker(pytest.mark.slow)


def pytest_collection_finish():
    """What the imports of all test files left is not searched for garbage again: with it every gc.collect(), of which
    a benchmark makes one for each contender, takes 0.8 s."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poison_fresh_memory():
    """torch.empty returns NaN in tests, so an output element that no kernel wrote cannot look right."""
    poison = getattr(dispatch.extension, "poison", lambda on: None)
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    poison(True)
    yield
    poison(False)
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def no_round_again(request, monkeypatch):
    """Benchmarks measure again what other processes disturbed; here those are the other tests."""
    if "bench" in request.path.stem and request.path.stem != "test_bench_timing":
        monkeypatch.setattr("fastllm.bench.timing.BUSY", math.inf)


@pytest.fixture
def every_size(monkeypatch):
    """`accelerate` puts kernels under calls of every size, those included where PyTorch is as fast."""
    monkeypatch.setattr("fastllm.mlp.worth", lambda activation, x: True)


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Runs the test once per backend; its value is the device that the test's tensors should be on."""
    yield from use_backend(request.param)


@pytest.fixture(params=BACKENDS[:-2])
def cpu_backend(request):
    """`backend`, for what only the CPU kernels have."""
    yield from use_backend(request.param)


@pytest.fixture(params=BACKENDS[:-1])
def own_backend(request):
    """`backend`, for what CPU and Triton have kernels for and CUDA C++ has not."""
    yield from use_backend(request.param)


def use_backend(name):
    name, _, isa = name.partition("-")
    if name == "cpu":
        before = dispatch.extension.selected()
        dispatch.extension.select(isa)
        with fastllm.backend("cpu"):
            yield "cpu"
        dispatch.extension.select(before)
    elif name == "cuda":
        if not torch.cuda.is_available():
            yield from emulated_cuda()
            return
        if reason := dispatch.missing_cuda():
            pytest.skip(reason)
        with fastllm.backend("cuda"):
            yield "cuda"
    else:
        if reason := dispatch.missing_triton():
            pytest.skip(reason)
        if not torch.cuda.is_available():
            import interpreter  # noqa: F401, repairs bf16 in Triton's interpreter
        with fastllm.backend("triton"):
            yield "cuda" if torch.cuda.is_available() else "cpu"


def emulated_cuda(arch=80):
    """Forces the CUDA C++ kernels on CPU tensors, through the emulator of a GPU."""
    import emulator

    if emulator.compiler() is None:
        pytest.skip("no C++ compiler to build the emulated CUDA kernels with")
    emulator.load()(arch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "missing_cuda", lambda: None)
        patch.setattr(dispatch, "cuda_device", "cpu")
        with fastllm.backend("cuda"):
            yield "cpu"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """What the CUDA C++ kernels leave to Triton is skipped, with the reason; test_cuda.py says what they may not."""
    try:
        return (yield)
    except dispatch.Unsupported as why:
        if getattr(item, "callspec", None) is None or item.callspec.params.get("backend") != "cuda":
            raise
        pytest.skip(str(why))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """After an error that leaves a GPU's context unusable the other tests would fail too: whoever runs them may start
    a process anew."""
    report = yield
    if call.excinfo is not None and torch.cuda.is_available() and STICKY.search(str(call.excinfo.value)):
        item.session.shouldstop = "the CUDA context is lost"
    return report


def tiny_corpus(seed=0, n=160):
    """Two classes that one word decides, and text in which every fourth letter is known from the one before it."""
    random = torch.Generator().manual_seed(seed)
    filler = "lorem ipsum dolor sit amet consetetur".split()

    def row(i):
        label = ("bad", "good")[i % 2]
        length = int(torch.randint(3, 12, (1,), generator=random))
        body = [filler[j] for j in torch.randint(len(filler), (length,), generator=random)]
        body.insert(int(torch.randint(length, (1,), generator=random)), {"bad": "awful", "good": "lovely"}[label])
        return f"{' '.join(body)} {i}", label

    return {split: [row(i) for i in range(size)] for split, size in (("train", n), ("valid", 24), ("test", 24))}


@pytest.fixture
def registered(monkeypatch, tmp_path):
    """The sets `tiny` and `prose` and the folder that they are built in; `gone` and `silent` cannot be had."""

    def unavailable():
        raise sources.Unavailable("no network here")

    prose = {
        split: "the cat sat on the mat; the dog lay on the log.\n" * n for split, n in zip(sources.SPLITS, (60, 8, 8))
    }
    builders = {"tiny": lambda: sources.Corpus(tiny_corpus(), "this file"), "gone": unavailable}
    texts = {"prose": lambda: sources.Corpus(prose, "this file"), "silent": unavailable}
    monkeypatch.setattr(data, "CLASSIFICATION", builders)
    monkeypatch.setattr(data, "TEXT", texts)
    monkeypatch.setattr(data, "OFFLINE", {"classification": "tiny", "text": "prose"})
    return tmp_path / "data"
