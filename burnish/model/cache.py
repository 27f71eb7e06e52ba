"""Keys and values kept between forwards.

`KVCache` is preallocated storage that generation writes into. `Prefix` is a short run of keys and values that stands
before every row (prefix tuning, a soft prompt that all rows begin with) and carries gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from burnish.model.spec import Spec


@dataclass
class Prefix:
    """Learnt keys and values of P positions; `keys` and `values` are (layers, 1, kv_heads, P, head_dim).

    `lengths` (B, T) tells how many of the last P positions each token may see, which lets rows (and the documents of
    a packed row) use prefixes of different length; None means all P. Positions of the tokens start after it. `source`
    stands before an encoder-decoder's source.
    """

    keys: Tensor
    values: Tensor
    lengths: Tensor | None = None
    source: Prefix | None = None

    @property
    def size(self) -> int:
        return self.keys.shape[3]


class KVCache:
    """Per-layer keys and values of shape (B, kv_heads, capacity, head_dim), filled from slot 0 on.

    `valid` (B, capacity) marks slots that hold a real token, `positions` (B, capacity) their position; the first
    `prefix` slots hold a prefix. `source` is what the rows of an encoder-decoder attend to. `shortens` tells whether
    the last tokens can be taken back.
    """

    shortens = True

    def __init__(self, spec: Spec, batch: int, capacity: int, dtype: torch.dtype, device: torch.device | str = "cpu"):
        shape = (spec.num_layers, batch, spec.num_kv_heads, capacity, spec.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.valid = torch.zeros(batch, capacity, dtype=torch.bool, device=device)
        self.positions = torch.zeros(batch, capacity, dtype=torch.long, device=device)
        self.length = 0
        self.prefix = 0
        self.source: Any = None
        self.holes = False  # whether some filled slot of some row holds no token

    @property
    def capacity(self) -> int:
        return self.keys.shape[3]

    def next_positions(self) -> Tensor:
        """(B,) the position that each row's next token takes: one past its largest valid position."""
        past = torch.where(self.valid, self.positions, torch.full_like(self.positions, -1))
        return past[:, : max(self.length, 1)].max(dim=1).values + 1

    def after(self, positions: Tensor) -> Tensor:
        """(B, T) the positions of new tokens, which `positions` (B, T) counts from 0."""
        return positions + self.next_positions()[:, None] if self.length else positions

    def of_prefix(self) -> Tensor:
        """bool, to broadcast against (B, length): the slots that hold a prefix."""
        return torch.arange(self.length, device=self.valid.device)[None] < self.prefix

    def load(self, prefix: Prefix) -> None:
        """Put a prefix into the first slots; each row sees the last `lengths[row, 0]` of them."""
        size = prefix.size
        self.keys[:, :, :, :size] = prefix.keys
        self.values[:, :, :, :size] = prefix.values
        slots = torch.arange(size, device=self.valid.device)
        lengths = slots.new_full((len(self.valid), 1), size) if prefix.lengths is None else prefix.lengths[:, :1]
        self.positions[:, :size] = slots - (size - lengths)
        self.valid[:, :size] = self.positions[:, :size] >= 0
        self.length = self.prefix = size
        self.holes = prefix.lengths is not None

    def reserve(self, valid: Tensor | None, positions: Tensor) -> None:
        """Announce the next T tokens, (B, T) each: the layers then `update` the same slots. None: all valid."""
        end = self.length + positions.shape[1]
        self.valid[:, self.length : end] = True if valid is None else valid
        self.holes |= valid is not None
        self.positions[:, self.length : end] = positions
        self.length = end

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write (B, kv_heads, T, head_dim) into the reserved slots and return all filled slots of the layer."""
        start = self.length - keys.shape[2]
        self.keys[layer, :, :, start : self.length] = keys
        self.values[layer, :, :, start : self.length] = values
        return self.keys[layer, :, :, : self.length], self.values[layer, :, :, : self.length]

    def attend(self, layer: int, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Any:
        """`update` and the attention of q (B, heads, T, head_dim) together, as (B, T, heads, head_dim), where there is
        a shorter way than over what `update` returns; else None, and nothing is written."""
        return None

    def shorten(self, length: int) -> None:
        """Take back what is beyond the first `length` slots."""
        self.length = length
        self.valid[:, length:] = False

    def as_prefix(self) -> Prefix:
        """What a cache of one row holds, to stand before others."""
        return Prefix(self.keys[:, :, :, : self.length], self.values[:, :, :, : self.length])

    def select(self, rows: Tensor) -> None:
        """Keep or reorder rows: `rows` (B',) indexes the batch dimension."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]
        self.valid, self.positions = self.valid[rows], self.positions[rows]
        self.source = self.source and self.source.select(rows)


class Recorder(KVCache):
    """Keeps the keys and values of one forward over a single row as they are, with their gradients."""

    def __init__(self, spec: Spec, capacity: int, dtype: torch.dtype, device: torch.device):
        super().__init__(spec, 1, capacity, dtype, device)
        self.seen: list[tuple[Tensor, Tensor]] = []

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self.seen.append((keys, values))
        return keys, values

    def as_prefix(self) -> Prefix:
        keys, values = (torch.stack(part) for part in zip(*self.seen, strict=True))
        return Prefix(keys, values)
