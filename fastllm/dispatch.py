"""Which implementation runs a call, and the record of why.

PyTorch's dispatcher does the work: every op is one schema `fastllm::<op>`, with a C++ kernel for CPU tensors
(csrc/cpu), a Python kernel for CUDA tensors that calls the Triton launcher of the same name (kernels/), and a fake
kernel for tracing. What has a CUDA C++ kernel too (csrc/cuda) has it as `fastllm_cuda::<op>`; which of the two runs is
what the table MEASURED says. What no kernel can do goes to `fastllm.reference`, is said by `fastllm.explain`, and is an
error under FASTLLM_STRICT=1.
"""

import contextlib
import functools
import importlib
import json
import os
import sys
import threading
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch._C import _are_functorch_transforms_active as _in_functorch
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

BACKENDS = ("reference", "cpu", "triton", "cuda")

# What has a CUDA C++ kernel, as `choose` calls it; its schemas are defined once more, in a library of their own.
CUDA_OPS = frozenset(
    {"attention", "cross_entropy", "layer_norm", "linear_cross_entropy", "log_softmax", "rms_norm", "softmax"}
)

# (op, name of the GPU) -> "cuda", where the CUDA C++ kernel was measured to be the faster one; else Triton runs.
# Nothing has been measured yet.
MEASURED: dict[tuple[str, str], str] = {}

library = torch.library.Library("fastllm", "DEF")  # noqa: TOR901, the definitions live as long as the process
cuda_library = torch.library.Library("fastllm_cuda", "DEF")  # noqa: TOR901

_folder = Path(__file__).parent


def _load_extension():
    """The C++ module and None, or None and the reason. A binary that exists but does not load is an error."""
    if not any(_folder.glob("_C.*")):
        build = build_info()
        return None, build.get("reason", "the C++ extension has not been built (make build)")
    try:
        from fastllm import _C
    except ImportError as error:
        raise ImportError(
            f"fastllm: the C++ extension exists but does not load: {error}. It was built against another PyTorch or "
            "Python; rebuild it with `pip install --no-build-isolation --force-reinstall --no-deps .`"
        ) from error
    _C.select(os.environ.get("FASTLLM_CPU", ""))
    return _C, None


def build_info() -> dict:
    """What setup.py wrote down: compiler, instruction sets, or why there is no extension."""
    path = _folder / "_build_info.json"
    return json.loads(path.read_text()) if path.exists() else {}


extension, missing_extension = _load_extension()


@functools.cache
def missing_triton() -> str | None:
    """Why Triton cannot be used, or None."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"Triton does not import: {error}"
    return None


@functools.cache
def missing_cuda() -> str | None:
    """Why the CUDA C++ kernels cannot be used, or None; loads them. One that exists but does not load is an error."""
    path = next(_folder.glob("_cuda.*"), None)
    if path is None:
        return build_info().get("cuda", {}).get("reason", "the CUDA C++ kernels have not been built (make build)")
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise ImportError(
            f"fastllm: the CUDA C++ kernels exist but do not load: {error}. They were built against another PyTorch; "
            "rebuild them with `pip install --no-build-isolation --force-reinstall --no-deps .`"
        ) from error
    return None


def _load_nodes() -> str | None:
    """Let nodes in C++ (csrc/autograd.cpp) differentiate the ops called ..._plain, and calls reach them from Python at
    once (csrc/direct.cpp), or say why they do not: the module loads into the PyTorch alone that it was built beside."""
    build = build_info().get("autograd", {})
    if extension is None or not build.get("built"):
        return build.get("reason", "not built (make build)")
    if build["torch"] != torch.__version__:
        return f"built beside PyTorch {build['torch']}"
    try:
        importlib.import_module("fastllm._autograd")
    except ImportError as problem:
        return str(problem)
    return None


missing_nodes = _load_nodes()
has_nodes = missing_nodes is None


@dataclass(unsafe_hash=True)  # equal calls are counted; seconds, which change, are not compared
class Call:
    """One call of an op, as `explain` reports it; its seconds are without those of calls inside it."""

    op: str
    backend: str
    kernel: str
    shape: tuple
    dtype: str
    reason: str
    seconds: float = field(default=0.0, compare=False)


class Unsupported(RuntimeError):
    """The backend that was forced, or under FASTLLM_STRICT any, has no kernel for a call."""


cuda_device = "cuda"  # of tensors that CUDA C++ kernels take; the tests emulate a GPU on "cpu"
_forced: str | None = None
_recorder: "_Recorder | None" = None
_strict = os.environ.get("FASTLLM_STRICT", "") not in ("", "0")


@contextlib.contextmanager
def backend(name: str):
    """Force one implementation inside the `with` block: "reference", "cpu", "triton" or "cuda".

    Process-wide, like torch.backends switches. A backward pass runs on the implementation its forward pass ran on.
    Raises ValueError for another name; a call that the forced implementation cannot do raises RuntimeError.
    """
    global _forced
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {name!r}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


@contextlib.contextmanager
def recording(calls: list):
    """Append a `Call` to `calls` for every op that runs inside the `with` block, forward or backward, also of what was
    called before it."""
    global _recorder
    before, profile = _recorder, sys.getprofile()
    _recorder = _Recorder(calls)
    sys.setprofile(_recorder.returned)
    _watch(_recorder.node)
    try:
        yield calls
    finally:
        _watch(before and before.node)
        sys.setprofile(profile)
        _recorder = before


class _Recorder:
    """The calls of a recording. A forward call lasts from its choice of a backend until the function that asked
    returns, which Python's profiling hook tells; so what recording costs is paid while recording alone."""

    def __init__(self, calls):
        self.calls, self.open, self.thread = calls, [], threading.get_ident()

    def chosen(self, call, frame):
        self.calls.append(call)
        if threading.get_ident() == self.thread:  # the hook is this thread's
            self.open.append((call, frame, time.perf_counter()))

    def returned(self, frame, event, _):
        if event == "return" and self.open and self.open[-1][1] is frame:
            call, _, start = self.open.pop()
            self._add(call, start)

    def backward(self, op, backend, run, args):
        """Run what no open forward call runs: a kernel of a backward pass."""
        x = next(x for x in args if isinstance(x, torch.Tensor))
        name = op.name.removesuffix("_bwd").removesuffix("_fwd")
        call = Call(f"{name} backward", backend, _kernel(backend), tuple(x.shape), _name(x.dtype), "")
        self.calls.append(call)
        start = time.perf_counter()
        found = run(backend, *args)
        self._add(call, start)
        return found

    def node(self, op, dy, seconds, again=False):
        """What a node in C++ did: the backward pass of a call from before the recording; `again` for gradients that
        can be differentiated, which PyTorch makes."""
        backend = "reference" if again else "cpu"
        call = Call(f"{op} backward", backend, _kernel(backend), tuple(dy.shape), _name(dy.dtype), "")
        self.calls.append(call)
        self._count(call, seconds)

    def _add(self, call, start):
        synchronize()
        self._count(call, time.perf_counter() - start)

    def _count(self, call, took):
        call.seconds += took
        if self.open and threading.get_ident() == self.thread:  # what is open is this thread's
            self.open[-1][0].seconds -= took


def synchronize():
    """Wait for what a GPU is at."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


@functools.cache
def _warn_once(reason: str):
    warnings.warn(f"fastllm runs on plain PyTorch here: {reason}", stacklevel=4)


def choose(op: str, x: torch.Tensor, unsupported=None, *, optional=False) -> str:
    """The backend for one call of `op` on tensors like `x`.

    `unsupported(backend)` returns the reason why that backend's kernel cannot do this call, or None; None instead of
    a function means that every kernel can. optional=True is for an op that PyTorch does as well as it can be done where
    no kernel of ours is better: then "reference" is a choice, no fallback, and neither FASTLLM_STRICT nor a forced
    backend makes it an error.
    """
    if _forced is None and _recorder is None and x.is_cpu and extension is not None:
        if not _in_functorch() and forward_ad._current_level < 0:  # transformed(), without the time of a call
            if unsupported is None or unsupported("cpu") is None:
                return "cpu"
    return _choose(op, x, unsupported, optional)


def transformed() -> bool:
    """Whether this call is inside of torch.func.grad, vmap, jvp and their like, or of forward-mode differentiation, for
    which no kernel has a rule: without one PyTorch would take the tangent for 0."""
    return _in_functorch() or forward_ad._current_level >= 0


def forced() -> str | None:
    """The backend of the innermost `backend(...)` block."""
    return _forced


def is_free() -> bool:
    """Whether no block forces an implementation or records calls and no compiler traces this one: then a C++ kernel may
    be called before anything is checked, which takes longer than a small kernel does. (What traces without Dynamo has
    a mode, which csrc/direct.cpp sees.)"""
    return not is_dynamo_compiling() and _forced is None and _recorder is None


def direct(op: str):
    """fastllm._autograd.<op> of csrc/direct.cpp: the op's plain call, or None where that has to go the long way, past
    the checks that say what is wrong; always None without the module. Whoever calls it asks `is_free` first."""
    return getattr(sys.modules["fastllm._autograd"], op) if has_nodes else _never


def _never(*_):
    return None


_watch = direct("watch")  # of nodes in C++, for a recording


def _choose(op, x, unsupported, optional=False):
    native = {"cpu": "cpu", "cuda": "triton"}.get(x.device.type, "reference")
    name = _forced or native
    if name == "triton" and not _forced and _measured_faster(op, x):
        if not (_why_not("cuda", x) or lacks(op, "cuda", unsupported)):
            name = "cuda"
    missing = _why_not(name, x)
    reason = missing or lacks(op, name, unsupported) or ""
    if native == "reference" and not _forced:
        reason = f"no kernels for {x.device.type} tensors"
    if not reason and name != "reference" and transformed():
        reason = "torch.func and forward-mode differentiation need plain PyTorch"
    if reason:
        if optional:
            missing = None
        elif _forced:
            raise Unsupported(f"{op}: backend {name!r} was forced, but {reason}")
        elif _strict:
            raise Unsupported(f"{op}: FASTLLM_STRICT is set and there is no kernel for this call: {reason}")
        if missing:  # a whole backend, not an option of one call
            _warn_once(missing)
        name = "reference"
    if _recorder is not None:
        call = Call(op, name, _kernel(name), tuple(x.shape), _name(x.dtype), reason)
        _recorder.chosen(call, _public_frame(op, sys._getframe(2)))
    return name


def _public_frame(op, frame):
    """The frame of the public function `op`, which called `choose` itself or through a helper whose frame is given."""
    outer = frame.f_back
    return outer if outer is not None and outer.f_code.co_name == op else frame


def _kernel(backend):
    if backend == "cpu":
        return f"C++ {extension.selected()}"
    return {"triton": "Triton", "cuda": "CUDA C++"}.get(backend, "PyTorch")


def _name(dtype):
    return str(dtype).removeprefix("torch.")


def _measured_faster(op, x):
    return MEASURED and MEASURED.get((op, torch.cuda.get_device_name(x.device))) == "cuda"


def lacks(op: str, name: str, unsupported=None) -> str | None:
    """Why backend `name`, where it is there, has no kernel for this call of `op`, or None."""
    if name == "cuda" and op not in CUDA_OPS:
        return f"{op} has no CUDA C++ kernel"
    return None if unsupported is None or name == "reference" else unsupported(name)


def _why_not(name: str, x: torch.Tensor) -> str | None:
    if name == "cpu":
        return missing_extension if x.device.type == "cpu" else f"the tensors are on {x.device}"
    if name == "triton":
        if x.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            return f"the tensors are on {x.device} (TRITON_INTERPRET=1 would interpret the kernels)"
        return missing_triton()
    if name == "cuda":
        return missing_cuda() or (None if x.device.type == cuda_device else f"the tensors are on {x.device}")
    return None


def _first(args):
    """The first tensor of an op's arguments, which may stand in a list."""
    return args[0][0] if isinstance(args[0], list) else args[0]


def _current(x):
    """Makes the GPU of `x` the current one: Triton launches there, on its current stream, wherever the tensors are.
    PyTorch does so for its own kernels and for C++ ones, but not for those in Python."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return contextlib.nullcontext()


class Op:
    """One dispatcher op `fastllm::<name>` and the ways to call it."""

    def __init__(self, schema: str, module: str, fake):
        self.name, self.module = schema.partition("(")[0], module
        for namespace in (library, cuda_library):
            namespace.define(schema)
            torch.library.register_fake(f"{namespace.ns}::{self.name}", fake, lib=namespace)
        library.impl(self.name, self.triton, "CUDA")
        self.dispatched = getattr(torch.ops.fastllm, self.name).default
        self.cuda = getattr(torch.ops.fastllm_cuda, self.name).default

    def triton(self, *args):
        launch = getattr(importlib.import_module(f"fastllm.kernels.{self.module}"), self.name)
        with _current(_first(args)):
            return launch(*args)

    def __call__(self, backend: str, *args):
        """Run on `backend`, as `choose` named it; interpreted Triton past the dispatcher, which sees CPU tensors."""
        if _recorder is not None and not _recorder.open:
            return _recorder.backward(self, backend, self._run, args)
        return self._run(backend, *args)

    def _run(self, backend, *args):
        if backend == "cuda":
            return self.cuda(*args)
        if backend == "triton" and not _first(args).is_cuda:
            return self.triton(*args)
        return self.dispatched(*args)


def cpu_op(schema: str, fake):
    """The dispatcher's `fastllm::<op>` that only CPU tensors have, in C++; None where it has not been built.

    What ends in _plain is for calls without options that autograd does not see: half of a small call's time goes into
    arguments that are None and outputs that nobody reads.
    """
    name = schema.partition("(")[0]
    library.define(schema)
    torch.library.register_fake(f"fastllm::{name}", fake, lib=library)
    built = torch._C._dispatch_has_kernel_for_dispatch_key(f"fastllm::{name}", "CPU")
    return getattr(torch.ops.fastllm, name).default if built else None


def differentiable_again(schema: str, gradients):
    """`fastllm::<op>_again(first gradient, ...)`: the gradients of an op's plain call, in PyTorch, so that they can be
    differentiated once more. A node in C++ calls it (csrc/autograd.cpp); None stands for a gradient that nobody needs.
    """
    library.define(schema)
    library.impl(schema.partition("(")[0], gradients, "CompositeImplicitAutograd")


class Composite(Op):
    """An op that is Python over other ops, the same on every device: body(backend, *arguments)."""

    def __init__(self, schema: str, body, fake):
        self.name, self.body = schema.partition("(")[0], body
        library.define(schema)
        torch.library.register_fake(f"fastllm::{self.name}", fake, lib=library)
        for name, key in (("cpu", "CPU"), ("triton", "CUDA")):
            library.impl(self.name, functools.partial(body, name), key)
        self.dispatched = getattr(torch.ops.fastllm, self.name).default

    def triton(self, *args):
        return self.body("triton", *args)

    def cuda(self, *args):
        return self.body("cuda", *args)
