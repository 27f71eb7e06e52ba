"""Keys and values of many rows in one pool of pages, so that rows of any length come and go.

PagedAttention (arXiv 2309.06180, sections 4.1 and 4.2): a page holds the keys and values of `block_size` tokens, and a
row's table names its pages in their order, wherever they lie. A forward over tokens of many rows is one row of tokens
(1, N) for everything but attention, which each `View` of a `Step` does by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from burnish.model.attention import Frame, visibility
from burnish.model.cache import KVCache, Prefix
from burnish.model.spec import Spec
from burnish.native import paged

INT8_MAX = 127


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (..., head_dim) -> int8 codes of its shape and float32 scales (..., 1): codes * scales is x to within half a
    scale, 1/254 of the largest magnitude of its head and token."""
    wide = x.float()
    scale = wide.abs().amax(-1, keepdim=True) / INT8_MAX
    return (wide / scale.clamp(min=torch.finfo(torch.float32).tiny)).round().to(torch.int8), scale


class Pages:
    """Keys and values of `count` pages; slot s, a token's, is in page s // block_size.

    `stored` is (2, layers, kv_heads, slots, head_dim), keys before values, in `dtype` or as int8 with `scales`
    (2, layers, kv_heads, slots, 1).
    """

    def __init__(
        self, spec: Spec, count: int, block_size: int, dtype: torch.dtype, device: torch.device, int8: bool = False
    ):
        self.block_size, self.dtype = block_size, dtype
        shape = (2, spec.num_layers, spec.num_kv_heads, count * block_size)
        self.stored = torch.empty(*shape, spec.head_dim, dtype=torch.int8 if int8 else dtype, device=device)
        self.scales = torch.empty(*shape, 1, dtype=torch.float32, device=device) if int8 else None

    @staticmethod
    def bytes_of(spec: Spec, block_size: int, dtype: torch.dtype, int8: bool) -> int:
        """What one page takes."""
        head = spec.head_dim + 4 if int8 else spec.head_dim * dtype.itemsize
        return 2 * spec.num_layers * block_size * spec.num_kv_heads * head

    @property
    def nbytes(self) -> int:
        return self.stored.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put keys and values (kv_heads, n, head_dim) into slots (n,) of a layer."""
        for kind, x in enumerate((keys, values)):
            if self.scales is not None:
                x, scale = quantize(x)
                self.scales[kind, layer].index_copy_(1, slots, scale)
            self.stored[kind, layer].index_copy_(1, slots, x.to(self.stored.dtype))

    def of(self, layer: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor] | None]:
        """A layer's keys and values, and their scales in int8."""
        scales = None if self.scales is None else (self.scales[0, layer], self.scales[1, layer])
        return (self.stored[0, layer], self.stored[1, layer]), scales

    def read(self, layer: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values (B, kv_heads, S, head_dim) in slots (B, S) of a layer."""
        found = []
        for kind in range(2):
            x = self.stored[kind, layer][:, slots]
            if self.scales is not None:
                x = (x * self.scales[kind, layer][:, slots]).to(self.dtype)
            found.append(x.transpose(0, 1))
        return found[0], found[1]


class View(KVCache):
    """B rows of a pool as a cache that ends with their T new tokens, written when a layer `update`s.

    tables: each row's pages; lengths: its tokens with the new ones; prefixes: how many of the first are a prefix's.
    Rows end together, so that short ones have holes before them; a slot's position is its place in the row.
    """

    def __init__(
        self, pages: Pages, tables: Sequence[Sequence[int]], lengths: Sequence[int], new: int, prefixes: Sequence[int]
    ):
        device, size = pages.stored.device, pages.block_size
        self.pages, self.new, self.length = pages, new, max(lengths)
        places = torch.arange(self.length) - (self.length - torch.tensor(lengths))[:, None]
        self.holes = min(lengths) < self.length
        positions = places.clamp(min=0)
        width = -(-self.length // size)
        padded = torch.tensor([[*table[:width], *[0] * (width - len(table))] for table in tables])
        slots = padded.gather(1, positions // size) * size + positions % size
        self.valid, self.positions, self.slots = (places >= 0).to(device), positions.to(device), slots.to(device)
        self.prefixes = torch.tensor(prefixes, device=device)

    def of_prefix(self) -> Tensor:
        return self.positions < self.prefixes[:, None]

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self.write(layer, keys, values)
        return self.pages.read(layer, self.slots)

    def attend(self, layer: int, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Any:
        if self.new > 1 or not paged.takes(q):
            return None
        self.write(layer, keys, values)
        stored, scales = self.pages.of(layer)
        return paged.attention(q[:, :, 0], stored, scales, self.slots, mask, scale)[:, None]

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        fresh = (x.transpose(0, 1).flatten(1, 2) for x in (keys, values))
        self.pages.write(layer, self.slots[:, self.length - self.new :].flatten(), *fresh)

    def load(self, prefix: Prefix) -> None:
        """Write the new tokens of one row: a prefix's last ones."""
        keys, values = (x[:, 0, :, prefix.size - self.new :] for x in (prefix.keys, prefix.values))
        for layer, each in enumerate(zip(keys, values, strict=True)):
            self.pages.write(layer, self.slots[0, -self.new :], *each)


class Step(KVCache):
    """The cache of a forward over the new tokens of several views, (1, N), one view's after the other's."""

    length = 1  # never empty: prefixes are in the pages

    def __init__(self, views: Sequence[View]):
        self.views = views

    def after(self, positions: Tensor) -> Tensor:
        return torch.cat([view.positions[:, -view.new :].flatten() for view in self.views])[None]

    def reserve(self, valid: Tensor | None, positions: Tensor) -> None:
        """Each view has its place already."""

    def parts(self, spec: Spec, dtype: torch.dtype, bias: Tensor | None) -> list[Frame]:
        """A frame for each view, whose queries come rotated; `bias` as `visibility` takes it."""
        found = []
        for view in self.views:
            positions = view.positions[:, -view.new :]
            mask, causal = visibility(spec, positions, None, None, view, None, dtype, bias)
            found.append(Frame(len(positions), view.new, mask, causal, None, view, None))
        return found
