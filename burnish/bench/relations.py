"""Relations of a knowledge probe: facts, and wordings that ask for them.

A wording ends where the object begins: "{} was elected in". The relations are those of the embedded world, or of a
folder of files {"name", "prompt_templates": ["{} was elected in"], "samples": [{"subject", "object"}]}.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from burnish.config import UserError

TRAIN, DEV = 0.4, 0.2  # shares of the subjects; the others are the test
MINED, LONGEST = 10, 12  # wordings kept, and their most words
SENTENCE = re.compile(r"(?<=[.!])\s+")
Fact = tuple[str, str]  # subject, object


@dataclass(frozen=True)
class Relation:
    """Its facts have different subjects; `objects` is the vocabulary that answers are chosen from."""

    name: str
    wordings: tuple[str, ...]
    facts: tuple[Fact, ...]

    @property
    def objects(self) -> list[str]:
        return sorted({found for _, found in self.facts})

    def split(self, most: int = 0) -> tuple[list[Fact], list[Fact], list[Fact]]:
        """(train, dev, test) facts, always the same; of `most` facts at most, 0 for all. Raises UserError where that is
        too few."""
        facts = random.Random(f"probe/{self.name}").sample(self.facts, len(self.facts))[: most or None]
        train, dev = round(TRAIN * len(facts)), round(DEV * len(facts))
        if min(train, dev, len(facts) - train - dev) < 1 or len(self.objects) < 2:
            raise UserError(
                f"relation '{self.name}': {len(facts)} facts with {len(self.objects)} objects cannot be split into "
                "train, dev and test; give at least 5 with 2"
            )
        return facts[:train], facts[train : train + dev], facts[train + dev :]


def world_relations() -> list[Relation]:
    """The relations of the embedded world with hand-written wordings."""
    from burnish.world.facts import World
    from burnish.world.wordings import WORDINGS

    facts: dict[str, list[Fact]] = {}
    for fact in World().facts:
        facts.setdefault(fact.relation, []).append((fact.subject, fact.answer))
    return [Relation(name, WORDINGS[name], tuple(found)) for name, found in facts.items()]


def world_texts(count: int = 4000) -> list[str]:
    """The first documents of the embedded corpus that are plain text."""
    from itertools import islice

    from burnish.world import documents

    return [row["text"] for row in islice(documents(), count) if "text" in row]


def read_relations(source: str | Path) -> list[Relation]:
    """The relations in a file or in the .json files of a folder. Raises UserError for what is no relation."""
    path = Path(source).expanduser()
    files = sorted(path.rglob("*.json")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path}: no .json file in it; a relation is a file with name, prompt_templates and samples")
    return [_read(file) for file in files]


def _read(path: Path) -> Relation:
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: a relation is a mapping with name, prompt_templates and samples")
    for key in ("prompt_templates", "samples"):
        if not isinstance(found.get(key), list) or not found[key]:
            raise UserError(f"{path}: no {key}; give a list of at least one")
    for template in found["prompt_templates"]:
        if not isinstance(template, str) or template.count("{}") != 1:
            raise UserError(f"{path}: template {template!r} needs {{}} once, where the subject stands")
    facts: dict[str, str] = {}
    for number, sample in enumerate(found["samples"], start=1):
        subject, wanted = (sample.get(key) if isinstance(sample, dict) else None for key in ("subject", "object"))
        if not all(isinstance(text, str) and text.strip() for text in (subject, wanted)):
            raise UserError(f"{path}: sample {number} needs a subject and an object, both text")
        facts.setdefault(str(subject), str(wanted))
    name = str(found.get("name") or path.stem)
    return Relation(name, tuple(dict.fromkeys(found["prompt_templates"])), tuple(facts.items()))


def mined(facts: Sequence[Fact], texts: Iterable[str]) -> list[str]:
    """The most frequent wordings of sentences in which the object of a fact follows its subject (LPAQ, arXiv
    1911.12543, section 3.1)."""
    counts: Counter[str] = Counter()
    for text in texts:
        told = [fact for fact in facts if fact[0] in text]
        for sentence in SENTENCE.split(text) if told else ():
            for subject, wanted in told:
                after = sentence.find(subject) + len(subject)
                at = sentence.find(f" {wanted}", after)
                if after < len(subject) or at < 0:
                    continue
                wording = sentence[:at].replace(subject, "{}")
                if wording.count("{}") == 1 and len(wording.split()) <= LONGEST:
                    counts[wording] += 1
    return [wording for wording, _ in counts.most_common(MINED)]
