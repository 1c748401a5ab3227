"""What all tasks share: examples, batches of about one length, and how a model of ours or of transformers is called."""

import itertools

import torch

from fastllm.llm.batches import Epochs, bucketed, pad
from fastllm.llm.ranks import Ranks
from fastllm.model import Transformer

ALONE = Ranks()
POOL = 50  # batches of rows that are sorted by length together where they are read one by one
SHOWN = 8  # examples among the scores


class Task:
    """One kind of fine-tuning. A subclass says how rows become examples, those a batch, and a batch a loss or scores.

    A batch is a dict of tensors; "tokens" [B, T] and "mask" [B, T] (None: nothing is padding) are what a model reads.
    """

    name = ""  # as in a model's folder: meta["task"]
    extensions = (".tsv", ".jsonl")
    default_length = 256
    headed = False  # whether a new head is put on the model

    def __init__(self, tokenizer, max_len, meta=None):
        self.tokenizer, self.max_len, self.meta = tokenizer, max_len, meta or {}

    @classmethod
    def learn(cls, path) -> dict:
        """What the training file says about the model to be: names of classes and the like."""
        return {}

    def rows(self, path):
        """The rows of a file, one by one. Raises ValueError for what is none."""
        raise NotImplementedError

    def encode(self, row) -> list:
        """The examples of a row: a dict each, with "tokens"."""
        raise NotImplementedError

    def collate(self, examples) -> dict:
        raise NotImplementedError

    def loss(self, model, batch):
        """The mean loss over weight(batch) things."""
        raise NotImplementedError

    def weight(self, batch) -> int:
        return len(batch["tokens"])

    def scores(self, model, rows, batch, quick=False, ranks=ALONE) -> dict:
        """Scores of a model in eval() on rows, "loss" among them; quick leaves out what has to be generated.

        "examples" are a few rows with the model's answer, of a classifier wrong ones. With `ranks`, each of which has
        all rows, each takes its share of them, and all return the scores of all.
        """
        raise NotImplementedError

    def load(self, path) -> list:
        """Every example of a file. Raises ValueError where there is none."""
        found = [example for row in self.rows(path) for example in self.encode(row)]
        if not found:
            raise ValueError(f"{path} has no rows")
        return found

    def epochs(self, examples, size, seed) -> Epochs:
        """Passes over the examples without end."""
        lengths = [length_of(example) for example in examples]
        return Epochs(lengths, size, seed, lambda indices: self.collate([examples[i] for i in indices]))

    def batches(self, rows, size):
        """Batches of the examples of rows that come one by one, of about one length each."""
        examples = (example for row in rows for example in self.encode(row))
        while pool := list(itertools.islice(examples, POOL * size)):
            for chosen in bucketed([length_of(e) for e in pool], size, None):
                yield [pool[i] for i in chosen]

    def cut(self, ids: list[int], room: int | None = None) -> list[int]:
        """At most `room` (max_len) tokens; a token that a tokenizer puts behind every text stays behind it."""
        room = room or self.max_len
        if len(ids) <= room:
            return ids
        return ids[:room] if self.tokenizer.backend.post_processor is None else [*ids[: room - 1], ids[-1]]

    def ids(self, text: str) -> list[int]:
        """Tokens of a text, one at least."""
        return self.tokenizer.encode(text) or [self.tokenizer.unknown or self.tokenizer.eos or 0]


def length_of(example) -> int:
    return len(example["tokens"])


def padded(task, examples, **more) -> dict:
    """tokens and mask of a batch."""
    tokens, mask = pad([example["tokens"] for example in examples], task.tokenizer.pad or 0)
    return dict(tokens=tokens, mask=mask) | more


def few(examples: list, ranks) -> list:
    """Of the examples that each rank would show."""
    return list(itertools.chain(*ranks.gather(examples)))[:SHOWN]


def real_tokens(batch) -> int:
    return batch["tokens"].numel() if batch["mask"] is None else int(batch["mask"].sum())


def bare(model):
    """The model itself, of one that is spread over processes."""
    return model.module if isinstance(model, torch.nn.parallel.DistributedDataParallel) else model


def is_ours(model) -> bool:
    return isinstance(bare(model), Transformer)


def logits_of(model, batch):
    """What a model with a head on its encoder says to a batch; for one of transformers the whole output."""
    if is_ours(model):
        return model(batch["tokens"], batch["mask"])
    given = dict(input_ids=batch["tokens"], attention_mask=batch["mask"])
    if batch.get("types") is not None and getattr(bare(model).config, "type_vocab_size", 0) > 1:
        given["token_type_ids"] = batch["types"]
    return model(**given)
