"""Replies that a grammar allows: one of several texts, or JSON of a schema; llguidance works out which tokens go on."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from burnish.chain import Model
from burnish.config import UserError
from burnish.engine.decoding import GenerationConfig
from burnish.engine.reply import Generation
from burnish.engine.sampling import NEVER


class Guide:
    """What may follow a reply. Raises UserError without llguidance, and for a schema that it cannot follow."""

    def __init__(self, model: Model, choices: list[str], schema: dict[str, Any], ends: list[int]):
        try:
            import llguidance.hf
            import llguidance.numpy
        except ImportError:
            raise UserError("choices and json_schema need llguidance: pip install 'burnish[guided]'") from None
        self.kernels, self.ends = llguidance.numpy, ends
        matcher = llguidance.LLMatcher
        if choices:  # a space may come first, as words in the middle of a text begin with it
            grammar = matcher.grammar_from_regex(f" ?({'|'.join(map(re.escape, choices))})")
        else:
            grammar = matcher.grammar_from_json_schema(json.dumps(schema), overrides={"whitespace_flexible": False})
        reason = matcher.validate_grammar(grammar)
        if reason:
            raise UserError(f"json_schema: {' '.join(reason.split())}")
        size = model.spec.vocab_size
        tokenizer = llguidance.hf.from_tokenizer(whole(model.tokenizer), size, ends or None)
        self.matcher = matcher(tokenizer, grammar)
        self.mask = self.kernels.allocate_token_bitmask(1, size)  # (1, size / 32) int32, a token a bit

    def __call__(self, logits: Tensor, texts: Sequence[list[int]]) -> Tensor:
        """logits (B, V) with -inf for what may not follow each row's reply so far."""
        allowed = torch.zeros(logits.shape, dtype=torch.bool)
        for row, text in enumerate(texts):
            self.matcher.reset()
            taken = self.matcher.try_consume_tokens(text)  # a refused token would break the matcher for good
            if taken < len(text) or self.matcher.is_stopped():  # a beam without chance, or nothing but the end goes on
                allowed[row, self.ends or slice(None)] = True
                continue
            self.kernels.fill_next_token_bitmask(self.matcher, self.mask)
            bits = torch.from_numpy(self.mask).view(torch.uint8)[0, :, None] >> torch.arange(8) & 1
            allowed[row] = bits.flatten()[: logits.shape[1]].bool()
        return logits.masked_fill(~allowed.to(logits.device), NEVER)


def cut(done: Generation, config: GenerationConfig) -> str:
    """What to tell of a reply that ended by its length before it was what `choices` or `json_schema` ask for, or ""."""
    if done.finish_reason != "length" or not (config.choices or config.json_schema):
        return ""
    whole = any(done.text in (text, f" {text}") for text in config.choices) if config.choices else _is_json(done.text)
    what = "one of choices" if config.choices else "the JSON that json_schema asks for"
    return "" if whole else f"the reply was cut off before it was {what}; raise max_new_tokens"


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def whole(tokenizer: Any) -> Any:
    """The tokenizer as transformers' own class."""
    tokenizer.all_special_ids  # noqa: B018  a lazy one turns into it
    return tokenizer
