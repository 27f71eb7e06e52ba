"""Finding and replacing modules from outside."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from burnish import device
from burnish.config import UserError, nearest
from burnish.model.bundle import Context
from burnish.model.linear import Linear, Weight
from burnish.model.network import Network

ROWS = 256  # of a matrix that are compared together, as many as `Weight.expand` begins at multiples of
TARGETS = "projections, by names in burnish's or Hugging Face's words, all-linear, or a regular expression over paths"


def linears(net: Network) -> Iterator[tuple[str, Linear]]:
    """The projections of the layers (not the head) as (path, Linear), wrapped ones by their wrapper's path."""
    for path, module in net.named_modules():
        if isinstance(module, Linear) and path.startswith(net.body):
            yield re.sub(r"(\.base)+$", "", path), module


def expression(pattern: str, where: str) -> re.Pattern[str]:
    """A regular expression of the user's. Raises UserError, its message starting with `where`, for one that is none."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"{where}: '{pattern}' is no regular expression: {error}; any text is '.*'") from None


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
        whole = expression(targets, "target_modules")
        chosen = [pair for pair in found if any(whole.fullmatch(name) for name in names(pair[0]))]
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


def store(net: Network, targets: Sequence[str] | str, kind: Any, context: Context, **options: Any) -> list[str]:
    """Store the targets' matrices as a kind of `Weight`, one at a time, by its `quantize(dense, **options)`; returns
    the targets' paths. On the meta device nothing is computed: `reserve` makes the same without values."""
    found = select(net, targets)
    paths = [path for path, _ in found]
    if next(net.parameters()).is_meta:
        with torch.device("meta"):
            reserve(net, paths, kind, **options)
        return paths
    for path, linear in found:
        store_one(path, linear, partial(kind.quantize, **options), context)
    return paths


def store_one(path: str, linear: Linear, quantize: Callable[[Tensor], Weight], context: Context) -> None:
    """Store the matrix as `quantize` makes it, and report its error where that is asked for. What that took goes back
    to the system, since the next one's temporaries may not fit between what stays, and the holes would add up."""
    dense = linear.weight.dequantize()
    linear.weight = quantize(dense)
    if context.errors:
        context.report({"layer": path, "error": lost(linear.weight, dense.detach())})
    del dense
    device.return_freed_memory()


def lost(weight: Weight, dense: Tensor) -> float:
    """The share of a matrix's power that its stored form lacks, sum (q - w)^2 / sum w^2: of the outputs', where inputs
    are equally strong and do not depend on each other."""
    in_pieces = weight.in_pieces and dense.device.type == "cpu"
    room = torch.empty(min(ROWS, len(dense)), dense.shape[1]) if in_pieces else weight.dequantize()
    power = gone = 0.0
    for first in range(0, len(dense), ROWS):
        known = dense[first : first + ROWS].float()
        found = room[: len(known)] if in_pieces else room[first : first + ROWS]
        if in_pieces:
            weight.expand(first, found)
        power, gone = power + float(known.square().sum()), gone + float((found - known).square().sum())
    return gone / max(power, 1e-30)


def reserve(net: Network, paths: Sequence[str], kind: Any, **options: Any) -> None:
    """Put storage to load into, by `empty(out, in, **options)` of the kind, where `store` stored something."""
    wanted = set(paths)
    for path, linear in linears(net):
        if path in wanted:
            linear.weight = kind.empty(linear.out_features, linear.in_features, **options)


def by_path(pattern: Mapping[str, Any], net: Network, paths: Sequence[str], where: str = "") -> dict[str, Any]:
    """A pattern's values by path; a key is a regular expression over the end of a path in either vocabulary, and the
    first that matches counts. With `where`, which begins the message, a key that matches none is a UserError."""
    found: dict[str, Any] = {}
    matched: set[str] = set()
    aliases = net.layout.modules
    ends = {key: re.compile(rf"(.*\.)?({expression(key, where or 'pattern').pattern})") for key in pattern}
    for path in paths:
        names = (path, aliases.get(path, path))
        whole = [key for key in pattern if key in names]  # a resolved pattern's, which may end another's path
        hits = whole or [key for key, end in ends.items() if any(end.fullmatch(name) for name in names)]
        matched |= {*hits}
        if hits:
            found[path] = pattern[hits[0]]
    for key in pattern:
        if where and key not in matched:
            leaves = sorted({name.rpartition(".")[2] for path in paths for name in (path, aliases.get(path, path))})
            raise UserError(f"{where}: '{key}' matches none of target_modules{nearest(key, leaves)}")
    return found


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
