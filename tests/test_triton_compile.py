"""Every Triton kernel that a launcher can choose compiles for sm_80, sm_90, sm_100, without a GPU, and keeps the rules.

No loop spills registers, shared and tensor memory fit the chip, 16-bit attention uses the matrix units. The launchers
themselves run, on meta tensors, so that what is compiled is what would be launched. Registers and memory of each launch
are committed in triton_compile_table.json beside a hash of its source: what has not changed is not compiled again, but
for one launch of every kernel, for sm_80 and sm_90, which shows that the table holds.

    python tests/test_triton_compile.py --update     compiles what changed and rewrites the table, row by row
    python tests/test_triton_compile.py              compiles what changed and says what differs
"""

import argparse
import ast
import contextlib
import hashlib
import importlib
import io
import json
import multiprocessing
import os
import re
import subprocess
import sys
from pathlib import Path

from triton_edges import edge_calls
from triton_launches import CALLS

ROOT = Path(__file__).resolve().parents[1]
TABLE = Path(__file__).with_name("triton_compile_table.json")
SHARED_BYTES = {80: 166912, 90: 232448, 100: 232448}  # of one block, by architecture
# A thread may spill this much, stores and loads: ptxas does it on purpose where one more block then fits on a
# multiprocessor (128 registers in 8 warps). What a loop spills is more.
SPILLED_BYTES = 64
TENSOR_COLUMNS = 512  # of tensor memory, sm_100; a kernel that wants more has been seen to compile to nothing
SAMPLED = (80, 90)
TILED = " tiled "  # in the names of launches that read by TMA
EDGE = "edge: "  # begins the names of what triton_edges.py launches
REGISTERS = 65536  # of one multiprocessor


def test_every_launch_compiles():
    # In a process of its own: conftest has put Triton into interpreter mode.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


def recorded_launches():
    """{name: (kernel, arguments, grid)} of every launch that CALLS make; none is compiled or run."""
    import torch
    from triton.runtime.jit import JITFunction

    launches, prefix = {}, ""

    def record(kernel, grid):
        def launch(*args, **kwargs):
            launches[prefix + describe(kernel, args, kwargs)] = kernel, args, kwargs, grid

        return launch

    before, JITFunction.__getitem__ = JITFunction.__getitem__, record
    try:
        for name, calls in CALLS.items():
            calls(torch, importlib.import_module(f"fastllm.kernels.{name}"))
        prefix = EDGE
        edge_calls(torch)
    finally:
        JITFunction.__getitem__ = before
    return launches


def describe(kernel, args, kwargs):
    """A launch in words: kernel, dtype, the options that are on, the constants."""
    import torch
    from triton.tools.tensor_descriptor import TensorDescriptor

    bound = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    constants = {p.name for p in kernel.params if p.is_constexpr} | {"num_warps", "num_stages"}
    flat = {}
    for name, value in bound.items():
        fields = value._asdict() if hasattr(value, "_asdict") and name == "scoring" else {name: value}
        flat |= fields
    tensors = {name: getattr(value, "ptr", value) for name, value in flat.items()}
    dtype = next(str(x.dtype).removeprefix("torch.") for x in tensors.values() if isinstance(x, torch.Tensor))
    absent = [name.removesuffix("_ptr") for name, value in flat.items() if value is None]
    absent = [name for name in absent if name not in ("mask_strides", "packing", "pages")]
    words = [kernel.__name__, dtype] + ["packed"] * (bound.get("packing") is not None)
    words += ["tiled"] * isinstance(bound.get("q"), TensorDescriptor)
    words += ["paged"] * (bound.get("pages") is not None)
    words += [f"{k}={int(v)}" for k, v in bound.items() if k in constants]
    return " ".join(words + (["without", ",".join(absent)] if absent else []))


def source_hash(kernel):
    """Of the code, without comments and docstrings, of a kernel and the functions it calls, and of Triton's version."""
    import triton
    from triton.runtime.jit import JITFunction

    seen, waiting = {}, [kernel]
    while waiting:
        function = waiting.pop()
        tree = ast.parse(function.src)
        if isinstance(tree.body[0].body[0], ast.Expr) and len(tree.body[0].body) > 1:
            del tree.body[0].body[0]
        seen[function.__name__] = ast.dump(tree)
        named = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        for name in sorted(named & function.fn.__globals__.keys() - seen.keys()):
            value = function.fn.__globals__[name]
            if isinstance(value, JITFunction):
                waiting.append(value)
            elif isinstance(value, triton.language.constexpr):
                seen[name] = repr(value)
    return hashlib.sha256(repr((triton.__version__, sorted(seen.items()))).encode()).hexdigest()[:16]


def architectures(name):
    """For which a launch is compiled."""
    if TILED in name:
        return (90, 100)  # before them nothing fetches tiles
    return (90,) if "_sm90" in name or name.startswith(EDGE) else tuple(SHARED_BYTES)


def compile_one(job):
    """Registers, spills, shared memory and matrix instructions of one launch on one architecture."""
    from triton import knobs
    from triton.runtime import driver

    name, arch = job
    kernel, args, kwargs, grid = _launches[name]
    knobs.nvidia.dump_ptxas_log = knobs.compilation.always_compile = True
    driver.set_active(no_gpu(arch))
    log = io.StringIO()
    try:
        with contextlib.redirect_stdout(log):
            compiled = kernel.warmup(*args, grid=grid, **kwargs)
    except Exception as error:  # reported as a broken rule, with the launch's name
        return name, arch, {"error": f"{type(error).__name__}: {error}"[-500:]}
    kernel.device_caches.clear()

    def number(pattern):
        return int(re.search(pattern, log.getvalue())[1])

    ptx = compiled.asm["ptx"]
    tma = ptx.count("cp.async.bulk.tensor")
    return name, arch, ({"tma": tma} if tma else {}) | {
        "registers": number(r"Used (\d+) registers"),
        "spilled_bytes": number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
        "shared_bytes": compiled.metadata.shared,
        "warps": compiled.metadata.num_warps,
        "tensor_columns": compiled.metadata.tmem_size or 0,
        "mma": ptx.count("mma.sync"),
        "wgmma": ptx.count("wgmma.mma_async"),
        "tcgen05": ptx.count("tcgen05.mma"),
    }  # fmt: skip


def no_gpu(arch):
    """A driver that stands in for CUDA's, so that the ordinary launch path compiles for `arch` and stops there."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase

    class NoGPU(DriverBase):
        def __init__(self):
            pass

        is_active = classmethod(lambda cls: True)
        map_python_to_cpp_type = staticmethod(lambda ty: ty)

        def get_current_target(self):
            return GPUTarget("cuda", arch, 32)

        def get_current_device(self):
            return arch  # Triton keeps one cache per device

        def get_current_stream(self, device):
            return 0

        def get_active_torch_device(self):
            raise RuntimeError("no GPU")

        def get_benchmarker(self):
            raise RuntimeError("no GPU")

    return NoGPU()


def broken_rules(name, arch, row):
    if "error" in row:
        yield row["error"]
        return
    if row["spilled_bytes"] > SPILLED_BYTES:
        yield f"spills {row['spilled_bytes']} bytes"
    if row["shared_bytes"] > SHARED_BYTES[arch]:
        yield f"takes {row['shared_bytes']} bytes of shared memory, sm_{arch} has {SHARED_BYTES[arch]}"
    if row["tensor_columns"] > TENSOR_COLUMNS:
        yield f"takes {row['tensor_columns']} columns of tensor memory of {TENSOR_COLUMNS}"
    if row["registers"] * row["warps"] * 32 > REGISTERS:
        yield f"takes {row['registers']} registers in {row['warps']} warps"
    products = re.match("_attention_(fwd|bwd_d[kq])|_kvcache_attend|_(quantized|narrow)_linear|_linear_act", name)
    products = products and " float32 " not in name
    if products and not row["mma"] + row["wgmma"] + row["tcgen05"]:
        yield "has no matrix instructions"
    if ("_sm90" in name or TILED in name) and not row.get("tma"):
        yield "has no TMA"
    # wgmma wants 64 rows: those of the queries, or of the keys where a kernel holds keys.
    held = re.search(r"BLOCK_N=(\d+)" if "dkdv" in name or "_sm90" in name else r"BLOCK_M=(\d+)", name)
    block = int(held[1]) if products else 0
    if products and arch == 90 and block >= 64 and not row["wgmma"]:
        yield "has no wgmma"


def threads_registers(rows):
    """Of a block, on sm_90: how large a launch is; 0 where it has not been compiled."""
    row = rows.get("sm_90", {})
    return row.get("registers", 0) * row.get("warps", 0)


def main(update):
    global _launches
    _launches = recorded_launches()  # inherited by the forked workers: kernels cannot be pickled
    hashes = {name: source_hash(launch[0]) for name, launch in _launches.items()}
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    fresh = {name: {"source": hashes[name]} for name in sorted(_launches)}
    for name in fresh.keys() & table.keys():
        if table[name].get("source") == hashes[name]:
            fresh[name] = dict(table[name])
    jobs = [(name, arch) for name in fresh for arch in architectures(name) if f"sm_{arch}" not in fresh[name]]
    # Of each kernel the launch that compiles fastest: fp32 products take ten times as long as those on matrix units.
    small = sorted(fresh, key=lambda name: (" float32 " in name, threads_registers(fresh[name]), name), reverse=True)
    sample = {_launches[name][0].__name__: name for name in small if not name.startswith(EDGE)}.values()
    sampled = [
        (name, arch) for name in sample for arch in SAMPLED if arch in architectures(name) and (name, arch) not in jobs
    ]
    with multiprocessing.get_context("fork").Pool(min(2, os.cpu_count())) as pool:
        for name, arch, row in pool.imap_unordered(compile_one, jobs + sampled):
            fresh[name][f"sm_{arch}"] = row
            if update:  # an update that is interrupted goes on where it stopped
                TABLE.write_text(json.dumps(fresh, indent=1, sort_keys=True) + "\n")
    broken = [
        f"{name}, sm_{arch}: {rule}"
        for name in fresh
        for arch in architectures(name)
        for rule in broken_rules(name, arch, fresh[name][f"sm_{arch}"])
    ]
    counts = f"{len(jobs)} of them and a sample of {len(sampled)} compiled now, {len(broken)} broken rules"
    print(f"{len(fresh)} launches, {counts}", *broken, sep="\n")
    if fresh != table and not update:
        stale = sorted(name for name in fresh.keys() | table.keys() if fresh.get(name) != table.get(name))
        print("The table is stale: run python tests/test_triton_compile.py --update", *stale, sep="\n")
        return 1
    if update:
        TABLE.write_text(json.dumps(fresh, indent=1, sort_keys=True) + "\n")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="rewrite the table")
    sys.exit(main(parser.parse_args().update))
