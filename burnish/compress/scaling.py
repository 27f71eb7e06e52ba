"""Inputs of projections made smaller and their weights larger, or the other way, without a change of the function.

What a projection reads comes from a norm, or linearly from another projection: one over the factor is folded into that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from burnish.compress import calibration
from burnish.config import UserError
from burnish.model.attention import Attention
from burnish.model.bundle import Context, Model
from burnish.model.linear import Dense, Linear
from burnish.model.norm import CentredNorm, Norm
from burnish.model.surgery import linears
from burnish.model.transformer import MLP, Transformer

TOKENS = 512  # of a fold's inputs that are kept


class Calibrated(Protocol):
    """The fields of a technique's config that tell how much text is read."""

    @property
    def nsamples(self) -> int: ...

    @property
    def max_length(self) -> int: ...


@dataclass
class Fold:
    """The projections that read what `source` gives, and nobody else does."""

    source: Norm | Linear
    readers: list[Linear]

    def pieces(self) -> Iterator[Tensor]:
        """The readers' weights one after the other, some rows (rows, in) float32 at a time."""
        return (part for reader in self.readers for part in calibration.pieces(reader.weight.dequantize()))

    @torch.no_grad()
    def scale(self, factors: Tensor) -> None:
        """Multiply the readers' weights of each input by factors (in,), and divide what the source gives by them."""
        for reader in self.readers:
            reader.weight.multiply(factors, 1)  # type: ignore[operator]
        given = self.source.weight
        if isinstance(given, Dense):
            given.multiply(1 / factors, 0)
        else:
            one = 1.0 if isinstance(self.source, CentredNorm) else 0.0
            given.copy_((given.float() + one) / factors - one)  # type: ignore[operator, union-attr]
        if self.source.bias is not None:
            self.source.bias.copy_(self.source.bias.float() / factors)


def check(model: Model, technique: str) -> None:
    """Raise UserError where nothing can be folded, or not any more."""
    net = model.net
    if not isinstance(net, Transformer):
        raise UserError(
            f"technique '{technique}': a {net.spec.family} model is run by transformers, whose norms it does not know"
        )
    if net.spec.post_norm:
        raise UserError(
            f"technique '{technique}': a {net.spec.family} model adds what its projections read to its states, so that "
            "it cannot be scaled"
        )
    for path, linear in linears(net):
        if not isinstance(linear.weight, Dense):
            kind = type(linear.weight).__name__
            raise UserError(f"technique '{technique}': {path} is stored as {kind} already; put '{technique}' before it")
        if net.get_submodule(path) is not linear:
            raise UserError(f"technique '{technique}': {path} is wrapped already; put '{technique}' first")


def after_norms(layer: nn.Module, call: calibration.Call) -> list[Fold]:
    """The norms of a layer with the projections that read them."""
    given: list[tuple[Norm, Tensor]] = []
    found: dict[Norm, list[Linear]] = {}

    def read(linear: Linear, x: Tensor) -> None:
        for norm, out in given:
            if out is x and linear not in found.setdefault(norm, []):
                found[norm].append(linear)

    hooks = []
    for module in layer.modules():
        if isinstance(module, Norm):
            hooks.append(module.register_forward_hook(lambda norm, args, out: given.append((norm, out))))  # type: ignore[arg-type, return-value, func-returns-value]
        elif isinstance(module, Linear):
            hooks.append(module.register_forward_pre_hook(lambda linear, args: read(linear, args[0])))  # type: ignore[arg-type]
    try:
        call.run(layer)
    finally:
        for hook in hooks:
            hook.remove()
    return [Fold(norm, readers) for norm, readers in found.items()]


def after_projections(layer: nn.Module) -> list[Fold]:
    """The projections of a layer whose outputs reach another one linearly, input by input."""
    found = []
    for module in layer.modules():
        if isinstance(module, MLP) and (module.gate_proj is not None or module.act is torch.nn.functional.relu):
            found.append(Fold(module.up_proj, [module.down_proj]))
        if (
            isinstance(module, Attention)
            and not module.spec.fused_qkv
            and module.spec.num_heads == module.spec.num_kv_heads
        ):
            found.append(Fold(module.v_proj, [module.o_proj]))
    return found


@dataclass
class Inputs:
    """What a fold's projections read: `x` some of the tokens (at most TOKENS, in), and of all tokens the `mean` and the
    `largest` magnitude of each input (in,)."""

    x: Tensor
    mean: Tensor
    largest: Tensor


def inputs(layer: nn.Module, calls: Sequence[calibration.Call], fold: Fold) -> Inputs:
    kept, total, largest, count = [], torch.zeros(()), torch.zeros(()), 0
    for x in calibration.inputs(layer, calls, fold.readers[0]):
        wide = x.float()
        size = wide.abs()
        total, largest, count = total + size.sum(0), torch.maximum(largest, size.amax(0)), count + len(x)
        kept.append(wide[:: max(1, len(x) * len(calls) // TOKENS)])
    return Inputs(torch.cat(kept)[:TOKENS], total / count, largest)


def scale(
    model: Model,
    config: Calibrated,
    context: Context,
    technique: str,
    folds: Callable[[nn.Module, calibration.Call], list[Fold]],
    factors: Callable[[Fold, Inputs], Tensor],
    product: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """Scale the `folds` that are found in each layer by their `factors`, layer by layer, on what the scaled ones before
    it give; nothing without memory. Each reader's error is that of `product`, x (tokens, in) by w (out, in) rounded.

    Raises UserError as `check` does, for data that is too short, and for activations that are not finite.
    """
    check(model, technique)
    if model.device.type == "meta":
        return
    data = calibration.batches(model, context, config.nsamples, config.max_length, technique)
    paths = {linear: path for path, linear in linears(model.net)}
    with calibration.computing(model.net):
        for done, (layer, calls) in enumerate(calibration.in_turn(model, data, technique), 1):
            for fold in folds(layer, calls[0]):
                seen = inputs(layer, calls, fold)
                if not seen.mean.isfinite().all():
                    raise UserError(
                        f"technique '{technique}': the activations that {paths[fold.readers[0]]} reads are not finite; "
                        "run the model in bf16"
                    )
                before = errors(fold, seen.x, product) if context.errors else []
                chosen = factors(fold, seen)
                fold.scale(chosen)
                for call in calls:
                    call.kept.clear()  # what a reader read before
                after = errors(fold, seen.x / chosen, product) if context.errors else []
                for reader, old, new in zip(fold.readers, before, after, strict=False):
                    told = {"technique": technique, "scaled": paths[reader], "before": old, "error": new}
                    context.report({**told, "done": done, "of": len(model.net.all_layers)})


def errors(fold: Fold, x: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> list[float]:
    """Of each reader the share of its outputs' power, for inputs x (tokens, in), that is lost in `product`."""
    found = []
    for reader in fold.readers:
        power = lost = 0.0
        for part in calibration.pieces(reader.weight.dequantize()):
            wanted = x @ part.t()
            power += float(wanted.square().sum())
            lost += float((product(x, part) - wanted).square().sum())
        found.append(lost / max(power, 1e-30))
    return found
