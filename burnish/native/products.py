"""Products with quantised or bfloat16 weights on a CPU, by C files built on first use.

The plain torch twin reads a quantised matrix, writes it expanded and reads that again; `products.c` expands it in
registers, so that a few tokens cost the stored bytes only, and `gemm.c` for many tokens in the processor's cache. So
they do with bfloat16, which torch multiplies slowly on processors without instructions for it; on others many tokens
are torch's, or what `choice.py` measures. Where there is no compiler, `usable` and `fits` say no, and their callers run
on plain torch.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from burnish.device import multiplies_bfloat16
from burnish.native import build

DTYPES = (torch.float32, torch.bfloat16)
NF4, INT8, DENSE, FLOATS, GROUPED = 0, 1, 2, 3, 4
GROUPED_2, GROUPED_3, GROUPED_8 = range(5, 8)
FP8 = 8
Q8_0, Q4_0, Q5_0, Q5_1, Q4_K, Q5_K, Q6_K = range(9, 16)  # GGUF's formats
NAMES = (
    "nf4", "int8", "bfloat16", "float32", "groups_4", "groups_2", "groups_3", "groups_8", "fp8",
    "q8_0", "q4_0", "q5_0", "q5_1", "q4_k", "q5_k", "q6_k",
)  # fmt: skip
FEW_TOKENS = 32  # that `products.c` multiplies
MULTIPLIES_BFLOAT16 = multiplies_bfloat16()
FEW_DENSE_TOKENS = 4  # above it, a processor that multiplies bfloat16 is faster by torch
SMALL = 1 << 16  # weights below which waking a second thread costs more than it saves

REQUEST = struct.Struct("=15q")  # of the C function `matmul`: one packed argument costs a tenth of fifteen
Stored = tuple[Tensor | None, ...]
_lock = threading.Lock()
_loaded: list[ctypes.CDLL | None] = []


def library() -> ctypes.CDLL | None:
    """The compiled library, built if need be; None, logged once, where that fails."""
    if not _loaded:
        with _lock:
            if not _loaded:
                _loaded.append(_load())
    return _loaded[0]


def usable(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether matrices there are expanded to `dtype` here; builds the library on the first call."""
    return device.type == "cpu" and dtype in DTYPES and not torch.compiler.is_compiling() and library() is not None


def fits(x: Tensor, kind: int) -> bool:
    """Whether `matmul` is the way for x (tokens, in) and a kind of storage, as far as constants tell; for matrices that
    are large enough `choice.ours` has measured it."""
    return bool(len(x)) and usable(x.device, x.dtype) and by_constants(kind, x.dtype, len(x))


def by_constants(kind: int, dtype: torch.dtype, tokens: int) -> bool:
    """Whether `matmul` is the faster way on the processors that were at hand, where it is usable."""
    if dtype is torch.float32:
        return kind != FLOATS  # which torch multiplies
    return not MULTIPLIES_BFLOAT16 or tokens <= (FEW_DENSE_TOKENS if kind == DENSE else FEW_TOKENS)


def matmul(kind: int, x: Tensor, bias: Tensor | None, shape: Sequence[int], stored: Stored) -> Tensor:
    """x (tokens, in) -> (tokens, out) in x's dtype, for a matrix of `shape` (out, in) stored as `as_stored` says."""
    rows, columns = shape
    if x.dim() != 2 or x.shape[1] != columns:
        raise ValueError(f"x is {tuple(x.shape)}; the matrix takes (tokens, {columns})")
    x, tokens = x.contiguous(), x.shape[0]
    if bias is not None:
        bias = bias.to(x.dtype).contiguous()
    out = x.new_empty(tokens, rows)
    half, threads = x.dtype is torch.bfloat16, _threads(rows * columns)
    given = (rows, columns, x.data_ptr(), half, tokens, _pointer(bias), out.data_ptr(), threads)
    if ready().matmul(REQUEST.pack(kind, *map(_pointer, stored), *given)):
        raise MemoryError(f"no memory for {tokens} x {columns} activations")
    return out


def grouped_dequantize(kind: int, shape: tuple[int, int], first: int, stored: Stored, out: Tensor) -> None:
    """The rows from `first` of a matrix in groups into out (count, in), float32 or bfloat16."""
    half, threads = out.dtype == torch.bfloat16, _threads(out.numel())
    ready().grouped_dequantize(kind, *map(_pointer, stored), *shape, first, len(out), _pointer(out), half, threads)


def read_memory(memory: Tensor) -> None:
    """Read a tensor once and do nothing with it, as fast as torch's number of threads can; after `usable`."""
    ready().read_memory(memory.data_ptr(), memory.numel() * memory.element_size(), torch.get_num_threads())


def nf4_dequantize(
    shape: tuple[int, int],
    dtype: torch.dtype,
    packed: Tensor,
    constants: Sequence[Tensor],
    levels: Tensor,
    out: Tensor | None = None,
) -> Tensor:
    """The matrix of `shape` in float32 or bfloat16, from tensors as for `as_stored`; in `out` if given."""
    out = torch.empty(shape, dtype=dtype, device="cpu") if out is None else out
    stored = as_stored(packed, constants, levels)
    half, count = dtype == torch.bfloat16, out.numel()
    ready().nf4_dequantize(*map(_pointer, stored), count, _pointer(out), half, _threads(count))
    return out


def rows_dequantize(kind: int, dtype: torch.dtype, values: Tensor, scale: Tensor, out: Tensor | None = None) -> Tensor:
    """values (out, in), of INT8 or FP8, times scale (out,) float32, in float32 or bfloat16; in `out` if given."""
    out = torch.empty(values.shape, dtype=dtype, device="cpu") if out is None else out
    values, scale = values.contiguous(), _wide(scale)
    half, threads = dtype == torch.bfloat16, _threads(out.numel())
    ready().rows_dequantize(kind, _pointer(values), _pointer(scale), *values.shape, _pointer(out), half, threads)
    return out


def gguf_quantize(kind: int, dense: Tensor, blocks: Tensor) -> None:
    """Write dense (out, in) float32 into blocks (out, bytes of a row) uint8; both contiguous, rows of whole blocks."""
    count = dense.numel()
    ready().gguf_quantize(kind, _pointer(dense), count, _pointer(blocks), _threads(count))


def gguf_dequantize(kind: int, blocks: Tensor, out: Tensor) -> None:
    """Write blocks (rows, bytes of a row) into out (rows, in), float32 or bfloat16; both contiguous."""
    half, count = out.dtype == torch.bfloat16, out.numel()
    ready().gguf_dequantize(kind, _pointer(blocks), count, _pointer(out), half, _threads(count))


def as_stored(values: Tensor, constants: Sequence[Tensor], levels: Tensor | None) -> Stored:
    """As the C functions take them: values, codes, constants, offset, map, levels.

    NF4: values packed (out * in / 2,) uint8, `in` a multiple of 64; constants (absmax float32,) per block of 64, or
    (codes uint8 per block, absmax2 float32 per 256 blocks, offset float32, map (256,) float32); levels (16,) float32.
    In groups: packed (out, in * bits / 8) uint8; zero (out, groups) uint8 or None; scale (out, groups) float16; two
    that are None; and the sixteen levels and the group's size, a multiple of 32 or `in`, float32; `in` a multiple of
    64.
    int8: values (out, in) int8, constants (scale (out,) float32,). FP8: values (out, in) uint8, E4M3's bits, and
    constants as int8's. Dense: values (out, in) bfloat16 or float32, `in` a multiple of 64.
    """
    if len(constants) < 2:
        return values.contiguous(), None, _wide(constants[0]) if constants else None, None, None, levels
    codes, absmax2, offset, code_map = constants
    return values.contiguous(), codes, _wide(absmax2), _wide(offset), code_map, levels


def _wide(constants: Tensor) -> Tensor:
    """In float32, which a cast of the whole model may have changed."""
    return constants if constants.dtype is torch.float32 else constants.float()


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _threads(weights: int) -> int:
    return torch.get_num_threads() if weights > SMALL else 1


def ready() -> ctypes.CDLL:
    found = library()
    assert found is not None, "ask usable() first"
    return found


def _load(extra: Sequence[str] = ()) -> ctypes.CDLL | None:
    """The library built with `extra` flags; None where it cannot be had."""
    folder = Path(__file__).parent
    sources = [folder / f"{name}.c" for name in ("products", "gemm", "expand", "decode", "paged", "grouped", "gguf")]
    found = build.load(sources, extra)
    if found is not None:
        pointer, count, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        found.matmul.argtypes = [ctypes.c_char_p]
        found.decode.argtypes = [pointer, pointer, count, pointer]
        found.paged_attention.argtypes = [ctypes.c_char_p]
        found.read_memory.argtypes, found.read_memory.restype = [pointer, count, flag], count
        found.nf4_dequantize.argtypes = [*[pointer] * 6, count, pointer, flag, flag]
        found.rows_dequantize.argtypes = [flag, pointer, pointer, count, count, pointer, flag, flag]
        found.gguf_quantize.argtypes = [flag, pointer, count, pointer, flag]
        found.gguf_dequantize.argtypes = [flag, pointer, count, pointer, flag, flag]
        found.gguf_quantize.restype = found.gguf_dequantize.restype = None
        found.grouped_dequantize.argtypes = [flag, *[pointer] * 6, *[count] * 4, pointer, flag, flag]
        found.matmul.restype = found.decode.restype = found.paged_attention.restype = flag
        found.nf4_dequantize.restype = found.rows_dequantize.restype = found.grouped_dequantize.restype = None
    return found
