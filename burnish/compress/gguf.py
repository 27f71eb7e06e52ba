"""GGUF's quantised blocks: weights that stay as llama.cpp's files store them.

    q8_0, q4_0     w = d q                    32 weights share d
    q5_0, q5_1     w = d q, d q + m           32 weights share d and m; what llama.cpp falls back to, not written
    q4_k, q5_k     w = d s q - dmin m         32 weights share s and m (6 bits), 256 share d and dmin
    q6_k           w = d s q                  16 weights share s (8 bits), 256 share d

Source: ggml's `docs/gguf.md` and `ggml-common.h`, which define the bytes. Expanded values, and q8_0 and q4_0 blocks,
equal the gguf package's to the bit. The scales of the others are searched by least squares: `native/gguf.c` says how,
and the functions here are its twins in plain torch, which run where there is no compiler. On a CPU `native.products`
multiplies a few tokens by the stored bytes. A row is whole blocks, so that its length is a multiple of 32 or 256.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from burnish.config import UserError
from burnish.model.linear import Spans, Weight, take
from burnish.native import products

PIECE = 1 << 22  # weights quantised at a time, which bounds the temporaries
TRIES = 24  # scales that are tried for a group
STEP = 2 / (TRIES - 1)  # of a scale's inverse, in levels


@dataclass(frozen=True)
class Format:
    """`code` is the type's number in a file, `file_type` that of a file made of it, `kind` the C functions' one; a
    block of `size` weights takes `nbytes` bytes."""

    name: str
    code: int
    file_type: int
    size: int
    nbytes: int
    kind: int

    def row(self, columns: int) -> int:
        """Bytes of a row of `columns` weights."""
        return columns // self.size * self.nbytes


FORMATS = {
    found.name: found
    for found in (
        Format("q8_0", 8, 7, 32, 34, products.Q8_0),
        Format("q4_0", 2, 2, 32, 18, products.Q4_0),
        Format("q5_0", 6, 8, 32, 22, products.Q5_0),
        Format("q5_1", 7, 9, 32, 24, products.Q5_1),
        Format("q4_k", 12, 14, 256, 144, products.Q4_K),
        Format("q5_k", 13, 16, 256, 176, products.Q5_K),
        Format("q6_k", 14, 18, 256, 210, products.Q6_K),
    )
}


class GGUF(Weight):
    """`blocks` uint8 (out, bytes of a row)."""

    def __init__(self, found: Format, blocks: Tensor):
        super().__init__()
        self.format = found
        self.blocks = nn.Parameter(blocks, requires_grad=False)
        self.shape = (blocks.shape[0], blocks.shape[1] // found.nbytes * found.size)

    @classmethod
    def quantize(cls, dense: Tensor, name: str) -> GGUF:
        """dense (out, in), any floating dtype. Raises UserError where its rows are no whole blocks."""
        found = FORMATS[name]
        rows, columns = dense.shape
        if columns % found.size:
            raise UserError(f"gguf: rows of {columns} weights are no whole blocks of {found.size}, as {name} needs")
        blocks = torch.empty(rows, found.row(columns), dtype=torch.uint8, device=dense.device)
        step = max(1, PIECE // columns)
        for part, out in zip(dense.detach().split(step), blocks.split(step), strict=True):
            wide = part.float().contiguous()
            if products.usable(wide.device, torch.float32):
                products.gguf_quantize(found.kind, wide, out)
            else:
                out.copy_(quantized(found, wide.view(-1, found.size)).view(out.shape))
        return cls(found, blocks)

    @classmethod
    def empty(cls, rows: int, columns: int, name: str) -> GGUF:
        """Storage to load into."""
        return cls(FORMATS[name], torch.empty(rows, FORMATS[name].row(columns), dtype=torch.uint8))

    def dequantize(self) -> Tensor:
        return self.dequantize_to(torch.float32)

    def dequantize_to(self, dtype: torch.dtype) -> Tensor:
        return expanded(self.format, self.blocks, dtype)

    @property
    def in_pieces(self) -> bool:
        return True

    def expand(self, first: int, out: Tensor) -> None:
        rows = self.blocks[first : first + len(out)]
        if products.usable(out.device, out.dtype):
            products.gguf_dequantize(self.format.kind, rows, out)
        else:
            out.copy_(expanded(self.format, rows, out.dtype))

    def as_stored(self) -> tuple[int, products.Stored] | None:
        return None if self.shape[1] % 64 else (self.format.kind, products.as_stored(self.blocks, (), None))

    def shard(self, dim: int, spans: Spans) -> GGUF:
        size, nbytes = self.format.size, self.format.nbytes
        if dim == 1:
            if any(start % size or end % size for start, end in spans):
                raise UserError(
                    f"gguf: a part of a {self.shape[0]} x {self.shape[1]} matrix would cut its blocks of {size} "
                    "inputs; take fewer ranks"
                )
            spans = [(start // size * nbytes, end // size * nbytes) for start, end in spans]
        return GGUF(self.format, take(self.blocks, dim, spans))


class Table(nn.Module):
    """An embedding whose rows are expanded as they are looked up, to `dtype`."""

    def __init__(self, storage: GGUF, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.storage, self.dtype = storage, dtype
        self.num_embeddings, self.embedding_dim = storage.shape

    @property
    def weight(self) -> Tensor:
        """NaNs that take no memory, for who asks for shape, dtype or device."""
        return torch.full((), torch.nan, dtype=self.dtype, device=self.storage.blocks.device).expand(self.storage.shape)

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.storage.blocks.index_select(0, ids.flatten())
        return expanded(self.storage.format, rows, self.dtype).view(*ids.shape, -1)


def expanded(found: Format, blocks: Tensor, dtype: torch.dtype) -> Tensor:
    """blocks (rows, bytes of a row) -> (rows, in) in `dtype`."""
    if products.usable(blocks.device, dtype):
        out = torch.empty(len(blocks), blocks.shape[1] // found.nbytes * found.size, dtype=dtype)
        products.gguf_dequantize(found.kind, blocks.contiguous(), out)
        return out
    return dequantized(found, blocks.reshape(-1, found.nbytes)).view(len(blocks), -1).to(dtype)


def halves(blocks: Tensor) -> Tensor:
    """Bytes (n, 2 k) of float16 -> (n, k) float32."""
    return blocks.contiguous().view(torch.float16).float()


def nibbles(packed: Tensor) -> Tensor:
    """(..., k) bytes -> (..., 2, k): the low nibbles, then the high ones."""
    return torch.stack((packed & 15, packed >> 4), -2)


def dequantized(found: Format, blocks: Tensor) -> Tensor:
    """blocks (n, bytes of one) -> (n, size) float32."""
    count = len(blocks)
    if found.name == "q8_0":
        return halves(blocks[:, :2]) * blocks[:, 2:].view(torch.int8)
    if found.name == "q4_0":
        return halves(blocks[:, :2]) * (nibbles(blocks[:, 2:]).view(count, 32).float() - 8)
    if found.name in ("q5_0", "q5_1"):
        bits = blocks[:, -20:-16, None] >> torch.arange(8, device=blocks.device) & 1
        q = (nibbles(blocks[:, -16:]).view(count, 32) | bits.view(count, 32) << 4).float()
        d = halves(blocks[:, :2])
        return d * (q - 16) if found.name == "q5_0" else d * q + halves(blocks[:, 2:4])
    if found.name == "q6_k":
        low = nibbles(blocks[:, :128].view(count, 2, 64)).view(count, 2, 4, 32)
        shifts = torch.arange(0, 8, 2, device=blocks.device)[:, None]
        high = blocks[:, 128:192].view(count, 2, 1, 32) >> shifts & 3
        q = (low | high << 4).view(count, 16, 16).float() - 32
        scales = halves(blocks[:, 208:]) * blocks[:, 192:208].view(torch.int8)
        return (q * scales[..., None]).view(count, 256)
    packed = blocks[:, 4:16].view(count, 3, 4)
    first, second, third = packed[:, 0], packed[:, 1], packed[:, 2]
    scales = torch.cat((first & 63, third & 15 | first >> 6 << 4), 1) * halves(blocks[:, :2])
    minima = torch.cat((second & 63, third >> 4 | second >> 6 << 4), 1) * halves(blocks[:, 2:4])
    q = nibbles(blocks[:, -128:].view(count, 4, 32)).view(count, 8, 32)
    if found.name == "q5_k":
        q = q | (blocks[:, None, 16:48] >> torch.arange(8, device=blocks.device)[:, None] & 1) << 4
    return (q * scales[..., None] - minima[..., None]).view(count, 256)


def quantized(found: Format, x: Tensor) -> Tensor:
    """x (n, size) float32 -> blocks (n, bytes of one)."""
    make = {"q8_0": quantized_q8_0, "q4_0": quantized_q4_0, "q6_k": quantized_q6_k}
    return make[found.name](x) if found.name in make else quantized_q45_k(x, 15 if found.name == "q4_k" else 31)


def as_halves(x: Tensor) -> Tensor:
    """(n, k) -> bytes (n, 2 k) of float16."""
    return x.to(torch.float16).view(torch.uint8)


def inverse(scale: Tensor) -> Tensor:
    """1 / scale, and 0 for 0."""
    return torch.where(scale == 0, 0, 1 / scale)


def farthest(x: Tensor) -> Tensor:
    """(..., k) -> (..., 1): what lies farthest from zero."""
    return x.gather(-1, x.abs().argmax(-1, keepdim=True))


def quantized_q8_0(x: Tensor) -> Tensor:
    d = x.abs().amax(1, keepdim=True) / 127
    value = x * inverse(d)
    down = value.abs().floor()  # halves away from zero
    q = value.sign() * (down + (2 * (value.abs() - down)).floor())
    return torch.cat((as_halves(d), q.to(torch.int8).view(torch.uint8)), 1)


def quantized_q4_0(x: Tensor) -> Tensor:
    d = farthest(x) / -8
    q = (x * inverse(d) + 8.5).trunc().clamp(max=15).to(torch.uint8)
    return torch.cat((as_halves(d), q[:, :16] | q[:, 16:] << 4), 1)


def search(x: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Scales and minima (n, 8), both >= 0, so that scale q - minimum, q of 0 to `most`, is near x (n, 8, 32)."""
    low, high, total, squares = x.amin(-1).clamp(max=0), x.amax(-1), x.sum(-1), x.square().sum(-1)
    scale, minimum, least = torch.zeros_like(low), low.abs(), torch.full_like(low, torch.inf)
    for number in range(TRIES):
        q = (
            ((x - low[..., None]) * ((most - 1 + STEP * number) * inverse(high - low))[..., None])
            .round()
            .clamp(0, most)
        )
        sums, of_squares, product = q.sum(-1), q.square().sum(-1), (q * x).sum(-1)
        determinant = 32 * of_squares - sums.square()
        s = (32 * product - total * sums) / determinant
        m = (sums * product - of_squares * total) / determinant
        free = (determinant > 0) & (m > 0)
        s, m = torch.where(free, s, product / of_squares), torch.where(free, m, 0)
        error = squares - s * product + m * total
        better = error < least
        scale, minimum, least = (
            torch.where(better, new, old) for new, old in ((s, scale), (m, minimum), (error, least))
        )
    return scale, minimum


def quantized_q45_k(x: Tensor, most: int) -> Tensor:
    x = x.view(-1, 8, 32)
    scale, minimum = search(x, most)
    heads = as_halves(torch.stack((scale.amax(1) / 63, minimum.amax(1) / 63), 1))
    both = halves(heads)
    d, dmin = both[:, :1], both[:, 1:]
    s, m = (scale * inverse(d)).round().clamp(0, 63), (minimum * inverse(dmin)).round().clamp(0, 63)
    q = ((x + (dmin * m)[..., None]) * inverse(d * s)[..., None]).round().clamp(0, most).to(torch.uint8)
    s, m = s.to(torch.uint8), m.to(torch.uint8)
    first, second = s[:, :4] | s[:, 4:] >> 4 << 6, m[:, :4] | m[:, 4:] >> 4 << 6
    parts = [heads, first, second, s[:, 4:] & 15 | m[:, 4:] << 4]
    if most > 15:
        parts.append(
            ((q >> 4) << torch.arange(8, dtype=torch.uint8, device=x.device)[:, None]).sum(1, dtype=torch.uint8)
        )
    pairs = (q & 15).view(-1, 4, 2, 32)
    return torch.cat((*parts, (pairs[:, :, 0] | pairs[:, :, 1] << 4).flatten(1)), 1)


def quantized_q6_k(x: Tensor) -> Tensor:
    x = x.view(-1, 16, 16)
    extreme = farthest(x)
    scale, best = torch.zeros_like(extreme), torch.full_like(extreme, -1)
    for number in range(TRIES):
        q = (x * (-(31 + STEP * number) * inverse(extreme))).round().clamp(-32, 31)
        squares, product = q.square().sum(-1, keepdim=True), (q * x).sum(-1, keepdim=True)
        gain = product.square() * inverse(squares)
        scale = torch.where(gain > best, product * inverse(squares), scale)
        best = torch.maximum(best, gain)
    heads = as_halves(farthest(scale[..., 0]) / -128)
    d = halves(heads)[..., None]
    s = (scale * inverse(d)).round().clamp(-128, 127)
    q = ((x * inverse(d * s)).round().clamp(-32, 31) + 32).to(torch.uint8).view(-1, 2, 4, 32)
    low = (q[:, :, :2] & 15 | (q[:, :, 2:] & 15) << 4).flatten(1)
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=x.device)[:, None]
    high = ((q >> 4) << shifts).sum(2, dtype=torch.uint8).flatten(1)
    return torch.cat((low, high, s.to(torch.int8).view(torch.uint8)[..., 0], heads), 1)
