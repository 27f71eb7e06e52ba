"""P-tuning: pseudo tokens anywhere in a template, written by a small prompt encoder.

    h_i = MLP([LSTM_fwd(e)_i : LSTM_bwd(e)_i]),    MLP = Linear, ReLU, Linear

The encoder (embedding, two-layer bidirectional LSTM with half the hidden size per direction, two-layer MLP) makes the
pseudo tokens depend on each other; the language model is frozen. After training `finalize` keeps only the encoder's
output embeddings. Source: "GPT Understands, Too" (arXiv 2103.10385), section 3.2; on SuperGLUE (section 4.2) the model
trains with the prompts: [full, p_tuning]. Limits: for small models a plain embedding ends close to the LSTM
(`encoder: embedding`), and it lengthens the input by the pseudo tokens.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from burnish.config import UserError, nearest, option
from burnish.model import soft
from burnish.model.bundle import Context, Model
from burnish.model.example import IGNORE, Example, at_mask

NAME = "p_tuning"
MASK = "[MASK]"
GROUP, COUNT = re.compile(r"\[P\*[^\]]*\]"), re.compile(r"\[P\*0*[1-9]\d*\]")
PART = re.compile(r"\[P(?:\*(\d+))?\]|\{(\w+)\}")


@dataclass(frozen=True)
class Config:
    """The template and its encoder."""

    template: str = option(
        "[P*3] {prompt} [P*3]",
        "[P*n] is n pseudo tokens, {prompt} the example's prompt, {column} a column's text, [MASK] the place of a "
        "masked language model's completion, which else follows; the rest is literal text",
    )
    encoder: Literal["lstm", "mlp", "embedding"] = option(
        "lstm", "what writes the pseudo tokens: LSTM and MLP, the MLP alone, or an embedding for each"
    )
    learning_rate: float = option(0.0, "the prompt encoder's own; 0: the run's")
    finalized: bool = option(False, "follows: whether only the encoder's outputs are left")


class PromptEncoder(nn.Module):
    """() -> (n, hidden) pseudo token embeddings in float32."""

    def __init__(self, count: int, hidden: int, kind: str, first: int):
        super().__init__()
        self.num_slots, self.first, self.kind = count, first, kind
        self.embedding = nn.Embedding(count, hidden)
        if kind == "lstm":
            self.lstm = nn.LSTM(hidden, hidden // 2, num_layers=2, bidirectional=True)
        if kind in ("lstm", "mlp"):
            self.mlp = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, hidden))

    def forward(self) -> Tensor:
        table = self.embedding.weight
        if self.kind == "lstm":
            table = self.lstm(table)[0]
        return self.mlp(table) if self.kind in ("lstm", "mlp") else table


def parts(template: str) -> list[tuple[str, str | int]]:
    """The template as ("soft", n), ("field", column) and ("text", words) in order."""
    found: list[tuple[str, str | int]] = []
    end = 0
    for match in PART.finditer(template):
        if match.start() > end:
            found.append(("text", template[end : match.start()]))
        found.append(("field", match[2]) if match[2] else ("soft", int(match[1] or 1)))
        end = match.end()
    if end < len(template):
        found.append(("text", template[end:]))
    return [(kind, value) for kind, value in found if kind != "text" or str(value).strip()]


def state(model: Model) -> PromptEncoder:
    """The prompt encoder of a model that this technique was applied to."""
    return cast(PromptEncoder, model.net.techniques[NAME])


def apply(model: Model, config: Config, context: Context) -> Config:
    """Add the prompt encoder. Raises UserError for a template without pseudo tokens or a column, or with a mask that
    the model does not have, or that shows the answer."""
    found = parts(config.template)
    wrong = next((part for part in GROUP.findall(config.template) if not COUNT.fullmatch(part)), None)
    if wrong is not None:
        raise UserError(
            f"technique '{NAME}': template '{config.template}' has {wrong}; the number of pseudo tokens must be a "
            "positive whole number, as in [P*3]"
        )
    for kind, need in (("soft", "[P*3]"), ("field", "{prompt}")):
        if not any(k == kind for k, _ in found):
            raise UserError(f"technique '{NAME}': template '{config.template}' has no {need}; add it where it belongs")
    soft.check_length(model.spec, sum(int(n) for kind, n in found if kind == "soft"), f"technique '{NAME}'")
    if ("field", "completion") in found:
        raise UserError(
            f"technique '{NAME}': template '{config.template}' shows the model the answer; leave {{completion}} away, "
            "it follows the template"
        )
    if MASK in config.template and not getattr(model.tokenizer, "mask_token", None):
        what = f"a {model.spec.family} {model.spec.kind} has no such token and writes its answer at the end"
        raise UserError(f"technique '{NAME}': template '{config.template}' has {MASK}: {what}; leave it away")
    if config.learning_rate < 0:
        raise UserError(f"technique '{NAME}': learning_rate is {config.learning_rate}; give 0 or more")
    if config.encoder == "lstm" and model.net.embed_tokens.embedding_dim % 2:
        raise UserError(f"technique '{NAME}': the LSTM needs embeddings of an even size; choose encoder: mlp")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(context.seed)
        config = replace(config, finalized=False)
        rebuild(model, config)
    return config


def rebuild(model: Model, config: Config) -> None:
    net = model.net
    count = sum(int(value) for kind, value in parts(config.template) if kind == "soft")
    kind = "embedding" if config.finalized else config.encoder
    width = net.embed_tokens.embedding_dim
    net.techniques[NAME] = PromptEncoder(count, width, kind, soft.first_slot(net)).to(model.device)


def encode(model: Model, config: Config, example: Example) -> Example:
    encoder = state(model)
    mask = getattr(model.tokenizer, "mask_token", None)
    start = example.prompt_length
    target = example.ids[start:]
    ids: list[int] = []
    labels: list[int] = []
    slots: list[int] = []
    types: list[int] = []
    next_slot, left = encoder.first, encoder.num_slots
    if example.virtual_tokens is not None:
        left = min(left, example.virtual_tokens)
    masked = False
    for kind, value in parts(config.template):
        if kind == "soft":
            take = min(int(value), left)
            ids += [0] * take
            labels += [IGNORE] * take
            slots += range(next_slot, next_slot + take)
            next_slot, left = next_slot + int(value), left - take
            continue
        if (kind, value) == ("field", "prompt"):
            types += [0] * (len(ids) - len(types)) + (example.token_types or [])[:start]
            new, new_slots = example.ids[:start], example.slots[:start] if example.slots else None
        else:
            text = str(value).replace(MASK, mask or MASK) if kind == "text" else column(example, str(value))
            new, new_slots = model.tokenizer(text, add_special_tokens=False)["input_ids"], None
        new_labels = [IGNORE] * len(new)
        if kind == "text" and mask and mask in text:
            new, new_labels = at_mask(new, model.tokenizer.mask_token_id, target)
            masked = True
        ids, labels, slots = ids + new, labels + new_labels, slots + (new_slots or [-1] * len(new))
    if not masked:
        asked = [(x, y) for x, y in zip(target, example.labels[start:], strict=True) if y != IGNORE]
        if model.spec.head == "masked_lm" and asked and all(x == y for x, y in asked):
            raise UserError(
                f"technique '{NAME}': template '{config.template}' shows the model the answer that it is to give; "
                f"write {MASK} where the answer belongs"
            )
        ids, labels = ids + target, labels + example.labels[start:]
        slots += example.slots[start:] if example.slots else [-1] * len(target)
    types += [0] * (len(ids) - len(types))
    return replace(example, ids=ids, labels=labels, slots=slots, token_types=types if example.token_types else None)


def column(example: Example, name: str) -> str:
    """The text of a column that the template names."""
    if name not in example.fields:
        have = ", ".join(example.fields) or "none"
        raise UserError(
            f"technique '{NAME}': template names {{{name}}}{nearest(name, example.fields)}; "
            f"the data's columns are: {have}; generate takes others by --values '{{{name}: text}}'"
        )
    return example.fields[name]


def embed(model: Model, config: Config, embeds: Tensor, slots: Tensor) -> Tensor:
    encoder = state(model)
    return soft.fill(embeds, slots, encoder(), encoder.first)


def parameter_groups(model: Model, config: Config, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
    if not config.learning_rate:
        return []
    own = list(state(model).parameters())
    groups = [(weight_decay, [p for p in own if p.ndim > 1]), (0.0, [p for p in own if p.ndim <= 1])]
    return [{"params": part, "lr": config.learning_rate, "weight_decay": decay} for decay, part in groups]


def finalize(model: Model, config: Config) -> Config:
    """Keep the encoder's outputs as a plain embedding; the LSTM and MLP are dropped."""
    encoder = state(model)
    with torch.no_grad():
        table = encoder()
    plain = PromptEncoder(encoder.num_slots, table.shape[1], "embedding", encoder.first).to(table.device)
    plain.embedding.weight = nn.Parameter(table)
    model.net.techniques[NAME] = plain
    return replace(config, finalized=True)
