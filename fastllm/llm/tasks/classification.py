"""Classification: a text, one of several labels."""

import torch
import torch.nn.functional as F

from fastllm.llm import rows
from fastllm.llm.metrics import Confusion, Mean
from fastllm.llm.tasks.base import ALONE, SHOWN, Task, few, logits_of, padded


class Classification(Task):
    """Rows with text and label. meta["classes"] are the labels of the model, those of its training file in order."""

    name = "classification"
    headed = True

    @classmethod
    def learn(cls, path) -> dict:
        classes = sorted({row["label"] for _, row in rows.read(path, ("text", "label"))})
        if len(classes) < 2:
            raise ValueError(f"{path}: two classes at least are needed, got {', '.join(classes)} alone")
        return dict(classes=classes)

    def __init__(self, tokenizer, max_len, meta=None):
        super().__init__(tokenizer, max_len, meta)
        if not self.meta.get("classes"):
            raise ValueError("classification: the model's folder does not say which classes it knows")
        self.classes = self.meta["classes"]
        self.number = {label: n for n, label in enumerate(self.classes)}

    def rows(self, path):
        for line, row in rows.read(path, ("text", "label")):
            if row["label"] not in self.number:
                known = ", ".join(self.classes[:10]) + ", ..." * (len(self.classes) > 10)
                raise ValueError(
                    f"{path} line {line}: the model was not trained on the label {row['label']!r}, it knows {known};"
                    " remove such rows, or train on some"
                )
            yield row

    def encode(self, row):
        return [dict(tokens=self.cut(self.ids(row["text"])), label=self.number[row["label"]], row=row)]

    def collate(self, examples):
        return padded(self, examples, labels=torch.tensor([example["label"] for example in examples]))

    def loss(self, model, batch):
        return F.cross_entropy(self.logits(model, batch), batch["labels"])

    def logits(self, model, batch):
        found = logits_of(model, batch)
        return found if isinstance(found, torch.Tensor) else found.logits

    @torch.no_grad()
    def scores(self, model, rows, batch, quick=False, ranks=ALONE):
        confusion, loss, mistakes = Confusion(self.classes), Mean(), []
        for examples, counts in ranks.in_step(self.batches(ranks.share(rows), batch)):
            part = self.collate(examples)
            logits = self.logits(model, part)
            if not counts:
                continue
            loss.add(float(F.cross_entropy(logits, part["labels"], reduction="sum")), len(examples))
            found = logits.argmax(-1)
            confusion.add(part["labels"], found)
            for n in (part["labels"] != found).nonzero().flatten().tolist()[: SHOWN - len(mistakes)]:
                mistakes.append(examples[n]["row"] | dict(answer=self.classes[int(found[n])]))
        found = loss.over(ranks).scores() | dict(rows=loss.count) | confusion.over(ranks).scores()
        return found | dict(examples=few(mistakes, ranks))
