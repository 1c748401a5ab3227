"""What the kernels have to reach on a GPU, and who else is timed there: the bars of `python -m fastllm.bench.gpu`.

The figures are for one H100 in bf16, and were set from what others published before anything was measured here.
"""

import contextlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

import fastllm
from fastllm import dispatch
from fastllm.bench import cases, rivals
from fastllm.bench.cases import Case


@dataclass(frozen=True)
class Bar:
    """A case and a pass, and the least ratios that count as reached.

    "bandwidth" and "matrix" are shares of what a copy and a large matrix product reach in the same run; every other
    name is a rival, whose time over ours is meant ("sdpa": the fastest of PyTorch's attention backends).
    """

    case: Case
    passes: str
    targets: dict[str, float]
    dtype: torch.dtype = torch.bfloat16
    compile_mode: str | None = None  # of the rival; None leaves it out
    graph: bool = False  # so short that launches cost more: replayed from a CUDA graph, on every side

    @property
    def name(self) -> str:
        return f"{self.case} {str(self.dtype).removeprefix('torch.')} {self.passes}"


RIVALS = ("sdpa-cudnn", "sdpa-flash", "sdpa-efficient", "flash-attn-2", "flash-attn-3", "liger")


def rivals_of(bar: Bar) -> dict[str, Callable]:
    """Name -> a function without arguments that gives the rival's function, or fails with the reason."""
    case = bar.case
    found = {"torch": lambda: case.torch}
    for name in RIVALS:
        rival = rivals.RIVALS[name]
        if not case.op.startswith("attention_") and rival.takes(case, "cuda"):
            found[name] = lambda rival=rival: rival.make(case, bar.dtype, "cuda")
    if case.op == "attention" and bar.passes == "forward" and case.shapes["q"][-1] in (64, 128):
        found["ours for Hopper"] = lambda: within(hopper, case.ours)
    if case.op in dispatch.CUDA_OPS:  # where it wins is what dispatch.MEASURED wants to know
        found["ours in CUDA C++"] = lambda: within(lambda: fastllm.backend("cuda"), case.ours)
    if case.op == "linear":
        found["product, then activation"] = lambda: within(unfused, case.ours)
    if bar.compile_mode:
        found["compile"] = lambda: rivals.compiled(case, bar.compile_mode)
    return found


@contextlib.contextmanager
def hopper():
    """Inside, attention's forward pass is the warp-specialised kernel; an error where this GPU cannot run it."""
    attention, sm90 = (importlib.import_module(f"fastllm.kernels.{name}") for name in ("attention", "attention_sm90"))
    if not sm90.is_hopper(torch.device("cuda", torch.cuda.current_device())):
        raise RuntimeError("no GPU of the Hopper generation")
    before, attention.WARP_SPECIALISED = attention.WARP_SPECIALISED, {"any": (64, 128)}
    try:
        with fastllm.backend("triton"):
            yield
    finally:
        attention.WARP_SPECIALISED = before


@contextlib.contextmanager
def unfused():
    """Inside, PyTorch makes the product, and our kernel activates it."""
    linear = importlib.import_module("fastllm.ops.linear")
    before, linear._fused = linear._fused, lambda x, K: False
    try:
        with fastllm.backend("triton"):
            yield
    finally:
        linear._fused = before


def within(context, function):
    """`function`, called inside a context of its own; fails at once where the context does."""

    def run(*inputs):
        with context():
            return function(*inputs)

    with context():
        return run


def _attention(passes, sdpa, matrix, *shape, **options):
    targets = {"sdpa": sdpa} | ({"matrix": matrix} if matrix else {})
    return Bar(cases.attention(*shape, **options), passes, targets)


def _row(case, passes, bandwidth, **targets):
    return Bar(case, passes, {"bandwidth": bandwidth} | targets, compile_mode="max-autotune-no-cudagraphs")


def log_uniform(low, high, count) -> list[int]:
    """Lengths of documents, evenly spread on a logarithmic scale."""
    return [round(low * (high / low) ** (n / (count - 1))) for n in range(count)]


FORWARD_BACKWARD = ("forward", "backward")
BARS = [
    _attention("forward", 0.80, 0.62, 2, 16, 8192, 128),
    _attention("forward", 0.80, 0.55, 2, 16, 8192, 128, causal=True),
    _attention("forward", 0.85, 0.52, 4, 32, 4096, 128, Hkv=8, causal=True),
    _attention("forward", 0.97, 0.50, 1, 32, 8192, 64),
    _attention("forward", 0.97, 0.47, 1, 32, 8192, 64, causal=True),
    _attention("forward", 0.70, 0.50, 2, 8, 8192, 256),
    _attention("forward", 1.00, None, 32, 16, 512, 128, causal=True),
    _attention("backward", 0.68, 0.45, 2, 16, 8192, 128),
    _attention("backward", 0.68, 0.45, 2, 16, 8192, 128, causal=True),
    _attention("backward", 0.75, 0.42, 1, 32, 8192, 64),
    Bar(cases.varlen(log_uniform(128, 8192, 32), 16, 128, causal=True), "forward", {"torch": 1.3, "matrix": 0.47}),
    *(Bar(cases.kvcache(64, 32, 8, 8192, 128, page_size=n), "forward", {"bandwidth": 0.93}) for n in (16, 64)),
    Bar(cases.kvcache(1, 32, 8, 131072, 128), "forward", {"bandwidth": 0.85}),
    Bar(cases.kvcache(16, 32, 8, 4096, 128, page_size=16), "forward", {"torch": 3.0}),
    *(
        _row(cases.norm("rms_norm", 16384, D), "forward", 0.90 if D == 2048 else 0.97, compile=1.1)
        for D in (2048, 4096, 8192, 16384)
    ),
    _row(cases.norm("rms_norm", 16384, 4096, residual=True), "forward", 0.97, torch=2.5),
    *(_row(cases.norm("layer_norm", 16384, D), "forward", 0.97, torch=1.5) for D in (4096, 8192, 16384)),
    *(_row(cases.norm("rms_norm", 16384, D), "backward", 0.88, compile=1.8, torch=3.5) for D in (4096, 8192, 16384)),
    *(_row(cases.norm("layer_norm", 16384, D), "backward", 0.88, compile=1.8, torch=2.1) for D in (4096, 8192, 16384)),
    _row(cases.softmax(32768, 1024), "forward", 0.93, compile=1.5),
    _row(cases.softmax(32768, 4096), "forward", 0.97, compile=1.5),
    _row(cases.softmax(32768, 32768), "forward", 0.97, compile=1.5),
    _row(cases.softmax(8192, 131072), "forward", 0.75),
    _row(cases.softmax(32768, 4096), "backward", 0.95),
    *(_row(cases.cross_entropy(8192, V), "forward", 1.00, compile=1.6) for V in (32000, 128256, 262144)),
    _row(cases.cross_entropy(64, 262144), "forward", 0.80, compile=1.6),  # fewer rows than multiprocessors
    _row(cases.cross_entropy(8192, 128256), "both", 0.65, torch=3.0),
    # Published shares count the logits' second computation too: 0.80 of their 8 N D V operations is 0.60 of our 6.
    Bar(cases.linear_cross_entropy(8192, 4096, 128256), "both", {"matrix": 0.60, "torch": 1.3}),
    *(_row(cases.rope(8, 4096, 32, 128, Hkv=8), passes, 0.93, compile=1.05, torch=6.0) for passes in FORWARD_BACKWARD),
    _row(cases.gated("swiglu", 16384, 14336), "forward", 0.98, torch=2.7),
    _row(cases.gated("swiglu", 16384, 14336), "backward", 0.95, torch=2.7),
    Bar(cases.adamw(64, 1 << 20), "forward", {"bandwidth": 0.93, "torch": 1.2}, torch.float32),
    *(_row(cases.merge(2, 8, 32, 4096, 128), passes, 0.93, torch=3.0) for passes in FORWARD_BACKWARD),
    # Weights that no L2 cache holds. PyTorch's product has them in bf16: two and four times the bytes.
    *(
        Bar(cases.weight_only(M, 28672, 8192, bits), "forward", {"bandwidth": share, "torch": torch_}, graph=True)
        for M, bits, share, torch_ in ((1, 8, 0.85, 1.7), (1, 4, 0.75, 2.8), (16, 4, 0.70, 2.6), (64, 4, 0.60, 2.0))
    ),
    Bar(cases.weight_only(2048, 28672, 8192, 4), "forward", {"torch": 0.9}),
    *(Bar(cases.linear(8192, 4096, K, activation="gelu_tanh"), "both", {"torch": 1.03}) for K in (1024, 4096)),
]


@dataclass(frozen=True)
class Sizes:
    """How large the ceilings and the training step are."""

    copy_bytes: int = 8 << 30  # read and written
    products: tuple = ((8192, 8192, 8192), (4096, 128256, 4096))
    model: dict = field(
        default_factory=lambda: dict(vocab=50304, d_model=1024, heads=16, layers=24, d_ff=4096, max_len=1024)
    )
    batch: int = 8
    dtype: torch.dtype = torch.bfloat16  # of the model


SIZES = Sizes()
# Small cases for the sanitizer: file, which tests of it. Shared memory, several programs per sum, packed bounds.
RISKIEST = [
    ("test_attention.py", "triton and test_one_key_head"),
    ("test_varlen.py", "triton and dropout"),
    ("test_norm.py", "triton and test_residual and float32"),
    ("test_cuda_hopper.py", "test_heads_and_batches"),
    ("test_attention_sm90.py", "test_against_fp64 and plain and 64 and 300"),
    ("test_linear_cross_entropy.py", "cuda and test_rows and float32"),
    ("test_cuda.py", "test_ways_through_a_row and 90 and 33000 and bfloat16"),  # clusters
]
