"""What a comparison found: `verdict` in words, `table` for the terminal, `page` in HTML, `write` to files.

`results` is described in `report_verdict` (rows and budget) and `report_page.page` (the rest).
"""

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import rich
from rich import box
from rich.table import Table
from rich.text import Text

from burnish.bench.report_page import page
from burnish.bench.report_plots import count, lower_is_better, number, quality, share, size
from burnish.bench.report_verdict import Row, chain, finished, finite, judgements, verdict

__all__ = ["page", "table", "verdict", "write"]
STATE_STYLES = {"wins": "green", "over budget": "yellow", "control": "dim", "base": "dim"}


@dataclass(frozen=True)
class Figure:
    """A column of the table: `cell` is "" where a row has no such figure."""

    name: str
    cell: Callable[[Row], str]
    narrow: bool = True
    always: bool = True


def shown(value: float | None, unit: Callable[[float | None], str]) -> str:
    return "" if value is None else unit(value)


def latency(row: Row) -> str:
    mean, std = row["latency_ms"]["mean"], row["latency_ms"]["std"]
    return shown(mean, number) + ("" if mean is None or std is None else f" ± {number(std, 1)}")


FIGURES = (
    Figure("params", lambda row: shown(row["trainable_parameters"], count)),
    Figure("share", lambda row: shown(row["trainable_share"], share), narrow=False),
    Figure("train s", lambda row: shown(row["train_seconds"], number), narrow=False),
    Figure("memory", lambda row: shown(row["peak_memory_bytes"], size)),
    Figure("artefact", lambda row: shown(row["artifact_bytes"], size)),
    Figure("ms", latency),
    Figure("P95", lambda row: shown(row["latency_ms"]["p95"], number), narrow=False),
    Figure("tok/s", lambda row: shown(row["tokens_per_second"], number), narrow=False),
    Figure("joules", lambda row: shown(row["energy_joules"], number), narrow=False, always=False),
)


def table(results: Mapping[str, Any], width: int | None = None) -> Table:
    """A terminal table grouped by task, best quality first, for `width` columns (the console's by default):
    below 110 it leaves out techniques, share, training time, P95, tokens per second and energy."""
    wide = (width or rich.get_console().width) >= 110
    groups = judgements(results)
    figures = [figure for figure in FIGURES if wide or figure.narrow]
    figures = [f for f in figures if f.always or any(f.cell(row) for group in groups for row in group.rows)]
    out = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, header_style="bold")
    out.add_column("row", overflow="fold", min_width=14)
    for name in ("quality", *(figure.name for figure in figures)):
        out.add_column(name, justify="right", no_wrap=True)
    out.add_column("status", no_wrap=True)
    for group in groups:
        metric = group.rows[0]["quality"]["metric"]
        direction = f"{metric.replace('_', ' ')} {'↓' if lower_is_better(metric) else '↑'}"
        out.add_row(Text(group.task, "bold"), Text(direction, "dim"))
        for row in group.rows:
            state, found = group.state(row), row["quality"]
            techniques = f" ({' + '.join(chain(row))})" if wide and chain(row) else ""
            cells = [Text.assemble(row["name"], (techniques, "dim"))]
            cells.append(Text(quality(metric, found["mean"], found["spread"])))
            cells += [Text(figure.cell(row) or "–") for figure in figures]
            style = STATE_STYLES.get(state, "" if finished(row) else "red")
            out.add_row(*cells, Text(state.removesuffix(" budget"), style), style="bold" if state == "wins" else "")
        out.add_section()
    return out


def write(results: Mapping[str, Any], folder: str | Path) -> None:
    """Writes `folder`/results.json, then `folder`/report.html, each whole or not at all. NaN and infinity
    become null, and a missing `date` is now."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    results = {"date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")} | finite(results)
    replace_file(folder / "results.json", json.dumps(results, indent=1, allow_nan=False, ensure_ascii=False) + "\n")
    replace_file(folder / "report.html", page(results))


def replace_file(path: Path, content: str) -> None:
    """Writes under a temporary name beside `path`, syncs, and renames over it."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
