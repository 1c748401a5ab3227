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

ROOT = Path(__file__).resolve().parents[1]
TABLE = Path(__file__).with_name("triton_compile_table.json")
SHARED_BYTES = {80: 166912, 90: 232448, 100: 232448}  # of one block, by architecture
# A thread may spill this much, stores and loads: ptxas does it on purpose where one more block then fits on a
# multiprocessor (128 registers in 8 warps). What a loop spills is more.
SPILLED_BYTES = 64
TENSOR_COLUMNS = 512  # of tensor memory, sm_100; a kernel that wants more has been seen to compile to nothing
SAMPLED = (80, 90)
REGISTERS = 65536  # of one multiprocessor


def test_every_launch_compiles():
    # In a process of its own: conftest has put Triton into interpreter mode.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


# What the launchers are called with. Options that change the launch or cost registers stand in one call: if the kernel
# with all of them keeps the rules, so do those with fewer.


def attention_options(kind, H, meta):
    """alibi_slopes, sink, seed and then, from scale to dropout_p, the numbers."""
    slopes = meta(H) if kind in ("alibi", "pairs") else None
    sink = None if kind == "plain" else meta(H)
    seed, dropout_p = (meta(dtype="int64"), 0.1) if kind == "pairs" else (None, 0.0)
    softcap = 0.0 if kind in ("plain", "alibi") else 30.0
    return slopes, sink, seed, 0.1, softcap, 40, 100, 0, dropout_p


def attention_kinds():
    """(dtype, D, kind): in fp32 every kind is launched as "pairs"; fp16 is bf16 with other instruction names."""
    for D in (32, 64, 128, 256):
        yield from (("bfloat16", D, kind) for kind in ("plain", "softcap", "pairs"))
        yield "float32", D, "pairs"
    yield "bfloat16", 128, "alibi"
    yield from (("float16", 128, kind) for kind in ("plain", "pairs"))


def attention_calls(torch, attention):
    for dtype, D, kind in attention_kinds():
        size = D - 8 if kind == "pairs" else D  # a padded head

        def meta(*shape, dtype=dtype):
            return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")

        B, H, Hkv, T, S = 2, 4, 2, 1000, 1040
        q, k, v = meta(B, H, T, size), meta(B, Hkv, S, size), meta(B, Hkv, S, size)
        lse = meta(B, H, T, dtype="float64")
        mask, bias = (meta(B, 1, T, S, dtype="bool"), meta(1, H, T, S)) if kind == "pairs" else (None, None)
        options = mask, bias, *attention_options(kind, H, meta)
        attention.attention_fwd(q, k, v, *options)
        attention.attention_bwd(q, lse, q, k, v, q, lse, *options, True, False)


def attention_sm90_calls(torch, attention_sm90):
    from fastllm.kernels.attention_scores import Window

    for dtype, D in ((torch.bfloat16, 64), (torch.bfloat16, 128), (torch.float16, 128)):
        q, k = (torch.empty(2, H, T, D, dtype=dtype, device="meta") for H, T in ((4, 1000), (2, 1040)))
        lse = torch.empty(2, 4, 1000, dtype=torch.float64, device="meta")
        attention_sm90.forward(q, k, k, q, lse, 0.1, Window(1000, 1040, 40, -1000, 40))


def varlen_calls(torch, varlen):
    for dtype, D, kind in attention_kinds():
        if kind == "plain" or dtype == "float16":
            continue

        def meta(*shape, dtype=dtype):
            return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")

        H, Hkv, T, S = 4, 2, 1000, 1040
        q, k, v, lse = meta(T, H, D), meta(S, Hkv, D), meta(S, Hkv, D), meta(H, T, dtype="float64")
        cu = meta(8, dtype="int32")
        options = cu, cu, *attention_options(kind, H, meta)
        varlen.attention_varlen_fwd(q, k, v, *options)
        varlen.attention_varlen_bwd(q, lse, q, k, v, q, lse, *options)


def kvcache_calls(torch, kvcache):
    """Decoding one and a few positions with 8 heads a key head, and prefilling; pages of 16, and whole caches."""

    def meta(*shape, dtype="bfloat16"):
        return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")

    for dtype, D in [("bfloat16", D) for D in (32, 64, 128, 256)] + [("float32", D) for D in (64, 128, 256)]:
        B, H, Hkv = 4, 32, 4
        lengths, table, angles = (
            meta(B, dtype="int64"),
            meta(B, 512, dtype="int32"),
            meta(8192, D // 2, dtype="float32"),
        )
        pages, whole = meta(2048, Hkv, 16, D, dtype=dtype), meta(B, Hkv, 8192, D, dtype=dtype)
        mask, bias, heads = meta(B, 1, 1, 8192, dtype="bool"), meta(1, H, 1, 8192), meta(H, dtype="float32")
        for T, cache, table_or_none in ((1, pages, table), (1, whole, None), (4, whole, None), (64, pages, table)):
            q, new = meta(B, H, T, D, dtype=dtype), meta(B, Hkv, T, D, dtype=dtype)
            rest = lengths, table_or_none, angles, angles, False
            plain = None, None, None, None, 0.1, 0.0, None, -1, 0
            scored = mask, bias, heads, heads, 0.1, 30.0, None, 100, 0
            kvcache.attention_kvcache_fwd(q, cache, cache, new, new, *rest, *(scored if T > 1 else plain))


def norm_calls(torch, norm):
    for D in (64, 1024, 2048, 4096, 8192, 16384, 32768):
        for dtype in (torch.bfloat16, torch.float32):
            x = torch.empty(4096, D, dtype=dtype, device="meta")
            w = torch.empty(D, dtype=dtype, device="meta")
            row = torch.empty(4096, dtype=torch.float32, device="meta")
            norm.layer_norm_fwd(x, w, w, x, None, 1e-5, 0.0)
            norm.layer_norm_bwd(x, x, x, w, row, row, None, 0.0, True, True)
            norm.rms_norm_fwd(x, w, None, None, 1e-5, 0.0, 0.0)
            norm.rms_norm_bwd(x, None, x, w, row, None, 0.0, 0.0, False)
            if D in (1024, 8192, 32768):
                seed = torch.empty((), dtype=torch.int64, device="meta")
                norm.layer_norm_fwd(x, w, w, x, seed, 1e-5, 0.1)
                norm.layer_norm_bwd(x, x, x, w, row, row, seed, 0.1, True, True)


def softmax_calls(torch, softmax):
    for S in (64, 1024, 2048, 4096, 8192, 16384, 32768):
        for dtype in (torch.bfloat16, torch.float32):
            x = torch.empty(2, 4, 128, S, dtype=dtype, device="meta")
            mask = torch.empty(2, 1, 128, S, dtype=torch.bool, device="meta")
            softmax.softmax_fwd(x, mask, 0.5, True, False)
            softmax.softmax_fwd(x, None, 1.0, False, True)
            softmax.softmax_bwd(x, x, 0.5, False)
            softmax.softmax_bwd(x, x, 1.0, True)


def cross_entropy_calls(torch, cross_entropy):
    for V in (64, 1024, 4096, 32768, 262144):
        for dtype in (torch.bfloat16, torch.float32):
            x = torch.empty(128, V, dtype=dtype, device="meta")
            target = torch.empty(128, dtype=torch.int64, device="meta")
            lse, total = (torch.empty(n, dtype=torch.float64, device="meta") for n in (128, 2))
            weight, dloss = (torch.empty(shape, dtype=torch.float32, device="meta") for shape in (V, ()))
            for given, *numbers in ((None, 0.0, 0.0, 0.0), (weight, 0.1, 30.0, 1e-4)):
                cross_entropy.cross_entropy_fwd(x, target, given, -100, 1, *numbers, given is not None)
                cross_entropy.cross_entropy_bwd(dloss, x, target, given, lse, -100, 1, *numbers)
                cross_entropy.cross_entropy_rows(x, target, given, total, dloss, -100, *numbers, False)


def activation_calls(torch, activation):
    for D in (128, 3072):
        for dtype in (torch.bfloat16, torch.float32) if D == 3072 else (torch.bfloat16,):
            x = torch.empty(64, 2 * D, dtype=dtype, device="meta")
            half, b = x[:, :D], torch.empty(D, dtype=dtype, device="meta")
            dense = half.contiguous()
            activation.swiglu_fwd(x, None)
            activation.swiglu_bwd(dense, x, None)
            for tanh in (False, True):
                activation.geglu_fwd(dense, dense, tanh)
                activation.geglu_bwd(dense, dense, dense, tanh)
                for bias in (None, b):
                    activation.bias_gelu_fwd(dense, bias, tanh)
                    activation.bias_gelu_bwd(dense, dense, bias, tanh)


def rope_calls(torch, rope):
    for D, R in ((64, 64), (128, 128), (80, 32)):
        for dtype in (torch.bfloat16, torch.float32):
            q = torch.empty(2, 1000, 4, D, dtype=dtype, device="meta").transpose(1, 2)
            pairs = torch.empty(2048, R // 2, dtype=torch.float32, device="meta")
            lengths = torch.empty(2, dtype=torch.int64, device="meta")
            rope.rope_fwd(q, None, pairs, pairs, None, None, 0, False, False, False)
            rope.rope_fwd(q, None, pairs, pairs, lengths, None, 0, True, False, True)
            if R == D:
                elements = torch.empty(2, 1000, D, dtype=dtype, device="meta")
                rope.rope_fwd(q, q, elements, elements, None, None, 0, False, True, False)


def adamw_calls(torch, adamw):
    for dtype in (torch.bfloat16, torch.float32):
        p = torch.empty(1000, dtype=dtype, device="meta")
        moment = torch.empty(1000, device="meta")
        for top in ([], [moment]):
            step = torch.ones(())
            adamw.adamw_step([p], [p], [moment], [moment], top, [step], 1e-3, 0.9, 0.999, 1e-8, 0.01, False)


def merge_attention_calls(torch, merge_attention):
    for dtype in (torch.bfloat16, torch.float32):
        for D, parts in ((64, 2), (128, 2), (128, 8), (256, 2)):
            outs = [torch.empty(2, 4, 1000, D, dtype=dtype, device="meta")] * parts
            lses = [torch.empty(2, 4, 1000, device="meta")] * parts
            merge_attention.merge_attention_fwd(outs, lses)
            merge_attention.merge_attention_bwd(outs[0], lses[0], outs, lses)


def weight_only_calls(torch, weight_only):
    """Decoding one sequence and some, in 8 bits (symmetric) and in 4 (with offsets); unpacking for many rows."""
    N, K, group = 4096, 4096, 64
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.empty(64, K, dtype=dtype, device="meta")
        bias = torch.empty(N, dtype=dtype, device="meta")
        for bits, groups, scale_dtype in ((8, 1, torch.float32), (4, K // group, torch.bfloat16)):
            codes = torch.empty(N // 16, K * bits // 32, 16, dtype=torch.int32, device="meta")
            scales = torch.empty(N // 16, groups, 16, dtype=scale_dtype, device="meta")
            packed = codes, scales, scales if bits == 4 else None
            for M in (1, 32, 64):
                weight_only.quantized_linear_fwd(x[:M], *packed, bias, N, bits, K // groups)
            weight_only.dequantize_fwd(*packed, x, 0, N, N, K, bits, K // groups)
        other = torch.float16 if dtype == torch.bfloat16 else torch.bfloat16
        for M in (1, 64):
            weight_only.weight_only_linear_fwd(x[:M], torch.empty(N, K, dtype=other, device="meta"), bias)


def linear_calls(torch, linear):
    for dtype in (torch.bfloat16, torch.float32):
        x, w = (torch.empty(4096, 1024, dtype=dtype, device="meta") for _ in "xw")
        bias, y = torch.empty(4096, dtype=dtype, device="meta"), torch.empty(4096, 4096, dtype=dtype, device="meta")
        for activation in range(4):
            linear.linear_act_fwd(x, w, bias, activation, True)
            linear.bias_act_fwd(y, None, activation)
            linear.bias_act_bwd(y, y, None, activation, True)
        linear.linear_act_fwd(x, w.T.contiguous().T, None, 1, False)


CALLS = {
    "attention": attention_calls,
    "attention_sm90": attention_sm90_calls,
    "varlen": varlen_calls,
    "kvcache": kvcache_calls,
    "norm": norm_calls,
    "softmax": softmax_calls,
    "cross_entropy": cross_entropy_calls,
    "activation": activation_calls,
    "rope": rope_calls,
    "adamw": adamw_calls,
    "merge_attention": merge_attention_calls,
    "weight_only": weight_only_calls,
    "linear": linear_calls,
}


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
        for name, calls in CALLS.items():
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
    absent = [name.removesuffix("_ptr") for name, value in flat.items() if value is None]
    absent = [name for name in absent if name not in ("mask_strides", "packing", "pages")]
    words = [kernel.__name__, dtype] + ["packed"] * (bound.get("packing") is not None)
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
    return (90,) if "_sm90" in name else tuple(SHARED_BYTES)


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
    if "_sm90" in name and not row.get("tma"):
        yield "has no TMA"
    # wgmma wants 64 rows: those of the queries, or of the keys where a kernel holds keys.
    held = re.search(r"BLOCK_N=(\d+)" if "dkdv" in name or "_sm90" in name else r"BLOCK_M=(\d+)", name)
    block = int(held[1]) if products else 0
    if products and arch == 90 and block >= 64 and not row["wgmma"]:
        yield "has no wgmma"


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
    sample = {_launches[name][0].__name__: name for name in fresh}.values()
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
