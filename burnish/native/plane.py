"""GPTQ's inner loop on a CPU, by a C file built on first use; plain torch elsewhere, some ten times slower."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from burnish.native import build


@cache
def library(extra: tuple[str, ...] = ()) -> ctypes.CDLL | None:
    """The compiled library, built with `extra` flags; None where it cannot be had."""
    folder = Path(__file__).parent
    found = build.load([folder / "plane.c"], extra)
    if found is not None:
        pointer, count = ctypes.c_void_p, ctypes.c_int64
        sizes: list[Any] = [count, count, ctypes.c_float]
        found.nearest_plane.argtypes = [*[pointer] * 3, count, *[pointer] * 3, *sizes, pointer, ctypes.c_int]
        found.nearest_plane.restype = None
    return found


def nearest_plane(
    w: Tensor, pull: Tensor, factor: Tensor, scales: Tensor, zeros: Tensor, group_of: Tensor, top: int
) -> Tensor:
    """Codes (columns, rows) uint8 of w (columns, rows) float32, which becomes the errors w - (code - zero) * scale.

    Columns are rounded from the last to the first: of column i, w_i + (pull_i + sum over j > i of factor_ji e_j) /
    factor_ii. factor (columns, columns) is lower triangular with rows of stride 1, `pull` (columns, rows) is
    overwritten, scales and zeros (groups, rows), group_of (columns,) int64.
    """
    codes = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
    found = library() if w.device.type == "cpu" else None
    if found is not None:
        given = (w, pull, factor, scales, zeros, group_of)
        assert all(x.is_contiguous() for x in (w, pull, scales, zeros, group_of)) and factor.stride(1) == 1
        w_, pull_, factor_, *rest = (x.data_ptr() for x in given)
        sizes = (*w.shape, top, codes.data_ptr(), torch.get_num_threads())
        found.nearest_plane(w_, pull_, factor_, factor.stride(0), *rest, *sizes)
        return codes
    for i in range(len(w) - 1, -1, -1):
        scale, zero = scales[group_of[i]], zeros[group_of[i]]
        target = w[i] + pull[i] / factor[i, i]
        code = ((target / scale).round() + zero).clamp(0, top)
        codes[i] = code.to(torch.uint8)
        w[i] -= (code - zero) * scale
        pull[:i].addr_(factor[i, :i], w[i])
    return codes
