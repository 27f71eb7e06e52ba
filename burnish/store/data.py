"""Data: rows read from files or the hub, and rows turned into examples with a label for every learnt token.

A row is a dict of columns. `read_rows` uses the standard library for JSONL, JSON, CSV and text and pyarrow
for Parquet, because importing `datasets` takes most of a second and it copies what it reads into a cache; a
folder or a hub id goes through `datasets`.

Prompt and completion are tokenised apart and then joined. Tokenised together, a merge across their border
would hide the prompt's end in a token that generation never sees, as there the prompt ends before the reply
begins (the reason why the prompt's mask of a jointly tokenised text is off by one token). Labels are decided
by position, never by token id: an end token is learnt at the end of a completion and ignored in padding even
where pad and end are one id.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from burnish.config import UserError, nearest
from burnish.model.example import IGNORE as IGNORED
from burnish.model.example import Example
from burnish.store.classes import labels_of
from burnish.store.rows import Row, detect_format, read_rows, rename_columns, require_column, split_rows
from burnish.store.tokenizer import Message, chat_ids, runs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "IGNORED", "Example", "Row", "detect_format", "encode_classification", "encode_prompt", "encode_rows",
    "read_rows", "rename_columns", "split_rows", "wrong_choices",
]  # fmt: skip

SPEAKERS = {
    "system": ("system",),
    "user": ("user", "human"),
    "assistant": ("assistant", "gpt", "chatgpt", "model", "bot"),
    "tool": ("tool", "function", "observation"),
}
ROLES = {name: role for role, names in SPEAKERS.items() for name in names}
logger = logging.getLogger(__name__)


def encode_rows(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    train_on: Literal["completion", "all"] = "completion",
    where: str = "data",
    columns: Mapping[str, str] | None = None,
    on_empty: Literal["error", "skip"] = "error",
    paired: bool = False,
) -> list[Example]:
    """Examples for language modelling, one a row, of at most `max_length` tokens.

    Learnt are completions and replies with the token that ends them, or every token (`train_on="all"`, and
    always for `text`). Prompt and completion are joined as they stand, with no space added; with a chat
    template Alpaca rows become a user's turn (instruction, blank line, input) and a reply, without one a text
    with `### Instruction:` and `### Response:` headings.

    A row that is too long first loses its last exchanges (a conversation, down to one), then the beginning of
    its prompt, and only then the end of its completion. A row with nothing to learn raises UserError with its
    number, counted from 1, or is left out (`on_empty="skip"`). Rows cut and left out are counted in a log
    warning.

    `columns` names the user's own column for a role, as in {"prompt": "question"}. Where a row with a completion has
    `choices`, its example has the wrong ones in `choices`.

    `paired` is for encoder-decoders: prompt and completion are each tokenised as a whole text, with the tokenizer's own
    marks, and `max_length` holds for each and cuts its end. Conversations, plain texts and `train_on="all"` are then
    UserErrors, as there is no source or nothing else to learn.
    """
    if paired and train_on == "all":
        raise UserError("train_on: an encoder-decoder's source is read, not written; set train_on: completion")
    if max_length < 2:
        raise UserError(f"max_length={max_length}: at least 2 tokens are needed")
    if not rows:
        raise UserError(f"{where}: no rows; give at least one")
    renamed = rename_columns(rows, columns, where) if columns else rows
    kind = detect_format(renamed, where, columns or ())
    text = _Text(tokenizer)
    examples, cut, empty = [], 0, 0
    for number, (raw, row) in enumerate(zip(rows, renamed, strict=True), start=1):
        try:
            example, long = _example(kind, row, text, max_length, paired)
        except UserError as error:
            raise UserError(f"{where}: row {number}: {error}") from error
        cut += long
        if train_on == "all":
            example.labels = list(example.ids)
        elif kind == "prompt_completion" and (wrong := wrong_choices(row)):
            others = [{**row, "completion": other} for other in wrong]
            example.choices = [_example(kind, other, text, max_length, paired)[0] for other in others]
        if all(label == IGNORED for label in example.labels[1:]):  # the first token of a document is never predicted
            if on_empty == "error":
                raise UserError(
                    f"{where}: row {number}: no token to learn from, all {len(example.ids)} are masked;"
                    " fill in its completion or reply, or skip such rows (on_empty: skip)"
                )
            empty += 1
            continue
        for one in (example, *(example.choices or ())):
            one.fields = {name: as_text(value) for name, value in raw.items()}
        examples.append(example)
    if cut:
        logger.warning(
            "%s: %d of %d rows were longer than max_length=%d and were cut", where, cut, len(rows), max_length
        )
    if empty:
        logger.warning("%s: %d of %d rows had nothing to learn and were left out", where, empty, len(rows))
    if not examples:
        raise UserError(f"{where}: none of the {len(rows)} rows has a token to learn from")
    return examples


def wrong_choices(row: Row) -> list[str] | None:
    """The other texts of the row's `choices`; None unless they are a list of texts with its completion among them, and
    another one."""
    choices = row.get("choices")
    if isinstance(choices, str):  # from a CSV cell
        try:
            choices = json.loads(choices)
        except json.JSONDecodeError:
            return None
    if not isinstance(choices, (list, tuple)) or not all(isinstance(text, str) and text.strip() for text in choices):
        return None
    others = [text for text in dict.fromkeys(choices) if text != row.get("completion")]
    return others if 0 < len(others) < len(set(choices)) else None


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str, paired: bool = False) -> Example:
    """A prompt to continue: the ids of `text` after the marks (bos) the tokenizer puts first; no labels.

    Marks it would put last are left off, as the text goes on, unless it is an encoder-decoder's source (`paired`).
    Raises UserError if there is no token at all.
    """
    ids = list(tokenizer(text)["input_ids"]) if paired else _Text(tokenizer).first(text)
    if not ids:
        raise UserError("the prompt is empty; write something")
    return Example(ids, [IGNORED] * len(ids), fields={"prompt": text})


def encode_classification(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    text_columns: Sequence[str],
    label_column: str,
    label_names: Sequence[str] | None = None,
    max_length: int = 512,
    where: str = "data",
) -> tuple[list[Example], list[str]]:
    """Examples with a class each, of one text or two (with token types), in the tokenizer's own special
    tokens; and class names.

    Without `label_names` the classes are the distinct labels, sorted; with them a label is a name or an
    index. The longer text is cut first. Raises UserError for a missing column, a missing or an unknown label,
    with the row's number.
    """
    if not 1 <= len(text_columns) <= 2:
        raise UserError(f"{where}: a classified row has one or two text columns, not {len(text_columns)}")
    if not rows:
        raise UserError(f"{where}: no rows; give at least one")
    for column in (*text_columns, label_column):
        require_column(rows, column, where)
    names = list(label_names) if label_names is not None else labels_of(rows, label_column)
    classes = {str(i): i for i in range(len(names))} | {name: i for i, name in enumerate(names)}
    examples = []
    for number, row in enumerate(rows, start=1):
        try:
            texts = [_text(row, column) for column in text_columns]
            label = _text(row, label_column)
            if label not in classes:
                raise UserError(f"unknown label '{label}'{nearest(label, names)}; the labels are {', '.join(names)}")
        except UserError as error:
            raise UserError(f"{where}: row {number}: {error}") from error
        encoded = tokenizer(*texts, truncation=True, max_length=max_length, return_token_type_ids=len(texts) == 2)
        ids = encoded["input_ids"]
        fields = {name: as_text(value) for name, value in row.items()}
        types = encoded["token_type_ids"] if len(texts) == 2 else None
        examples.append(Example(ids, [IGNORED] * len(ids), fields, label=classes[label], token_types=types))
    return examples, names


class _Text:
    """A tokenizer's way with the beginning, the middle and the end of a plain text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer, self.eos = tokenizer, tokenizer.eos_token_id
        bare, marked = self._ids("a"), tokenizer("a")["input_ids"]
        starts = (i for i in range(len(marked)) if marked[i : i + len(bare)] == bare)
        at = next(starts, None)
        self.marks = marked[: at or 0]
        closing = [] if at is None else marked[at + len(bare) :]
        self.closing = closing if self.eos is None else [self.eos]
        self.adds_space = "".join(tokenizer.convert_ids_to_tokens(bare)).startswith("▁")

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def first(self, text: str) -> list[int]:
        """Ids of the beginning of a document."""
        return self.marks + self._ids(text)

    def rest(self, text: str) -> list[int]:
        """Ids of text that follows other text: without the space that SentencePiece puts before a text."""
        if self.adds_space:
            line, after = self._ids("\n"), self._ids("\n" + text)
            if after[: len(line)] == line:
                return after[len(line) :]
        return self._ids(text)

    def whole(self, text: str, max_length: int, target: bool = False) -> tuple[list[int], bool]:
        """Ids of a text of its own, a source or a target, and whether it had to be cut."""
        given: dict[str, Any] = {"text": None, "text_target": text} if target else {"text": text}
        ids = list(self.tokenizer(**given)["input_ids"])
        if len(ids) <= max_length:
            return ids, False
        return list(self.tokenizer(**given, truncation=True, max_length=max_length)["input_ids"]), True

    def ended(self, ids: list[int]) -> list[int]:
        return ids if self.eos is None or ids[-1:] == [self.eos] else [*ids, self.eos]

    def kept(self, ids: list[int]) -> int:
        """How many leading ids stay when a prompt is cut."""
        return len(self.marks) if self.marks and ids[: len(self.marks)] == self.marks else 0


def _encode(kind: str, row: Row, text: _Text) -> tuple[list[int], list[bool]]:
    """Ids of a whole row, and for each whether it belongs to a reply."""
    if kind in ("messages", "conversations"):
        return chat_ids(text.tokenizer, _messages(row, kind))
    if kind == "text":
        ids = text.first(_text(row, "text"))
        ids += text.closing if ids[-1:] != text.closing else []
        return ids, [True] * len(ids)
    if kind == "alpaca" and text.tokenizer.chat_template:
        asked, reply = _asked(row)
        return chat_ids(text.tokenizer, [{"role": "user", "content": asked}, {"role": "assistant", "content": reply}])
    if kind == "alpaca":
        instruction, given, completion = _text(row, "instruction"), _text(row, "input", ""), _text(row, "output")
        given = f"### Input:\n{given}\n\n" if given.strip() else ""
        prompt = f"### Instruction:\n{instruction}\n\n{given}### Response:\n"
    else:
        prompt, completion = _text(row, "prompt"), _text(row, "completion")
    before, after = text.first(prompt), text.ended(text.rest(completion))
    return before + after, [False] * len(before) + [True] * len(after)


def _example(kind: str, row: Row, text: _Text, max_length: int, paired: bool) -> tuple[Example, bool]:
    """The row without its columns, and whether it had to be cut to `max_length`."""
    if paired:
        ids, learnt, long = _encode_pair(kind, row, text, max_length)
    else:
        ids, learnt = _encode(kind, row, text)
        long = len(ids) > max_length
        ids, learnt = _fit(ids, learnt, text.kept(ids), max_length)
    return Example(ids, [token if keep else IGNORED for token, keep in zip(ids, learnt, strict=True)]), long


def _asked(row: Row) -> tuple[str, str]:
    """An Alpaca row as a question and a reply."""
    instruction, given = _text(row, "instruction"), _text(row, "input", "")
    return f"{instruction}\n\n{given}" if given.strip() else instruction, _text(row, "output")


def _encode_pair(kind: str, row: Row, text: _Text, max_length: int) -> tuple[list[int], list[bool], bool]:
    """Ids of a source and its target, for each id whether it belongs to the target, and whether one was cut."""
    if kind not in ("alpaca", "prompt_completion"):
        raise UserError(f"an encoder-decoder learns from prompt and completion, not from '{kind}'")
    prompt, completion = _asked(row) if kind == "alpaca" else (_text(row, "prompt"), _text(row, "completion"))
    before, long = text.whole(prompt, max_length)
    after, longer = text.whole(completion, max_length, target=True)
    after = text.ended(after)[:max_length] if completion else []
    return before + after, [False] * len(before) + [True] * len(after), long or longer


def _fit(ids: list[int], learnt: list[bool], kept: int, max_length: int) -> tuple[list[int], list[bool]]:
    """Ids and mask cut to `max_length`: last exchanges, then the prompt after `kept` marks, then the end."""
    replies = runs(learnt)
    while len(ids) > max_length and len(replies) > 1:
        replies.pop()
        ids, learnt = ids[: replies[-1][1]], learnt[: replies[-1][1]]
    over = len(ids) - max_length
    if over > 0 and replies:
        stop = kept + max(0, min(over, replies[0][0] - kept))
        ids, learnt = ids[:kept] + ids[stop:], learnt[:kept] + learnt[stop:]
    return ids[:max_length], learnt[:max_length]


def _messages(row: Row, kind: str) -> list[Message]:
    """A conversation in `role` and `content`, whichever of the two spellings the row uses."""
    turns = row.get(kind)
    if isinstance(turns, str):  # from a CSV cell
        try:
            turns = json.loads(turns)
        except json.JSONDecodeError:
            turns = None
    if not isinstance(turns, (list, tuple)) or not turns or not all(isinstance(turn, Mapping) for turn in turns):
        raise UserError(f"'{kind}' must be a list of turns, each with a role and a content")
    messages = []
    for number, turn in enumerate(turns, start=1):
        turn = {name: value for name, value in turn.items() if value is not None}
        role, content = turn.pop("role", turn.pop("from", None)), turn.pop("content", turn.pop("value", None))
        if role not in ROLES:
            raise UserError(
                f"turn {number}: unknown role {role!r}{nearest(str(role), ROLES)}; known: {', '.join(ROLES)}"
            )
        if isinstance(content, list) and all(
            isinstance(part, Mapping) and part.get("type") == "text" for part in content
        ):
            content = "".join(part["text"] for part in content)
        if not isinstance(content, str) and not (content is None and "tool_calls" in turn):
            raise UserError(f"turn {number}: its content must be text, not {type(content).__name__}")
        messages.append({"role": ROLES[role], "content": content, **turn})
    return messages


def _text(row: Row, column: str, default: str | None = None) -> str:
    value = row.get(column)
    if value is None:
        value = default
    if value is None:
        filled = [name for name, cell in row.items() if cell is not None]
        raise UserError(f"no '{column}'; it has {', '.join(filled) or 'no columns'}")
    if not isinstance(value, (str, int, float)):
        raise UserError(f"'{column}' must be text, not a {type(value).__name__}")
    return str(value)


def as_text(value: Any) -> str:
    """What a template shows of a column's value."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
