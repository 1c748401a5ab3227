"""Text to numbers and numbers to batches: a word vocabulary for classifiers, bytes for language models."""

import re
from collections import Counter
from dataclasses import dataclass

import torch

PAD, UNKNOWN = 0, 1
_WORD = re.compile(r"\w+|[^\w\s]")


def words(text: str) -> list[str]:
    """Lower-case words, and punctuation marks one by one."""
    return _WORD.findall(text.lower())


class Vocabulary:
    """The `max_size` most frequent words, ties in alphabetical order; 0 is padding and 1 every other word."""

    def __init__(self, entries: list[str]):
        self.entries = entries
        self.numbers = {word: n for n, word in enumerate(entries)}

    @classmethod
    def of(cls, texts, max_size: int, min_count: int = 2):
        if max_size < 3:
            raise ValueError(f"Vocabulary: max_size must be at least 3, got {max_size}")
        counts = Counter(word for text in texts for word in words(text))
        ranked = sorted((-n, word) for word, n in counts.items() if n >= min_count)
        return cls(["<pad>", "<unknown>", *(word for _, word in ranked[: max_size - 2])])

    def __len__(self):
        return len(self.entries)

    def encode(self, text: str, max_len: int) -> list[int]:
        """The first max_len words; a text without any gives one unknown word, so that no sequence is empty."""
        return [self.numbers.get(word, UNKNOWN) for word in words(text)[:max_len]] or [UNKNOWN]


class Bytes:
    """UTF-8 bytes as tokens: no training, nothing unknown."""

    size = 256

    def encode(self, text: str) -> torch.Tensor:
        return torch.frombuffer(bytearray(text.encode("utf-8")), dtype=torch.uint8)

    def decode(self, tokens: torch.Tensor) -> str:
        return bytes(tokens.tolist()).decode("utf-8", errors="replace")


@dataclass(frozen=True)
class Batch:
    """tokens [B, T] int64, mask [B, T] bool (None where nothing is padding), labels [B] int64."""

    tokens: torch.Tensor
    mask: torch.Tensor | None
    labels: torch.Tensor

    @property
    def real_tokens(self) -> int:
        return self.tokens.numel() if self.mask is None else int(self.mask.sum())


def collate(sequences: list[list[int]], labels: list[int]) -> Batch:
    """Pads with 0 to the longest."""
    lengths = torch.tensor([len(s) for s in sequences])
    T = int(lengths.max())
    tokens = torch.tensor([s + [PAD] * (T - len(s)) for s in sequences])
    mask = None if int(lengths.min()) == T else torch.arange(T) < lengths[:, None]
    return Batch(tokens, mask, torch.tensor(labels))


def bucketed(lengths: list[int], batch: int, seed: int | None) -> list[list[int]]:
    """Indices in batches of sequences of about one length, so that little is padding.

    With a seed: shuffled, sorted inside pools of 50 batches, and the batches shuffled. Without: sorted by length as a
    whole (for evaluation). Every index occurs once.
    """
    if seed is None:
        order = sorted(range(len(lengths)), key=lambda i: lengths[i])
        return [order[at : at + batch] for at in range(0, len(order), batch)]
    random = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(lengths), generator=random).tolist()
    pool = 50 * batch
    batches = []
    for at in range(0, len(order), pool):
        by_length = sorted(order[at : at + pool], key=lambda i: lengths[i])
        batches += [by_length[i : i + batch] for i in range(0, len(by_length), batch)]
    return [batches[i] for i in torch.randperm(len(batches), generator=random).tolist()]


def windows(tokens: torch.Tensor, context: int, batch: int, seed: int):
    """Without end: [batch, context + 1] int64, cut from `tokens` at random places."""
    if len(tokens) <= context:
        raise ValueError(f"windows: a text of {len(tokens)} tokens is too short for a context of {context}")
    random = torch.Generator().manual_seed(seed)
    offsets = torch.arange(context + 1)
    while True:
        starts = torch.randint(len(tokens) - context, (batch, 1), generator=random)
        yield tokens[starts + offsets].long()
