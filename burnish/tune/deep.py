"""What deep prompts share: trained keys and values before the input in every layer (prefix tuning, P-tuning v2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from burnish.config import UserError
from burnish.model import soft
from burnish.model.bundle import Model


class PrefixEncoder(nn.Module):
    """() -> (P, layers * 2 * kv_heads * head_dim) in float32: a table, or an MLP over one, which adds to `start`."""

    start: nn.Parameter | None

    def __init__(self, length: int, hidden: int, width: int, middle: int, started: bool = False):
        super().__init__()
        self.embedding = nn.Embedding(length, hidden if middle else width)
        self.mlp = nn.Sequential(nn.Linear(hidden, middle), nn.Tanh(), nn.Linear(middle, width)) if middle else None
        self.start = nn.Parameter(torch.zeros(length, width), requires_grad=False) if middle and started else None

    def forward(self) -> Tensor:
        if self.mlp is None:
            return self.embedding.weight
        table = self.mlp(self.embedding.weight)
        return table if self.start is None else self.start + table

    @torch.no_grad()
    def begin(self, table: Tensor) -> None:
        """Start from a table (P, width)."""
        if self.mlp is None or self.start is None:
            self.embedding.weight.copy_(table)
            return
        self.start.copy_(table)
        for parameter in self.mlp[2].parameters():
            parameter.zero_()


def check(model: Model, name: str, length: int, middle: int, instead: str) -> None:
    """Raise UserError where no keys and values can stand before the input, `instead` being techniques that work there,
    and for an MLP of no units."""
    spec = model.spec.decoder
    if not spec.num_kv_heads:
        what = f"a {spec.family} {spec.kind} keeps no key-value cache to put a prefix into"
        raise UserError(f"technique '{name}': {what}; use {instead}")
    soft.check_length(spec, length, f"technique '{name}'")
    if middle < 1:
        raise UserError(f"technique '{name}': encoder_hidden_size is {middle}; at least 1 is needed")
    if any(isinstance(module, PrefixEncoder) for module in model.net.techniques.values()):
        raise UserError(f"technique '{name}': the model has a prefix already; keep one of the two")


def put(model: Model, name: str, layers: int, length: int, middle: int, started: bool = False) -> PrefixEncoder:
    """Add the prefix of `layers` layers to the model."""
    spec = model.spec
    width = layers * 2 * spec.num_kv_heads * spec.head_dim
    encoder = PrefixEncoder(length, spec.hidden_size, width, middle, started).to(model.device)
    model.net.techniques[name] = encoder
    return encoder


def flatten(keys: Tensor, values: Tensor) -> Tensor:
    """(layers, 1, kv_heads, P, head_dim) each -> (P, layers * 2 * kv_heads * head_dim), the inverse of `unflatten`."""
    return torch.stack((keys, values))[:, :, 0].permute(3, 1, 0, 2, 4).flatten(1)


def unflatten(model: Model, name: str) -> tuple[Tensor, Tensor]:
    """The prefix's keys and values, (layers, 1, kv_heads, P, head_dim) each."""
    spec = model.spec
    table = model.net.techniques[name]().to(model.net.dtype)
    shaped = table.view(len(table), -1, 2, spec.num_kv_heads, spec.head_dim).permute(2, 1, 3, 0, 4)
    keys, values = shaped[:, :, None]
    return keys, values


def lengths(batch: dict[str, Tensor], size: int) -> Tensor | None:
    """(B, T) how much of a prefix of `size` each token sees, None for all."""
    asked = batch.get("virtual_tokens")
    if asked is None:
        return None
    row = asked.amax(dim=1, keepdim=True)  # padding sees what its row sees: a cache asks a row's first position
    return torch.where(batch["attention_mask"], asked, row).clamp(max=size)


def finalize(model: Model, name: str) -> None:
    """Keep the keys and values themselves; the MLP is dropped."""
    with torch.no_grad():
        table = model.net.techniques[name]()
    plain = PrefixEncoder(len(table), 0, table.shape[1], 0).to(table.device)
    plain.embedding.weight = nn.Parameter(table.clone())
    model.net.techniques[name] = plain
