"""The rows of a comparison: what is asked for, and what comes out in results.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from burnish.bench.tasks import Task, majority, target_column
from burnish.config import UserError, coerce
from burnish.engine.procedures.tune import class_order, with_head

Result = Mapping[str, Any]
NO_LATENCY = dict.fromkeys(("mean", "std", "p50", "p95"))


@dataclass(frozen=True)
class RowConfig:
    """One row: a chain of techniques, trained if anything in it trains.

    `learning_rate` may differ by task; of a list the best on the development rows is taken. `model` is another base
    than the comparison's, `tasks` the names of those that the row is for (none: all).
    """

    name: str
    techniques: list[Any] = field(default_factory=list)
    learning_rate: float | list[float] | dict[str, Any] = 0.0
    max_steps: int = 0
    train: dict[str, Any] = field(default_factory=dict)
    model: str = ""
    tasks: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Cell:
    """One row on one task."""

    row: RowConfig
    task: Task
    techniques: list[Any]
    control: bool = False
    shuffle: bool = False


def task_cells(rows: list[RowConfig], task: Task, controls: bool) -> list[Cell]:
    """Every row on the task, and the controls. A classification begins each chain with a new head.

    Raises UserError for a row whose own names of classes are not the task's.
    """

    def chained(row: RowConfig) -> list[Any]:
        if not task.label_names:
            return row.techniques
        class_order(row.techniques, task.label_names)
        return with_head(row.techniques, task.label_names)

    cells = [Cell(row, task, chained(row)) for row in rows if not row.tasks or task.name in row.tasks]
    trained = next((cell.row for cell in cells if learning_rates(cell.row, task.name)), None)
    if controls and trained and target_column(task):
        cells.append(Cell(trained, task, chained(trained), control=True, shuffle=True))
    return cells


def learning_rates(row: RowConfig, task: str) -> list[float]:
    """The row's rates to try on a task; none where it does not train. Raises UserError for what is no number."""
    rates = row.learning_rate
    if isinstance(rates, Mapping):
        rates = rates.get(task, next(iter(rates.values()), 0.0))
    found = coerce(rates, list[float], f"row '{row.name}': learning_rate")
    if any(rate < 0 for rate in found):
        raise UserError(f"row '{row.name}': learning_rate: must be 0 (no training) or more, is {min(found)}")
    return [rate for rate in found if rate]


def result_row(cell: Cell, quality: Result, fit: Result, served: Result, found: Result) -> dict[str, Any]:
    """A row of results.json from the results of its jobs; the worst status of the three is the row's. `found` holds
    its learning rate, the trials that led to it, and its quality by number of training examples."""
    failed = next((r for r in (quality, fit, served) if r["status"] != "ok"), None)
    memory = [part for part in (fit.get("train_memory_bytes"), served.get("inference_memory_bytes")) if part]
    return {
        "name": f"shuffled labels ({cell.row.name})" if cell.control else cell.row.name,
        "model": cell.row.model,
        "techniques": cell.techniques,
        "task": cell.task.name,
        "quality": quality.get("quality") or empty_quality(cell.task),
        "latency_ms": served.get("latency_ms") or NO_LATENCY,
        "tokens_per_second": served.get("tokens_per_second"),
        "peak_memory_bytes": max(memory) if memory else None,
        "train_memory_bytes": fit.get("train_memory_bytes"),
        "inference_memory_bytes": served.get("inference_memory_bytes"),
        "artifact_bytes": quality.get("artifact_bytes"),
        "trainable_parameters": quality.get("trainable_parameters"),
        "trainable_share": quality.get("trainable_share"),
        "train_seconds": quality.get("train_seconds"),
        "energy_joules": served.get("energy_joules"),
        "status": failed["status"] if failed else "ok",
        "error": failed["error"] if failed else None,
        "curve": quality.get("curve", []),
        "control": cell.control,
        **found,
    }


def majority_row(task: Task) -> dict[str, Any] | None:
    """The control that always gives the most frequent training answer; None where there is no such score."""
    score = majority(task)
    if score is None:
        return None
    found = {"metric": task.metric, "mean": score, "spread": 0.0, "seeds": [score]}
    nothing = dict.fromkeys(
        ("tokens_per_second", "peak_memory_bytes", "artifact_bytes", "trainable_parameters", "trainable_share")
    )
    nothing |= dict.fromkeys(("train_seconds", "energy_joules", "error"))
    fixed = {"name": "majority answer", "techniques": [], "task": task.name, "quality": found, "curve": []}
    return {**nothing, **fixed, "latency_ms": NO_LATENCY, "status": "ok", "control": True}


def empty_quality(task: Task) -> dict[str, Any]:
    """The quality of a row that was not measured."""
    return {"metric": task.metric, "mean": None, "spread": None, "seeds": []}
