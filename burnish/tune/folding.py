"""What remains to be done once trained corrections are folded into base weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from burnish.model.bundle import Model
from burnish.model.linear import Dense
from burnish.model.surgery import replace


@torch.no_grad()
def fold(model: Model, name: str, layers: Mapping[str, Any], change: Callable[[Any, Tensor], Tensor]) -> str:
    """Put back the projections that the wrappers `layers` hold as `base`, with weights `change(wrapper, weight)`.

    Computed in float32. A quantised weight becomes dense in bfloat16 first, and the note that is returned says so.
    """
    expanded = []
    for path, layer in layers.items():
        linear = layer.base
        weight = change(layer, linear.weight.dequantize().float())
        if isinstance(linear.weight, Dense):
            linear.weight.dense.copy_(weight)
        else:
            expanded.append(path)
            linear.weight = Dense(weight.to(torch.bfloat16))
            linear.weight.requires_grad_(False)
        replace(model.net, path, lambda wrapper: wrapper.base)  # type: ignore[arg-type, return-value]
    return folded(model, name, f"{len(layers)} projections", expanded)


def folded(model: Model, name: str, where: str, expanded: Collection[str]) -> str:
    """Note that technique `name` was merged into what `where` says; the paths `expanded` were quantised and are dense.

    The weights are then no stored checkpoint's any more, so the model loses its identity, and a quantisation in the
    chain the projections that are dense now.
    """
    for link in list(model.chain):
        if expanded and hasattr(link.config, "without"):
            link.config = link.config.without(expanded)
            if not link.config.target_modules:
                model.chain.remove(link)
    model.identity = ""
    note = f"{name}: merged into {where}"
    return note + (f", {len(expanded)} of them quantised and now dense in bfloat16" if expanded else "")
