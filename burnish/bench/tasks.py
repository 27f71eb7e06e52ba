"""What a model is measured on: rows to train on, rows to test on, and a metric.

Metrics: `exact_match`, the share of rows whose greedy continuation begins with the expected completion (what follows
it is not judged); `accuracy` of a classifier; `rank_classification`, the share of rows whose completion has a higher
mean log-probability per token than every other of its `choices`, end tokens not counted (T-Few, arXiv 2205.05638,
section 3.2); `perplexity`, exp of the mean loss per trained token. `auto` is accuracy with a label column, rank
classification where all of the user's own rows have `choices`, else exact match of completions, and perplexity of text.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from burnish.config import UserError, from_mapping, nearest
from burnish.model.bundle import Model
from burnish.model.example import Example
from burnish.store.classes import labels_of
from burnish.store.data import Row, encode_classification, encode_rows, read_rows, split_rows, wrong_choices
from burnish.store.rows import detect_format, rename_columns

Metric = Literal["auto", "exact_match", "accuracy", "rank_classification", "perplexity"]


@dataclass(frozen=True)
class TaskConfig:
    """A task on the user's own data. With `label_column` it is a classification of one or two `text_columns`;
    otherwise rows of any format that `burnish tune` takes.

    The split `dev` is what settings are chosen on: `dev_data`, or a part of the training rows as large as
    `eval_fraction`. `train_rows` and `max_rows` limit the rows to train on, and of both kinds; 0: all.
    """

    name: str
    data: str = ""
    eval_data: str = ""
    dev_data: str = ""
    eval_fraction: float = 0.2
    metric: Metric = "auto"
    columns: dict[str, str] = field(default_factory=dict)
    text_columns: list[str] = field(default_factory=list)
    label_column: str = ""
    max_length: int = 512
    max_rows: int = 0
    train_rows: int = 0
    split: Literal["test", "dev"] = "test"


@dataclass(frozen=True)
class Task:
    """Rows of a task. `label_names` is empty unless the task is a classification."""

    config: TaskConfig
    metric: str
    train: list[Row]
    test: list[Row]
    label_names: list[str]

    @property
    def name(self) -> str:
        return self.config.name

    def encode(self, model: Model, rows: list[Row]) -> list[Example]:
        """The rows as examples for this model's tokenizer."""
        config = self.config
        if self.label_names:
            columns, label = config.text_columns, config.label_column
            found, _ = encode_classification(
                rows, model.tokenizer, columns, label, self.label_names, config.max_length, self.name
            )
            return found
        names, paired = config.columns or None, model.spec.paired
        return encode_rows(rows, model.tokenizer, config.max_length, where=self.name, columns=names, paired=paired)


def parse_task(item: str | Mapping[str, Any]) -> TaskConfig:
    """A built-in task's name, or a mapping of `TaskConfig`. Raises UserError naming the nearest."""
    from burnish.world import TASKS

    if isinstance(item, Mapping):
        config = from_mapping(TaskConfig, dict(item), f"task '{item.get('name', '?')}'")
    else:
        config = TaskConfig(item)
    if not config.data and config.name not in TASKS:
        raise UserError(
            f"task '{config.name}' is not built in{nearest(config.name, TASKS)}; built in: {', '.join(TASKS)}; "
            "for your own give name and data"
        )
    return config


def load_task(config: TaskConfig) -> Task:
    """Read the task's rows and split off test rows where no eval_data is given.

    Raises UserError where there are too few, or the metric does not go with them.
    """
    train, test = _rows(config)
    names: list[str] = []
    if config.label_column:
        if not config.text_columns:
            raise UserError(f"task '{config.name}': label_column needs text_columns; columns: {', '.join(train[0])}")
        names = labels_of(train + test, config.label_column) or [""]
    elif config.text_columns:
        raise UserError(f"task '{config.name}': text_columns are classified; name the class's column in label_column")
    metric: str = config.metric
    if metric in ("auto", "rank_classification"):
        renamed = rename_columns(test, config.columns, config.name) if config.columns else test
        kind = "label" if names else detect_format(renamed, config.name, config.columns)
        lacks = without_choices(test, config)
        if metric == "auto":
            answered = "rank_classification" if config.data and not lacks else "exact_match"
            metric = {"label": "accuracy", "prompt_completion": answered}.get(kind, "perplexity")
        if metric == "rank_classification" and (lacks or kind != "prompt_completion"):
            raise UserError(
                f"task '{config.name}': test row {lacks or 1}: metric rank_classification needs a prompt, a "
                "completion, and 'choices', a list of texts with the completion among them"
            )
    if (metric == "accuracy") != bool(names):
        raise UserError(f"task '{config.name}': metric {metric} does not go with label_column '{config.label_column}'")
    train = some(train, min(config.train_rows or len(train), config.max_rows or len(train)))
    return Task(config, metric, train, some(test, config.max_rows or len(test)), names)


def without_choices(rows: list[Row], config: TaskConfig) -> int:
    """The number, from 1, of the first row without `choices` that its completion is among; 0 where all have them."""
    renamed = rename_columns(rows, config.columns, config.name) if config.columns else rows
    return next((number for number, row in enumerate(renamed, 1) if wrong_choices(row) is None), 0)


def _rows(config: TaskConfig) -> tuple[list[Row], list[Row]]:
    """(rows to train on, rows to test on)."""
    if not config.data:
        from burnish.world import TASKS

        make = TASKS[config.name]
        return make("train"), make(config.split)
    train = read_rows(config.data)
    if config.eval_data:
        test = read_rows(config.eval_data)
    else:
        train, test = split_rows(train, config.eval_fraction, seed=0)
    if config.split == "dev" and config.dev_data:
        test = read_rows(config.dev_data)
    elif config.split == "dev":
        train, test = split_rows(train, config.eval_fraction, seed=1)
    if not train or not test:
        raise UserError(
            f"task '{config.name}': {len(train)} rows to train on and {len(test)} to test on; give more data"
        )
    return train, test


def some(rows: list[Row], count: int) -> list[Row]:
    """`count` of the rows in an order of a fixed seed, so that fewer are the first of more; all in their own order."""
    if count >= len(rows):
        return rows
    return random.Random(0).sample(rows, len(rows))[:count]


def target_column(task: Task) -> str | None:
    """The column that holds what a row should be answered with, None for conversations and plain text."""
    asked = task.config.label_column or task.config.columns.get("completion")
    return next((name for name in (asked, "completion", "output") if task.train and name in task.train[0]), None)


def majority(task: Task) -> float | None:
    """The score of always giving the most frequent training answer; None where the metric has no such score."""
    column = target_column(task)
    if task.metric == "perplexity" or column is None:
        return None
    common = Counter(str(row[column]) for row in task.train).most_common(1)[0][0]
    return sum(str(row[column]) == common for row in task.test) / len(task.test)


def shuffled(task: Task, seed: int) -> list[Row]:
    """The training rows with their answers dealt out at random: what a model learns without the connection.

    Raises ValueError for a task whose rows have no answer column.
    """
    column = target_column(task)
    if column is None:
        raise ValueError(f"task '{task.name}': its rows have no answer to deal out")
    answers = [row[column] for row in task.train]
    random.Random(seed).shuffle(answers)
    return [{**row, column: answer} for row, answer in zip(task.train, answers, strict=True)]
