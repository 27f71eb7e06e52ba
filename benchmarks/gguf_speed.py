"""GGUF blocks of one matrix by burnish and by the gguf package's numpy reference: times, and whether they agree.

    python benchmarks/gguf_speed.py        # where `pip install gguf` has been done

Types that the reference quantises (q8_0, q4_0) are timed beside each other in turns and compared byte by byte. Of the
others it only expands blocks: what it makes of burnish's is compared with burnish's own expansion, and with the matrix
(relative error, |w' - w| / |w|). Medians of wall seconds, and of the process's processor seconds, which other work on
the machine disturbs less. numpy works on one thread. Writes results/gguf_speed.json.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from burnish import device
from burnish.compress.gguf import GGUF

TYPES = ("q8_0", "q4_0", "q4_k", "q5_k", "q6_k")


def timed(function: Callable[[], Any]) -> tuple[float, float, Any]:
    """Wall seconds, processor seconds, result."""
    wall, own = time.perf_counter(), time.process_time()
    result = function()
    return time.perf_counter() - wall, time.process_time() - own, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "gguf_speed.json")
    options = parser.parse_args()
    try:
        from gguf import GGMLQuantizationType, quants
    except ImportError:
        raise SystemExit("gguf_speed: the reference is missing; pip install gguf") from None
    dense = torch.randn(options.rows, options.columns, generator=torch.Generator().manual_seed(0)) * 0.03
    plain = dense.numpy()
    found: list[dict[str, Any]] = []
    for name in TYPES:
        kind = GGMLQuantizationType[name.upper()]
        GGUF.quantize(dense[:8], name)  # builds the library
        runs: dict[str, list[tuple[float, float]]] = {}
        for _ in range(options.repeats):
            for threads in (1, 2):
                torch.set_num_threads(threads)
                *took, ours = timed(lambda name=name: GGUF.quantize(dense, name))
                runs.setdefault(f"burnish, {threads}", []).append((took[0], took[1]))
            torch.set_num_threads(1)
            try:
                *took, theirs = timed(lambda kind=kind: quants.quantize(plain, kind))
                runs.setdefault("reference", []).append((took[0], took[1]))
            except NotImplementedError:
                theirs = None
        expanded = torch.from_numpy(quants.dequantize(ours.blocks.numpy(), kind))
        row: dict[str, Any] = {
            "type": name,
            "seconds": {who: round(median(wall for wall, _ in own), 4) for who, own in runs.items()},
            "processor_seconds": {who: round(median(cpu for _, cpu in own), 4) for who, own in runs.items()},
            "equal_blocks": None if theirs is None else bool((ours.blocks.numpy() == theirs).all()),
            "equal_values": torch.equal(expanded, ours.dequantize()),
            "relative_error": round(float((expanded - dense).norm() / dense.norm()), 5),
        }
        if theirs is not None:
            row["times_faster"] = {
                "seconds, 1": round(row["seconds"]["reference"] / row["seconds"]["burnish, 1"], 1),
                "seconds, 2": round(row["seconds"]["reference"] / row["seconds"]["burnish, 2"], 1),
                "processor_seconds, 1": round(
                    row["processor_seconds"]["reference"] / row["processor_seconds"]["burnish, 1"], 1
                ),
            }
        found.append(row)
        print(row, flush=True)
    record = {"environment": device.environment(), "rows": options.rows, "columns": options.columns}
    record |= {"repeats": options.repeats, "types": found}
    options.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
