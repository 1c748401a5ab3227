"""Data sets, files and tokens, on small texts of our own."""

import struct
import sys
import zlib
from pathlib import Path

import pytest
import torch

from fastllm.cli import main as cli
from fastllm.llm import batches, data, sources
from fastllm.llm.files import atomic, atomic_folder

REVIEWS = """category,text,movie_name,has_plot_and_reviews
fresh,"A delight, from
start to end",alpha,True
rotten,Dull.,alpha,True
plot,A man walks.,alpha,True
FRESH?,Unknown label,beta,True
rotten,,beta,True
fresh,DULL.,beta,True
rotten,cut short
fresh,"one, too, many",gamma,True,surplus
"""


def test_reviews_are_parsed_and_what_is_wrong_is_counted():
    rows, counts = sources.parse_reviews(REVIEWS)
    assert rows == [("A delight, from start to end", "fresh", "alpha"), ("Dull.", "rotten", "alpha")]
    assert counts == dict(rows=8, malformed=4, plots=1, duplicates=1)


def test_tab_files_keep_quotes_and_count_what_is_wrong():
    text = (
        'Category\tText\nd\tstring\nclass\t\n\nearn\tthe "first line\nearn\t\n\tno label\nno tab\nacq\tit"s\ttwo tabs\n'
    )
    rows, counts = sources.parse_tab(text)
    assert rows == [('the "first line', "earn"), ('it"s two tabs', "acq")]
    assert counts == dict(rows=5, malformed=3)


def test_official_splits_share_no_text():
    header = "Category\tText\nd\tstring\nclass\t\n"
    train_text = header + "".join(f"earn\ttext {i}\n" for i in range(200)) + "earn\tIn Both\nacq\ttext 3\n"
    corpus = sources.split_officially(train_text, header + "acq\tin both\nacq\tlast\nacq\tlast\n", "here")
    texts = {split: {text.lower() for text, _ in rows} for split, rows in corpus.splits.items()}
    assert texts["test"] == {"in both", "last"}
    assert len(texts["train"]) + len(texts["valid"]) == 200 and 5 < len(texts["valid"]) < 50
    assert not texts["train"] & texts["valid"] and not (texts["train"] | texts["valid"]) & texts["test"]
    assert corpus.counts == dict(rows=205, malformed=0, duplicates=3)


def test_splits_by_key_are_stable_and_sized():
    found = [sources.split_of(str(i)) for i in range(2000)]
    assert found == [sources.split_of(str(i)) for i in range(2000)]
    assert 1500 < found.count("train") < 1700 and found.count("test") > 150 < found.count("valid")


def test_topics_that_contain_each_other_share_no_paragraph():
    topics = {"big": "one\n\ntwo\n\nthree"} | {f"part {i}": f"two\n\nown {i}" for i in range(40)}
    splits, repeats = sources.split_topics(topics)
    paragraphs = [p for text in splits.values() for p in text.strip().split("\n\n")]
    assert sorted(paragraphs) == sorted(["one", "two", "three", *(f"own {i}" for i in range(40))])
    assert repeats == 40


def r_strings(strings):
    out = b"X\n" + struct.pack(">3i", 3, 0x40201, 0x30500) + struct.pack(">i", 5) + b"UTF-8"
    out += struct.pack(">2i", 16, len(strings))
    for s in strings:
        raw = b"" if s is None else s.encode()
        out += struct.pack(">2i", 9, -1 if s is None else len(raw)) + raw
    return out


def test_r_database_is_read_without_r():
    database = b""
    for lines in (["EMMA", "", "Emma Woodhouse, handsome\u2014"], ["Persuasion", None, "Sir Walter"]):
        raw = r_strings(lines)
        database += struct.pack(">I", len(raw)) + zlib.compress(raw)
    novels = sources.parse_novels(database)
    assert novels == {"EMMA": "EMMA\n\nEmma Woodhouse, handsome\u2014\n", "Persuasion": "Persuasion\n\nSir Walter\n"}
    wrong = zlib.compress(r_strings(["x"]).replace(struct.pack(">i", 16), struct.pack(">i", 13)))
    for broken in (database[:-9], b"\0\0\0\1not zlib", b"\0\0\0\1" + wrong):
        with pytest.raises(sources.Unavailable, match="not as expected"):
            sources.parse_novels(broken)


@pytest.mark.parametrize("name", ["pydoc", "stdlib-docstrings"])
def test_zero_install_sets(name, tmp_path):
    meta = data.build(name, tmp_path)
    assert all(meta["splits"][split] for split in sources.SPLITS)
    if name == "pydoc":
        texts = [(tmp_path / f"{split}.txt").read_text() for split in sources.SPLITS]
        assert sum(map(len, texts)) > 200_000
    else:
        assert len(meta["classes"]) >= 4
        rows = {split: data.read_tsv(tmp_path / f"{split}.tsv")[0] for split in sources.SPLITS}
        seen = [text.casefold() for split in rows.values() for text, _ in split]
        assert len(seen) == len(set(seen)) > 1000


def test_build_is_complete_or_absent_and_not_repeated(registered, monkeypatch):
    folder = registered / "tiny"
    first = data.build("tiny", folder)
    assert first["splits"] == dict(train=160, valid=24, test=24) and first["classes"] == dict(bad=80, good=80)
    assert not list(folder.glob(".*")), "temporary files are left"
    monkeypatch.setitem(data.CLASSIFICATION, "tiny", lambda: pytest.fail("a complete set was built again"))
    assert data.build("tiny", folder) == first
    (folder / "valid.tsv").unlink()
    assert data.describe(folder) is None


def test_a_folder_is_no_name(registered, monkeypatch, capsys):
    monkeypatch.chdir(registered.parent)
    Path("texts").mkdir()
    assert cli(["data", "texts"]) == 2
    assert "texts is a folder: give its files, as in fastllm data texts/*" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["safetensors.SafetensorError", "sqlite3.OperationalError"])
def test_a_full_disk_is_an_os_error(tmp_path, name):
    module, _, name = name.partition(".")
    error = getattr(pytest.importorskip(module), name)
    with pytest.raises(OSError, match="out could not be written: no space left; make room"):
        with atomic_folder(tmp_path / "out"):
            raise error("no space left")
    assert not list(tmp_path.iterdir())


def test_what_killed_processes_left_is_removed(tmp_path):
    for name in (".out.killed_1", ".out.killed_2.replaced", ".out.notes", ".output.killed_1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("old")
    with atomic_folder(tmp_path / "out") as first:
        with atomic_folder(tmp_path / "out") as second:  # as another process would, at the same time
            (second / "file").write_text("second")
            assert first.exists() and {path.name for path in tmp_path.iterdir()} == {
                *(first.name, second.name),
                *("out", ".out.notes", ".output.killed_1"),  # what was moved aside is back, for nothing had its place
            }
            assert (tmp_path / "out" / "file").read_text() == "old"
        (first / "file").write_text("first")
    assert (tmp_path / "out" / "file").read_text() == "first"
    assert {path.name for path in tmp_path.iterdir()} == {"out", ".out.notes", ".output.killed_1"}


def test_a_folder_of_somebody_else_is_left_alone(registered):
    (registered / "tiny").mkdir(parents=True)
    (registered / "tiny" / "train.tsv").write_text("mine")
    with pytest.raises(ValueError, match="has files in it, and no meta.json: they would be lost"):
        data.build("tiny", registered / "tiny")
    assert (registered / "tiny" / "train.tsv").read_text() == "mine"


def test_fallback_says_why(registered):
    meta = data.build_or_fall_back("gone", registered)
    assert meta["name"] == "tiny" and "gone is not available, so tiny is used: no network here" in meta["fallback"]
    with pytest.raises(ValueError, match="unknown name 'nonsense'; there are tiny"):
        data.build_or_fall_back("nonsense", registered)


def test_a_client_that_fails_is_one_line(tmp_path):
    with pytest.raises(sources.Unavailable, match=r"^it cannot be fetched: ERROR: nothing found$"):
        script = "import sys; print('noise\\nERROR: nothing found\\nmore', file=sys.stderr); sys.exit(1)"
        sources.run_client([sys.executable, "-c", script], "it", tmp_path)
    with pytest.raises(sources.Unavailable, match="it cannot be fetched"):
        sources.run_client(["/no/such/client"], "it", tmp_path)


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "result.json"
    with atomic(path) as file:
        file.write("old")
    with pytest.raises(RuntimeError, match="the disk is full"), atomic(path) as file:
        file.write("ne")
        raise RuntimeError("the disk is full")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_read_tsv_counts_malformed_rows(tmp_path):
    path = tmp_path / "x.tsv"
    path.write_text('label\ttext\ngood\t"two\nlines ""quoted"""\nbad\t\n\nbad\ta\tb\n\tnothing\nbad\tnul\0l\n')
    assert data.read_tsv(path) == ([('two\nlines "quoted"', "good"), ("null", "bad")], 3)
    for text, message in (("", "must name the columns"), ("a\tb\n", "must name"), ("text\tlabel\n", "no row has")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            data.read_tsv(path)
    path.write_bytes(b"\xef\xbb\xbftext\tlabel\na\tb\ncaf\xe9\tb\n")
    with pytest.raises(ValueError, match="x.tsv line 3 is not UTF-8 text"):
        data.read_tsv(path)


def test_buckets_hold_everything_once_and_little_padding():
    lengths = torch.randint(1, 200, (500,)).tolist()
    for seed in (None, 3):
        found = batches.bucketed(lengths, 16, seed)
        assert sorted(i for b in found for i in b) == list(range(500))
        padded = sum(len(b) * max(lengths[i] for i in b) for b in found)
        assert padded < 1.2 * sum(lengths)
    assert batches.bucketed(lengths, 16, 3) == found != batches.bucketed(lengths, 16, 4)


def test_collate_masks_padding_only_where_there_is_some():
    batch = batches.collate([[5, 6, 7], [8]], [0, 1])
    assert batch.tokens.tolist() == [[5, 6, 7], [8, 0, 0]] and batch.mask.sum(1).tolist() == [3, 1]
    assert batch.real_tokens == 4
    assert batches.collate([[5, 6]], [0]).mask is None


def test_windows_are_deterministic_and_inside():
    text = torch.arange(50, dtype=torch.uint8)
    a, b = (batches.Windows(text, 10, 4, seed=1)[7] for _ in range(2))
    assert torch.equal(a, b) and a.shape == (4, 11)
    assert not torch.equal(a, batches.Windows(text, 10, 4, seed=1)[8])
    assert torch.equal(a - a[:, :1], torch.arange(11).expand(4, 11))
    with pytest.raises(ValueError, match="too short"):
        batches.Windows(text, 50, 1, seed=0)


def test_epochs_are_looked_up_by_number():
    lengths = torch.randint(1, 50, (101,)).tolist()
    epochs = batches.Epochs(lengths, 10, 3, list)
    assert epochs.per_epoch == 11
    passes = [[epochs[n] for n in range(at, at + 11)] for at in (0, 11)]
    for found in passes:
        assert sorted(i for batch in found for i in batch) == list(range(101))
    assert passes[0] != passes[1] and epochs[5] == passes[0][5]
    whole = batches.Epochs(lengths, 10, 3, list, whole=True)
    assert whole.per_epoch == 10 and [whole[n] for n in range(10)] == [part for part in passes[0] if len(part) == 10]
    with pytest.raises(ValueError, match="101 sequences make no batch of 200"):
        batches.Epochs(lengths, 200, 3, list, whole=True)


def test_what_was_left_out_is_said():
    counts = dict(rows=18821, malformed=0, duplicates=34, short=2)
    assert data.read_and_left_out(counts) == "18821 rows read; left out: duplicates (34), short (2)"
    assert data.read_and_left_out({}) == "left out: nothing"
