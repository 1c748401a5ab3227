"""What a user's installation looks like: without the extension, with a broken one, from a wheel, without torch."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CODE = ("fastllm", "kernels", "bench")
BUILD = ("csrc", "setup.py", "pyproject.toml", "README.md", "LICENSE")


def copy_tree(target: Path, names) -> Path:
    """A copy of the sources without anything that was built; links stay links."""
    for name in names:
        source = ROOT / name
        if source.is_dir():
            left_out = shutil.ignore_patterns("_C.*", "_cuda.*", "_autograd.*", "_build_info.json", "__pycache__")
            shutil.copytree(source, target / name, symlinks=True, ignore=left_out)
        else:
            shutil.copy(source, target / name)
    return target


def python(*arguments, cwd, path=None, **environment):
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("FASTLLM_")}
    environment = {**inherited, "PYTHONPATH": str(path or cwd), "PYTHONWARNINGS": "default", **environment}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=cwd, env=environment)


USE = """
import torch, fastllm
from fastllm import dispatch
x = torch.randn(3, 8, requires_grad=True)
for _ in range(2):
    fastllm.rms_norm(x).sum().backward()
assert dispatch.extension is None
print(fastllm.__file__, dispatch.missing_extension)
"""


def test_import_works_without_the_extension(tmp_path):
    copy_tree(tmp_path, CODE)
    done = python("-c", USE, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path)) and "has not been built" in done.stdout
    assert done.stderr.count("fastllm runs on plain PyTorch here: the C++ extension has not been built") == 1


def test_the_reason_for_a_missing_extension_is_kept(tmp_path):
    copy_tree(tmp_path, CODE)
    (tmp_path / "fastllm/_build_info.json").write_text(json.dumps({"extension": False, "reason": "no compiler then"}))
    done = python("-m", "fastllm", "info", cwd=tmp_path)
    assert "cpu       no: no compiler then" in done.stdout, done.stderr


def test_a_broken_binary_is_an_error_that_says_why(tmp_path):
    copy_tree(tmp_path, CODE)
    (tmp_path / "fastllm" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(b"not a library")
    done = python("-c", "import fastllm", cwd=tmp_path)
    assert done.returncode == 1
    assert "ImportError: fastllm: the C++ extension exists but does not load" in done.stderr
    assert "--no-build-isolation" in done.stderr


def test_the_folder_kernels_shadows_nobody(tmp_path):
    """Hugging Face has a package of this name, and transformers imports it."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/__init__.py").write_text("THEIRS = True\n")
    code = f"import sys; sys.path[:0] = [{str(ROOT)!r}]; import fastllm, kernels; print(kernels.THEIRS)"
    done = python("-c", code, cwd=ROOT, path=tmp_path)
    assert done.stdout == "True\n", done.stderr


def build(tmp_path, *arguments, **environment):
    """setup.py on a copy of the sources, where no compiler can be found."""
    tools = tmp_path / "tools"
    tools.mkdir(exist_ok=True)
    tree = tmp_path / "tree"
    if not tree.exists():
        tree.mkdir()
        copy_tree(tree, CODE + BUILD)
    return tree, python("setup.py", *arguments, cwd=tree, path=tools, **{"PATH": str(tools), "CXX": "", **environment})


def test_build_without_a_compiler_goes_on_and_says_so(tmp_path):
    tree, done = build(tmp_path, "build_ext", "--inplace")
    assert done.returncode == 0, done.stderr
    assert "built without the C++ kernels: no C++ compiler was found" in done.stderr
    assert "no C++ compiler" in json.loads((tree / "fastllm/_build_info.json").read_text())["reason"]


def test_build_without_a_compiler_fails_where_the_extension_is_required(tmp_path):
    _, done = build(tmp_path, "build_ext", "--inplace", FASTLLM_REQUIRE_EXTENSION="1")
    assert done.returncode == 1 and "no C++ compiler" in done.stderr


def test_build_without_torch_names_the_command(tmp_path):
    """As under pip's build isolation."""
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools/sitecustomize.py").write_text("import sys; sys.modules['torch'] = None\n")
    tree, done = build(tmp_path, "build_ext", "--inplace", PATH=os.environ["PATH"])
    assert done.returncode == 0, done.stderr
    reason = json.loads((tree / "fastllm/_build_info.json").read_text())["reason"]
    assert "torch was not there" in reason and "pip install --no-build-isolation ." in reason


def test_a_failed_build_removes_the_older_binary(tmp_path):
    tree, _ = build(tmp_path, "--version")
    old = tree / "fastllm" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    old.write_bytes(b"an older binary would hide the failure")
    _, done = build(tmp_path, "build_ext", "--inplace")
    assert done.returncode == 0 and not old.exists()


@pytest.mark.slow
def test_wheel_has_all_and_runs(tmp_path):
    tree, done = build(tmp_path, "bdist_wheel", "--dist-dir", str(tmp_path / "dist"))
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "dist").glob("fastllm_kernels-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("kernels", "bench"):
        expected = {f"fastllm/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / folder).rglob("*.py")}
        assert expected and expected <= names
    expected = {
        path.relative_to(ROOT).as_posix() for path in (ROOT / "fastllm").rglob("*.py") if "bench" not in path.parts
    }
    assert expected <= names and "fastllm/_build_info.json" in names
    assert not [name for name in names if name.split("/")[0] in ("kernels", "bench", "tests", "csrc")]

    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    (tmp_path / "empty").mkdir()
    done = python("-c", USE, cwd=tmp_path / "empty", path=site)
    assert done.returncode == 0 and done.stdout.startswith(str(site)), done.stderr
    done = python("-m", "fastllm", "verify", "softmax", "--dtype", "float32", cwd=tmp_path / "empty", path=site)
    assert done.returncode == 0 and "plain PyTorch" in done.stdout, done.stderr


@pytest.mark.slow
def test_pip_installs_into_an_environment_that_has_torch(tmp_path):
    """The documented command, with the compiler that is there; torch is not replaced, and the kernels run."""
    tree = tmp_path / "tree"
    tree.mkdir()
    copy_tree(tree, CODE + BUILD)
    site = tmp_path / "site"
    command = [
        "-m",
        "pip",
        "install",
        "--no-build-isolation",
        "--no-deps",
        "--no-index",
        "--target",
        str(site),
        str(tree),
    ]
    done = python(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not (site / "torch").exists()
    done = python("-m", "fastllm", "info", "--json", cwd=tmp_path, path=site)
    found = json.loads(done.stdout)
    if shutil.which("c++"):
        assert found["backends"]["cpu"]["ready"], found["build"]
    assert found["build"]["extension"] == found["backends"]["cpu"]["ready"]


def test_a_source_distribution_has_the_kernels(tmp_path):
    """What pip builds where there is no wheel: without csrc it would install, and everything run on plain PyTorch."""
    done = python("setup.py", "-q", "egg_info", "-e", str(tmp_path), "sdist", "-d", str(tmp_path), cwd=ROOT)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*") if p.is_file()}
    assert len(wanted) > 50 and wanted <= packed
