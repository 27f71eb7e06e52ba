"""Keys and values kept between forwards.

`KVCache` is preallocated storage that generation writes into. `Prefix` is a short run of keys and values that stands
before every row (prefix tuning, a soft prompt that all rows begin with) and carries gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, replace
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

    def heads(self, kept: list[int]) -> Prefix:
        """Of every layer the key-value heads in `kept`."""
        source = self.source and self.source.heads(kept)
        return replace(self, keys=self.keys[:, :, kept], values=self.values[:, :, kept], source=source)

    def on(self, device: torch.device) -> Prefix:
        """The same on another device."""
        return replace(self, keys=self.keys.to(device), values=self.values.to(device))


class KVCache:
    """Keys and values (B, kv_heads, capacity, head_dim) by layer, filled from slot 0 on.

    `layers` are those that are kept, each with the device that it lies on; all of them, on `device`, without it.
    `valid` (B, capacity) marks slots that hold a real token, `positions` (B, capacity) their position; the first
    `prefix` slots hold a prefix. `source` is what the rows of an encoder-decoder attend to. `shortens` tells whether
    the last tokens can be taken back.
    """

    shortens = True

    def __init__(
        self,
        spec: Spec,
        batch: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        layers: Mapping[int, torch.device] | None = None,
    ):
        shape = (batch, spec.num_kv_heads, capacity, spec.head_dim)
        places = dict.fromkeys(range(spec.num_layers), device) if layers is None else layers
        self.keys = {layer: torch.zeros(shape, dtype=dtype, device=place) for layer, place in places.items()}
        self.values = {layer: torch.zeros(shape, dtype=dtype, device=place) for layer, place in places.items()}
        self.valid = torch.zeros(batch, capacity, dtype=torch.bool, device=device)
        self.positions = torch.zeros(batch, capacity, dtype=torch.long, device=device)
        self.length = 0
        self.prefix = 0
        self.source: Any = None
        self.holes = False  # whether some filled slot of some row holds no token

    @property
    def capacity(self) -> int:
        return self.valid.shape[1]

    def next_positions(self) -> Tensor:
        """(B,) the position that each row's next token takes: one past its largest valid position."""
        past = torch.where(self.valid, self.positions, torch.full_like(self.positions, -1))
        return past[:, : max(self.length, 1)].max(dim=1).values + 1

    def after(self, positions: Tensor) -> Tensor:
        """(B, T) the positions of new tokens, which `positions` (B, T) counts from 0."""
        return positions + self.next_positions()[:, None] if self.length else positions

    def newest(self, count: int) -> Tensor:
        """(count,) the slots of the last tokens."""
        return torch.arange(self.length - count, self.length, device=self.valid.device)

    def of_prefix(self) -> Tensor:
        """bool, to broadcast against (B, length): the slots that hold a prefix."""
        return torch.arange(self.length, device=self.valid.device)[None] < self.prefix

    def load(self, prefix: Prefix) -> None:
        """Put a prefix into the first slots; each row sees the last `lengths[row, 0]` of them."""
        size = prefix.size
        for layer in self.keys:
            self.keys[layer][:, :, :size] = prefix.keys[layer]
            self.values[layer][:, :, :size] = prefix.values[layer]
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
        own_keys, own_values = self.keys[layer], self.values[layer]
        own_keys[:, :, start : self.length] = keys
        own_values[:, :, start : self.length] = values
        return own_keys[:, :, : self.length], own_values[:, :, : self.length]

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
        keys, values = (
            torch.stack([x[:, :, : self.length] for x in part.values()]) for part in (self.keys, self.values)
        )
        return Prefix(keys, values)

    def part(self, rows: slice) -> KVCache:
        """A view of some rows, into which their layers `update` what this cache has reserved."""
        found = copy(self)
        found.keys = {layer: keys[rows] for layer, keys in self.keys.items()}
        found.values = {layer: values[rows] for layer, values in self.values.items()}
        return found

    def select(self, rows: Tensor) -> None:
        """Keep or reorder rows: `rows` (B',) indexes the batch dimension."""
        for part in (self.keys, self.values):
            for layer, kept in part.items():
                part[layer] = kept[rows.to(kept.device)]
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
