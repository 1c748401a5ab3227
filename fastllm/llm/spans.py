"""Questions whose answers are spans of a text, as files have them: SQuAD's JSON, lines of JSON, tables.

A row has question and context (str), and its answers in one of these ways: "answer", a text ("" for none), with or
without "start", where in the context it stands, in characters; "answers", a list of texts, with or without "start" of
the first; SQuAD's "answers", a list of {"text", "answer_start"}, or one such object of lists. "is_impossible" says that
there is none.
"""

import bisect
import json
from json.decoder import JSONObject
from json.scanner import py_make_scanner

MARK = "\uffff"  # no character, so no text's, and nothing that Unicode composes with another
LINE = "\0line"  # of an object in a JSON file: the line that it begins on; no key of a file is like it


class Unusable(ValueError):
    """A row that says nothing to learn; `reason` is the kind of mistake, to be counted."""

    def __init__(self, reason, details=None):
        super().__init__(details or reason)
        self.reason = reason


def checked(row: dict) -> dict:
    """question, context, answers (list of str, empty where there is none), start (int, of the first; None).

    Without a start the first answer is where the context has it first. Raises `Unusable`.
    """
    for name in ("question", "context"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            raise Unusable(f"no {name}")
    context, (answers, start) = row["context"], _answers(row)
    if not all(isinstance(answer, str) for answer in answers):
        raise Unusable("an answer that is no text")
    if not answers:
        return dict(question=row["question"], context=context, answers=[], start=None)
    try:
        start = context.find(answers[0]) if start in (None, "") else int(start)
    except (TypeError, ValueError):
        what = "start must be a number of characters"
        raise Unusable(what, f"{what}, got {start!r}") from None
    if start < 0 or context[start : start + len(answers[0])] != answers[0]:
        what = "does not stand in the context"
        raise Unusable(f"the answer {what}", f"the answer {answers[0]!r} {what} at {start}")
    return dict(question=row["question"], context=context, answers=answers, start=start)


def cleaned(row: dict, clean) -> dict:
    """A row of `checked` whose texts `clean` has gone over; the first answer stays where it was, or next to it.

    Raises `Unusable` where one does not stand in the context afterwards.
    """
    context, question = clean(row["context"]).strip(), " ".join(clean(row["question"]).split())
    if not context or not question:
        raise Unusable(f"no {'question' if context else 'context'}")
    answers = list(dict.fromkeys(filter(None, (clean(answer).strip() for answer in row["answers"]))))
    if not answers:
        if row["answers"]:
            raise Unusable("an answer without text")
        return dict(question=question, context=context, answers=[], start=None)
    before, behind = row["context"][: row["start"]], row["context"][row["start"] :]
    near, starts, at = clean(before + MARK + behind).strip().index(MARK), [], -1
    while (at := context.find(answers[0], at + 1)) >= 0:
        starts.append(at)
    if not starts:
        raise Unusable("the answer does not stand in the context")
    start = min(starts, key=lambda start: abs(start - near))
    return dict(question=question, context=context, answers=answers, start=start)


def _answers(row):
    """(texts, start of the first or None); what is wrong in them is for `checked` to find."""
    if str(row.get("is_impossible")).lower() in ("true", "1"):
        return [], None
    found = row.get("answers")
    if found is None:
        if row.get("answer") is None:
            raise Unusable("no answer", 'no answer; "" says that there is none in the context')
        return ([row["answer"]] if row["answer"] != "" else []), row.get("start")
    if isinstance(found, dict):
        starts = found.get("answer_start") or [None]
        found, start = found.get("text"), starts[0] if isinstance(starts, list) else starts
    elif isinstance(found, list) and found and all(isinstance(answer, dict) for answer in found):
        found, start = [answer.get("text") for answer in found], found[0].get("answer_start")
    else:
        start = row.get("start")
    if not isinstance(found, list):
        raise Unusable("answers must be a list of texts")
    return found, start


def read_json(text: str):
    """(line number, row) of the questions in a JSON file: SQuAD's (1.1 or 2.0), whose rows say their article's title
    too, or a list of rows. Raises ValueError for other JSON; a question that is no object is a row {}."""
    try:
        found = _Located(text).decode(text)
        for article in found if isinstance(found, list) else found["data"]:
            if "question" in article:
                yield article[LINE], article
                continue
            title = {"title": article["title"]} if "title" in article else {}
            for paragraph in article["paragraphs"]:
                for one in paragraph["qas"]:
                    one = one if isinstance(one, dict) else {}
                    yield one.get(LINE, paragraph[LINE]), one | title | dict(context=paragraph["context"])
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"not in SQuAD's format (data, paragraphs, qas, answers): {what}") from None


class _Located(json.JSONDecoder):
    """Every object has its line under `LINE`."""

    def __init__(self, text):
        super().__init__()
        ends = [at for at, letter in enumerate(text) if letter == "\n"]

        def parse(begin, *rest):
            found, end = JSONObject(begin, *rest)
            found[LINE] = bisect.bisect_left(ends, begin[1]) + 1
            return found, end

        self.parse_object = parse
        self.scan_once = py_make_scanner(self)
