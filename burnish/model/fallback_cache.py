"""transformers' cache in the role of burnish's."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from burnish.model.cache import KVCache, Prefix

if TYPE_CHECKING:
    from burnish.model.fallback import Foreign


class Cache(KVCache):
    """transformers' cache, with what burnish knows of its slots."""

    def __init__(self, net: Foreign, rows: int, capacity: int):
        super().__init__(replace(net.spec, num_layers=0), rows, capacity, net.dtype, net.embed_tokens.weight.device)
        self.states: Any = net.new_states()
        slides = any(getattr(layer, "is_sliding", False) for layer in getattr(self.states, "layers", ()))
        self.shortens = not net.stateful and not slides

    def load(self, prefix: Prefix) -> None:
        super().load(Prefix(prefix.keys[:0], prefix.values[:0], prefix.lengths))
        rows = (len(self.valid), -1, -1, -1)
        for layer, (keys, values) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
            self.states.update(keys.expand(rows), values.expand(rows), layer)

    def as_prefix(self) -> Prefix:
        keys, values = ([getattr(layer, name) for layer in self.states.layers] for name in ("keys", "values"))
        return Prefix(torch.stack(keys), torch.stack(values))

    def select(self, rows: Tensor) -> None:
        super().select(rows)
        self.states.reorder_cache(rows)

    def shorten(self, length: int) -> None:
        if length < self.length:
            self.states.crop(length - self.length)
        super().shorten(length)
