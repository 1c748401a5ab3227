"""Extractive question answering: a question, and the span of a text that answers it, if one does."""

import torch
import torch.nn.functional as F

from fastllm.llm import rows, spans
from fastllm.llm.metrics import Answers, Mean
from fastllm.llm.tasks.base import ALONE, SHOWN, Task, few, is_ours, logits_of, padded

LONGEST = 30  # tokens of an answer


class Questions(Task):
    """SQuAD's JSON (1.1 or 2.0), or rows with question, context and answer, as fastllm/llm/spans.py says.

    A context that is too long is read in windows that overlap by half; a question whose answer is not in the window, or
    that has none, points at the first token. Without a start, the answer is where the context has it first.
    """

    name = "question-answering"
    extensions = (".json", ".tsv", ".jsonl")
    default_length = 384
    headed = True

    def __init__(self, tokenizer, max_len, meta=None):
        super().__init__(tokenizer, max_len, meta)
        if tokenizer.language:
            raise ValueError("question-answering: a tokenizer of spaCy's words does not say where in a text they stand")

    def rows(self, path):
        yield from _squad(path) if path.suffix == ".json" else _table(path)

    def encode(self, row):
        """The windows of one row; each knows how many there are."""
        backend, tokenizer = self.tokenizer.backend, self.tokenizer
        backend.encode_special_tokens = True
        question = backend.encode(row["question"], add_special_tokens=False)
        context = backend.encode(row["context"], add_special_tokens=False)
        own = backend.post_processor is None
        extra = 2 if own else backend.num_special_tokens_to_add(is_pair=True)
        question.truncate(max(1, self.max_len // 2 - extra))
        room = self.max_len - len(question.ids) - extra
        context.truncate(room, stride=room // 2)
        windows = []
        for window in (context, *context.overflowing):
            if own:
                head = [tokenizer.bos, *question.ids, tokenizer.eos]
                ids, types = head + window.ids, [0] * len(head) + [1] * len(window.ids)
                spans = [None] * len(head) + list(window.offsets)
            else:
                both = backend.post_process(question, window)
                ids, types = both.ids, both.type_ids
                spans = [o if s == 1 else None for o, s in zip(both.offsets, both.sequence_ids, strict=True)]
            windows.append(dict(tokens=ids, types=types, spans=spans, span=_tokens_of(spans, row), row=row))
        return [window | dict(windows=len(windows)) for window in windows]

    def collate(self, examples):
        T = max(len(example["tokens"]) for example in examples)
        types = torch.tensor([e["types"] + [0] * (T - len(e["types"])) for e in examples])
        inside = [[s is not None for s in e["spans"]] + [False] * (T - len(e["spans"])) for e in examples]
        return padded(
            self,
            examples,
            types=types,
            inside=torch.tensor(inside),
            labels=torch.tensor([example["span"] for example in examples]),
        )

    def logits(self, model, batch):
        """(start, end), each [B, T]; -inf where no answer can be."""
        found = logits_of(model, batch)
        start, end = found.unbind(-1) if is_ours(model) else (found.start_logits, found.end_logits)
        possible = batch["inside"].clone()
        possible[:, 0] = True  # no answer
        return (x.float().masked_fill(~possible, -torch.inf) for x in (start, end))

    def loss(self, model, batch):
        pairs = zip(self.logits(model, batch), batch["labels"].unbind(1), strict=True)
        return sum(F.cross_entropy(logits, label) for logits, label in pairs) / 2

    @torch.no_grad()
    def scores(self, model, rows, batch, quick=False, ranks=ALONE):
        answers, loss, waiting, shown = Answers(), Mean(), {}, []
        for examples, counts in ranks.in_step(self.batches(ranks.share(rows), batch)):
            part = self.collate(examples)
            start, end = self.logits(model, part)
            if not counts:
                continue
            pairs = zip((start, end), part["labels"].unbind(1), strict=True)
            total = sum(float(F.cross_entropy(x, label, reduction="sum")) for x, label in pairs) / 2
            loss.add(total, len(examples))
            for n, example in enumerate(examples):
                row = example["row"]
                found = waiting.setdefault(id(row), [])  # the windows of a row may be in several batches
                found.append((row, *_answer(start[n], end[n], example)))
                if len(found) == example["windows"]:
                    answer = _best(waiting.pop(id(row)))
                    answers.add(answer, row["answers"])
                    if len(shown) < SHOWN:
                        shown.append(dict(question=row["question"], target=" / ".join(row["answers"]), answer=answer))
        answers.over(ranks)
        found = loss.over(ranks).scores() | dict(rows=answers.count) | answers.scores()
        return found | dict(examples=few(shown, ranks))


def _tokens_of(spans, row):
    """The first and last token of the answer, or (0, 0) where it is not whole in this window."""
    if not row["answers"]:
        return 0, 0
    begin, end = row["start"], row["start"] + len(row["answers"][0])
    inside = [n for n, span in enumerate(spans) if span is not None and span[0] < end and span[1] > begin]
    whole = inside and spans[inside[0]][0] <= begin and spans[inside[-1]][1] >= end
    return (inside[0], inside[-1]) if whole else (0, 0)


def _answer(start, end, example):
    """(score over that of no answer, text) of the best span of a window."""
    T = len(example["tokens"])
    scores = start[:T, None] + end[None, :T]
    scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu().logical_not(), -torch.inf)
    scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(LONGEST), -torch.inf)
    nothing = float(scores[0, 0])
    scores[0] = -torch.inf
    best = int(scores.argmax())
    first, last = divmod(best, T)
    if example["spans"][first] is None:
        return -torch.inf, ""
    text = example["row"]["context"][example["spans"][first][0] : example["spans"][last][1]]
    return float(scores[first, last]) - nothing, text


def _best(found):
    """The text of the window that is surest; none where every window says that there is no answer."""
    _, score, text = max(found, key=lambda one: one[1])
    return text if score > 0 else ""


def _table(path):
    for line, row in rows.read(path, ("question", "context"), ("answer", "answers", "start", "is_impossible")):
        yield _checked(f"{path} line {line}", row)


def _squad(path):
    text = "\n".join(line for _, line in rows.lines(path))
    found = spans.read_json(text)
    try:
        for n, (_, row) in enumerate(found):
            yield _checked(f"{path}, question {row.get('id', n)}", row)
    except spans.Unusable:
        raise
    except ValueError as error:
        raise ValueError(f"{path} is {error}") from None


def _checked(where, row):
    try:
        return spans.checked(row)
    except spans.Unusable as error:
        raise spans.Unusable(error.reason, f"{where}: {error}") from None
