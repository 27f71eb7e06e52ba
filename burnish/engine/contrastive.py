"""Contrastive search: likely tokens that do not lead back to what was said.

    x = argmax over the top k of (1 - a) p(v | x_<t) - a max_j cos(h_v, h_j)

with h the last hidden states and a `penalty_alpha`. Source: "A Contrastive Framework for Neural Text Generation" (arXiv
2202.06417), section 4.2. Every candidate is run once, and the one that is chosen keeps its states and its logits, so
that a step is one forward over k rows a prompt. A reply begins with the likeliest token's competition like any other.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from burnish import chain
from burnish.chain import Model
from burnish.engine.chooser import Chooser, not_numbers
from burnish.engine.decoding import GenerationConfig
from burnish.engine.reply import Ends, Piece, Row, begin, routes
from burnish.engine.sampling import NEVER


def contrastive_search(model: Model, rows: list[Row], config: GenerationConfig, ends: Ends) -> Iterator[Piece]:
    """Prefill, then one token a row and step until every row is done."""
    net, choose, k = model.net, Chooser(model, config, ends), config.top_k
    batch, cache = begin(model, rows, config.max_new_tokens)
    hidden = chain.forward(model, batch, cache)  # (B, T, H)
    past = F.normalize(hidden.float(), dim=-1)
    padding = ~batch["attention_mask"].bool()
    logits = net.logits(hidden[:, -1])
    owners = [row for row in rows for _ in range(k)]
    copies = torch.arange(len(rows), device=model.device).repeat_interleave(k)
    for step in range(config.max_new_tokens):
        scores = choose.scores(logits.float(), rows, [row.ids for row in rows], step)
        chances, tokens = scores.softmax(dim=-1).topk(k)  # (B, k)
        cache.select(copies)
        new = chain.forward(model, {"input_ids": tokens.view(-1, 1), **routes(model, owners)}, cache)  # (B k, 1, H)
        states = F.normalize(new.float(), dim=-1).view(len(rows), k, -1)
        likeness = states @ past.transpose(1, 2)  # (B, k, T)
        likeness[..., : padding.shape[1]].masked_fill_(padding[:, None], -1.0)
        likeness = likeness.amax(dim=-1)
        merit = (1 - config.penalty_alpha) * chances - config.penalty_alpha * likeness
        for row, broken in zip(rows, merit.isnan().any(dim=1).tolist(), strict=True):
            if broken and not row.done:  # else it would win
                raise not_numbers(row, step)
        chosen = merit.masked_fill(chances == 0, NEVER).argmax(dim=-1)  # where fewer than k may follow
        kept = torch.arange(len(rows), device=model.device) * k + chosen
        cache.select(kept)
        past = torch.cat((past, states[torch.arange(len(rows)), chosen, None]), dim=1)
        logits = net.logits(new[kept, -1])
        picked = tokens.gather(1, chosen[:, None])[:, 0].tolist()
        yield from [row.push(token, ends) for row, token in zip(rows, picked, strict=True) if not row.done]
        if all(row.done for row in rows):
            return
