"""Builds fastllm._C: one translation unit per instruction set, through ninja, against the libtorch stable ABI.

Where torch has CUDA and nvcc is there, also fastllm/_cuda.so, the CUDA C++ kernels: a library apart, so that a torch
without CUDA never loads it. FASTLLM_CUDA_ARCHS="80 90a 100a" chooses its architectures, and wants it beside any torch.
And fastllm._autograd, small calls and their nodes, which only the torch and the Python that are there now can load.
What cannot be built is left out and the reason is kept in fastllm/_build_info.json, which `fastllm info` prints:
a machine without torch (pip's build isolation) or without a compiler still gets the pure Python package.
"""

import importlib.util
import json
import os
import platform
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
X86 = platform.machine().lower() in ("x86_64", "amd64")

# Every instruction set is a file with flags of its own; nothing else is compiled with them (csrc/cpu/isa.h says why).
AVX512 = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c -mprefer-vector-width=512"
ISA_FLAGS = {
    "scalar": "",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": AVX512,
    "avx512_bf16": AVX512 + " -mavx512bf16 -mavx512vnni",
}

# FASTLLM_EMULATE: the AVX-512 files on a CPU that lacks it, for `make avx512`, which tests what they compute.
# Without the pass that GCC 12 dies of (scalar replacement of aggregates).
EMULATED = f"{ISA_FLAGS['avx2']} -O1 -fno-tree-sra -DFASTLLM_SPARE -Wno-psabi"
EMULATED += f" -include {ROOT / 'tests/avx512_emulator.h'}"
EMULATED_FLAGS = {"avx512": EMULATED, "avx512_bf16": f"{EMULATED} -DFASTLLM_EMULATE_BF16"}

# Whose kernels an instruction set is needed for: it has those that they would only compile again (kernels.inl).
COMPLETES = {"avx2": ("avx512", "avx512_bf16"), "avx512": ("avx512_bf16",)}

# sm_90a adds clusters, wgmma and TMA; what is newer than both runs the PTX of the first.
CUDA_ARCHS = os.environ.get("FASTLLM_CUDA_ARCHS", "")
DEFAULT_CUDA_ARCHS = "80 90a"

# csrc/cpu/<op>.inl: each instruction set's file once per op
OPS = [
    "norm",
    "softmax",
    "cross_entropy",
    "activation",
    "rope",
    "adamw",
    "attention",
    "attention_bwd",
    "attention_decode",
    "attention_decode_bwd",
    "weight_only",
    "linear",
    "generation",
    "peak",
]


class Unavailable(Exception):
    """The extension cannot be built here; the text says why."""


def torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise Unavailable(
            "torch was not there when fastllm was built: use `pip install --no-build-isolation .` "
            "in an environment that has torch, setuptools, pybind11 and ninja"
        )
    return Path(spec.origin).parent


def compiler() -> str:
    for name in filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")):
        if path := shutil.which(name.split()[0]):
            return path
    raise Unavailable("no C++ compiler was found when fastllm was built (CXX, c++, g++, clang++)")


def cuda_folder() -> Path:
    """The CUDA toolkit: an installed one, or the wheels nvidia-cuda-nvcc, -crt, -runtime and nvidia-nvvm."""
    places = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    if nvcc := shutil.which("nvcc"):
        places.insert(0, Path(nvcc).resolve().parents[1])
    if wheels := importlib.util.find_spec("nvidia"):
        places += [path for place in wheels.submodule_search_locations for path in sorted(Path(place).glob("cu*"))]
    for place in filter(None, places):
        if (Path(place) / "bin" / "nvcc").exists():
            return Path(place)
    raise Unavailable(
        "nvcc was not found when fastllm was built (in PATH, CUDA_HOME, /usr/local/cuda or the wheel nvidia-cuda-nvcc)"
    )


def has_isa_flags(cxx: str) -> bool:
    """Whether this is a GCC or Clang for x86-64 that knows every flag above."""
    probe = [cxx, *ISA_FLAGS["avx512_bf16"].split(), "-x", "c++", "-fsyntax-only", os.devnull]
    return X86 and os.name == "posix" and subprocess.run(probe, capture_output=True).returncode == 0


def objects(isas: list[str], emulate: bool) -> dict[str, tuple[str, str]]:
    """Object file -> source and the flags of its own."""
    isa_flags = ISA_FLAGS | EMULATED_FLAGS if emulate else ISA_FLAGS
    files = ["csrc/ops.cpp", *sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc/cpu").glob("*bindings.cpp"))]
    plain = {f"{Path(name).stem}.o": (name, "") for name in files}
    plain["dispatch.o"] = ("csrc/cpu/dispatch.cpp", EMULATED if emulate else "")
    return plain | {
        f"{op}_{isa}.o": (f"csrc/cpu/{isa}.cpp", f"{isa_flags[isa]} -DFASTLLM_OP={op}") for op in OPS for isa in isas
    }


def write_ninja(folder: Path, sanitize: str, emulate: bool) -> dict:
    torch, cxx = torch_folder(), compiler()
    import pybind11

    isas = list(ISA_FLAGS) if has_isa_flags(cxx) else ["scalar"]
    if wanted := os.environ.get("FASTLLM_BUILD_ISAS"):  # fewer, for a quick build while a kernel is written
        isas = [isa for isa in isas if {isa, *COMPLETES.get(isa, ())} & set(wanted.split(","))]
    # pybind11 before torch, whose copy of it (2.11) is not for the stable ABI.
    includes = [ROOT / "csrc", pybind11.get_include(), torch / "include", sysconfig.get_paths()["include"]]
    optimise = "-O1" if sanitize else "-O3"  # checks between vectorised, unrolled loops take GCC minutes a file
    # Where nothing but tests runs it: a third of the time (softmax 47 s -> 7).
    spare = {} if sanitize or len(isas) == 1 else {"scalar": " -O2 -DFASTLLM_SPARE"}
    flags = f"-std=c++17 {optimise} -DNDEBUG -fPIC -fvisibility=hidden -Wall"
    flags += " -Wno-unknown-pragmas -Wno-uninitialized -Wno-maybe-uninitialized"  # GCC 12's own intrinsics
    flags += (
        " -DTORCH_TARGET_VERSION=0x020b000000000000 -DFASTLLM_ISAS='" + ",".join(f"TABLES({isa})" for isa in isas) + "'"
    )
    link = "-shared" if sys.platform != "darwin" else "-bundle -undefined dynamic_lookup"
    if sanitize:
        flags += f" -g -fno-omit-frame-pointer -fsanitize={sanitize}"
        link += f" -fsanitize={sanitize}"
    lines = [
        f"flags = {flags} " + " ".join(f"-isystem {p}" if p != includes[0] else f"-I{p}" for p in includes),
        "rule cc",
        f"  command = {cxx} -MMD -MF $out.d $flags $own -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {cxx} {link} $in -o $out -L{torch / 'lib'} -ltorch_cpu -ltorch -lc10",
    ]
    built = objects(isas, emulate)
    for name, (source, own) in built.items():
        lines += [f"build {name}: cc {ROOT / source}", f"  own = {own}{spare.get(Path(source).stem, '')}"]
    lines += [f"build _C.so: link {' '.join(built)}", ""]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text("\n".join(lines))
    version = subprocess.run([cxx, "--version"], capture_output=True, text=True).stdout.splitlines()[0]
    return {"extension": True, "compiler": version, "instruction_sets": isas, "sanitize": sanitize}


def nvcc_command(cuda: Path) -> str:
    """Up to the architectures and the file; the host compiler is the one that everything else is compiled with."""
    flags = "-std=c++17 -O3 -DNDEBUG -Xcompiler -fPIC,-fvisibility=hidden"
    return f"{cuda / 'bin' / 'nvcc'} -ccbin {compiler()} {flags} -I{ROOT / 'csrc'}"


def write_cuda_ninja(folder: Path) -> dict:
    torch, cuda, archs = torch_folder(), cuda_folder(), (CUDA_ARCHS or DEFAULT_CUDA_ARCHS).replace(",", " ").split()
    targets = [f"-gencode arch=compute_{arch},code=sm_{arch}" for arch in archs]
    targets.append(f"-gencode arch=compute_{archs[0]},code=compute_{archs[0]}")
    nvcc = f"{nvcc_command(cuda)} {' '.join(targets)}"
    flags = "-std=c++17 -O2 -DNDEBUG -fPIC -fvisibility=hidden -Wall -DTORCH_TARGET_VERSION=0x020b000000000000"
    flags += f" -I{ROOT / 'csrc'} -isystem {torch / 'include'}"
    lines = [
        "rule nvcc",
        f"  command = {nvcc} -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule cc",
        f"  command = {compiler()} {flags} -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",  # the CUDA runtime is linked in: whichever torch brings, or none, the library loads
        f"  command = {nvcc} -shared $in -o $out -L{cuda / 'lib'} -L{torch / 'lib'} -ltorch_cpu -lc10",
    ]
    sources = {path: "nvcc" for path in sorted((ROOT / "csrc/cuda").glob("*.cu"))}
    sources |= {path: "cc" for path in sorted((ROOT / "csrc/cuda").glob("*.cpp"))}
    lines += [f"build {path.stem}.o: {rule} {path}" for path, rule in sources.items()]
    lines += [f"build _cuda.so: link {' '.join(f'{path.stem}.o' for path in sources)}", ""]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text("\n".join(lines))
    version = subprocess.run([cuda / "bin" / "nvcc", "--version"], capture_output=True, text=True).stdout
    return {"built": True, "nvcc": version.strip().splitlines()[-2], "architectures": [f"sm_{arch}" for arch in archs]}


def write_autograd_ninja(folder: Path) -> dict:
    torch = torch_folder()
    flags = "-std=c++20 -O2 -DNDEBUG -fPIC -fvisibility=hidden -Wall"
    includes = f"-I{ROOT / 'csrc'}"
    for path in (torch / "include", torch / "include/torch/csrc/api/include", sysconfig.get_paths()["include"]):
        includes += f" -isystem {path}"
    libraries = "-ltorch_python -ltorch_cpu -ltorch -lc10"
    link = "-shared" if sys.platform != "darwin" else "-bundle -undefined dynamic_lookup"
    lines = [
        "rule cc",
        f"  command = {compiler()} -MMD -MF $out.d {flags} {includes} -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {compiler()} {link} $in -o $out -L{torch / 'lib'} {libraries}",
        *(f"build {name}.o: cc {ROOT / 'csrc' / name}.cpp" for name in ("autograd", "direct", "products")),
        "build _autograd.so: link autograd.o direct.o products.o",
        "",
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text("\n".join(lines))
    return {"built": True, "torch": runpy.run_path(torch / "version.py")["__version__"]}


def run_ninja(folder: Path, what: str):
    ninja = shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))
    command = [ninja] if ninja else [sys.executable, "-m", "ninja"]
    done = subprocess.run([*command, "-C", str(folder)], text=True, stdout=subprocess.PIPE)
    if done.returncode:
        print(done.stdout)
        raise Unavailable(f"compiling {what} failed:\n{done.stdout[-1500:]}")


def install(built: Path, target: Path):
    fresh = target.with_suffix(".new")  # a process may have the old file mapped: replace it, never write into it
    shutil.copy2(built, fresh)
    fresh.replace(target)


class BuildExtension(build_ext):
    def run(self):
        target = Path(self.get_ext_fullpath("fastllm._C")).resolve()
        info = self.build_cpu(target)
        info["cuda"] = self.build_cuda(target.with_name("_cuda.so"))
        info["autograd"] = self.build_autograd(target.with_name("_autograd.so"))
        (target.parent / "_build_info.json").write_text(json.dumps(info, indent=1) + "\n")

    def build_cpu(self, target: Path) -> dict:
        sanitize, emulate = os.environ.get("FASTLLM_SANITIZE", ""), bool(os.environ.get("FASTLLM_EMULATE"))
        name = "-".join(filter(None, ["ninja", sys.implementation.cache_tag, sanitize, "emulated" * emulate]))
        folder = ROOT / "build" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            info = write_ninja(folder, sanitize, emulate)
            run_ninja(folder, "the C++ extension")
            install(folder / "_C.so", target)
            return info
        except (Unavailable, ImportError) as problem:
            target.unlink(missing_ok=True)  # an older binary would hide the failure
            print(f"fastllm: built without the C++ kernels: {problem}", file=sys.stderr)
            if os.environ.get("FASTLLM_REQUIRE_EXTENSION"):
                raise SystemExit(1) from None
            return {"extension": False, "reason": str(problem)}

    def build_cuda(self, target: Path) -> dict:
        folder = ROOT / "build" / "ninja-cuda"
        try:
            if not CUDA_ARCHS and not list((torch_folder() / "lib").glob("*torch_cuda.*")):
                reason = "built where torch had no CUDA (FASTLLM_CUDA_ARCHS builds them anyway)"
                return {"built": False, "reason": reason}
            info = write_cuda_ninja(folder)
            run_ninja(folder, "the CUDA C++ kernels")
            install(folder / "_cuda.so", target)
            return info
        except Unavailable as problem:
            target.unlink(missing_ok=True)
            print(f"fastllm: built without the CUDA C++ kernels: {problem}", file=sys.stderr)
            if CUDA_ARCHS and os.environ.get("FASTLLM_REQUIRE_EXTENSION"):
                raise SystemExit(1) from None
            return {"built": False, "reason": str(problem)}

    def build_autograd(self, target: Path) -> dict:
        folder = ROOT / "build" / f"ninja-autograd-{sys.implementation.cache_tag}"
        try:
            info = write_autograd_ninja(folder)
            run_ninja(folder, "the autograd nodes")
            install(folder / "_autograd.so", target)
            return info
        except (Unavailable, OSError) as problem:  # another torch's headers: the Functions in Python do the same
            target.unlink(missing_ok=True)
            print(f"fastllm: built without autograd nodes: {problem}", file=sys.stderr)
            if os.environ.get("FASTLLM_REQUIRE_EXTENSION"):
                raise SystemExit(1) from None
            return {"built": False, "reason": str(problem)}


if __name__ == "__main__":  # the compile test reads from here how nvcc is called
    setup(
        packages=[
            "fastllm",
            "fastllm.bench",
            "fastllm.bench.cases",
            "fastllm.bench.gpu",
            "fastllm.compat",
            "fastllm.kernels",
            "fastllm.llm",
            "fastllm.llm.presets",
            "fastllm.llm.tasks",
            "fastllm.nn",
            "fastllm.ops",
        ],
        package_data={
            "fastllm": ["_build_info.json"],
            "fastllm.ops": ["*.json"],
            "fastllm.llm": ["*.html"],
            "fastllm.llm.presets": ["*.toml"],
            "fastllm.bench": ["*.html"],
        },
        ext_modules=[Extension("fastllm._C", sources=[])],
        cmdclass={"build_ext": BuildExtension},
    )
