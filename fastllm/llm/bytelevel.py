"""The byte-level language model of `fastllm demo`: its perplexity compares to anything that reads bytes."""

import bz2
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from fastllm.llm.batches import Windows
from fastllm.llm.data import SPLITS
from fastllm.llm.tokens import Tokenizer
from fastllm.llm.train import train
from fastllm.model import Config, Transformer

# The parts of Llama (rotary, RMSNorm, SwiGLU) in two sizes; "paper" has those of Vaswani et al. 2017.
MODERN = dict(kind="decoder", norm="rmsnorm", positions="rotary", activation="swiglu")
PRESETS = {
    "paper": MODERN | dict(d_model=512, heads=8, layers=6, d_ff=2048, scale_embedding=False),
    "cpu": MODERN | dict(d_model=192, heads=3, layers=4, d_ff=512, scale_embedding=False),
}


@dataclass
class Task:
    """The three splits as numbers of bytes."""

    tokenizer: Tokenizer
    splits: dict
    context: int

    @classmethod
    def load(cls, folder, context):
        tokenizer, splits = Tokenizer.bytes(), {}
        for split in SPLITS:
            lines = (Path(folder) / f"{split}.txt").read_text("utf-8", errors="replace").splitlines(keepends=True)
            parts = [torch.tensor(ids, dtype=torch.int16) for ids in tokenizer.encode_batch(lines)]
            splits[split] = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int16)
        for split, tokens in splits.items():
            if len(tokens) <= context:
                raise ValueError(f"{folder}/{split}.txt: {len(tokens)} bytes are too few for a context of {context}")
        return cls(tokenizer, splits, context)

    def batches(self, batch, seed):
        return Windows(self.splits["train"], self.context, batch, seed)

    def config(self, preset="cpu", **changes) -> Config:
        return Config(**PRESETS[preset] | dict(vocab=self.tokenizer.size, max_len=self.context) | changes)


def loss_of(model, batch):
    return model(batch[:, :-1], targets=batch[:, 1:])


def tokens_in(batch):
    return batch[:, 1:].numel()


@torch.no_grad()
def perplexity(model, tokens, context, limit=1 << 17, batch=8) -> dict:
    """Over windows of `context` tokens side by side, `limit` tokens at most, spread over the whole text."""
    model.eval()
    starts = torch.arange(0, len(tokens) - context, context)
    if len(starts) * context > limit:
        starts = starts[:: math.ceil(len(starts) * context / limit)]
    cut = tokens[starts[:, None] + torch.arange(context + 1)].long()
    total = sum(float(loss_of(model, part)) * len(part) for part in cut.split(batch))
    loss = total / len(cut)
    return dict(loss=loss, perplexity=math.exp(loss), bits_per_byte=loss / math.log(2), tokens=len(cut) * context)


def baselines(task) -> dict:
    """Test perplexity per byte of byte frequencies, and what bzip2 makes of the test text."""
    counts = torch.bincount(task.splits["train"].long(), minlength=task.tokenizer.size).double() + 1
    test = torch.bincount(task.splits["test"].long(), minlength=task.tokenizer.size).double()
    loss = float(-(test * (counts / counts.sum()).log()).sum() / test.sum())
    whole = task.tokenizer.decode(task.splits["test"].tolist()).encode()
    bits = 8 * len(bz2.compress(whole, 9)) / len(whole)
    return {
        "byte frequencies": dict(loss=loss, perplexity=math.exp(loss), bits_per_byte=loss / math.log(2)),
        "bzip2 -9 on the test text": dict(loss=bits * math.log(2), perplexity=2.0**bits, bits_per_byte=bits),
    }


def prompt_from(task, count=64) -> str:
    """The beginning of a paragraph, or else of a line, behind the first tenth of the test text."""
    tokens = task.splits["test"]
    text = task.tokenizer.decode(tokens[len(tokens) // 10 :][:4096].tolist())
    for separator in ("\n\n", "\n"):
        if found := text.partition(separator)[2].strip():
            return found[:count]
    return text[:count]


def sample(model, tokenizer, prompt: str, count: int, seed=0, temperature=0.8, top_k=40) -> str:
    tokens = torch.tensor([tokenizer.encode(prompt)])
    random = torch.Generator().manual_seed(seed)
    made = model.generate(tokens, count, temperature=temperature, top_k=top_k, generator=random)
    return tokenizer.decode(made[0].tolist())


def fit(task, config, recipe, *, batch=8, accelerated=True, run=None, what="language model"):
    """Train on the task's train split. Returns the model with its best parameters, and the history."""
    torch.manual_seed(recipe.seed)
    model = Transformer(config, accelerated)
    history = train(
        model,
        task.batches(batch, recipe.seed),
        loss_of,
        tokens_in,
        recipe,
        length=task.context,
        evaluate=lambda model: perplexity(model, task.splits["valid"], task.context, limit=1 << 15),
        run=run,
        tokenizer=task.tokenizer,
        what=what,
    )
    return model, history
