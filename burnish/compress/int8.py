"""int8 weights: one absolute maximum per output row, weights only.

    q = round(127 w / max|w_row|),    w ~ q max|w_row| / 127

Source: vector-wise quantisation of LLM.int8 (arXiv 2208.07339), section 2.1, without its activation outliers.
Values equal bitsandbytes' row-wise quantisation. On a CPU `native.products` multiplies by the stored bytes; elsewhere
the matrix is expanded for the product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from burnish.model.bundle import Context, Model
from burnish.model.linear import Spans, Weight, take
from burnish.model.surgery import linears, select
from burnish.native import products

CHANGES_BASE = True
STORES_ANEW = True


@dataclass(frozen=True)
class Config:
    """`target_modules` as for LoRA; the head and the embeddings stay."""

    target_modules: list[str] | str = "all-linear"

    def without(self, paths: Sequence[str]) -> Config:
        """Where the projections at `paths` are no longer stored this way."""
        return replace(self, target_modules=[path for path in self.target_modules if path not in paths])


class Int8(Weight):
    """`values` (out, in) int8 and `scale` (out,) float32, the row's absolute maximum over 127."""

    def __init__(self, values: Tensor, scale: Tensor):
        super().__init__()
        self.values = nn.Parameter(values, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.shape = (values.shape[0], values.shape[1])

    @classmethod
    def quantize(cls, dense: Tensor) -> Int8:
        """dense (out, in), any floating dtype."""
        wide = dense.detach().float()
        absmax = wide.abs().amax(dim=1)
        values = torch.round(wide * (127.0 / absmax.clamp(min=1e-30))[:, None]).to(torch.int8)
        return cls(values, absmax / 127.0)

    @classmethod
    def empty(cls, rows: int, columns: int) -> Int8:
        """Storage to load into."""
        return cls(torch.empty(rows, columns, dtype=torch.int8), torch.empty(rows))

    def dequantize(self) -> Tensor:
        return self.dequantize_to(torch.float32)

    def dequantize_to(self, dtype: torch.dtype) -> Tensor:
        if products.usable(self.values.device, dtype):
            return products.int8_dequantize(dtype, self.values, self.scale)
        return (self.values * self.scale.float()[:, None]).to(dtype)

    @property
    def in_pieces(self) -> bool:
        return True

    def expand(self, first: int, out: Tensor) -> None:
        rows = slice(first, first + len(out))
        if products.usable(out.device, out.dtype):
            products.int8_dequantize(out.dtype, self.values[rows], self.scale[rows], out)
        else:
            torch.mul(self.values[rows], self.scale[rows].float()[:, None], out=out)

    def as_stored(self) -> tuple[int, products.Stored]:
        return products.INT8, products.as_stored(self.values, (self.scale,), None)

    def shard(self, dim: int, spans: Spans) -> Int8:
        scale = take(self.scale, 0, spans) if dim == 0 else self.scale.clone()
        return Int8(take(self.values, dim, spans), scale)


def apply(model: Model, config: Config, context: Context) -> Config:
    """Quantise the targets in place, one at a time."""
    paths = []
    for path, linear in select(model.net, config.target_modules):
        linear.weight = Int8.quantize(linear.weight.dequantize())
        paths.append(path)
    return Config(paths)


def rebuild(model: Model, config: Config) -> None:
    wanted = set(config.target_modules)
    for path, linear in linears(model.net):
        if path in wanted:
            linear.weight = Int8.empty(linear.out_features, linear.in_features)
