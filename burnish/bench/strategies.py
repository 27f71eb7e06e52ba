"""`burnish bench`: one prompt, answered by every way of running a model, and how near each comes to the limits.

A request is timed as a whole and apart: to its first token, which is the prompt's forward (prefill), and per token
after it (decode). Decode reads the weights once per token, so its limit is the bandwidth of reading memory; prefill
multiplies every weight with every token, the head with the last one only, so its limit is the rate of matrix products.
Both are measured in the same run on one device; what is reached is a share of all devices that are used. Strategies run
in processes of their own, each in every round, forwards and backwards by turns, so that a slow minute of the machine
falls on all of them.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from burnish import device
from burnish.bench.jobs import Job, run_job
from burnish.bench.latency import summary
from burnish.bench.launcher import launchers
from burnish.bench.strategies_page import COLUMNS, cells, kernel_lines, page
from burnish.bench.strategy import DEFAULT, PARTS, Strategy, parse
from burnish.config import Bytes, UserError, make_folder
from burnish.plan import check_memory
from burnish.store.hub import resolve
from burnish.store.tensors import write_json

ROUNDS = 2
AT_LEAST = {"runs": 1, "warmups": 0, "max_new_tokens": 2, "prompt_tokens": 0, "ranks": 2, "threads": 0}
WIDE = 130  # columns of a terminal that hold all of `COLUMNS` in one table; in two where it has less
FIRST = ("strategy", "batch", "latency", "first token", "a token", "memory", "of bandwidth")
SECOND = ("strategy", "batch", "P50", "P95", "tokens/s", "load", "of matrix rate")
PROMPT = "Question: Where was Odile Kinlow born? Answer:"


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass(frozen=True)
class BenchConfig:
    """What is timed. The means are over `runs` requests in all, after `warmups` in each round."""

    positional: ClassVar[str] = "model"
    model: str = field(default="pebble", metadata=_help("checkpoint folder, hub id or 'pebble'"))
    strategies: list[str] = field(
        default_factory=lambda: list(DEFAULT),
        metadata=_help(f"ways to run it, each of one or more parts joined by +: {', '.join(PARTS)}"),
    )
    prompt: str = field(default=PROMPT, metadata=_help("text that is continued"))
    prompt_tokens: int = field(default=0, metadata=_help("instead of a text so many random tokens"))
    max_new_tokens: int = field(default=20, metadata=_help("tokens generated, always all of them"))
    batch_sizes: list[int] = field(default_factory=lambda: [1], metadata=_help("prompts at once"))
    warmups: int = field(default=2, metadata=_help("requests before the timed ones"))
    runs: int = field(default=10, metadata=_help("timed requests"))
    threads: int = field(default=0, metadata=_help("threads of the processor; 0: one per core"))
    dtype: str = field(default="", metadata=_help("load as bf16, fp16 or fp32; empty: as stored"))
    ranks: int = field(default=2, metadata=_help("processes of layer_parallel and tensor_parallel"))
    memory_limit: Bytes | None = field(
        default=None, metadata=_help("offload's; none: half of the model beside what the process takes anyway")
    )
    timeout: float = field(default=1800, metadata=_help("seconds that one strategy may take in one round"))
    output_dir: Path | None = field(default=None, metadata=_help("folder for bench.json and report.html"))
    json: bool = field(default=False, metadata=_help("print JSON"))


def bench(config: BenchConfig) -> dict[str, Any]:
    """Time every strategy: {"limits", "rows", "environment"}.

    Raises UserError for settings that make no sense, a model that cannot be had, and an output_dir that cannot be made.
    """
    ways = checked(config)
    folder = resolve(config.model)
    check_memory(folder, [list(way.techniques) for way in ways.values() if way.place != "offload"])
    if config.output_dir is not None:
        make_folder(config.output_dir)
    threads = config.threads or device.environment()["cores"]
    common = {
        "kind": "bench", "model": str(folder), "threads": threads, "dtype": config.dtype, "prompt": config.prompt,
        "prompt_tokens": config.prompt_tokens, "new_tokens": config.max_new_tokens, "warmups": config.warmups,
        "runs": -(-config.runs // ROUNDS), "batch_sizes": config.batch_sizes,
    }  # fmt: skip
    jobs = {name: {**common, **way.job()} for name, way in ways.items()}
    found: dict[str, list[Job]] = {name: [] for name in jobs}
    with tempfile.TemporaryDirectory() as scratch, launchers(1) as free:
        limits = run_job(
            {"kind": "limits", "threads": threads, "dtype": config.dtype}, Path(scratch), config.timeout, free
        )
        if limits["status"] != "ok":
            raise RuntimeError(f"the machine's limits could not be measured: {limits['error']}")
        for number in range(ROUNDS):
            order = list(jobs) if number % 2 == 0 else list(reversed(jobs))
            for name in order:
                if found[name] and found[name][-1]["status"] != "ok":
                    continue  # it would fail, or take all of its time, once more
                found[name].append(run_job({**jobs[name], "round": number}, Path(scratch), config.timeout, free))
                print(
                    f"round {number + 1} of {ROUNDS}: {name}: {found[name][-1]['status']}", file=sys.stderr, flush=True
                )
    rows = [row for name in jobs for row in rows_of(name, found[name], config.batch_sizes, limits)]
    return {"environment": device.environment(), "limits": limits, "rows": rows}


def checked(config: BenchConfig) -> dict[str, Strategy]:
    """The strategies by name. Raises UserError for what is wrong with the settings, whatever the model."""
    for name, least in AT_LEAST.items():
        if getattr(config, name) < least:
            raise UserError(f"{name}: must be at least {least}, is {getattr(config, name)}")
    for name in ("strategies", "batch_sizes"):
        if not getattr(config, name):
            raise UserError(f"{name}: name at least one")
        if len(set(getattr(config, name))) < len(getattr(config, name)):
            raise UserError(f"{name}: one is named twice; remove it")
    if min(config.batch_sizes) < 1:
        raise UserError(f"batch_sizes: must be at least 1, is {min(config.batch_sizes)}")
    if config.timeout <= 0:
        raise UserError(f"timeout: must be above 0, is {config.timeout}")
    if not config.prompt and not config.prompt_tokens:
        raise UserError("prompt: it is empty; write something, or give prompt_tokens")
    device.parse_dtype(config.dtype or None)
    ways: dict[str, Strategy] = {}
    for name in config.strategies:
        way = parse(name, config.ranks, config.memory_limit or 0)
        if twin := next((other for other, known in ways.items() if known == way), None):
            raise UserError(f"strategies: '{name}' is '{twin}' in other words; remove one")
        ways[name] = way
    if config.memory_limit is not None and "offload" not in ways:
        raise UserError("memory_limit: is offload's; leave it away, or name offload among the strategies")
    return ways


def rows_of(name: str, rounds: Sequence[Job], batch_sizes: Sequence[int], limits: Job) -> list[dict[str, Any]]:
    """A strategy's row for every batch size; the worst status of its rounds is the row's."""
    failed = next((job for job in rounds if job["status"] != "ok"), None)
    if failed:
        error = " ".join(str(failed["error"]).split())
        return [{"strategy": name, "batch_size": size, **failed, "error": error} for size in batch_sizes]
    rows = []
    for at, size in enumerate(batch_sizes):
        parts = [job["batches"][at] for job in rounds]
        first, whole = ([x for part in parts for x in part[key]] for key in ("first_ms", "total_ms"))
        new, prompt = rounds[0]["new_tokens"], parts[0]["prompt_tokens"]
        each = (statistics.fmean(whole) - statistics.fmean(first)) / (new - 1)
        devices = rounds[0].get("devices", 1)
        bandwidth = rounds[0]["weight_bytes"] / devices / (each / 1000)
        products = size * (prompt * rounds[0]["prompt_weights"] + rounds[0]["answer_weights"])
        rate = 2 * products / devices / (statistics.fmean(first) / 1000)
        rows.append({
            "strategy": name, "batch_size": size, "status": "ok", "error": None, "text": parts[0]["text"],
            "latency_ms": summary(whole), "first_token_ms": statistics.fmean(first), "per_token_ms": each,
            "tokens_per_second": 1000 * size * new / statistics.fmean(whole), "prompt_tokens": prompt,
            "peak_memory_bytes": max(job["peak_memory_bytes"] for job in rounds),
            "rank_memory_bytes": rounds[0].get("rank_memory_bytes"),
            "load_seconds": statistics.fmean(job["load_seconds"] for job in rounds),
            "of_bandwidth": bandwidth / limits["read_bytes_per_second"],
            "of_matrix_rate": rate / limits["operations_per_second"], "kernels": rounds[0]["kernels"],
        })  # fmt: skip
    return rows


def tables(found: dict[str, Any], width: int | None = None) -> list[Any]:
    """The rows for a terminal of `width` columns, the console's by default; what failed is in the first table only."""
    import rich

    if (width or rich.get_console().width) >= WIDE:
        return [table(found["rows"], COLUMNS)]
    ran = [row for row in found["rows"] if row["status"] == "ok"]
    alike = len({row["batch_size"] for row in found["rows"]}) == 1
    first = [name for name in FIRST if not (alike and name == "batch")]  # which the second tells
    return [table(found["rows"], first), *([table(ran, SECOND)] if ran else [])]


def table(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> Any:
    """Some of the `COLUMNS` of the rows."""
    from rich import box
    from rich.table import Table

    out = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, header_style="bold")
    for name in columns:
        wraps, left = name in ("strategy", "memory"), name == "strategy"
        out.add_column(name.replace(" ", "\n"), justify="left" if left else "right", no_wrap=not wraps, overflow="fold")
    for row in rows:
        failed = {"strategy": row["strategy"], "batch": str(row["batch_size"]), "latency": row["status"]}
        every = dict(zip(COLUMNS, cells(row), strict=True)) if row["status"] == "ok" else failed
        out.add_row(*(every.get(name, "") for name in columns))
    return out


def run(config: BenchConfig) -> int:
    """Time and print; where no strategy ran 2 if each refused what it was given, else 1."""
    found = bench(config)
    if config.output_dir is not None:
        write_json(found, config.output_dir / "bench.json")
        (config.output_dir / "report.html").write_text(page(found, config.model), encoding="utf-8")
    refused = all(row.get("refused") for row in found["rows"])
    status = 0 if any(row["status"] == "ok" for row in found["rows"]) else 2 if refused else 1
    if config.json:
        print(json.dumps(found))
    else:
        show(found)
    if status:
        first = found["rows"][0]
        print(f"burnish bench: no strategy ran; {first['strategy']}: {first['error']}", file=sys.stderr)
    return status


def show(found: dict[str, Any]) -> None:
    """Print the tables, what each strategy said or why it failed, the limits, and what was measured of kernels."""
    import rich

    for one in tables(found):
        rich.print(one, "")
    for row in found["rows"]:
        print(f"{row['strategy']}: {row['text']!r}" if row["status"] == "ok" else f"{row['strategy']}: {row['error']}")
    limits = found["limits"]
    print(
        f"limits of this machine: {limits['read_bytes_per_second'] / 1e9:.1f} GB/s read, "
        f"{limits['operations_per_second'] / 1e12:.2f} TFLOP/s in {limits['dtype']}"
    )
    for line in kernel_lines(found["rows"]):
        print(f"measured: {line}")
