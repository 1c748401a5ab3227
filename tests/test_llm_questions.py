"""A user's own questions and answers: read in every form, split by article or context, and what finetune reads."""

import itertools
import json

import pytest
import torch

pytest.importorskip("tokenizers")

from fastllm.cli import main as cli
from fastllm.llm import corpus, data, spans
from fastllm.llm.sources import SPLITS
from fastllm.llm.tasks import TASKS
from fastllm.llm.tokens import Tokenizer


def rows_in(folder):
    found = {
        split: [json.loads(line) for line in open(folder / f"{split}.jsonl", encoding="utf-8")] for split in SPLITS
    }
    assert data.describe(folder)["splits"] == {split: len(rows) for split, rows in found.items()}
    return found


def article(n, *more):
    context = f"Town {n} has {n + 2} bridges.\r\nIts river is the Cafe\u0301 of town {n}.  \n\n\n\nNobody knows {n}."
    answers = [f"{n + 2} bridges", f"town {n}", f"{n}"]
    starts = [context.index(answers[0]), context.index(answers[1]), context.rindex(answers[2])]
    asked = ["How many bridges?", " Which\ttown? ", "Who\u0000?"]
    qas = [
        dict(id=f"{n}-{i}", question=asked[i], answers=[dict(text=answers[i], answer_start=starts[i])])
        for i in range(3)
    ]
    qas[0]["answers"] *= 2  # several people said so
    qas.append(dict(id=f"{n}-3", question="Who lives there?", is_impossible=True, answers=[]))
    return dict(title=f"Town {n}", paragraphs=[dict(context=context, qas=[*qas, *more])])


def squad(path, count=60, wrong=(), indent=None):
    articles = [article(n, *(wrong if n == 7 else ())) for n in range(count)]
    path.write_text(json.dumps(dict(version="2.0", data=articles), indent=indent))
    return articles


def check_spans(rows):
    for row in rows:
        assert (
            row["answers"] == []
            and row["start"] is None
            or row["context"][row["start"] :].startswith(row["answers"][0])
        )


def test_squad_is_split_by_article_and_cleaned(tmp_path, capsys):
    wrong = [
        dict(question="Where?", answers=[dict(text="nowhere", answer_start=0)]),
        dict(question="Where?", answers=[dict(text="Town", answer_start=1)]),
        dict(question=" ", answers=[]),
        dict(question="What?"),
        dict(question="half \ud83d", answers=[]),
        "no object",
    ]
    squad(tmp_path / "towns.json", wrong=wrong, indent=1)
    assert cli(["data", str(tmp_path / "towns.json"), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert (
        f"next: fastllm finetune questions --model MODEL --data {tmp_path / 'out'}" in said
        and "6 rows rejected" in said
    )
    rows = rows_in(tmp_path / "out")
    assert sum(map(len, rows.values())) == 240
    towns = [{row["context"].split()[1] for row in rows[split]} for split in SPLITS]
    assert all(towns) and sum(map(len, towns)) == 60 == len(set.union(*towns))
    for split in SPLITS:
        check_spans(rows[split])
    found = [row for row in sum(rows.values(), []) if row["context"].startswith("Town 5 ")]
    assert [row["question"] for row in found] == ["How many bridges?", "Which town?", "Who?", "Who lives there?"]
    assert found[0]["answers"] == ["7 bridges"] and found[3]["answers"] == []
    assert found[0]["context"].endswith("Caf\u00e9 of town 5.\n\nNobody knows 5.")
    assert found[2]["start"] == found[0]["context"].rindex("5")  # not the first 5
    lines = (tmp_path / "towns.json").read_text().split("\n")
    rejected = [line.split("\t") for line in open(tmp_path / "out" / "rejected.tsv", encoding="utf-8")][1:]
    reasons = ["the answer does not stand in the context"] * 2
    reasons += ["no question", "no answer", "half of a surrogate pair", "no question"]
    assert [row[2] for row in rejected] == reasons
    for row in rejected[:5]:
        assert '"question"' in lines[int(row[1])]  # the first line of an object is its brace


@pytest.mark.parametrize("form", ["answer", "answers", "lists", "objects"])
def test_lines_of_json_and_tables(tmp_path, form):
    """The same rows in each form, as `data` and then `finetune` read them; a context is in one split."""
    rows, expected = [], []
    for n in range(80):
        context = f"the cat {n // 2} is on the mat {n // 2}"
        answer = "" if n % 4 == 3 else f"{n // 2}"
        start = context.rindex(str(n // 2)) if n % 2 else context.index(str(n // 2))
        expected.append((f"where {n}", context, [answer] if answer else [], start if answer else None))
        row = dict(question=f"where {n}", context=context, id=n)
        texts, starts = ([answer], [start]) if answer else ([], [])
        row |= {
            "answer": dict(answer=answer, start=start),
            "answers": dict(answers=texts, start=start),
            "lists": dict(answers=dict(text=texts, answer_start=starts)),
            "objects": dict(answers=[dict(text=t, answer_start=s) for t, s in zip(texts, starts, strict=True)]),
        }[form]
        rows.append(row)
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf" + "\r\n".join(json.dumps(row) for row in [*rows, rows[3]]).encode() + b"\r\n[1]\n{"
    )
    files = [path]
    if form == "answer":
        table = "\n".join("\t".join(map(str, row.values())) for row in rows)
        files.append(tmp_path / "b.tsv")
        files[1].write_text("\t".join(rows[0]) + "\n" + table + "\nwhere\tcontext\t3\t\n")
    for path in files:
        meta = data.build_from_files([path], tmp_path / path.suffix)
        found = rows_in(tmp_path / path.suffix)
        contexts = [{row["context"] for row in found[split]} for split in SPLITS]
        assert all(contexts) and sum(map(len, contexts)) == 40
        count = dict(read=80 + (path.suffix == ".jsonl"), duplicates=path.suffix == ".jsonl")
        why = {"no JSON object": 2} if count["duplicates"] else {"with another number of columns (4, not 5)": 1}
        assert meta["left_out"] == count | why
        task = TASKS["question-answering"](Tokenizer.bytes(), 64)
        read = [row for split in SPLITS for row in task.rows(tmp_path / path.suffix / f"{split}.jsonl")]
        assert sorted(map(str, read)) == sorted(
            str(dict(question=q, context=c, answers=a, start=s)) for q, c, a, s in expected
        )
    direct = list(itertools.islice(task.rows(files[-1]), 80)) if form == "answer" else None
    assert direct is None or direct == [dict(question=q, context=c, answers=a, start=s) for q, c, a, s in expected]


def test_a_context_has_one_home(tmp_path):
    """Under two titles, by --group, and with other blanks: in one split all the same."""
    rows = [dict(title=f"t{n}", question=f"q {n}", context=f"Same  context {n // 4}", answers=[]) for n in range(200)]
    rows[1::2] = [row | dict(context=row["context"].lower().replace("  ", " ")) for row in rows[1::2]]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for group in (None, "title", "question"):
        data.build_from_files([tmp_path / "a.jsonl"], tmp_path / f"by {group}", group=group)
        found = rows_in(tmp_path / f"by {group}")
        homes = [{row["context"].lower().split()[-1] for row in found[split]} for split in SPLITS]
        assert sum(map(len, homes)) == 50 == len(set.union(*homes))
    meta = data.build_from_files([tmp_path / "a.jsonl"], tmp_path / "b", group="title")
    assert meta["splits"] == rows_counts(tmp_path / "by title")
    with pytest.raises(ValueError, match=r"leave train empty.*rejected: .*a.jsonl:1 \(no page\)"):
        data.build_from_files([tmp_path / "a.jsonl"], tmp_path / "c", group="page")


def rows_counts(folder):
    return {split: len(rows) for split, rows in rows_in(folder).items()}


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.json", '{"data": 3}', "is not in SQuAD's format"),
        ("a.json", "{nonsense", "is not in SQuAD's format"),
        ("a.json", "", "is empty"),
        ("a.json", "\udcff", "is not all in the encoding"),
        ("a.tsv", "question\tcontext\nq\tc\n", "must name the columns"),
        ("a.jsonl", '{"question": "q", "context": "c"}', r"a.jsonl:1 \(no answer\)"),
    ],
)
def test_bad_files_are_one_line_and_leave_nothing(tmp_path, capsys, name, content, message):
    (tmp_path / name).write_text(content, errors="surrogateescape")
    assert cli(["data", str(tmp_path / name), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and message.replace("\\", "") in said and not (tmp_path / "out").exists()


def test_few_articles_are_split_by_context_when_asked(tmp_path, capsys):
    one = dict(title="one", paragraphs=[paragraph for n in range(60) for paragraph in article(n)["paragraphs"]])
    (tmp_path / "a.json").write_text(json.dumps(dict(data=[one])))
    assert cli(["data", str(tmp_path / "a.json"), "--out", str(tmp_path / "out")]) == 2
    assert "--group context" in capsys.readouterr().err
    assert cli(["data", str(tmp_path / "a.json"), "--out", str(tmp_path / "out"), "--group", "context"]) == 0
    assert sum(rows_counts(tmp_path / "out").values()) == 240


def test_a_span_stays_where_it_was():
    context = "b \u0000\u0000\u0000 a\r\n\r\n\r\n  b  \nb"
    for start, kept in ((0, 0), (15, 8), (19, 10)):
        row = spans.cleaned(spans.checked(dict(question="q", context=context, answer="b", start=start)), corpus.clean)
        assert row["context"] == "b  a\n\n  b\nb" and row["start"] == kept
    with pytest.raises(spans.Unusable, match="does not stand in the context"):
        spans.cleaned(dict(question="q", context="ae\u0301", answers=["e"], start=1), corpus.clean)


def test_finetune_reads_the_folder(tmp_path):
    pytest.importorskip("safetensors")
    from fastllm.llm import finetune
    from fastllm.llm.checkpoint import save_model
    from fastllm.model import Config, Transformer

    squad(tmp_path / "towns.json", count=30)
    data.build_from_files([tmp_path / "towns.json"], tmp_path / "towns")
    tokenizer = Tokenizer.train_words([article(n)["paragraphs"][0]["context"] for n in range(30)], 100)
    torch.manual_seed(0)
    sizes = dict(d_model=16, heads=2, layers=1, d_ff=32, dropout=0.0, max_len=64)
    save_model(tmp_path / "m", Transformer(Config(vocab=tokenizer.size, kind="encoder", **sizes)), tokenizer)
    found = finetune.run("questions", tmp_path / "m", tmp_path / "towns", tmp_path / "run", epochs=2, lr=1e-2)
    assert found["test"]["rows"] == rows_counts(tmp_path / "towns")["test"]
    assert found["history"]["loss"][-1] < found["history"]["loss"][0]
