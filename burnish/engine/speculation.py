"""Speculation: guess several tokens, run them all at once, and keep those that would have been chosen anyway.

The guesses are what followed the last time that the text's last tokens stood in it (prompt look-up decoding). A forward
over the last token and the guesses gives the model's choice after each; the guesses are kept up to the first that is
not the choice, which then takes its place. A choice drawn at random is drawn as it would be without guesses, from the
same source, so that the reply, greedy or sampled, is the plain loop's. Source: "Fast Inference from Transformers via
Speculative Decoding" (arXiv 2211.17192), section 2.3, of which this is the case of a sure guess. Rows keep different
guesses, so each goes alone. Limits: not for models that keep a state instead of keys and values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from burnish import chain
from burnish.chain import Model
from burnish.config import UserError
from burnish.engine.chooser import Chooser
from burnish.engine.decoding import GenerationConfig
from burnish.engine.reply import Ends, Piece, Row, begin, routes

LONGEST = 3  # tokens at the text's end that are looked up


def looked_up(text: Sequence[int], count: int) -> list[int]:
    """What followed the latest earlier place of the text's last tokens, as many as agree; at most `count` tokens."""
    for size in range(min(LONGEST, len(text) - 1), 0, -1):
        tail = list(text[-size:])
        for start in range(len(text) - size - 1, -1, -1):
            if text[start] == tail[0] and list(text[start : start + size]) == tail:
                return list(text[start + size : start + size + count])
    return []


def speculate(model: Model, rows: list[Row], config: GenerationConfig, ends: Ends) -> Iterator[Piece]:
    """Every row to its end, one after another."""
    choose = Chooser(model, config, ends)
    for row in rows:
        batch, cache = begin(model, [row], config.max_new_tokens + config.prompt_lookup_num_tokens)
        if not cache.shortens:
            raise UserError(
                f"prompt_lookup_num_tokens: a {model.spec.family} model keeps a state that cannot be taken back; leave "
                "speculation away"
            )
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
            guesses = looked_up([*row.prompt, *row.ids], min(config.prompt_lookup_num_tokens, row.limit - len(row.ids)))
            ids = torch.tensor([[row.ids[-1], *guesses]], device=model.device)
            batch = {"input_ids": ids, **routes(model, [row])}
