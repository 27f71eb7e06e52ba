"""One prompt on its way to a reply, and the batch that a group of prompts begins with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from burnish import chain
from burnish.chain import Model
from burnish.config import UserError
from burnish.engine import sampling
from burnish.engine.decoding import GenerationConfig
from burnish.engine.detokenizer import Detokenizer
from burnish.engine.order import collated
from burnish.model.cache import KVCache
from burnish.model.example import Example

FinishReason = Literal["stop", "length", "eos"]
Ends = Mapping[int, FinishReason]


@dataclass(frozen=True)
class Generation:
    """A finished reply.

    `ids` are the generated tokens, the one that ended it included; `text` leaves special tokens and the stop text
    away. `prompt_tokens` counts real tokens, those that a technique's template adds included, pseudo tokens not.
    """

    text: str
    ids: list[int]
    finish_reason: FinishReason
    prompt_tokens: int


class Piece(NamedTuple):
    """One new token of prompt number `row`, counted from 0, and the text that is certain since: "" while it may turn
    out to belong to a stop text or to a character that is not complete. `done` comes with a reply's last token."""

    row: int
    token: int
    text: str
    done: Generation | None


class Row:
    """One prompt on its way, by its `name` in errors. `past` are the tokens that its reply goes on: of an
    encoder-decoder the first alone."""

    def __init__(
        self, index: int, example: Example, model: Model, config: GenerationConfig, copies: Counter[tuple[int, ...]]
    ):
        slots = example.slots or [-1] * len(example.ids)
        self.index, self.name = index, f"prompt {index + 1}"
        self.example, self.limit = example, config.max_new_tokens
        self.prompt = [token for token, slot in zip(example.ids, slots, strict=True) if slot < 0]
        self.draws = sampling.Draws(config.seed, self.prompt, copies[tuple(self.prompt)])
        copies[tuple(self.prompt)] += 1
        self.past = [model.spec.decoder_start] if model.spec.paired else self.prompt
        self.words = Detokenizer(model.tokenizer, [] if model.spec.paired else self.prompt, config.stop)
        self.ids: list[int] = []
        self.texts: list[str] = []
        self.done: Generation | None = None
        self.adapter = -1

    def push(self, token: int, ends: Ends) -> Piece:
        self.ids.append(token)
        reason = ends.get(token)
        text = "" if reason else self.words.push(token)
        if self.words.stopped:
            reason = "stop"
        elif reason is None and len(self.ids) == self.limit:
            reason = "length"
        if reason and not self.words.stopped:
            text += self.words.flush()
        self.texts.append(text)
        if reason:
            self.done = Generation("".join(self.texts), self.ids, reason, len(self.prompt))
        return Piece(self.index, token, text, self.done)


def routes(model: Model, rows: Sequence[Row]) -> dict[str, Tensor]:
    """The rows' adapters, where there are any."""
    if model.adapters is None:
        return {}
    return {"adapter_ids": torch.tensor([row.adapter for row in rows], device=model.device)}


def batch_of(model: Model, rows: Sequence[Row]) -> tuple[dict[str, Tensor], int]:
    """The prompts as a batch on the model's device, which ends with them, and the length of the prefix before it."""
    side = "right" if model.spec.paired else "left"  # targets begin with one token each
    batch = collated(model, [row.example for row in rows], side)
    batch = {name: tensor.to(model.device) for name, tensor in (batch | routes(model, rows)).items()}
    return batch, max((hook(batch).size for hook in chain.hooks(model, "initial_cache")), default=0)


def begin(model: Model, rows: Sequence[Row], room: int) -> tuple[dict[str, Tensor], KVCache]:
    """The rows' batch, and an empty cache for it and `room` more tokens."""
    batch, prefix = batch_of(model, rows)
    return batch, model.net.new_cache(len(rows), prefix + batch["input_ids"].shape[1] + room)


def after(model: Model, batch: Mapping[str, Tensor], cache: KVCache) -> Tensor:
    """Logits (B, V) of what follows each row of a batch, which the cache then holds; good until the next step."""
    step = model.net.step
    found = step(batch["input_ids"], cache) if step is not None and len(batch) == 1 else None
    return model.net.logits(chain.forward(model, batch, cache)[:, -1]) if found is None else found.logits


def eos_ids(model: Model) -> set[int]:
    """The ids that end a text: the tokenizer's, and those of the generation config."""
    listed = model.generation_config.get("eos_token_id")
    found = {getattr(model.tokenizer, "eos_token_id", None), *(listed if isinstance(listed, list) else [listed])}
    return {token for token in found if token is not None}


def ends_of(model: Model, config: GenerationConfig) -> dict[int, FinishReason]:
    """The tokens that end a reply: the model's own, those asked for, and stop texts that are special tokens, which no
    text shows. Raises UserError for stop_token_ids that the model lacks."""
    for token in config.stop_token_ids:
        if token not in range(model.spec.vocab_size):
            raise UserError(
                f"stop_token_ids: token {token} is none of the model's, 0 to {model.spec.vocab_size - 1}; take the"
                " numbers from its own tokenizer"
            )
    added = {} if model.tokenizer is None else model.tokenizer.added_tokens_decoder
    marks: dict[int, FinishReason] = dict.fromkeys(config.stop_token_ids, "stop")
    marks |= {i: "stop" for i, token in added.items() if token.special and str(token) in config.stop}
    return {**marks, **dict.fromkeys(eos_ids(model), "eos")}
