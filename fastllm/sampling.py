"""How the next token is chosen from logits: Hugging Face's processors on a batch, and one sequence's own `Sampling`."""

import math
from dataclasses import dataclass, field

import torch

FEW = 256  # candidates that are sorted first: nearly always all of a nucleus, of a vocabulary of any size


def penalised(logits, ids, penalty):
    """Logits [B, V] of tokens in `ids` [B, T], divided by the penalty where positive, multiplied where not."""
    found = logits.gather(1, ids)
    return logits.scatter(1, ids, torch.where(found < 0, found * penalty, found / penalty))


def sample(logits, temperature=1.0, top_k=50, top_p=1.0, min_p=0.0, generator=None):
    """A token [B] from softmax(logits [B, V] / temperature), of the top_k likeliest, of the fewest that hold top_p, of
    those at least min_p times as likely as the likeliest."""
    logits = logits / temperature
    if top_k:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if top_p < 1.0:
        ordered, place = logits.sort()
        drop = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
        drop[:, -1] = False
        logits = logits.masked_fill(drop.scatter(1, place, drop), -math.inf)
    if min_p > 0.0:
        p = logits.softmax(-1)
        logits = logits.masked_fill(p < min_p * p.amax(-1, keepdim=True), -math.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)


@dataclass(frozen=True)
class Sampling:
    """How one sequence chooses: at temperature 0 the likeliest token, else one from softmax(logits / temperature).

    It is drawn from the top_k likeliest (0: all), of these from the fewest that hold top_p, of these from those at
    least min_p times as likely as the likeliest. repetition_penalty is that of Keskar et al. 2019 (arXiv:1909.05858),
    on prompt and answer; presence_penalty and frequency_penalty are OpenAI's, subtracted once, or for every time, that
    a token is in the answer; bias is added to logits. The same seed draws the same tokens, whoever else draws.
    Raises ValueError for a number that is out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    bias: dict[int, float] = field(default_factory=dict)
    seed: int | None = None

    def __post_init__(self):
        for name, fits, wanted in (
            ("temperature", 0 <= self.temperature < math.inf, "at least 0"),
            ("top_k", self.top_k >= 0, "at least 0 (0: all)"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0"),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "in [-2, 2]"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "in [-2, 2]"),
            ("seed", self.seed is None or 0 <= self.seed < 1 << 63, "in [0, 2^63)"),
        ):
            if not fits:
                raise ValueError(f"Sampling: {name} must be {wanted}, got {getattr(self, name)}")


class Chooser:
    """One sequence's draws: `choose(logits)` for one token after the other, which it remembers."""

    def __init__(self, sampling, prompt):
        self.sampling, self.prompt, self.counts = sampling, torch.tensor(sorted(set(prompt)), dtype=torch.int64), {}
        self.random = torch.Generator()
        self.random.seed() if sampling.seed is None else self.random.manual_seed(sampling.seed)

    def choose(self, logits) -> int:
        """A token from logits [V], fp32, which stay as they are."""
        s = self.sampling
        logits = self._penalised(logits)
        token = int(logits.argmax()) if s.temperature == 0 else self._draw(logits / s.temperature)
        self.counts[token] = self.counts.get(token, 0) + 1
        return token

    def _penalised(self, logits):
        s, seen = self.sampling, torch.tensor(list(self.counts), dtype=torch.int64)
        if s.repetition_penalty != 1.0:
            logits = penalised(logits[None], torch.cat([self.prompt, seen])[None], s.repetition_penalty)[0]
        if len(seen) and (s.presence_penalty or s.frequency_penalty):
            often = torch.tensor(list(self.counts.values()), dtype=torch.float32)
            logits = logits.index_add(0, seen, -(s.presence_penalty + s.frequency_penalty * often))
        if s.bias:
            logits = logits.index_add(0, torch.tensor(list(s.bias)), torch.tensor(list(s.bias.values())).float())
        return logits

    def _draw(self, logits) -> int:
        s, p = self.sampling, logits.softmax(-1)
        tokens = None
        if s.top_k:
            p, tokens = p.topk(min(s.top_k, len(p)))
            p = p / p.sum()
        elif s.top_p < 1.0:
            likeliest = p.topk(min(FEW, len(p)))
            p, tokens = likeliest if likeliest.values.sum() >= s.top_p else p.sort(descending=True)
        if s.top_p < 1.0:
            p = p * (p.cumsum(-1) - p < s.top_p)  # what is before a token holds less: it is needed
        if s.min_p > 0.0:
            p = p * (p >= s.min_p * p.max())
        up_to = p.double().cumsum(-1)
        at = torch.rand(1, generator=self.random, dtype=torch.float64) * up_to[-1]
        place = int(torch.searchsorted(up_to, at, right=True).clamp(max=int(p.nonzero()[-1])))
        return place if tokens is None else int(tokens[place])
