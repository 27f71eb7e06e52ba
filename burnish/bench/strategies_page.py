"""The page of `burnish bench`: a bar for every strategy against the machine's limits, its figures, and what it said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from itertools import groupby
from typing import Any

import jinja2

from burnish.bench.report_plots import number, size
from burnish.native.products import FEW_DENSE_TOKENS

COLUMNS = (
    "strategy", "batch", "latency", "P50", "P95", "first token", "a token", "tokens/s", "memory", "load",
    "of bandwidth", "of matrix rate",
)  # fmt: skip


def cells(row: Mapping[str, Any]) -> list[str]:
    """A row's figures as they are read, in the order of `COLUMNS`."""
    if row["status"] != "ok":
        return [row["strategy"], str(row["batch_size"]), f"{row['status']}: {row['error']}"]
    time, ranks = row["latency_ms"], row["rank_memory_bytes"]
    return [
        row["strategy"], str(row["batch_size"]), f"{number(time['mean'])} ± {number(time['std'], 1)}",
        number(time["p50"]), number(time["p95"]), number(row["first_token_ms"]), number(row["per_token_ms"]),
        number(row["tokens_per_second"]),
        " + ".join(map(size, ranks)) if ranks else size(row["peak_memory_bytes"]),
        number(row["load_seconds"], 2), f"{row['of_bandwidth']:.0%}", f"{row['of_matrix_rate']:.0%}",
    ]  # fmt: skip


def kernel_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Whose products the rows used for how many tokens, in words, for each storage and dtype that was measured."""
    lines = []
    for one in (one for row in rows if row["status"] == "ok" for one in row["kernels"]):
        taken = [(FEW_DENSE_TOKENS, "burnish"), *zip(one["tokens"], one["taken"], strict=True)]
        runs = [(name, list(run)[-1][0]) for name, run in groupby(taken, key=lambda pair: pair[1])]
        words = [f"{name}'s to {last} tokens" for name, last in runs[:-1]]
        words.append(f"{runs[-1][0]}'s " + ("above" if words else "for any number of tokens"))
        threads = "1 thread" if one["threads"] == 1 else f"{one['threads']} threads"
        lines.append(f"{one['storage']} weights, {one['activations']}, {threads}: products are {', '.join(words)}")
    return list(dict.fromkeys(lines))


def page(found: Mapping[str, Any], model: str) -> str:
    """The HTML of what `bench` found; nothing is fetched, and it reads with scripts off."""
    template = files("burnish.bench").joinpath("strategies.html.j2").read_text("utf-8")
    layout = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(template)
    rows = [row for row in found["rows"] if row["status"] == "ok"]
    slowest = max((row["per_token_ms"] for row in rows), default=1.0)
    best = min(rows, key=lambda row: row["per_token_ms"] / row["batch_size"], default=None)
    bars = [
        {
            "name": f"{row['strategy']}, batch {row['batch_size']}",
            "share": 100 * row["per_token_ms"] / slowest,
            "limit": 100 * min(1.0, row["of_bandwidth"]) * row["per_token_ms"] / slowest,
            "words": f"{number(row['per_token_ms'])} ms",
        }
        for row in rows
    ]
    limits = found["limits"]
    return layout.render(
        model=model, columns=COLUMNS, rows=[cells(row) for row in found["rows"]], bars=bars,
        best=best and best["strategy"],
        texts=[(row["strategy"], row["text"]) for row in rows if row["batch_size"] == rows[0]["batch_size"]],
        cpu=found["environment"]["cpu"], gpus=[gpu["name"] for gpu in found["environment"]["gpus"]],
        read=f"{limits['read_bytes_per_second'] / 1e9:.1f} GB/s",
        kernels=kernel_lines(found["rows"]),
        rate=f"{limits['operations_per_second'] / 1e12:.2f} TFLOP/s in {limits['dtype']}",
    )  # fmt: skip
