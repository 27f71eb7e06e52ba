"""Which parameters may train, and how fast each layer's do."""

from __future__ import annotations

from typing import Any

from torch import nn

from burnish.config import UserError
from burnish.model.bundle import Model
from burnish.model.linear import Dense, Weight

DECAY = "the learning rate of a layer over that of the one above it; the head's is the run's"


def unfreeze(module: nn.Module) -> None:
    """Let every floating parameter below train, but for quantised storage."""
    for part in module.modules():
        if not isinstance(part, Weight) or isinstance(part, Dense):
            for parameter in part.parameters(recurse=False):
                parameter.requires_grad_(parameter.is_floating_point())


def check_decay(model: Model, technique: str, decay: float) -> None:
    """Raise UserError for a `layer_lr_decay` that is no share, or that another technique of the chain gives too."""
    if not 0 < decay <= 1:
        raise UserError(f"technique '{technique}': layer_lr_decay is {decay}; it must be above 0 and at most 1")
    others = [link.name for link in model.chain if getattr(link.config, "layer_lr_decay", 1.0) != 1]
    if decay != 1 and others:
        raise UserError(f"technique '{technique}': '{others[0]}' has a layer_lr_decay already; keep one of them")


def layer_groups(model: Model, decay: float, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
    """Optimiser groups with the rate of each level of the network `decay` times that of the level above; the head has
    the rate itself (ULMFiT, arXiv 1801.06146, section 3.1, where decay is 1 / 2.6). 1-D parameters do not decay."""
    if decay == 1:
        return []
    levels, trains = model.net.levels(), model.trainable()
    groups = []
    for level in sorted(set(levels.values())):
        rate = learning_rate * decay ** (len(model.net.all_layers) + 1 - level)
        here = [parameter for name, parameter in trains.items() if levels.get(name) == level]
        groups.append({"params": [p for p in here if p.ndim > 1], "lr": rate, "weight_decay": weight_decay})
        groups.append({"params": [p for p in here if p.ndim <= 1], "lr": rate, "weight_decay": 0.0})
    return [group for group in groups if group["params"]]
