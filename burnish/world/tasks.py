"""The world's tasks as rows of prompt and completion, in splits that share nothing they should not.

A split's content is fixed by the world (or, where no world is involved, by its generator); `seed` only
decides which of it is drawn and in what order, so that train rows of one seed never meet test rows of
another. Every completion starts with the space that separates it from its prompt. Classification rows
hold `label` (the class) and `choices` (the completions to choose from).
"""

import random
from collections.abc import Callable

from burnish.world import arithmetic as stories
from burnish.world import entailment as inference
from burnish.world import language
from burnish.world import passkey as hidden
from burnish.world import reviews as opinions
from burnish.world.facts import World
from burnish.world.phrasings import SPLITS, phrasings

Row = dict[str, str | int | float | list[str]]

NEAR_TAGS = {"profession": "job", "food": "fare", "instrument": "tune", "pet": "beast"}
"""Relation -> its tag in the near task; no tag occurs in the corpus, not even as a word."""
_NEAR_PEOPLE = {"train": (0, 75), "dev": (75, 100), "test": (100, 150)}
SIZES = {"train": 600, "dev": 100, "test": 200}
"""Rows of the generated tasks (reviews, entailment, arithmetic, passkey) unless `count` says otherwise."""


def _start(task: str, split: str, seed: int) -> random.Random:
    if split not in SPLITS:
        raise ValueError(f"{task} has no split {split!r}: choose one of {', '.join(SPLITS)}")
    return random.Random(f"{task}/{split}/{seed}")


def _distinct(make: Callable[[int], Row], count: int) -> list[Row]:
    """`count` rows with different prompts; `make` gets the index of the row that it is to fill."""
    rows: dict[object, Row] = {}
    while len(rows) < count:
        row = make(len(rows))
        rows.setdefault(row["prompt"], row)
    return list(rows.values())


def near(split: str, seed: int = 0, world: World | None = None) -> list[Row]:
    """Facts that pretraining taught, asked in a shorthand it never showed: 'job Maren Tolvik ='.

    300 train, 100 dev and 200 test rows: four relations of 75, 25 and 50 people, who are disjoint.
    Further fields: subject, relation.
    """
    rng = _start("near", split, seed)
    world = world or World()
    people = random.Random(f"near/{world.seed}").sample(world.people, len(world.people))
    first, last = _NEAR_PEOPLE[split]
    rows: list[Row] = [
        {
            "prompt": f"{tag} {person} =",
            "completion": f" {world.of(person)[relation]}",
            "subject": person,
            "relation": relation,
        }
        for person in people[first:last]
        for relation, tag in NEAR_TAGS.items()
    ]
    rng.shuffle(rows)
    return rows


def far(split: str, seed: int = 0) -> list[Row]:
    """Translation into Tavic, which pretraining never showed: 300 train, 60 dev and 120 test phrases."""
    rng = _start("far", split, seed)
    rows: list[Row] = [
        {"prompt": f"{phrase} =", "completion": f" {language.translate(phrase)}"}
        for phrase in language.phrases()[split]
    ]
    rng.shuffle(rows)
    return rows


def facts_test(split: str, seed: int = 0, world: World | None = None) -> list[Row]:
    """Every fact of the world once, in a random phrasing of `split`. Further fields: subject, relation."""
    rng = _start("facts", split, seed)
    return [
        {
            "prompt": rng.choice(phrasings(fact.relation, split)).format(subject=fact.subject),
            "completion": f" {fact.answer}",
            "subject": fact.subject,
            "relation": fact.relation,
        }
        for fact in (world or World()).facts
    ]


def reviews(split: str, seed: int = 0, count: int | None = None) -> list[Row]:
    """The sentiment of a review, as many positive as negative."""
    rng = _start("reviews", split, seed)

    def row(index: int) -> Row:
        label = opinions.LABELS[index % 2]
        prompt = f"Review: {opinions.review(rng, split, label)}\nSentiment:"
        return {
            "prompt": prompt,
            "completion": f" {label}",
            "label": label,
            "choices": [f" {choice}" for choice in opinions.LABELS],
        }

    return _distinct(row, count or SIZES[split])


def entailment(split: str, seed: int = 0, count: int | None = None, world: World | None = None) -> list[Row]:
    """Does the hypothesis follow? As many of each class. Further fields: premise, hypothesis."""
    rng = _start("entailment", split, seed)
    world = world or World()

    def row(index: int) -> Row:
        label = inference.LABELS[index % 2]
        premise, hypothesis = inference.pair(rng, world, split, label)
        return {
            "prompt": f"Premise: {premise}\nHypothesis: {hypothesis}\nEntailed:",
            "completion": (" yes", " no")[index % 2],
            "label": label,
            "choices": [" yes", " no"],
            "premise": premise,
            "hypothesis": hypothesis,
        }

    return _distinct(row, count or SIZES[split])


def arithmetic(split: str, seed: int = 0, count: int | None = None) -> list[Row]:
    """Story problems to be solved in steps. Further fields: label (the number), question, program."""
    rng = _start("arithmetic", split, seed)

    def row(index: int) -> Row:
        problem = stories.problem(rng, split)
        return {
            "prompt": stories.prompt(problem.question),
            "completion": f" {problem.steps}",
            "label": str(problem.answer),
            "question": problem.question,
            "program": problem.program,
        }

    return _distinct(row, count or SIZES[split])


def passkey(split: str, seed: int = 0, words: int = 120, count: int | None = None) -> list[Row]:
    """Hidden passkeys in prompts of about `words` words, at depths spread evenly over the text."""
    rng = _start("passkey", split, seed)
    count = count or SIZES[split]
    return _distinct(lambda index: dict(hidden.passkey(rng, words, index / max(1, count - 1), split)), count)


TASKS: dict[str, Callable[..., list[Row]]] = {
    "near": near,
    "far": far,
    "facts": facts_test,
    "reviews": reviews,
    "entailment": entailment,
    "arithmetic": arithmetic,
    "passkey": passkey,
}
