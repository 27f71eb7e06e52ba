"""int8 weights: one absolute maximum per output row; alone, or with activations in int8 too (LLM.int8).

    q = round(127 w / max|w_row|),    w ~ q max|w_row| / 127

With `llm_int8_threshold` t > 0 a product is decomposed: columns of x with a magnitude of at least t meet the weights in
x's dtype, and of the rest

    x_token ~ p max|x_token| / 127,   x W^T ~ (p q^T) max|x_token| max|w_row| / 127^2

where the maximum is over the magnitudes below t. Source: LLM.int8 (arXiv 2208.07339), sections 2.1 (vector-wise) and
3.2 (the decomposition, t = 6). Values equal bitsandbytes', which also keeps outlier columns' weights in int8.
Weights alone are the more precise, and as fast where hardware is no faster at int8 products: t is 0 by default. On a
CPU `native.products` multiplies by the stored bytes; elsewhere the matrix is expanded for the product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from burnish.config import UserError, option
from burnish.model.bundle import Context, Model
from burnish.model.linear import Spans, Weight, take
from burnish.model.surgery import TARGETS, reserve, store
from burnish.native import products

CHANGES_BASE = True
STORES_ANEW = True
FROM_BASE = True
PIECE = 1 << 18  # weights rounded at a time


@dataclass(frozen=True)
class Config:
    """Which weights, and whether activations too."""

    target_modules: list[str] | str = option("all-linear", TARGETS)
    llm_int8_threshold: float = option(
        0.0, "above 0 activations are int8 too, but for columns that reach it, as in LLM.int8 with 6; 0: weights alone"
    )

    def without(self, paths: Sequence[str]) -> Config:
        """Where the projections at `paths` are no longer stored this way."""
        return replace(self, target_modules=[path for path in self.target_modules if path not in paths])


class Int8(Weight):
    """`values` (out, in) int8 and `scale` (out,) float32, the row's absolute maximum over 127."""

    def __init__(self, values: Tensor, scale: Tensor, threshold: float = 0.0):
        super().__init__()
        self.threshold = threshold
        self.values = nn.Parameter(values, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.shape = (values.shape[0], values.shape[1])

    @classmethod
    def quantize(cls, dense: Tensor, threshold: float = 0.0) -> Int8:
        """dense (out, in), any floating dtype. Some rows at a time: whole matrices in float32 would leave holes between
        what stays, which the process keeps."""
        rows, columns = dense.shape
        values = torch.empty(rows, columns, dtype=torch.int8, device=dense.device)
        scale = torch.empty(rows, device=dense.device)
        step = max(1, PIECE // columns)
        for part, into, absmax in zip(dense.detach().split(step), values.split(step), scale.split(step), strict=True):
            wide = part.float()
            torch.amax(wide.abs(), dim=1, out=absmax)
            into.copy_((wide * (127.0 / absmax.clamp(min=1e-30))[:, None]).round_())
        return cls(values, scale.div_(127.0), threshold)

    @classmethod
    def empty(cls, rows: int, columns: int, threshold: float = 0.0) -> Int8:
        """Storage to load into."""
        return cls(torch.empty(rows, columns, dtype=torch.int8), torch.empty(rows), threshold)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if not self.threshold:
            return super().product(x, bias)
        wide = x.float()
        outliers = wide.abs() >= self.threshold
        columns = outliers.any(0)
        absmax = wide.masked_fill(outliers, 0).abs().amax(1, keepdim=True)
        rounded = torch.round(wide.masked_fill(columns, 0) * (127.0 / absmax.clamp(min=1e-30)))
        out = self.whole_product(rounded) * (absmax / 127.0)
        if columns.any():
            beside = (self.values[:, columns] * self.scale.float()[:, None]).to(x.dtype)
            out += x[:, columns].float() @ beside.float().t()
        return (out if bias is None else out + bias.float()).to(x.dtype)

    def whole_product(self, x: Tensor) -> Tensor:
        """x (tokens, in) whole numbers up to 127 -> (tokens, out) float32, times the rows' scales."""
        kind, stored = products.INT8, products.as_stored(self.values, (self.scale,), None)
        if products.fits(x, kind):
            return products.matmul(kind, x, None, self.shape, stored)
        return torch._int_mm(x.to(torch.int8), self.values.t()).float() * self.scale.float()

    def dequantize(self) -> Tensor:
        return self.dequantize_to(torch.float32)

    def dequantize_to(self, dtype: torch.dtype) -> Tensor:
        if products.usable(self.values.device, dtype):
            return products.rows_dequantize(products.INT8, dtype, self.values, self.scale)
        return (self.values * self.scale.float()[:, None]).to(dtype)

    @property
    def in_pieces(self) -> bool:
        return True

    def expand(self, first: int, out: Tensor) -> None:
        rows = slice(first, first + len(out))
        if products.usable(out.device, out.dtype):
            products.rows_dequantize(products.INT8, out.dtype, self.values[rows], self.scale[rows], out)
        else:
            torch.mul(self.values[rows], self.scale[rows].float()[:, None], out=out)

    def as_stored(self) -> tuple[int, products.Stored] | None:
        return None if self.threshold else (products.INT8, products.as_stored(self.values, (self.scale,), None))

    def shard(self, dim: int, spans: Spans) -> Int8:
        scale = take(self.scale, 0, spans) if dim == 0 else self.scale.clone()
        return Int8(take(self.values, dim, spans), scale, self.threshold)


def apply(model: Model, config: Config, context: Context) -> Config:
    """Quantise the targets in place, one at a time."""
    if not config.llm_int8_threshold >= 0:
        raise UserError(f"int8: llm_int8_threshold: must be at least 0, is {config.llm_int8_threshold}; 6.0 is usual")
    paths = store(model.net, config.target_modules, Int8, context, threshold=config.llm_int8_threshold)
    return replace(config, target_modules=paths)


def rebuild(model: Model, config: Config) -> None:
    reserve(model.net, config.target_modules, Int8, threshold=config.llm_int8_threshold)
