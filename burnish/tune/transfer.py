"""Transfer learning: keep a pretrained body, freeze all or its lower part, and train a new head on top.

The new head classifies: a linear layer over the first token's pooled state (encoders) or the last token's state
(decoders). Of an encoder-decoder (T5) the encoder alone stays, and its head pools the mean of the states: its texts
begin with no mark, and the mean did better than the first token (Sentence-T5, arXiv 2108.08877). Source: the practice
of ULMFiT (arXiv 1801.06146), section 3.3, and BERT (arXiv 1810.04805), section 4.
In a chain it comes first: [transfer, lora] adapts the body beside the new head.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from burnish.config import UserError
from burnish.model.bundle import Context, Model
from burnish.model.surgery import linears
from burnish.tune.unfreeze import unfreeze

CHANGES_BASE = True
NEW_HEAD = True


@dataclass(frozen=True)
class Config:
    """`train_layers`: how many of the upper layers train with the head; -1 for all of them and the embeddings."""

    num_labels: int = 2
    train_layers: int = 0
    label_names: list[str] | None = None


def apply(model: Model, config: Config, context: Context) -> Config:
    """Put the head on, start it with Gaussian weights of standard deviation 0.02, and unfreeze what trains."""
    if config.num_labels < 2:
        raise UserError(f"technique 'transfer': num_labels is {config.num_labels}; a classifier needs at least 2")
    count = len(model.net.layers)
    if config.train_layers > count:
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


def rebuild(model: Model, config: Config) -> None:
    net = model.net
    encoder = not net.spec.causal
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
