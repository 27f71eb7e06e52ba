"""Full fine-tuning: every floating parameter of the network trains.

The reference that the other techniques are held against, and, on a fresh network, pretraining. Weights that are
stored quantised cannot train and stay frozen. Source: the common practice; rates by layer are ULMFiT's (arXiv
1801.06146). Limits: with AdamW in float32 it needs 16 bytes per parameter.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from burnish.config import option
from burnish.model.bundle import Context, Model
from burnish.model.linear import Dense, Weight
from burnish.tune.unfreeze import DECAY, check_decay, layer_groups, unfreeze

log = logging.getLogger(__name__)
CHANGES_BASE = True
PLAIN = True


@dataclass(frozen=True)
class Config:
    """All weights train."""

    layer_lr_decay: float = option(1.0, DECAY)


def apply(model: Model, config: Config, context: Context) -> Config:
    """Unfreeze everything that is not quantised storage, and warn where some is."""
    check_decay(model, "full", config.layer_lr_decay)
    rebuild(model, config)
    stored = {id(m): m for m in model.net.modules() if isinstance(m, Weight) and not isinstance(m, Dense)}
    if stored and model.device.type != "meta":
        share = sum(m.shape[0] * m.shape[1] for m in stored.values()) / model.parameter_count()
        log.warning(
            "technique 'full': %.0f%% of the weights are stored quantised and stay frozen; train them through lora, or "
            "leave the quantisation out",
            100 * share,
        )
    return config


def rebuild(model: Model, config: Config) -> None:
    unfreeze(model.net)


def parameter_groups(model: Model, config: Config, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
    return layer_groups(model, config.layer_lr_decay, learning_rate, weight_decay)
