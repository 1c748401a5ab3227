"""Numbers to batches: padded and bucketed sequences, windows of a long text."""

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


def windows(tokens: torch.Tensor, context: int, batch: int, seed: int):
    """Without end: [batch, context + 1] int64, cut from `tokens` at random places."""
    if len(tokens) <= context:
        raise ValueError(f"windows: a text of {len(tokens)} tokens is too short for a context of {context}")
    random = torch.Generator().manual_seed(seed)
    offsets = torch.arange(context + 1)
    while True:
        starts = torch.randint(len(tokens) - context, (batch, 1), generator=random)
        yield tokens[starts + offsets].long()
