"""Whole numbers of 2, 3, 4 or 8 bits in groups, rounded to the nearest: no data needed.

Each group of a row's inputs is stored on its own grid (`grouped.py` has the equations). GPTQ chooses better codes on
the same grids where there is text to calibrate on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from burnish.compress.grouped import Form, Grouped
from burnish.model.bundle import Context, Model
from burnish.model.surgery import by_path, linears, select, store_one

CHANGES_BASE = True
STORES_ANEW = True


@dataclass(frozen=True)
class Config:
    """`bits` 2, 3, 4 or 8; `group_size` inputs share a scale, -1: all of a row; not `sym`: zero points too.

    `bits_pattern`: other bits by a regular expression over the ends of projections' paths, as LoRA's `rank_pattern`.
    `ordered`, where a checkpoint's groups are of inputs in another order than the layer's. `target_modules` as for
    LoRA; the head and the embeddings stay.
    """

    bits: int = 4
    group_size: int = 128
    sym: bool = True
    target_modules: list[str] | str = "all-linear"
    ordered: bool = False
    bits_pattern: dict[str, int] = field(default_factory=dict)

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
