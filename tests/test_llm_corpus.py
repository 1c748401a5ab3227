"""A user's own files: what is read, left out, rejected, and where it goes."""

import csv
import gzip
import json
import re
import tracemalloc

import numpy as np
import pytest
import torch

pytest.importorskip("tokenizers")

from fastllm.cli import main as cli
from fastllm.llm import corpus, data, debian, shards
from fastllm.llm.sources import SPLITS
from fastllm.llm.tasks import TASKS
from fastllm.llm.tokens import Tokenizer


def rows_in(folder, columns):
    found = {}
    for split in SPLITS:
        with open(folder / f"{split}.tsv", encoding="utf-8", newline="") as file:
            header, *rows = csv.reader(file, delimiter="\t")
        assert header == columns
        found[split] = [tuple(row) for row in rows]
    return found


def test_what_is_cleaned():
    assert corpus.clean("\ufeffe\u0301\x00 \r\n\r\n\n\na\tb\x07  \n") == "\u00e9\n\na\tb"
    assert corpus.clean(" \n\n") == ""


def test_a_table_is_split_cleaned_and_without_repeats(tmp_path):
    path = tmp_path / "reviews.tsv"
    lines = [f'good\tmovie {i} was "fine"' for i in range(200)]  # a quote inside of a field is itself
    lines[3:3] = [
        'bad\t"two\nlines, ""quoted"""',  # lines 5 and 6
        'bad\t"never closed',
        "bad",
        "bad\tone\ttoo many",
        "bad\t ",
        'BAD\tMOVIE  7 was "fine"',
        "good\tcaf\u00e9 \u0000x",
    ]
    path.write_bytes(("Label\tText\n" + "\n".join(lines) + "\n").encode() + b"bad\t\xff\xfe bytes\n\n")
    meta = data.build_from_files([path], tmp_path / "out")
    rows = rows_in(tmp_path / "out", ["text", "label"])
    everything = [row for split in rows.values() for row in split]
    assert ('two lines, "quoted"', "bad") in everything and ("caf\u00e9 x", "good") in everything
    assert ('movie 0 was "fine"', "good") in everything
    assert len(everything) == len(set(everything)) == 202 == sum(meta["splits"].values())
    assert 120 < len(rows["train"]) < 190
    assert meta["left_out"]["duplicates"] == 1 and meta["rejected"]["count"] == 5
    with open(tmp_path / "out" / "rejected.tsv") as file:
        rejected = [line.split("\t")[1:3] for line in file][1:]
    assert rejected == [
        ["7", "a quote that does not close"],
        ["8", "with another number of columns (1, not 2)"],
        ["9", "with another number of columns (3, not 2)"],
        ["10", "no text"],
        ["210", "not in the encoding"],
    ]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(
        ["train.tsv", "valid.tsv", "test.tsv", "meta.json", "rejected.tsv"]
    )
    assert data.describe(tmp_path / "out")["classes"] == meta["classes"]


def test_rows_of_a_group_share_a_split(tmp_path):
    path = tmp_path / "x.tsv"
    path.write_text("text\tlabel\tmovie\n" + "".join(f"text {i}\t{i % 2}\tm{i % 40}\n" for i in range(400)))
    data.build_from_files([path], tmp_path / "out", group="movie")
    rows = rows_in(tmp_path / "out", ["text", "label"])
    groups = [{int(text.split()[1]) % 40 for text, _ in rows[split]} for split in SPLITS]
    assert sum(map(len, groups)) == 40 == len(set.union(*groups))
    with pytest.raises(ValueError, match="has no column film: its first line names text, label, movie"):
        data.build_from_files([path], tmp_path / "other", group="film")
    assert not (tmp_path / "other").exists()


def test_paragraphs_or_files_are_documents(tmp_path):
    paragraphs = [f"paragraph {i}\nhas two lines" for i in range(60)]
    (tmp_path / "one.txt").write_text("\n\n\n".join([*paragraphs, "Paragraph 3\nhas  two lines"]))
    meta = data.build_from_files([tmp_path / "one.txt"], tmp_path / "a")
    found = [list(corpus.read_documents(tmp_path / "a" / f"{split}.txt")) for split in SPLITS]
    assert sorted(text.strip() for split in found for text in split) == sorted(paragraphs)
    assert meta["left_out"] == dict(read=61, duplicates=1)

    files = []
    for i in range(40):
        files.append(tmp_path / f"{i}.txt")
        files[-1].write_text(f"file {i}\n\nhas paragraphs\n")
    data.build_from_files(files, tmp_path / "b")
    found = [list(corpus.read_documents(tmp_path / "b" / f"{split}.txt")) for split in SPLITS]
    assert sorted(text for split in found for text in split) == sorted(path.read_text() for path in files)
    assert all(found)


@pytest.mark.parametrize(
    "content, arguments, message",
    [
        (None, [], "there is no file"),
        (b"", [], "is empty"),
        ("text\tlabel\n".encode("utf-16"), [], "is no UTF-8 text but utf-16: --encoding utf-16 reads it"),
        (b"text\tlabel\n", ["--encoding", "klingon"], "there is no encoding 'klingon'"),
        (
            b"body\tclass\na\tb\n",
            [],
            "must name the columns text and label or source and target or prompt and response or question, context and "
            "answer, got body, class: change that line",
        ),
        (b"text\tlabel\na\tb\n", [], "1 different row leaves .* empty: more are needed"),
        (b"text\tlabel\na\tb\n", ["--vocab", "9"], "vocab must be at least 261"),
        (b"text\tlabel\na\tb\n", ["--spacy", "en"], "it is for --tokenizer words, not bpe"),
        (b"text\tlabel\n\xe9t\xe9\tb\n", [], "more are needed; --encoding says .* latin-1.* rejected: .*x.tsv:2 "),
        (b"text\tlabel\na\n", [], r"0 different rows leave train empty.*x.tsv:2 \(with .* \(1, not 2\)\)"),
    ],
)
def test_bad_files_are_one_line_and_leave_nothing(tmp_path, capsys, content, arguments, message):
    path = tmp_path / "x.tsv"
    if content is not None:
        path.write_bytes(content)
    assert cli(["data", str(path), "--out", str(tmp_path / "out"), *arguments]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and re.search(message, said), said
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("name", ["rows.csv", "rows.parquet", "rows.tsv.gz"])
def test_files_that_are_no_text_are_not_read_as_text(tmp_path, name, capsys):
    content = gzip.compress(b"a\n\nb\n\n") if name.endswith("gz") else b"text,label\n" + b"a, b\n\n" * 90
    (tmp_path / name).write_bytes(content)
    arguments = ["data", str(tmp_path / name), "--out", str(tmp_path / "out")]
    arguments += ["--encoding", "latin-1"] if name.endswith("gz") else []
    assert cli(arguments) == 2 and not (tmp_path / "out").exists()
    assert ("gzip: unpack it" if name.endswith("gz") else "rows are read from a .tsv file") in capsys.readouterr().err


def test_files_of_two_kinds_are_refused(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("text\n\n" * 9)
    (tmp_path / "b.tsv").write_text("text\tlabel\na\tb\n")
    assert cli(["data", str(tmp_path / "a.txt"), str(tmp_path / "b.tsv"), "--out", str(tmp_path / "out")]) == 2
    assert "a.txt is read as text and" in (said := capsys.readouterr().err) and "b.tsv as classification" in said


def test_the_encoding_holds_for_the_first_line_too(tmp_path):
    (tmp_path / "rows.tsv").write_text("text\tlabel\n" + "".join(f"é {n}\tab\n" for n in range(60)), encoding="utf-16")
    meta = data.build_from_files([tmp_path / "rows.tsv"], tmp_path / "out", encoding="utf-16")
    assert meta["kind"] == "classification" and meta["left_out"]["read"] == 60


@pytest.mark.parametrize("size, what", [(1 << 12, "out"), (1 << 13, "out"), (3 << 13, "out/bytes")])
def test_a_full_disk_is_one_line_and_leaves_nothing_in_part(tmp_path, capsys, size, what):
    """Files may not grow beyond `size`: the table of what was seen, the text, or its tokens cannot be written."""
    resource = pytest.importorskip("resource")
    (tmp_path / "x.txt").write_text("\n\n".join(f"document {n} has one line" for n in range(800)))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        assert cli(["data", str(tmp_path / "x.txt"), "--out", str(tmp_path / "out"), "--tokenizer", "bytes"]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"{tmp_path / what} could not be written: " in said and "make room" in said
    assert not (tmp_path / what).exists() and not list(tmp_path.rglob(".out*")) + list(tmp_path.rglob(".bytes*"))
    assert (tmp_path / "out").exists() == (what != "out")


def test_memory_does_not_grow_with_the_corpus(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD", 1 << 12)
    peaks = []
    for n in (2000, 20_000):
        path = tmp_path / f"{n}.tsv"
        path.write_text("source\ttarget\n" + "".join(f"source {i} of them\ttarget {i}\n" for i in range(n)))
        tracemalloc.start()
        data.build_from_files([path], tmp_path / str(n))
        shards.tokenized(tmp_path / str(n), "bytes")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


def test_pairs_by_command(tmp_path, capsys):
    path = tmp_path / "pairs.tsv"
    path.write_text("source\ttarget\n" + "".join(f"word {i}\tmot {i}\n" for i in range(100)) + "word\t\n")
    out = tmp_path / "out"
    assert cli(["data", str(path), "--out", str(out), "--vocab", "270"]) == 0
    said = capsys.readouterr().out
    assert f"next: fastllm pretrain {out} --tokenizer bpe --vocab 270 --config translate-cpu" in said
    assert "1 row rejected" in said and f"{path}:102 (no target)" in said
    assert "\n100 read; left out: no target (1)\n" in said
    rows = rows_in(out, ["source", "target"])
    tokenizer = Tokenizer.load(out / "bpe-270")
    sequences = shards.Sequences(out / "bpe-270", "train")
    assert len(sequences) == 2 * len(rows["train"])
    for n, texts in enumerate(rows["train"]):
        for at, text in enumerate(texts):
            ids = sequences[2 * n + at]
            assert ids[-1] == tokenizer.eos and tokenizer.decode(ids[:-1]) == text
            assert sequences.lengths[2 * n + at] == len(ids)
    assert cli(["data", str(path), "--out", str(out)]) == 2
    assert "is there already; --fresh replaces it" in capsys.readouterr().err


def test_chats_are_read_as_finetune_reads_them(tmp_path, capsys):
    """Prompts with responses keep their lines, and a prompt may have several; of conversations each line is one."""
    turns = [f'ask {n}\t"one\r\ntwo {n}"' for n in range(60)]
    (tmp_path / "a.tsv").write_bytes("\r\n".join(["\ufeffprompt\tresponse", *turns, "ask 7\tother"]).encode())
    assert cli(["data", str(tmp_path / "a.tsv"), "--out", str(tmp_path / "a")]) == 0
    assert f"next: fastllm finetune language --model MODEL --data {tmp_path / 'a'}" in capsys.readouterr().out
    found = [row for split in rows_in(tmp_path / "a", ["prompt", "response"]).values() for row in split]
    assert len(found) == 61 and {("ask 7", "one\ntwo 7"), ("ask 7", "other")} <= set(found)

    def line(n, *roles):
        return json.dumps(dict(messages=[dict(role=role, content=f"{role}\n{n} \U0001f600") for role in roles], id=n))

    lines = [line(n, "user", "assistant") for n in range(60)]
    half = line(62, "user", "assistant").replace("ude00", "u0041")
    wrong = ["", "{", "[]", line(60, "user"), line(61, "nobody", "assistant"), half]
    (tmp_path / "b.jsonl").write_text("\n".join([*lines, *wrong, lines[3]]))
    meta = data.build_from_files([tmp_path / "b.jsonl"], tmp_path / "b")
    counts = dict(read=61, duplicates=1)
    assert meta["left_out"] == counts | {"no JSON object with messages": 4, "no turn of the assistant": 1}
    task = TASKS["language-model"](Tokenizer.bytes(), 64)
    read = [row["messages"] for split in SPLITS for row in task.rows(tmp_path / "b" / f"{split}.jsonl")]
    assert sorted(map(str, read)) == sorted(str(json.loads(x)["messages"]) for x in lines)
    assert data.describe(tmp_path / "b")["kind"] == "conversations"


@pytest.mark.parametrize("shard", [7, 1 << 24])
def test_a_text_is_one_stream_in_shards(tmp_path, monkeypatch, shard):
    monkeypatch.setattr(shards, "SHARD", shard)
    monkeypatch.setattr(shards, "PIECE", 10)
    documents = [f"document {i}\nhas lines\n" for i in range(30)]
    (tmp_path / "x.txt").write_text("\n".join(documents))
    data.build_from_files([tmp_path / "x.txt"], tmp_path / "out")
    folder = shards.tokenized(tmp_path / "out", "bytes")
    stream, tokenizer = shards.Stream(folder, "train"), Tokenizer.load(folder)
    expected = "".join(text + "\f" for text in corpus.read_documents(tmp_path / "out" / "train.txt"))
    found = stream[:].tolist()
    assert "".join("\f" if i == tokenizer.eos else tokenizer.decode([i]) for i in found) == expected
    assert len(list(folder.glob("train-*.npy"))) == (1 if shard > 7 else len(stream.shards)) and len(stream) == len(
        found
    )
    assert (len(stream.shards) > 5) == (shard == 7)
    for a, b in ((0, 1), (3, 40), (len(stream) - 9, len(stream)), (5, 5)):
        assert stream[a:b].tolist() == found[a:b]
    assert stream[0:3].dtype == torch.int64 and stream.shards[0].dtype == np.uint16
    before = (folder / "meta.json").stat().st_mtime_ns
    assert shards.tokenized(tmp_path / "out", "bytes") == folder  # not made again
    assert (folder / "meta.json").stat().st_mtime_ns == before
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    (tmp_path / "out" / "meta.json").write_text(json.dumps(meta | dict(fingerprint="another")))
    shards.tokenized(tmp_path / "out", "bytes")
    assert (folder / "meta.json").stat().st_mtime_ns != before


ENGLISH = """Package: foo-1.2-doc
Description-md5: aa
Description-en: docs of foo
 First paragraph
 of two lines.
 .
 Second one.

Package: bar
Description-md5: bb
Description-en: bar
 Only one.

Package: broken
Description-md5: cc
Description-en: nothing long
"""
FRENCH = ENGLISH.replace("-en:", "-fr:").replace("docs of foo", "docs de foo").replace("Second one", "Deuxi\u00e8me")


def test_descriptions_are_aligned_by_paragraph():
    english, french = debian.parse_descriptions(ENGLISH, "en"), debian.parse_descriptions(FRENCH, "fr")
    assert english["aa"] == ("foo-1.2-doc", "docs of foo", ["First paragraph of two lines.", "Second one."])
    assert set(english) == {"aa", "bb"}
    pairs, counts = debian.align(english, french)
    assert pairs == [
        ("docs of foo", "docs de foo", "foo-1.2-doc"),
        ("Second one.", "Deuxi\u00e8me.", "foo-1.2-doc"),
    ]
    assert counts == {"descriptions": 2, "not translated": 3, "other number of paragraphs": 0}
    french["aa"] = *french["aa"][:2], ["joined"]
    assert debian.align(english, french)[1]["other number of paragraphs"] == 1
    assert debian.family("foo-1.2-doc") == debian.family("foo-13-doc") != debian.family("food")


def test_families_share_a_split():
    pairs = [(f"text {i}", "target", f"package{chr(97 + i % 26)}-{i}") for i in range(200)]
    found = debian.split_pairs(pairs + [("TEXT 5", "again", "other")], debian.Counter(), "here")
    assert found.counts["duplicates"] == 1 and sum(map(len, found.splits.values())) == 200
    letters = [{int(source.split()[1]) % 26 for source, _ in rows} for rows in found.splits.values()]
    assert sum(map(len, letters)) == 26
