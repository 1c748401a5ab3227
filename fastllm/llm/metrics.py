"""What predictions are worth. Metrics keep sums and counts, not predictions: memory does not grow with the data.

metric = Confusion(["bad", "good"])
metric.add(truth, predicted)  # as often as there are batches
metric.over(ranks)            # where several processes had a share of them
metric.scores()               # a dict fit for JSON
"""

import collections
import functools
import math
import re
import string

import torch

from fastllm.llm import require


class Sums:
    """What every metric is: `sums` names its attributes that are added up over rows, a number, a tensor, a list or a
    dict of those each, None standing for nothing yet."""

    sums: tuple[str, ...] = ()

    def over(self, ranks):
        """Let it be that of all ranks, on each of them, where it was that of a share of the rows; returns self."""
        for name in self.sums:
            setattr(self, name, functools.reduce(added, ranks.gather(getattr(self, name))))
        return self


def added(a, b):
    """a + b of what `Sums` adds up; what is None counts as nothing."""
    if a is None or b is None:
        return b if a is None else a
    if isinstance(a, dict):
        return {name: added(a[name], b[name]) for name in a}
    if isinstance(a, list):
        return [added(x, y) for x, y in zip(a, b, strict=True)]
    return a + b


class Mean(Sums):
    """The mean of a loss that comes as sums over things."""

    sums = ("total", "count")

    def __init__(self):
        self.total, self.count = 0.0, 0

    def add(self, total: float, count: int):
        self.total, self.count = self.total + total, self.count + count

    def scores(self) -> dict:
        return dict(loss=self.total / max(1, self.count))


class Confusion(Sums):
    """Classification: how often each class (row) was taken for each class (column), and the scores that follow."""

    sums = ("counts",)

    def __init__(self, classes):
        self.classes = list(classes)
        self.counts = torch.zeros(len(self.classes), len(self.classes), dtype=torch.int64)

    def add(self, truth, predicted):
        """Class numbers, int64 tensors or lists of one length."""
        pairs = torch.as_tensor(truth) * len(self.classes) + torch.as_tensor(predicted)
        self.counts += torch.bincount(pairs, minlength=self.counts.numel()).view_as(self.counts)

    def scores(self) -> dict:
        """Accuracy; precision, recall and F1 as means over the classes (macro), over all rows (micro), and per class.

        As scikit-learn defines them; what is divided by zero is 0. A class that is in neither truth nor prediction
        does not count in the means.
        """
        metrics = require("sklearn.metrics", "scikit-learn")
        size = len(self.classes)
        pairs = [(t, p, n) for t, row in enumerate(self.counts.tolist()) for p, n in enumerate(row) if n]
        truth, predicted, counts = zip(*pairs, strict=True) if pairs else ((), (), ())
        if not pairs:
            raise ValueError("Confusion.scores: nothing was added")
        given = dict(sample_weight=counts, zero_division=0)
        names = ("precision", "recall", "f1")

        def averaged(average):
            found = metrics.precision_recall_fscore_support(truth, predicted, average=average, **given)
            return dict(zip(names, map(float, found[:3]), strict=True))

        *each, support = metrics.precision_recall_fscore_support(truth, predicted, labels=range(size), **given)
        return dict(
            accuracy=float(metrics.accuracy_score(truth, predicted, sample_weight=counts)),
            **averaged("macro"),
            micro=averaged("micro"),
            classes={
                name: dict(zip(names, (float(column[n]) for column in each), strict=True)) | dict(rows=int(support[n]))
                for n, name in enumerate(self.classes)
            },
            confusion=self.counts.tolist(),
        )


class Perplexity(Sums):
    """Language models: the mean loss per token, exp of it, and bits per byte where the text's bytes are counted."""

    sums = ("loss", "tokens", "bytes")

    def __init__(self):
        self.loss, self.tokens, self.bytes = 0.0, 0, 0

    def add(self, loss_sum: float, tokens: int, text_bytes: int = 0):
        self.loss, self.tokens, self.bytes = self.loss + loss_sum, self.tokens + tokens, self.bytes + text_bytes

    def scores(self) -> dict:
        if not self.tokens:
            raise ValueError("Perplexity.scores: no token was added")
        loss = self.loss / self.tokens
        found = dict(loss=loss, perplexity=math.exp(loss) if loss < 700 else math.inf, tokens=self.tokens)
        if self.bytes:
            found |= dict(bits_per_byte=self.loss / math.log(2) / self.bytes, bytes=self.bytes)
        return found


class Translation(Sums):
    """BLEU and chrF of a corpus, by sacrebleu, whose signatures are among the scores."""

    sums = ("statistics",)

    def __init__(self):
        sacrebleu = require("sacrebleu")
        self.metrics = dict(bleu=sacrebleu.BLEU(), chrf=sacrebleu.CHRF())
        self.statistics = {name: None for name in self.metrics}
        for metric in self.metrics.values():
            metric.num_refs = 1  # for the signature; sacrebleu takes it from whole corpora

    def add(self, text: str, reference: str):
        for name, metric in self.metrics.items():
            # What a sacrebleu metric is made of: counts of each sentence, and a score of their sums.
            (found,) = metric._extract_corpus_statistics([text], [[reference]])
            self.statistics[name] = added(self.statistics[name], found)

    def scores(self) -> dict:
        if self.statistics["bleu"] is None:
            raise ValueError("Translation.scores: nothing was added")
        found = {name: m._compute_score_from_stats(self.statistics[name]).score for name, m in self.metrics.items()}
        return found | dict(signatures={name: str(m.get_signature()) for name, m in self.metrics.items()})


class Rouge(Sums):
    """Summaries: the means of ROUGE-1, ROUGE-2 and ROUGE-L (F1) over the pairs, by rouge-score."""

    KINDS = ("rouge1", "rouge2", "rougeL")
    sums = ("totals", "count")

    def __init__(self):
        scorer = require("rouge_score.rouge_scorer", "rouge-score")
        self.scorer = scorer.RougeScorer(self.KINDS, use_stemmer=False)
        self.totals, self.count = dict.fromkeys(self.KINDS, 0.0), 0

    def add(self, text: str, reference: str):
        for kind, found in self.scorer.score(reference, text).items():
            self.totals[kind] += found.fmeasure
        self.count += 1

    def scores(self) -> dict:
        if not self.count:
            raise ValueError("Rouge.scores: nothing was added")
        return {kind: total / self.count for kind, total in self.totals.items()}


class Answers(Sums):
    """Extractive question answering: exact match and F1 over words as the SQuAD script has them, the best reference
    of each question counting. No answer is the empty text."""

    sums = ("exact", "f1", "count")

    def __init__(self):
        self.exact, self.f1, self.count = 0, 0.0, 0

    def add(self, answer: str, references: list[str]):
        references = references or [""]
        self.exact += max(normalised(answer) == normalised(r) for r in references)
        self.f1 += max(word_f1(answer, r) for r in references)
        self.count += 1

    def scores(self) -> dict:
        if not self.count:
            raise ValueError("Answers.scores: nothing was added")
        return dict(exact_match=self.exact / self.count, f1=self.f1 / self.count)


def normalised(text: str) -> str:
    """Lower case without punctuation, articles and extra blanks (Rajpurkar et al. 2016, arXiv:1606.05250)."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def word_f1(answer: str, reference: str) -> float:
    a, b = normalised(answer).split(), normalised(reference).split()
    if not a or not b:
        return float(a == b)
    common = sum((collections.Counter(a) & collections.Counter(b)).values())
    return 2 * common / (len(a) + len(b))
