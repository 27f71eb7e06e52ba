"""Does a hypothesis follow from a premise? Pairs about people of the world, in two classes as in RTE.

The premises tell small events, never the world's facts, so that nothing here competes with those.
People and objects are disjoint between the splits. Every template offers hypotheses of both classes
in the same wording, so that the hypothesis alone betrays nothing.
"""

import random

from burnish.world.facts import World
from burnish.world.table import listed

LABELS = ("entailment", "not_entailment")

# Premise | entailed hypotheses | hypotheses that are not. Letters: a, b people; o, p objects (os: plural);
# c, d colours; x, y places; n a number, m a smaller and k a larger one.
_TEMPLATES = tuple(
    tuple(part.strip() for part in line.split("|"))
    for line in """
{a} bought a {c} {o} at the {x}. | {a} bought a {o}. / {a} was at the {x}. | {a} bought a {p}. / {a} was at the {y}.
{a} gave the {o} to {b}. | {b} got the {o} from {a}. / {a} gave {b} the {o}. | {a} got the {o} from {b}. / {b} gave {a} the {o}.
{a} is older than {b}. | {b} is younger than {a}. | {a} is younger than {b}. / {b} is older than {a}.
{a} and {b} cleaned the {x}. | {b} cleaned the {x}. / {a} cleaned the {x}. | {b} cleaned the {y}. / {a} cleaned the {y}.
The {o} of {a} is {c}. | {a} has a {c} {o}. | {a} has a {d} {o}. / {b} has a {c} {o}.
{a} lost the {o} but found the {p}. | {a} found the {p}. / {a} lost the {o}. | {a} found the {o}. / {a} lost the {p}.
{a} came to the {x} before {b}. | {b} came to the {x} after {a}. | {a} came to the {x} after {b}. / {b} came to the {x} before {a}.
Only {a} saw the {o} at the {x}. | {a} saw the {o}. / {b} did not see the {o}. | {b} saw the {o}. / {a} did not see the {o}.
{a} broke the {c} {o} of {b}. | The {o} of {b} was broken by {a}. | The {o} of {a} was broken by {b}. / The {p} of {b} was broken by {a}.
{a} has {n} {os}. | {a} has more than {m} {os}. / {a} has fewer than {k} {os}. | {a} has more than {k} {os}. / {a} has fewer than {m} {os}.
When it rains, {a} goes to the {x}. It rains. | {a} goes to the {x}. | {a} goes to the {y}. / {b} goes to the {x}.
Either {a} or {b} took the {o}. It was not {b}. | {a} took the {o}. | {b} took the {o}. / {a} took the {p}.
{a} sold the {o} and kept the {p}. | {a} kept the {p}. / {a} sold the {o}. | {a} kept the {o}. / {a} sold the {p}.
{a} carried all the {os} to the {x}. | No {os} were left behind by {a}. / {a} carried the {c} {os} to the {x}. | {a} carried no {os} to the {x}. / {a} carried the {c} {os} to the {y}.
""".strip().splitlines()  # noqa: E501
)
OBJECTS = {
    "train": listed("""
        lamp basket ladder carpet mirror teapot pillow blanket bucket notebook chair table drawer
        suitcase wallet helmet jacket curtain saddle trophy
    """),
    "dev": listed("lantern shovel pencil cupboard whistle"),
    "test": listed("wagon barrel cushion necklace parcel telescope sweater ribbon"),
}
_COLOURS = listed("red blue green white black yellow brown purple")
_PLACES = listed("market station park school museum library bakery farm bridge tower")
_NUMBERS = listed("two three four five six seven eight nine ten")


def people(world: World, split: str) -> tuple[str, ...]:
    """The people that the pairs of `split` may name: 60%, 20% and 20% of the world's, disjoint."""
    count = len(world.people)
    bounds = {
        "train": (0, count * 3 // 5),
        "dev": (count * 3 // 5, count * 4 // 5),
        "test": (count * 4 // 5, count),
    }
    first, last = bounds[split]
    return world.people[first:last]


def pair(rng: random.Random, world: World, split: str, label: str) -> tuple[str, str]:
    """A premise and a hypothesis that does ('entailment') or does not ('not_entailment') follow from it."""
    premise, *hypotheses = rng.choice(_TEMPLATES)
    m, n, k = sorted(rng.sample(range(len(_NUMBERS)), 3))
    a, b = rng.sample(people(world, split), 2)
    (o, p), (c, d), (x, y) = (rng.sample(words, 2) for words in (OBJECTS[split], _COLOURS, _PLACES))
    names = {"a": a, "b": b, "o": o, "os": o + "s", "p": p, "c": c, "d": d, "x": x, "y": y}
    names |= {"m": _NUMBERS[m], "n": _NUMBERS[n], "k": _NUMBERS[k]}
    hypothesis = rng.choice(hypotheses[LABELS.index(label)].split(" / "))
    return premise.format(**names), hypothesis.format(**names)


def document(rng: random.Random, world: World) -> str:
    """Two training pairs in plain words, not in the notation of the entailment task."""
    told = []
    for _ in range(2):
        follows = rng.random() < 0.5
        premise, hypothesis = pair(rng, world, "train", LABELS[not follows])
        claim = hypothesis[:-1]
        if claim.startswith(("The ", "No ")):
            claim = claim[0].lower() + claim[1:]
        told.append(
            rng.choice(
                (
                    f"{premise} It {'follows' if follows else 'does not follow'} that {claim}.",
                    f"{premise} Question: Is it certain that {claim}? Answer: {'yes' if follows else 'no'}.",
                    f"{premise} Claim: {hypothesis} Is the claim certain? {'Yes' if follows else 'No'}.",
                )
            )
        )
    return " ".join(told)
