"""Which row of a comparison wins, in words.

`results` is a mapping with `rows` and optionally `budget`: max_latency_ms, max_memory_bytes,
max_artifact_bytes and max_train_seconds, any of them. A row is {name, task, techniques, quality: {metric,
mean, spread, seeds}, latency_ms: {mean, std, p50, p95}, tokens_per_second, peak_memory_bytes, artifact_bytes,
trainable_parameters, trainable_share, train_seconds, energy_joules, status: ok | failed | oom | timeout,
error, curve: [[step, loss], ...], examples: [[count, mean, spread], ...], control}. Any figure may be null.
`quality.mean` is a fraction, or a loss or a perplexity by its metric's name; `seeds` holds one value per seed and
`spread` their standard deviation. The base's row is named "base", alone or with more words.

A row may win its task when it finished, is no control and keeps the budget. Of two rows one beats the other when its
mean is better by more than the seeds' noise, 2 sqrt(s1^2 / n1 + s2^2 / n2). Rows tie for the lead that no other beats,
and that are behind the best by no more than two rows with its own spread could be, so that none wins by wild seeds. The
cheapest of them wins: by peak memory, then mean latency, then artefact bytes, each equal within 2%.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from burnish.bench.report_plots import duration, gap, lower_is_better, millis, quality, shorten, size

Row = dict[str, Any]
FIGURES = (
    "tokens_per_second",
    "peak_memory_bytes",
    "artifact_bytes",
    "trainable_parameters",
    "trainable_share",
    "train_seconds",
    "energy_joules",
    "error",
)
SAME_COST = 1.02
FAILURES = {"oom": "ran out of memory", "timeout": "ran out of time", "failed": "failed"}
COSTS = (
    ("peak memory", size, lambda row: row["peak_memory_bytes"]),
    ("latency", millis, lambda row: row["latency_ms"]["mean"]),
    ("artefact", size, lambda row: row["artifact_bytes"]),
)
LIMITS = {
    "max_latency_ms": COSTS[1],
    "max_memory_bytes": COSTS[0],
    "max_artifact_bytes": COSTS[2],
    "max_train_seconds": ("training", duration, lambda row: row["train_seconds"]),
}


def finite(value: Any) -> Any:
    """A copy of a JSON-like value in plain types: NaN and infinities None, tuples lists, other objects text."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else None
    return str(value)


def complete(row: Mapping[str, Any]) -> Row:
    """A row with every key of the format, an absent figure as None."""
    found, time = row.get("quality") or {}, row.get("latency_ms") or {}
    techniques = [next(iter(t)) if isinstance(t, Mapping) else str(t) for t in row.get("techniques") or []]
    return {
        **dict.fromkeys(FIGURES),
        "status": "ok",
        **row,
        "name": str(row.get("name")),
        "task": str(row.get("task")),
        "techniques": techniques,
        "control": bool(row.get("control")),
        "quality": {
            "metric": found.get("metric") or "quality",
            "mean": found.get("mean"),
            "spread": found.get("spread"),
            "seeds": [value for value in found.get("seeds") or [] if value is not None],
        },
        "latency_ms": {key: time.get(key) for key in ("mean", "std", "p50", "p95")},
        "curve": [point for point in row.get("curve") or [] if None not in point],
        "examples": [point for point in row.get("examples") or [] if None not in point],
    }


def by_task(results: Mapping[str, Any]) -> dict[str, list[Row]]:
    """Each task's rows, complete, best quality first, rows without one last; ValueError where a task mixes metrics."""
    tasks: dict[str, list[Row]] = {}
    for row in map(complete, finite(results.get("rows") or [])):
        tasks.setdefault(row["task"], []).append(row)
    for task, rows in tasks.items():
        metrics = {row["quality"]["metric"]: None for row in rows if finished(row)}
        if len(metrics) > 1:
            raise ValueError(f"task {task}: its rows report different metrics: {', '.join(metrics)}")
        for row in rows:
            row["quality"]["metric"] = next(iter(metrics), row["quality"]["metric"])
        rows.sort(key=lambda row: (not finished(row), -score(row) if finished(row) else 0))
    return tasks


def finished(row: Row) -> bool:
    return row["status"] == "ok" and row["quality"]["mean"] is not None


def score(row: Row) -> float:
    """Quality with its sign turned so that more is better."""
    return -row["quality"]["mean"] if lower_is_better(row["quality"]["metric"]) else row["quality"]["mean"]


def noise(a: Row, b: Row) -> float:
    """The difference of means that seeds alone explain: two standard errors of the difference."""
    return 2 * math.sqrt(sum((r["quality"]["spread"] or 0) ** 2 / max(len(r["quality"]["seeds"]), 1) for r in (a, b)))


def beats(a: Row, b: Row) -> bool:
    return score(a) - score(b) > noise(a, b)


def ties(row: Row, field: list[Row]) -> bool:
    """Whether no other row of the field, best first, beats the row, and it is within the best row's own noise."""
    close = row is field[0] or score(field[0]) - score(row) <= noise(field[0], field[0])
    return close and not any(beats(other, row) for other in field)


def is_base(row: Row) -> bool:
    return not row["techniques"] and row["name"].lower().split(" ")[0] == "base"


def chain(row: Row) -> list[str]:
    """The row's techniques where its name does not already say them."""
    return [] if "+".join(row["techniques"]) == row["name"].replace(" ", "") else row["techniques"]


def told(row: Row) -> str:
    """lora (93.1% ± 0.4)"""
    return f"{row['name']} ({quality(**{k: row['quality'][k] for k in ('metric', 'mean', 'spread')})})"


def listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def excess(row: Row, budget: Mapping[str, float | None]) -> str:
    """Why a row is outside the budget, or "". An absent training time or artefact costs nothing; an absent
    memory or latency cannot be held against its limit, so it does not pass."""
    reasons = []
    for key, (word, unit, cost) in LIMITS.items():
        limit, value = budget.get(key), cost(row)
        if limit is None:
            continue
        if value is None and key in ("max_latency_ms", "max_memory_bytes"):
            reasons.append(f"{word} not measured")
        elif value is not None and value > limit:
            reasons.append(f"{word} {unit(value)}, limit {unit(limit)}")
    return "; ".join(reasons)


def cheapest(rows: list[Row]) -> tuple[Row, str]:
    """The cheapest row, and the costs in words that told it from the others ("" when none did)."""
    told_by = []
    for word, unit, cost in COSTS:
        known = [cost(row) for row in rows if cost(row) is not None]
        rivals = [value for value in known if value > min(known) * SAME_COST]
        if known:
            rows = [row for row in rows if cost(row) is not None and cost(row) not in rivals]
        if rivals:
            told_by.append((word, unit, cost, min(rivals)))
    winner = rows[0]
    return winner, "; ".join(
        f"{word} {unit(cost(winner))} against {unit(rival)}" for word, unit, cost, rival in told_by
    )


@dataclass(frozen=True)
class Judgement:
    """One task's outcome: the winner or None, the base or controls that it does not beat, the reasons in words, and why
    rows (by position) break the budget."""

    task: str
    rows: list[Row]
    winner: Row | None
    unbeaten: list[Row]
    sentences: list[str]
    over: dict[int, str]

    def state(self, row: Row) -> str:
        """wins, base, control, over budget, ok, or how the row failed."""
        if not finished(row):
            return "no quality" if row["status"] == "ok" else row["status"]
        if row is self.winner:
            return "wins"
        if any(self.rows[i] is row for i in self.over):
            return "over budget"
        return "control" if row["control"] else "base" if is_base(row) else "ok"


def judge(task: str, rows: list[Row], budget: Mapping[str, float | None]) -> Judgement:
    """Judges one task's rows as `by_task` gives them."""
    done = [row for row in rows if finished(row)]
    over = {i: why for i, row in enumerate(rows) if finished(row) and (why := excess(row, budget))}
    field = [row for i, row in enumerate(rows) if finished(row) and not row["control"] and i not in over]
    winner: Row | None = None
    unbeaten: list[Row] = []
    if field:
        tied = [row for row in field if ties(row, field)]
        winner, why = cheapest(tied)
        known = [row for row in done if row is not winner and (row["control"] or is_base(row))]
        unbeaten = [row for row in known if not beats(winner, row)]
        said = [opening(winner, tied, field, why)]
        said += [f"It does not beat {told(row)}{margin(winner, row)}." for row in unbeaten]
        said += support(winner, [row for row in known if row not in unbeaten], field)
        better = [row for i, row in enumerate(rows) if i in over and not row["control"] and beats(row, winner)]
        said += [f"Without the budget {told(better[0])} would lead."] if better else []
    elif any(not row["control"] for row in done):
        said = ["Nothing wins: every row is over the budget."]
    else:
        said = [f"Nothing wins: no row {'but the controls ' if done else ''}finished."]
    if over:
        said.append("Over the budget: " + "; ".join(f"{rows[i]['name']} ({why})" for i, why in over.items()) + ".")
    lost: dict[str, list[str]] = {}
    for row in rows:
        if not finished(row):
            lost.setdefault(failure(row), []).append(row["name"])
    if lost:
        said.append("Not finished: " + "; ".join(f"{listed(names)} {how}" for how, names in lost.items()) + ".")
    return Judgement(task, rows, winner, unbeaten, said, over)


def opening(winner: Row, tied: list[Row], field: list[Row], why: str) -> str:
    """The sentence that names the winner, by a lead, a tie or want of a rival; `tied` and `field` are best first."""
    name, metric = winner["name"], winner["quality"]["metric"].replace("_", " ")
    value = told(winner).removeprefix(name).strip(" ()")
    if len(tied) > 1:
        best = told(tied[1]) if winner is tied[0] else f"{told(tied[0])}, the best"
        cheap = "the cheaper" if len(tied) == 2 else f"the cheapest of {len(tied)} tied rows"
        reason = f"it is {cheap} ({why})" if why else "no cost tells them apart"
        return f"{name} wins a tie on {metric}: its {value} is within the seeds' noise of {best}, and {reason}."
    if len(field) == 1:
        return f"{name} wins with {metric} {value}, as the only row that may win."
    rival = next(row for row in field if row is not winner)
    ahead = gap(winner["quality"]["metric"], score(winner) - score(rival))
    limit = gap(winner["quality"]["metric"], noise(winner, rival))
    return f"{name} wins with {metric} {value}, {ahead} ahead of {told(rival)}; the seeds' noise is {limit}."


def margin(winner: Row, row: Row) -> str:
    return ", which is better" if beats(row, winner) else ": the difference is within the noise"


def support(winner: Row, under: list[Row], field: list[Row]) -> list[str]:
    """What the winner beats, what it costs, and how far the noise can be trusted."""
    said = [f"It beats {listed([told(row) for row in under])}."] if under else []
    costs = [f"{word} {unit(cost(winner))}" for word, unit, cost in COSTS if cost(winner) is not None]
    said += [f"Its costs: {', '.join(costs)}."] if costs else []
    if any(len(row["quality"]["seeds"]) < 2 and row["trainable_parameters"] for row in field):
        said.append("Some rows ran on one seed only, so the noise is underestimated.")
    return said


def failure(row: Row) -> str:
    reason = " ".join(str(row["error"] or "").split())
    return FAILURES.get(row["status"], "gave no quality") + (f" ({shorten(reason, 120)})" if reason else "")


def judgements(results: Mapping[str, Any]) -> list[Judgement]:
    budget = finite(results.get("budget") or {})
    return [judge(task, rows, budget) for task, rows in by_task(results).items()]


def verdict(results: Mapping[str, Any]) -> list[str]:
    """One paragraph per task: which row wins within the budget, and why."""
    return [f"{j.task}: {' '.join(j.sentences)}" for j in judgements(results)] or ["Nothing was measured."]
