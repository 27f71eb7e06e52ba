"""SmoothQuant: the outliers of activations moved into the weights, so that both are easy to round.

    s_j = max|X_j|^alpha / max|W_j|^(1 - alpha),    X diag(s)^-1,  diag(s) W^T

Source: SmoothQuant (arXiv 2211.10438), section 4, equation 4, between norms and the projections that read them. It
changes dense weights only: what stores them follows, as in `[smoothquant, int8]`. The errors that it tells are of
products of weights and activations that are both rounded to int8. Limits: native families.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from burnish.compress import scaling
from burnish.compress.calibration import HELP
from burnish.compress.scaling import Fold, Inputs
from burnish.config import UserError, option
from burnish.model.bundle import Context, Model

NAME = "smoothquant"

CHANGES_BASE = True
TAKES_UNREAD = True
CALIBRATES = True


@dataclass(frozen=True)
class Config:
    """How much moves, and how it is calibrated."""

    alpha: float = option(0.5, "0 leaves the activations as they are, 1 moves all to the weights")
    nsamples: int = option(128, HELP["nsamples"])
    max_length: int = option(512, HELP["max_length"])


def apply(model: Model, config: Config, context: Context) -> Config:
    """Scale what norms give. Raises UserError where that cannot be."""
    if not 0 <= config.alpha <= 1:
        raise UserError(f"technique '{NAME}': alpha is {config.alpha}; give a number from 0 to 1")
    scaling.scale(model, config, context, NAME, scaling.after_norms, partial(levelled, config.alpha), rounded_product)
    return config


def levelled(alpha: float, fold: Fold, seen: Inputs) -> Tensor:
    """The factors (in,) of equation 4."""
    weights = torch.stack([part.abs().amax(0) for part in fold.pieces()]).amax(0).clamp(min=1e-5)
    return (seen.largest.clamp(min=1e-5) ** alpha / weights ** (1 - alpha)).clamp(min=1e-5)


def rounded_product(x: Tensor, weight: Tensor) -> Tensor:
    """x (tokens, in) by weight (out, in), the rows of both rounded to int8 by their largest magnitudes."""
    return rounded(x) @ rounded(weight).t()


def rounded(rows: Tensor) -> Tensor:
    scale = rows.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
    return (rows / scale).round_().mul_(scale)


def rebuild(model: Model, config: Config) -> None:
    """Nothing: the weights are stored as they are."""
