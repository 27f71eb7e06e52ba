"""Weights of four bits: one of sixteen levels, times the absolute maximum of their block.

    w ~ level[q] * absmax(block of 64),   absmax ~ offset + map8[c] * absmax2(block of 256)

Source: QLoRA (arXiv 2305.14314), section 3, with double quantisation, which takes the constants from 0.5 to 0.127 bits
per parameter. The levels are those of `nf4.py` or `fp4.py`. `map8` is the signed dynamic 8-bit code of "8-bit
Approximations for Parallelism" (arXiv 1511.04561) as bitsandbytes builds it. Values equal bitsandbytes'. Two weights
share a byte, the first in the high nibble. On a CPU `native.products` multiplies by the stored bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from burnish.config import UserError, option
from burnish.model.linear import Spans, Weight, take
from burnish.model.surgery import TARGETS
from burnish.native import products

BLOCK, CONSTANT_BLOCK = 64, 256
PIECE = BLOCK << 14  # weights quantised at a time, which bounds the temporaries


def mean(x: Tensor) -> Tensor:
    """x's mean as one thread sums it: a base that is quantised again gives the same at any number of them."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        return x.mean()
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class Config:
    """NF4's and FP4's."""

    target_modules: list[str] | str = option("all-linear", TARGETS)
    double_quant: bool = option(True, "the blocks' constants are quantised too, in blocks of 256")

    def without(self, paths: Sequence[str]) -> Config:
        """Where the projections at `paths` are no longer stored this way."""
        return replace(self, target_modules=[path for path in self.target_modules if path not in paths])


@cache
def dynamic_map() -> Tensor:
    """(256,) the signed dynamic 8-bit code, ascending: 7 decades of exponent, the rest of the bits linear."""
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1)
        for mean in ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (exponent - 6)).tolist():
            values += [mean, -mean]
    return torch.tensor(sorted(values))


@cache
def table(levels: tuple[float, ...], device: torch.device | str) -> Tensor:
    """(16,) the levels on a device."""
    return torch.tensor(levels, device=device)


@cache
def pairs(levels: tuple[float, ...], device: torch.device | str) -> Tensor:
    """(256, 2) the levels of a byte's high and low nibbles on a device."""
    byte = torch.arange(256, device=device)
    return table(levels, device)[torch.stack((byte >> 4, byte & 15), dim=1)]


def nearest_code(x: Tensor, code: Tensor) -> Tensor:
    """Index of the nearest level of an ascending code for every element of x."""
    return torch.bucketize(x, (code[1:] + code[:-1]) / 2)


def normalise(groups: Tensor, absmax: Tensor) -> Tensor:
    """groups (n, size) over their absolute maxima (n,); by the reciprocal, as the CUDA kernels round it."""
    return groups * (1 / absmax.clamp(min=1e-38))[:, None]


def blocks(x: Tensor, size: int) -> Tensor:
    """x flattened and zero-padded to (n, size)."""
    flat = x.reshape(-1)
    return torch.nn.functional.pad(flat, (0, -len(flat) % size)).view(-1, size)


class FourBit(Weight):
    """LEVELS, ascending; `packed` (ceil(out * in / 2),) uint8 and the blocks' constants: `absmax` float32, or with
    double quantisation `absmax` uint8 codes, `absmax2` float32 per 256 of them, and `offset` their mean."""

    LEVELS: ClassVar[tuple[float, ...]]
    kept: tuple[Tensor, Tensor] | None = None
    packed: Tensor
    absmax: Tensor
    absmax2: Tensor
    offset: Tensor

    def __init__(self, shape: tuple[int, int], tensors: dict[str, Tensor]):
        super().__init__()
        self.shape = shape
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    @classmethod
    def quantize(cls, dense: Tensor, double_quant: bool = True) -> Self:
        """dense (out, in), any floating dtype."""
        packed = torch.empty(-(-dense.numel() // 2), dtype=torch.uint8, device=dense.device)
        absmax = torch.empty(-(-dense.numel() // BLOCK), device=dense.device)
        parts = dense.detach().reshape(-1).split(PIECE), packed.split(PIECE // 2), absmax.split(PIECE // BLOCK)
        for part, stored, maxima in zip(*parts, strict=True):
            rows = blocks(part.float(), BLOCK)
            torch.amax(rows.abs(), dim=1, out=maxima)
            codes = nearest_code(normalise(rows, maxima), table(cls.LEVELS, dense.device))
            codes = codes.to(torch.uint8).view(-1, 2)[: len(stored)]
            torch.bitwise_or(codes[:, 0] << 4, codes[:, 1], out=stored)
        tensors = {"packed": packed, "absmax": absmax}
        if double_quant:
            offset = mean(absmax)
            groups = blocks(absmax - offset, CONSTANT_BLOCK)
            absmax2 = groups.abs().amax(dim=1)
            code = nearest_code(normalise(groups, absmax2), dynamic_map().to(dense.device))
            tensors |= {
                "absmax": code.to(torch.uint8).view(-1)[: len(absmax)],
                "absmax2": absmax2,
                "offset": offset,
            }
        return cls((dense.shape[0], dense.shape[1]), tensors)

    @classmethod
    def empty(cls, rows: int, columns: int, double_quant: bool) -> Self:
        """Storage to load into."""
        count = rows * columns
        constants = -(-count // BLOCK)
        tensors = {"packed": torch.empty(-(-count // 2), dtype=torch.uint8), "absmax": torch.empty(constants)}
        if double_quant:
            tensors["absmax"] = torch.empty(constants, dtype=torch.uint8)
            tensors |= {"absmax2": torch.empty(-(-constants // CONSTANT_BLOCK)), "offset": torch.empty(())}
        return cls((rows, columns), tensors)

    def tables(self) -> tuple[Tensor, Tensor]:
        """A byte's levels, as `pairs`, and the `dynamic_map`, where the weights are; kept here, where torch.compile
        finds them."""
        device = self.packed.device
        if self.kept is None or self.kept[0].device != device:
            self.kept = pairs(self.LEVELS, device), dynamic_map().to(device)
        return self.kept

    def constants(self) -> Tensor:
        """(blocks,) float32 absolute maxima."""
        if self.absmax.dtype != torch.uint8:
            return self.absmax
        groups = blocks(self.absmax, CONSTANT_BLOCK).long()
        wide = self.tables()[1][groups] * self.absmax2[:, None]
        return wide.view(-1)[: len(self.absmax)] + self.offset

    def dequantize(self) -> Tensor:
        return self.dequantize_to(torch.float32)

    def dequantize_to(self, dtype: torch.dtype) -> Tensor:
        if products.usable(self.packed.device, dtype):
            return products.nf4_dequantize(self.shape, dtype, *self._stored())
        count = self.shape[0] * self.shape[1]
        wide = F.embedding(self.packed.int(), self.tables()[0]).view(-1)[:count]
        wide = blocks(wide, BLOCK) * self.constants()[:, None]
        return wide.view(-1)[:count].view(self.shape).to(dtype)

    @property
    def in_pieces(self) -> bool:
        return self.shape[1] % BLOCK == 0 and products.usable(self.packed.device, torch.float32)

    def expand(self, first: int, out: Tensor) -> None:
        packed, constants, code = self._stored()
        width, count = self.shape[1], len(out)
        start, end = first * width // BLOCK, (first + count) * width // BLOCK  # blocks; 256 rows are whole groups
        part: tuple[Tensor, ...] = (constants[0][start:end],)
        if len(constants) > 1:
            part += constants[1][start // CONSTANT_BLOCK : -(-end // CONSTANT_BLOCK)], *constants[2:]
        bytes_of = packed[start * BLOCK // 2 : end * BLOCK // 2]
        products.nf4_dequantize((count, width), out.dtype, bytes_of, part, code, out)

    def _stored(self) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
        """Packed weights, constants and levels, as `native` takes them."""
        found = cast("dict[str, Tensor]", self._parameters)  # a module's attributes take half a microsecond each
        constants: tuple[Tensor, ...] = (found["absmax"],)
        if "offset" in found:
            constants += found["absmax2"], found["offset"], dynamic_map()
        return found["packed"], constants, table(self.LEVELS, "cpu")

    def as_stored(self) -> tuple[int, products.Stored] | None:
        return None if self.shape[1] % BLOCK else (products.NF4, products.as_stored(*self._stored()))

    def shard(self, dim: int, spans: Spans) -> Self:
        """The same levels; the blocks' constants, whose own blocks are cut, in float32."""
        rows, columns = self.shape
        if columns % BLOCK or (dim == 1 and any(start % BLOCK or end % BLOCK for start, end in spans)):
            raise UserError(
                f"{type(self).__name__}: a part of a {rows} x {columns} matrix would cut its blocks of {BLOCK} inputs; "
                "take fewer ranks, or int8"
            )
        blocks = spans if dim == 0 else [(start // BLOCK, end // BLOCK) for start, end in spans]
        packed = take(self.packed.view(rows, -1, BLOCK // 2), dim, blocks)
        absmax = take(self.constants().view(rows, -1), dim, blocks)
        shape = (packed.shape[0], packed.shape[1] * BLOCK)
        return type(self)(shape, {"packed": packed.flatten(), "absmax": absmax.flatten()})
