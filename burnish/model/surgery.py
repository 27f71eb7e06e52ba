"""Finding and replacing modules from outside."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

from torch import nn

from burnish.config import UserError, nearest
from burnish.model.linear import Linear
from burnish.model.network import Network


def linears(net: Network) -> Iterator[tuple[str, Linear]]:
    """The projections of the layers (not the head) as (path, Linear), wrapped ones by their wrapper's path."""
    for path, module in net.named_modules():
        if isinstance(module, Linear) and path.startswith(net.body):
            yield re.sub(r"(\.base)+$", "", path), module


def select(net: Network, targets: Sequence[str] | str) -> list[tuple[str, Linear]]:
    """The Linears that `targets` name: "all-linear", module names, in burnish's or the family's own Hugging Face
    words, path suffixes, or one regular expression over whole paths. Raises UserError when a target matches nothing,
    and where something around projections takes their weights for its own (`holds_weights`).
    """
    if any(getattr(module, "holds_weights", False) for module in net.modules()):
        raise UserError(
            "target_modules: the weights are being rounded by 'qat'; put what else works on weights before it in the "
            "chain, or take the model as it is after training (finalize, or burnish merge)"
        )
    found = list(linears(net))
    if targets == "all-linear":
        return found
    aliases = net.layout.modules

    def names(path: str) -> set[str]:
        return {path, aliases.get(path, path)}

    if isinstance(targets, str):
        chosen = [pair for pair in found if any(re.fullmatch(targets, name) for name in names(pair[0]))]
        if chosen:
            return chosen
        targets = [targets]
    chosen_paths: set[str] = set()
    for target in targets:
        hits = [p for p, _ in found if any(n == target or n.endswith("." + target) for n in names(p))]
        if not hits:
            leaves = sorted({name.split(".")[-1] for path, _ in found for name in names(path)})
            raise UserError(
                f"target_modules: '{target}' matches no projection of this {net.spec.family} model"
                f"{nearest(target, leaves)}; it has: {', '.join(leaves)}"
            )
        chosen_paths.update(hits)
    return [pair for pair in found if pair[0] in chosen_paths]


def replace(net: nn.Module, path: str, build: Callable[[nn.Module], nn.Module], corrects: str = "") -> nn.Module:
    """Put `build(old)` where `path` points; returns the new module.

    `corrects` names a technique that works on weights. Raises UserError where something that hides them is around.
    """
    parent_path, _, leaf = path.rpartition(".")
    parent = net.get_submodule(parent_path)
    if corrects and not hasattr(getattr(parent, leaf), "weight"):
        raise UserError(
            f"technique '{corrects}': another technique is around '{path}' already; "
            f"put '{corrects}' before it in the chain, or choose other target_modules"
        )
    new = build(getattr(parent, leaf))
    setattr(parent, leaf, new)
    return new
