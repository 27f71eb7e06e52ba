"""The next tokens of rows, from their logits: penalties, what may not come, and the choice."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from burnish.chain import Model
from burnish.config import UserError
from burnish.engine import sampling
from burnish.engine.decoding import GenerationConfig
from burnish.engine.guide import Guide
from burnish.engine.reply import Ends, Row


def first_id(model: Model) -> int | None:
    """The token that an encoder-decoder's text begins with, where its configs name one (BART's)."""
    name = "forced_bos_token_id"
    return model.generation_config.get(name, model.hf_config.get(name)) if model.spec.paired else None


def not_numbers(row: Row, step: int) -> UserError:
    """That a model gives a row NaN for token number `step` of its reply."""
    return UserError(
        f"{row.name}: the model's logits are not numbers (NaN) at token {step + 1}"
        " of the reply; its weights are broken, or overflow: load it in bf16 or fp32 (--dtype fp32)"
    )


class Chooser:
    """Choices for rows that may leave or change places; a row's are apart from the others'."""

    def __init__(self, model: Model, config: GenerationConfig, ends: Ends):
        self.config, self.vocab = config, model.spec.vocab_size
        self.forced = first_id(model)
        self.guide: Guide | None = None
        if config.choices or config.json_schema:
            self.guide = Guide(model, config.choices, config.json_schema, sorted(ends))
        self.eos = [token for token, reason in ends.items() if reason == "eos"]

    def likeliest(self, step: int) -> bool:
        """Whether token number `step` of a reply is the likeliest as the model has it."""
        config = self.config
        changes = (config.presence_penalty, config.frequency_penalty, config.no_repeat_ngram_size, self.guide)
        free = config.repetition_penalty == 1 and not config.do_sample and not any(changes)
        return free and 0 < step >= config.min_new_tokens

    def scores(self, logits: Tensor, rows: Sequence[Row], texts: Sequence[list[int]], step: int) -> Tensor:
        """logits (B, V) in float32 after penalties and bans, for token number `step` of the rows' replies `texts`.

        Sequences that may not come twice are the last ban: it is lifted for a row's token where it would leave none, so
        that a reply is always one of `choices`, or of the schema. Raises UserError where the model gives none.
        """
        config = self.config
        broken = logits.isnan().any(dim=1).nonzero()
        if len(broken):
            raise not_numbers(rows[int(broken[0])], step)
        if config.repetition_penalty != 1:
            seen = self.counted(logits, [[*row.past, *text] for row, text in zip(rows, texts, strict=True)])
            logits = sampling.repetition_penalty(logits, seen > 0, config.repetition_penalty)
        if step and (config.presence_penalty or config.frequency_penalty):
            counts = self.counted(logits, texts)
            logits = sampling.count_penalty(logits, counts, config.presence_penalty, config.frequency_penalty)
        if self.guide:
            logits = self.guide(logits, texts)
        if step == 0 and self.forced is not None:
            logits = torch.full_like(logits, sampling.NEVER)
            logits[:, self.forced] = 0.0
        if step < config.min_new_tokens:
            logits = logits.index_fill(
                1, torch.tensor(self.eos, device=logits.device, dtype=torch.long), sampling.NEVER
            )
        if config.no_repeat_ngram_size:
            whole = [[*row.past, *text] for row, text in zip(rows, texts, strict=True)]
            banned = sampling.no_repeat_ngram(logits, whole, config.no_repeat_ngram_size)
            logits = torch.where((banned > sampling.NEVER).any(dim=1, keepdim=True), banned, logits)
        return logits

    def __call__(self, logits: Tensor, rows: Sequence[Row], step: int) -> Tensor:
        """Token number `step` (B,) of each row: drawn, or the most likely."""
        config = self.config
        logits = self.scores(logits.float(), rows, [row.ids for row in rows], step)
        if not config.do_sample:
            return logits.argmax(dim=-1)
        warped = sampling.warp(logits, config.temperature, config.top_k, config.top_p, config.min_p, config.typical_p)
        return sampling.sample(warped, [row.draws() for row in rows])

    def counted(self, logits: Tensor, texts: Sequence[Sequence[int]]) -> Tensor:
        """How often each token stands in each text, (B, V)."""
        flat = torch.tensor([token for text in texts for token in text], dtype=torch.long, device=logits.device)
        sizes = torch.tensor([len(text) for text in texts], device=logits.device)
        rows = torch.arange(len(texts), device=logits.device).repeat_interleave(sizes)
        return torch.bincount(rows * self.vocab + flat, minlength=logits.numel()).view(logits.shape)
