"""Transfer learning: keep a pretrained body, freeze all or its lower part, and train a new head on top.

The new head classifies: a linear layer over the first token's pooled state (encoders) or the last token's state
(decoders). Of an encoder-decoder (T5) the encoder alone stays, and its head pools the mean of the states: its texts
begin with no mark, and the mean did better than the first token (Sentence-T5, arXiv 2108.08877). Or the new head is a
language model's, on a decoder or an encoder, with a matrix of its own beside the embedding. Source: the practice of
ULMFiT (arXiv 1801.06146), section 3.3, and BERT (arXiv 1810.04805), section 4; rates by layer are ULMFiT's, section
3.1. In a chain it comes first: [transfer, lora] adapts the body beside the new head.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from burnish.config import UserError, option
from burnish.model.bundle import Context, Model
from burnish.model.families import FAMILIES
from burnish.model.surgery import linears
from burnish.tune.unfreeze import DECAY, check_decay, layer_groups, unfreeze

CHANGES_BASE = True
PLAIN = True
NEW_HEAD = True


@dataclass(frozen=True)
class Config:
    """The new head, and which layers train with it."""

    num_labels: int = option(2, "classes; burnish tune takes them from the data")
    train_layers: int = option(0, "upper layers that train with the head; -1: all of them and the embeddings")
    label_names: list[str] | None = option(None, "the classes' names, in the order of their numbers")
    freeze_layers: int | None = option(None, "lower layers that do not train, instead of train_layers")
    head: Literal["classification", "lm"] = option("classification", "a classifier, or a language model's head")
    layer_lr_decay: float = option(1.0, DECAY)


def apply(model: Model, config: Config, context: Context) -> Config:
    """Put the head on, start it with Gaussian weights of standard deviation 0.02, and unfreeze what trains."""
    check_decay(model, "transfer", config.layer_lr_decay)
    if config.head == "lm":
        check_language_model(model, config)
    elif config.num_labels < 2:
        raise UserError(f"technique 'transfer': num_labels is {config.num_labels}; a classifier needs at least 2")
    count, frozen = len(model.net.layers), config.freeze_layers
    if frozen is not None:
        if config.train_layers:
            raise UserError("technique 'transfer': train_layers and freeze_layers are both given; keep one of them")
        if not 0 <= frozen <= count:
            raise UserError(f"technique 'transfer': freeze_layers is {frozen}; the model has {count} layers")
        config = replace(config, train_layers=count - frozen if frozen else -1, freeze_layers=None)
    if not -1 <= config.train_layers <= count:
        raise UserError(f"technique 'transfer': train_layers is {config.train_layers}; the model has {count} layers")
    if config.label_names is not None and len(config.label_names) != config.num_labels:
        raise UserError(
            f"technique 'transfer': {len(config.label_names)} label_names do not fit num_labels {config.num_labels}"
        )
    shrinks = list(model.chain) if model.spec.paired else []
    for link in shrinks:
        if not hasattr(link.config, "without"):
            raise UserError(
                f"technique 'transfer': it leaves the decoder away, which '{link.name}' has changed; put transfer first"
            )
    kept = set(model.net.head_modules())
    rebuild(model, config)
    left = {path for path, _ in linears(model.net)}
    for link in shrinks:
        link.config = link.config.without([path for path in link.config.target_modules if path not in left])
    generator = torch.Generator().manual_seed(context.seed)
    with torch.no_grad():
        for module in model.net.head_modules():
            for parameter in module.parameters() if module not in kept else ():
                if parameter.dim() > 1:
                    parameter.copy_(torch.empty(parameter.shape).normal_(0, 0.02, generator=generator))
    return config


def check_language_model(model: Model, config: Config) -> None:
    """Raise UserError where the model takes no new language-model head."""
    spec = model.spec
    if config.label_names is not None:
        raise UserError("technique 'transfer': label_names are a classifier's; leave them away with head: lm")
    known = FAMILIES[spec.family].architectures if spec.family in FAMILIES else {}
    if spec.paired or (not spec.causal and "masked_lm" not in known):
        raise UserError(f"technique 'transfer': a {spec.family} model's encoder gets a classification head only")


def rebuild(model: Model, config: Config) -> None:
    net = model.net
    encoder = not net.spec.causal
    if config.head == "lm":
        kind: Literal["lm", "masked_lm"] = "masked_lm" if encoder else "lm"
        net.set_head(replace(net.spec, head=kind, tied=False, pooler=False))
        model.hf_config["tie_word_embeddings"] = False
    else:
        net.set_head(replace(net.spec, head="classification", num_labels=config.num_labels, pooler=encoder))
        names = config.label_names or [f"LABEL_{i}" for i in range(config.num_labels)]
        model.hf_config["id2label"] = {str(i): name for i, name in enumerate(names)}
        model.hf_config["label2id"] = {name: i for i, name in enumerate(names)}
    for module in net.head_modules():
        module.to(device=model.device, dtype=torch.float32).requires_grad_(True)
    if config.train_layers < 0:
        unfreeze(net)
    for layer in net.layers[len(net.layers) - max(config.train_layers, 0) :]:
        unfreeze(layer)


def parameter_groups(model: Model, config: Config, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
    return layer_groups(model, config.layer_lr_decay, learning_rate, weight_decay)
