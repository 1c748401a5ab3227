"""Size, speed and quality of a model before and after it was made smaller."""

import itertools
import math
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from fastllm.llm.sessions import generates, is_encoder_decoder, positions_of, session_of
from fastllm.text import show

CONTEXT, MOST_TOKENS = 512, 1 << 15  # of a window of text, and of all windows
ROWS = 200  # of a file of pairs
PROMPT, STEPS = 32, 48  # tokens of what speed is measured on, where the model has room for as many


def size_of(model) -> int:
    """Bytes of its parameters and packed weights, each once."""
    kept = {x.data_ptr(): x.nbytes for x in (*model.parameters(), *model.buffers())}
    return sum(kept.values())


@torch.no_grad()
def perplexity(model, tokenizer, text: str) -> float:
    """Of a text, over windows side by side, MOST_TOKENS at most, spread over all of it."""
    tokens = torch.tensor(tokenizer.encode(text))
    context = min(CONTEXT, positions_of(model))
    if len(tokens) < 2:
        raise ValueError(f"perplexity: a text of {len(tokens)} tokens has nothing to predict")
    starts = list(range(0, len(tokens) - 1, context))
    starts = starts[:: math.ceil(len(starts) * context / MOST_TOKENS)]
    total, count = 0.0, 0
    for start in starts:
        part = tokens[start : start + context + 1]
        logits = model(part[None, :-1])
        logits = getattr(logits, "logits", logits)[0].float()
        total += float(F.cross_entropy(logits, part[1:], reduction="sum"))
        count += len(part) - 1
    return math.exp(total / count)


def pairs_task(loaded):
    """The task of an encoder-decoder, whose rows are pairs."""
    from fastllm.llm.finetune import task_for

    return task_for(loaded)


def scorer(loaded, path, command):
    """A function of a `Loaded` that scores it on a file: perplexity of a text; of an encoder-decoder loss and BLEU on
    its first ROWS pairs. The file is read now. Raises ValueError for one that is not fit, and for other models.
    """
    if path is None:
        return lambda one: {}
    if not generates(loaded.model):
        raise ValueError(f"{command}: --text measures a model that writes text, {loaded.source} holds another")
    if not is_encoder_decoder(loaded.model):
        text = read_text(path)
        return lambda one: dict(perplexity=perplexity(one.model, one.tokenizer, text))
    if Path(path).suffix not in (extensions := pairs_task(loaded).extensions):
        raise ValueError(f"{command}: {path} must be a {' or '.join(extensions)} file of pairs, source and target")
    rows = list(itertools.islice(pairs_task(loaded).rows(Path(path)), ROWS))

    def score(one):
        found = pairs_task(one).scores(one.model, rows, 16)
        return {f"text_{name}": found[name] for name in ("loss", "bleu")}

    return score


class Steps:
    """One sequence of a model, token after token at the same place in its cache."""

    def __init__(self, loaded):
        model = loaded.model
        positions = min(PROMPT + STEPS, positions_of(model))
        self.session, _ = session_of(model, "model", 1, positions, loaded.tokenizer.bos)
        self.prompt = torch.arange(5, 5 + min(PROMPT, positions // 2)) % 5 + 5
        self.steps = positions - len(self.prompt)

    def seconds(self) -> float:
        """The median of `steps` tokens."""
        slot, taken = torch.tensor([0]), []
        self.session.clear(0)
        self.session.prefill([self.prompt], slot)
        for n in range(self.steps):
            began, at = time.perf_counter(), n % len(self.prompt)
            self.session.step(self.prompt[at : at + 1], slot)
            taken.append(time.perf_counter() - began)
        return statistics.median(taken)


def compare(before, after, score=lambda loaded: {}) -> dict:
    """{"before": {...}, "after": {...}}: bytes; tokens_per_s, measured in turn, of models that write text; and what
    score(loaded), a `scorer`, finds."""
    both = {"before": before, "after": after}
    found = {name: dict(bytes=size_of(loaded.model)) for name, loaded in both.items()}
    if not all(generates(loaded.model) for loaded in both.values()):
        return found
    steps, samples = {name: Steps(loaded) for name, loaded in both.items()}, {name: [] for name in both}
    for _ in range(3):
        for name, one in steps.items():
            samples[name].append(one.seconds())
    for name, loaded in both.items():
        found[name]["tokens_per_s"] = 1 / statistics.median(samples[name])
        found[name] |= score(loaded)
    return found


def read_text(path) -> str:
    try:
        return Path(path).read_text("utf-8")
    except UnicodeDecodeError as problem:
        raise ValueError(f"{path} is not UTF-8: {problem.reason} at byte {problem.start}") from None


def show_comparison(found: dict, out):
    """A table, and where the model is."""
    if not found:
        return
    before, after = found["before"], found["after"]
    rows = [("size, MB", f"{before['bytes'] / 1e6:.2f}", f"{after['bytes'] / 1e6:.2f}")]
    more = dict(tokens_per_s="tokens/s", perplexity="perplexity", text_loss="loss", text_bleu="BLEU")
    more |= dict(test_loss="loss on test", test_bleu="BLEU on test")
    for key, name in more.items():
        if key in before:
            rows.append((name, f"{before[key]:,.2f}", f"{after[key]:,.2f}"))
    pairs = [(before[key], after[key]) for key in ("bytes", *more) if key in before]
    ratios = [f"{b / a:.2f}x" if a else "" for a, b in pairs]
    show(("", "before", "after", "ratio"), [(*row, ratio) for row, ratio in zip(rows, ratios, strict=True)])
    print(f"written: {out}")
