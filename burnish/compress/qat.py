"""Quantisation-aware training: products take the weights as the whole-number model will have them, from the start.

    y = Q(W) x,    dL/dW = dL/dQ(W),    Q: to the nearest on each group's grid, as `int_groups` stores it

The rounding's gradient is taken for 1 (straight-through) and grids for constants, made anew from the smallest to the
largest weight at every step. Source: arXiv 1308.3432, section 4 (straight-through); arXiv 1712.05877, section 3, and
LLM-QAT (arXiv 2305.17888), section 2.2 (the grids). Such grids leave no weight further than a step outside, so that no
gradient is cut.

Alone it trains all of the network, and `finalize` stores what the products saw: the same codes, to the last bit. Behind
LoRA, [lora, qat], only A and B train, through Q(W + s B A); the adapter stays one until it is merged, and then codes
take the sum's place. With `distill` it learns the distribution of the next token from the base, neither rounded nor
corrected, in the place of the token itself (LLM-QAT, section 2.1), so that the text's own randomness is no noise in the
gradient. Limits: activations are not rounded; LoRA's gradient passes through one for a whole matrix at a time, and its
sums are kept for the backward pass (`gradient_checkpointing` gives them back).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from burnish.compress.grouped import HELP, Form, Grouped
from burnish.config import UserError, option
from burnish.model.bundle import Context, Model
from burnish.model.linear import Dense, Linear, arithmetic, by_tokens, is_flat
from burnish.model.surgery import TARGETS, linears, select
from burnish.model.surgery import replace as put
from burnish.tune.unfreeze import unfreeze

NAME = "qat"


@dataclass(frozen=True)
class Config:
    """The form of the numbers, and what trains."""

    bits: int = option(4, HELP["bits"])
    group_size: int = option(128, HELP["group_size"])
    sym: bool = option(True, HELP["sym"])
    target_modules: list[str] | str = option("all-linear", TARGETS)
    distill: bool = option(False, "behind LoRA: the base is the teacher")
    full: bool = option(True, "follows: whether all of the network trains, as without LoRA")
    finalized: bool = option(False, "follows: whether the numbers are stored")

    @property
    def form(self) -> Form:
        return Form(self.bits, self.group_size, self.sym)

    @property
    def changes_base(self) -> bool:
        return self.full or self.finalized

    def without(self, paths: Sequence[str]) -> Config:
        """Where the projections at `paths` are no longer stored this way."""
        return replace(self, target_modules=[path for path in self.target_modules if path not in paths])


class _Product(torch.autograd.Function):
    """x (tokens, in) times the rounded matrix, which is made again for the backward pass and not kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dense: Tensor, form: Form) -> Tensor:
        ctx.save_for_backward(x, dense)
        ctx.form, kind = form, arithmetic(x)
        return (x.to(kind) @ form.rounded(dense).to(kind).t()).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, dense = ctx.saved_tensors
        kind, grad_x, grad_dense = arithmetic(x), None, None
        wide = grad.to(kind)
        if ctx.needs_input_grad[0]:
            grad_x = (wide @ ctx.form.rounded(dense).to(kind)).to(x.dtype)
        if ctx.needs_input_grad[1]:
            grad_dense = (wide.t() @ x.to(kind)).to(dense.dtype)
        return grad_x, grad_dense, None


class Rounding(nn.Module):
    """A projection, or LoRA around one, by its rounded matrix; x (tokens, in) -> (tokens, out).

    `known` is what it is stored as, in evaluation, for as long as nothing changes; `plain`: the projection as it is.
    """

    holds_weights = True
    known: tuple[Any, Grouped] | None

    def __init__(self, base: Any, form: Form):
        super().__init__()
        self.base, self.form, self.foreign, self.plain = base, form, base.foreign, False
        self.train(base.training)

    def train(self, mode: bool = True) -> Rounding:
        self.known = None
        return super().train(mode)

    @property
    def corrected(self) -> bool:
        """Whether LoRA is inside."""
        return not isinstance(self.base, Linear)

    @property
    def linear(self) -> Linear:
        return self.base.base if self.corrected else self.base

    def dense(self) -> Tensor:
        """The matrix (out, in) that is rounded: the weight, with the correction as merging would store it."""
        weight = self.linear.weight.dequantize()
        return self.base.folded(weight.float()).to(weight.dtype) if self.corrected else weight

    @torch.no_grad()
    def stored(self) -> Grouped:
        """The matrix in its final form."""
        state = [(part.data_ptr(), part._version) for part in self.base.parameters()]
        if self.training or self.known is None or self.known[0] != state:
            self.known = state, self.form.round(self.dense())
        return self.known[1]

    def forward(self, x: Tensor) -> Tensor:
        if self.foreign and not is_flat(x):
            return by_tokens(self, x)
        if self.plain:
            return self.linear(x)
        bias = self.linear.bias
        if not self.training and not torch.is_grad_enabled():
            return self.stored().matmul(x, bias)
        y = _Product.apply(x, self.dense(), self.form)
        return y if bias is None else y + bias.to(y.dtype)


def apply(model: Model, config: Config, context: Context) -> Config:
    """Round the targets in every product. Weights that train themselves are kept in float32 from now on.

    Raises UserError for weights that are quantised already, and for corrections that cannot be rounded with a weight.
    """
    config.form.check(NAME)
    targets = select(model.net, config.target_modules)
    full = True
    for path, linear in targets:
        around = model.net.get_submodule(path)
        if not isinstance(linear.weight, Dense):
            kind = type(linear.weight).__name__
            raise UserError(f"technique '{NAME}': {path} is stored as {kind} already; take the model as it was before")
        if around is linear:
            continue
        full = False
        if not hasattr(around, "delta"):
            raise UserError(
                f"technique '{NAME}': {path} is inside {type(around).__name__}; put '{NAME}' before it, of all "
                "techniques only lora stands before '{NAME}'"
            )
        if around.dropout:
            raise UserError(
                f"technique '{NAME}': lora_dropout is {around.dropout}; LoRA's sum with the weight is rounded as one "
                "matrix, from which nothing can be dropped: leave it at 0"
            )
    if config.distill and (full or model.spec.head not in ("lm", "masked_lm")):
        what = "put lora before it, as the base is the teacher" if full else "only language models have a teacher"
        raise UserError(f"technique '{NAME}': distill: {what}")
    config = replace(config, target_modules=[path for path, _ in targets], full=full, finalized=False)
    for _, linear in targets if full else ():
        linear.weight = Dense(linear.weight.dequantize().detach().float())
    rebuild(model, config)
    return config


def rebuild(model: Model, config: Config) -> None:
    wanted = set(config.target_modules)
    for path, linear in list(linears(model.net)):
        if path in wanted and config.finalized:
            linear.weight = Grouped.empty(config.form, linear.out_features, linear.in_features)
        elif path in wanted:
            put(model.net, path, lambda base: Rounding(base, config.form))
    if config.full and not config.finalized:
        unfreeze(model.net)


def layers(model: Model) -> dict[str, Rounding]:
    """What stands around projections, by path."""
    return {path: module for path, module in model.net.named_modules() if isinstance(module, Rounding)}


@contextmanager
def teaching(found: Collection[Rounding]) -> Iterator[None]:
    """Let the projections be the base's inside the block."""
    for layer in found:
        layer.plain = True
    try:
        yield
    finally:
        for layer in found:
            layer.plain = False


def teacher(model: Model, config: Config) -> AbstractContextManager[None] | None:
    return teaching(layers(model).values()) if config.distill else None


def finalize(model: Model, config: Config) -> Config:
    """Store the targets in their form and freeze the network, unless LoRA waits to be merged."""
    found = layers(model)
    if config.finalized or any(layer.corrected for layer in found.values()):
        return config
    for path, layer in found.items():
        layer.linear.weight = layer.stored()
        put(model.net, path, lambda wrapper: wrapper.base)  # type: ignore[arg-type, return-value]
    if config.full:
        model.net.requires_grad_(False)
    return replace(config, finalized=True)
