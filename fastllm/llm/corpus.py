"""A user's own files as documents: read as a stream, cleaned, without repeats, split; what is wrong is written down.

Memory does not grow with the files, but for JSON's, which are read whole: what has been seen is a table of hashes on
the disk, the rest goes line by line.
"""

import csv
import hashlib
import io
import json
import sqlite3
import unicodedata
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from fastllm.llm import spans
from fastllm.llm.prompts import check_messages
from fastllm.llm.sources import SPLITS, one_line, split_of

COLUMNS = {"classification": ("text", "label"), "pairs": ("source", "target"), "chat": ("prompt", "response")}
EXTENSIONS = dict.fromkeys(COLUMNS, "tsv") | {"text": "txt", "conversations": "jsonl", "questions": "jsonl"}
TABLES = COLUMNS | {"questions": ("question", "context", "answer")}  # read from .tsv files
BREAK = "\f"  # a line of its own between the documents of a text file; cleaning leaves none inside of one
LINES, CHARACTERS = 1000, 1 << 20  # that a quoted field may have, before its quote counts as one that never closes
_DROPPED = {c: None for c in (*range(32), *range(127, 160), 0xFEFF) if chr(c) not in "\n\t"}
OTHER_ROWS = (".csv", ".parquet", ".xlsx")  # which nobody means as running text
UNDECODED = "not in the encoding"
ENCODED = "--encoding says which encoding the files are in: latin-1, cp1252, ..."
MARKS = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16", b"PK": "a zip archive", b"\x1f\x8b": "gzip"}


def clean(text: str) -> str:
    """Unicode in composed form (NFC), no control characters but newline and tab, no white space at the ends of lines,
    no more than one blank line."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\x85", "\n")
    lines = [line.rstrip() for line in unicodedata.normalize("NFC", text).translate(_DROPPED).split("\n")]
    kept = [line for n, line in enumerate(lines) if line or (n and lines[n - 1])]
    return "\n".join(kept).strip("\n")


def cleaned_line(text: str) -> str:
    return one_line(clean(text))


def cleaned_text(text: str) -> str:
    return clean(text).strip()


class Seen:
    """A set of texts, upper and lower case and white space alike, on the disk. Each takes a row of 16 bytes."""

    def __init__(self, path):
        self._table = sqlite3.connect(path, isolation_level=None)
        for pragma in ("journal_mode=OFF", "synchronous=OFF", "cache_size=-65536", "locking_mode=EXCLUSIVE"):
            self._table.execute(f"PRAGMA {pragma}")
        self._table.execute("CREATE TABLE seen (hash BLOB PRIMARY KEY) WITHOUT ROWID")
        self._table.execute("CREATE TABLE homes (hash BLOB PRIMARY KEY, split TEXT) WITHOUT ROWID")
        self._table.execute("BEGIN")

    def add(self, *texts: str) -> bool:
        """False where it is there already."""
        return self._table.execute("INSERT OR IGNORE INTO seen VALUES (?)", (self._key(texts),)).rowcount == 1

    def home(self, text: str, split: str) -> str:
        """The split that was given with this text first."""
        key = self._key((text,))
        self._table.execute("INSERT OR IGNORE INTO homes VALUES (?, ?)", (key, split))
        return self._table.execute("SELECT split FROM homes WHERE hash = ?", (key,)).fetchone()[0]

    @staticmethod
    def _key(texts) -> bytes:
        return hashlib.blake2b("\0".join(one_line(text).casefold() for text in texts).encode(), digest_size=16).digest()

    def close(self):
        self._table.close()


@dataclass
class Rejects:
    """Rows that cannot be used: counted by reason, the first ones remembered, all of them written to a file."""

    file: io.TextIOBase
    counts: Counter = field(default_factory=Counter)
    first: list = field(default_factory=list)

    def add(self, path, number: int, reason: str, row: str):
        self.counts[reason] += 1
        if len(self.first) < 5:
            self.first.append(f"{path}:{number} ({reason})")
        row = row.rstrip("\n").replace("\t", "\\t").replace("\n", "\\n")
        self.file.write(f"{path}\t{number}\t{reason}\t{row}\n")


def kind_of(paths, encoding="utf-8") -> str:
    """What all of the files hold. Raises ValueError where they hold what is not of one kind."""
    kinds = {}
    for path in paths:
        kinds.setdefault(kind_of_file(Path(path), encoding), path)
    if len(kinds) > 1:
        (one, first), (other, second) = list(kinds.items())[:2]
        raise ValueError(f"data: {first} is read as {one} and {second} as {other}: give files of one kind, or --kind")
    return next(iter(kinds))


def kind_of_file(path, encoding) -> str:
    """One of `TABLES` by what a .tsv file's first line names, "questions" or "conversations" for .jsonl, else "text".

    A .json file has "questions"; none of the other kinds is kept in one.
    """
    if path.suffix.lower() == ".json":
        return "questions"
    if path.suffix.lower() == ".jsonl":
        with reading(path, encoding) as file:
            first = next((line for line in file if line.strip()), "")
        return "questions" if '"question"' in first and '"context"' in first else "conversations"
    if path.suffix.lower() in OTHER_ROWS:
        raise ValueError(
            f"data: {path}: rows are read from a .tsv file (tabs between the columns); --kind text reads text"
        )
    if path.suffix.lower() not in (".tsv", ".tab"):
        return "text"
    with reading(path, encoding) as file:
        header = header_of(file.readline())
    for kind, columns in TABLES.items():
        if set(columns) <= set(header):
            return kind
    wanted = " or ".join(f"{', '.join(columns[:-1])} and {columns[-1]}" for columns in TABLES.values())
    got = f"got {', '.join(header)}: change that line"
    raise ValueError(f"data: the first line of {path} must name the columns {wanted}, {got}")


def header_of(line: str) -> list[str]:
    return [name.strip().strip('"').lower() for name in line.rstrip("\n").split("\t")]


@contextmanager
def reading(path, encoding="utf-8"):
    """Open a text file; bytes that are not in the encoding become lone surrogates, for `undecoded` to find."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"data: there is no file {path}" if not path.exists() else f"data: {path} is a folder")
    if not path.stat().st_size:
        raise ValueError(f"data: {path} is empty")
    with open(path, "rb") as file:
        start = file.read(4)
    found = next((name for mark, name in MARKS.items() if start.startswith(mark)), None)
    if encoding == "utf-8" or found in ("gzip", "a zip archive"):
        if found:
            cure = "--encoding utf-16 reads it" if found == "utf-16" else "unpack it"
            raise ValueError(f"data: {path} is no UTF-8 text but {found}: {cure}")
        encoding = "utf-8-sig"
    try:
        with open(path, encoding=encoding, errors="surrogateescape", newline="\n") as file:
            yield file
    except LookupError:
        raise ValueError(f"data: there is no encoding {encoding!r}") from None
    except UnicodeError as error:
        raise ValueError(f"data: {path} is not in {encoding}: {error}") from None


def undecoded(text: str) -> bool:
    return not text.isascii() and any(0xDC80 <= ord(c) <= 0xDCFF for c in text)


def records(path, file, columns, rejects: Rejects, tidy=cleaned_line, empty=()):
    """(line number, {column: value}) of a TSV file, whose fields may be quoted as the csv module quotes them.

    All of `columns` are there, and have a value but for those in `empty`. A quote that never closes costs its own line
    only: reading goes on with the next one.
    """
    header = header_of(file.readline())
    if missing := [name for name in columns if name not in header]:
        raise ValueError(f"data: {path} has no column {missing[0]}: its first line names {', '.join(header)}")
    number, waiting = 1, []  # lines that were read ahead for a quote that did not close
    while line := waiting.pop(0) if waiting else file.readline():
        number += 1
        row, used = fields_of(line, waiting, file)
        if line.strip():
            if row is None:
                rejects.add(path, number, "a quote that does not close", line)
            elif undecoded(line) or any(map(undecoded, row)):
                rejects.add(path, number, UNDECODED, line.encode("utf-8", "replace").decode())
            elif len(row) != len(header):
                rejects.add(path, number, f"with another number of columns ({len(row)}, not {len(header)})", line)
            else:
                found = {name: tidy(value) for name, value in zip(header, row, strict=True)}
                if lacking := next((name for name in columns if not found[name] and name not in empty), None):
                    rejects.add(path, number, f"no {lacking}", line)
                else:
                    yield number, found
        number += used


def fields_of(line: str, waiting: list, file):
    """(fields, how many lines behind `line` belong to them), or (None, 0) for a quote that does not close."""
    if '"' not in line:
        return line.rstrip("\r\n").split("\t"), 0
    text, used = line, 0
    while True:
        try:
            (row,) = csv.reader([text], delimiter="\t", strict=True)
            del waiting[:used]
            return row, used
        except csv.Error as error:
            if "unexpected end" not in str(error) or used == LINES or len(text) > CHARACTERS:
                return None, 0
        if used == len(waiting):
            waiting.append(file.readline())
        if not waiting[used]:
            waiting.pop()
            return None, 0
        text += waiting[used]
        used += 1


def decoded_lines(path, file, rejects: Rejects):
    """(line number, line) of those that are not blank and in the encoding."""
    for number, line in enumerate(file, 1):
        if undecoded(line):
            rejects.add(path, number, UNDECODED, line.encode("utf-8", "replace").decode())
        elif line.strip():
            yield number, line


def conversations(path, file, rejects: Rejects):
    """(line number, messages) of a file with a JSON object on each line, whose "messages" are a conversation."""
    for number, line in decoded_lines(path, file, rejects):
        try:
            messages = json.loads(line)["messages"]
            check_messages(messages)
            messages = [dict(role=message["role"], content=clean(message["content"])) for message in messages]
            json.dumps(messages, ensure_ascii=False).encode()  # no half of a surrogate pair
        except (ValueError, KeyError, TypeError):
            rejects.add(path, number, "no JSON object with messages", line)
            continue
        if any(message["role"] == "assistant" for message in messages):
            yield number, messages
        else:
            rejects.add(path, number, "no turn of the assistant", line)


def questions(path, file, group, rejects: Rejects):
    """(question, context, answers, start; what decides the split) of a table, of lines of JSON, or of a JSON file.

    That is the value of `group`; without one the title of the article, where rows say it, else the context.
    """
    for number, row in raw_questions(path, file, group, rejects):
        try:
            whole = spans.checked(row)
            if group and not isinstance(row.get(group), (str, int)):
                raise spans.Unusable(f"no {group}")
            found = spans.cleaned(whole, clean)
            json.dumps(found, ensure_ascii=False).encode()  # no half of a surrogate pair
        except ValueError as error:
            reason = "half of a surrogate pair" if isinstance(error, UnicodeError) else error.reason
            kept = {name: value for name, value in row.items() if name != spans.LINE}
            rejects.add(path, number, reason, json.dumps(kept))
            continue
        yield found, str(row[group]) if group else str(row.get("title") or found["context"])


def raw_questions(path, file, group, rejects):
    """(line number, row as the file has it)."""
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        for number, line in decoded_lines(path, file, rejects):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if isinstance(row, dict):
                yield number, row
            else:
                rejects.add(path, number, "no JSON object", line)
    elif suffix == ".json":
        text = file.read()
        if undecoded(text):
            raise ValueError(f"data: {path} is not all in the encoding; {ENCODED}")
        try:
            yield from spans.read_json(text)
        except ValueError as error:
            raise ValueError(f"data: {path} is {error}") from None
    else:
        columns = TABLES["questions"] + ((group,) if group else ())
        yield from records(path, file, columns, rejects, str, ("answer",))


def documents(path, file, whole: bool, rejects: Rejects):
    """(line number, text) of the documents of a text file: all of it, or what stands between blank lines."""
    lines, begin = [], 1
    for number, line in enumerate(file, 1):
        if undecoded(line):
            rejects.add(path, number, UNDECODED, line.encode("utf-8", "replace").decode())
            continue
        if whole or line.strip():
            begin = begin if lines else number
            lines.append(line)
        elif lines:
            yield begin, clean("".join(lines))
            lines = []
    if lines:
        yield begin, clean("".join(lines))


def build(folder, paths, *, kind=None, encoding="utf-8", whole=None, group=None) -> dict:
    """Split the documents or rows of `paths` into the files train, valid and test in `folder`; returns a description.

    A document is a file where several are given (whole=True), else what stands between blank lines. What was met before
    is left out. A document is in the split that its text decides, a row in the one that its text, source or prompt
    does, a conversation in that of its first message, a question in that of its article's title or, without one, of its
    context, or a row in that of its `group`, a column: rows that share it share a split. Questions on one context
    always do. What cannot be used is in rejected.tsv.
    Raises ValueError for files that cannot be read and for a split that stays empty.
    """
    paths, kind, folder = [Path(path) for path in paths], kind or kind_of(paths, encoding), Path(folder)
    whole = len(paths) > 1 if whole is None else whole
    if group and kind not in TABLES:
        raise ValueError(f"data: --group names a column, {kind} has none")
    sizes, counts = Counter({split: 0 for split in SPLITS}), Counter(read=0, duplicates=0)
    classes, digest = Counter(), hashlib.sha256()
    extension = EXTENSIONS[kind]
    files = {split: open(folder / f"{split}.{extension}", "w", encoding="utf-8", newline="") for split in SPLITS}
    seen = Seen(folder / ".seen")
    rejects = Rejects(open(folder / "rejected.tsv", "w", encoding="utf-8"))
    rejects.file.write("file\tline\treason\trow\n")
    writers = {split: csv.writer(file, delimiter="\t", lineterminator="\n") for split, file in files.items()}
    try:
        if kind in COLUMNS:
            for writer in writers.values():
                writer.writerow(COLUMNS[kind])
        for path in paths:
            with reading(path, encoding) as file:
                for row, same, key in rows_of(path, file, kind, whole, group, rejects):
                    counts["read"] += 1
                    if not seen.add(*same):
                        counts["duplicates"] += 1
                        continue
                    split = split_of(key)
                    if kind == "questions":
                        split = seen.home(same[0], split)
                    if kind == "text":
                        files[split].write((f"{BREAK}\n" if sizes[split] else "") + row[0] + "\n")
                    elif kind in COLUMNS:
                        writers[split].writerow(row)
                        if kind == "classification" and split == "train":
                            classes[row[1]] += 1
                    else:
                        files[split].write(row[0] + "\n")
                    sizes[split] += 1
                    digest.update(repr((split, row)).encode())
    finally:
        seen.close()
        (folder / ".seen").unlink()
        for file in (*files.values(), rejects.file):
            file.close()
    if empty := [split for split in SPLITS if not sizes[split]]:
        said = f"; rejected: {', '.join(rejects.first)}" if rejects.first else ""
        cure = "more are needed" + (", or --documents paragraph" if kind == "text" and whole else "")
        if kind == "questions" and group is None:
            cure += ", or --group context (else the questions of an article stay together)"
        cure += f"; {ENCODED}" if rejects.counts[UNDECODED] else ""
        count, what = sum(sizes.values()), "document" if kind == "text" else "row"
        leave = f"{what} leaves" if count == 1 else f"{what}s leave"
        raise ValueError(f"data: {count} different {leave} {empty[0]} empty: {cure}{said}")
    meta = dict(kind=kind, origin=", ".join(map(str, paths)), splits=dict(sizes), fingerprint=digest.hexdigest()[:16])
    meta["left_out"] = dict(counts, **rejects.counts)
    meta["rejected"] = dict(count=sum(rejects.counts.values()), first=rejects.first)
    if kind == "classification":
        meta["classes"] = dict(sorted(classes.items()))
    return meta


def rows_of(path, file, kind, whole, group, rejects):
    """((text,), (a line of JSON,) or the values of the columns, what makes it a repeat, what decides the split)."""
    if kind == "text":
        for _, text in documents(path, file, whole, rejects):
            if text:
                yield (text,), (text,), text
    elif kind == "conversations":
        for _, messages in conversations(path, file, rejects):
            row = (json.dumps(dict(messages=messages), ensure_ascii=False),)
            yield row, row, messages[0]["content"].casefold()
    elif kind == "questions":
        for found, key in questions(path, file, group, rejects):
            same = found["context"], found["question"]
            yield (json.dumps(found, ensure_ascii=False),), same, one_line(key).casefold()
    else:
        columns, tidy = COLUMNS[kind], cleaned_text if kind == "chat" else cleaned_line
        for _, found in records(path, file, (*columns, group) if group else columns, rejects, tidy):
            row = tuple(found[name] for name in columns)
            same = row if kind == "chat" else row[:1]  # a prompt may have several responses
            yield row, same, found[group or columns[0]].casefold()


def read_documents(path):
    """The documents of a text file that `build` wrote, or the whole of another one, one after the other."""
    lines = []
    with open(path, encoding="utf-8", newline="\n") as file:
        for line in file:
            if line == f"{BREAK}\n":
                yield "".join(lines)
                lines = []
            else:
                lines.append(line)
    yield "".join(lines)
