"""The metrics: sums over pieces give what the libraries give for the whole."""

import random

import pytest
import torch

from fastllm.llm import metrics

WORDS = "the cat a dog sat, on an old mat! log 42 lay".split()


def sentences(n, seed=0):
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, 12))) for _ in range(n)]


def test_classification_is_scikit_learns():
    sklearn = pytest.importorskip("sklearn.metrics")
    torch.manual_seed(0)
    truth, predicted = torch.randint(4, (500,)), torch.randint(3, (500,))  # one class is never predicted
    found = metrics.Confusion("abcd")
    for t, p in zip(truth.split(64), predicted.split(64), strict=True):
        found.add(t, p)
    scores = found.scores()
    assert scores["confusion"] == sklearn.confusion_matrix(truth, predicted).tolist()
    assert scores["accuracy"] == pytest.approx(sklearn.accuracy_score(truth, predicted), rel=1e-12)
    for average, got in (("macro", scores), ("micro", scores["micro"])):
        expected = sklearn.precision_recall_fscore_support(truth, predicted, average=average, zero_division=0)
        assert [got[k] for k in ("precision", "recall", "f1")] == pytest.approx(expected[:3], rel=1e-12)
    each = sklearn.precision_recall_fscore_support(truth, predicted, zero_division=0)
    for n, name in enumerate("abcd"):
        assert list(scores["classes"][name].values()) == pytest.approx([column[n] for column in each], rel=1e-12)


def test_a_class_that_does_not_occur_is_no_part_of_the_mean():
    found = metrics.Confusion(["a", "b", "c"])
    found.add([0, 0, 1, 1], [0, 0, 1, 0])
    assert found.scores()["recall"] == 0.75
    assert found.scores()["classes"]["c"] == dict(precision=0.0, recall=0.0, f1=0.0, rows=0)


def test_perplexity():
    found = metrics.Perplexity()
    found.add(3.0, 4, 6)
    found.add(1.0, 4, 2)
    scores = found.scores()
    assert scores["loss"] == 0.5 and scores["perplexity"] == pytest.approx(1.6487212707)
    assert scores["bits_per_byte"] == pytest.approx(4 / 0.6931471806 / 8) and scores["tokens"] == 8


def test_translation_is_sacrebleus_corpus_score():
    sacrebleu = pytest.importorskip("sacrebleu")
    texts, references = sentences(50), sentences(50, seed=1)
    texts[::3] = references[::3]
    found = metrics.Translation()
    for pair in zip(texts, references, strict=True):
        found.add(*pair)
    scores = found.scores()
    for name, metric in (("bleu", sacrebleu.BLEU()), ("chrf", sacrebleu.CHRF())):
        assert scores[name] == metric.corpus_score(texts, [references]).score
        assert scores["signatures"][name] == str(metric.get_signature())


def test_rouge_is_the_mean_of_rouge_scores():
    pytest.importorskip("rouge_score")
    from rouge_score.rouge_scorer import RougeScorer

    texts, references = sentences(20), sentences(20, seed=1)
    found = metrics.Rouge()
    for pair in zip(texts, references, strict=True):
        found.add(*pair)
    scorer = RougeScorer(["rougeL"])
    expected = [scorer.score(r, t)["rougeL"].fmeasure for t, r in zip(texts, references, strict=True)]
    assert found.scores()["rougeL"] == pytest.approx(sum(expected) / 20, rel=1e-12)


@pytest.mark.parametrize(
    "answer, references, exact, f1",
    [
        ("The  Cat!", ["cat"], 1, 1.0),
        ("an old cat", ["cat", "old dog"], 0, 2 / 3),
        ("cat cat", ["cat"], 0, 2 / 3),
        ("", [], 1, 1.0),
        ("the", [""], 1, 1.0),
        ("cat", [""], 0, 0.0),
    ],
)
def test_answers(answer, references, exact, f1):
    found = metrics.Answers()
    found.add(answer, references)
    assert found.scores() == dict(exact_match=exact, f1=pytest.approx(f1))


@pytest.mark.parametrize("metric", [lambda: metrics.Confusion("ab"), metrics.Perplexity, metrics.Answers])
def test_nothing_added_is_said(metric):
    with pytest.raises(ValueError, match="added"):
        metric().scores()


class Several:
    """Ranks whose values were gathered beforehand."""

    def __init__(self, others, name):
        self.others, self.name = others, name

    def gather(self, value):
        return [value, *(getattr(other, self.name) for other in self.others)]


FED = {
    "confusion": (lambda: metrics.Confusion("ab"), [([0, 1], [1, 1]), ([1], [0]), ([0], [0])]),
    "mean": (metrics.Mean, [(3.0, 2), (1.0, 1)]),
    "perplexity": (metrics.Perplexity, [(4.0, 2, 10), (6.0, 5, 20), (1.0, 1, 2)]),
    "translation": (metrics.Translation, [("a cat sat on it", "the cat sat on it")] * 2 + [("no", "yes we can do")]),
    "rouge": (metrics.Rouge, [("a cat sat", "the cat sat"), ("no", "yes")]),
    "answers": (metrics.Answers, [("red", ["red"]), ("a cat", ["cat sat"])]),
}


@pytest.mark.parametrize("make, fed", FED.values(), ids=FED)
@pytest.mark.parametrize("first", [0, 1])
def test_shares_of_the_rows_add_up(make, fed, first):
    """Also where one of them has none."""
    whole, parts = make(), [make(), make(), make()]
    for n, row in enumerate(fed):
        whole.add(*row)
        parts[1 + (n + first) % 2].add(*row)
    for name in parts[0].sums:
        merged = Several(parts[1:], name)
        one = make()
        setattr(one, name, getattr(parts[0], name))
        one.sums = (name,)
        setattr(parts[0], name, getattr(one.over(merged), name))
    assert parts[0].scores() == whole.scores()
