"""Choosing the next token: functions on logits (B, V), each row apart from the others.

They are applied in the order penalties, no-repeat n-grams, temperature, top-k, top-p, min-p, typical, and give what
transformers' processors give, where it has them. A row draws from a random source of its own, seeded by what the row
continues, so that it samples the same alone, in any batch and in any place of it; a prompt that stands twice gets two
different continuations.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence

import torch
from torch import Tensor

NEVER = float("-inf")
NUCLEUS = 512  # tokens among which a nucleus is looked for first


def repetition_penalty(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """logits (B, V) with those of the tokens that a row has `seen` (B, V) bool made less likely by `penalty` > 1.

    CTRL (arXiv 1909.05858), section 4.1, divides a seen token's logit by the penalty. A negative logit is multiplied
    instead, as dividing would make it more likely.
    """
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def count_penalty(logits: Tensor, counts: Tensor, presence: float, frequency: float) -> Tensor:
    """logits (B, V) less `presence` for each token that a row's reply has, and `frequency` for each time that it does;
    counts (B, V). OpenAI's presence_penalty and frequency_penalty."""
    return logits - (counts > 0) * presence - counts * frequency


def no_repeat_ngram(logits: Tensor, ids: Sequence[Sequence[int]], size: int) -> Tensor:
    """logits (B, V) with -inf for what would end a sequence of `size` tokens that a row's ids have already."""
    banned: tuple[list[int], list[int]] = [], []
    for row, past in enumerate(ids):
        tail = list(past[len(past) - size + 1 :]) if len(past) >= size else None
        for end in range(size - 1, len(past)) if tail is not None else ():
            if list(past[end - size + 1 : end]) == tail:
                banned[0].append(row)
                banned[1].append(past[end])
    logits = logits.clone()
    logits[banned[0], banned[1]] = NEVER
    return logits


def temperature(logits: Tensor, value: float) -> Tensor:
    """logits (B, V) divided by `value` > 0: below 1 sharper, above 1 flatter."""
    return logits / value


def top_k(logits: Tensor, k: int) -> Tensor:
    """logits (B, V) with all but the k largest at -inf; ties with the k-th stay (arXiv 1805.04833, section 5.4)."""
    if k >= logits.shape[-1]:
        return logits
    return logits.masked_fill(logits < logits.topk(k).values[:, -1:], NEVER)


def top_p(logits: Tensor, p: float) -> Tensor:
    """logits (B, V) with all but the nucleus at -inf: the most likely tokens that together reach probability p.

    Nucleus sampling, "The Curious Case of Neural Text Degeneration" (arXiv 1904.09751), section 3.1. The most likely
    token always stays; of equally likely ones that not all stay, the first do. To sort a whole vocabulary takes longer
    than to find the few hundred tokens of a usual nucleus.
    """
    total = logits.double().logsumexp(dim=-1, keepdim=True)
    for width in (min(NUCLEUS, logits.shape[-1]), logits.shape[-1]):
        best = logits.topk(width).values
        mass = (best - total).exp().cumsum(dim=-1)
        if mass[:, -1].min() >= p:
            break
    before = mass.roll(1, dims=-1)
    before[:, 0] = 0
    least = best.masked_fill(before >= p, -NEVER).amin(dim=-1, keepdim=True)
    ties = logits == least
    room = ((best == least) & (before < p)).sum(dim=-1, keepdim=True)
    return logits.masked_fill((logits < least) | (ties & (ties.cumsum(dim=-1) > room)), NEVER)


def min_p(logits: Tensor, p: float) -> Tensor:
    """logits (B, V) with those at -inf whose probability is below `p` times the most likely one's (arXiv 2407.01082,
    section 3)."""
    probabilities = logits.softmax(dim=-1)
    return logits.masked_fill(probabilities < p * probabilities.amax(dim=-1, keepdim=True), NEVER)


def typical_p(logits: Tensor, p: float) -> Tensor:
    """logits (B, V) with all but the typical ones at -inf: those whose information is nearest the distribution's
    entropy, as many as reach probability p together (arXiv 2202.00666, section 4)."""
    logs = logits.log_softmax(dim=-1)
    entropy = -(logs * logs.exp()).nan_to_num(0).sum(dim=-1, keepdim=True)
    distance, order = (-logs - entropy).abs().sort(dim=-1)
    mass = logits.gather(-1, order).softmax(dim=-1).cumsum(dim=-1)
    last = (mass < p).sum(dim=-1, keepdim=True).clamp(max=logits.shape[-1] - 1)
    far = distance > distance.gather(-1, last)
    return logits.masked_fill(torch.zeros_like(far).scatter(-1, order, far), NEVER)


def warp(
    logits: Tensor, heat: float = 1.0, k: int = 0, p: float = 1.0, least: float = 0.0, typical: float = 1.0
) -> Tensor:
    """logits (B, V) after temperature `heat`, top-k (0: all), top-p (1: all), min-p (0: all) and typical (1: all)."""
    logits = logits if heat == 1 else temperature(logits, heat)
    logits = top_k(logits, k) if k else logits
    logits = top_p(logits, p) if p < 1 else logits
    logits = min_p(logits, least) if least else logits
    return typical_p(logits, typical) if typical < 1 else logits


def sample(logits: Tensor, draws: Sequence[float]) -> Tensor:
    """Tokens (B,) drawn from softmax(logits (B, V)): the inverse of the cumulative distribution at draws in [0, 1)."""
    cumulative = logits.double().softmax(dim=-1).cumsum(dim=-1)
    targets = torch.tensor(draws, dtype=torch.float64, device=logits.device)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, targets, right=True)[:, 0]


class Draws:
    """Uniform numbers in [0, 1) for one row, decided by `seed`, the ids it continues and, of equal rows, which."""

    def __init__(self, seed: int, ids: Sequence[int], copy: int = 0):
        text = f"{seed} {copy} {' '.join(map(str, ids))}"
        self.bits = random.Random(hashlib.blake2b(text.encode(), digest_size=16).digest())

    def __call__(self) -> float:
        return self.bits.getrandbits(32) / 2**32  # 32 bits: times any total below the total, whatever the rounding
