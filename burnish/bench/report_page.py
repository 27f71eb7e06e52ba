"""The report as one self-contained HTML page: nothing is fetched, and it reads with scripts off."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.resources import files
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from burnish.bench import report_plots as plots
from burnish.bench.report_plots import (
    COLOURS,
    MARKERS,
    Mark,
    count,
    duration,
    millis,
    number,
    quality,
    share,
    size,
)
from burnish.bench.report_verdict import (
    COSTS,
    LIMITS,
    Judgement,
    Row,
    chain,
    finished,
    finite,
    is_base,
    judgements,
    listed,
)

Identity = tuple[int, str, int]
MIB, GIB = 1024.0**2, 1024.0**3
COLUMNS: dict[str, tuple[Callable[[Row], float | None], Callable[[Row], str]]] = {
    "Trainable": (lambda row: row["trainable_parameters"], lambda row: count(row["trainable_parameters"])),
    "Share": (lambda row: row["trainable_share"], lambda row: share(row["trainable_share"])),
    "Training": (lambda row: row["train_seconds"], lambda row: duration(row["train_seconds"])),
    "Memory": (lambda row: row["peak_memory_bytes"], lambda row: size(row["peak_memory_bytes"])),
    "Artefact": (lambda row: row["artifact_bytes"], lambda row: size(row["artifact_bytes"])),
    "Latency": (
        lambda row: row["latency_ms"]["mean"],
        lambda row: millis(row["latency_ms"]["mean"], row["latency_ms"]["std"]),
    ),
    "P95": (lambda row: row["latency_ms"]["p95"], lambda row: millis(row["latency_ms"]["p95"])),
    "Tokens/s": (lambda row: row["tokens_per_second"], lambda row: number(row["tokens_per_second"])),
    "Joules": (lambda row: row["energy_joules"], lambda row: number(row["energy_joules"])),
}


def page(results: Mapping[str, Any]) -> str:
    """The HTML of `results`. Besides `rows`, `budget` and `environment` it shows `notes` (how each figure was
    measured, one sentence each), `recipe` (mapping or text that runs the comparison again), `command` (text
    or lines), `date`."""
    results = finite(results)
    judged = judgements(results)
    styles = identities(judged)
    budget, machine = results.get("budget") or {}, results.get("environment") or {}
    recipe, command = results.get("recipe"), results.get("command")
    if isinstance(recipe, dict | list):
        recipe = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
    limits = [(word, unit(budget[key])) for key, (word, unit, _) in LIMITS.items() if budget.get(key) is not None]
    layout = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = layout.from_string(files("burnish.bench").joinpath("report.html.j2").read_text("utf-8"))
    return template.render(
        headline=headline(judged),
        facts=[machine[key] for key in ("cpu", "device") if machine.get(key)],
        date=results.get("date"),
        limits=[f"{word} at most {limit}" for word, limit in limits],
        tasks=[section(judgement, styles, budget) for judgement in judged],
        notes=results.get("notes") or [],
        recipe=recipe,
        command="\n".join(command) if isinstance(command, list) else command,
        environment=[(label(key), described(key, value)) for key, value in machine.items()],
        json=Markup(embedded(results)),
    )


def embedded(results: Any) -> str:
    """JSON that cannot end its script element: <, > and & are written as JSON's own escapes."""
    text = json.dumps(results, allow_nan=False, ensure_ascii=True)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def label(key: str) -> str:
    return key.removesuffix("_bytes").replace("_", " ")


def described(key: str, value: Any) -> str:
    """One environment entry in a line; absent packages are left out."""
    if isinstance(value, dict):
        return " · ".join(f"{label(k)} {described(k, v)}" for k, v in value.items() if v is not None)
    if isinstance(value, list):
        return "; ".join(described(key, item) for item in value) or "none"
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return size(value) if key.endswith("_bytes") and isinstance(value, int | float) else str(value)


def headline(judged: list[Judgement]) -> str:
    """Who wins where, in one sentence, with the base or controls that a winner does not beat."""
    wins: dict[str, list[str]] = {}
    for judgement in judged:
        doubts = [row["name"] for row in judgement.unbeaten]
        task = f"{judgement.task} (no better than {listed(doubts)})" if doubts else judgement.task
        wins.setdefault(judgement.winner["name"] if judgement.winner else "nothing", []).append(task)
    return "; ".join(f"{name} wins {listed(tasks)}" for name, tasks in wins.items()) or "Nothing was measured"


def identities(judged: list[Judgement]) -> dict[str, Identity]:
    """Each row name's key, CSS class and marker, the same in every task: ink for the base, hollow grey for
    controls."""
    found: dict[str, Identity] = {}
    techniques = 0
    for row in (row for judgement in judged for row in judgement.rows):
        if row["name"] in found:
            continue
        if row["control"]:
            found[row["name"]] = (len(found), "control", 3)
        elif is_base(row):
            found[row["name"]] = (len(found), "base", 0)
        else:
            found[row["name"]] = (len(found), f"c{techniques % COLOURS}", techniques % len(MARKERS))
            techniques += 1
    return found


def section(judgement: Judgement, styles: Mapping[str, Identity], budget: Mapping[str, Any]) -> dict[str, Any]:
    """What the template shows of one task."""
    rows, metric = judgement.rows, judgement.rows[0]["quality"]["metric"]
    marks = [mark(judgement, row, styles[row["name"]], rank) for rank, row in enumerate(rows, 2)]
    columns = {name: column for name, column in COLUMNS.items() if any(column[0](row) is not None for row in rows)}
    values = [v for row in rows if finished(row) for v in (row["quality"]["mean"], *row["quality"]["seeds"])]

    def line(row: Row, m: Mark) -> dict[str, Any]:
        found, done = row["quality"], finished(row)
        return {
            "key": m.key,
            "symbol": Markup(plots.key_symbol(m)),
            "name": row["name"],
            "techniques": " + ".join(chain(row)),
            "state": judgement.state(row),
            "failed": not done,
            "reason": " ".join(str(row["error"] or "no reason given").split()),
            "quality": quality(metric, found["mean"], found["spread"]),
            "mean": found["mean"],
            "strip": Markup(plots.strip(m, found["seeds"], min(values), max(values))) if done else "",
            "cells": [(figure(row), shown(row)) for figure, shown in columns.values()],
        }

    return {
        "name": judgement.task,
        "metric": metric.replace("_", " "),
        "lower": plots.lower_is_better(metric),
        "lead": " ".join(judgement.sentences[: 1 + len(judgement.unbeaten)]),
        "rest": " ".join(judgement.sentences[1 + len(judgement.unbeaten) :]),
        "figures": figures(judgement, marks, metric, budget),
        "columns": list(columns),
        "rows": [line(row, m) for row, m in zip(rows, marks, strict=True)],
    }


def mark(judgement: Judgement, row: Row, identity: Identity, rank: int) -> Mark:
    """A row as the plots draw it, without its cost."""
    key, style, shape = identity
    found = row["quality"]
    costs = [f"{name} {unit(cost(row))}" for name, unit, cost in COSTS if cost(row) is not None]
    return Mark(
        name=row["name"],
        style=style,
        shape=shape,
        key=key,
        y=math.nan if found["mean"] is None else found["mean"],
        spread=found["spread"] or 0.0,
        curve=row["curve"],
        rank=0 if row is judgement.winner else 1 if is_base(row) else rank,
        competes=not row["control"],
        hover=f"{row['name']}: {quality(found['metric'], found['mean'], found['spread'])}; {', '.join(costs)}",
    )


def figures(
    judgement: Judgement, marks: list[Mark], metric: str, budget: Mapping[str, Any]
) -> list[tuple[str, Markup]]:
    """(caption, SVG) of each plot that has data."""
    pairs = [(row, m) for row, m in zip(judgement.rows, marks, strict=True) if finished(row)]
    memory = [replace(m, x=row["peak_memory_bytes"]) for row, m in pairs if row["peak_memory_bytes"] is not None]
    latency = [replace(m, x=row["latency_ms"]["mean"]) for row, m in pairs if row["latency_ms"]["mean"] is not None]
    artefact = [replace(m, x=row["artifact_bytes"]) for row, m in pairs if row["artifact_bytes"] is not None]
    unit, word = (GIB, "GiB") if max((m.x for m in memory), default=0) > 4 * GIB else (MIB, "MiB")
    drawn = {
        "Quality against peak memory": plots.scatter(
            memory, metric, f"peak memory ({word})", unit=unit, limit=budget.get("max_memory_bytes")
        ),
        "Quality against latency": plots.scatter(latency, metric, "latency (ms)", limit=budget.get("max_latency_ms")),
        "Quality against the artefact's size": plots.scatter(
            artefact, metric, "artefact (MiB)", unit=MIB, limit=budget.get("max_artifact_bytes")
        ),
        "Learning curves": plots.curves(marks, "step", "training loss"),
        "Quality by number of training examples": plots.curves(
            [replace(m, curve=[(n, mean) for n, mean, _ in row["examples"]]) for row, m in pairs],
            "training examples",
            metric.replace("_", " "),
            not plots.lower_is_better(metric),
        ),
    }
    return [(caption, Markup(svg)) for caption, svg in drawn.items() if svg]
