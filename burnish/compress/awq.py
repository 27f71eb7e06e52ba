"""AWQ: inputs that carry much are made smaller and their weights larger, so that rounding costs those weights less.

    minimise over a in [0, 1):   ||X (Q(W diag(s)) diag(s)^-1 - W)^T||,   s = mean|x|^a

Source: AWQ (arXiv 2306.00978), section 3.2; s is divided by the root of its largest times its smallest, as in the
authors' code. It changes dense weights only: what stores them follows, as in `[awq, gptq]`. Limits: native families.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

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

    bits: int | None = option(None, "of the rounding that follows; none: as it says in the chain, else 4")
    group_size: int | None = option(None, "of the rounding that follows; none: as it says, else 128")
    sym: bool | None = option(None, "of the rounding that follows; none: as it says, else true")
    nsamples: int = option(128, HELP["nsamples"])
    max_length: int = option(512, HELP["max_length"])


def apply(model: Model, config: Config, context: Context) -> Config:
    """Scale what a norm or another projection gives to projections. Raises UserError where that cannot be."""
    form = form_of(config, context.following)
    form.check(NAME)

    def product(x: Tensor, weight: Tensor) -> Tensor:
        return x @ form.rounded(weight).t()

    scaling.scale(model, config, context, NAME, folds, partial(best, form), product)
    return replace(config, bits=form.bits, group_size=form.group_size, sym=form.sym)


def form_of(config: Config, following: Sequence[Any]) -> Form:
    """The rounding that is scaled for: what the config leaves open is the first technique's behind it that rounds to
    whole numbers in groups."""
    rounding = next((later for later in following if hasattr(later, "form")), Form())

    def chosen(name: str) -> Any:
        return getattr(rounding if getattr(config, name) is None else config, name)

    return Form(chosen("bits"), chosen("group_size"), chosen("sym"))


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
