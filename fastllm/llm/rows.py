"""Rows of a data file, one by one: TSV with a header line, or a JSON object on each line.

Files are read as they are asked for, so memory does not grow with them. What is wrong in one is a ValueError with the
file, the line and what to do: `fastllm data FILES` cleans what somebody else wrote.
"""

import csv
import json
from pathlib import Path


def find(folder, split, extensions) -> Path:
    """The file `split` in a folder, train.tsv or the like. Raises ValueError where there is none, or are several."""
    folder = Path(folder)
    found = [path for ending in extensions if (path := folder / f"{split}{ending}").exists()]
    if len(found) != 1:
        names = " or ".join(f"{split}{ending}" for ending in extensions)
        what = f"one of {names} is needed, {len(found)} are there" if found else f"there is no {names} in it"
        if not folder.is_dir():
            cure = "a folder with train, valid and test is needed, as `fastllm data FILE` makes them"
            what = f"this is a file; {cure}" if folder.exists() else f"no such folder; {cure}"
        raise ValueError(f"{folder}: {what}")
    return found[0]


def lines(path):
    """(number, line without its end) of a UTF-8 text file."""
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                yield number, text.rstrip("\r\n")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} line {number} is not UTF-8 text ({error.reason}): convert the file first") from None


def read(path, columns, optional=()):
    """(line number, {column: text}) of each row of a .tsv or .jsonl file.

    All of `columns` must be there and have a text; `optional` ones may be missing or empty. Others are left out.
    """
    parse = {".tsv": _tsv, ".jsonl": _jsonl}.get(Path(path).suffix)
    if parse is None:
        raise ValueError(f"{path}: a .tsv or .jsonl file is needed")
    number = 0
    for number, row in parse(path, columns):
        kept = {name: row[name] for name in (*columns, *optional) if row.get(name) is not None}
        for name in columns:
            if not isinstance(kept.get(name), str) or not kept[name].strip():
                raise ValueError(f"{path} line {number}: {name} is {'missing' if name not in kept else 'no text'}")
        yield number, kept
    if not number:
        raise ValueError(f"{path} has no rows")


def _tsv(path, columns):
    csv.field_size_limit(1 << 24)
    text = ((number, line) for number, line in lines(path))
    last = 0

    def feed():
        nonlocal last
        for last, line in text:
            if "\0" in line:
                raise ValueError(f"{path} line {last}: a zero byte; is this a text file?")
            yield line + "\n"

    reader = csv.reader(feed(), delimiter="\t")
    header = [name.strip().lower() for name in next(reader, [])]
    if missing := [name for name in columns if name not in header]:
        got = f"got {', '.join(header)}" if header else "the file is empty"
        raise ValueError(f"{path}: the first line must name the columns {', '.join(columns)}; {got}, no {missing[0]}")
    try:
        for row in reader:
            if row and len(row) != len(header):
                raise ValueError(f"{path} line {last}: {len(row)} columns, the first line names {len(header)}")
            if row:
                yield last, dict(zip(header, (cell.strip() for cell in row), strict=True))
    except csv.Error as error:
        raise ValueError(f"{path} line {last}: {error}") from None


def _jsonl(path, columns):
    for number, line in lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path} line {number} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path} line {number}: an object with {', '.join(columns)} is needed")
        yield number, row
