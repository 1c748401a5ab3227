"""The direction of imports and of includes, as data (the arrows point at what may be used)."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

OPS = {"dispatch", "explain", "ops", "reference"}
PUBLIC = {"attention", "bias_gelu", "geglu", "layer_norm", "log_softmax", "rms_norm", "rope", "softmax", "swiglu"}
MODELS = OPS | PUBLIC | {"nn", "model", "backend", "tune_allocator"}
MODELS |= {"cross_entropy", "linear", "linear_cross_entropy", "lora_linear"}
TOP = MODELS | {"accelerate", "bench", "cli", "compat", "generation", "hf", "info", "kernels", "llm", "text", "verify"}
TOP |= {"drawing", "__version__", "beam", "decoder", "naive", "optim", "patch", "sampling", "session"}
MAY_IMPORT = {  # file or folder -> the parts of fastllm it may name
    "kernels": {"<relative import>"},  # of one another, so that they work in another project too
    "fastllm/reference.py": set(),
    "fastllm/allocator.py": set(),
    "fastllm/drawing.py": set(),
    "fastllm/text.py": set(),
    "fastllm/dispatch.py": {"_C", "kernels"},
    "fastllm/explain.py": {"dispatch", "text"},
    "fastllm/ops": {"dispatch", "ops", "reference"},
    "fastllm/nn": OPS | {"nn"},
    "fastllm/compat": OPS | {"compat"},
    "fastllm/optim.py": OPS,
    "fastllm/swap.py": set(),
    "fastllm/trial.py": set(),
    "fastllm/mlp.py": OPS | {"swap", "trial"},
    "fastllm/matchers.py": OPS | {"compat", "mlp", "nn", "swap", "trial"},
    "fastllm/patch.py": {"hf", "hf_encoder", "matchers", "swap"},
    "fastllm/hf.py": OPS | {"hf_loss", "hf_rope", "patch", "swap"},
    "fastllm/hf_rope.py": OPS | {"matchers", "swap", "trial"},
    "fastllm/encoder.py": OPS | {"addresses", "decoder", "swap", "trial"},
    "fastllm/hf_encoder.py": {"compat", "encoder", "hf", "matchers", "patch", "swap", "trial"},
    "fastllm/hf_loss.py": OPS | {"matchers", "swap"},
    "fastllm/decoder.py": OPS,
    "fastllm/addresses.py": OPS,
    "fastllm/session.py": OPS | {"addresses", "decoder"},
    "fastllm/sampling.py": set(),
    "fastllm/beam.py": {"sampling"},
    "fastllm/generation.py": OPS | {"beam", "decoder", "sampling", "session"},
    "fastllm/naive.py": {"nn"},
    "fastllm/model.py": MODELS | {"naive", "sampling"},
    "fastllm/hub.py": OPS,
    "fastllm/__init__.py": {"allocator", "compat", "dispatch", "explain", "generation", "nn", "ops", "patch"},
    "fastllm/__main__.py": {"cli"},
    "fastllm/cli.py": {"bench", "info", "llm", "tune_allocator", "verify"},
    "fastllm/info.py": TOP,
    "fastllm/verify.py": TOP,
    "fastllm/llm": TOP,
    "bench": TOP,
}
TORCH_IN = re.compile(r'#include\s*[<"](torch|ATen|c10|pybind11|Python\.h)')


def owner(path: Path) -> str | None:
    name = path.relative_to(ROOT).as_posix()
    return next((part for part in MAY_IMPORT if name == part or name.startswith(part + "/")), None)


def named_parts(path: Path) -> set[str]:
    """The first parts of fastllm that a file imports, wherever in the file it does."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [node.module] if node.module != "fastllm" else [f"fastllm.{a.name}" for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            names = ["fastllm.<relative import>"]
        found |= {name.split(".")[1] for name in names if name.startswith("fastllm.")}
    return found


FILES = sorted(path for folder in ("kernels", "fastllm", "bench") for path in (ROOT / folder).rglob("*.py"))
FILES = [
    path
    for path in FILES
    if not {"fastllm/kernels", "fastllm/bench"} & {p.as_posix() for p in path.relative_to(ROOT).parents}
]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_go_down(path):
    part = owner(path)
    assert part, f"{path.relative_to(ROOT)} stands in no layer: say in MAY_IMPORT what it may use"
    extra = named_parts(path) - MAY_IMPORT[part]
    assert not extra, f"{path.relative_to(ROOT)} may not use {', '.join(sorted(extra))}"


def test_every_layer_is_checked():
    """The list of files is not empty by accident."""
    assert {"kernels/attention.py", "fastllm/ops/attention.py", "bench/cases/norm.py"} <= {
        path.relative_to(ROOT).as_posix() for path in FILES
    }


def test_kernels_and_bench_are_reached_through_the_package():
    for name in ("kernels", "bench"):
        assert not (ROOT / name / "__init__.py").exists(), f"{name}/__init__.py would take a top-level name"
        assert (ROOT / "fastllm" / name).resolve() == ROOT / name


def test_no_file_imports_kernels_from_the_top():
    """But the one file that is written for Hugging Face's package of this name."""
    for path in {*FILES, *(ROOT / "tests").glob("*.py")} - {ROOT / "fastllm/hub.py"}:
        assert not re.search(r"^\s*(import|from) kernels\b", path.read_text(), re.MULTILINE), path


PER_SET = [f"{name}.cpp" for name in ("scalar", "avx2", "avx512", "avx512_bf16")]  # compiled with that set's flags
KERNELS = [
    path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".inl", ".cu", ".cuh") or path.name in PER_SET
]


def with_includes(path: Path) -> set[Path]:
    """The file and every file of csrc/ that it includes, directly or not."""
    found, left = set(), [path]
    while left:
        path = left.pop()
        if path not in found:
            found.add(path)
            named = re.findall(r'#include\s*"([^"]+)"', path.read_text())
            places = [folder / name for name in named for folder in (path.parent, ROOT / "csrc")]
            left += [place.resolve() for place in places if place.exists()]
    return found


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_kernel_files_know_no_tensors(path):
    """Only bindings do; so every kernel compiles without PyTorch, and none of its inline code gets a kernel's flags."""
    for used in with_includes(path):
        found = TORCH_IN.search(used.read_text())
        assert not found, f"{used.relative_to(ROOT)} has {found[0]}"


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_kernel_files_use_no_std(path):
    """A shared inline function compiled with AVX-512 flags can replace the baseline copy at link time."""
    for used in with_includes(path):
        code = re.sub(r"//.*|/\*(.|\n)*?\*/", "", used.read_text())
        assert used.suffix == ".cu" or "std::" not in code, f"{used.relative_to(ROOT)} uses std::"
