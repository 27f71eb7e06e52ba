"""Prefix tuning: trained keys and values before the input in every layer, the model frozen.

    [K_i; V_i] = reshape(MLP(E)),    MLP = Linear(hidden, mid), Tanh, Linear(mid, layers * 2 * kv_width)

Source: "Prefix-Tuning" (arXiv 2101.00190), sections 4.2 and 4.3: the reparametrisation makes training stable and is
dropped afterwards. Section 7.4: a start from the keys and values of real words (`init_text`), which helps most where
there is little data: at the start the model answers as if those words stood before its input. The prefix fills the
attention's keys and values and lengthens no computation but attention's. Positions of the tokens start after it, and
layers with a sliding window see it from anywhere. Limits: decoders only; an encoder-decoder gets it in the
self-attention of its decoder.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from burnish.config import UserError, option
from burnish.model import soft
from burnish.model.bundle import Context, Model
from burnish.model.cache import Prefix
from burnish.tune import deep

NAME = "prefix_tuning"


@dataclass(frozen=True)
class Config:
    """The prefix and its reparametrisation."""

    num_virtual_tokens: int = option(5, "positions of the prefix, in every layer")
    prefix_projection: bool = option(True, "reparametrise by an MLP while training (section 4.3)")
    encoder_hidden_size: int = option(512, "units of that MLP")
    init_text: str | None = option(
        None, "start from these words, repeated or cut to num_virtual_tokens; the MLP adds to their keys and values"
    )
    finalized: bool = option(False, "follows: whether only keys and values are left")


def apply(model: Model, config: Config, context: Context) -> Config:
    """Add the prefix. Raises UserError on an encoder, and for `init_text` where there are no words to record."""
    spec = model.spec.decoder
    if spec.kind == "encoder":
        raise UserError(
            f"technique '{NAME}': a {spec.family} encoder keeps no key-value cache to put a prefix into; "
            "use p_tuning_v2, or prompt_tuning"
        )
    deep.check(model, NAME, config.num_virtual_tokens, config.encoder_hidden_size, "prompt_tuning or p_tuning")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(context.seed)
        rebuild(model, config)
    if config.init_text is not None:
        cast(deep.PrefixEncoder, model.net.techniques[NAME]).begin(recorded(model, config))
    return config


@torch.no_grad()
def recorded(model: Model, config: Config) -> Tensor:
    """(P, layers * 2 * kv_heads * head_dim): the keys and values of `init_text`'s words in every layer."""
    if model.spec.paired:
        raise UserError(f"technique '{NAME}': init_text is for models of one stack, whose text stands before the input")
    count = config.num_virtual_tokens
    ids = soft.repeated(model.tokenizer, config.init_text or "", count, f"technique '{NAME}'").to(model.device)
    cache = model.net.new_cache(1, count)
    model.net(ids[None], cache=cache)
    found = cache.as_prefix()
    return deep.flatten(found.keys, found.values)


def rebuild(model: Model, config: Config) -> None:
    middle = config.encoder_hidden_size if config.prefix_projection and not config.finalized else 0
    layers = model.spec.decoder.num_layers
    deep.put(model, NAME, layers, config.num_virtual_tokens, middle, bool(config.init_text))


def initial_cache(model: Model, config: Config, batch: dict[str, Tensor]) -> Prefix:
    keys, values = deep.unflatten(model, NAME)
    return Prefix(keys, values, deep.lengths(batch, keys.shape[3]))


def finalize(model: Model, config: Config) -> Config:
    deep.finalize(model, NAME)
    return replace(config, finalized=True)
