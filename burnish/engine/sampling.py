"""Choosing the next token: functions on logits (B, V), each row apart from the others.

They are applied in the order repetition penalty, temperature, top-k, top-p, and give what transformers' processors
give. A row draws from a random source of its own, seeded by what the row continues, so that it samples the same
alone, in any batch and in any place of it; a prompt that stands twice gets two different continuations.
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
    token always stays. To sort a whole vocabulary takes longer than to find the few hundred tokens of a usual nucleus.
    """
    total = logits.double().logsumexp(dim=-1, keepdim=True)
    for width in (min(NUCLEUS, logits.shape[-1]), logits.shape[-1]):
        best, index = logits.topk(width)
        mass = (best - total).exp().cumsum(dim=-1)
        if mass[:, -1].min() >= p:
            break
    before = mass.roll(1, dims=-1)
    before[:, 0] = 0
    return torch.full_like(logits, NEVER).scatter(1, index, best.masked_fill(before >= p, NEVER))


def warp(logits: Tensor, heat: float = 1.0, k: int = 0, p: float = 1.0) -> Tensor:
    """logits (B, V) after temperature `heat`, top-k (0: all) and top-p (1: all), in this order."""
    logits = logits if heat == 1 else temperature(logits, heat)
    logits = top_k(logits, k) if k else logits
    return top_p(logits, p) if p < 1 else logits


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
