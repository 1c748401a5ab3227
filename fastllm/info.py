"""`fastllm info`: versions, the machine, which backends are built and why not. The support matrix of the README too."""

import importlib.metadata
import os
import platform
import re
import sys
from pathlib import Path

import torch

import fastllm
import fastllm.optim
from fastllm import dispatch
from fastllm.ops import _tuned

GPU_STATE = (
    "the GPU kernels are compile-checked and tested on a CPU (Triton's in its interpreter, CUDA C++ in an emulator); "
    "they are not yet measured on hardware"
)


# Backend -> its column in the support matrix, and what runs where it has no kernel.
COLUMNS = {
    "cpu": ("CPU (C++)", "plain PyTorch"),
    "triton": ("NVIDIA GPU (Triton)", "plain PyTorch"),
    "cuda": ("NVIDIA GPU (CUDA C++)", "-"),
}


def collect() -> dict:
    """Everything that a bug report or a benchmark must say about this machine, as plain values."""
    extension, build = dispatch.extension, dispatch.build_info()
    return {
        "versions": {
            "fastllm": fastllm.__version__,
            "torch": torch.__version__,
            "triton": _version("triton"),
            "python": platform.python_version(),
            "platform": platform.platform(),
        },
        "cpu": {
            "model": cpu_model(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "instruction_set": extension.selected() if extension else None,
            "available": list(extension.available()) if extension else [],
            "torch_instruction_set": torch.backends.cpu.get_cpu_capability(),
        },
        "gpu": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "linear": _linear(),
        "autograd": f"in Python: {dispatch.missing_nodes}" if dispatch.missing_nodes else "in C++ for plain calls",
        "backends": {name: _state(why) for name, why in _missing().items()},
        "build": build,
        "environment": {name: os.environ[name] for name in ("FASTLLM_CPU", "FASTLLM_STRICT") if name in os.environ},
        "note": GPU_STATE,
    }


def _missing() -> dict:
    """Backend -> why it cannot run, or None."""
    no_gpu = None if torch.cuda.is_available() else "PyTorch sees no NVIDIA GPU"
    return {
        "reference": None,
        "cpu": dispatch.missing_extension,
        "triton": dispatch.missing_triton() or no_gpu,
        "cuda": dispatch.missing_cuda() or no_gpu,
    }


def _linear() -> str:
    """Who multiplies matrices here, dtype by dtype."""
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    return "; ".join(f"{short} {_linear_in(dtype)}" for short, dtype in dtypes.items()) + f" ({_tuned.key()})"


def _linear_in(dtype):
    entry = _tuned.entry_of(_tuned.key())
    if _tuned.linear_entry(dtype) in _tuned.TABLE.get(entry, {}):
        points = _tuned.points(entry, dtype)
        won = sum(any(_tuned.linear_kernels(*size, dtype)) for size in points)
        where = "" if entry == _tuned.key() else f" (on {entry})"
        return f"ours in {won} of {len(points)} measured sizes{where}"
    if dtype == torch.float32:
        return "PyTorch's, as nobody has measured"
    return "ours, as oneDNN has none here" if _tuned.unmeasured(dtype) else "PyTorch's"


def _state(why):
    return {"ready": why is None, "why_not": why}


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_model() -> str:
    """What the CPU calls itself."""
    try:
        if found := re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return found[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def lines(found: dict) -> str:
    """`collect()` for people."""
    cpu, build, versions = found["cpu"], found["build"], found["versions"]
    has = ", ".join(cpu["available"]) or "none: the C++ kernels are not built"
    text = [f"{name:<12}{version or 'not installed'}" for name, version in versions.items()]
    text += [
        f"{'cpu':<12}{cpu['model']}, {cpu['cores']} cores, {cpu['threads']} threads",
        f"{'kernels':<12}{cpu['instruction_set'] or 'plain PyTorch'} (available: {has}; FASTLLM_CPU chooses)",
        f"{'linear':<12}{found['linear']}",
        f"{'autograd':<12}{found['autograd']}",
        f"{'gpu':<12}{', '.join(found['gpu']) or 'none'}",
        f"{'built with':<12}{build.get('compiler', '-')}",
        f"{'nvcc':<12}{_nvcc(build.get('cuda', {}))}",
        "backends",
    ]
    for name, state in found["backends"].items():
        text.append(f"  {name:<10}{'ready' if state['ready'] else 'no: ' + state['why_not']}")
    return "\n".join([*text, found["note"]])


def _nvcc(cuda: dict) -> str:
    if not cuda.get("built"):
        return "not used"
    return f"{cuda['nvcc'].split(', ')[-1]} for {', '.join(cuda['architectures'])}"


class _Asked(Exception):
    """Stops an op once it has said what it needs."""


def kernels_for(function, *args, **options) -> dict:
    """Backend -> why its kernel cannot do this call, or None; the op is asked, nothing runs."""
    found, choose = {}, dispatch._choose

    def ask(op, x, unsupported, optional=False):
        found.update({name: dispatch.lacks(op, name, unsupported) for name in COLUMNS})
        raise _Asked

    dispatch._choose = ask
    try:
        # So that no call takes the short way round _choose, or leaves to PyTorch what PyTorch does faster here.
        with dispatch.recording([]), dispatch.backend("cpu"):
            function(*args, **options)
    except _Asked:
        return found
    finally:
        dispatch._choose = choose
    raise RuntimeError(f"{function.__name__} chose no backend")


def _adamw_step(p):
    p = torch.nn.Parameter(p)
    p.grad = torch.zeros_like(p)
    fastllm.optim.AdamW([p]).step()
    return p.detach()


_adamw_step.__name__ = "optim.AdamW"  # what the matrix calls it


def _options(dtype):
    """Op -> option -> (inputs, keywords): the rows of the support matrix."""
    q, x = torch.zeros(1, 2, 4, 8, dtype=dtype), torch.zeros(4, 8, dtype=dtype)
    one, w = torch.zeros(1, 1, 4, 8, dtype=dtype), x[0]
    kept, classes = torch.ones(4, 4, dtype=torch.bool), torch.zeros(4, dtype=torch.int64)
    angles = torch.zeros(4, 4)
    return {
        fastllm.attention: {
            "plain, scale": ((q, q, q), {"scale": 1.0}),
            "causal": ((q, q, q), {"causal": True}),
            "q_offset": ((q, q, q), {"causal": True, "q_offset": 0}),
            "window": ((q, q, q), {"window": (2, 0)}),
            "fewer key heads (GQA, MQA)": ((q, one, one), {}),
            "v of another size": ((q, q, q[..., :4]), {}),
            "mask (boolean)": ((q, q, q), {"mask": kept}),
            "return_lse": ((q, q, q), {"return_lse": True}),
            "softcap": ((q, q, q), {"softcap": 30.0}),
            "bias": ((q, q, q), {"bias": q[..., :4]}),
            "alibi_slopes": ((q, q, q), {"alibi_slopes": w[:2]}),
            "sink": ((q, q, q), {"sink": w[:2]}),
            "dropout_p": ((q, q, q), {"dropout_p": 0.1}),
        },
        fastllm.attention_varlen: {
            "packed batches, with attention's options but mask and bias": (
                (q[0], q[0], q[0]),
                {"cu_seqlens_q": torch.tensor([0, 2]), "cu_seqlens_k": torch.tensor([0, 2])},
            )
        },
        fastllm.attention_with_kvcache: {
            "contiguous cache": ((q, q, q), {"cache_seqlens": 1}),
            "pages, append, rotary, with attention's options but dropout": (
                (q, q, q.clone(), one[:, :, :1].expand(1, 2, 1, 8), one[:, :, :1].expand(1, 2, 1, 8)),
                {"cache_seqlens": 1, "block_table": torch.zeros(1, 1, dtype=torch.int32)},
            ),
        },
        fastllm.merge_attention: {"parts of the keys": (([q, q], [q[..., 0], q[..., 0]]), {})},
        fastllm.linear: {"bias": ((x, x, w[:4]), {}), "activation": ((x, x, w[:4]), {"activation": "gelu"})},
        fastllm.layer_norm: {
            "weight, bias": ((x, w, w), {}),
            "residual": ((x, w, w), {"residual": x}),
            "dropout_p": ((x, w, w), {"residual": x, "dropout_p": 0.1}),
        },
        fastllm.rms_norm: {
            "weight": ((x, w), {}),
            "residual": ((x, w), {"residual": x}),
            "weight_offset": ((x, w), {"weight_offset": 1.0}),
            "dropout_p": ((x, w), {"residual": x, "dropout_p": 0.1}),
        },
        fastllm.softmax: {
            "scale, any dim": ((x,), {"scale": 0.5}),
            "mask (boolean)": ((x,), {"mask": kept[:, :1]}),
            "causal": ((x,), {"causal": True}),
        },
        fastllm.swiglu: {"gate, up": ((x, x), {}), "packed": ((x,), {})},
        fastllm.geglu: {
            "tanh": ((x, x), {}),
            "exact": ((x, x), {"approximate": "none"}),
            "packed": ((x,), {}),
        },
        fastllm.bias_gelu: {"tanh": ((x, w), {}), "exact": ((x, w), {"approximate": "none"})},
        fastllm.rope: {
            "q, k, halves": ((q, q, angles, angles), {}),
            "interleaved": ((q, None, angles, angles), {"interleaved": True}),
            "part of a head": ((q, None, angles[:, :2], angles[:, :2]), {}),
            "a number for each element, for each batch entry": ((q, None, q[:, 0], q[:, 0]), {}),
            "offset": ((q, None, angles, angles), {"offset": torch.tensor([0])}),
            "packed batches": ((q[0], None, angles, angles), {"cu_seqlens": torch.tensor([0, 2])}),
        },
        fastllm.log_softmax: {"scale, mask, causal": ((x,), {"causal": True})},
        fastllm.weight_only_linear: {
            "int8 (scale per row or group)": ((x, fastllm.quantize_weight(torch.ones(4, 8))), {}),
            "int4 (scale, offset per group)": ((x, fastllm.quantize_weight(torch.ones(4, 8), 4)), {}),
            "bf16, fp16, fp32 weight": ((x, torch.zeros(4, 8, dtype=torch.bfloat16)), {}),
        },
        fastllm.cross_entropy: {
            "ignore_index, reduction, any layout": ((x, classes), {"reduction": "none"}),
            "weight": ((x, classes, torch.ones_like(w)), {}),
            "label_smoothing": ((x, classes), {"label_smoothing": 0.1}),
            "softcap": ((x, classes), {"softcap": 30.0}),
            "z_loss": ((x, classes), {"z_loss": 1e-4}),
            "return_token_accuracy": ((x, classes), {"return_token_accuracy": True}),
            "targets that are probabilities": ((x, x), {}),
        },
        fastllm.linear_cross_entropy: {
            "linear_bias, with cross_entropy's options": ((x, x, classes), {"linear_bias": w[:4]}),
            "targets that are probabilities": ((x, x, x[:, :4]), {}),
        },
        _adamw_step: {"amsgrad, maximize; moments in fp32": ((x,), {})},
    }


def matrix() -> str:
    """The support matrix as Markdown, asked from the ops: who has a kernel, forward and backward, for which dtypes."""
    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
    asked = {
        short: {
            (f.__name__, option): kernels_for(f, *args, **keywords)
            for f, options in _options(dtype).items()
            for option, (args, keywords) in options.items()
        }
        for short, dtype in kinds.items()
    }
    out = ["| op | option | " + " | ".join(title for title, _ in COLUMNS.values()) + " |", "|---" * 5 + "|"]
    for key in asked["fp32"]:
        cells = []
        for name, (_, otherwise) in COLUMNS.items():
            have = [short for short in kinds if asked[short][key][name] is None]
            cells.append(" ".join(have) or otherwise)
        out.append(f"| `{key[0]}` | {key[1]} | " + " | ".join(cells) + " |")
    return "\n".join(out)


def add_arguments(subparsers):
    parser = subparsers.add_parser(
        "info", help="versions, CPU instruction set, GPU, which backends are built and why not"
    )
    parser.add_argument("--json", action="store_true", help="the same for programs")
    parser.add_argument("--matrix", action="store_true", help="print the support matrix instead")
    parser.set_defaults(run=main)


def main(args) -> int:
    import json

    if args.matrix:
        print(matrix())
    else:
        found = collect()
        print(json.dumps(found, indent=1) if args.json else lines(found))
    return 0


if __name__ == "__main__":
    from fastllm.cli import main as command

    sys.exit(command(["info", *sys.argv[1:]]))
