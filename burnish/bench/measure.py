"""`measure`: the quality of a model on a task; and `burnish eval`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from burnish import chain
from burnish.bench.tasks import Metric, Task, load_task, parse_task
from burnish.config import UserError
from burnish.engine.loss import evaluate
from burnish.engine.masking import held_out
from burnish.engine.order import collated, encode
from burnish.model.bundle import Model
from burnish.model.example import IGNORE, Example
from burnish.model.scoring import beside_labels, means, shared_log_probabilities
from burnish.store.checkpoint import load
from burnish.store.classes import lookup, names_of

BATCH = 64


@dataclass(frozen=True)
class EvalConfig:
    """One model, one or more tasks."""

    positional: ClassVar[str] = "model"
    model: str = field(default="pebble", metadata={"help": "checkpoint folder, hub id or 'pebble'"})
    task: list[str] = field(default_factory=lambda: ["facts"], metadata={"help": "built-in tasks, or lama alone"})
    split: str = field(default="test", metadata={"help": "split of a built-in task: test or dev"})
    data: str = field(default="", metadata={"help": "your own rows instead of a built-in task; lama: relations"})
    columns: dict[str, str] = field(default_factory=dict, metadata={"help": "your names of columns"})
    text_columns: list[str] = field(default_factory=list, metadata={"help": "one or two texts to classify"})
    label_column: str = field(default="", metadata={"help": "column with the class, for a classifier's accuracy"})
    metric: Metric = field(default="auto", metadata={"help": "auto takes what fits the rows"})
    max_length: int = field(default=512, metadata={"help": "longest row, in tokens"})
    max_rows: int = field(default=0, metadata={"help": "rows measured; 0: all"})
    methods: list[str] = field(default_factory=list, metadata={"help": "lama: ways of asking; empty: all"})
    relations: list[str] = field(default_factory=list, metadata={"help": "lama: their names, or all; empty: a few"})
    mine_from: str = field(default="", metadata={"help": "lama: text to mine wordings from, for your own relations"})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "lama: seeds of what trains"})
    max_steps: int = field(default=60, metadata={"help": "lama: most steps of what trains"})
    output_dir: Path | None = field(default=None, metadata={"help": "lama: folder for probe.json"})
    json: bool = field(default=False, metadata={"help": "print JSON"})


def measure(model: Model, task: Task | str | Mapping[str, Any], rows: Sequence[Example] | None = None) -> float:
    """The metric of `task` (a Task, a built-in name, or a mapping of `TaskConfig`) over its test rows.

    `rows` replaces the test rows by examples already encoded, without the chain's `encode` hooks. Raises UserError for
    a model whose head does not give what the metric compares.
    """
    if not isinstance(task, Task):
        task = load_task(parse_task(task))
    head = model.spec.head
    if (head == "classification") != (task.metric == "accuracy") or head == "none":
        does = "classifies rows" if head == "classification" else "has no head" if head == "none" else "tells words"
        ways = {
            "classification": "measure it on rows with their texts and class, as in --data rows.jsonl "
            "--text-columns text --label-column label",
            "none": "tune it with a head first",
        }
        instead = ways.get(head, "leave label_column away, or tune it as a classifier first")
        raise UserError(f"task '{task.name}': the model {does}, which {task.metric} does not measure; {instead}")
    examples = list(held_out(model, encode(model, task.encode(model, task.test) if rows is None else list(rows))))
    if task.metric == "perplexity":
        return math.exp(evaluate(model, examples))
    right = (ranked if task.metric == "rank_classification" else answered)(model, examples)
    return sum(right) / len(right)


@torch.inference_mode()
def answered(model: Model, examples: Sequence[Example]) -> list[bool]:
    """Which examples are right: the class of a classifier, or the greedy continuation against the completion.

    One forward decides the continuation: greedy decoding gives the completion exactly when every token of it is the
    most likely one after those before it. A final end token is not judged.
    """
    net = model.net
    net.eval()
    ends = {model.tokenizer.eos_token_id} if model.tokenizer is not None else set()
    right: list[bool] = [False] * len(examples)
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].ids))
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        batch = collated(model, [examples[i] for i in chosen], multiple_of=8)
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        hidden = chain.forward(model, batch)
        if "label" in batch:
            picked = net.logits(net.pool(hidden, batch["attention_mask"])).argmax(-1)
            for i, good in zip(chosen, (picked == batch["label"]).tolist(), strict=True):
                right[i] = good
            continue
        hidden, labels = beside_labels(net, hidden, batch["labels"])
        judged = labels != IGNORE
        for end in ends:
            judged &= labels != end
        rows = judged.nonzero()[:, 0]
        hits = net.logits(hidden[judged]).argmax(-1) == labels[judged]
        misses = torch.zeros(len(chosen), dtype=torch.long, device=rows.device).index_add_(0, rows, (~hits).long())
        for i, missed in zip(chosen, misses.tolist(), strict=True):
            right[i] = missed == 0
    return right


@torch.inference_mode()
def ranked(model: Model, examples: Sequence[Example]) -> list[bool]:
    """Which examples have a higher mean log-probability per token than each of their wrong `choices`.

    Rows that the network sees alike, such as choices of one token, are computed once.
    """
    net = model.net
    net.eval()
    end = model.tokenizer.eos_token_id
    rows = [one for example in examples for one in (example, *(example.choices or ()))]
    scores = torch.zeros(len(rows), device=model.device)
    alike: dict[Any, list[int]] = {}
    for i, row in enumerate(rows):
        alike.setdefault(_seen(row, end, net.spec.kind != "encoder"), []).append(i)
    order = sorted(alike.values(), key=lambda group: len(rows[group[0]].ids))
    for start in range(0, len(order), BATCH):
        groups = order[start : start + BATCH]
        chosen = [i for group in groups for i in group]
        batch = collated(model, [rows[i] for i in chosen], multiple_of=8)
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        labels = batch["labels"]
        if end is not None:
            labels = labels.masked_fill(labels == end, IGNORE)
        owner = torch.tensor([number for number, group in enumerate(groups) for _ in group], device=model.device)
        first = torch.searchsorted(owner, torch.arange(len(groups), device=model.device))
        hidden = chain.forward(model, {name: tensor[first] for name, tensor in batch.items()})
        logs, places = shared_log_probabilities(net, hidden, labels, owner)
        scores[chosen] = means(logs, places, len(chosen))
    by_example = scores.split([1 + len(example.choices or ()) for example in examples])
    return [bool((part[0] > part[1:]).all()) for part in by_example]


def _seen(row: Example, end: int | None, causal: bool) -> Any:
    """What the network sees of a row before it gives the last judged token."""
    size = len(row.ids)
    if causal:
        size = max((at for at, label in enumerate(row.labels) if label not in (IGNORE, end)), default=size)
    parts = (row.ids, row.slots, row.token_types)
    return *(None if part is None else tuple(part[:size]) for part in parts), row.virtual_tokens


def run(config: EvalConfig) -> int:
    """Print the metric of every task."""
    if "lama" in config.task:
        from burnish.bench import probe

        if len(config.task) > 1:
            raise UserError("task: lama is measured alone; leave the others out")
        return probe.run(config)
    model = load(config.model)
    tasks: list[Any] = list(config.task)
    if config.data:
        common: dict[str, Any] = {"metric": config.metric, "columns": config.columns, "max_length": config.max_length}
        common |= {"text_columns": config.text_columns, "label_column": config.label_column}
        tasks = [{"name": config.data, "data": config.data, "eval_data": config.data, **common}]
    elif config.label_column or config.text_columns:
        raise UserError("label_column, text_columns: they are columns of your own rows; give --data rows.jsonl")
    found: dict[str, dict[str, Any]] = {}
    for item in tasks:
        options = {"name": item, "metric": config.metric} if isinstance(item, str) else item
        if config.split not in ("test", "dev"):
            raise UserError(f"split: '{config.split}' is neither test nor dev")
        task = load_task(parse_task({**options, "max_rows": config.max_rows, "split": config.split}))
        if task.label_names and model.spec.head == "classification":
            task = replace(task, label_names=classes(model, task))
        found[task.name] = {"metric": task.metric, "value": measure(model, task), "rows": len(task.test)}
        if task.name == "facts" and task.metric == "exact_match":
            found[task.name]["relations"] = by_relation(model, task)
    if config.json:
        print(json.dumps(found, indent=1))
        return 0
    for name, entry in found.items():
        print(f"{name}: {entry['metric']} {entry['value']:.4f} over {entry['rows']} rows")
        for relation, value in entry.get("relations", {}).items():
            print(f"  {relation}: {value:.4f}")
    return 0


def classes(model: Model, task: Task) -> list[str]:
    """What the task's labels are looked up by, in the order of the model's classes. Raises UserError where a label is
    none of them."""
    own = names_of(model.hf_config)
    order = lookup(own, task.label_names)
    if order is None:
        strange = next(label for label in task.label_names if label not in own)
        raise UserError(f"task '{task.name}': label '{strange}' is none of the model's classes: {', '.join(own)}")
    return order


def by_relation(model: Model, task: Task) -> dict[str, float]:
    """The share of right answers for each relation of a knowledge task."""
    right = answered(model, held_out(model, encode(model, task.encode(model, task.test))))
    groups: dict[str, list[bool]] = {}
    for row, good in zip(task.test, right, strict=True):
        groups.setdefault(row["relation"], []).append(good)
    return {name: sum(values) / len(values) for name, values in sorted(groups.items())}
