"""AWQ: inputs that carry much are made smaller and their weights larger, so that rounding costs those weights less.

    minimise over a in [0, 1):   ||X (Q(W diag(s)) diag(s)^-1 - W)^T||,   s = mean|x|^a

Source: AWQ (arXiv 2306.00978), section 3.2; s is divided by the root of its largest times its smallest, as in the
authors' code. It changes dense weights only: what stores them follows, as in `[awq, gptq]`. Limits: native families.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from burnish.compress import scaling
from burnish.compress.grouped import Form
from burnish.compress.scaling import Fold
from burnish.model.bundle import Context, Model

NAME = "awq"
STEPS, TOKENS = 20, 512  # of a; of X

CHANGES_BASE = True
TAKES_UNREAD = True
CALIBRATES = True


@dataclass(frozen=True)
class Config:
    """`bits`, `group_size` and `sym` of the rounding that follows; `nsamples` rows of `max_length` tokens calibrate."""

    bits: int = 4
    group_size: int = 128
    sym: bool = True
    nsamples: int = 128
    max_length: int = 512


def apply(model: Model, config: Config, context: Context) -> Config:
    """Scale what a norm or another projection gives to projections. Raises UserError where that cannot be."""
    form = Form(config.bits, config.group_size, config.sym)
    form.check(NAME)
    for layer, calls in scaling.layers(model, context, config.nsamples, config.max_length, NAME):
        for fold in [*scaling.after_norms(layer, calls[0]), *scaling.after_projections(layer)]:
            x, mean, _ = scaling.inputs(layer, calls, fold, TOKENS)
            fold.scale(best(fold, x, mean.clamp(min=1e-4), form))
    return config


def best(fold: Fold, x: Tensor, mean: Tensor, form: Form) -> Tensor:
    """The factors (in,) for a fold whose projections read x (tokens, in), of these mean magnitudes."""
    tried = torch.stack([mean ** (step / STEPS) for step in range(STEPS)])
    tried /= (tried.amax(1) * tried.amin(1)).sqrt()[:, None]
    errors = torch.zeros(STEPS, device=x.device)
    for part in fold.pieces():
        for step, factors in enumerate(tried):
            errors[step] += (x @ (form.rounded(part * factors) / factors - part).t()).square().sum()
    return tried[errors.argmin()]


def rebuild(model: Model, config: Config) -> None:
    """Nothing: the weights are stored as they are."""
