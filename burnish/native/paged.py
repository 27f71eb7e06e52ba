"""Attention of one query a row straight over a pool's slots, on a CPU, by a C file built on first use.

The plain torch twin gathers every row's keys and values before it multiplies, in bfloat16 and int8 with conversions;
`paged.c` reads them once, where they lie. Where there is no compiler `takes` says no.
"""

from __future__ import annotations

import ctypes
import struct
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from burnish.native import build

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
LANES, MOST_SIZE = 16, 256
SMALL = 1 << 14  # keys' elements below which waking a second thread costs more than it saves
REQUEST = struct.Struct("=17qdq")  # of the C function `paged_attention`


@cache
def library(extra: tuple[str, ...] = ()) -> ctypes.CDLL | None:
    """The compiled library, built with `extra` flags; None where it cannot be had."""
    folder = Path(__file__).parent
    found = build.load([folder / "paged.c"], extra)
    if found is not None:
        found.paged_attention.argtypes = [ctypes.c_char_p]
    return found


def takes(q: Tensor) -> bool:
    """Whether `attention` is the way for queries (rows, heads, head_dim); builds the library on the first call."""
    fits = q.device.type == "cpu" and q.dtype in (torch.float32, torch.bfloat16) and not q.shape[-1] % LANES
    return fits and q.shape[-1] <= MOST_SIZE and not q.requires_grad and library() is not None


def attention(
    q: Tensor,
    stored: tuple[Tensor, Tensor],
    scales: tuple[Tensor, Tensor] | None,
    slots: Tensor,
    mask: Tensor | None,
    scale: float,
) -> Tensor:
    """softmax(scale q k^T + mask) v, (rows, heads, head_dim) as q.

    stored: keys and values (kv_heads, slots, head_dim), contiguous, float32, bfloat16, or int8 with float32 scales
    (kv_heads, slots, 1) each. slots (rows, S) int64: each row's, all of them initialised. mask: (rows, 1, 1, S) bool,
    True where it is seen, or (rows, heads, 1, S) in q's dtype, added; every row sees a slot. None: all seen.
    """
    (rows, heads, size), length = q.shape, slots.shape[1]
    q, slots = q.contiguous(), slots.contiguous()
    out = torch.empty_like(q)
    seen = bias = None
    if mask is not None and mask.dtype == torch.bool:
        seen = mask.expand(rows, 1, 1, length).contiguous()
    elif mask is not None:
        bias = mask.expand(rows, heads, 1, length).contiguous()
    threads = torch.get_num_threads() if rows * length * heads * size > SMALL else 1
    sizes = (rows, heads, *stored[0].shape, length, KINDS[q.dtype], KINDS[stored[0].dtype])
    given = (q, *stored, *(scales or (None, None)), slots, seen, bias, out)
    found = library()
    assert found is not None, "ask takes() first"
    if found.paged_attention(REQUEST.pack(*sizes, *(0 if x is None else x.data_ptr() for x in given), scale, threads)):
        raise MemoryError(f"no memory for the scores of {length} tokens")
    return out
