"""What stands between the weights' products in a training step on a CPU: attention with its rotary embedding, RMSNorm,
the gated SiLU, and softmax cross-entropy.

Each is one pass of C (`attention.c`, `pointwise.c`, built by the system's compiler on first use) where torch needs
several over temporaries, and keeps less for the backward pass: attention its inputs before rotation and one number per
row. They are written in the vectors of `vectors.h`, for AVX-512 and AVX2. torch 2.13's own CPU attention runs its
bfloat16 backward pass at a fifth of the processor's matrix rate, and on AVX2 at a thirtieth; in float32 it is kept, as
C saves 4% of a step at most, and only the rotary embedding before it is C. `fused` puts them into a network for as long
as it trains; whatever they do not cover (another dtype or device, a processor without AVX2, no compiler; for attention
a cache, ALiBi, scores scaled or capped in another way; Gemma's norm) goes the plain way. Under `torch.compile` only
attention is replaced, as the compiler fuses the rest.
"""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from burnish.model.attention import Attention, Frame
from burnish.model.network import Network
from burnish.model.norm import Norm
from burnish.model.positions import rotate
from burnish.model.transformer import ACTIVATIONS, MLP
from burnish.native import build

FOLDER = Path(__file__).parent
SIZES = 32  # head dimensions are multiples of it
DTYPES = (torch.bfloat16, torch.float32)  # attention takes bfloat16 only

_lock = threading.Lock()


class _Rows(ctypes.Structure):
    """A (batch, token, head, d) tensor."""

    _fields_ = (("at", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("batch", "token", "head")))


class _Shape(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batches", "heads", "kv_heads", "queries", "keys", "size")),
        ("causal", ctypes.c_int),
        ("threads", ctypes.c_int),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("mask", "cosine", "sine")),
    )


def library() -> ctypes.CDLL | None:
    """The compiled kernels, built if need be; None on a processor or a machine that cannot have them."""
    with _lock:
        return _library()


@cache
def _library() -> ctypes.CDLL | None:
    found = build.load([FOLDER / "attention.c", FOLDER / "pointwise.c"])
    if found is None or not hasattr(found, "attention_forward"):
        return None
    pointer, count, number, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
    for name in ("attention_forward", "attention_backward"):
        getattr(found, name).argtypes = [ctypes.POINTER(_Shape), ctypes.POINTER(_Rows), pointer]
    found.rms_norm_forward.argtypes = [pointer, pointer, number, count, count, pointer, pointer, flag, flag]
    found.rms_norm_backward.argtypes = [pointer, pointer, pointer, pointer, count, count, pointer, flag, flag]
    found.rms_norm_weight.argtypes = [pointer, pointer, pointer, count, count, pointer, flag, flag]
    found.gated_silu_forward.argtypes = [pointer, pointer, count, pointer, flag, flag]
    found.gated_silu_backward.argtypes = [pointer, pointer, pointer, count, pointer, pointer, flag, flag]
    found.rotate.argtypes = [pointer, pointer, pointer, count, count, count, flag, pointer, flag, flag]
    found.cross_entropy.argtypes = [pointer, pointer, count, count, pointer, flag, flag, flag]
    return found


def _ready() -> ctypes.CDLL:
    found = library()
    assert found is not None, "ask library() first"
    return found


@contextmanager
def fused(net: Network) -> Iterator[None]:
    """Run the network's attention, RMSNorm and gated SiLU by the kernels inside the block, wherever they can."""
    swaps: dict[type, type] = {Attention: _Attention, Norm: _Norm, MLP: _MLP} if library() else {}
    if net.spec.attention_scale or net.spec.attention_softcap:
        swaps.pop(Attention, None)
    swapped = [(module, type(module)) for module in net.modules() if type(module) in swaps]
    for module, plain in swapped:
        module.__class__ = swaps[plain]
    try:
        yield
    finally:
        for module, plain in swapped:
            module.__class__ = plain


class _Attention(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, frame: Frame) -> Tensor:
        cosine, sine = frame.rotary or (None, None)
        bare = frame.cache is None and (frame.mask is None or frame.mask.dtype == torch.bool)
        if bare and q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[-1] % SIZES == 0:
            # attention turns whole heads, and queries and keys by the same tables
            partial = cosine is not None and cosine.shape[-1] < q.shape[-1]
            if cosine is not None and sine is not None and (partial or frame.prefix is not None):
                turn = rotate if partial or not _takes(q) else _Rotate.apply
                q, k, cosine, sine = turn(q, cosine, sine), turn(k, cosine, sine), None, None
            if frame.prefix is not None:
                k, v = (x.transpose(1, 2) for x in self.after_prefix(k.transpose(1, 2), v.transpose(1, 2), frame))
            return scaled_dot_product_attention(q, k, v, cosine, sine, frame.mask, frame.causal)[0]
        if cosine is not None and _takes(q) and cosine.shape[-1] == q.shape[-1] and cosine.shape[:2] == q.shape[:2]:
            q, k, frame = _Rotate.apply(q, cosine, sine), _Rotate.apply(k, cosine, sine), replace(frame, rotary=None)
        return super().attend(q, k, v, frame)


class _Norm(Norm):
    def forward(self, x: Tensor) -> Tensor:
        if not self.rms or x.dim() != 2 or not _takes(x):  # peft's layers give (batch, tokens, width)
            return super().forward(x)
        return _RMSNorm.apply(x.contiguous(), self.weight.to(x.dtype), self.eps)


class _MLP(MLP):
    def forward(self, x: Tensor) -> Tensor:
        if self.gate_proj is None or self.act is not ACTIVATIONS["silu"] or not _takes(x):
            return super().forward(x)
        return self.down_proj(_GatedSiLU.apply(self.gate_proj(x), self.up_proj(x)))


def _takes(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in DTYPES and not torch.compiler.is_compiling()


@torch.library.custom_op("burnish::attention", mutates_args=())
def scaled_dot_product_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cosine: Tensor | None,
    sine: Tensor | None,
    mask: Tensor | None,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(D)) v of bfloat16 heads, and the log-sum-exp (B, heads, T) of each row of scores.

    q (B, T, heads, D), k and v (B, S, kv_heads, D) at any strides, D a multiple of 32. cosine and sine
    (B, T, 1, D) rotate q and k first, as `positions.rotate` does, or are None. mask (B, 1, T, S), bool, True where the
    query sees the key; `causal` adds that key j <= query i. Every query sees a key. Gives (B, T, heads, D).
    """
    out, log_sum = _empty_results(q, k, v, cosine, sine, mask, causal)
    (q, k, v), tables = _dense(q, k, v), _tables(q, k, cosine, sine, mask)
    _check(_ready().attention_forward(_shape(q, k, causal, *tables), _rows(q, k, v, out), log_sum.data_ptr()))
    return out, log_sum


@scaled_dot_product_attention.register_fake
def _empty_results(
    q: Tensor, k: Tensor, v: Tensor, cosine: Any, sine: Any, mask: Any, causal: bool
) -> tuple[Tensor, Tensor]:
    batch, length, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, length), dtype=torch.float32)


@torch.library.custom_op("burnish::attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sum: Tensor,
    cosine: Tensor | None,
    sine: Tensor | None,
    mask: Tensor | None,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = _empty_gradients(grad, q, k, v, out, log_sum, cosine, sine, mask, causal)
    (q, k, v, grad), tables = _dense(q, k, v, grad), _tables(q, k, cosine, sine, mask)
    tensors = _rows(q, k, v, out, grad, *gradients)
    _check(_ready().attention_backward(_shape(q, k, causal, *tables), tensors, log_sum.data_ptr()))
    return gradients


@_attention_backward.register_fake
def _empty_gradients(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.causal = inputs
    ctx.save_for_backward(*tensors[:3], *output, *tensors[3:])
    ctx.mark_non_differentiable(output[1])


def _differentiate_attention(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *_attention_backward(grad, *ctx.saved_tensors, ctx.causal), None, None, None, None


scaled_dot_product_attention.register_autograd(_differentiate_attention, setup_context=_save_attention)


def _dense(*tensors: Tensor) -> list[Tensor]:
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def _rows(*tensors: Tensor) -> Any:
    return (_Rows * len(tensors))(*(_Rows(x.data_ptr(), *x.stride()[:3]) for x in tensors))


def _tables(
    q: Tensor, k: Tensor, cosine: Tensor | None, sine: Tensor | None, mask: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The angles (B, T, 1, D) and the mask (B, 1, T, S), each dense."""
    if mask is not None:
        mask = mask.expand(len(q), 1, q.shape[1], k.shape[1]).contiguous()
    return mask, *(None if x is None else x.expand(*q.shape[:2], 1, q.shape[3]).contiguous() for x in (cosine, sine))


def _shape(q: Tensor, k: Tensor, causal: bool, *tables: Tensor | None) -> _Shape:
    batch, length, heads, size = q.shape
    sizes = (batch, heads, k.shape[2], length, k.shape[1], size)
    pointers = (None if table is None else table.data_ptr() for table in tables)
    return _Shape(*sizes, causal, torch.get_num_threads(), 1 / math.sqrt(size), *pointers)


def _check(failed: int) -> None:
    if failed:
        raise MemoryError("no memory for attention's scratch")


def _mode(x: Tensor) -> tuple[bool, int]:
    """The last arguments of a pointwise kernel: whether numbers are float32, and the threads."""
    return x.dtype == torch.float32, torch.get_num_threads()


class _RMSNorm(torch.autograd.Function):
    """x (rows, size), weight (size,)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, inverse = torch.empty_like(x), x.new_empty(len(x), dtype=torch.float32)
        tensors = (x.data_ptr(), weight.data_ptr(), eps, *x.shape, y.data_ptr(), inverse.data_ptr())
        _ready().rms_norm_forward(*tensors, *_mode(x))
        ctx.save_for_backward(x, weight, inverse)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, inverse = ctx.saved_tensors
        grad, dx, dw = grad.contiguous(), torch.empty_like(x), None
        inputs = (grad.data_ptr(), x.data_ptr(), weight.data_ptr(), inverse.data_ptr(), *x.shape)
        _ready().rms_norm_backward(*inputs, dx.data_ptr(), *_mode(x))
        if ctx.needs_input_grad[1]:
            dw = torch.empty_like(weight)
            inputs = (grad.data_ptr(), x.data_ptr(), inverse.data_ptr(), *x.shape)
            _ready().rms_norm_weight(*inputs, dw.data_ptr(), *_mode(x))
        return dx, dw, None


class _GatedSiLU(torch.autograd.Function):
    """silu(gate) * up, of one shape."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        out = torch.empty_like(gate)
        inputs = (gate.data_ptr(), up.data_ptr(), gate.numel())
        _ready().gated_silu_forward(*inputs, out.data_ptr(), *_mode(gate))
        ctx.save_for_backward(gate, up)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad, dgate, dup = grad.contiguous(), torch.empty_like(gate), torch.empty_like(up)
        inputs = (grad.data_ptr(), gate.data_ptr(), up.data_ptr(), gate.numel())
        _ready().gated_silu_backward(*inputs, dgate.data_ptr(), dup.data_ptr(), *_mode(gate))
        return dgate, dup


class _Rotate(torch.autograd.Function):
    """x (B, T, heads, D) turned by cosine and sine (B, T, 1, D), as `positions.rotate` does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.cosine, ctx.sine = cosine.contiguous(), sine.contiguous()
        return _rotated(x, ctx.cosine, ctx.sine, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _rotated(grad, ctx.cosine, ctx.sine, True), None, None


def _rotated(x: Tensor, cosine: Tensor, sine: Tensor, backwards: bool) -> Tensor:
    x, (batch, length, heads, size) = x.contiguous(), x.shape
    out = torch.empty_like(x)
    inputs = (x.data_ptr(), cosine.data_ptr(), sine.data_ptr(), batch * length, heads, size)
    _ready().rotate(*inputs, backwards, out.data_ptr(), *_mode(x))
    return out


def cross_entropy_(logits: Tensor, labels: Tensor, gradient: bool) -> Tensor:
    """Losses (rows,) in float32 of logits (rows, classes) in one of `DTYPES`, which become their gradient if asked."""
    losses = logits.new_empty(len(logits), dtype=torch.float32)
    labels = labels.contiguous()
    inputs = (logits.data_ptr(), labels.data_ptr(), *logits.shape)
    _ready().cross_entropy(*inputs, losses.data_ptr(), gradient, *_mode(logits))
    return losses
