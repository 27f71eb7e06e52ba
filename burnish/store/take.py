"""Taking layers of one model into another of the same widths.

A shallower student starts from every second layer of its teacher (DistilBERT, arXiv 1910.01108, section 3); the upper
layers of one checkpoint can be grafted onto another.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

import torch
from torch import nn

from burnish.config import UserError
from burnish.model.bundle import Model

# what layers of one network may differ in from those of another, and what matters to embeddings and heads alone
FREE = {"num_layers", "decoder_layers", "decoder_start", "sliding_layers", "head", "num_labels", "pooler", "mean_pool"}
OUTSIDE = {"vocab_size", "max_positions", "position_offset", "token_types", "embed_norm", "embed_scale", "tied"}
OUTSIDE |= {"head_bias", "logit_softcap", "logit_scale"}


@dataclass(frozen=True)
class LayersFrom:
    """`layers` of the model, counted from 0, take the places `into`, or the first ones. `embeddings` and `head` (with
    the final norm) come too where they are asked for."""

    model: str
    layers: list[int] = field(default_factory=list)
    into: list[int] | None = None
    embeddings: bool = False
    head: bool = False


@torch.no_grad()
def take(model: Model, source: Model, config: LayersFrom) -> Model:
    """Copy into `model`, which then is no stored checkpoint any more. Changes and returns `model`.

    Raises UserError for a source with techniques on it, one of other widths, and layers that are not there.
    """
    where, whole = f"layers_from: {config.model}", config.embeddings or config.head
    if not config.layers and not whole:
        raise UserError(f"{where}: nothing is taken; say which layers, as in layers: [0, 2, 4]")
    if any(one.chain and not one.whole for one in (source, model)):
        raise UserError(f"{where}: techniques are on it or on the model that takes its layers; merge them first")
    ours, theirs = asdict(model.spec), asdict(source.spec)
    checked = ours.keys() - FREE - (set() if whole else OUTSIDE)
    checked -= set() if model.spec.positions == "learned" else {"max_positions"}
    different = [name for name in ours if name in checked and ours[name] != theirs[name]]
    if different:
        what = "; ".join(f"{name} is {ours[name]} here, {theirs[name]} there" for name in different)
        raise UserError(f"{where}: its layers do not fit: {what}")
    into = list(range(len(config.layers))) if config.into is None else config.into
    for name, numbers, net in (("layers", config.layers, source.net), ("into", into, model.net)):
        beyond = [number for number in numbers if not 0 <= number < len(net.layers)]
        if beyond:
            raise UserError(f"{where}: {name}: there is no layer {beyond[0]}; they are 0 to {len(net.layers) - 1}")
    if len(into) != len(config.layers) or len(set(into)) != len(into):
        raise UserError(f"{where}: into: {into} are not {len(config.layers)} different layers, one for each taken")
    pairs = [
        (dict(model.net.layers[target].named_parameters()), dict(source.net.layers[number].named_parameters()))
        for target, number in zip(into, config.layers, strict=True)
    ]
    pairs += [(at(model, 0), at(source, 0))] if config.embeddings else []
    pairs += [(at(model, len(model.net.all_layers) + 1), at(source, len(source.net.all_layers) + 1))] * config.head
    missing = sorted(name for own, taken in pairs for name in own.keys() - taken.keys())
    if missing:
        raise UserError(f"{where}: it has no {', '.join(missing)} to take")
    for own, taken in pairs:
        for name, parameter in own.items():
            parameter.copy_(taken[name])
    model.identity = ""
    return model


def at(model: Model, level: int) -> dict[str, nn.Parameter]:
    """The parameters of a level of the network."""
    return {name: model.net.get_parameter(name) for name, found in model.net.levels().items() if found == level}
