"""Prompt tuning: trained embeddings in front of the input, the model frozen.

    [P_1 .. P_n, e(x_1) .. e(x_T)]

Source: "The Power of Scale for Parameter-Efficient Prompt Tuning" (arXiv 2104.08691), sections 2 and 3.2 (start from
sampled vocabulary, or from uniform noise in [-0.5, 0.5]). Limits: it lengthens the input by n tokens, and lags full
tuning on small models. On an encoder that classifies by its first token the pseudo tokens stand after it, so that [CLS]
stays first; of an encoder-decoder they are in the encoder's input (section 2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from burnish.config import UserError
from burnish.model import soft
from burnish.model.bundle import Context, Model
from burnish.model.example import Example

NAME = "prompt_tuning"


@dataclass(frozen=True)
class Config:
    """`init_text` starts from the embeddings of these words (repeated or cut to length) when init is "text"."""

    num_virtual_tokens: int = 20
    init: Literal["vocabulary", "random", "text"] = "vocabulary"
    init_text: str = ""


class SoftPrompt(nn.Module):
    """n trained embeddings, (n, hidden) in float32."""

    def __init__(self, count: int, hidden: int, first: int, device: torch.device):
        super().__init__()
        self.num_slots, self.first = count, first
        self.embedding = nn.Parameter(torch.zeros(count, hidden, device=device))


def state(model: Model) -> SoftPrompt:
    """The soft prompt of a model that this technique was applied to."""
    return cast(SoftPrompt, model.net.techniques[NAME])


def apply(model: Model, config: Config, context: Context) -> Config:
    """Add the soft prompt and start it as configured."""
    if config.num_virtual_tokens < 1:
        raise UserError(f"technique '{NAME}': num_virtual_tokens is {config.num_virtual_tokens}; at least 1 is needed")
    rebuild(model, config)
    prompt = state(model)
    rows = torch.empty(0, dtype=torch.long)
    generator = torch.Generator().manual_seed(context.seed)
    count = config.num_virtual_tokens
    with torch.no_grad():
        if config.init == "random":
            prompt.embedding.copy_(torch.rand(prompt.embedding.shape, generator=generator) - 0.5)
        elif config.init == "vocabulary":
            rows = torch.randint(model.spec.vocab_size, (count,), generator=generator)
        else:
            ids = model.tokenizer(config.init_text, add_special_tokens=False)["input_ids"]
            if not ids:
                raise UserError(f"technique '{NAME}': init is 'text' and init_text is empty; give init_text some words")
            rows = torch.tensor([ids[i % len(ids)] for i in range(count)])
        if len(rows):
            prompt.embedding.copy_(model.net.embed(rows.to(model.device)))
    return config


def rebuild(model: Model, config: Config) -> None:
    net = model.net
    first = soft.first_slot(net)
    net.techniques[NAME] = SoftPrompt(config.num_virtual_tokens, net.embed_tokens.embedding_dim, first, model.device)


def encode(model: Model, config: Config, example: Example) -> Example:
    prompt = state(model)
    count = config.num_virtual_tokens if example.virtual_tokens is None else example.virtual_tokens
    count = min(count, config.num_virtual_tokens)
    marked = model.spec.kind == "encoder" and not model.spec.mean_pool
    at = min(1, len(example.ids)) if marked else 0
    return soft.insert(example, at, [prompt.first + i for i in range(count)])


def embed(model: Model, config: Config, embeds: Tensor, slots: Tensor) -> Tensor:
    prompt = state(model)
    return soft.fill(embeds, slots, prompt.embedding, prompt.first)
