"""Steps of decoding through whole layers in C (`decode.c`), for whoever has the tensors of the layers.

`Layers` holds what the C function reads: pointers, and the tensors that they point to.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from ctypes import Structure, c_double, c_int64, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from burnish.native import paged, products

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
FUSED = ("", "heads", "blocks")
SEEN_ALL, BOOLEAN, ADDITIVE = 0, 1, 2
WHOLE, ATTENTION, FEED_FORWARD = 0, 1, 2  # what is run of a layer


@dataclass(frozen=True)
class Matrix:
    """A stored matrix of (out, in): `kind` as in `products`, its tensors as `products.stored` gives them, and a float32
    bias (out,)."""

    kind: int
    tensors: Sequence[Tensor | None]
    shape: tuple[int, int]
    bias: Tensor | None = None


@dataclass(frozen=True)
class Norm:
    """LayerNorm where `layer`, else RMSNorm; weight and bias (size,) float32."""

    weight: Tensor
    bias: Tensor | None
    layer: bool
    eps: float


class _Projection(Structure):
    _fields_ = [
        ("kind", c_int64),
        ("stored", c_void_p * 6),
        ("rows", c_int64),
        ("columns", c_int64),
        ("bias", c_void_p),
    ]


class _Norm(Structure):
    _fields_ = [("weight", c_void_p), ("bias", c_void_p), ("layer", c_int64), ("eps", c_double)]


PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
NORMS = ("before_attention", "after_attention", "before_mlp", "after_mlp", "q_norm", "k_norm")


class _Layer(Structure):
    _fields_ = [
        *((name, _Projection) for name in PROJECTIONS),
        *((name, _Norm) for name in NORMS),
        *((name, c_void_p) for name in ("keys", "values", "key_scales", "value_scales")), ("scale", c_double),
    ]  # fmt: skip


class _Stack(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("hidden", "heads", "kv_heads", "size", "inner", "fused", "parallel")),
        ("activation", c_int64), ("rotated", c_int64), ("clip", c_double), ("threads", c_int64), ("narrow", c_int64),
    ]  # fmt: skip


class _Step(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("rows", "length", "slots", "stored")),
        *((name, c_void_p) for name in ("table", "x", "cosine", "sine", "mask")),
        *((name, c_int64) for name in ("masking", "mask_row", "mask_head", "part")), ("branch", c_void_p),
    ]  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """What layers share: sizes in elements, `size` and `rotated` of a head, `inner` of the feed-forward.

    `fused` as in a `Spec`. `parallel`: attention and feed-forward read the same input. `clip` of queries, keys and
    values, 0 for none.
    """

    hidden: int
    heads: int
    kv_heads: int
    size: int
    inner: int
    fused: str
    parallel: bool
    activation: str
    rotated: int
    clip: float


@dataclass(frozen=True)
class Held:
    """What a step attends to: keys and values by layer, float32 or bfloat16, with `length` - 1 tokens of each row,
    which get one more.

    They are (rows, kv_heads, capacity, size), or of a pool (kv_heads, slots, size), of which `table` (rows, length)
    int64 has each row's slots, all of them initialised but the last. A pool's may be int8 with float32 `scales`
    (kv_heads, slots, 1) by layer, of keys and of values.
    """

    keys: Mapping[int, Tensor] | Tensor
    values: Mapping[int, Tensor] | Tensor
    length: int
    table: Tensor | None = None
    scales: tuple[Tensor, Tensor] | None = None


class Layers:
    """Consecutive layers of one shape, given as their projections and norms by name."""

    def __init__(self, shape: Shape, layers: Sequence[tuple[Mapping[str, Matrix], Mapping[str, Norm], float]]):
        self.shape = shape
        self.kept = [layers]  # what the pointers point to
        self.layers = (_Layer * len(layers))()
        for layer, (matrices, norms, scale) in zip(self.layers, layers, strict=True):
            for name, matrix in matrices.items():
                pointers = (c_void_p * 6)(*map(_pointer, matrix.tensors))
                setattr(layer, name, _Projection(matrix.kind, pointers, *matrix.shape, _pointer(matrix.bias)))
            for name, norm in norms.items():
                setattr(layer, name, _Norm(_pointer(norm.weight), _pointer(norm.bias), norm.layer, norm.eps))
            layer.scale = scale
        parts = (shape.hidden, shape.heads, shape.kv_heads, shape.size, shape.inner, FUSED.index(shape.fused))
        rest = (shape.parallel, ACTIVATIONS.index(shape.activation), shape.rotated, shape.clip, 1, 0)
        self.stack = _Stack(*parts, *rest)

    def run(
        self,
        layers: range,
        x: Tensor,
        held: Held,
        rotary: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
        part: int = WHOLE,
    ) -> Tensor:
        """x (rows, hidden) through some of the layers, in x's dtype; or what one half of one layer adds to x, float32.

        rotary: cosine and sine (rows, rotated). mask: bool (rows, length) of what is seen, or floating (rows or 1,
        heads, length), added to the scores.
        """
        out = x.to(torch.float32, copy=True).contiguous()
        wide = None if rotary is None else [part.float().contiguous() for part in rotary]
        masking, row, head = SEEN_ALL, 0, 0
        if mask is not None:
            boolean = mask.dtype == torch.bool
            mask = (mask if boolean else mask.float()).contiguous()
            masking, row, head = BOOLEAN if boolean else ADDITIVE, mask.stride(0) * (len(mask) > 1), mask.stride(-2)
        for index in layers:
            layer = self.layers[index]
            layer.keys, layer.values = held.keys[index].data_ptr(), held.values[index].data_ptr()
            if held.scales is not None:
                layer.key_scales, layer.value_scales = (scales[index].data_ptr() for scales in held.scales)
        branch = torch.empty_like(out) if part else None
        self.stack.threads, self.stack.narrow = torch.get_num_threads(), x.dtype == torch.bfloat16
        kept, table = held.keys[layers[0]], None if held.table is None else held.table.contiguous()
        step = _Step(
            len(out), held.length, kept.shape[-2], paged.KINDS[kept.dtype], _pointer(table), out.data_ptr(),
            *(map(_pointer, wide) if wide else (None, None)), _pointer(mask), masking, row, head, part,
            _pointer(branch),
        )  # fmt: skip
        first = ctypes.byref(self.layers, layers.start * ctypes.sizeof(_Layer))
        if products.ready().decode(ctypes.byref(self.stack), first, len(layers), ctypes.byref(step)):
            raise MemoryError(f"no memory for a step of {len(out)} tokens")
        return out.to(x.dtype) if branch is None else branch


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
