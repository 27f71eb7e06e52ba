"""Products of a few tokens with a quantised matrix on a CPU: burnish beside torch and bitsandbytes, in bfloat16.

    python benchmarks/quantised_matmul.py --threads 1 --cpu 0 --rounds 15

For each shape and number of tokens: `F.linear` on the dense bfloat16 matrix; burnish's NF4 (double quantisation),
int8 and FP8; bitsandbytes' `Linear4bit` (NF4, double quantisation, `bnb_4bit_compute_dtype` bfloat16, in eval mode,
where it repacks the weights for AVX512-BF16 and keeps their constants in bfloat16; with the kernel of its wheel, not
the one that the package `kernels` would download); and torch's own int8 product, `torch._weight_int8pack_mm`. Each
contender has enough copies of its matrix to come from memory, not from the cache;
they take turns, in reversed order every second round, and the medians of single calls count. Prints times, ratios to
bfloat16 and the share of the read bandwidth that the stored bytes reach; writes results/quantised_matmul.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from burnish import device
from burnish.compress.fp8 import FP8
from burnish.compress.int8 import Int8
from burnish.compress.nf4 import NF4
from burnish.native import products

SHAPES = ((768, 768), (2048, 768), (2048, 2048), (5632, 2048))
TOKENS = (1, 4, 16, 128)
COLD = 64 << 20  # bytes of a matrix's copies together, twice a large last-level cache
CALLS = 12  # of a contender at its turn

Contenders = dict[str, tuple[int, list[Callable[[Tensor], Tensor]]]]


def bandwidth(rounds: int = 64) -> float:
    """Bytes per second of the fastest reading of 16 MiB of a GiB, with the threads that torch uses."""
    parts = torch.ones(64, 4 << 20)
    seconds = []
    for index in range(rounds):
        start = time.perf_counter()
        parts[index % len(parts)].amax()
        seconds.append(time.perf_counter() - start)
    return parts[0].nbytes / min(seconds)


def copies(one, size: int) -> list:
    return [one] + [copy.deepcopy(one) for _ in range(-(-COLD // size) - 1)]


def bitsandbytes_linear(dense: Tensor, x: Tensor):
    """A `Linear4bit` of the matrix, repacked by a first call; None without bitsandbytes."""
    try:
        import bitsandbytes as bnb
    except ImportError:
        return None
    rows, columns = dense.shape
    linear = bnb.nn.Linear4bit(columns, rows, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    linear.load_state_dict({"weight": dense})
    linear = linear.to("cpu").eval()
    linear(x)
    return linear


def contenders(dense: Tensor, x: Tensor) -> Contenders:
    """Stored bytes and a call per copy, by name."""
    plain = dense.bfloat16()
    nf4, int8, fp8 = NF4.quantize(dense), Int8.quantize(dense), FP8.quantize(dense)
    found: Contenders = {
        "bf16": (plain.nbytes, [lambda x, w=w: F.linear(x, w) for w in copies(plain, plain.nbytes)]),
        "nf4": (nf4.nbytes, [w.matmul for w in copies(nf4, nf4.nbytes)]),
        "int8": (int8.nbytes, [w.matmul for w in copies(int8, int8.nbytes)]),
        "fp8": (fp8.nbytes, [w.matmul for w in copies(fp8, fp8.nbytes)]),
    }
    scale = int8.scale.bfloat16()
    found["torch int8"] = (
        int8.nbytes,
        [lambda x, w=w: torch._weight_int8pack_mm(x, w, scale) for w in copies(int8.values.detach(), int8.nbytes)],
    )
    linear = bitsandbytes_linear(dense, x)
    if linear is not None:
        size = linear.weight.nbytes + linear.weight.quant_state.absmax.nbytes
        found["bitsandbytes nf4"] = (size, copies(linear, size))
    return found


def check(found: Contenders, x: Tensor) -> None:
    """All contenders compute the same, to the rounding of their weights."""
    for name, against in (("nf4", "bitsandbytes nf4"), ("int8", "torch int8")):
        if against in found:
            ours, theirs = found[name][1][0](x).float(), found[against][1][0](x).float()
            assert (ours - theirs).norm() < 0.02 * theirs.norm(), f"{name} differs from {against}"


def measure(found: Contenders, x: Tensor, rounds: int) -> dict[str, float]:
    """Median seconds of a call, by contender."""
    seconds: dict[str, list[float]] = {name: [] for name in found}
    turn = dict.fromkeys(found, 0)
    for index in range(rounds + 1):
        for name in list(found)[:: 1 if index % 2 else -1]:
            calls = found[name][1]
            for _ in range(CALLS):
                call = calls[turn[name] % len(calls)]
                turn[name] += 1
                start = time.perf_counter()
                call(x)
                if index:  # the first round warms up
                    seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cpu", type=int, help="the first core to run on, of as many as there are threads")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "quantised_matmul.json")
    options = parser.parse_args()
    if options.cpu is not None:
        os.sched_setaffinity(0, range(options.cpu, options.cpu + options.threads))
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    read = bandwidth()
    print(f"{options.threads} threads, read bandwidth {read / 1e9:.1f} GB/s, kernels: {bool(products.library())}")
    rows = []
    for shape in SHAPES:
        dense = torch.randn(shape) * 0.05
        found = contenders(dense, torch.randn(1, shape[1]).bfloat16())
        for tokens in map(int, options.tokens.split(",")):
            x = torch.randn(tokens, shape[1]).bfloat16()
            check(found, x)
            seconds = measure(found, x, options.rounds)
            row: dict[str, Any] = {
                "shape": shape,
                "tokens": tokens,
                "microseconds": {name: round(time * 1e6, 1) for name, time in seconds.items()},
                "to_bf16": {name: round(time / seconds["bf16"], 3) for name, time in seconds.items()},
                "of_bandwidth": {name: round(found[name][0] / time / read, 3) for name, time in seconds.items()},
                "nf4_to_bitsandbytes": None,
                "int8_to_torch": round(seconds["int8"] / seconds["torch int8"], 3),
            }
            if "bitsandbytes nf4" in seconds:
                row["nf4_to_bitsandbytes"] = round(seconds["nf4"] / seconds["bitsandbytes nf4"], 3)
            rows.append(row)
            cells = [
                f"{name} {time * 1e6:.0f} us ({row['to_bf16'][name]:.2f}, {row['of_bandwidth'][name]:.0%})"
                for name, time in seconds.items()
            ]
            print(f"{shape[0]}x{shape[1]} x {tokens}: {'  '.join(cells)}", flush=True)
    record = {
        "environment": device.environment(),
        "threads": options.threads,
        "rounds": options.rounds,
        "calls_per_round": CALLS,
        "read_bytes_per_second": round(read),
        "rows": rows,
    }
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
