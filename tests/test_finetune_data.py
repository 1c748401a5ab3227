"""What fine-tuning and evaluation read: row by row, and bad input in one line that says what to do."""

import pytest
from finetune_models import write

from fastllm.cli import main as cli
from fastllm.llm import quantize, rows
from fastllm.llm.tasks import TASKS

pytest_plugins = ["finetune_models"]


def test_rows_are_read_one_by_one(tmp_path):
    write(tmp_path / "a.tsv", ("label", "text", "more"), [("x", 'said "no"\tand\nleft', "1")] * 3)
    assert next(rows.read(tmp_path / "a.tsv", ("text", "label")))[1] == dict(text='said "no"\tand\nleft', label="x")
    (tmp_path / "b.tsv").write_bytes(b"\xef\xbb\xbftext\tlabel\r\na\tb\r\n\r\nc\td\xff\r\n")
    lazily = rows.read(tmp_path / "b.tsv", ("text", "label"))
    assert next(lazily) == (2, dict(text="a", label="b"))
    with pytest.raises(ValueError, match="line 4 is not UTF-8 text"):
        list(lazily)


BAD = {
    "no folder": (lambda d: None, "gone", "no such folder"),
    "no file": (lambda d: (d / "valid.tsv").unlink(), "", "there is no valid.tsv or valid.jsonl in it"),
    "empty": (lambda d: (d / "test.tsv").write_text(""), "", "the file is empty"),
    "no rows": (lambda d: (d / "test.tsv").write_text("text\tlabel\n"), "", "has no rows"),
    "columns": (
        lambda d: (d / "train.tsv").write_text("words\tclass\na\tb\n"),
        "",
        "must name the columns text, label",
    ),
    "a column more": (
        lambda d: (d / "test.tsv").write_text("text\tlabel\na\tgood\tc\n"),
        "",
        "test.tsv line 2: 3 columns",
    ),
    "no text": (lambda d: (d / "test.tsv").write_text("text\tlabel\n \tgood\n"), "", "line 2: text is no text"),
    "encoding": (
        lambda d: (d / "valid.tsv").write_bytes("text\tlabel\nété\tgood\n".encode("latin-1")),
        "",
        "valid.tsv line 2 is not UTF-8",
    ),
    "zero byte": (lambda d: (d / "test.tsv").write_bytes(b"text\tlabel\na\0\tgood\n"), "", "line 2: a zero byte"),
    "label": (
        lambda d: (d / "test.tsv").write_text("text\tlabel\na\tugly\n"),
        "",
        "test.tsv line 2: the model was not trained on the label 'ugly', it knows bad, good",
    ),
    "one class": (lambda d: (d / "train.tsv").write_text("text\tlabel\na\tgood\n"), "", "two classes at least"),
}


@pytest.mark.parametrize("spoil, other, message", BAD.values(), ids=BAD)
def test_bad_data_is_one_line_and_leaves_nothing(reviews, encoder, tmp_path, capsys, spoil, other, message):
    spoil(reviews)
    data = str(tmp_path / other) if other else str(reviews)
    given = ["finetune", "classification", "--model", str(encoder), "--data", data, "--out", str(tmp_path / "out")]
    assert cli(given) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_models_that_do_not_fit_are_one_line(reviews, encoder, decoder, tmp_path, capsys):
    def refused(*given):
        assert cli(["finetune", *map(str, given), "--data", str(reviews), "--out", str(tmp_path / "out")]) == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    assert "reads from left to right" in refused("classification", "--model", decoder)
    assert "one for language-model is needed" in refused("language", "--model", encoder)
    quantize.run(decoder, tmp_path / "packed", measure=False)
    assert "packed in few bits; fine-tune the model" in refused("language", "--model", tmp_path / "packed", "--lora", 2)
    assert "is no folder" in refused("classification", "--model", tmp_path / "gone")
    assert "no linear layer named like 'xyz'" in refused(
        "classification", "--model", encoder, "--lora", 2, "--targets", "xyz"
    )
    assert "a number of layers up to 2" in refused("classification", "--model", encoder, "--freeze", 7)
    assert "max-len must be between 8 and 128" in refused("classification", "--model", encoder, "--max-len", 1000)
    assert "layer-decay must be" in refused("classification", "--model", encoder, "--layer-decay", 2)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", '{"messages": 3}\n', "line 1: messages must be a list"),
        ("a.jsonl", "{nonsense\n", "line 1 is not JSON"),
        ("a.jsonl", "[1]\n", "line 1: an object with"),
        ("a.jsonl", '{"messages": [{"role": "cat", "content": "x"}]}\n', "line 1: messages[0] must have a role"),
        ("a.txt", "\n \n", "has no text"),
    ],
)
def test_bad_conversations(decoder, tmp_path, capsys, name, content, message):
    (tmp_path / name).write_text(content)
    assert cli(["evaluate", str(decoder), str(tmp_path / name), "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.json", "{}", "is not in SQuAD's format"),
        ("a.json", "{", "is not in SQuAD's format"),
        ("a.tsv", "question\tcontext\tanswer\nq\tc d\te\n", "the answer 'e' does not stand in the context"),
        ("a.tsv", "question\tcontext\tanswer\tstart\nq\tc d\td\tx\n", "start must be a number of characters, got 'x'"),
    ],
)
def test_bad_questions(words, tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        list(TASKS["question-answering"](words, 64).rows(tmp_path / name))
