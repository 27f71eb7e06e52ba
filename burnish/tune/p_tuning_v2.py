"""P-tuning v2: trained keys and values before the input in every layer, for encoders as for decoders.

    attention(Q, [P_K; K], [P_V; V]) in each layer,    [P_K; P_V] = E, or MLP(E) = Linear(Tanh(Linear(E)))

Source: "P-Tuning v2" (arXiv 2110.07602), section 3: deep prompts without the reparametrisation, which
`prefix_projection` brings back where it helps, and a classification head on top instead of words
([transfer, p_tuning_v2]). Keys and values start with a standard deviation of 0.02, as transformers draws new weights.
An encoder-decoder gets prompts in both of its stacks. Positions of the tokens start after the prefix, an encoder's too,
as in transformers' BERT with past_key_values, which peft's PREFIX_TUNING fills. Limits: no models without keys and
values, nor encoders that run through transformers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from burnish.config import UserError, option
from burnish.model.bundle import Context, Model
from burnish.model.cache import Prefix
from burnish.model.transformer import Transformer
from burnish.tune import deep

NAME = "p_tuning_v2"


@dataclass(frozen=True)
class Config:
    """The prefix and its reparametrisation."""

    num_virtual_tokens: int = option(
        20, "positions of the prefix, in every layer: under 20 for simple classification, 100 for hard tasks"
    )
    prefix_projection: bool = option(False, "reparametrise by an MLP while training")
    encoder_hidden_size: int = option(512, "units of that MLP")
    finalized: bool = option(False, "follows: whether only keys and values are left")


def apply(model: Model, config: Config, context: Context) -> Config:
    """Add the prefix. Raises UserError for a network that takes none."""
    spec = model.spec
    deep.check(model, NAME, config.num_virtual_tokens, config.encoder_hidden_size, "prompt_tuning or p_tuning")
    if spec.kind == "encoder" and not isinstance(model.net, Transformer):
        raise UserError(
            f"technique '{NAME}': a {spec.family} encoder, run by transformers, takes no prefix; "
            "use prompt_tuning or p_tuning"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(context.seed)
        rebuild(model, config)
        if not config.prefix_projection:
            model.net.techniques[NAME].get_parameter("embedding.weight").data.normal_(std=0.02)
    return config


def rebuild(model: Model, config: Config) -> None:
    spec = model.spec
    layers = spec.num_layers + (spec.decoder_layers if spec.paired else 0)
    middle = config.encoder_hidden_size if config.prefix_projection and not config.finalized else 0
    deep.put(model, NAME, layers, config.num_virtual_tokens, middle)


def initial_cache(model: Model, config: Config, batch: dict[str, Tensor]) -> Prefix:
    keys, values = deep.unflatten(model, NAME)
    lengths, source = deep.lengths(batch, keys.shape[3]), None
    if model.spec.paired:  # the encoder's layers come first
        count = model.spec.num_layers
        seen = lengths
        if lengths is not None and "source_input_ids" in batch:
            seen = lengths.amax(dim=1, keepdim=True).expand_as(batch["source_input_ids"])
        source = Prefix(keys[:count], values[:count], seen)
        keys, values = keys[count:], values[count:]
    return Prefix(keys, values, lengths, source)


def finalize(model: Model, config: Config) -> Config:
    deep.finalize(model, NAME)
    return replace(config, finalized=True)
