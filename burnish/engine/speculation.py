"""Speculation: guess several tokens, run them all at once, and keep those that would have been chosen anyway.

The guesses are what followed the last time that the text's last tokens stood in it (prompt look-up decoding), or the
likeliest tokens of a smaller model of the same vocabulary, an n-gram model say, as long as it is sure. A forward over
the last token and the guesses gives the model's choice after each; the guesses are kept up to the first that is not the
choice, which then takes its place. A choice drawn at random is drawn as it would be without guesses, from the same
source, so that the reply, greedy or sampled, is the plain loop's. Source: "Fast Inference from Transformers via
Speculative Decoding" (arXiv 2211.17192), section 2.3, of which this is the case of a sure guess. Rows keep different
guesses, so each goes alone. Limits: not for models that keep a state instead of keys and values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch

from burnish import chain
from burnish.chain import Model
from burnish.config import UserError
from burnish.engine.chooser import Chooser
from burnish.engine.decoding import GenerationConfig
from burnish.engine.reply import Ends, Piece, Row, begin, routes
from burnish.model.ngram import NGram
from burnish.store.checkpoint import load

LONGEST = 3  # tokens at the text's end that are looked up
SURE = 0.4  # probability of a smaller model's token below which it is not tried

_load = lru_cache(maxsize=1)(load)  # a conversation asks for the same one at every turn


def looked_up(text: Sequence[int], count: int) -> list[int]:
    """What followed the latest earlier place of the text's last tokens, as many as agree; at most `count` tokens."""
    for size in range(min(LONGEST, len(text) - 1), 0, -1):
        tail = list(text[-size:])
        for start in range(len(text) - size - 1, -1, -1):
            if text[start] == tail[0] and list(text[start : start + size]) == tail:
                return list(text[start + size : start + size + count])
    return []


def assistant(model: Model, path: str) -> Model:
    """The smaller model of a folder. Raises UserError where its tokens are not the model's."""
    found = _load(path)
    ours, theirs = (x.tokenizer and x.tokenizer.get_vocab() for x in (model, found))
    if ours != theirs or not found.spec.generates:
        raise UserError(
            f"assistant_model: {path} is no decoder with this model's tokens; "
            "burnish pretrain --model ngram --tokenizer MODEL makes one"
        )
    return found


class Assistant:
    """Guesses for one row by a smaller model, which keeps up with the row's text."""

    def __init__(self, model: Model, room: int):
        self.net, self.device = model.net, model.device
        self.cache = None if isinstance(model.net, NGram) else model.net.new_cache(1, room)
        self.seen: list[int] = []
        if self.cache is not None and not self.cache.shortens:
            raise UserError("assistant_model: it keeps a state that cannot be taken back; choose another")

    def guess(self, text: Sequence[int], count: int) -> list[int]:
        """Up to `count` tokens after the text."""
        found: list[int] = []
        unread = list(text[-self.net.spec.hidden_size :])  # an n-gram model needs no more than its window
        if self.cache is not None:
            pairs = enumerate(zip(self.seen, text[:-1], strict=False))
            same = next((at for at, (old, new) in pairs if old != new), min(len(self.seen), len(text) - 1))
            self.cache.shorten(same)
            self.seen, unread = list(text[:same]), list(text[same:])
        while len(found) < count:
            hidden = self.net(torch.tensor([unread], device=self.device), cache=self.cache)
            chance, token = self.net.logits(hidden[:, -1]).float().softmax(-1).max(-1)
            self.seen += unread
            if chance < SURE:
                break
            found.append(int(token))
            unread = found[-1:] if self.cache is not None else [*unread, found[-1]][-self.net.spec.hidden_size :]
        return found


def speculate(model: Model, rows: list[Row], config: GenerationConfig, ends: Ends) -> Iterator[Piece]:
    """Every row to its end, one after another."""
    choose = Chooser(model, config, ends)
    helper = assistant(model, config.assistant_model) if config.assistant_model else None
    most = config.num_assistant_tokens if helper else config.prompt_lookup_num_tokens
    for row in rows:
        batch, cache = begin(model, [row], config.max_new_tokens + most)
        if not cache.shortens:
            raise UserError(
                f"speculation: a {model.spec.family} model keeps a state that cannot be taken back; leave "
                "prompt_lookup_num_tokens and assistant_model away"
            )
        beside = helper and Assistant(helper, len(row.past) + config.max_new_tokens + most)
        guesses: list[int] = []
        while not row.done:
            hidden = chain.forward(model, batch, cache)
            logits = model.net.logits(hidden[:, hidden.shape[1] - 1 - len(guesses) :])[0]  # (guesses + 1, V)
            for at, line in enumerate(logits):
                token = int(choose(line[None], [row], len(row.ids)))
                yield row.push(token, ends)
                if row.done or at == len(guesses) or token != guesses[at]:
                    break
            cache.shorten(cache.length - (len(guesses) - at))
            count = min(most, row.limit - len(row.ids))
            guesses = (
                beside.guess([*row.past, *row.ids], count) if beside else looked_up([*row.prompt, *row.ids], count)
            )
            ids = torch.tensor([[row.ids[-1], *guesses]], device=model.device)
            batch = {"input_ids": ids, **routes(model, [row])}
