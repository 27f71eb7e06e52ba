"""What a model will learn from a data file: its tokens, the learnt ones green and in [[brackets]]."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from burnish.store.data import IGNORED, Example, detect_format, encode_rows, read_rows, rename_columns

if TYPE_CHECKING:
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase

CHECKED = 1000  # rows whose masks are checked, beyond those shown
STYLES = {"learnt": "bold green", "context": "dim", "pseudo": "magenta"}


@dataclass(frozen=True)
class PreviewConfig:
    """What to show."""

    positional: ClassVar[str] = "data"
    data: str = field(metadata={"help": "data file, folder or hub id"})
    model: str = field(default="pebble", metadata={"help": "model whose tokenizer and chat template are used"})
    n: int = field(default=3, metadata={"help": "examples shown"})
    max_length: int = field(default=512, metadata={"help": "longest example, in tokens"})
    train_on: Literal["completion", "all"] = field(default="completion", metadata={"help": "what the loss covers"})
    split: str | None = field(default=None, metadata={"help": "split of a folder, a hub data set or a JSON object"})
    columns: dict[str, str] | None = field(
        default=None, metadata={"help": "your column for a role: {prompt: question}"}
    )
    json: bool = field(default=False, metadata={"help": "print JSON"})


def preview(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, n: int) -> Text:
    """The first `n` examples as text: learnt tokens green and in [[ ]], context dim, pseudo token i as <Pi>,
    line ends as \\n.

    Under a legend, each example has a line with its tokens, how many of them are learnt, and their share.
    """
    from rich.text import Text

    shown = Text()
    shown.append("[[learnt]]", STYLES["learnt"]).append("  ").append("context", STYLES["context"]).append("  ")
    shown.append("<P0> pseudo token", STYLES["pseudo"]).append("\n")
    for number, example in enumerate(examples[:n], start=1):
        shown.append(f"\nexample {number}: {_share([example])}\n", "bold")
        for state, piece in pieces(example, tokenizer):
            piece = piece.replace("\n", "\\n\n")
            shown.append(f"[[{piece}]]" if state == "learnt" else piece, STYLES[state])
        shown.append("\n")
    return shown


def pieces(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, str]]:
    """(state, text) of each run of tokens: 'learnt', 'context' or 'pseudo'. The first is never learnt."""
    slots = example.slots or [-1] * len(example.ids)
    labels = [IGNORED, *example.labels[1:]]
    states = [
        "pseudo" if slot >= 0 else "context" if label == IGNORED else "learnt"
        for slot, label in zip(slots, labels, strict=True)
    ]
    found: list[tuple[str, str]] = []
    real: list[int] = []
    before = ""
    for state, run in itertools.groupby(range(len(states)), key=states.__getitem__):
        positions = list(run)
        if state == "pseudo":
            found.append((state, "".join(f"<P{slots[i]}>" for i in positions)))
            continue
        real += [example.ids[i] for i in positions]
        upto = str(tokenizer.decode(real, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        found.append((state, upto[len(before) :]))
        before = upto
    return found


def _share(examples: Sequence[Example]) -> str:
    total = sum(len(example.ids) for example in examples)
    learnt = sum(label != IGNORED for example in examples for label in example.labels[1:])
    return f"{total} tokens, {learnt} learnt ({learnt / total:.1%})"


def run(config: PreviewConfig) -> int:
    """`burnish data preview`: prints the first examples of a data file with their masks; 0.

    Raises UserError as `read_rows`, `encode_rows` and `load_tokenizer` do.
    """
    from rich.console import Console

    from burnish.store.tokenizer import load_tokenizer

    rows = read_rows(config.data, config.split)
    folder = _folder(config.model)
    tokenizer = load_tokenizer(folder)
    paired = _is_paired(folder)
    checked = rows[: max(config.n, CHECKED)]
    columns = config.columns or {}
    examples = encode_rows(checked, tokenizer, config.max_length, config.train_on, config.data, columns, paired=paired)
    kind = detect_format(rename_columns(rows, columns, config.data), config.data, columns)
    console = Console()
    if config.json:
        listed = [{"ids": e.ids, "labels": e.labels, "pieces": pieces(e, tokenizer)} for e in examples[: config.n]]
        tokens = sum(len(e.ids) for e in examples)
        learnt = sum(label != IGNORED for e in examples for label in e.labels[1:])
        report = {
            "rows": len(rows),
            "format": kind,
            "checked": len(checked),
            "tokens": tokens,
            "learnt": learnt,
            "examples": listed,
        }
        console.print_json(data=report)
        return 0
    console.print(f"{config.data}: {len(rows)} rows, format {kind}", markup=False, highlight=False, soft_wrap=True)
    console.print(preview(examples, tokenizer, config.n), soft_wrap=True)
    which = "all rows" if len(checked) == len(rows) else f"the first {len(checked)} rows"
    console.print(f"{which}: {_share(examples)}", highlight=False, soft_wrap=True)
    return 0


def _is_paired(folder: Path) -> bool:
    """Whether a folder's config tells of an encoder-decoder."""
    try:
        return bool(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("is_encoder_decoder"))
    except (OSError, ValueError, AttributeError):
        return False


def _folder(model: str) -> Path:
    if Path(model).is_dir():
        return Path(model)
    from burnish.store.hub import resolve

    return Path(resolve(model))
