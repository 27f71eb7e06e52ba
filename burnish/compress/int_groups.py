"""Whole numbers of 2, 3, 4 or 8 bits in groups, rounded to the nearest: no data needed.

Each group of a row's inputs is stored on its own grid (`grouped.py` has the equations). GPTQ chooses better codes on
the same grids where there is text to calibrate on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from burnish.compress.grouped import Form, Grouped
from burnish.model.bundle import Context, Model
from burnish.model.surgery import linears, select

CHANGES_BASE = True
STORES_ANEW = True


@dataclass(frozen=True)
class Config:
    """`bits` 2, 3, 4 or 8; `group_size` inputs share a scale, -1: all of a row; not `sym`: zero points too.

    `ordered`, where a checkpoint's groups are of inputs in another order than the layer's. `target_modules` as for
    LoRA; the head and the embeddings stay.
    """

    bits: int = 4
    group_size: int = 128
    sym: bool = True
    target_modules: list[str] | str = "all-linear"
    ordered: bool = False

    @property
    def form(self) -> Form:
        return Form(self.bits, self.group_size, self.sym, self.ordered)

    def without(self, paths: Sequence[str]) -> Config:
        """Where the projections at `paths` are no longer stored this way."""
        return replace(self, target_modules=[path for path in self.target_modules if path not in paths])


def apply(model: Model, config: Config, context: Context) -> Config:
    """Round the targets in place, one at a time."""
    config = replace(config, ordered=False)
    config.form.check("int_groups")
    paths = []
    for path, linear in select(model.net, config.target_modules):
        linear.weight = config.form.round(linear.weight.dequantize())
        paths.append(path)
    return replace(config, target_modules=paths)


def rebuild(model: Model, config: Config) -> None:
    wanted = set(config.target_modules)
    for path, linear in linears(model.net):
        if path in wanted:
            linear.weight = Grouped.empty(config.form, linear.out_features, linear.in_features)
