"""Batches: examples as padded tensors, one a row or several packed into a row.

Packing fills rows first-fit decreasing: the longest example goes first, into the first row with room, else
into a new one, which never takes more than 11/9 of the optimum plus one row (Johnson et al. 1974, "Worst-case
performance bounds for simple one-dimensional packing algorithms", section 3). It is done window by window, so
that the order of the data is roughly kept. `segment_ids` tells the documents of a row apart; attention must
not cross them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from burnish.config import UserError
from burnish.store.data import IGNORED, Example

ALL_VIRTUAL = 2**31 - 1  # `virtual_tokens` of a document that names no length: all of them
WINDOW = 1024  # examples packed together


def collate(examples: Sequence[Example], pad_id: int, side: str = "right", multiple_of: int = 1) -> dict[str, Tensor]:
    """A batch with one example a row, padded on `side` to the longest, rounded up to `multiple_of`.

    input_ids, labels, position_ids, segment_ids (B, T) int64; attention_mask (B, T) bool; and where any
    example has them slots, token_type_ids, virtual_tokens (B, T) int64 and label (B,) int64. Positions count
    real tokens from 0. Segment 0 is padding, 1 the document. A label at a document's first token becomes
    -100, as nothing before it predicts it.
    """
    width = max(len(example.ids) for example in examples)
    batch = _tensors([[example] for example in examples], pad_id, -(-width // multiple_of) * multiple_of, side)
    if any(example.label is not None for example in examples):
        batch["label"] = torch.tensor([IGNORED if example.label is None else example.label for example in examples])
    return batch


def collate_pairs(
    examples: Sequence[Example], pad_id: int, start: int, side: str = "right", multiple_of: int = 1
) -> dict[str, Tensor]:
    """A batch for an encoder-decoder: `collate`'s of the targets, each after the token `start`, and beside it
    source_input_ids, source_attention_mask and, where there are any, source_slots (B, S) of what precedes them.

    Raises UserError for an example without a source.
    """
    sources, targets = [], []
    for example in examples:
        cut = example.prompt_length
        if not cut:
            raise UserError("an encoder-decoder reads a source before it writes: give every example a prompt")
        slots = example.slots and example.slots[:cut]
        sources.append(replace(example, ids=example.ids[:cut], labels=example.labels[:cut], slots=slots))
        ids, labels = [start, *example.ids[cut:]], [IGNORED, *example.labels[cut:]]
        targets.append(replace(example, ids=ids, labels=labels, slots=None, token_types=None))
    source = collate(sources, pad_id, side, multiple_of)
    read = {f"source_{name}": source[name] for name in ("input_ids", "attention_mask", "slots") if name in source}
    return {**collate(targets, pad_id, side, multiple_of), **read}


def pack(examples: Sequence[Example], max_length: int) -> list[list[Example]]:
    """Rows of whole examples with at most `max_length` tokens each, every example in exactly one row; the
    same for the same input.

    Raises UserError if an example alone is longer than a row.
    """
    rows: list[list[Example]] = []
    for start in range(0, len(examples), WINDOW):
        window = examples[start : start + WINDOW]
        bins: list[list[int]] = []
        room: list[int] = []
        for i in sorted(range(len(window)), key=lambda i: -len(window[i].ids)):
            size = len(window[i].ids)
            if size > max_length:
                raise UserError(
                    f"example {start + i + 1} has {size} tokens, a packed row {max_length}; raise max_length"
                )
            place = next((b for b, left in enumerate(room) if left >= size), len(bins))
            if place == len(bins):
                bins.append([])
                room.append(max_length)
            bins[place].append(i)
            room[place] -= size
        rows += [[window[i] for i in members] for members in sorted(sorted(members) for members in bins)]
    return rows


def collate_packed(rows: Sequence[Sequence[Example]], pad_id: int, max_length: int | None = None) -> dict[str, Tensor]:
    """A batch with one packed row of examples a row, padded on the right to `max_length`, or to the longest
    row without it.

    As `collate`'s, except that positions restart at each document and segments count 1, 2, 3, .... Raises
    UserError for a row that is too long, for examples with a class, of which a packed row has no single one, and
    for those to be compared with their wrong choices.
    """
    if any(example.label is not None for row in rows for example in row):
        raise UserError("classified examples cannot be packed, as a row has one class; set packing: false")
    if any(example.compared for row in rows for example in row):
        raise UserError("rows whose choices are compared cannot be packed; set packing: false")
    longest = max(sum(len(example.ids) for example in row) for row in rows)
    if max_length is not None and longest > max_length:
        raise UserError(
            f"a packed row has {longest} tokens, more than max_length={max_length}; pack with the same length"
        )
    return _tensors(rows, pad_id, max_length or longest, "right")


def _tensors(rows: Sequence[Sequence[Example]], pad_id: int, width: int, side: str) -> dict[str, Tensor]:
    examples = [example for row in rows for example in row]
    columns: dict[str, list[list[int]]] = {
        "input_ids": [],
        "labels": [],
        "position_ids": [],
        "segment_ids": [],
    }
    for name, attribute in (
        ("slots", "slots"),
        ("token_type_ids", "token_types"),
        ("virtual_tokens", "virtual_tokens"),
    ):
        if any(getattr(example, attribute) is not None for example in examples):
            columns[name] = []
    padding = {"input_ids": pad_id, "labels": IGNORED, "slots": -1}
    for row in rows:
        line: dict[str, list[int]] = {name: [] for name in columns}
        for segment, example in enumerate(row, start=1):
            size = len(example.ids)
            allowed = ALL_VIRTUAL if example.virtual_tokens is None else example.virtual_tokens
            values = {
                "input_ids": example.ids,
                "labels": [IGNORED, *example.labels[1:]],
                "position_ids": range(size),
                "segment_ids": [segment] * size,
                "slots": [-1] * size if example.slots is None else example.slots,
                "token_type_ids": [0] * size if example.token_types is None else example.token_types,
                "virtual_tokens": [allowed] * size,
            }
            for name in columns:
                line[name] += values[name]
        for name, cells in line.items():
            pads = [padding.get(name, 0)] * (width - len(cells))
            columns[name].append(pads + cells if side == "left" else cells + pads)
    batch = {name: torch.tensor(cells) for name, cells in columns.items()}
    batch["attention_mask"] = batch["segment_ids"] > 0
    return batch
