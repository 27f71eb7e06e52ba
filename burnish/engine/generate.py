"""The generation engine: prompts in, tokens and text out, in batches over a key-value cache.

`stream` deals prompts out to a loop, `generate` collects it. The plain loop is here: a batch is padded on the left,
prefilled in one forward, and then advances one token a row and step, on a GPU's fast path before the host has read
the token. Rows that have ended stay in the batch until half
of it has, and are then dropped from the cache, so that all the copying together moves the cache about once. Beam
search, contrastive search and speculation are loops of their own. None knows a technique: what a technique adds comes
through the hooks of `burnish.chain`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from burnish import chain
from burnish.chain import Model
from burnish.config import UserError
from burnish.device import fetched
from burnish.engine.beams import beam_search
from burnish.engine.chooser import Chooser, not_numbers
from burnish.engine.contrastive import contrastive_search
from burnish.engine.decoding import GenerationConfig
from burnish.engine.order import encode
from burnish.engine.reply import Ends, Generation, Piece, Row, after, batch_of, begin, ends_of, routes
from burnish.engine.speculation import speculate
from burnish.model.example import IGNORE, Example
from burnish.place.fused import fused
from burnish.store.data import as_text, encode_prompt

Prompt = str | Mapping[str, Any] | Sequence[Mapping[str, Any]] | Example
PLAIN = GenerationConfig()
Loop = Callable[[Model, list[Row], GenerationConfig, Ends], Iterator[Piece]]


def generate(
    model: Model,
    prompts: Sequence[Prompt],
    config: GenerationConfig = PLAIN,
    adapters: Sequence[str | None] | None = None,
) -> list[Generation]:
    """The continuations of the prompts, in their order. Arguments and errors as `stream`'s."""
    done = {piece.row: piece.done for piece in stream(model, prompts, config, adapters) if piece.done}
    return [done[row] for row in range(len(prompts))]


def stream(
    model: Model,
    prompts: Sequence[Prompt],
    config: GenerationConfig = PLAIN,
    adapters: Sequence[str | None] | None = None,
) -> Iterator[Piece]:
    """Every token as it comes, `config.batch_size` prompts at a time, those of like length together.

    A prompt is a text, a row as in training ({"prompt": text} and other columns that a template of the model names), a
    list of messages for the chat template, or an `Example`, of which the part before its
    first label is continued, or is an encoder-decoder's source. A model without a tokenizer takes examples and gives
    no text. `adapters` names each prompt's adapter of those loaded, None for the bare base; without it all take the
    active one. The model is in evaluation mode until the iterator ends or is closed.

    Raises UserError as `rows_of` does, before the first token.
    """
    rows = sorted(rows_of(model, prompts, config, adapters), key=lambda row: len(row.example.ids))
    groups = [rows[start : start + config.batch_size] for start in range(0, len(rows), config.batch_size)]
    return _run(model, groups, config, ends_of(model, config))


def rows_of(
    model: Model, prompts: Sequence[Prompt], config: GenerationConfig, adapters: Sequence[str | None] | None = None
) -> list[Row]:
    """The prompts on their way. Arguments as `stream`'s.

    Raises UserError for a model without a decoder or a language-model head, for a prompt that cannot be encoded, is
    empty or has tokens that the model lacks, and where its positions do not reach.
    """
    spec = model.spec
    if not spec.generates:
        what = f"{spec.family} {spec.kind} with the head '{spec.head}'"
        raise UserError(
            f"model: a {what} cannot continue text; use a decoder, or an encoder-decoder, with a language-model head"
        )
    if isinstance(prompts, str):
        raise UserError("prompts: a list of prompts is needed, not one text; put it in brackets")
    chosen = _adapter_ids(model, len(prompts), adapters)
    examples = encode(model, [_example(model, prompt) for prompt in prompts])
    copies: Counter[tuple[int, ...]] = Counter()
    rows = []
    for index, example in enumerate(examples):
        if not example.ids:
            raise UserError(f"prompt {index + 1} is empty; write something")
        for token in (min(example.ids), max(example.ids)):
            if not 0 <= token < spec.vocab_size:
                raise UserError(
                    f"prompt {index + 1}: token {token} is none of the model's, 0 to {spec.vocab_size - 1}; encode the"
                    " text with the model's own tokenizer"
                )
        row = Row(index, example, model, config, copies)
        row.adapter = chosen[index]
        rows.append(row)
    if rows:
        _check_positions(model, max(rows, key=lambda row: len(row.example.ids)), config)
    return rows


def _adapter_ids(model: Model, count: int, adapters: Sequence[str | None] | None) -> list[int]:
    """The number of each prompt's adapter. Raises UserError for a name that is not loaded, or a wrong count."""
    if adapters is None:
        return [-1 if model.adapters is None else model.adapters.chosen] * count
    if model.adapters is None:
        raise UserError("adapters: none is loaded under a name; load_adapters does that")
    if isinstance(adapters, str) or len(adapters) != count:
        raise UserError(f"adapters: a list of {count} names is needed, one a prompt, None for the bare base")
    return [model.adapters.number(name) for name in adapters]


def chat_prompt(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> Example:
    """A conversation up to where the reply begins. Raises UserError without a chat template, or if it objects."""
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            "the tokenizer has no chat template;"
            " add chat_template.jinja to the model's folder, or give the prompt as plain text"
        )
    try:
        ids = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=False)
    except Exception as error:  # a template is a program: it may raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"the chat template rejects this conversation: {reason}") from error
    return Example(ids, [IGNORE] * len(ids))


def _example(model: Model, prompt: Prompt) -> Example:
    """The prompt's tokens, nothing of which is a target."""
    if isinstance(prompt, str):
        given = encode_prompt(model.tokenizer, prompt, model.spec.paired)
    elif isinstance(prompt, Mapping):
        given = _row(model, prompt)
    elif isinstance(prompt, Example):
        given = prompt
    else:
        given = chat_prompt(model.tokenizer, prompt)
    size = given.prompt_length
    slots = given.slots and given.slots[:size]
    types = given.token_types and given.token_types[:size]
    return replace(given, ids=given.ids[:size], labels=given.labels[:size], slots=slots, token_types=types, label=None)


def _row(model: Model, row: Mapping[str, Any]) -> Example:
    """A row's prompt, which may be none where a template takes other columns, with its columns for templates."""
    if not chain.hooks(model, "encode"):
        raise UserError(f"values: this model has no template that takes {', '.join(row)}; give the prompt as one text")
    given = encode_prompt(model.tokenizer, row["prompt"], model.spec.paired) if row.get("prompt") else Example([], [])
    return replace(given, fields={"prompt": "", **{name: as_text(value) for name, value in row.items()}})


@torch.inference_mode()
def _check_positions(model: Model, longest: Row, config: GenerationConfig) -> None:
    prompt, room, kind = len(longest.example.ids), model.spec.max_positions, model.spec.positions
    if kind == "rotary" and prompt > room > 0 and not model.spec.rope_scaling:
        raise UserError(f"{longest.name}: {prompt} tokens exceed the {room} that the model was made for; shorten it")
    if kind != "learned":
        return
    prompt += batch_of(model, [longest])[1]
    last = max(prompt, config.max_new_tokens) if model.spec.paired else prompt + config.max_new_tokens
    if last > room:
        raise UserError(
            f"{longest.name}: {prompt} tokens and max_new_tokens={config.max_new_tokens} exceed the"
            f" model's {room} positions; shorten the prompt or lower max_new_tokens"
        )


def _loop(config: GenerationConfig) -> Loop:
    """What continues a group of rows."""
    if config.num_beams > 1:
        return beam_search
    if config.penalty_alpha:
        return contrastive_search
    return speculate if config.prompt_lookup_num_tokens or config.assistant_model else _advance


@torch.inference_mode()
def _run(model: Model, groups: Sequence[list[Row]], config: GenerationConfig, ends: Ends) -> Iterator[Piece]:
    training = model.net.training
    model.net.eval()
    try:
        longest = max((len(row.example.ids) for group in groups for row in group), default=0)
        steps = config.max_new_tokens * len(groups)
        with fused(model.net, longest, steps) if config.fused else nullcontext():
            for group in groups:
                yield from _loop(config)(model, group, config, ends)
    finally:
        model.net.train(training)


def _advance(model: Model, rows: list[Row], config: GenerationConfig, ends: Ends) -> Iterator[Piece]:
    """Prefill, then one token a row and step until every row is done."""
    choose, advance = Chooser(model, config, ends), model.net.step
    batch, cache = begin(model, rows, config.max_new_tokens - 1)  # the last token is not fed
    ahead: Tensor | None = None
    for step in range(config.max_new_tokens):
        tokens = choose(after(model, batch, cache), rows, step) if ahead is None else ahead
        arrive, ahead = fetched(tokens), None
        if advance is not None and step + 1 < config.max_new_tokens and choose.likeliest(step + 1):
            found = advance(tokens[:, None], cache)  # while the host reads these tokens
            ahead = found and found.tokens
        numbers = arrive()
        if (broken := next((row for row, token in zip(rows, numbers, strict=True) if token < 0), None)) is not None:
            raise not_numbers(broken, step)
        yield from [row.push(token, ends) for row, token in zip(rows, numbers, strict=True) if not row.done]
        active = [i for i, row in enumerate(rows) if not row.done]
        if not active:
            return
        if 2 * len(active) <= len(rows):
            kept = torch.tensor(active, device=model.device)
            rows, tokens = [rows[i] for i in active], tokens[kept]
            ahead = None if ahead is None else ahead[kept]
            cache.select(kept)
        batch = {"input_ids": tokens[:, None], **routes(model, rows)}
