"""Prompt tuning: trained embeddings in front of the input, the model frozen.

    [P_1 .. P_n, e(x_1) .. e(x_T)]

Source: "The Power of Scale for Parameter-Efficient Prompt Tuning" (arXiv 2104.08691), sections 2 and 3.2 (start from
sampled vocabulary, from uniform noise in [-0.5, 0.5], or from the class words: one pseudo token each, the mean of a
word's tokens, and sampled vocabulary after them). Limits: it lengthens the input by n tokens, and lags full
tuning on small models. On an encoder that classifies by its first token the pseudo tokens stand after it, so that [CLS]
stays first; of an encoder-decoder they are in the encoder's input (section 2).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
from torch import Tensor, nn

from burnish.config import UserError, option
from burnish.model import soft
from burnish.model.bundle import Context, Model
from burnish.model.example import IGNORE, Example

NAME = "prompt_tuning"


@dataclass(frozen=True)
class Config:
    """How many pseudo tokens, and how they start."""

    num_virtual_tokens: int = option(20, "pseudo tokens before the input")
    init: Literal["vocabulary", "random", "text", "labels"] | None = option(
        None,
        "start from sampled vocabulary, uniform noise, the words of init_text, or the classes' words; none: text or "
        "labels where their words are given, else vocabulary",
    )
    init_text: str | None = option(None, "for init: text, repeated or cut to num_virtual_tokens")
    init_labels: list[str] = option(
        [], "for init: labels; else the classes' names, or the training data's answers, the most frequent first"
    )


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
    """Add the soft prompt and start it as configured; the resolved config says how.

    Raises UserError for words of another start than `init`, for no words, and for a prompt that leaves no position.
    """
    soft.check_length(model.spec, config.num_virtual_tokens, f"technique '{NAME}'")
    config = replace(config, init=start(config))
    if config.init == "text":
        text = config.init_text or ""
        words = soft.repeated(model.tokenizer, text, config.num_virtual_tokens, f"technique '{NAME}'")
    rebuild(model, config)
    table = state(model).embedding
    generator = torch.Generator().manual_seed(context.seed)
    count = config.num_virtual_tokens
    with torch.no_grad():
        if config.init == "random":
            table.copy_(torch.rand(table.shape, generator=generator) - 0.5)
            return config
        rows = torch.randint(model.spec.vocab_size, (count,), generator=generator)
        if config.init == "text":
            rows = words
        table.copy_(model.net.embed(rows.to(model.device)))
        for row, word in enumerate(class_words(model, config, context)[:count] if config.init == "labels" else ()):
            table[row] = model.net.embed(torch.tensor(word, device=model.device)).float().mean(0)
    return config


def start(config: Config) -> Literal["vocabulary", "random", "text", "labels"]:
    """The start that a config asks for. Raises UserError for words that belong to another one."""
    words = {"text": config.init_text is not None, "labels": bool(config.init_labels)}
    given = [kind for kind, has in words.items() if has]
    if len(given) > 1 or (config.init is not None and given and given != [config.init]):
        said = [f"init: {config.init}"] * (config.init is not None) + [f"init_{kind}" for kind in given]
        raise UserError(f"technique '{NAME}': {' and '.join(said)} are different starts; keep one of them")
    return config.init or ("text" if words["text"] else "labels" if words["labels"] else "vocabulary")


def class_words(model: Model, config: Config, context: Context) -> list[list[int]]:
    """The ids of every class word. Raises UserError where neither the config nor the data has one."""
    names = config.init_labels
    if not names and model.spec.head == "classification":
        names = list(model.hf_config.get("id2label", {}).values())
    if names:
        words = [model.tokenizer(name, add_special_tokens=False)["input_ids"] for name in names]
    else:
        skipped = {IGNORE}
        if context.examples:
            skipped |= set(model.tokenizer.all_special_ids) - {model.tokenizer.unk_token_id}
        answers = Counter(tuple(x for x in example.labels if x not in skipped) for example in context.examples)
        words = [list(answer) for answer, _ in answers.most_common()]
    words = [word for word in words if word]
    if not words:
        raise UserError(f"technique '{NAME}': init is 'labels' and no class word is known; list them in init_labels")
    return words


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
