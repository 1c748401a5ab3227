"""Every Triton kernel that a launcher can choose compiles for sm_80 and sm_90, without a GPU, and keeps the rules.

No register is spilled, shared memory fits the chip, 16-bit attention uses the matrix units. The launchers themselves
run, on meta tensors, so that what is compiled is what would be launched. Registers and shared memory of every kernel
are committed in triton_compile_table.json beside a hash of its source: what has not changed is not compiled again.

    python tests/test_triton_compile.py --update     compiles what changed and rewrites the table
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

ROOT = Path(__file__).resolve().parents[1]
TABLE = Path(__file__).with_name("triton_compile_table.json")
SHARED_BYTES = {80: 166912, 90: 232448}  # of one block, by architecture
REGISTERS = 65536  # of one multiprocessor


def test_every_launch_compiles():
    # In a process of its own: conftest has put Triton into interpreter mode.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


# What the launchers are called with. Options that change the launch or cost registers stand in one call: if the kernel
# with all of them keeps the rules, so do those with fewer.


def attention_calls(torch, attention):
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for D in (32, 64, 128, 256):
            if dtype == torch.float16 and D != 128:  # fp16 is bf16 with other instruction names
                continue
            for kind in ("plain", "scored", "pairs"):
                if kind == "plain" and dtype == torch.float32:  # launched as "scored" is, and needs less
                    continue
                size = D - 8 if kind == "pairs" else D  # a padded head

                def meta(*shape, dtype=dtype):
                    return torch.empty(shape, dtype=dtype, device="meta")

                B, H, Hkv, T, S = 2, 4, 2, 1000, 1040
                q, k, v = meta(B, H, T, size), meta(B, Hkv, S, size), meta(B, Hkv, S, size)
                lse, heads = meta(B, H, T, dtype=torch.float64), meta(H, dtype=torch.float32)
                mask = meta(B, 1, T, S, dtype=torch.bool) if kind == "pairs" else None
                bias = meta(1, H, T, S) if kind == "pairs" else None
                slopes, sink = (None, None) if kind == "plain" else (heads, heads)
                options = (mask, bias, slopes, sink, None, 0.1, 0.0 if kind == "plain" else 30.0, 40, 100, 0, 0.0)
                attention.attention_fwd(q, k, v, *options)
                attention.attention_bwd(q, lse, q, k, v, q, lse, *options, True)


def norm_calls(torch, norm):
    for D in (64, 1024, 2048, 4096, 8192, 16384, 32768):
        for dtype in (torch.bfloat16, torch.float32):
            x = torch.empty(4096, D, dtype=dtype, device="meta")
            w = torch.empty(D, dtype=dtype, device="meta")
            row = torch.empty(4096, dtype=torch.float32, device="meta")
            norm.layer_norm_fwd(x, w, w, x, 1e-5)
            norm.layer_norm_bwd(x, x, x, w, row, row, True)
            norm.rms_norm_fwd(x, w, None, 1e-5, 0.0)
            norm.rms_norm_bwd(x, None, x, w, row, 0.0)


def softmax_calls(torch, softmax):
    for S in (64, 1024, 2048, 4096, 8192, 16384, 32768):
        for dtype in (torch.bfloat16, torch.float32):
            x = torch.empty(2, 4, 128, S, dtype=dtype, device="meta")
            mask = torch.empty(2, 1, 128, S, dtype=torch.bool, device="meta")
            softmax.softmax_fwd(x, mask, 0.5, True, False)
            softmax.softmax_fwd(x, None, 1.0, False, True)
            softmax.softmax_bwd(x, x, 0.5, False)
            softmax.softmax_bwd(x, x, 1.0, True)


def recorded_launches():
    """{name: (kernel, arguments, grid)} of every launch that the calls above make; none is compiled or run."""
    import torch
    from triton.runtime.jit import JITFunction

    launches = {}

    def record(kernel, grid):
        def launch(*args, **kwargs):
            launches[describe(kernel, args, kwargs)] = kernel, args, kwargs, grid

        return launch

    before, JITFunction.__getitem__ = JITFunction.__getitem__, record
    try:
        for name, calls in (("attention", attention_calls), ("norm", norm_calls), ("softmax", softmax_calls)):
            calls(torch, importlib.import_module(f"fastllm.kernels.{name}"))
    finally:
        JITFunction.__getitem__ = before
    return launches


def describe(kernel, args, kwargs):
    """A launch in words: kernel, dtype, the options that are on, the constants."""
    import torch

    bound = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    constants = {p.name for p in kernel.params if p.is_constexpr} | {"num_warps", "num_stages"}
    flat = {}
    for name, value in bound.items():
        fields = value._asdict() if hasattr(value, "_asdict") and name == "scoring" else {name: value}
        flat |= fields
    tensors = {name: getattr(value, "ptr", value) for name, value in flat.items()}
    dtype = next(str(x.dtype).removeprefix("torch.") for x in tensors.values() if isinstance(x, torch.Tensor))
    absent = [name.removesuffix("_ptr") for name, value in flat.items() if value is None and name != "mask_strides"]
    words = [kernel.__name__, dtype] + [f"{k}={int(v)}" for k, v in bound.items() if k in constants]
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
    return name, arch, {
        "registers": number(r"Used (\d+) registers"),
        "spilled_bytes": number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
        "shared_bytes": compiled.metadata.shared,
        "warps": compiled.metadata.num_warps,
        "mma": ptx.count("mma.sync"),
        "wgmma": ptx.count("wgmma.mma_async"),
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
    if row["spilled_bytes"]:
        yield f"spills {row['spilled_bytes']} bytes"
    if row["shared_bytes"] > SHARED_BYTES[arch]:
        yield f"takes {row['shared_bytes']} bytes of shared memory, sm_{arch} has {SHARED_BYTES[arch]}"
    if row["registers"] * row["warps"] * 32 > REGISTERS:
        yield f"takes {row['registers']} registers in {row['warps']} warps"
    products = name.startswith("_attention") and "delta" not in name and " float32 " not in name
    if products and not row["mma"] + row["wgmma"]:
        yield "has no matrix instructions"
    # wgmma wants 64 rows: those of the queries, or of the keys where a kernel holds keys.
    block = int(re.search(r"BLOCK_N=(\d+)" if "dkdv" in name else r"BLOCK_M=(\d+)", name)[1]) if products else 0
    if products and arch == 90 and block >= 64 and not row["wgmma"]:
        yield "has no wgmma"


def main(update):
    global _launches
    _launches = recorded_launches()  # inherited by the forked workers: kernels cannot be pickled
    hashes = {name: source_hash(launch[0]) for name, launch in _launches.items()}
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    jobs = [
        (name, arch)
        for name in _launches
        for arch in SHARED_BYTES
        if table.get(name, {}).get("source") != hashes[name] or f"sm_{arch}" not in table[name]
    ]
    fresh = {name: {"source": hashes[name]} for name in sorted(_launches)}
    for name in fresh.keys() & table.keys():
        if table[name].get("source") == hashes[name]:
            fresh[name] = table[name]
    with multiprocessing.get_context("fork").Pool(min(2, os.cpu_count())) as pool:
        for name, arch, row in pool.imap_unordered(compile_one, jobs):
            fresh[name][f"sm_{arch}"] = row
    broken = [
        f"{name}, sm_{arch}: {rule}"
        for name in fresh
        for arch in SHARED_BYTES
        for rule in broken_rules(name, arch, fresh[name][f"sm_{arch}"])
    ]
    print(f"{len(_launches)} launches, {len(jobs)} compiled now, {len(broken)} broken rules", *broken, sep="\n")
    if update:
        TABLE.write_text(json.dumps(fresh, indent=1, sort_keys=True) + "\n")
    elif fresh != table:
        stale = sorted(name for name in fresh.keys() | table.keys() if fresh.get(name) != table.get(name))
        print("The table is stale: run python tests/test_triton_compile.py --update", *stale, sep="\n")
        return 1
    return 1 if broken else 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="rewrite the table")
    sys.exit(main(parser.parse_args().update))
