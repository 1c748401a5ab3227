"""Numbers to batches: padded and bucketed sequences, windows of a long text."""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Batch:
    """tokens [B, T] int64, mask [B, T] bool (None where nothing is padding), labels [B] int64."""

    tokens: torch.Tensor
    mask: torch.Tensor | None
    labels: torch.Tensor

    @property
    def real_tokens(self) -> int:
        return self.tokens.numel() if self.mask is None else int(self.mask.sum())


def pad(sequences: list[list[int]], value=0):
    """(tokens [B, T], mask [B, T] or None where nothing is padding), padded on the right to the longest."""
    lengths = torch.tensor([len(s) for s in sequences])
    T = int(lengths.max())
    tokens = torch.tensor([s + [value] * (T - len(s)) for s in sequences])
    return tokens, None if int(lengths.min()) == T else torch.arange(T) < lengths[:, None]


def collate(sequences: list[list[int]], labels: list[int]) -> Batch:
    """Pads with 0 to the longest."""
    return Batch(*pad(sequences), torch.tensor(labels))


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


class Epochs:
    """Passes over a data set without end, each in its own order: epochs[n] is batch n, whenever it is asked for.

    lengths has the length of each sequence; make(indices) makes a batch of some. whole=True leaves a pass's one smaller
    batch out, so that ranks can share every batch. Raises ValueError where there is no batch then.
    """

    def __init__(self, lengths: list[int], batch: int, seed: int, make, whole=False):
        if len(lengths) < (batch if whole else 1):
            raise ValueError(f"Epochs: {len(lengths)} sequences make no batch of {batch}")
        self.lengths, self.batch, self.seed, self.make, self.whole = lengths, batch, seed, make, whole
        self.per_epoch = len(lengths) // batch if whole else math.ceil(len(lengths) / batch)
        self._epoch = self._order = None

    def __getitem__(self, n: int):
        epoch, at = divmod(n, self.per_epoch)
        if epoch != self._epoch:
            order = bucketed(self.lengths, self.batch, self.seed + epoch)
            self._order = [part for part in order if len(part) == self.batch or not self.whole]
            self._epoch = epoch
        return self.make(self._order[at])


class Windows:
    """windows[n] is [batch, context + 1] int64, cut from `tokens` at random places that n and the seed decide."""

    def __init__(self, tokens: torch.Tensor, context: int, batch: int, seed: int):
        if len(tokens) <= context:
            raise ValueError(f"Windows: a text of {len(tokens)} tokens is too short for a context of {context}")
        self.tokens, self.context, self.batch, self.seed = tokens, context, batch, seed

    def __getitem__(self, n: int):
        random = torch.Generator().manual_seed(self.seed * 1_000_003 + n)
        starts = torch.randint(len(self.tokens) - self.context, (self.batch, 1), generator=random)
        return self.tokens[starts + torch.arange(self.context + 1)].long()
