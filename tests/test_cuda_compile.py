"""Every CUDA C++ kernel compiles for sm_80, sm_90a and sm_100a, without a GPU, and keeps the rules.

No register is spilled, rows are loaded 16 bytes at a time, attention uses the matrix units. Registers and instructions
of every kernel are committed in cuda_compile_table.json beside a hash of the source: what has not changed is not
compiled again. What has changed needs nvcc (in PATH, CUDA_HOME, /usr/local/cuda or the wheel nvidia-cuda-nvcc).

    python tests/test_cuda_compile.py --update     compiles what changed and rewrites the table
    python tests/test_cuda_compile.py              compiles what changed and says what differs
"""

import argparse
import concurrent.futures
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TABLE = Path(__file__).with_name("cuda_compile_table.json")
ARCHS = ("80", "90a", "100a")
ABSENT_THREADS = 32  # kAbsentThreads of device.cuh
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))

spec = importlib.util.spec_from_file_location("fastllm_setup", ROOT / "setup.py")
setup = importlib.util.module_from_spec(spec)
spec.loader.exec_module(setup)


def toolkit():
    """The CUDA toolkit's folder, or None and why there is none."""
    try:
        setup.compiler()
        return setup.cuda_folder(), None
    except setup.Unavailable as why:
        return None, str(why)


def with_includes(path: Path) -> list[Path]:
    """The file and every file of csrc/ that it includes."""
    named = re.findall(r'#include "([^"]+)"', path.read_text())
    return [path, *(file for name in named for file in with_includes(ROOT / "csrc" / name))]


def source_hash(path: Path) -> str:
    """Of the code without comments, of the file and what it includes, and of how it is compiled."""
    code = [re.sub(r"//.*", "", file.read_text()) for file in dict.fromkeys(with_includes(path))]
    flags = setup.nvcc_command(Path("cuda")).split(" -std=")[1].split(" -I")[0]
    return hashlib.sha256(repr([" ".join(text.split()) for text in code] + [flags]).encode()).hexdigest()[:16]


def nvcc_release(cuda: Path) -> str:
    text = subprocess.run([cuda / "bin" / "nvcc", "--version"], capture_output=True, text=True).stdout
    return re.search(r"release (\S+),", text)[1]


def disassembler() -> Path | None:
    """nvdisasm of the toolkit, or the one in Triton's wheel."""
    places = [toolkit()[0] / "bin" if toolkit()[0] else None]
    if triton := importlib.util.find_spec("triton"):
        places.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    found = [place / "nvdisasm" for place in places if place and (place / "nvdisasm").exists()]
    return found[0] if found else None


INSTRUCTIONS = {  # what is counted in the machine code
    "mma": r"HMMA",
    "ldmatrix": r"LDSM",
    "copy_async": r"LDGSTS",
    "load_16_bytes": r"LDG\.E\.128",
    "wgmma": r"HGMMA",
    "tile_copy": r"UTMALDG",
    "registers_moved": r"USETMAXREG",
    "cluster_barrier": r"UCGABAR_WAIT",
    "local": r"(?:LDL|STL)\b",
}


def compile_one(path: Path, arch: str, cuda: Path) -> dict:
    """Kernel -> registers, spills and instructions, of one file for one architecture."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        target = f"-gencode arch=compute_{arch},code=sm_{arch} -Xptxas -v -cubin"
        done = subprocess.run(
            [*setup.nvcc_command(cuda).split(), *target.split(), path, "-o", cubin], capture_output=True, text=True
        )
        assert done.returncode == 0, f"{path.name}, sm_{arch}: {done.stderr[-3000:]}"
        assert "warning" not in done.stderr, f"{path.name}, sm_{arch}: {done.stderr[-3000:]}"
        listing = subprocess.run([disassembler(), cubin], capture_output=True, text=True, check=True).stdout
    sections = re.split(r"^\s*\.section\s+\.", listing, flags=re.MULTILINE)[1:]
    sections = {section.partition(",")[0]: section for section in sections}
    pattern = (
        r"Compiling entry function '(\S+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
    )
    rows = {}
    for name, stores, loads, registers in re.findall(pattern, done.stderr, re.DOTALL):
        code, about = sections[f"text.{name}"], sections[f"nv.info.{name}"]
        counts = {what: len(re.findall(rf"\b{text}", code)) for what, text in INSTRUCTIONS.items()}
        counts = {what: n for what, n in counts.items() if n}
        if threads := re.search(r"EIATTR_MAX_THREADS.*?\.word\s+(\w+)", about, re.DOTALL):
            counts["most_threads"] = int(threads[1], 16)  # the driver's maxThreadsPerBlock
        rows[demangled(name)] = {"registers": int(registers), "spilled_bytes": int(stores) + int(loads), **counts}
    return rows


def demangled(name: str) -> str:
    text = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout.strip()
    text = text.split("(anonymous namespace)::", 1)[1]
    return re.sub(r"fastllm::cuda::|\(anonymous namespace\)::|\(.*", "", text)


def broken_rules(kernel: str, row: dict, arch: str):
    if row["spilled_bytes"] or row.get("local"):
        yield f"spills {row['spilled_bytes']} bytes"
    is_empty = arch == "80" and re.match(r"cross_entropy_fwd_kernel<\w+, \d, true", kernel)  # it is for clusters
    if re.search(r"<(float, 4|(bf16|half), 8)", kernel) and not row.get("load_16_bytes") and not is_empty:
        yield "does not load 16 bytes at a time"
    needed = ()
    if kernel.startswith(("attention_fwd_kernel", "attention_bwd_kernel")):
        needed = ("mma", "ldmatrix", "copy_async")
    if kernel.startswith("attention_fwd_hopper") and arch == "90a":  # elsewhere it is empty
        needed = ("wgmma", "tile_copy", "registers_moved")
    if re.match(r"(softmax|cross_entropy|norm)_fwd_kernel<\w+, \d, true", kernel) and arch != "80":
        needed = ("cluster_barrier",)
    for what in needed:
        if not row.get(what):
            yield f"has no {what}"
    # What is_present of device.cuh asks the driver: whether the code that it loaded can do what the kernel is for.
    for name, archs in (("attention_fwd_hopper", ("90a",)), ("has_clusters", ("90a", "100a"))):
        if kernel.startswith(name) and (row["most_threads"] > ABSENT_THREADS) != (arch in archs):
            yield f"launch bounds of {row['most_threads']} threads"


def check(update: bool) -> tuple[str, str]:
    """("ok" | "skip" | "fail", what to say)."""
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    hashes = {path.name: source_hash(path) for path in SOURCES}
    stale = [path for path in SOURCES if table.get(path.name, {}).get("source") != hashes[path.name]]
    cuda, why_not = toolkit()
    if stale and cuda is None:
        return "skip", f"{', '.join(path.name for path in stale)} changed, and {why_not}"
    if stale and disassembler() is None:
        return "skip", "no nvdisasm, neither in the CUDA toolkit nor in Triton's wheel"
    fresh = {name: table[name] for name in hashes if name in table and table[name]["source"] == hashes[name]}
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = {(path.name, arch): pool.submit(compile_one, path, arch, cuda) for path in stale for arch in ARCHS}
        for (name, arch), job in jobs.items():
            fresh.setdefault(name, {"source": hashes[name], "nvcc": nvcc_release(cuda)})[f"sm_{arch}"] = job.result()
    broken = [
        f"{kernel}, sm_{arch}: {rule}"
        for file in fresh.values()
        for arch in ARCHS
        for kernel, row in file[f"sm_{arch}"].items()
        for rule in broken_rules(kernel, row, arch)
    ]
    kernels = sum(len(file[f"sm_{arch}"]) for file in fresh.values() for arch in ARCHS)
    said = [
        f"{kernels} kernels, {len(stale)} of {len(SOURCES)} files compiled now, {len(broken)} broken rules",
        *broken,
    ]
    if update:
        TABLE.write_text(json.dumps(fresh, indent=1, sort_keys=True) + "\n")
    elif fresh != table:
        differs = sorted(name for name in fresh.keys() | table.keys() if fresh.get(name) != table.get(name))
        said += ["The table is stale: run python tests/test_cuda_compile.py --update", *differs]
        return "fail", "\n".join(said)
    return "fail" if broken else "ok", "\n".join(said)


def test_every_kernel_compiles():
    verdict, said = check(update=False)
    if verdict == "skip":
        pytest.skip(said)
    assert verdict == "ok", said


def test_rules_can_be_broken():
    good = {"registers": 40, "spilled_bytes": 0, "load_16_bytes": 2, "mma": 8, "ldmatrix": 8, "copy_async": 8}
    good |= {"wgmma": 8, "tile_copy": 4, "registers_moved": 2, "cluster_barrier": 2, "most_threads": 384}

    def is_broken(kernel, arch, **changes):
        return bool(list(broken_rules(kernel, good | changes, arch)))

    for kernel, arch, fields in (
        ("attention_fwd_kernel<bf16, 64>", "80", ("mma", "ldmatrix", "copy_async")),
        ("attention_fwd_hopper_kernel<bf16, 64, 128>", "90a", ("wgmma", "tile_copy", "registers_moved")),
        ("softmax_fwd_kernel<bf16, 8, true>", "90a", ("load_16_bytes", "cluster_barrier")),
        ("cross_entropy_fwd_kernel<half, 8, true, false>", "100a", ("load_16_bytes", "cluster_barrier")),
    ):
        assert not is_broken(kernel, arch) and is_broken(kernel, arch, spilled_bytes=8)
        for field in fields:
            assert is_broken(kernel, arch, **{field: 0}), field
    empty = dict(wgmma=0, most_threads=ABSENT_THREADS)
    assert not is_broken("attention_fwd_hopper_kernel<bf16, 64, 128>", "80", **empty)
    assert is_broken("attention_fwd_hopper_kernel<bf16, 64, 128>", "80", wgmma=0)
    for arch in ("90a", "100a"):
        assert is_broken("has_clusters_kernel<void>", arch, **empty)
        assert not is_broken("has_clusters_kernel<void>", arch)
    assert not is_broken("has_clusters_kernel<void>", "80", **empty)


@pytest.mark.slow
def test_the_library_builds_and_loads_beside_a_torch_without_cuda(tmp_path):
    """All symbols that it needs are in a CPU-only torch; its ops are there, for CUDA tensors alone."""
    if toolkit()[1]:
        pytest.skip(toolkit()[1])
    from test_install import BUILD, CODE, copy_tree, python

    tree = copy_tree(tmp_path, CODE + BUILD)
    done = python("setup.py", "build_ext", "--inplace", cwd=tree, FASTLLM_CUDA_ARCHS="80", FASTLLM_BUILD_ISAS="scalar")
    assert json.loads((tree / "fastllm/_build_info.json").read_text())["cuda"]["built"], done.stdout + done.stderr
    code = """
import torch, fastllm
from fastllm import dispatch
assert dispatch.missing_cuda() is None
for op in ("layer_norm_fwd", "rms_norm_bwd", "softmax_fwd"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastllm_cuda::{op}", "CUDA"), op
try:
    with fastllm.backend("cuda"):
        fastllm.softmax(torch.ones(3))
except RuntimeError as error:
    print(error)
"""
    done = python("-c", code, cwd=tree)
    assert done.stdout == "softmax: backend 'cuda' was forced, but the tensors are on cpu\n", done.stderr
    done = python("-m", "fastllm", "info", cwd=tree)
    assert "for sm_80" in done.stdout and "cuda      no: PyTorch sees no NVIDIA GPU" in done.stdout, done.stderr


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="rewrite the table")
    verdict, said = check(parser.parse_args().update)
    print(said)
    sys.exit(verdict == "fail")
