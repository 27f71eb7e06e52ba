"""Beam search: several continuations of a prompt at a time, of which the likeliest is given.

Of all the beams' next tokens the best `num_beams` go on; one that ends a reply and is among the best leaves its beam
with the score log p(reply) / length^length_penalty. A prompt is done when no running beam can beat the replies that it
has, or, with `early_stopping`, when it has as many as beams: what transformers does. Diverse beam search (arXiv
1610.02424, section 4) divides the beams into groups, each of which sees its scores lessened by `diversity_penalty` for
each earlier group that took the same token in this step. A stop text cuts the reply that was found.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from burnish.chain import Model
from burnish.engine.chooser import Chooser
from burnish.engine.decoding import GenerationConfig
from burnish.engine.reply import Ends, Piece, Row, after, begin, routes

UNLIKELY = -1e9  # of beams that are not begun yet


@dataclass
class Group:
    """The beams of one prompt that compete: their scores and replies, and those that have ended."""

    scores: list[float]
    texts: list[list[int]]
    ended: list[tuple[float, list[int]]] = field(default_factory=list)
    done: bool = False

    def advance(self, best: list[tuple[float, int, int]], step: int, ends: Ends, config: GenerationConfig) -> list[int]:
        """Take the candidates (score, beam, token), best first; returns the beams that those which go on come from."""
        count, last = len(self.texts), step + 1 == config.max_new_tokens
        running, came = [], []
        for rank, (score, beam, token) in enumerate(best):
            text = [*self.texts[beam], token]
            if token not in ends and not last:
                running.append((score, beam, text))
            elif rank < count and not self.done:
                came.append((score / (step + 1) ** config.length_penalty, text))
        self.ended = sorted([*self.ended, *came], key=lambda pair: -pair[0])[:count]
        running = running[:count]
        if last or not running:
            self.done = True
            return list(range(count))
        self.scores, self.texts = [score for score, _, _ in running], [text for _, _, text in running]
        full = len(self.ended) == count
        hopeless = self.scores[0] / (step + 1) ** config.length_penalty <= self.ended[-1][0] if full else False
        self.done = self.done or hopeless or (full and config.early_stopping)
        return [beam for _, beam, _ in running]


def beam_search(model: Model, rows: list[Row], config: GenerationConfig, ends: Ends) -> Iterator[Piece]:
    """The likeliest reply of every row, token by token, once all are found."""
    choose = Chooser(model, config, ends)
    beams, size = config.num_beams, config.num_beams // config.num_beam_groups
    begun = [0.0] + [UNLIKELY] * (size - 1)
    found = [[Group(list(begun), [[] for _ in begun]) for _ in range(config.num_beam_groups)] for _ in rows]
    owners = [row for row in rows for _ in range(beams)]
    width = max(2, 1 + len(ends)) * size
    batch, cache = begin(model, rows, config.max_new_tokens - 1)
    for step in range(config.max_new_tokens):
        logs = after(model, batch, cache).float().log_softmax(dim=-1)
        if step == 0:
            copies = torch.arange(len(rows), device=model.device).repeat_interleave(beams)
            logs = logs[copies]
            cache.select(copies)
        texts = [text for groups in found for group in groups for text in group.texts]
        logs = choose.scores(logs, owners, texts, step).view(len(rows), beams, -1)
        origins: list[int] = []
        best = candidates(logs, found, width, config)
        for row, groups in enumerate(found):
            for number, group in enumerate(groups):
                first = row * beams + number * size
                origins += [first + beam for beam in group.advance(best[row][number], step, ends, config)]
        if all(group.done for groups in found for group in groups):
            break
        if origins != list(range(len(owners))):
            cache.select(torch.tensor(origins, device=model.device))
        tokens = [text[-1] if text else 0 for groups in found for group in groups for text in group.texts]
        batch = {"input_ids": torch.tensor(tokens, device=model.device)[:, None], **routes(model, owners)}
    for owner, groups in zip(rows, found, strict=True):
        _, text = max((pair for group in groups for pair in group.ended), key=lambda pair: pair[0])
        for token in text:
            yield owner.push(token, ends)
            if owner.done:
                break


def candidates(
    logs: Tensor, found: list[list[Group]], width: int, config: GenerationConfig
) -> list[list[list[tuple[float, int, int]]]]:
    """For each prompt and group the `width` best (score, beam of the group, token) of logs (prompts, beams, V)."""
    prompts, beams, vocab = logs.shape
    size = beams // config.num_beam_groups
    best: list[list[list[tuple[float, int, int]]]] = [[] for _ in found]
    taken = torch.zeros(prompts, 1, vocab, device=logs.device)
    for number in range(config.num_beam_groups):
        before = torch.tensor([groups[number].scores for groups in found], device=logs.device)  # (prompts, size)
        part = logs[:, number * size : (number + 1) * size] - config.diversity_penalty * taken
        values, index = (part + before[..., None]).flatten(1).topk(min(width, size * vocab))
        for row, (scores, places) in enumerate(zip(values.tolist(), index.tolist(), strict=True)):
            best[row].append([(s, at // vocab, at % vocab) for s, at in zip(scores, places, strict=True)])
        if config.num_beam_groups > 1:
            chosen = index[:, :size] % vocab
            taken.scatter_add_(2, chosen[:, None], torch.ones_like(chosen, dtype=taken.dtype)[:, None])
    return best
