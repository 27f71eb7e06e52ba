"""The pretraining corpus: an endless stream in a declared mixture, the same for the same seed."""

import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from burnish.world import arithmetic, entailment, instructions, passkey, reviews
from burnish.world.facts import Fact, World
from burnish.world.phrasings import biography, phrasings, state

Document = dict[str, Any]

MIXTURE = {
    "facts": 0.42,
    "biographies": 0.18,
    "reviews": 0.08,
    "entailment": 0.08,
    "arithmetic": 0.08,
    "programs": 0.04,
    "instructions": 0.08,
    "passkeys": 0.04,
}
"""Part -> its share of the corpus in words, numbers and punctuation marks, a stand-in for tokens."""


def size(document: Document) -> int:
    """Words, numbers and punctuation marks in a document, without knowing a tokenizer."""
    texts = [document["text"]] if "text" in document else [m["content"] for m in document["messages"]]
    return sum(len(re.findall(r"\w+|[^\w\s]", text)) for text in texts)


def fact_documents(rng: random.Random, facts: Sequence[Fact]) -> Iterator[str]:
    """4 to 8 facts of different subjects a text; a new pass begins only when every fact has been told."""
    while True:
        pending = rng.sample(facts, len(facts))
        while pending:
            told: dict[str, Fact] = {}
            kept: list[Fact] = []
            wanted = rng.randint(4, 8)
            while pending and len(told) < wanted:
                fact = pending.pop()
                if fact.subject in told:
                    kept.append(fact)
                else:
                    told[fact.subject] = fact
            pending += reversed(kept)
            yield " ".join(state(f, rng.choice(phrasings(f.relation, "train"))) for f in told.values())


def biography_documents(rng: random.Random, world: World) -> Iterator[str]:
    """Two biographies a text; people come twice as often as each city and company."""
    subjects = [*world.people, *world.people, *world.cities, *world.companies]
    while True:
        order = rng.sample(subjects, len(subjects))
        for first, second in zip(order[::2], order[1::2], strict=True):
            yield f"{biography(rng, world, first)} {biography(rng, world, second)}"


def _parts(seed: int, world: World) -> dict[str, Iterator[Document]]:
    rngs = {part: random.Random(f"corpus/{part}/{seed}") for part in MIXTURE}

    def endless(part: str, write: Callable[[random.Random], Any]) -> Iterator[Any]:
        while True:
            yield write(rngs[part])

    texts: dict[str, Iterator[str]] = {
        "facts": fact_documents(rngs["facts"], world.facts),
        "biographies": biography_documents(rngs["biographies"], world),
        "reviews": endless("reviews", reviews.document),
        "entailment": endless("entailment", lambda rng: entailment.document(rng, world)),
        "arithmetic": endless("arithmetic", arithmetic.document),
        "programs": endless("programs", lambda rng: arithmetic.document(rng, program=True)),
        "passkeys": endless("passkeys", passkey.document),
    }
    chats = endless("instructions", lambda rng: instructions.conversation(rng, world))
    parts: dict[str, Iterator[Document]] = {"instructions": ({"messages": messages} for messages in chats)}
    for part, source in texts.items():
        parts[part] = ({"text": text} for text in source)
    return parts


def tagged_documents(seed: int = 0, world: World | None = None) -> Iterator[tuple[str, Document]]:
    """The stream of `documents`, each with the part of the mixture that it comes from."""
    parts = _parts(seed, world or World())
    written = dict.fromkeys(MIXTURE, 0)
    while True:
        part = min(MIXTURE, key=lambda name: written[name] / MIXTURE[name])
        document = next(parts[part])
        written[part] += size(document)
        yield part, document


def documents(seed: int = 0, world: World | None = None) -> Iterator[Document]:
    """Endless documents, each {'text': str} or {'messages': [{'role', 'content'}, ...]}.

    The next document always comes from the part that lags furthest behind its share of `MIXTURE`, so
    every stretch of the stream has the declared mixture.
    """
    for _, document in tagged_documents(seed, world):
        yield document


def write_corpus(path: str | Path, n_documents: int, seed: int = 0, world: World | None = None) -> None:
    """Write the first `n_documents` of the stream as JSON lines, in constant memory."""
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for document in islice(documents(seed, world), n_documents):
            file.write(json.dumps(document) + "\n")
