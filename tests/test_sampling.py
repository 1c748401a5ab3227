"""One sequence's choice of tokens: the distribution that is asked for, and the same draws for the same seed."""

import math

import pytest
import torch

from fastllm.sampling import FEW, Chooser, Sampling, sample

LOGITS = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()


def draws(n=4000, logits=LOGITS, prompt=(), **options):
    chooser, counts = Chooser(Sampling(seed=1, **options), prompt), torch.zeros(len(logits))
    for _ in range(n):
        chooser.counts.clear()  # each the first of its text
        counts[chooser.choose(logits)] += 1
    return counts / n


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (dict(temperature=1.0), [0.5, 0.3, 0.15, 0.05]),
        (dict(temperature=0.5), [0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365]),
        (dict(temperature=1.0, top_k=2), [0.625, 0.375, 0, 0]),
        (dict(temperature=1.0, top_p=0.75), [0.625, 0.375, 0, 0]),
        (dict(temperature=1.0, top_p=0.81), [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0]),
        (dict(temperature=1.0, min_p=0.25), [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0]),
        (dict(temperature=1.0, top_k=3, top_p=0.6), [0.625, 0.375, 0, 0]),
        (dict(temperature=1.0, bias={3: 100.0}), [0, 0, 0, 1]),
        (dict(temperature=0.0), [1, 0, 0, 0]),
    ],
    ids=str,
)
def test_the_distribution(options, wanted):
    """Within five standard deviations of a binomial, exact where that is none."""
    found, wanted = draws(**options), torch.tensor(wanted)
    assert ((found - wanted).abs() <= 5 * (wanted * (1 - wanted) / 4000).sqrt()).all(), found


@pytest.mark.parametrize("top_p", [0.3, 0.9])
def test_a_nucleus_of_many_tokens(top_p):
    """Also of more tokens than are sorted first."""
    logits = 2 * torch.randn(3000)
    p, order = logits.softmax(-1).sort(descending=True)
    kept = int((p.cumsum(-1) < top_p).sum()) + 1
    assert (kept > FEW) == (top_p > 0.5)
    wanted = torch.zeros(3000).index_copy(0, order[:kept], p[:kept] / p[:kept].sum())
    found = draws(1000, logits=logits, temperature=1.0, top_p=top_p)
    assert not found[wanted == 0].any()
    likely = wanted > 0.004
    assert likely.any() and ((found - wanted)[likely].abs() <= 5 * (wanted * (1 - wanted) / 1000).sqrt()[likely]).all()
    drawn = sample(logits.expand(1000, -1), top_k=0, top_p=top_p)
    assert not wanted[drawn].eq(0).any()


def test_seeds():
    def text(seed):
        chooser = Chooser(Sampling(temperature=1.0, seed=seed), [])
        return [chooser.choose(LOGITS) for _ in range(50)]

    assert text(3) == text(3) != text(4)
    assert text(None) != text(None)


def test_penalties():
    def second(first, prompt=(), **options):
        chooser = Chooser(Sampling(**options), prompt)
        assert chooser.choose(torch.nn.functional.one_hot(torch.tensor(first), 3).float()) == first
        return chooser.choose(torch.tensor([1.0, 0.9, -1.0]))

    assert second(0) == 0 and second(2) == 0
    assert second(0, repetition_penalty=1.2) == 1
    assert second(2, prompt=[0], repetition_penalty=1.2) == 1
    assert second(0, presence_penalty=0.2) == 1 and second(2, presence_penalty=0.2) == 0
    assert second(2, prompt=[0], presence_penalty=2.0) == 0  # OpenAI's count in the answer alone
    chooser = Chooser(Sampling(frequency_penalty=0.1), [])
    assert [chooser.choose(torch.tensor([1.0, 0.85])) for _ in range(5)] == [0, 0, 1, 0, 1]


def test_logits_are_left_alone():
    logits = torch.randn(20)
    before = logits.clone()
    chooser = Chooser(Sampling(1.0, 5, 0.5, 0.1, 1.5, 1.0, 1.0, {3: 2.0}, 0), [1, 2])
    for _ in range(5):
        chooser.choose(logits)
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", 2.0),
        ("repetition_penalty", 0.0),
        ("presence_penalty", 3.0),
        ("frequency_penalty", -3.0),
        ("seed", -1),
    ],
)
def test_numbers_out_of_range(name, wrong):
    with pytest.raises(ValueError, match=f"Sampling: {name} must be"):
        Sampling(**{name: wrong})
