"""The generation engine: prompts in, tokens and text out, in batches over a key-value cache.

`stream` is the one loop; `generate` collects it. A batch is padded on the left, prefilled in one forward, and then
advances one token a row and step. Rows that have ended stay in the batch until half of it has, and are then dropped
from the cache, so that all the copying together moves the cache about once. The loop knows no technique: what a
technique adds comes through the hooks of `burnish.chain`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from burnish import chain
from burnish.chain import Model
from burnish.config import UserError
from burnish.engine import sampling
from burnish.engine.order import collated, encode
from burnish.model.example import IGNORE, Example
from burnish.store.data import encode_prompt

Prompt = str | Sequence[Mapping[str, Any]] | Example
FinishReason = Literal["stop", "length", "eos"]
BROKEN = "\ufffd"  # what bytes that are no character yet decode to
CONTEXT = 6  # prompt tokens before a reply that decide how its first token is spelt


def _field(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class GenerationConfig:
    """How to continue a prompt, under Hugging Face's names. Raises UserError for a setting that makes no sense."""

    max_new_tokens: int = _field(64, "most tokens generated for a prompt")
    min_new_tokens: int = _field(0, "tokens before which an end token is not chosen")
    do_sample: bool = _field(False, "draw tokens at random; otherwise always the most likely one")
    temperature: float = _field(1.0, "when sampling: below 1 sharper, above 1 flatter")
    top_k: int = _field(0, "when sampling: only the k most likely tokens; 0: all")
    top_p: float = _field(1.0, "when sampling: only the most likely tokens that together reach this probability")
    repetition_penalty: float = _field(
        1.0, "above 1 makes tokens of the reply, and of a prompt it goes on, less likely"
    )
    stop: list[str] = field(
        default_factory=list, metadata={"help": 'texts that end the reply and are left off, as in ["\\n", "User:"]'}
    )
    seed: int = _field(0, "seed of the draws")
    batch_size: int = _field(16, "prompts continued at once")

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 1), ("min_new_tokens", 0), ("top_k", 0), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name}: must be at least {least}, is {getattr(self, name)}")
        if not self.temperature > 0:
            raise UserError(
                f"temperature: must be above 0, is {self.temperature}; for the most likely token set do_sample: false"
            )
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p: must be above 0 and at most 1, is {self.top_p}")
        if not self.repetition_penalty > 0:
            raise UserError(f"repetition_penalty: must be above 0, is {self.repetition_penalty}; 1 is none")
        if self.min_new_tokens > self.max_new_tokens:
            raise UserError(f"min_new_tokens: {self.min_new_tokens} is above max_new_tokens={self.max_new_tokens}")
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            raise UserError(f"stop: a list of non-empty texts is needed, not {self.stop!r}")
        idle = [name for name, off in (("temperature", 1), ("top_k", 0), ("top_p", 1)) if getattr(self, name) != off]
        if idle and not self.do_sample:
            raise UserError(f"{idle[0]}: acts only when tokens are drawn at random; set do_sample: true")


@dataclass(frozen=True)
class Generation:
    """A finished reply.

    `ids` are the generated tokens, the one that ended it included; `text` leaves special tokens and the stop text
    away. `prompt_tokens` counts real tokens, those that a technique's template adds included, pseudo tokens not.
    """

    text: str
    ids: list[int]
    finish_reason: FinishReason
    prompt_tokens: int


class Piece(NamedTuple):
    """One new token of prompt number `row`, counted from 0, and the text that is certain since: "" while it may turn
    out to belong to a stop text or to a character that is not complete. `done` comes with a reply's last token."""

    row: int
    token: int
    text: str
    done: Generation | None


def generate(
    model: Model,
    prompts: Sequence[Prompt],
    config: GenerationConfig = GenerationConfig(),
    adapters: Sequence[str | None] | None = None,
) -> list[Generation]:
    """The continuations of the prompts, in their order. Arguments and errors as `stream`'s."""
    done = {piece.row: piece.done for piece in stream(model, prompts, config, adapters) if piece.done}
    return [done[row] for row in range(len(prompts))]


def stream(
    model: Model,
    prompts: Sequence[Prompt],
    config: GenerationConfig = GenerationConfig(),
    adapters: Sequence[str | None] | None = None,
) -> Iterator[Piece]:
    """Every token as it comes, `config.batch_size` prompts at a time, those of like length together.

    A prompt is a text, a list of messages for the chat template, or an `Example`, of which the part before its
    first label is continued, or is an encoder-decoder's source. A model without a tokenizer takes examples and gives
    no text. `adapters` names each prompt's adapter of those loaded, None for the bare base; without it all take the
    active one. The model is in evaluation mode until the iterator ends or is closed.

    Raises UserError, before the first token, for a model without a decoder or a language-model head, for a
    prompt that cannot be encoded or is empty, and where learned positions do not reach.
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
    ends = _ends(model, config.stop)
    copies: Counter[tuple[int, ...]] = Counter()
    rows = []
    for index, example in enumerate(examples):
        row = _Row(index, example, model, config, copies)
        row.adapter = chosen[index]
        if not example.ids:
            raise UserError(f"prompt {index + 1} is empty; write something")
        rows.append(row)
    rows.sort(key=lambda row: len(row.example.ids))
    groups = [rows[start : start + config.batch_size] for start in range(0, len(rows), config.batch_size)]
    if rows and spec.positions == "learned":
        _check_positions(model, rows[-1], config)
    return _run(model, groups, config, ends)


def _adapter_ids(model: Model, count: int, adapters: Sequence[str | None] | None) -> list[int]:
    """The number of each prompt's adapter. Raises UserError for a name that is not loaded, or a wrong count."""
    if adapters is None:
        return [-1 if model.adapters is None else model.adapters.chosen] * count
    if model.adapters is None:
        raise UserError("adapters: none is loaded under a name; load_adapters does that")
    if isinstance(adapters, str) or len(adapters) != count:
        raise UserError(f"adapters: a list of {count} names is needed, one a prompt, None for the bare base")
    return [model.adapters.number(name) for name in adapters]


def eos_ids(model: Model) -> set[int]:
    """The ids that end a text: the tokenizer's, and those of the generation config."""
    listed = model.generation_config.get("eos_token_id")
    found = {getattr(model.tokenizer, "eos_token_id", None), *(listed if isinstance(listed, list) else [listed])}
    return {token for token in found if token is not None}


def first_id(model: Model) -> int | None:
    """The token that an encoder-decoder's text begins with, where its configs name one (BART's)."""
    name = "forced_bos_token_id"
    return model.generation_config.get(name, model.hf_config.get(name)) if model.spec.paired else None


def _ends(model: Model, stop: Sequence[str]) -> dict[int, FinishReason]:
    """The tokens that end a reply: the model's own, and stop texts that are special tokens, which no text shows."""
    added = {} if model.tokenizer is None else model.tokenizer.added_tokens_decoder
    marks: dict[int, FinishReason] = {i: "stop" for i, token in added.items() if token.special and str(token) in stop}
    return {**marks, **dict.fromkeys(eos_ids(model), "eos")}


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
    elif isinstance(prompt, Example):
        given = prompt
    else:
        given = chat_prompt(model.tokenizer, prompt)
    size = given.prompt_length
    slots = given.slots and given.slots[:size]
    types = given.token_types and given.token_types[:size]
    return replace(given, ids=given.ids[:size], labels=given.labels[:size], slots=slots, token_types=types, label=None)


class Detokenizer:
    """Text from tokens, one at a time, up to a stop text; what it has given is never taken back.

    A token's text may depend on the ones before it (a leading space, a character's bytes), so each piece is the
    difference of two decodings that start a few tokens back, and a decoding that ends amid a character waits. Held
    back too is the longest end of the text that a stop text begins with.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int] = (), stop: Sequence[str] = ()):
        self.tokenizer, self.stop = tokenizer, stop
        self.window = list(prompt[-CONTEXT:])
        self.before = self._decode(self.window).rstrip(BROKEN)
        self.known = len(self.window)  # tokens of the window whose text has been given
        self.held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that is certain now; sets `stopped` if a stop text is complete."""
        self.window.append(token)
        text = self._decode(self.window)
        if text == self.before:
            self.window.pop()  # a token without text
        if len(text) <= len(self.before) or text.endswith(BROKEN):
            return ""
        new = text[len(self.before) :]
        self.window = self.window[self.known :]
        self.known, self.before = len(self.window), self._decode(self.window)
        return self._until_stop(new)

    def flush(self) -> str:
        """What was held back, when no token follows; a character that was cut off is left away."""
        rest = self._decode(self.window)[len(self.before) :].rstrip(BROKEN)
        text = self._until_stop(rest) + self.held
        self.held = ""
        return text

    def _decode(self, ids: list[int]) -> str:
        if self.tokenizer is None or not ids:
            return ""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _until_stop(self, new: str) -> str:
        if not self.stop:
            return new
        text = self.held + new
        found = [at for at in map(text.find, self.stop) if at >= 0]
        if found:
            self.held, self.stopped = "", True
            return text[: min(found)]
        longest = min(len(text), max(map(len, self.stop)) - 1)
        hold = next((n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in self.stop)), 0)
        self.held = text[len(text) - hold :]
        return text[: len(text) - hold]


class _Row:
    """One prompt on its way."""

    def __init__(
        self, index: int, example: Example, model: Model, config: GenerationConfig, copies: Counter[tuple[int, ...]]
    ):
        slots = example.slots or [-1] * len(example.ids)
        self.index, self.example, self.limit = index, example, config.max_new_tokens
        self.prompt = [token for token, slot in zip(example.ids, slots, strict=True) if slot < 0]
        self.draws = sampling.Draws(config.seed, self.prompt, copies[tuple(self.prompt)])
        copies[tuple(self.prompt)] += 1
        before = [] if model.spec.paired else self.prompt
        self.words = Detokenizer(model.tokenizer, before, config.stop)
        self.ids: list[int] = []
        self.texts: list[str] = []
        self.done: Generation | None = None
        self.adapter = -1

    def push(self, token: int, ends: Mapping[int, FinishReason]) -> Piece:
        self.ids.append(token)
        reason = ends.get(token)
        text = "" if reason else self.words.push(token)
        if self.words.stopped:
            reason = "stop"
        elif reason is None and len(self.ids) == self.limit:
            reason = "length"
        if reason and not self.words.stopped:
            text += self.words.flush()
        self.texts.append(text)
        if reason:
            self.done = Generation("".join(self.texts), self.ids, reason, len(self.prompt))
        return Piece(self.index, token, text, self.done)


def _batch(model: Model, rows: Sequence[_Row]) -> tuple[dict[str, Tensor], int]:
    """The prompts as a batch on the model's device, which ends with them, and the length of the prefix before it."""
    side = "right" if model.spec.paired else "left"  # targets begin with one token each
    batch = collated(model, [row.example for row in rows], side)
    batch = {name: tensor.to(model.device) for name, tensor in (batch | _routes(model, rows)).items()}
    return batch, max((hook(batch).size for hook in chain.hooks(model, "initial_cache")), default=0)


def _routes(model: Model, rows: Sequence[_Row]) -> dict[str, Tensor]:
    """The rows' adapters, where there are any."""
    return (
        {} if model.adapters is None else {"adapter_ids": torch.tensor([r.adapter for r in rows], device=model.device)}
    )


@torch.inference_mode()
def _check_positions(model: Model, longest: _Row, config: GenerationConfig) -> None:
    prompt, room = _batch(model, [longest])[1] + len(longest.example.ids), model.spec.max_positions
    last = max(prompt, config.max_new_tokens) if model.spec.paired else prompt + config.max_new_tokens
    if last > room:
        raise UserError(
            f"prompt {longest.index + 1}: {prompt} tokens and max_new_tokens={config.max_new_tokens} exceed the"
            f" model's {room} positions; shorten the prompt or lower max_new_tokens"
        )


@torch.inference_mode()
def _run(
    model: Model, groups: Sequence[Sequence[_Row]], config: GenerationConfig, ends: Mapping[int, FinishReason]
) -> Iterator[Piece]:
    training = model.net.training
    model.net.eval()
    try:
        for group in groups:
            yield from _advance(model, list(group), config, ends)
    finally:
        model.net.train(training)


def _advance(
    model: Model, rows: list[_Row], config: GenerationConfig, ends: Mapping[int, FinishReason]
) -> Iterator[Piece]:
    """Prefill, then one token a row and step until every row is done."""
    net = model.net
    batch, prefix = _batch(model, rows)
    capacity = prefix + batch["input_ids"].shape[1] + config.max_new_tokens - 1  # the last token is not fed
    cache = net.new_cache(len(rows), capacity)
    forced = first_id(model)
    seen = None
    if config.repetition_penalty != 1:
        seen = torch.zeros(len(rows), model.spec.vocab_size, dtype=torch.bool, device=model.device)
        for line, row in zip(seen, rows, strict=True):
            line[[] if model.spec.paired else row.prompt] = True
    for step in range(config.max_new_tokens):
        logits = net.logits(chain.forward(model, batch, cache)[:, -1]).float()  # (B, V)
        if seen is not None:
            logits = sampling.repetition_penalty(logits, seen, config.repetition_penalty)
        if step == 0 and forced is not None:
            logits = torch.full_like(logits, sampling.NEVER)
            logits[:, forced] = 0.0
        if step < config.min_new_tokens:
            logits[:, [token for token, reason in ends.items() if reason == "eos"]] = sampling.NEVER
        if config.do_sample:
            logits = sampling.warp(logits, config.temperature, config.top_k, config.top_p)
            tokens = sampling.sample(logits, [row.draws() for row in rows])
        else:
            tokens = logits.argmax(dim=-1)
        yield from [row.push(token, ends) for row, token in zip(rows, tokens.tolist(), strict=True) if not row.done]
        active = [i for i, row in enumerate(rows) if not row.done]
        if not active:
            return
        if seen is not None:
            seen.scatter_(1, tokens[:, None], True)
        if 2 * len(active) <= len(rows):
            kept = torch.tensor(active, device=model.device)
            rows, tokens = [rows[i] for i in active], tokens[kept]
            cache.select(kept)
            seen = None if seen is None else seen[kept]
        batch = {"input_ids": tokens[:, None], **_routes(model, rows)}
