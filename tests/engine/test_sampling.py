"""Sampling against transformers' processors, and rows that draw apart from each other."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from transformers.generation import logits_process as theirs

from burnish.engine import sampling


def logits(rows: int = 5, vocab: int = 97, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(0)) * scale


@pytest.mark.parametrize("value", [0.1, 0.7, 1.0, 2.5])
def test_temperature(value):
    want = theirs.TemperatureLogitsWarper(value)(None, logits())
    assert torch.equal(sampling.temperature(logits(), value), want)


@pytest.mark.parametrize("k", [1, 2, 50, 96, 97, 500])
def test_top_k(k):
    assert torch.equal(sampling.top_k(logits(), k), theirs.TopKLogitsWarper(k)(None, logits()))
    ties = logits().round()
    assert torch.equal(sampling.top_k(ties, k), theirs.TopKLogitsWarper(k)(None, ties))


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize(("scale", "vocab"), [(1.0, 97), (30.0, 97), (0.1, 3000), (4.0, 3000)])
def test_top_p(p, scale, vocab):
    given = logits(vocab=vocab, scale=scale)
    got, want = sampling.top_p(given, p), theirs.TopPLogitsWarper(p)(None, given)
    assert torch.equal(got, want)
    assert got.isfinite().any(dim=1).all()


@pytest.mark.parametrize("p", [0.3, 0.5, 0.999])
def test_top_p_among_equals(p):
    even = torch.zeros(2, 1000)
    assert sampling.top_p(even, p).isfinite().sum(dim=1).tolist() == pytest.approx([1000 * p] * 2, abs=1)


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.2, 5.0])
def test_repetition_penalty(penalty):
    ids = torch.randint(0, 97, (5, 12), generator=torch.Generator().manual_seed(1))
    seen = torch.zeros(5, 97, dtype=torch.bool).scatter_(1, ids, True)
    want = theirs.RepetitionPenaltyLogitsProcessor(penalty)(ids, logits())
    assert torch.equal(sampling.repetition_penalty(logits(), seen, penalty), want)


@pytest.mark.parametrize("scale", [0.5, 3.0, 30.0])
@pytest.mark.parametrize("p", [0.01, 0.2, 0.9, 1.0])
def test_min_p_and_typical(p, scale):
    given = logits(scale=scale)
    assert torch.equal(sampling.min_p(given, p), theirs.MinPLogitsWarper(p)(None, given))
    if p < 1:
        for some in (given, sampling.top_k(given, 20)):
            assert torch.equal(sampling.typical_p(some, p), theirs.TypicalLogitsWarper(p)(None, some))


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_no_repeat_ngram(size):
    ids = torch.randint(0, 5, (5, 40), generator=torch.Generator().manual_seed(2))
    for length in (1, 2, 3, 40):
        want = theirs.NoRepeatNGramLogitsProcessor(size)(ids[:, :length], logits())
        assert torch.equal(sampling.no_repeat_ngram(logits(), ids[:, :length].tolist(), size), want)


def test_count_penalty():
    counts = torch.zeros(5, 97)
    counts[0, 3], counts[2, 96] = 2, 1
    want = logits()
    want[0, 3] -= 0.5 + 2 * 0.25
    want[2, 96] -= 0.5 + 0.25
    assert torch.allclose(sampling.count_penalty(logits(), counts, 0.5, 0.25), want)


def test_warp_is_temperature_then_top_k_then_top_p():
    want = theirs.TemperatureLogitsWarper(0.6)(None, logits())
    want = theirs.TopKLogitsWarper(20)(None, want)
    want = theirs.TopPLogitsWarper(0.8)(None, want)
    assert torch.equal(sampling.warp(logits(), 0.6, 20, 0.8), want)
    assert torch.equal(sampling.warp(logits()), logits())


def test_samples_follow_the_distribution_and_never_leave_it():
    probabilities = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    count = 4000
    draws = sampling.Draws(0, [1, 2])
    tokens = sampling.sample(probabilities.log().expand(count, -1), [draws() for _ in range(count)]).tolist()
    shares = {token: number / count for token, number in Counter(tokens).items()}
    assert shares == pytest.approx({1: 0.5, 3: 0.3, 4: 0.2}, abs=0.03)
    edges = sampling.sample(probabilities.log().expand(2, -1), [0.0, 1 - 2**-32])
    assert edges.tolist() == [1, 4]


def test_draws_depend_on_seed_ids_and_copy_alone():
    def first(*args):
        draws = sampling.Draws(*args)
        return [draws() for _ in range(3)]

    same = first(3, [5, 6])
    assert same == first(3, [5, 6], 0)
    others = [first(4, [5, 6]), first(3, [5, 7]), first(3, [56]), first(3, [5, 6], 1)]
    assert len({tuple(x) for x in [same, *others]}) == 5
    assert all(0 <= x < 1 for x in same)


def test_a_row_samples_the_same_alone_and_in_a_batch():
    rows = sampling.warp(logits(), 1.5, 40, 0.9)
    draws = [0.1, 0.4, 0.5, 0.9, 0.99]
    together = sampling.sample(rows, draws).tolist()
    assert together == [int(sampling.sample(rows[i : i + 1], draws[i : i + 1])) for i in range(5)]
