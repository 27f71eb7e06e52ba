"""Whole numbers of 2, 3, 4 or 8 bits in groups, rounded to the nearest: no data needed.

Each group of a row's inputs is stored on its own grid (`grouped.py` has the equations). GPTQ chooses better codes on
the same grids where there is text to calibrate on. Source: RTN, the baseline of GPTQ (arXiv 2210.17323), section 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from burnish.compress.grouped import HELP, Form, Grouped
from burnish.config import option
from burnish.model.bundle import Context, Model
from burnish.model.surgery import TARGETS, by_path, linears, select, store_one

CHANGES_BASE = True
STORES_ANEW = True
FROM_BASE = True


@dataclass(frozen=True)
class Config:
    """The form of the numbers, and which weights."""

    bits: int = option(4, HELP["bits"])
    group_size: int = option(128, HELP["group_size"])
    sym: bool = option(True, HELP["sym"])
    target_modules: list[str] | str = option("all-linear", TARGETS)
    ordered: bool = option(False, "follows: whether a checkpoint's groups are of inputs in another order")
    bits_pattern: dict[str, int] = option({}, HELP["bits_pattern"])

    def form(self, path: str) -> Form:
        """Of one projection, the pattern being resolved to paths."""
        return Form(self.bits_pattern.get(path, self.bits), self.group_size, self.sym, self.ordered)

    def without(self, paths: Sequence[str]) -> Config:
        """Where the projections at `paths` are no longer stored this way."""
        return replace(self, target_modules=[path for path in self.target_modules if path not in paths])


def apply(model: Model, config: Config, context: Context) -> Config:
    """Round the targets in place, one at a time."""
    targets = select(model.net, config.target_modules)
    paths = [path for path, _ in targets]
    pattern = by_path(config.bits_pattern, model.net, paths, "technique 'int_groups': bits_pattern")
    config = replace(config, target_modules=paths, bits_pattern=pattern, ordered=False)
    for path in ("", *pattern):
        config.form(path).check("int_groups")
    if model.device.type == "meta":
        with model.device:
            rebuild(model, config)
        return config
    for path, linear in targets:
        store_one(path, linear, config.form(path).round, context)
    return config


def rebuild(model: Model, config: Config) -> None:
    wanted = set(config.target_modules)
    for path, linear in linears(model.net):
        if path in wanted:
            linear.weight = Grouped.empty(config.form(path), linear.out_features, linear.in_features)
