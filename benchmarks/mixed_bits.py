"""Bits by a budget on pebble: the same bits everywhere against bits chosen by a scan at the same bytes.

    python benchmarks/mixed_bits.py

Every row is measured as in benchmarks/gptq.py, on held-out text of the made-up world: perplexity, KL(16 bits || row).
The bytes are those of the projections in memory. Beside the scan (one forward and one backward pass) stands what it
estimates: the divergence of every projection rounded alone to every number of bits, a forward pass each, and the choice
by that. Writes results/mixed_bits.json.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from gptq import LENGTH, Judge, held_out, log_probabilities

import burnish
from burnish import chain, device
from burnish.chain import Context, Model
from burnish.compress import calibration, mixed_bits
from burnish.compress.grouped import BITS, Form, Grouped
from burnish.model.surgery import linears

Table = dict[str, dict[int, float]]


@torch.no_grad()
def measured(model: Model, forms: dict[int, Form], rows: torch.Tensor) -> Table:
    """The divergence of every projection rounded alone."""
    known, found = log_probabilities(model, rows), Table()
    for path, linear in linears(model.net):
        kept, found[path] = linear.weight, {}
        for bits, form in forms.items():
            linear.weight = form.round(kept.dequantize())
            found[path][bits] = float((known.exp() * (known - log_probabilities(model, rows))).sum(-1).mean())
        linear.weight = kept
    return found


def ranks(values: list[float]) -> torch.Tensor:
    return torch.tensor(values).argsort().argsort().float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--held-out", type=int, default=64, help="rows to measure on")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "mixed_bits.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = burnish.load("pebble")
    judge, forms = Judge(held_out(model, options.held_out)), {bits: Form(bits) for bits in BITS}
    targets = list(linears(model.net))
    start = time.perf_counter()
    scanned = mixed_bits.damages(model, targets, forms, Context())
    seconds = {"scan": round(time.perf_counter() - start, 1)}
    data = [batch["input_ids"] for batch in calibration.batches(model, Context(), 16, 128, "")]
    start = time.perf_counter()
    alone = measured(model, forms, torch.cat(data))
    seconds["measured"] = round(time.perf_counter() - start, 1)
    agreement = {}
    for bits in BITS:
        told, true = ([table[path][bits] for path in table] for table in (scanned, alone))
        rank = float(torch.corrcoef(torch.stack([ranks(told), ranks(true)]))[0, 1])
        agreement[bits] = {"spearman": round(rank, 3), "sum_ratio": round(sum(told) / sum(true), 3)}
    print(seconds, agreement, flush=True)
    cost = {
        path: {bits: Grouped.empty(form, x.out_features, x.in_features).nbytes for bits, form in forms.items()}
        for path, x in targets
    }
    calibrated = calibration.batches(model, Context(), 64, LENGTH, "")
    rows: list[dict[str, Any]] = [{"row": "bf16", **judge(model)}]

    def measure(name: str, method: str, bits: dict[str, int]) -> None:
        found = burnish.load("pebble", techniques=[method])
        chain.apply(found, [{method: {"bits_pattern": bits}}], Context(calibrated))
        size = sum(cost[path][b] for path, b in bits.items())
        counts = {str(b): count for b, count in sorted(Counter(bits.values()).items())}
        rows.append({"row": name, "method": method, "bytes": size, "projections": counts, **judge(found)})
        print(rows[-1], flush=True)

    def at(budget: int, name: str, method: str) -> None:
        measure(f"{name}, scanned", method, mixed_bits.choose(scanned, cost, budget))
        if method == "int_groups":
            measure(f"{name}, measured", method, mixed_bits.choose(alone, cost, budget))

    for method in ("int_groups", "gptq"):
        totals = {bits: sum(own[bits] for own in cost.values()) for bits in (2, 3, 4)}
        for bits, total in totals.items():
            measure(f"{bits} bits everywhere", method, dict.fromkeys(cost, bits))
            if bits > min(BITS):
                at(total, f"mixed at the bytes of {bits}", method)
        at((totals[2] + totals[3]) // 2, "mixed at the bytes of 2.5", method)
    record = {"environment": device.environment(), "threads": options.threads, "held_out_rows": options.held_out}
    record |= {"tokens_a_row": LENGTH, "seconds": seconds, "scan_against_measured": agreement, "rows": rows}
    options.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
