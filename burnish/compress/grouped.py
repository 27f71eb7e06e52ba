"""Weights of 2, 3, 4 or 8 bits in groups: each group of a row's inputs has a scale, and a zero point where asymmetric.

    w ~ (q - zero) * scale,    q in [0, 2^bits),    zero = 2^(bits - 1) where symmetric

Source: GPTQ (arXiv 2210.17323), section 4, whose grid this is, scales in float16 as its checkpoints store them. On a
CPU `native.products` multiplies a few tokens by the stored bytes and expands pieces of the matrix for more.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from burnish.config import UserError
from burnish.model.linear import Spans, Weight, take
from burnish.native import products

BITS = (2, 3, 4, 8)
UNIT = 32  # inputs that the kernels scale at once
KINDS = {2: products.GROUPED_2, 3: products.GROUPED_3, 4: products.GROUPED, 8: products.GROUPED_8}
SMALLEST, LARGEST = 2.0**-24, 65504.0  # positive numbers of float16
HELP = {  # of the options that say how matrices are stored
    "bits": "2, 3, 4 or 8",
    "group_size": "inputs that share a scale; -1: all of a row",
    "sym": "no zero points",
    "bits_pattern": "other bits by a regular expression over the ends of projections' names, as LoRA's rank_pattern",
}


@dataclass(frozen=True)
class Form:
    """How matrices are stored. `group_size` inputs share a scale, -1: all of a row; the last group of a row may be
    shorter. `sym`: no zero points. `ordered`: groups are of inputs in another order than the layer's."""

    bits: int = 4
    group_size: int = 128
    sym: bool = True
    ordered: bool = False

    def check(self, technique: str) -> None:
        """Raise UserError where there is no such form."""
        if self.bits not in BITS:
            raise UserError(f"technique '{technique}': bits is {self.bits}; choose one of {', '.join(map(str, BITS))}")
        if self.group_size < 1 and self.group_size != -1:
            raise UserError(
                f"technique '{technique}': group_size is {self.group_size}; give a positive number, or -1 for a row"
            )

    @property
    def top(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    @property
    def middle(self) -> int:
        """Every zero point where symmetric."""
        return 2 ** (self.bits - 1)

    def size(self, columns: int) -> int:
        """Inputs of a group."""
        return columns if self.group_size == -1 else min(self.group_size, columns)

    def grid(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """(scale, zero) float32 of groups (..., size): from the smallest to the largest of each and 0."""
        low, high = values.amin(-1).clamp(max=0), values.amax(-1).clamp(min=0)
        if self.sym:
            high = torch.maximum(high, -low)
            low = -high
        span = torch.where(high > low, high - low, 2.0)
        scale = (span / self.top).clamp(SMALLEST, LARGEST).half().float()
        zero = torch.full_like(scale, self.middle) if self.sym else (-low / scale).round().clamp(0, self.top)
        return scale, zero

    def codes(self, values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """The nearest codes, in float32; the three broadcast."""
        return (values / scale).round_().add_(zero).clamp_(0, self.top)

    def nearest(self, dense: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dense (out, in), each group for itself -> codes (out, groups, size), the last group's beyond it too, and
        scale and zero (out, groups), all float32."""
        rows, columns = dense.shape
        size = self.size(columns)
        wide = F.pad(dense.detach().float(), (0, -columns % size)).view(rows, -1, size)
        scale, zero = self.grid(wide)
        return self.codes(wide, scale[..., None], zero[..., None]), scale, zero

    def round(self, dense: Tensor) -> Grouped:
        """dense (out, in) rounded to the nearest."""
        codes, scale, zero = self.nearest(dense)
        return Grouped.of(self, codes.to(torch.uint8).view(len(dense), -1)[:, : dense.shape[1]], scale, zero)

    def rounded(self, dense: Tensor) -> Tensor:
        """`round(dense).dequantize()` to the last bit, without the storage between."""
        codes, scale, zero = self.nearest(dense)
        return codes.sub_(zero[..., None]).mul_(scale[..., None]).view(len(dense), -1)[:, : dense.shape[1]]


def planes(bits: int) -> list[int]:
    """Bits of the parts that codes are stored in: three are two and one."""
    return [2, 1] if bits == 3 else [bits]


@cache
def shifts(width: int, device: torch.device) -> Tensor:
    """Of the codes in a byte; the first of two neighbours stands above the second, as in NF4."""
    places = torch.arange(8 // width, dtype=torch.uint8, device=device)
    return (places ^ (width < 8)) * width


def pack(codes: Tensor, bits: int) -> Tensor:
    """codes (rows, columns) uint8 -> (rows, bytes) uint8, a row's parts one after the other."""
    codes = F.pad(codes, (0, -codes.shape[1] % 8))
    parts, shift = [], bits
    for width in planes(bits):
        shift -= width
        part = (codes >> shift if width == planes(bits)[0] else codes & 1).view(len(codes), -1, 8 // width)
        parts.append((part << shifts(width, codes.device)).sum(2, dtype=torch.uint8))
    return torch.cat(parts, 1)


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `pack`."""
    padded = columns + -columns % 8
    codes = torch.zeros(len(packed), padded, dtype=torch.uint8, device=packed.device)
    for width, part in zip(planes(bits), packed.split([padded * w // 8 for w in planes(bits)], 1), strict=True):
        values = (part[:, :, None] >> shifts(width, packed.device)) & (2**width - 1)
        codes = (codes << width) | values.view(len(packed), -1)
    return codes[:, :columns]


@cache
def levels(size: int) -> Tensor:
    """What the kernels read: four bits' levels without a scale, and how many inputs have one."""
    return torch.tensor([*range(-8, 8), size], dtype=torch.float32)


class Grouped(Weight):
    """`packed` (out, bytes) uint8 as `pack` gives it, `scale` (out, groups) float16, `zero` (out, groups) uint8 where
    asymmetric, and `order` (in,) int32 where ordered: column i is the layer's input order[i]."""

    packed: Tensor
    scale: Tensor

    def __init__(self, form: Form, shape: tuple[int, int], tensors: dict[str, Tensor]):
        super().__init__()
        self.form, self.shape = form, shape
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self.kind = KINDS[form.bits]
        self.regular = not shape[1] % 64 and (not self.size % UNIT or self.size == shape[1])

    @classmethod
    def of(cls, form: Form, codes: Tensor, scale: Tensor, zero: Tensor, order: Tensor | None = None) -> Grouped:
        """codes (out, in), scale and zero (out, groups), order (in,), None: the layer's own."""
        tensors = {"packed": pack(codes, form.bits).contiguous(), "scale": scale.half().contiguous()}
        if not form.sym:
            tensors["zero"] = zero.to(torch.uint8).contiguous()
        if form.ordered:
            tensors["order"] = torch.arange(codes.shape[1]).int() if order is None else order.int()
        return cls(form, (codes.shape[0], codes.shape[1]), tensors)

    @classmethod
    def empty(cls, form: Form, rows: int, columns: int) -> Grouped:
        """Storage to load into."""
        groups = -(-columns // form.size(columns))
        tensors = {"packed": torch.empty(rows, -(-columns // 8) * form.bits, dtype=torch.uint8)}
        tensors["scale"] = torch.empty(rows, groups, dtype=torch.float16)
        if not form.sym:
            tensors["zero"] = torch.empty(rows, groups, dtype=torch.uint8)
        if form.ordered:
            tensors["order"] = torch.empty(columns, dtype=torch.int32)
        return cls(form, (rows, columns), tensors)

    @property
    def size(self) -> int:
        """Inputs of a group."""
        return self.form.size(self.shape[1])

    def zeros(self) -> Tensor:
        """(out, groups) zero points."""
        stored = self._parameters.get("zero")
        return torch.full_like(self.scale, self.form.middle, dtype=torch.uint8) if stored is None else stored

    def dequantize(self) -> Tensor:
        return self.dequantize_to(torch.float32)

    def dequantize_to(self, dtype: torch.dtype) -> Tensor:
        out = torch.empty(self.shape, dtype=dtype, device=self.packed.device)
        self.expand(0, out)
        return out

    @property
    def in_pieces(self) -> bool:
        return True

    def expand(self, first: int, out: Tensor) -> None:
        rows, order = slice(first, first + len(out)), self._parameters.get("order")
        if self.regular and products.usable(out.device, out.dtype):
            values = out if order is None else torch.empty_like(out)
            products.grouped_dequantize(self.kind, self.shape, first, self._stored(), values)
        else:
            columns, constants = self.shape[1], (self.scale[rows].float(), self.zeros()[rows].float())
            scale, zero = (x.repeat_interleave(self.size, 1)[:, :columns] for x in constants)
            values = (unpack(self.packed[rows], self.form.bits, columns) - zero) * scale
        if order is not None:
            out[:, order] = values.to(out.dtype)
        elif values is not out:
            out.copy_(values)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        order = self._parameters.get("order")
        native = x.device.type == "cpu" and not torch.compiler.is_compiling()
        if order is None or not (native and self.regular and products.fits(x, self.kind)):
            return super().product(x, bias)
        return products.matmul(self.kind, x.index_select(1, order), bias, self.shape, self._stored())

    def _stored(self) -> products.Stored:
        """As `native` takes it: codes, zero points, scales, levels."""
        found = self._parameters
        scale = cast("Tensor", found["scale"])
        scale = scale if scale.dtype is torch.float16 else scale.half()  # a cast of the whole model may have changed it
        return found["packed"], found.get("zero"), scale, None, None, levels(self.size)

    def as_stored(self) -> tuple[int, products.Stored] | None:
        return (self.kind, self._stored()) if self.regular and not self.form.ordered else None

    def shard(self, dim: int, spans: Spans) -> Grouped:
        """The same codes and scales. Inputs are cut between groups only."""
        rows, columns = self.shape
        whole = self.size >= columns
        unit = 8 if whole else self.size
        if dim == 1 and (
            self.form.ordered
            or unit % 8
            or any(start % unit or (end % unit and end != columns) for start, end in spans)
            or any(end == columns and end % unit for start, end in spans[:-1])
        ):
            raise UserError(
                f"a part of a {rows} x {columns} matrix would cut its groups of {self.size} inputs, or they have an "
                "order of their own; take fewer ranks, or a smaller group_size"
            )
        tensors = {name: x.detach() for name, x in self.named_parameters()}
        form = self.form
        if dim == 0:
            tensors |= {name: take(x, 0, spans) for name, x in tensors.items() if name != "order"}
            return Grouped(form, (sum(end - start for start, end in spans), columns), tensors)
        codes = take(unpack(tensors["packed"], form.bits, columns), 1, spans)
        tensors["packed"] = pack(codes, form.bits)
        groups = [(start // self.size, -(-end // self.size)) for start, end in spans]
        form = replace(form, group_size=-1) if whole else form
        if not whole:
            tensors |= {name: take(tensors[name], 1, groups) for name in ("scale", "zero") if name in tensors}
        return Grouped(form, (rows, codes.shape[1]), tensors)
