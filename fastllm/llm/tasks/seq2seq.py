"""Sequence to sequence: a source text, and the target text that a model makes of it (translation, summaries)."""

import torch

import fastllm
from fastllm.llm import rows
from fastllm.llm.batches import pad
from fastllm.llm.metrics import Perplexity, Rouge, Translation
from fastllm.llm.tasks.base import SHOWN, Task, is_ours, padded

IGNORED = -100


class Seq2Seq(Task):
    """Rows with source and target. The scores are those of greedy decoding; "loss" is that of the true targets."""

    name = "encoder-decoder"

    def rows(self, path):
        return (row for _, row in rows.read(path, ("source", "target")))

    def encode(self, row):
        source, target = self.ids(row["source"]), self.ids(row["target"])
        if self.tokenizer.backend.post_processor is None:  # ours: nothing marks an end yet
            source, target = source[: self.max_len - 1], target[: self.max_len - 1]
            source, target = [*source, self.tokenizer.eos], [*target, self.tokenizer.eos]
        return [dict(tokens=self.cut(source), labels=self.cut(target), pair=(row["source"], row["target"]))]

    def collate(self, examples):
        labels, _ = pad([example["labels"] for example in examples], IGNORED)
        start = torch.full((len(examples), 1), self.tokenizer.bos or 0)
        begun = torch.cat([start, labels[:, :-1].masked_fill(labels[:, :-1] == IGNORED, self.tokenizer.pad or 0)], 1)
        return padded(self, examples, labels=labels, begun=begun)

    def weight(self, batch):
        return int((batch["labels"] != IGNORED).sum())

    def loss(self, model, batch):
        if is_ours(model):
            given = dict(source=batch["tokens"], source_mask=batch["mask"], targets=batch["labels"])
            return model(batch["begun"], **given)
        return model(input_ids=batch["tokens"], attention_mask=batch["mask"], labels=batch["labels"]).loss

    def loss_sum(self, model, batch):
        """On the kernels the logits of our models are never all in memory."""
        if not is_ours(model) or not model.accelerated:
            return self.loss(model, batch) * self.weight(batch)
        context = model.encode(batch["tokens"], batch["mask"])
        x = model.decode(batch["begun"], None, context, batch["mask"])
        return fastllm.linear_cross_entropy(x, model.head.weight, batch["labels"], reduction="sum")

    def generate(self, model, batch, count) -> list[str]:
        """The likeliest token after the other, up to `count` of them."""
        tokenizer = self.tokenizer
        if is_ours(model):
            count = min(count, model.config.max_len - 1)
            start = batch["begun"][:, :1]
            made = model.generate(start, count, source=batch["tokens"], source_mask=batch["mask"], stop=tokenizer.eos)
        else:
            mask = torch.ones_like(batch["tokens"]) if batch["mask"] is None else batch["mask"].long()
            made = model.generate(
                input_ids=batch["tokens"], attention_mask=mask, max_new_tokens=count, do_sample=False, num_beams=1
            )
        texts = []
        for ids in made[:, 1:].tolist():
            if tokenizer.eos in ids:
                ids = ids[: ids.index(tokenizer.eos)]
            texts.append(tokenizer.decode(ids))
        return texts

    @torch.no_grad()
    def scores(self, model, rows, batch, quick=False):
        perplexity, translation, rouge, shown, count = Perplexity(), None, None, [], 0
        if not quick:
            translation, rouge = Translation(), Rouge()
        for examples in self.batches(rows, batch):
            part = self.collate(examples)
            perplexity.add(float(self.loss_sum(model, part)), self.weight(part))
            count += len(examples)
            if quick:
                continue
            longest = max(len(example["labels"]) for example in examples)
            made = self.generate(model, part, min(self.max_len, 2 * longest + 8))
            for example, text in zip(examples, made, strict=True):
                translation.add(text, example["pair"][1])
                rouge.add(text, example["pair"][1])
                if len(shown) < SHOWN:
                    shown.append(dict(source=example["pair"][0], target=example["pair"][1], answer=text))
        found = dict(rows=count) | perplexity.scores()
        return found if quick else found | translation.scores() | rouge.scores() | dict(examples=shown)
