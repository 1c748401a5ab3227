"""Sequence to sequence: a source text, and the target text that a model makes of it (translation, summaries)."""

import weakref

import torch
from torch import nn

import fastllm
from fastllm.llm import rows
from fastllm.llm.batches import pad
from fastllm.llm.metrics import Perplexity, Rouge, Translation
from fastllm.llm.tasks.base import ALONE, SHOWN, Task, few, is_ours, padded
from fastllm.patch import is_accelerated

IGNORED = -100


class Seq2Seq(Task):
    """Rows with source and target. The scores are those of greedy decoding; "loss" is that of the true targets."""

    name = "encoder-decoder"

    def __init__(self, tokenizer, max_len, meta=None):
        super().__init__(tokenizer, max_len, meta)
        self._ends = weakref.WeakKeyDictionary()  # model -> whether it ends in its head

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
        return loss_of(model, batch)

    def loss_sum(self, model, batch):
        """On the kernels the logits are never all in memory, but for models of transformers that do more to their
        hidden states, behind the last of them, than multiply by the head and add a bias."""
        options = dict(reduction="sum", ignore_index=IGNORED)
        if is_ours(model) and model.accelerated:
            context = model.encode(batch["tokens"], batch["mask"])
            x = model.decode(batch["begun"], None, context, batch["mask"])
            return fastllm.linear_cross_entropy(x, model.head_weight(x.dtype), batch["labels"], **options)
        if not is_ours(model) and is_accelerated(model) and self.ends_in_head(model, batch):
            x, head = before_head(model, **theirs(batch)), model.get_output_embeddings()
            options["linear_bias"] = bias_of(model, head)
            return fastllm.linear_cross_entropy(x, head.weight, batch["labels"], **options)
        return self.loss(model, batch) * self.weight(batch)

    def ends_in_head(self, model, batch) -> bool:
        """Whether logits are head(x) + a bias and nothing else: tried on one row, once for each model."""
        if model not in self._ends:
            row = theirs({name: None if x is None else x[:1] for name, x in batch.items()})
            x, head = before_head(model, **row), model.get_output_embeddings()
            self._ends[model] = x is not None and isinstance(head, nn.Linear)
            if self._ends[model]:
                extra = getattr(model, "final_logits_bias", None)
                own = head(x) if extra is None else head(x) + extra
                self._ends[model] = torch.equal(own, model(**row).logits)
        return self._ends[model]

    def room(self, example) -> int:
        """How many tokens an answer may have."""
        return min(self.max_len, 2 * len(example["labels"]) + 8)

    def generate(self, model, batch, counts, ranks=ALONE) -> list[str]:
        """The likeliest token after the other, up to counts[n] of them in row n."""
        tokenizer, count = self.tokenizer, max(counts)
        if ranks.lockstep:
            count = max(ranks.gather(count))
        if is_ours(model):
            given = dict(source=batch["tokens"], source_mask=batch["mask"], stop=tokenizer.eos)
            if ranks.lockstep:
                given["ended"] = lambda done: all(ranks.gather(bool(done.all())))
            made = model.generate(batch["begun"][:, :1], min(count, model.config.max_len - 1), **given)
        else:
            mask = torch.ones_like(batch["tokens"]) if batch["mask"] is None else batch["mask"].long()
            given = dict(do_sample=False, num_beams=1, synced_gpus=ranks.lockstep)
            made = model.generate(input_ids=batch["tokens"], attention_mask=mask, max_new_tokens=count, **given)
        texts = []
        for ids, own in zip(made[:, 1:].tolist(), counts, strict=True):
            ids = ids[:own]
            if tokenizer.eos in ids:
                ids = ids[: ids.index(tokenizer.eos)]
            texts.append(tokenizer.decode(ids))
        return texts

    @torch.no_grad()
    def scores(self, model, rows, batch, quick=False, ranks=ALONE):
        perplexity, translation, rouge, shown, count = Perplexity(), None, None, [], 0
        if not quick:
            translation, rouge = Translation(), Rouge()
        for examples, counts in ranks.in_step(self.batches(ranks.share(rows), batch)):
            part = self.collate(examples)
            loss = float(self.loss_sum(model, part))
            made = [] if quick else self.generate(model, part, [self.room(example) for example in examples], ranks)
            if not counts:
                continue
            perplexity.add(loss, self.weight(part))
            count += len(examples)
            for example, text in zip(examples, made):
                translation.add(text, example["pair"][1])
                rouge.add(text, example["pair"][1])
                if len(shown) < SHOWN:
                    shown.append(dict(source=example["pair"][0], target=example["pair"][1], answer=text))
        found = dict(rows=sum(ranks.gather(count))) | perplexity.over(ranks).scores()
        if quick:
            return found
        found |= translation.over(ranks).scores() | rouge.over(ranks).scores()
        return found | dict(examples=few(shown, ranks))


def loss_of(model, batch):
    """The mean cross-entropy of a batch's targets."""
    if is_ours(model):
        given = dict(source=batch["tokens"], source_mask=batch["mask"], targets=batch["labels"])
        return model(batch["begun"], **given)
    return model(**theirs(batch)).loss


def theirs(batch) -> dict:
    """A batch as models of transformers take it; what their decoder begins with they make of the labels."""
    return dict(input_ids=batch["tokens"], attention_mask=batch["mask"], labels=batch["labels"])


class _Reached(Exception):
    """The head was called; with its input."""


def before_head(model, **inputs):
    """What a model of transformers would give to its head, [B, T, d], which is not computed; None where it is not
    called."""

    def stop(head, args):
        raise _Reached(args[0])

    hook = model.get_output_embeddings().register_forward_pre_hook(stop)
    try:
        model(**inputs)
    except _Reached as reached:
        return reached.args[0]
    finally:
        hook.remove()
    return None


def bias_of(model, head):
    """What is added to head.weight @ x: [V], or None."""
    own, extra = head.bias, getattr(model, "final_logits_bias", None)
    found = [bias.flatten() for bias in (own, extra) if bias is not None]
    return sum(found) if found else None
