"""Attention of one query a row straight over a pool's slots, on a CPU, in C (`paged.c`).

The plain torch twin gathers every row's keys and values before it multiplies, in bfloat16 and int8 with conversions;
here they are read once, where they lie. Where there is no compiler `takes` says no.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from burnish.native import products

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
MOST_SIZE = 512  # of a head
SMALL = 1 << 14  # keys' elements below which waking a second thread costs more than it saves
REQUEST = struct.Struct("=16qdq")  # of the C function `paged_attention`


def takes(q: Tensor) -> bool:
    """Whether `attention` is the way for queries (rows, heads, head_dim); builds the library on the first call."""
    return q.shape[-1] <= MOST_SIZE and not q.requires_grad and products.usable(q.device, q.dtype)


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
    True where it is seen, or (rows, heads, 1, S) floating, added; every row sees a slot. None: all seen.
    """
    (rows, heads, size), length = q.shape, slots.shape[1]
    wide, slots = q.float().contiguous(), slots.contiguous()
    out = torch.empty_like(wide)
    seen = bias = None
    if mask is not None and mask.dtype == torch.bool:
        seen = mask.expand(rows, 1, 1, length).contiguous()
    elif mask is not None:
        bias = mask.float().expand(rows, heads, 1, length).contiguous()
    threads = torch.get_num_threads() if rows * length * heads * size > SMALL else 1
    kept = (x.data_ptr() if x is not None else 0 for x in (*stored, *(scales or (None, None))))
    given = (x.data_ptr() if x is not None else 0 for x in (wide, slots, seen, bias, out))
    sizes = (*stored[0].shape, KINDS[stored[0].dtype], *kept, rows, heads, length)
    if products.ready().paged_attention(REQUEST.pack(*sizes, *given, scale, threads)):
        raise MemoryError(f"no memory for the scores of {length} tokens")
    return out.to(q.dtype)
