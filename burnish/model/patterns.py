"""Attention patterns: which key a query sees, as functions of two positions.

Each takes positions of queries and of keys, integers that broadcast against each other, and gives a bool tensor of
their common shape. A pattern is called with `causal` too, whether a query sees only what came before it. Where every
key may be seen, there is no pattern.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor


def causal(queries: Tensor, keys: Tensor) -> Tensor:
    return keys <= queries


class Pattern(Protocol):
    """Every position sees itself."""

    def __call__(self, queries: Tensor, keys: Tensor, causal: bool) -> Tensor: ...

    def covers(self, length: int) -> bool:
        """Whether it hides nothing among so many positions in a row, wherever they begin."""
        ...


@dataclass(frozen=True)
class Window:
    """Keys less than `size` positions away (Longformer, arXiv 2004.05150, section 3.1; Mistral, arXiv 2310.06825)."""

    size: int

    def __call__(self, queries: Tensor, keys: Tensor, causal: bool) -> Tensor:
        return (keys > queries - self.size) & (keys <= queries if causal else keys < queries + self.size)

    def covers(self, length: int) -> bool:
        return length <= self.size


@dataclass(frozen=True)
class BigBird:
    """Blocks of `size` positions that see each other (BigBird, arXiv 2007.14062, section 2 and appendix D).

    The first `global_blocks` see and are seen by all; a block sees the nearest `window_blocks`, an odd number with
    itself in the middle, and `random_blocks` of the others, drawn from `seed` and its own number alone: of those
    before it where `causal`, else of the first `reach`.
    """

    size: int
    global_blocks: int
    window_blocks: int
    random_blocks: int
    seed: int
    reach: int

    def __call__(self, queries: Tensor, keys: Tensor, causal: bool) -> Tensor:
        of_query, of_key = queries // self.size, keys // self.size
        count = int(torch.stack((of_query.max(), of_key.max())).max()) + 1
        table = blocks(self, 1 << (count - 1).bit_length(), causal).to(queries.device)
        seen = table[of_query, of_key]
        return seen & (keys <= queries) if causal else seen

    def covers(self, length: int) -> bool:
        return length <= self.size * (self.window_blocks // 2)


@lru_cache(maxsize=16)
def blocks(pattern: BigBird, count: int, causal: bool) -> Tensor:
    """bool (count, count): which block sees which."""
    number = torch.arange(count)
    table = (number[:, None] - number).abs() <= pattern.window_blocks // 2
    table[: pattern.global_blocks] = table[:, : pattern.global_blocks] = True
    for row in range(pattern.global_blocks, count):
        others = torch.arange(row if causal else pattern.reach)
        others = others[(others >= pattern.global_blocks) & ((others - row).abs() > pattern.window_blocks // 2)]
        draw = torch.Generator().manual_seed(pattern.seed * 1_000_003 + row)
        chosen = others[torch.randperm(len(others), generator=draw)[: pattern.random_blocks]]
        table[row, chosen[chosen < count]] = True
    return table.tril() if causal else table
