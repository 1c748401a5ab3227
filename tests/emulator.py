"""The CUDA C++ kernels on a CPU: csrc/cuda built with the C++ compiler and tests/cuda_emulator.h in the place of PTX.

`load()` gives fastllm_cuda::<op> kernels for CPU tensors, so that the tests of an op run on the text of its GPU kernel:
indices, barriers, shared memory, the layout of matrix fragments and the order of sums are what a GPU would execute.
"""

import ctypes
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
HEADER, HOPPER = (ROOT / "tests" / f"cuda_emulator{name}.h" for name in ("", "_hopper"))
# FORTIFY checks that longjmp goes up the stack, which changing to another stack does not.
FLAGS = "-std=c++17 -O2 -fPIC -fvisibility=hidden -Wall -Wno-unknown-pragmas -Wno-unused-function -U_FORTIFY_SOURCE"
DEFINES = "-DTORCH_TARGET_VERSION=0x020b000000000000 -DFASTLLM_EMULATED -DFASTLLM_CUDA_DEVICE=CPU"


def compiler() -> str | None:
    return next(filter(None, map(shutil.which, (os.environ.get("CXX") or "c++", "g++", "clang++"))), None)


def build() -> Path:
    """The library, built where csrc/ or the emulator have changed since."""
    cuda = ROOT / "csrc" / "cuda"
    kernels, bindings = sorted(cuda.glob("*.cu")), sorted(cuda.glob("*.cpp"))
    read = [*kernels, *bindings, *sorted(cuda.glob("*.*h")), ROOT / "csrc" / "cpu" / "float16.inl", HEADER, HOPPER]
    key = hashlib.sha256(repr([FLAGS, DEFINES, torch.__version__, *(p.read_text() for p in read)]).encode())
    folder = ROOT / "build" / f"cuda-emulated-{key.hexdigest()[:16]}"
    library = folder / "libfastllm_cuda_emulated.so"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # processes that share the tests need it at the same time: one builds
        if not library.exists():
            compile_into(library, kernels, bindings)
    return library


def compile_into(library, kernels, bindings):
    """Kernels and bindings, side by side, into one shared library, which is there when it is whole."""
    folder, include = library.parent, Path(torch.__file__).parent
    common = [compiler(), *FLAGS.split(), f"-I{ROOT / 'csrc'}"]
    jobs = [[*common, "-include", HEADER, "-x", "c++", "-c", path, "-o", f"{folder / path.stem}.o"] for path in kernels]
    jobs += [
        [*common, *DEFINES.split(), "-isystem", include / "include", "-c", path, "-o", f"{folder / path.stem}.o"]
        for path in bindings
    ]
    if failed := [p.args[-3] for p in [subprocess.Popen(job) for job in jobs] if p.wait()]:
        raise RuntimeError(f"the emulated CUDA kernels do not compile: {failed}")
    objects = sorted(folder.glob("*.o"))
    fresh = library.with_suffix(".part")
    link = [compiler(), "-shared", *objects, "-o", fresh, f"-L{include / 'lib'}", "-ltorch_cpu", "-lc10"]
    subprocess.run(link, check=True)
    fresh.replace(library)


@functools.cache
def library():
    path = build()
    torch.ops.load_library(path)
    return ctypes.CDLL(str(path))


def load():
    """`emulate(arch)`: from now on the emulated GPU is an sm_80 (without clusters) or an sm_90."""
    return library().fastllm_emulate


def fetched_tiles() -> int:
    """How many tiles Hopper's kernels have fetched so far."""
    tiles = library().fastllm_emulated_tiles
    tiles.restype = ctypes.c_uint64
    return tiles()
