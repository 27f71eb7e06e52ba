"""Whose products are used for a number of tokens, burnish's or torch's: by measurement, once on each machine.

`products.by_constants` has an answer that was found on a few processors. For matrices of at least `LEAST` weights, the
first product of a kind of storage with activations of a dtype therefore times both ways on some of the matrix's rows,
and the constants' way is left where the other takes less than `MARGIN` of its time. Up to `products.FEW_DENSE_TOKENS`
tokens there is nothing to choose, as the weights' bytes are what takes time, nor in a step of decoding, which is
`decode.c`'s as a whole.

The times are kept beside the compiled library in a file named by it (that is, by its sources, the compiler and the
processor), torch's version, the number of threads, the storage and the dtype; removing it measures again. All processes
go by the file that was there first, and by the constants where none can be kept: no two runs differ by what each
measured for itself. BURNISH_MEASURE_KERNELS=0 leaves everything to the constants.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import threading
import time
from bisect import bisect_left
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from burnish.native import build, products

COUNTS = (16, 32, 64, 256)  # tokens that are timed; each stands for those above the one before, the last for all above
LEAST = 1 << 20  # weights of a matrix that is asked about
SAMPLE = 1 << 21  # weights that are timed
ROUNDS, SECONDS = 4, 0.4  # no round after the second begins when so many have passed
MARGIN = 0.8
SWITCH = "BURNISH_MEASURE_KERNELS"

Way = Callable[[Tensor], Tensor]
Times = tuple[tuple[float, float], ...]  # seconds of burnish's and of torch's product for each of COUNTS

measures = True  # False: files are read and none is made, for measuring takes some MiB
_lock = threading.Lock()
_known: dict[tuple[int, torch.dtype, int], Times | None] = {}


def ours(kind: int, x: Tensor, shape: tuple[int, int], ways: Callable[[], tuple[Way, Way]]) -> bool:
    """Whether `products.matmul` is the way for x (tokens, in) and a matrix of `shape`. `ways`, called where it is
    measured, gives burnish's and torch's product with a part of the matrix."""
    tokens = len(x)
    if not tokens or not products.usable(x.device, x.dtype):
        return False
    if shape[0] * shape[1] < LEAST or tokens <= products.FEW_DENSE_TOKENS or kind == products.FLOATS:
        return products.by_constants(kind, x.dtype, tokens)
    key = kind, x.dtype, torch.get_num_threads()
    if key not in _known:
        with _lock:
            if key not in _known:
                _known[key] = _found(key, shape[1], ways)
    return chosen(kind, x.dtype, tokens, _known[key])


def chosen(kind: int, dtype: torch.dtype, tokens: int, times: Times | None) -> bool:
    """Whether burnish's product is taken; by constants without times."""
    mine = products.by_constants(kind, dtype, tokens)
    if times is None:
        return mine
    burnish, other = times[min(bisect_left(COUNTS, tokens), len(COUNTS) - 1)]
    return other >= MARGIN * burnish if mine else burnish < MARGIN * other


def used() -> list[dict[str, Any]]:
    """What this process goes by, JSON-able: for each storage and dtype of activations the numbers of tokens that were
    timed, milliseconds of both products, and whose is taken."""
    return [
        {
            "storage": products.NAMES[kind], "activations": _name(dtype), "threads": threads, "tokens": list(COUNTS),
            "burnish_ms": [1000 * pair[0] for pair in times], "torch_ms": [1000 * pair[1] for pair in times],
            "taken": ["burnish" if chosen(kind, dtype, count, times) else "torch" for count in COUNTS],
        }
        for (kind, dtype, threads), times in _known.items() if times is not None
    ]  # fmt: skip


def _found(key: tuple[int, torch.dtype, int], columns: int, ways: Callable[[], tuple[Way, Way]]) -> Times | None:
    """What is kept, or measured and kept; None where the constants stay."""
    if os.environ.get(SWITCH) == "0":
        return None
    kind, dtype, threads = key
    library = Path(products.ready()._name).stem
    path = build.cache() / f"{library}-torch{torch.__version__}-{threads}-{products.NAMES[kind]}-{_name(dtype)}.json"
    found = _read(path)
    if found is None and measures:
        with torch.no_grad():
            found = _keep(path, _measure(columns, dtype, ways()))
    return found


def _measure(columns: int, dtype: torch.dtype, ways: tuple[Way, Way]) -> Times:
    """The least seconds of each way for each count, by turns, so that a slow moment falls on both."""
    draw = torch.Generator().manual_seed(0)
    inputs = [torch.randn(count, columns, generator=draw).to(dtype) for count in COUNTS]
    least = [[math.inf, math.inf] for _ in COUNTS]
    began = time.perf_counter()
    for number in range(ROUNDS):
        if number > 1 and time.perf_counter() - began > SECONDS:
            break
        for x, found in zip(inputs, least, strict=True):
            for at, way in enumerate(ways):
                start = time.perf_counter()
                way(x)
                found[at] = min(found[at], time.perf_counter() - start)
    return tuple((burnish, other) for burnish, other in least)


def _read(path: Path) -> Times | None:
    """The times in a file; None where there is none, or it is damaged."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        times = tuple(zip(stored["burnish"], stored["torch"], strict=True))
        right = stored["tokens"] == list(COUNTS) and len(times) == len(COUNTS)
        return times if right and all(0 < seconds < math.inf for pair in times for seconds in pair) else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _keep(path: Path, times: Times) -> Times | None:
    """Write the file, unless another process has; what it then says, None where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as room:
            made = Path(room) / path.name
            burnish, other = zip(*times, strict=True)
            made.write_text(json.dumps({"tokens": COUNTS, "burnish": burnish, "torch": other}), encoding="utf-8")
            try:
                os.link(made, path)  # fails where there is one
            except OSError:
                if _read(path) is None:
                    os.replace(made, path)
    except OSError:
        return None
    return _read(path)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
