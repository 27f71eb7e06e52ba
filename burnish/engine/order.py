"""From examples to the batches of every step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from burnish import chain
from burnish.chain import Model
from burnish.config import UserError
from burnish.engine.masking import masked
from burnish.engine.settings import TrainConfig
from burnish.model.example import Example
from burnish.store.batch import collate, collate_packed, collate_pairs, pack


def encode(model: Model, examples: Sequence[Example]) -> Sequence[Example]:
    """The examples through the `encode` hooks of the model's techniques, in chain order."""
    encoders = chain.hooks(model, "encode")
    for encoder in encoders:
        examples = [
            replace(encoder(example), choices=example.choices and [encoder(choice) for choice in example.choices])
            for example in examples
        ]
    return examples


def pad_id(model: Model) -> int:
    """The id that fills short rows; any will do where the tokenizer has none, for padding is masked."""
    return getattr(model.tokenizer, "pad_token_id", None) or 0


def collated(model: Model, examples: Sequence[Example], side: str = "right", multiple_of: int = 1) -> dict[str, Tensor]:
    """A batch of encoded examples as the model takes it: `collate`'s, or `collate_pairs`'s for an encoder-decoder."""
    spec = model.spec
    if spec.paired:
        return collate_pairs(examples, pad_id(model), spec.decoder_start, side, multiple_of)
    return collate(examples, pad_id(model), side, multiple_of)


def packed(model: Model, rows: Sequence[Sequence[Example]], max_length: int) -> dict[str, Tensor]:
    """A batch of packed rows. Raises UserError for an encoder-decoder."""
    if model.spec.paired:
        raise UserError("packing: an encoder-decoder's rows are not packed; set packing: false")
    return collate_packed(rows, pad_id(model), max_length)


class Order:
    """Which examples make which step: a function of (seed, epoch) alone."""

    def __init__(self, model: Model, examples: Sequence[Example], config: TrainConfig):
        self.model, self.examples, self.config = model, examples, config

    def epoch(self, number: int) -> list[list[list[Any]]]:
        """Steps of micro-batches of rows; a row is an example, or the examples packed into it."""
        config = self.config
        generator = torch.Generator().manual_seed((config.seed << 20) + number)
        order = torch.randperm(len(self.examples), generator=generator).tolist()
        examples = self.examples
        if config.mlm_probability:
            examples = masked(examples, self.model.tokenizer, config.mlm_probability, config.seed, number)
        rows: list[Any] = [examples[index] for index in order]
        if config.packing:
            rows = pack(rows, config.max_length)
        return _split(_split(rows, config.per_device_train_batch_size), config.gradient_accumulation_steps)

    def batch(self, rows: list[Any]) -> dict[str, Tensor]:
        if self.config.packing:
            return packed(self.model, rows, self.config.max_length)
        groups = [[example, *(example.choices or ())] if example.compared else [example] for example in rows]
        batch = collated(self.model, [example for group in groups for example in group], multiple_of=8)
        if any(example.compared for example in rows):  # 0: the right one, with which each row's choices begin
            batch["choice"] = torch.tensor([number for group in groups for number in range(len(group))])
        return batch


def _split(items: list[Any], size: int) -> list[list[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
