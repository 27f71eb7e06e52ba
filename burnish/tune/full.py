"""Full fine-tuning: every floating parameter of the network trains.

The reference that the other techniques are held against, and, on a fresh network, pretraining. Weights that are
stored quantised cannot train and stay frozen. Limits: with AdamW in float32 it needs 16 bytes per parameter.
"""

from __future__ import annotations

from dataclasses import dataclass

from burnish.model.bundle import Context, Model
from burnish.tune.unfreeze import unfreeze

CHANGES_BASE = True


@dataclass(frozen=True)
class Config:
    """Nothing to choose."""


def apply(model: Model, config: Config, context: Context) -> Config:
    """Unfreeze everything that is not quantised storage."""
    rebuild(model, config)
    return config


def rebuild(model: Model, config: Config) -> None:
    unfreeze(model.net)
