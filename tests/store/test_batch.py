"""Batches: padding on either side, packing that loses nothing, and documents that stay apart."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from burnish.config import UserError
from burnish.store.batch import ALL_VIRTUAL, collate, collate_packed, pack
from burnish.store.data import Example

PAD = 99


def example(length: int, start: int = 1, **more) -> Example:
    ids = list(range(start, start + length))
    return Example(ids, [-100] * (length // 2) + ids[length // 2 :], **more)


def test_collate_right() -> None:
    batch = collate([example(3), example(5)], PAD)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 99, 99], [1, 2, 3, 4, 5]]
    assert batch["labels"].tolist() == [[-100, 2, 3, -100, -100], [-100, -100, 3, 4, 5]]
    assert batch["attention_mask"].tolist() == [[True] * 3 + [False] * 2, [True] * 5]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 0], [0, 1, 2, 3, 4]]
    assert batch["segment_ids"].tolist() == [[1, 1, 1, 0, 0], [1] * 5]
    assert set(batch) == {"input_ids", "labels", "attention_mask", "position_ids", "segment_ids"}
    assert batch["attention_mask"].dtype == torch.bool
    assert all(batch[name].dtype == torch.int64 for name in ("input_ids", "labels", "position_ids", "segment_ids"))


def test_collate_left() -> None:
    batch = collate([example(3), example(5)], PAD, side="left")
    assert batch["input_ids"].tolist() == [[99, 99, 1, 2, 3], [1, 2, 3, 4, 5]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 2, 3], [-100, -100, 3, 4, 5]]
    assert batch["attention_mask"].tolist() == [[False] * 2 + [True] * 3, [True] * 5]
    assert batch["position_ids"].tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]
    assert batch["segment_ids"].tolist() == [[0, 0, 1, 1, 1], [1] * 5]


def test_collate_rounds_up() -> None:
    assert collate([example(5)], PAD, multiple_of=8)["input_ids"].shape == (1, 8)
    assert collate([example(8)], PAD, multiple_of=8)["input_ids"].shape == (1, 8)


def test_padding_with_the_end_token_still_learns_it() -> None:
    ends = Example([5, 6, PAD], [-100, 6, PAD])
    batch = collate([ends, example(5)], PAD)
    assert batch["labels"][0].tolist() == [-100, 6, PAD, -100, -100]
    assert batch["attention_mask"][0].tolist() == [True, True, True, False, False]


def test_first_token_is_never_learnt_as_padding_would_predict_it() -> None:
    text = Example([7, 8], [7, 8])
    assert collate([text, example(4)], PAD, side="left")["labels"][0].tolist() == [-100, -100, -100, 8]


def test_optional_columns() -> None:
    first = example(3, slots=[0, 1, -1], label=2, virtual_tokens=4, token_types=[0, 1, 1])
    batch = collate([first, example(4)], PAD, side="left")
    assert batch["slots"].tolist() == [[-1, 0, 1, -1], [-1, -1, -1, -1]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 1, 1], [0, 0, 0, 0]]
    assert batch["virtual_tokens"].tolist() == [[0, 4, 4, 4], [ALL_VIRTUAL] * 4]
    assert batch["label"].tolist() == [2, -100]


@given(st.lists(st.integers(1, 32), min_size=1, max_size=60), st.integers(32, 50))
def test_packing_loses_nothing_and_keeps_lengths(lengths: list[int], max_length: int) -> None:
    examples = [example(length, start=100 * i) for i, length in enumerate(lengths)]
    rows = pack(examples, max_length)
    assert all(0 < sum(len(e.ids) for e in row) <= max_length for row in rows)
    assert sorted(id(e) for row in rows for e in row) == sorted(id(e) for e in examples)
    assert rows == pack(examples, max_length)
    firsts = [row[0].ids[0] for row in rows]
    assert firsts == sorted(firsts)
    for i, row in enumerate(rows):  # first fit: nothing in a later row would have fitted into an earlier one
        room = max_length - sum(len(e.ids) for e in row)
        assert not any(sum(len(e.ids) for e in later) <= room for later in rows[i + 1 :])


@given(st.lists(st.integers(1, 16), min_size=1, max_size=40))
def test_packed_tensors_restart_at_each_document(lengths: list[int]) -> None:
    rows = pack([example(length, start=100 * i) for i, length in enumerate(lengths)], 20)
    batch = collate_packed(rows, PAD, 20)
    assert batch["input_ids"].shape == (len(rows), 20)
    for b, row in enumerate(rows):
        at = 0
        for segment, document in enumerate(row, start=1):
            stop = at + len(document.ids)
            assert batch["input_ids"][b, at:stop].tolist() == document.ids
            assert batch["labels"][b, at:stop].tolist() == [-100, *document.labels[1:]]
            assert batch["position_ids"][b, at:stop].tolist() == list(range(len(document.ids)))
            assert (batch["segment_ids"][b, at:stop] == segment).all()
            at = stop
        assert (batch["segment_ids"][b, at:] == 0).all() and (batch["labels"][b, at:] == -100).all()
        assert batch["attention_mask"][b].tolist() == [True] * at + [False] * (20 - at)


def test_packed_virtual_tokens_and_slots_are_per_document() -> None:
    rows = [[example(2, virtual_tokens=3, slots=[0, -1]), example(3)]]
    batch = collate_packed(rows, PAD, 6)
    assert batch["virtual_tokens"].tolist() == [[3, 3, ALL_VIRTUAL, ALL_VIRTUAL, ALL_VIRTUAL, 0]]
    assert batch["slots"].tolist() == [[0, -1, -1, -1, -1, -1]]


def test_packed_without_a_length_is_as_wide_as_its_longest_row() -> None:
    assert collate_packed([[example(2), example(3)], [example(4)]], PAD)["input_ids"].shape == (2, 5)


def test_packing_is_tight() -> None:
    lengths = [random.Random(0).choice((20, 30, 50)) for _ in range(300)]
    rows = pack([example(length) for length in lengths], 100)
    assert len(rows) <= -(-sum(lengths) // 100) * 11 / 9 + 1


def test_packing_errors() -> None:
    with pytest.raises(UserError, match="example 2 has 9 tokens, a packed row 8"):
        pack([example(3), example(9)], 8)
    with pytest.raises(UserError, match="classified examples cannot be packed"):
        collate_packed([[example(3, label=1)]], PAD, 8)
    with pytest.raises(UserError, match="a packed row has 12 tokens"):
        collate_packed([[example(6), example(6)]], PAD, 8)
