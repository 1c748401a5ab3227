"""Language modelling: conversations, prompts with responses, or plain text. A prompt is read, not learnt."""

import torch
import torch.nn.functional as F

import fastllm
from fastllm.llm import rows
from fastllm.llm.batches import pad
from fastllm.llm.metrics import Perplexity
from fastllm.llm.tasks.base import ALONE, Task, is_ours, padded
from fastllm.llm.tokens import common

IGNORED = -100


class Language(Task):
    """Rows of .jsonl with messages ([{"role": ..., "content": ...}, ...]), of .tsv with prompt and response, or .txt.

    Of a conversation the assistant's turns are learnt, and each one's end; everything else is masked out of the loss.
    The tokenizer's chat template makes the text, or a plain one where it has none.
    """

    name = "language-model"
    extensions = (".jsonl", ".tsv", ".txt")
    default_length = 512

    def __init__(self, tokenizer, max_len, meta=None):
        super().__init__(tokenizer, max_len, meta)
        self.template = self.meta.get("template")  # a ChatTemplate, where conversations are read

    def rows(self, path):
        if path.suffix == ".txt":
            yield from self._windows(path)
        elif path.suffix == ".tsv":
            for line, row in rows.read(path, ("prompt", "response")):
                pair = (("user", row["prompt"]), ("assistant", row["response"]))
                yield dict(where=f"{path} line {line}", messages=[dict(role=r, content=c) for r, c in pair])
        else:
            for line, row in rows.read(path, (), ("messages",)):
                yield dict(where=f"{path} line {line}", messages=row.get("messages"))

    def _windows(self, path):
        """Windows of max_len tokens side by side, each predicted from the token before it on."""
        start = [self.tokenizer.bos] if self.tokenizer.encode("")[:1] == [self.tokenizer.bos] else []
        ids, size = list(start), 0
        for text in passages(path):
            ids += self.tokenizer.encode(text, add_special_tokens=False)
            size += len(text.encode())
            while len(ids) > self.max_len:
                yield dict(tokens=ids[: self.max_len + 1], bytes=size)
                ids, size = ids[self.max_len :] if not start else start + ids[self.max_len + 1 :], 0
        if len(ids) > 1:
            yield dict(tokens=ids, bytes=size)

    def encode(self, row):
        if "tokens" in row:
            return [dict(tokens=row["tokens"], labels=[IGNORED, *row["tokens"][1:]], bytes=row["bytes"])]
        try:
            ids, labels = self.conversation(row["messages"])
        except ValueError as error:
            raise ValueError(f"{row['where']}: {error}") from None
        return [dict(tokens=ids, labels=labels, bytes=0)]

    def conversation(self, messages):
        """(tokens, labels) of a conversation, cut to max_len on the right; labels are -100 where nothing is learnt."""
        ids, labels = [], []
        whole = self.template.encode(messages, answer=False)
        for n, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self.template.encode(messages[:n]) if n else []
            upto = self.template.encode(messages[: n + 1], answer=False) if n + 1 < len(messages) else whole
            if self.template.plain and self.tokenizer.eos is not None and n + 1 == len(messages):
                upto = [*upto, self.tokenizer.eos]
            begin = common(prompt, upto)
            labels += [IGNORED] * (begin - len(labels)) + upto[max(begin, len(labels)) :]
            ids = upto
        if not any(label != IGNORED for label in labels[: self.max_len]):
            what = "no turn of the assistant" if not ids else f"the answer begins behind max-len {self.max_len}"
            raise ValueError(f"nothing to learn here: {what}")
        return ids[: self.max_len], labels[: self.max_len]

    def collate(self, examples):
        labels, _ = pad([example["labels"] for example in examples], IGNORED)
        return padded(self, examples, labels=labels, bytes=sum(example["bytes"] for example in examples))

    def weight(self, batch):
        return int((batch["labels"][:, 1:] != IGNORED).sum())

    def loss(self, model, batch):
        # What is padded stands behind everything that is learnt: causal attention never sees it, and needs no mask.
        if is_ours(model):
            return model(batch["tokens"][:, :-1], targets=batch["labels"][:, 1:])
        return model(input_ids=batch["tokens"], labels=batch["labels"]).loss

    @torch.no_grad()
    def scores(self, model, rows, batch, quick=False, ranks=ALONE):
        found = Perplexity()
        for examples, counts in ranks.in_step(self.batches(ranks.share(rows), batch)):
            part = self.collate(examples)
            loss = float(loss_sum(self, model, part))
            if counts:
                found.add(loss, self.weight(part), part["bytes"])
        return found.over(ranks).scores()


def passages(path, size=1 << 16):
    """A text file in pieces of about `size` characters, cut before a line that is not blank."""
    piece, length = [], 0
    for _, line in rows.lines(path):
        if length > size and line.strip():
            yield "".join(piece)
            piece, length = [], 0
        piece.append(line + "\n")
        length += len(line) + 1
    if not piece or not "".join(piece).strip():  # a later piece begins with a line that is not blank
        raise ValueError(f"{path} has no text")
    yield "".join(piece)


def loss_sum(task, model, batch):
    """The summed loss of a language model's batch; on the kernels the logits are never all in memory."""
    if is_ours(model):
        x, targets = model.decode(batch["tokens"][:, :-1]), batch["labels"][:, 1:]
        if model.accelerated:
            return fastllm.linear_cross_entropy(x, model.head_weight(x.dtype), targets, reduction="sum")
        return F.cross_entropy(model.head(x).flatten(0, 1), targets.flatten(), reduction="sum")
    fused = {"skip_logits": True} if "loss" in getattr(model, "_fastllm", ()) else {}
    return model(input_ids=batch["tokens"], labels=batch["labels"], **fused).loss * task.weight(batch)
