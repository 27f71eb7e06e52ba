"""One tokenised example, as data loading writes it and the techniques' `encode` hooks rewrite it."""

from __future__ import annotations

from dataclasses import dataclass, field

IGNORE = -100


@dataclass
class Example:
    """ids and labels have the same length; `labels[i]` is the id at position i where it is trained, else -100.

    slots: -1 for a real token, i >= 0 for pseudo token i (ids then hold a placeholder). label: the class of a
    classification example. virtual_tokens: how long a soft prompt this row gets, None for all of it. token_types:
    BERT's sentence numbers. fields: the row's columns as text, for templates. choices: the row with each wrong choice
    in the place of its completion; compared: whether a training batch holds them beside it.
    """

    ids: list[int]
    labels: list[int]
    fields: dict[str, str] = field(default_factory=dict)
    slots: list[int] | None = None
    label: int | None = None
    virtual_tokens: int | None = None
    token_types: list[int] | None = None
    choices: list[Example] | None = None
    compared: bool = False

    @property
    def prompt_length(self) -> int:
        """Number of tokens before the first trained one."""
        return next((i for i, label in enumerate(self.labels) if label != IGNORE), len(self.labels))


def at_mask(ids: list[int], mask: int, target: list[int]) -> tuple[list[int], list[int]]:
    """(ids, labels) with as many `mask` as `target` has tokens where the first of `ids` stood, and these to be told."""
    at = ids.index(mask)
    after = len(ids) - at - 1
    return ids[:at] + [mask] * len(target) + ids[at + 1 :], [IGNORE] * at + target + [IGNORE] * after
