"""Builds fastllm._C: one translation unit per instruction set, through ninja, against the libtorch stable ABI.

What cannot be built is left out and the reason is kept in fastllm/_build_info.json, which `fastllm info` prints:
a machine without torch (pip's build isolation) or without a compiler still gets the pure Python package.
"""

import importlib.util
import json
import os
import platform
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
    "avx512_bf16": AVX512 + " -mavx512bf16",
}

OPS = ["norm", "softmax", "attention", "attention_bwd"]  # csrc/cpu/<op>.inl: each instruction set's file once per op


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


def has_isa_flags(cxx: str) -> bool:
    """Whether this is a GCC or Clang for x86-64 that knows every flag above."""
    probe = [cxx, *ISA_FLAGS["avx512_bf16"].split(), "-x", "c++", "-fsyntax-only", os.devnull]
    return X86 and os.name == "posix" and subprocess.run(probe, capture_output=True).returncode == 0


def objects(isas: list[str]) -> dict[str, tuple[str, str]]:
    """Object file -> source and the flags of its own."""
    files = ["csrc/ops.cpp", *sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc/cpu").glob("*bindings.cpp"))]
    plain = {f"{Path(name).stem}.o": (name, "") for name in [*files, "csrc/cpu/dispatch.cpp"]}
    return plain | {
        f"{op}_{isa}.o": (f"csrc/cpu/{isa}.cpp", f"{ISA_FLAGS[isa]} -DFASTLLM_OP={op}") for op in OPS for isa in isas
    }


def write_ninja(folder: Path, sanitize: str) -> dict:
    torch, cxx = torch_folder(), compiler()
    import pybind11

    isas = list(ISA_FLAGS) if has_isa_flags(cxx) else ["scalar"]
    if wanted := os.environ.get("FASTLLM_BUILD_ISAS"):  # fewer, for a quick build while a kernel is written
        isas = [isa for isa in isas if isa in wanted.split(",")]
    includes = [ROOT / "csrc", torch / "include", pybind11.get_include(), sysconfig.get_paths()["include"]]
    flags = "-std=c++17 -O3 -DNDEBUG -fPIC -fvisibility=hidden -Wall"
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
    built = objects(isas)
    for name, (source, own) in built.items():
        lines += [f"build {name}: cc {ROOT / source}", f"  own = {own}"]
    lines += [f"build _C.so: link {' '.join(built)}", ""]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text("\n".join(lines))
    version = subprocess.run([cxx, "--version"], capture_output=True, text=True).stdout.splitlines()[0]
    return {"extension": True, "compiler": version, "instruction_sets": isas, "sanitize": sanitize}


class BuildExtension(build_ext):
    def run(self):
        target = Path(self.get_ext_fullpath("fastllm._C")).resolve()
        sanitize = os.environ.get("FASTLLM_SANITIZE", "")
        folder = ROOT / "build" / f"ninja-{sys.implementation.cache_tag}{'-' + sanitize if sanitize else ''}"
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            info = write_ninja(folder, sanitize)
            ninja = shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))
            command = [ninja] if ninja else [sys.executable, "-m", "ninja"]
            done = subprocess.run([*command, "-C", str(folder)], text=True, stdout=subprocess.PIPE)
            if done.returncode:
                print(done.stdout)
                raise Unavailable("compiling the C++ extension failed:\n" + done.stdout[-1500:])
            fresh = target.with_suffix(
                ".new"
            )  # a process may have the old file mapped: replace it, never write into it
            shutil.copy2(folder / "_C.so", fresh)
            fresh.replace(target)
        except (Unavailable, ImportError) as problem:
            info = {"extension": False, "reason": str(problem)}
            target.unlink(missing_ok=True)  # an older binary would hide the failure
            print(f"fastllm: built without the C++ kernels: {problem}", file=sys.stderr)
            if os.environ.get("FASTLLM_REQUIRE_EXTENSION"):
                raise SystemExit(1) from None
        (target.parent / "_build_info.json").write_text(json.dumps(info, indent=1) + "\n")


setup(
    packages=["fastllm", "fastllm.ops", "fastllm.llm", "fastllm.kernels", "fastllm.bench"],
    package_data={"fastllm": ["_build_info.json"], "fastllm.llm": ["*.html"], "fastllm.bench": ["*.html"]},
    ext_modules=[Extension("fastllm._C", sources=[])],
    cmdclass={"build_ext": BuildExtension},
)
