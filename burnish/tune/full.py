"""Full fine-tuning: every floating parameter of the network trains.

The reference that the other techniques are held against, and, on a fresh network, pretraining. Weights that are
stored quantised cannot train and stay frozen. Limits: with AdamW in float32 it needs 16 bytes per parameter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from burnish.model.bundle import Context, Model
from burnish.tune.unfreeze import check_decay, layer_groups, unfreeze

CHANGES_BASE = True
PLAIN = True


@dataclass(frozen=True)
class Config:
    """`layer_lr_decay`: the learning rate of a layer over that of the one above it; the head's is the run's."""

    layer_lr_decay: float = 1.0


def apply(model: Model, config: Config, context: Context) -> Config:
    """Unfreeze everything that is not quantised storage."""
    check_decay(model, "full", config.layer_lr_decay)
    rebuild(model, config)
    return config


def rebuild(model: Model, config: Config) -> None:
    unfreeze(model.net)


def parameter_groups(model: Model, config: Config, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
    return layer_groups(model, config.layer_lr_decay, learning_rate, weight_decay)
