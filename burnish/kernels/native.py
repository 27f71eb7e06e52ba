"""Products with quantised weights on a CPU, by a C file that the system's compiler builds on first use.

The plain torch twin reads a quantised matrix, writes it expanded and reads that again; `quantised.c` expands it in
registers, so that one token costs the stored bytes. Building takes a second or two, once per machine: the library is
kept in $XDG_CACHE_HOME/burnish (~/.cache/burnish), named by its source, the compiler and the processor. Without a
compiler every function here returns None and its caller runs on plain torch.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import re
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from burnish.device import compiler, compiler_line

SOURCE = Path(__file__).with_name("quantised.c")
FLAGS = ("-x", "c", "-O3", "-march=native", "-ffp-contract=off", "-shared", "-fPIC")  # contraction changes roundings
BUILDS = (("-fopenmp",), ())  # the second where the compiler has no OpenMP
DTYPES = (torch.float32, torch.bfloat16)
NF4, INT8 = 0, 1
NF4_BLOCK = 64
MOST_TOKENS = 32  # above it, expanding the matrix once costs less than expanding it every eight tokens
SMALL = 1 << 16  # weights below which waking a second thread costs more than it saves

log = logging.getLogger(__name__)
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


def takes(x: Tensor, bias: Tensor | None) -> bool:
    """Whether `nf4_matmul` and `int8_matmul` are the way for x (tokens, in): few tokens, and no gradient wanted."""
    if not 0 < len(x) <= MOST_TOKENS or not usable(x.device, x.dtype):
        return False
    return not (torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)))


def nf4_matmul(
    x: Tensor, bias: Tensor | None, rows: int, packed: Tensor, constants: Sequence[Tensor], levels: Tensor
) -> Tensor:
    """x (tokens, in) -> (tokens, rows) in x's dtype; `in` a multiple of 64.

    packed (rows * in / 2,) uint8; constants (absmax float32,) per block of 64, or (codes uint8 per block, absmax2
    float32 per 256 blocks, offset float32, map (256,) float32); levels (16,) float32.
    """
    return _matmul(NF4, packed, _constants(constants), levels, rows, x, bias)


def int8_matmul(x: Tensor, bias: Tensor | None, values: Tensor, scale: Tensor) -> Tensor:
    """x (tokens, in) -> (tokens, out) in x's dtype; values (out, in) int8, scale (out,) float32."""
    return _matmul(INT8, values, (None, scale.data_ptr(), None, None), None, values.shape[0], x, bias)


def nf4_dequantize(
    shape: tuple[int, int], dtype: torch.dtype, packed: Tensor, constants: Sequence[Tensor], levels: Tensor
) -> Tensor:
    """The matrix of `shape` in float32 or bfloat16, from tensors as for `nf4_matmul`."""
    out = torch.empty(shape, dtype=dtype)
    where = (packed.data_ptr(), *_constants(constants), levels.data_ptr())
    _ready().nf4_dequantize(*where, out.numel(), out.data_ptr(), dtype == torch.bfloat16, _threads(out.numel()))
    return out


def int8_dequantize(dtype: torch.dtype, values: Tensor, scale: Tensor) -> Tensor:
    """values (out, in) int8 times scale (out,) float32, in float32 or bfloat16."""
    out = torch.empty(values.shape, dtype=dtype)
    where = (values.data_ptr(), scale.data_ptr(), *values.shape)
    _ready().int8_dequantize(*where, out.data_ptr(), dtype == torch.bfloat16, _threads(out.numel()))
    return out


def _matmul(
    kind: int,
    stored: Tensor,
    constants: Sequence[int | None],
    levels: Tensor | None,
    rows: int,
    x: Tensor,
    bias: Tensor | None,
) -> Tensor:
    x = x.contiguous()
    tokens, columns = x.shape
    out = torch.empty((tokens, rows), dtype=x.dtype)
    if bias is not None:
        bias = bias.to(x.dtype).contiguous()
    failed = _ready().matmul(
        kind,
        stored.data_ptr(),
        *constants,
        None if levels is None else levels.data_ptr(),
        rows,
        columns,
        x.data_ptr(),
        x.dtype == torch.bfloat16,
        tokens,
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        _threads(rows * columns),
    )
    if failed:
        raise MemoryError(f"no memory for {tokens} x {columns} activations")
    return out


def _constants(constants: Sequence[Tensor]) -> tuple[int | None, ...]:
    """Pointers to codes, constants, offset and map."""
    if len(constants) == 1:
        return None, constants[0].data_ptr(), None, None
    return tuple(tensor.data_ptr() for tensor in constants)


def _threads(weights: int) -> int:
    return torch.get_num_threads() if weights > SMALL else 1


def _ready() -> ctypes.CDLL:
    found = library()
    assert found is not None, "ask usable() first"
    return found


def _load(extra: Sequence[str] = ()) -> ctypes.CDLL | None:
    """The library of the source built with `extra` flags; None, logged, where it cannot be had."""
    tool = compiler()
    if tool is None:
        log.warning(compiler_line())
        return None
    try:
        return _typed(ctypes.CDLL(str(_built(tool, extra, _cache()))))
    except OSError:  # a cache that cannot be written to, or not executed from
        pass
    except subprocess.SubprocessError as error:
        log.warning("%s failed on %s; quantised inference runs on plain torch, slower: %s", tool, SOURCE.name, error)
        return None
    try:
        with tempfile.TemporaryDirectory() as folder:
            return _typed(ctypes.CDLL(str(_built(tool, extra, Path(folder)))))
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("no native kernels; quantised inference runs on plain torch, slower: %s", error)
        return None


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "burnish"


def _built(tool: str, extra: Sequence[str], folder: Path) -> Path:
    """The library in `folder`, compiled unless it is there. Safe beside other processes that do the same."""
    stat = os.stat(tool)
    key = [SOURCE.read_text(), tool, str(stat.st_size), str(stat.st_mtime_ns), *FLAGS, *extra, _processor()]
    path = folder / f"native-{hashlib.sha256('|'.join(key).encode()).hexdigest()[:16]}.so"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as room:
        made = Path(room) / path.name
        for index, parallel in enumerate(BUILDS):
            command = [tool, *FLAGS, *extra, *parallel, "-o", str(made), str(SOURCE)]
            try:
                subprocess.run(command, check=True, capture_output=True, timeout=120)
                break
            except subprocess.SubprocessError:
                if index == len(BUILDS) - 1:
                    raise
        os.replace(made, path)
    return path


def _processor() -> str:
    """What -march=native depends on: the processor's name and instruction sets, where /proc tells them."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = platform.processor()
    lines = re.findall(r"^(?:model name|flags|Features|CPU part)\s*:.*$", text, re.MULTILINE)
    return platform.machine() + "".join(sorted(set(lines)) or text)


def _typed(found: ctypes.CDLL) -> ctypes.CDLL:
    pointer, count, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    weights = [pointer] * 6  # bytes, codes, constants, offset, map, levels
    found.matmul.argtypes = [flag, *weights, count, count, pointer, flag, count, pointer, pointer, flag]
    found.nf4_dequantize.argtypes = [*weights, count, pointer, flag, flag]
    found.int8_dequantize.argtypes = [pointer, pointer, count, count, pointer, flag, flag]
    found.matmul.restype = flag
    found.nf4_dequantize.restype = found.int8_dequantize.restype = None
    return found
