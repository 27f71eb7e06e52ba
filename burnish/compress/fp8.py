"""FP8: weights as floating-point numbers of eight bits, E4M3, with a scale per output row; activations too if asked.

    q = e4m3(448 w / max|w_row|),    w ~ q max|w_row| / 448

With `activation_scheme` "dynamic" each token's activations are rounded in the same way before the product, as hardware
that multiplies such numbers takes them: x W^T ~ (p q^T) max|x_token| max|w_row| / 448^2. Source: FP8 Formats for Deep
Learning (arXiv 2209.05433), section 3. A GPU of compute capability 8.9 or higher multiplies the stored numbers
then. On a CPU `native.products` multiplies by the stored bytes, with activations as they are or rounded so; elsewhere
the matrix is expanded for the product, which saves memory and no time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import torch
from torch import Tensor, nn

from burnish.config import option
from burnish.model.bundle import Context, Model
from burnish.model.linear import Spans, Weight, take
from burnish.model.surgery import TARGETS, reserve, store
from burnish.native import products

CHANGES_BASE = True
STORES_ANEW = True
FROM_BASE = True
E4M3, LARGEST = torch.float8_e4m3fn, 448.0
UNIT = 16  # the hardware multiplies matrices whose sides it divides


@dataclass(frozen=True)
class Config:
    """Which weights, and whether activations too."""

    target_modules: list[str] | str = option("all-linear", TARGETS)
    activation_scheme: Literal["none", "dynamic"] = option("none", "dynamic: each token's activations are FP8 too")

    def without(self, paths: Sequence[str]) -> Config:
        """Where the projections at `paths` are no longer stored this way."""
        return replace(self, target_modules=[path for path in self.target_modules if path not in paths])


@cache
def multiplies(device: torch.device) -> bool:
    """Whether a device has instructions for products of these numbers."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def rounded(rows: Tensor) -> tuple[Tensor, Tensor]:
    """rows (n, in) -> (n, in) E4M3, and (n, 1) float32 scales."""
    wide = rows.detach().float()
    scale = wide.abs().amax(1, keepdim=True).clamp(min=1e-30) / LARGEST
    return (wide / scale).clamp(-LARGEST, LARGEST).to(E4M3), scale


class FP8(Weight):
    """`values` (out, in) uint8, the bits of E4M3, so that no cast changes them, and `scale` (out,) float32."""

    def __init__(self, values: Tensor, scale: Tensor, dynamic: bool = False):
        super().__init__()
        self.dynamic = dynamic
        self.values = nn.Parameter(values, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.shape = (values.shape[0], values.shape[1])

    @classmethod
    def quantize(cls, dense: Tensor, dynamic: bool = False) -> FP8:
        """dense (out, in), any floating dtype."""
        values, scale = rounded(dense)
        return cls(values.view(torch.uint8), scale[:, 0], dynamic)

    @classmethod
    def empty(cls, rows: int, columns: int, dynamic: bool = False) -> FP8:
        """Storage to load into."""
        return cls(torch.empty(rows, columns, dtype=torch.uint8), torch.empty(rows), dynamic)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if not self.dynamic:
            return super().product(x, bias)
        values, scale = rounded(x)
        if multiplies(x.device) and not any(side % UNIT for side in self.shape):
            weight, rows = self.values.view(E4M3).t(), self.scale.float()[None]
            out = torch._scaled_mm(values, weight, scale_a=scale, scale_b=rows, out_dtype=torch.bfloat16)
            return (out if bias is None else out + bias).to(x.dtype)
        x = (values.float() * scale).to(x.dtype)
        if products.fits(x, products.FP8):
            return products.matmul(products.FP8, x, bias, self.shape, self._stored())
        return super().product(x, bias)

    def dequantize(self) -> Tensor:
        return self.dequantize_to(torch.float32)

    def dequantize_to(self, dtype: torch.dtype) -> Tensor:
        if products.usable(self.values.device, dtype):
            return products.rows_dequantize(products.FP8, dtype, self.values, self.scale)
        return (self.values.view(E4M3).float() * self.scale.float()[:, None]).to(dtype)

    @property
    def in_pieces(self) -> bool:
        return True

    def expand(self, first: int, out: Tensor) -> None:
        rows = slice(first, first + len(out))
        if products.usable(out.device, out.dtype):
            products.rows_dequantize(products.FP8, out.dtype, self.values[rows], self.scale[rows], out)
        else:
            torch.mul(self.values[rows].view(E4M3).float(), self.scale[rows].float()[:, None], out=out)

    def as_stored(self) -> tuple[int, products.Stored] | None:
        return None if self.dynamic else (products.FP8, self._stored())

    def _stored(self) -> products.Stored:
        return products.as_stored(self.values, (self.scale,), None)

    def shard(self, dim: int, spans: Spans) -> FP8:
        scale = take(self.scale, 0, spans) if dim == 0 else self.scale.clone()
        return FP8(take(self.values, dim, spans), scale, self.dynamic)


def apply(model: Model, config: Config, context: Context) -> Config:
    """Round the targets in place, one at a time."""
    paths = store(model.net, config.target_modules, FP8, context, dynamic=config.activation_scheme == "dynamic")
    return replace(config, target_modules=paths)


def rebuild(model: Model, config: Config) -> None:
    reserve(model.net, config.target_modules, FP8, dynamic=config.activation_scheme == "dynamic")
