"""T-Few's losses over the choices of a row: raise the right one, lower the wrong ones, and rank them.

    b(y) = 1/|y| sum_t log p(y_t | x, y_<t)
    L_LM = -b(y),    L_UL = -1/sum|w| sum_w sum_t log(1 - p(w_t | x, w_<t) + 0.01),
    L_LN = -log(exp b(y) / (exp b(y) + sum_w exp b(w))),    L = L_LM + L_UL + L_LN

with y the right choice and w the wrong ones, each with the token that ends it. Source: T-Few (arXiv 2205.05638),
section 3.2; the 0.01, which keeps the logarithm finite, is the authors' code's. A loss is of a row, and a step takes
the mean over rows, so that it is the same however it is split into batches. It is a technique of its own since it
changes nothing in the model, and so goes with whatever trains: [ia3, choice_loss] is T-Few's recipe, [lora,
choice_loss] works the same. Rows bring `choices`, a list of completions with the right one among them.

Limits: decoders and encoder-decoders with a language-model head; no packing; a batch holds every choice of its rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from burnish.config import UserError, option
from burnish.model.bundle import Context, Model
from burnish.model.example import Example
from burnish.model.scoring import label_log_probabilities, means

FINITE = 0.01
PLAIN = True
LOSS_ONLY = True
COMPARES = True
LACKING = (
    "has no 'choices', a list of completions with its own completion among them; give every row its choices (and leave "
    "train_on at completion), or take choice_loss out"
)


@dataclass(frozen=True)
class Config:
    """Which of the three are added up."""

    lm: bool = option(True, "L_LM: raise the right choice")
    unlikelihood: bool = option(True, "L_UL: lower the wrong ones")
    length_normalised: bool = option(True, "L_LN: the right one above the wrong ones, by log-probability per token")


def apply(model: Model, config: Config, context: Context) -> Config:
    """Raises UserError for a model that continues no text, where all three are off, and for rows without choices."""
    if not (config.lm or config.unlikelihood or config.length_normalised):
        raise UserError("technique 'choice_loss': lm, unlikelihood and length_normalised are all off; switch one on")
    if not model.spec.generates:
        raise UserError(f"technique 'choice_loss': a {model.spec.family} {model.spec.head} model continues no text")
    without = next((number for number, example in enumerate(context.examples, 1) if not example.choices), 0)
    if without:
        raise UserError(f"technique 'choice_loss': training row {without} {LACKING}")
    return config


def rebuild(model: Model, config: Config) -> None:
    """Nothing in the model is changed."""


def encode(model: Model, config: Config, example: Example) -> Example:
    """Ask for the wrong choices beside the row in a training batch."""
    return replace(example, compared=True)


def loss(model: Model, config: Config, batch: dict[str, Tensor], hidden: Tensor) -> tuple[Tensor, int]:
    """(the losses summed over the rows that have choices, their number). batch["choice"] (B,) counts each row's
    choices from the right one, 0. Raises UserError for a row without choices."""
    choice = batch["choice"]
    group = (choice == 0).cumsum(0) - 1
    count = int(group[-1]) + 1
    if int(torch.bincount(group).min()) < 2:
        raise UserError(f"technique 'choice_loss': a training row {LACKING}")
    logs, rows = label_log_probabilities(model.net, hidden, batch["labels"])
    scores = means(logs, rows, len(choice))
    total = scores.new_zeros(())
    if config.lm:
        total = total - scores[choice == 0].sum()
    if config.unlikelihood:
        wrong = choice[rows] > 0
        unlikely = -torch.log(1 - logs[wrong].exp() + FINITE)
        total = total + means(unlikely, group[rows[wrong]], count).sum()
    if config.length_normalised:
        table = scores.new_full((count, int(choice.max()) + 1), float("-inf"))
        table = table.index_put((group, choice), scores)
        total = total - table.log_softmax(1)[:, 0].sum()
    return total, count


def merge(model: Model, config: Config) -> str:
    return "choice_loss: nothing to fold, it is a loss"
