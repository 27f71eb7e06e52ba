"""Magnitude pruning: the smallest weights become zero and stay zero.

    mask = |w| >= the s-quantile of |w| over a matrix, a model, or within each group of m for n:m sparsity

Source: "Learning both Weights and Connections for Efficient Neural Networks" (arXiv 1506.02626), section 3. The masks
are kept, and `after_step` re-applies them so that training on does not revive a weight. Limits: the zeros are stored
densely, so the file and the speed of dense kernels stay what they were.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from burnish.config import UserError, option
from burnish.model.bundle import Context, Model
from burnish.model.linear import Dense, Linear
from burnish.model.surgery import TARGETS, linears, select

NAME = "magnitude"


CHANGES_BASE = True


@dataclass(frozen=True)
class Config:
    """How many weights become zero, and where."""

    sparsity: float = option(0.5, "share of zeros")
    pattern: str = option("unstructured", "unstructured, or n:m to keep n of every m inputs, as 2:4")
    scope: Literal["layer", "global"] = option("layer", "rank weights within each matrix, or over all of them")
    target_modules: list[str] | str = option("all-linear", TARGETS)


class Masks(nn.Module):
    """One bit per weight and target, packed eight to a byte: parameter `m<i>` for the i-th target."""

    def __init__(self, sizes: list[int]):
        super().__init__()
        for index, size in enumerate(sizes):
            self.register_parameter(f"m{index}", nn.Parameter(torch.zeros(size, dtype=torch.uint8), False))


BITS = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)


def pack(mask: Tensor) -> Tensor:
    """bool (out, in) -> (ceil(out * in / 8),) uint8."""
    flat = torch.nn.functional.pad(mask.reshape(-1).to(torch.uint8), (0, -mask.numel() % 8))
    return (flat.view(-1, 8) * BITS.to(mask.device)).sum(dim=1).to(torch.uint8)


def unpack(packed: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `pack`."""
    return (packed[:, None] & BITS.to(packed.device)).bool().view(-1)[: shape.numel()].view(shape)


def keep(weight: Tensor, sparsity: float, pattern: str) -> Tensor:
    """bool (out, in): the weights that stay."""
    size = weight.abs()
    if pattern == "unstructured":
        drop = round(sparsity * size.numel())
        mask = torch.ones(size.numel(), dtype=torch.bool, device=weight.device)
        mask[size.view(-1).argsort()[:drop]] = False
        return mask.view_as(size)
    kept, group = (int(part) for part in pattern.split(":"))
    grouped = size.view(size.shape[0], -1, group)
    top = grouped.topk(kept, dim=2).indices
    return torch.zeros_like(grouped, dtype=torch.bool).scatter_(2, top, True).view_as(size)


def apply(model: Model, config: Config, context: Context) -> Config:
    """Prune the targets now and keep the masks. Raises UserError for quantised targets or an impossible pattern."""
    if not 0 <= config.sparsity < 1:
        raise UserError(f"technique '{NAME}': sparsity is {config.sparsity}; it must be at least 0 and below 1")
    targets = select(model.net, config.target_modules)
    if config.pattern != "unstructured":
        match = re.fullmatch(r"(\d+):(\d+)", config.pattern)
        if not match or not 0 < int(match[1]) < int(match[2]):
            raise UserError(
                f"technique '{NAME}': pattern '{config.pattern}' is neither 'unstructured' nor 'n:m', n < m"
            )
        if any(linear.in_features % int(match[2]) for _, linear in targets):
            raise UserError(f"technique '{NAME}': pattern {config.pattern} needs input widths that {match[2]} divides")
        config = replace(config, sparsity=1 - int(match[1]) / int(match[2]))
    weights = [dense(linear, path) for path, linear in targets]
    if config.scope == "global" and config.pattern == "unstructured":
        flat = torch.cat([weight.detach().abs().view(-1) for weight in weights])
        kept = keep(flat[None], config.sparsity, "unstructured")[0].split([w.numel() for w in weights])
        masks = [mask.view_as(weight) for mask, weight in zip(kept, weights, strict=True)]
    else:
        masks = [keep(weight.detach(), config.sparsity, config.pattern) for weight in weights]
    config = replace(config, target_modules=[path for path, _ in targets])
    rebuild(model, config)
    stored = model.net.techniques[NAME]
    for index, mask in enumerate(masks):
        getattr(stored, f"m{index}").copy_(pack(mask))
    after_step(model, config, 0, 0)
    return config


def dense(linear: Linear, path: str) -> nn.Parameter:
    """The trainable matrix of a target."""
    if not isinstance(linear.weight, Dense):
        kind = type(linear.weight).__name__
        raise UserError(f"technique '{NAME}': {path} is stored as {kind}; prune before quantising")
    return linear.weight.dense


def targets(model: Model, config: Config) -> list[Linear]:
    """The pruned projections, in the order of their masks."""
    found = dict(linears(model.net))
    return [found[path] for path in config.target_modules]


def rebuild(model: Model, config: Config) -> None:
    sizes = [-(-linear.in_features * linear.out_features // 8) for linear in targets(model, config)]
    model.net.techniques[NAME] = Masks(sizes).to(model.device)


@torch.no_grad()
def after_step(model: Model, config: Config, step: int, total: int) -> None:
    """Zero the pruned weights again. A weight that was quantised after pruning cannot train and is left alone."""
    stored = model.net.techniques[NAME]
    for index, linear in enumerate(targets(model, config)):
        if isinstance(linear.weight, Dense):
            weight = linear.weight.dense
            weight.mul_(unpack(getattr(stored, f"m{index}"), weight.shape))
