"""AWQ: inputs that carry much are made smaller and their weights larger, so that rounding costs those weights less.

    minimise over a in [0, 1):   ||X (Q(W diag(s)) diag(s)^-1 - W)^T||,   s = mean|x|^a

Source: AWQ (arXiv 2306.00978), section 3.2; s is divided by the root of its largest times its smallest, as in the
authors' code. It changes dense weights only: what stores them follows, as in `[awq, gptq]`. Limits: native families.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from burnish.compress import calibration, scaling
from burnish.compress.calibration import HELP
from burnish.compress.grouped import Form
from burnish.compress.scaling import Fold, Inputs
from burnish.config import option
from burnish.model.bundle import Context, Model

NAME = "awq"
STEPS = 20  # of a

CHANGES_BASE = True
TAKES_UNREAD = True
CALIBRATES = True


@dataclass(frozen=True)
class Config:
    """The rounding that follows, and how it is calibrated."""

    bits: int = option(4, "of the rounding that follows")
    group_size: int = option(128, "of the rounding that follows")
    sym: bool = option(True, "of the rounding that follows")
    nsamples: int = option(128, HELP["nsamples"])
    max_length: int = option(512, HELP["max_length"])


def apply(model: Model, config: Config, context: Context) -> Config:
    """Scale what a norm or another projection gives to projections. Raises UserError where that cannot be."""
    form = Form(config.bits, config.group_size, config.sym)
    form.check(NAME)

    def product(x: Tensor, weight: Tensor) -> Tensor:
        return x @ form.rounded(weight).t()

    scaling.scale(model, config, context, NAME, folds, partial(best, form), product)
    return config


def folds(layer: nn.Module, call: calibration.Call) -> list[Fold]:
    return [*scaling.after_norms(layer, call), *scaling.after_projections(layer)]


def best(form: Form, fold: Fold, seen: Inputs) -> Tensor:
    """The factors (in,) of the a with the least error."""
    x, mean = seen.x, seen.mean.clamp(min=1e-4)
    tried = torch.stack([mean ** (step / STEPS) for step in range(STEPS)])
    tried /= (tried.amax(1) * tried.amin(1)).sqrt()[:, None]
    errors = torch.zeros(STEPS, device=x.device)
    for part in fold.pieces():
        for step, factors in enumerate(tried):
            errors[step] += (x @ (form.rounded(part * factors) / factors - part).t()).square().sum()
    return tried[errors.argmin()].clone()  # what is kept for later readings must not keep all that were tried


def rebuild(model: Model, config: Config) -> None:
    """Nothing: the weights are stored as they are."""
