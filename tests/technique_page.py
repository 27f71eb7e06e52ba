"""The page of every technique's purpose, source and options, from the techniques' modules.

Run as a script it prints docs/techniques.md: `python tests/technique_page.py > docs/techniques.md`.
"""

from __future__ import annotations

import re
from dataclasses import fields
from types import ModuleType
from typing import Any

from burnish.chain import TECHNIQUES, technique
from burnish.config import field_types, to_mapping, type_name

SOURCE = re.compile(r"Sources?: (.+?[^.]\.)(?= [A-Z`]|$)")

DATA = """
## Rows with choices

`choice_loss` trains on rows that have wrong answers beside the right one, and the metric `rank_classification` counts
how often the right one has the highest mean log-probability per token. Both read the column `choices`: a list of at
least two texts, the row's own `completion` among them, each as it would stand in `completion`.

    {"prompt": "The film was long and dull. It was", "completion": " bad", "choices": [" good", " bad"]}

In a CSV file the cell holds the list as JSON: `[" good", " bad"]`. Rows may have different choices. `choice_loss`
refuses a row without them; other techniques leave them unread.

    burnish tune MODEL --data train.jsonl --techniques '[ia3, choice_loss]' --output-dir runs/t-few
    burnish eval MODEL --data test.jsonl --metric rank_classification

## Relations of the knowledge probe

`burnish eval MODEL --task lama` asks for the embedded world's facts; with `--data` for those in a JSON file, or in the
.json files of a folder and of the folders in it, one relation each:

    {"name": "capital",
     "prompt_templates": ["The capital of {} is", "{}'s seat of government is"],
     "samples": [{"subject": "France", "object": "Paris"}, {"subject": "Peru", "object": "Lima"}]}

Each template has `{}` once, where the subject stands, and ends where the object begins; a space before the object is
added. Other keys are left unread, and `name` is the file's where it is missing. Of a subject that stands there twice
the first sample counts. The objects of all samples are the answers to choose from: at least two, and at least five
samples for a split into training, development and test facts.
"""


def purpose(module: ModuleType) -> str:
    """The first line of a technique's docstring, without the full stop."""
    return " ".join((module.__doc__ or "").split("\n\n")[0].split()).removesuffix(".")


def source(module: ModuleType) -> str:
    """What its docstring names as source."""
    found = SOURCE.search(" ".join((module.__doc__ or "").split()))
    return found[1].removesuffix(".") if found else ""


def default(value: Any) -> str:
    """A default as YAML has it."""
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return "empty" if value in ("", [], {}) else str(value)


def table(config: type) -> list[str]:
    """The options of a Config, one a line."""
    lines = ["| option | type | default | meaning |", "|---|---|---|---|"]
    for option in fields(config):
        kind = type_name(field_types(config)[option.name]).replace("|", "or")
        shown = default(to_mapping(getattr(config(), option.name)))
        lines.append(f"| `{option.name}` | {kind} | {shown} | {option.metadata.get('help', '')} |")
    return lines


def page() -> str:
    """docs/techniques.md."""
    lines = [
        "# Techniques and their options",
        "",
        "A chain is a list of techniques, in the order in which they are applied: "
        "`--techniques '[nf4, {lora: {r: 8}}]'`, or `techniques:` in a file. An option that is left away has its "
        "default. Those that *follow* are set by burnish itself and stand here since `burnish.json` has them. What "
        "works on which model is in "
        "[capabilities.md](capabilities.md); this page is written from the techniques themselves by "
        "`python tests/technique_page.py > docs/techniques.md`.",
        "",
        "Methods of peft that change modules are techniques too: `peft:<method>`, as in "
        "`{peft:oft: {oft_block_size: 8}}`, with the fields of peft's own config class as options; peft's "
        "documentation describes them.",
    ]
    for name in TECHNIQUES:
        module = technique(name)
        lines += [
            "",
            f"## {name}",
            "",
            f"{purpose(module)}.",
            "",
            f"Source: {source(module)}.",
            "",
            *table(module.Config),
        ]
    return "\n".join(lines) + "\n" + DATA


if __name__ == "__main__":
    print(page(), end="")
