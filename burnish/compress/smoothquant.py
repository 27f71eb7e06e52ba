"""SmoothQuant: the outliers of activations moved into the weights, so that both are easy to round.

    s_j = max|X_j|^alpha / max|W_j|^(1 - alpha),    X diag(s)^-1,  diag(s) W^T

Source: SmoothQuant (arXiv 2211.10438), section 4, equation 4, between norms and the projections that read them. It
changes dense weights only: what stores them follows, as in `[smoothquant, int8]`. Limits: native families.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from burnish.compress import scaling
from burnish.config import UserError
from burnish.model.bundle import Context, Model

NAME = "smoothquant"

CHANGES_BASE = True
TAKES_UNREAD = True
CALIBRATES = True


@dataclass(frozen=True)
class Config:
    """`alpha`: 0 leaves the activations as they are, 1 all to the weights. `nsamples` rows of `max_length` tokens."""

    alpha: float = 0.5
    nsamples: int = 128
    max_length: int = 512


def apply(model: Model, config: Config, context: Context) -> Config:
    """Scale what norms give. Raises UserError where that cannot be."""
    if not 0 <= config.alpha <= 1:
        raise UserError(f"technique '{NAME}': alpha is {config.alpha}; give a number from 0 to 1")
    for layer, calls in scaling.layers(model, context, config.nsamples, config.max_length, NAME):
        for fold in scaling.after_norms(layer, calls[0]):
            _, _, largest = scaling.inputs(layer, calls, fold, 1)
            weights = torch.stack([part.abs().amax(0) for part in fold.pieces()]).amax(0).clamp(min=1e-5)
            fold.scale((largest.clamp(min=1e-5) ** config.alpha / weights ** (1 - config.alpha)).clamp(min=1e-5))
    return config


def rebuild(model: Model, config: Config) -> None:
    """Nothing: the weights are stored as they are."""
