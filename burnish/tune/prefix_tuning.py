"""Prefix tuning: trained keys and values before the input in every layer, the model frozen.

    [K_i; V_i] = reshape(MLP(E)),    MLP = Linear(hidden, mid), Tanh, Linear(mid, layers * 2 * kv_width)

Source: "Prefix-Tuning" (arXiv 2101.00190), sections 4.2 and 4.3: the reparametrisation makes training stable and is
dropped afterwards. The prefix fills the attention's keys and values and lengthens no computation but attention's.
Positions of the tokens start after it, and layers with a sliding window see it from anywhere. Limits: decoders only; an
encoder-decoder gets it in the self-attention of its decoder.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from burnish.config import UserError
from burnish.model.bundle import Context, Model
from burnish.model.cache import Prefix

NAME = "prefix_tuning"


@dataclass(frozen=True)
class Config:
    """`prefix_projection`: reparametrise by the MLP with `encoder_hidden_size` units (section 4.3)."""

    num_virtual_tokens: int = 5
    prefix_projection: bool = True
    encoder_hidden_size: int = 512
    finalized: bool = False


class PrefixEncoder(nn.Module):
    """() -> (P, layers * 2 * kv_heads * head_dim) in float32."""

    def __init__(self, length: int, hidden: int, width: int, middle: int):
        super().__init__()
        self.embedding = nn.Embedding(length, hidden if middle else width)
        self.mlp = nn.Sequential(nn.Linear(hidden, middle), nn.Tanh(), nn.Linear(middle, width)) if middle else None

    def forward(self) -> Tensor:
        return self.embedding.weight if self.mlp is None else self.mlp(self.embedding.weight)


def apply(model: Model, config: Config, context: Context) -> Config:
    """Add the prefix. Raises UserError on an encoder, which has no keys and values to start from."""
    spec = model.spec.decoder
    if not spec.causal or not spec.num_kv_heads:
        raise UserError(
            f"technique '{NAME}': a {spec.family} {spec.kind} keeps no key-value cache to put a prefix into; "
            "use prompt_tuning or p_tuning"
        )
    if config.num_virtual_tokens < 1:
        raise UserError(f"technique '{NAME}': num_virtual_tokens is {config.num_virtual_tokens}; at least 1 is needed")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(context.seed)
        rebuild(model, config)
    return config


def rebuild(model: Model, config: Config) -> None:
    spec = model.spec.decoder
    width = spec.num_layers * 2 * spec.num_kv_heads * spec.head_dim
    middle = config.encoder_hidden_size if config.prefix_projection and not config.finalized else 0
    encoder = PrefixEncoder(config.num_virtual_tokens, spec.hidden_size, width, middle)
    model.net.techniques[NAME] = encoder.to(model.device)


def initial_cache(model: Model, config: Config, batch: dict[str, Tensor]) -> Prefix:
    spec = model.spec.decoder
    table = model.net.techniques[NAME]().to(model.net.dtype)
    # (P, layers * 2 * width) -> (2, layers, 1, kv_heads, P, head_dim)
    shaped = table.view(len(table), spec.num_layers, 2, spec.num_kv_heads, spec.head_dim).permute(2, 1, 3, 0, 4)
    keys, values = shaped[:, :, None]
    lengths = batch.get("virtual_tokens")
    if lengths is not None:  # padding sees what its row sees: a cache asks a row's first position, padded or not
        row = lengths.amax(dim=1, keepdim=True)
        lengths = torch.where(batch["attention_mask"], lengths, row).clamp(max=len(table))
    return Prefix(keys, values, lengths)


def finalize(model: Model, config: Config) -> Config:
    """Keep the keys and values themselves; the MLP is dropped."""
    with torch.no_grad():
        table = model.net.techniques[NAME]()
    plain = PrefixEncoder(len(table), 0, table.shape[1], 0).to(table.device)
    plain.embedding.weight = nn.Parameter(table.clone())
    model.net.techniques[NAME] = plain
    return replace(config, finalized=True)
