"""Several LoRA adapters on one base, of which each row of a batch takes its own or none.

Rows under different adapters share the base's products; each adapter's thin products run over the tokens of its rows
alone (as in S-LoRA, arXiv 2311.03285, section 4, without its kernels). For inference: nothing of it trains.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from burnish.config import UserError, nearest
from burnish.model.bundle import Model
from burnish.model.linear import Linear, by_tokens, is_flat
from burnish.model.surgery import replace as put
from burnish.tune.lora import Config, DoRALinear, LoRALinear

IDS = "adapter_ids"  # of a batch: each row's adapter (B,), -1 for none


class Adapters:
    """The adapters of a model by name, and which one each token of the forward under way goes through."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.chosen = -1
        self.rows: Tensor | None = None  # (B,) of the forward under way
        self.masks: dict[str, Tensor] = {}
        self.known: dict[tuple[str, int], list[tuple[int, Tensor | None]]] = {}

    @property
    def active(self) -> str | None:
        """The adapter of all rows of a batch that names none; None for the bare base."""
        return None if self.chosen < 0 else self.names[self.chosen]

    @active.setter
    def active(self, name: str | None) -> None:
        self.chosen = self.number(name)

    def number(self, name: str | None) -> int:
        """An adapter's number in `adapter_ids`, -1 for None. Raises UserError for a name that is not loaded."""
        if name is not None and name not in self.names:
            raise UserError(
                f"adapter '{name}' is not loaded{nearest(name, self.names)}; loaded: {', '.join(self.names)}"
            )
        return -1 if name is None else self.names.index(name)

    @contextmanager
    def routed(self, batch: Mapping[str, Tensor]) -> Iterator[None]:
        """Send the batch's rows through their adapters inside the block."""
        ids = batch["input_ids"]
        rows = batch.get(IDS)
        self.rows = torch.full((len(ids),), self.chosen, device=ids.device) if rows is None else rows
        self.masks = {name: mask.bool() for name, mask in batch.items() if name.endswith("attention_mask")}
        self.known = {}
        try:
            yield
        finally:
            self.rows = None

    def groups(self, mask: str, count: int) -> list[tuple[int, Tensor | None]]:
        """(adapter, the places of its tokens) of `count` tokens, None for all: the real ones of a mask of the batch, or
        of rows of equal length where it has none of that name."""
        if self.rows is None:
            return []
        if (mask, count) not in self.known:
            real = self.masks.get(mask)
            if real is None:
                tokens = self.rows.repeat_interleave(count // len(self.rows))
            else:
                tokens = self.rows[:, None].expand(real.shape)[real]
            present = tokens.unique().tolist()
            self.known[mask, count] = [
                (number, None if len(present) == 1 else (tokens == number).nonzero()[:, 0])
                for number in present
                if number >= 0
            ]
        return self.known[mask, count]

    def add(self, model: Model, name: str, config: Config) -> dict[str, LoRALinear]:
        """Put a new adapter beside the others; returns its layers by path, which are to be filled."""
        self.names.append(name)
        kind, number, layers = DoRALinear if config.use_dora else LoRALinear, len(self.names) - 1, {}
        for path in config.target_modules or ():
            if not isinstance(model.net.get_submodule(path), Mixed):
                mask = mask_of(model, path)
                put(model.net, path, lambda base, mask=mask: Mixed(base, self, mask), "load_adapters")  # type: ignore
            mixed: Any = model.net.get_submodule(path)
            layers[path] = mixed.adapters[str(number)] = kind(mixed.base, config.of(path)).requires_grad_(False)
        return layers


class Mixed(nn.Module):
    """A projection whose tokens go through the adapters of their rows; x (tokens, in) -> (tokens, out)."""

    base: Linear
    owner: Adapters

    def __init__(self, base: Linear, owner: Adapters, mask: str):
        super().__init__()
        self.base, self.foreign, self.mask = base, base.foreign, mask
        self.adapters = nn.ModuleDict()
        self.__dict__["owner"] = owner

    def forward(self, x: Tensor) -> Tensor:
        if self.foreign and not is_flat(x):
            return by_tokens(self, x)
        y = self.base(x)
        for number, places in self.owner.groups(self.mask, len(x)):
            if str(number) not in self.adapters:
                continue
            layer: Any = self.adapters[str(number)]
            if places is None:
                return layer.onto(y, x)
            y.index_copy_(0, places, layer.onto(y[places], x[places]))
        return y


def mask_of(model: Model, path: str) -> str:
    """The mask of a batch whose real tokens a projection sees, "" where it sees whole rows."""
    rows = ".cross_attn." in path and path.endswith(("k_proj", "v_proj"))  # of the source
    if rows or model.net.get_submodule(path).foreign:
        return ""
    return "source_attention_mask" if model.spec.paired and path.startswith("layers.") else "attention_mask"
