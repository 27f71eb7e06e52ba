"""The one Linear: a projection whose stored weight may be dense, quantised or sparse.

Everything that changes how a weight is stored subclasses `Weight`; everything that adds to a projection (LoRA,
adapters) wraps a `Linear` whatever its weight is. Quantised storage is frozen Parameters, never buffers, because
FSDP shards parameters only.

Products of bfloat16 on a processor that has no instructions for them are computed in float32 and rounded to bfloat16:
torch 2.13 does them otherwise at a quarter of the speed. With frozen weights they are `native.products`'s.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from burnish.native import choice, products

ROUNDED_TOKENS = 256  # widened at a time
PIECE = 1 << 22  # weights expanded at a time
_scratch = threading.local()
Spans = Sequence[tuple[int, int]]


def take(x: Tensor, dim: int, spans: Spans) -> Tensor:
    """A copy of the parts [start, end) of x along `dim`, one after the other."""
    return torch.cat([x.narrow(dim, start, end - start) for start, end in spans], dim)


def arithmetic(x: Tensor) -> torch.dtype:
    """The dtype in which products of x are computed: its own, or float32 where that is the faster way."""
    narrow = x.dtype == torch.bfloat16 and x.device.type == "cpu" and not products.MULTIPLIES_BFLOAT16
    return torch.float32 if narrow else x.dtype


def plain_product(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """x (tokens, in) -> x @ matrix.T + bias, all of one dtype.

    torch.compile draws the expansion of a matrix into its product with one token, where the bias is added apart.
    """
    if bias is not None and torch.compiler.is_compiling() and len(x) == 1:
        return F.linear(x, matrix) + bias
    return F.linear(x, matrix, bias)


def rounded_product(
    x: Tensor, width: int, expand: Callable[[torch.dtype], Tensor], bias: Tensor | None = None
) -> Tensor:
    """x (tokens, in) -> x @ expand(dtype) + bias, (tokens, width), computed in `arithmetic(x)`, in x's dtype.

    Pieces of x are widened one at a time; the result stands before the temporaries, whose holes would outlive it.
    """
    out = x.new_empty(x.shape[0], width)
    matrix = expand(arithmetic(x))
    for part, result in zip(x.split(ROUNDED_TOKENS), out.split(ROUNDED_TOKENS), strict=True):
        wide = part.to(matrix.dtype) @ matrix
        result.copy_(wide if bias is None else wide.add_(bias))
    return out


def pieces(weight: Weight, kind: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """(first row, these rows expanded to `kind`) over all of W on a CPU, each in the room of the one before.

    The room stays: a fresh matrix would cost as long to be given by the system as to be multiplied.
    """
    rows, columns = weight.shape
    step = min(rows, max(256, PIECE // columns // 256 * 256))
    room = getattr(_scratch, "room", None)
    if room is None or room.numel() < step * columns or room.dtype != kind:
        with torch.inference_mode(False):
            room = _scratch.room = torch.empty(step * columns, dtype=kind)
    for first in range(0, rows, step):
        count = min(step, rows - first)
        matrix = room[: count * columns].view(count, columns)
        weight.expand(first, matrix)
        yield first, matrix


def by_pieces(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """x (tokens, in) -> x @ W.T + bias in x's dtype, computed in `arithmetic(x)`, a few rows of W at a time."""
    kind = arithmetic(x)
    out = x.new_empty(x.shape[0], weight.shape[0])
    for first, matrix in pieces(weight, kind):
        last = first + len(matrix)
        for part, result in zip(x.split(ROUNDED_TOKENS), out.split(ROUNDED_TOKENS), strict=True):
            wide = part.to(kind) @ matrix.t()
            result[:, first:last] = wide if bias is None else wide.add_(bias[first:last])
    return out


def by_pieces_transposed(grad: Tensor, weight: Weight) -> Tensor:
    """grad (tokens, out) -> grad @ W in grad's dtype, summed in float32 over a few rows of W at a time."""
    out = grad.new_empty(grad.shape[0], weight.shape[1])
    total = grad.new_zeros(out.shape, dtype=torch.float32)
    for first, matrix in pieces(weight, torch.float32):
        for part, result in zip(grad.split(ROUNDED_TOKENS), total.split(ROUNDED_TOKENS), strict=True):
            result.addmm_(part[:, first : first + len(matrix)].float(), matrix)
    return out.copy_(total)


def is_flat(x: Tensor) -> bool:
    """Whether x is (tokens, in) and computed as it is, as always in the native network."""
    return x.dim() == 2 and not torch.is_autocast_enabled(x.device.type)


def by_tokens(projection: nn.Module, x: Tensor) -> Tensor:
    """A projection of (tokens, in) applied to x (..., in), under autocast in its dtype."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind))
    with torch.autocast(kind, enabled=False):
        return projection(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)


class Weight(nn.Module):
    """Storage of a matrix of shape (out_features, in_features)."""

    shape: tuple[int, int]

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (tokens, in) -> (tokens, out), in x's dtype; the stored matrix is expanded only for the product."""
        if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
            return FrozenMatmul.apply(x, self, bias)
        return self.product(x, bias)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`matmul` without gradients."""
        native = self.natively(x)
        if native is not None:
            return products.matmul(native[0], x, bias, self.shape, native[1])
        return self.by_torch(x, bias)

    def natively(self, x: Tensor) -> tuple[int, products.Stored] | None:
        """`as_stored`, where `products.matmul` is the way for x (tokens, in)."""
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return None
        stored = self.as_stored()
        return stored if stored is not None and choice.ours(stored[0], x, self.shape, self.both_ways) else None

    def both_ways(self) -> tuple[choice.Way, choice.Way]:
        """The product with some of the rows, by `products.matmul` and by torch."""
        rows = min(self.shape[0], max(1, choice.SAMPLE // self.shape[1]))
        part = self.shard(0, [(0, rows)])
        stored = part.as_stored()
        assert stored is not None
        return lambda x: products.matmul(stored[0], x, None, part.shape, stored[1]), lambda x: part.by_torch(x, None)

    def by_torch(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`product` of torch's matrix products."""
        native = x.device.type == "cpu" and not torch.compiler.is_compiling()
        if native and arithmetic(x) in products.DTYPES and self.in_pieces:
            return by_pieces(x, self, bias)
        if arithmetic(x) == x.dtype:
            return plain_product(x, self.dequantize_to(x.dtype), None if bias is None else bias.to(x.dtype))
        return rounded_product(x, self.shape[0], lambda kind: self.dequantize_to(kind).t(), bias)

    def matmul_transposed(self, grad: Tensor) -> Tensor:
        """grad (tokens, out) -> (tokens, in), in grad's dtype: the gradient of `matmul`'s x. Not differentiable."""
        native = grad.device.type == "cpu" and not torch.compiler.is_compiling()
        if native and arithmetic(grad) == torch.float32 and self.in_pieces:
            return by_pieces_transposed(grad, self)
        if arithmetic(grad) == grad.dtype:
            return grad @ self.dequantize_to(grad.dtype)
        return rounded_product(grad, self.shape[1], lambda kind: self.dequantize_to(kind))

    def dequantize(self) -> Tensor:
        """The matrix as (out, in), in a floating dtype."""
        raise NotImplementedError

    def dequantize_to(self, dtype: torch.dtype) -> Tensor:
        """The matrix as (out, in) in `dtype`, for storage that can expand straight to it."""
        return self.dequantize().to(dtype)

    @property
    def in_pieces(self) -> bool:
        """Whether `expand` gives some rows for less than all."""
        return False

    def expand(self, first: int, out: Tensor) -> None:
        """Write the rows from `first`, a multiple of 256, into out (count, in), on a CPU."""
        raise NotImplementedError

    def shard(self, dim: int, spans: Spans) -> Weight:
        """A copy of the parts [start, end) along `dim` (0 outputs, 1 inputs), one after the other, which multiplies as
        these parts do here. Raises UserError where the storage cannot be cut there."""
        raise NotImplementedError

    def as_stored(self) -> tuple[int, products.Stored] | None:
        """The kind of storage and its tensors as `native` reads them on a CPU; None where it does not."""
        return None

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by name."""
        return dict(self.named_parameters())

    @property
    def nbytes(self) -> int:
        """Bytes that the storage takes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())


class FrozenMatmul(torch.autograd.Function):
    """x @ W.T for a frozen stored W: backward expands W again instead of keeping the expanded copy alive."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        ctx.has_bias = bias is not None
        return weight.product(x, bias)

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad_x = ctx.weight.matmul_transposed(grad) if ctx.needs_input_grad[0] else None
        grad_bias = grad.sum(0) if ctx.has_bias and ctx.needs_input_grad[2] else None
        return grad_x, None, grad_bias


class Dense(Weight):
    """A plain floating matrix; may be trained."""

    def __init__(self, dense: Tensor):
        super().__init__()
        self.dense = dense if isinstance(dense, nn.Parameter) else nn.Parameter(dense)

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        return (self.dense.shape[0], self.dense.shape[1])

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        kind, frozen = arithmetic(x), not (self.dense.requires_grad and torch.is_grad_enabled())
        if frozen and (kind != self.dense.dtype or (kind == torch.bfloat16 and self.natively(x) is not None)):
            return super().matmul(x, bias)  # which keeps no copy in `kind` for the backward pass
        return plain_product(x.to(kind), self.dense.to(kind), None if bias is None else bias.to(kind)).to(x.dtype)

    def by_torch(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self.dense.dtype == x.dtype == arithmetic(x):
            return plain_product(x, self.dequantize(), None if bias is None else bias.to(x.dtype))
        return super().by_torch(x, bias)

    def dequantize(self) -> Tensor:
        return self.dense

    @torch.no_grad()
    def multiply(self, factors: Tensor, dim: int) -> None:
        """Multiply the rows (dim 0, factors (out,)) or the columns (dim 1, factors (in,)), in place."""
        multiply(self.dense, factors, dim)

    @property
    def in_pieces(self) -> bool:
        return self.dense.dtype != torch.float32  # which is multiplied as it lies

    def expand(self, first: int, out: Tensor) -> None:
        out.copy_(self.dense[first : first + len(out)])

    def as_stored(self) -> tuple[int, products.Stored] | None:
        kind = {torch.bfloat16: products.DENSE, torch.float32: products.FLOATS}.get(self.dense.dtype)
        if kind is None or self.dense.shape[1] % 64 or not self.dense.is_contiguous():
            return None
        return kind, products.as_stored(self.dense, (), None)

    def shard(self, dim: int, spans: Spans) -> Dense:
        return Dense(nn.Parameter(take(self.dequantize().detach(), dim, spans), self.dense.requires_grad))


def multiply(dense: Tensor, factors: Tensor, dim: int) -> None:
    """`Dense.multiply` of dense (out, in), some rows at a time, each product in float32 at least."""
    by_row = factors[:, None] if dim == 0 else factors.expand(len(dense), -1)
    for part, by in zip(dense.split(ROUNDED_TOKENS), by_row.split(ROUNDED_TOKENS), strict=True):
        part.mul_(by)


class Unread(Dense):
    """A matrix that is still in its file; `dequantize` reads it, where the next one's may overwrite it. From `hold` to
    `release` it is in memory. What it has been multiplied by is kept, and done again to what is read."""

    def __init__(self, dense: Tensor, read: Callable[[], Tensor]):
        super().__init__(nn.Parameter(dense, requires_grad=False))
        self.read = read
        self.multiplied: list[tuple[Tensor, int]] = []

    @property
    def held(self) -> bool:
        return not self.dense.is_meta

    def hold(self) -> None:
        self.dense = nn.Parameter(self.dequantize().clone(), requires_grad=False)

    def release(self) -> None:
        self.dense = nn.Parameter(torch.empty_like(self.dense, device="meta"), requires_grad=False)

    def multiply(self, factors: Tensor, dim: int) -> None:
        self.multiplied.append((factors, dim))
        if self.held:
            super().multiply(factors, dim)

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return super().matmul(x, bias) if self.held else Weight.matmul(self, x, bias)

    def dequantize(self) -> Tensor:
        if self.held:
            return self.dense
        dense = self.read()
        for factors, dim in self.multiplied:
            multiply(dense, factors, dim)
        return dense

    @property
    def in_pieces(self) -> bool:
        return self.held

    def as_stored(self) -> tuple[int, products.Stored] | None:
        return super().as_stored() if self.held else None


class Linear(nn.Module):
    """y = x W^T + b with x (tokens, in_features); parameters are cast to x's dtype.

    In a `foreign` network x may be (..., in_features), and under autocast.
    """

    foreign = False

    def __init__(self, in_features: int, out_features: int, bias: bool = False, weight: Weight | None = None):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight: Weight = weight or Dense(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        if self.foreign and not is_flat(x):
            return by_tokens(self, x)
        return self.weight.matmul(x, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {type(self.weight).__name__}"
