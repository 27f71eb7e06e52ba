"""The classes of classified rows: their names, and which class of a model a label is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def labels_of(rows: Sequence[Mapping[str, Any]], column: str) -> list[str]:
    """The distinct labels of a column, sorted, whole numbers by their value."""
    labels = {str(row[column]) for row in rows if row.get(column) is not None}
    return sorted(labels, key=int) if all(map(whole, labels)) else sorted(labels)


def whole(label: str) -> bool:
    return label.lstrip("-").isdecimal()


def lookup(names: Sequence[str], labels: Sequence[str]) -> list[str] | None:
    """The names by which the sorted `labels` of data find the numbers of their classes among `names`, None where they
    do not: labels are such names, or numbers from 0, or other whole numbers, one for each name."""
    if set(labels) <= set(names):
        return list(names)
    if not all(map(whole, labels)):
        return None
    if all(0 <= int(label) < len(names) for label in labels):
        return list(names)
    return list(labels) if len(labels) == len(names) else None


def names_of(hf_config: Mapping[str, Any]) -> list[str]:
    """The names of a classifier's classes by a Hugging Face config, where transformers' own are left away."""
    found = hf_config.get("id2label") or {str(i): f"LABEL_{i}" for i in range(hf_config.get("num_labels", 2))}
    return [found[key] for key in sorted(found, key=int)]
