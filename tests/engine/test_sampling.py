"""Sampling against transformers' processors and by what defines it, and rows that draw apart from each other."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as theirs

from burnish.engine import sampling
from burnish.engine.decoding import FAR

SHARE = st.one_of(st.floats(0.001, 0.999), st.sampled_from([1e-9, 0.5, 0.9]))


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


@st.composite
def rows(draw, sizes=(1, 2, 5, 40, 700)) -> torch.Tensor:
    """Logits (B, V) of a few rows, flat or steep, smooth or on a grid where they tie, some at -inf but never all."""
    count, size = draw(st.integers(1, 4)), draw(st.sampled_from(sizes))
    source = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    found = torch.randn(count, size, generator=source) * draw(st.sampled_from([0.01, 1.0, 5.0, 100.0]))
    grid = draw(st.sampled_from([0.0, 0.5, 4.0]))
    found = (found / grid).round() * grid if grid else found
    banned = torch.rand(count, size, generator=source) < draw(st.sampled_from([0.0, 0.3, 0.9]))
    banned[torch.arange(count), torch.randint(size, (count,), generator=source)] = False
    return found.masked_fill(banned, sampling.NEVER)


def kept(after: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """Which tokens a filter let stay: some of each row's, as they were; the others are at -inf."""
    stay = after > sampling.NEVER
    assert stay.any(dim=1).all()
    assert torch.equal(after, before.masked_fill(~stay, sampling.NEVER))
    return stay


def nearest(score: torch.Tensor, stay: torch.Tensor) -> torch.Tensor:
    """The least score (B, 1) of those that stay; none that does not is above it."""
    least = score.masked_fill(~stay, float("inf")).amin(dim=1, keepdim=True)
    assert (stay | (score <= least)).all()
    return least


@given(rows(), st.integers(1, 60))
def test_top_k_keeps_k_and_none_below_them(before, k):
    stay = kept(sampling.top_k(before, k), before)
    least = nearest(before, stay)
    possible = (before > sampling.NEVER).sum(dim=1)
    assert (stay.sum(dim=1) >= possible.clamp(max=k)).all()
    assert ((before > least).sum(dim=1) < k).all()  # none too many, but for ties


@settings(max_examples=300)
@given(rows(sizes=(1, 40, 700)), SHARE)
def test_a_nucleus_reaches_its_share_and_not_without_its_last(before, p):
    chances = before.double().softmax(dim=1)
    stay = kept(sampling.top_p(before, p), before)
    nearest(before, stay)
    mass, last = (chances * stay).sum(dim=1), chances.masked_fill(~stay, 2).amin(dim=1)
    assert (mass >= p - 1e-9).all() and (mass - last < p + 1e-9).all()


@given(rows(), st.one_of(SHARE, st.just(1.0)))
def test_min_p_keeps_a_share_of_the_likeliest(before, share):
    chances = before.double().softmax(dim=1)
    ratio = chances / chances.amax(dim=1, keepdim=True)
    stay = kept(sampling.min_p(before, share), before)
    certain = ((ratio - share).abs() > 1e-5 * share) & (ratio > 0)
    assert torch.equal(stay[certain], ratio[certain] > share)
    assert stay[ratio == 1].all()


@given(rows(), SHARE)
def test_typical_tokens_are_the_nearest_to_the_entropy_that_reach_their_share(before, p):
    chances = before.double().softmax(dim=1)
    logs = before.double().log_softmax(dim=1)
    entropy = -(logs * chances).nan_to_num(0).sum(dim=1, keepdim=True)
    nearness = -(-logs - entropy).abs()
    stay = kept(sampling.typical_p(before, p), before)
    blur = 1e-6 * logs.masked_fill(before == sampling.NEVER, 0).abs().amax() + 1e-6  # of float32
    last = nearness.masked_fill(~stay, float("inf")).amin(dim=1, keepdim=True)
    assert (stay | (nearness <= last + blur)).all()
    assert ((chances * stay).sum(dim=1) >= p - 1e-5).all()
    assert ((chances * (nearness > last + blur)).sum(dim=1) < p + 1e-5).all()


@given(rows(), st.floats(1 / 100, 100))
def test_temperature_keeps_the_order(before, heat):
    order = before.argsort(dim=1)
    assert (sampling.temperature(before, heat).gather(1, order).diff(dim=1).nan_to_num(0) >= 0).all()


@given(rows(), st.floats(0.1, 10), st.floats(-3, 3), st.floats(-3, 3), st.data())
def test_penalties_move_what_was_seen_alone(before, penalty, presence, frequency, data):
    source = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    counts = (torch.randint(-3, 4, before.shape, generator=source)).clamp(min=0)
    seen = counts > 0
    repeated = sampling.repetition_penalty(before, seen, penalty)
    counted = sampling.count_penalty(before, counts, presence, frequency)
    for after in (repeated, counted):
        assert torch.equal(after[~seen], before[~seen])
        assert torch.equal(after == sampling.NEVER, before == sampling.NEVER)
    assert ((repeated <= before) if penalty >= 1 else (repeated >= before)).all()
    moved = (before - counted)[seen & (before > sampling.NEVER)]
    assert torch.allclose(moved, (presence + frequency * counts)[seen & (before > sampling.NEVER)], atol=1e-4)


@given(rows(sizes=(2, 4)), st.integers(1, 4), st.data())
def test_what_would_repeat_a_run_of_tokens_is_banned_and_nothing_else(before, size, data):
    texts = [data.draw(st.lists(st.integers(0, before.shape[1] - 1), max_size=12)) for _ in before]
    after = sampling.no_repeat_ngram(before, texts, size)
    for row, text in enumerate(texts):
        runs = {tuple(text[at : at + size]) for at in range(len(text) - size + 1)}
        for token in range(before.shape[1]):
            again = (*text[len(text) - size + 1 :], token)[-size:] in runs
            assert after[row, token] == (sampling.NEVER if again else before[row, token])


@settings(max_examples=300)
@given(
    rows(),
    st.sampled_from([1 / FAR, 0.01, 0.7, 1.0, 3.0, FAR]),
    st.integers(0, 8),
    SHARE,
    SHARE,
    SHARE,
    st.sampled_from([1 / FAR, 0.5, 2.0, FAR]),
    st.sampled_from([-FAR, 0.0, 0.5, FAR]),
    st.floats(0, 1, exclude_max=True),
)
def test_whatever_is_set_a_token_can_be_drawn(before, heat, k, p, least, typical, penalty, count, at):
    """One that was possible, and none that a filter took away."""
    seen = torch.arange(before.shape[1]) % 2
    after = sampling.repetition_penalty(before, seen > 0, penalty)
    after = sampling.count_penalty(after, 1000 * seen, count, -count)
    after = sampling.warp(after, heat, k, p, least, typical)
    assert not after.isnan().any() and (after < float("inf")).all()
    tokens = sampling.sample(after, [at] * len(before))[:, None]
    assert (after.gather(1, tokens) > sampling.NEVER).all() and (before.gather(1, tokens) > sampling.NEVER).all()


@given(rows(), st.floats(0, 1, exclude_max=True))
def test_a_draw_takes_the_token_whose_share_of_the_whole_it_falls_into(before, at):
    at = int(at * 2**32) / 2**32  # as `Draws` gives them
    ends = before.double().softmax(dim=1).cumsum(dim=1)
    for end, token in zip(ends, sampling.sample(before, [at] * len(before)).tolist(), strict=True):
        assert (end[token - 1] if token else 0) - 1e-12 <= at <= end[token] + 1e-12


@given(
    rows(sizes=(5, 700, 1500)), st.sampled_from([0.5, 1.0, 2.0]), st.integers(0, 8), SHARE, st.integers(0, 9), st.data()
)
def test_a_row_draws_the_same_in_any_company(before, heat, k, p, seed, data):
    """Also where logits tie, and where another row's nucleus is so wide that more tokens are looked at."""
    company = torch.cat((before, torch.zeros(1, before.shape[1])))
    order = data.draw(st.permutations(range(len(company))))

    def drawn(logits, numbers):
        warped = sampling.warp(logits, heat, k, p)
        draws = [sampling.Draws(seed, [number]) for number in numbers]
        return [sampling.sample(warped, [draw() for draw in draws]).tolist() for _ in range(3)], warped

    together, warped = drawn(company[order], order)
    for place, number in enumerate(order):
        alone, mine = drawn(company[number : number + 1], [number])
        assert torch.equal(mine[0], warped[place])
        assert [tokens[place] for tokens in together] == [token for (token,) in alone]
