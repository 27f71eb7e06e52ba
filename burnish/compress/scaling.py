"""Inputs of projections made smaller and their weights larger, or the other way, without a change of the function.

What a projection reads comes from a norm, or linearly from another projection: one over the factor is folded into that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from burnish.compress import calibration
from burnish.config import UserError
from burnish.model.attention import Attention
from burnish.model.bundle import Model
from burnish.model.linear import Dense, Linear
from burnish.model.norm import CentredNorm, Norm
from burnish.model.surgery import linears
from burnish.model.transformer import MLP, Transformer


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


def inputs(layer: nn.Module, calls: Sequence[calibration.Call], fold: Fold, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Some tokens (at most `most`, in) of what a fold's projections read, and each input's mean and largest size."""
    kept, total, largest, count = [], torch.zeros(()), torch.zeros(()), 0
    for x in calibration.inputs(layer, calls, fold.readers[0]):
        wide = x.float()
        size = wide.abs()
        total, largest, count = total + size.sum(0), torch.maximum(largest, size.amax(0)), count + len(x)
        kept.append(wide[:: max(1, len(x) * len(calls) // most)])
    return torch.cat(kept)[:most], total / count, largest


def layers(
    model: Model, context: Any, nsamples: int, max_length: int, technique: str
) -> Iterator[tuple[nn.Module, Any]]:
    """Every layer with its calls, as `calibration.in_turn`; none without memory."""
    check(model, technique)
    if model.device.type != "meta":
        data = calibration.batches(model, context, nsamples, max_length, technique)
        with calibration.computing(model.net):
            yield from calibration.in_turn(model, data, technique)
