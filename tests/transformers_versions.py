"""The tests of Hugging Face models beside several versions of transformers: python tests/transformers_versions.py 5.17

Each version is installed into a folder of its own, before the environment's own transformers in the path, and runs the
tests; a table says what passed. `make test-transformers` calls it.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
TESTS = "test_hf*.py", "test_patch*.py", "test_generation.py", "test_hub.py"
COUNTS = "passed", "skipped", "failed", "error"


def install(version: str, folder: Path):
    """transformers `version` (5.19: its last patch release) in `folder`, if it is not there yet, and beside it what it
    asks for and the environment has in a version that does not fit."""
    if (folder / "transformers").exists():
        return
    wanted = f"transformers=={version}.*" if version.count(".") == 1 else f"transformers=={version}"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    pip += ["--target", str(folder)]
    subprocess.run([*pip, wanted], check=True)
    (own,) = metadata.distributions(name="transformers", path=[str(folder)])
    others = [need for need in map(Requirement, own.requires or ()) if not need.marker or need.marker.evaluate()]
    here = {found.name: found.version for found in metadata.distributions()}
    misfits = [str(need) for need in others if not need.specifier.contains(here.get(need.name, "0"), True)]
    if misfits:
        subprocess.run([*pip, *misfits], check=True)


def run(folder: Path, files: list, options: list) -> tuple[str, dict, str]:
    """(the version that was imported, number of tests by result, pytest's output)."""
    path = os.pathsep.join(filter(None, [str(folder), str(ROOT), os.environ.get("PYTHONPATH")]))
    given = {"env": os.environ | {"PYTHONPATH": path}, "cwd": ROOT, "text": True, "capture_output": True}
    version = subprocess.run([sys.executable, "-c", "import transformers as t; print(t.__version__)"], **given)
    done = subprocess.run([sys.executable, "-m", "pytest", *options, *map(str, files)], **given)
    last = re.findall(r"^.*\b(?:passed|failed|errors?)\b.*$", done.stdout, re.MULTILINE)[-1:] or [""]
    found = {name: int((re.findall(rf"(\d+) {name}", last[0]) or [0])[0]) for name in COUNTS}
    found["error"] += done.returncode not in (0, 1)  # pytest itself did not come to an end
    return version.stdout.strip() or "does not import", found, done.stdout + done.stderr


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("versions", nargs="+", metavar="VERSION", help="5.19 is the last 5.19.*")
    parser.add_argument("--folder", type=Path, default=ROOT / "build/transformers", help="where they are installed")
    parser.add_argument("--tests", nargs="+", default=TESTS, help="patterns in tests/")
    parser.add_argument("--pytest", default="-n 2 -m 'not slow'", help="options of pytest")
    given = parser.parse_args()
    files = sorted({file for pattern in given.tests for file in (ROOT / "tests").glob(pattern)})
    broken = 0
    print(f"| transformers | {' | '.join(COUNTS)} |\n|---|{'---|' * len(COUNTS)}", flush=True)
    for wanted in given.versions:
        folder = given.folder.resolve() / wanted
        install(wanted, folder)
        version, found, output = run(folder, files, shlex.split(given.pytest))
        print(f"| {version} | {' | '.join(str(found[name]) for name in COUNTS)} |", flush=True)
        if found["failed"] or found["error"]:
            broken += 1
            (folder / "pytest.txt").write_text(output)
            print(f"{wanted} does not pass: {folder / 'pytest.txt'}", file=sys.stderr)
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
