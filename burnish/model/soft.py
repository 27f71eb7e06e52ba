"""What soft prompts share: pseudo tokens inside an example, and their embeddings inside a batch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from burnish.config import UserError
from burnish.model.example import IGNORE, Example
from burnish.model.network import Network
from burnish.model.spec import Spec


def first_slot(net: Network) -> int:
    """The first slot number that no technique of the network uses yet."""
    return sum(getattr(module, "num_slots", 0) for module in net.techniques.values())


def repeated(tokenizer: Any, text: str, count: int, where: str) -> Tensor:
    """(count,) ids of a text, repeated or cut to length. Raises UserError for one without a token."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise UserError(f"{where}: init_text is empty; give it some words")
    return torch.tensor([ids[i % len(ids)] for i in range(count)])


def check_length(spec: Spec, count: int, where: str) -> None:
    """Raise UserError where `count` virtual tokens are none, or leave no position to a model's input."""
    if count < 1:
        raise UserError(f"{where}: num_virtual_tokens is {count}; at least 1 is needed")
    room = spec.max_positions if spec.positions in ("learned", "rotary") and not spec.rope_scaling else 0
    if 0 < room <= count:
        raise UserError(
            f"{where}: num_virtual_tokens is {count}, and the model has {room} positions, which its input needs too"
        )


def insert(example: Example, at: int, slots: list[int]) -> Example:
    """The example with pseudo tokens `slots` before position `at`; they are never trained as targets."""
    count = len(slots)
    old = example.slots or [-1] * len(example.ids)
    types = example.token_types
    return replace(
        example,
        ids=example.ids[:at] + [0] * count + example.ids[at:],
        labels=example.labels[:at] + [IGNORE] * count + example.labels[at:],
        slots=old[:at] + slots + old[at:],
        token_types=None if types is None else types[:at] + [types[min(at, len(types) - 1)]] * count + types[at:],
    )


def fill(embeds: Tensor, slots: Tensor, table: Tensor, first: int) -> Tensor:
    """embeds (B, T, H) with row slot - first of `table` (n, H) wherever slots (B, T) lies in [first, first + n)."""
    local = slots - first
    mine = (local >= 0) & (local < len(table))
    return torch.where(mine[..., None], table.to(embeds.dtype)[local.clamp(0, len(table) - 1)], embeds)


def leading(slots: Tensor) -> int:
    """How many pseudo tokens all rows of slots (B, T) begin with, the same in each; the last token is not counted."""
    same = ((slots == slots[:1]) & (slots >= 0)).all(dim=0)[:-1]
    return int(same.long().cumprod(0).sum())
