"""Reviews of products, restaurants and films, with praise and blame in one text and one verdict.

Praise and blame are pairs (aspect, judgement). Which split owns a pair is fixed by its indices, so that
dev and test combine known aspects with known judgements in pairs that training never showed; the
reviewed things are disjoint too.
"""

import random
from dataclasses import dataclass

from burnish.world.table import listed

POSITIVE, NEGATIVE = "positive", "negative"
LABELS = (POSITIVE, NEGATIVE)

_JUDGEMENTS = {
    POSITIVE: listed("""
        good great lovely superb perfect excellent pleasant wonderful charming delightful impressive
        brilliant
    """),
    NEGATIVE: listed("""
        bad poor awful dreadful terrible horrible annoying disappointing boring useless dull shameful
    """),
}
_CLOSERS = {
    POSITIVE: (
        "would gladly come back to it",
        "can recommend it",
        "enjoyed every minute",
        "was very pleased",
    ),
    NEGATIVE: ("regretted it at once", "would warn anyone", "wanted the money back", "was very upset"),
}
_CRITICS = ("I", "My sister", "My brother", "Everyone at home", "Even my neighbour", "My oldest friend")


@dataclass(frozen=True)
class _Domain:
    openings: tuple[str, ...]
    things: dict[str, tuple[str, ...]]
    aspects: tuple[str, ...]
    neutral: tuple[str, ...]


_DOMAINS = (
    _Domain(
        ("I bought this {} last week.", "We have used the {} for a month.", "The {} came on Monday."),
        {
            "train": listed("kettle blender heater camera radio printer keyboard mixer vacuum scooter"),
            "dev": ("toaster", "lawnmower", "torch"),
            "test": ("freezer", "headset", "backpack", "monitor"),
        },
        ("battery", "design", "sound", "build", "price", "handle", "manual", "colour"),
        (
            "It came in a brown box.",
            "It stands in the kitchen.",
            "I use it twice a week.",
            "It has two buttons.",
        ),
    ),
    _Domain(
        ("We had dinner at the {}.", "I ate at the {} on Friday.", "We booked a table at the {}."),
        {
            "train": tuple(
                f"{a} {b}"
                for a, b in zip(
                    listed("Golden Silver Hungry Old Red Royal Little Merry Black Laughing"),
                    listed("Spoon Kettle Bear Mill Rooster Garden Kitchen Miller Swan Lobster"),
                    strict=True,
                )
            ),
            "dev": ("Green Table", "Happy Oyster", "White Fox"),
            "test": ("Copper Pan", "Sleepy Whale", "Blue Door", "Stone Oven"),
        },
        ("service", "starter", "main course", "dessert", "music", "view", "wine list", "bill"),
        ("We sat near the window.", "There were four of us.", "It was raining.", "The menu has two pages."),
    ),
    _Domain(
        ("I saw {} on Sunday.", "We watched {} last night.", "{} is a film of two hours."),
        {
            "train": (
                *("Silent Harvest", "Midnight Ferry", "The Last Garden", "Paper Moons", "A Winter Road"),
                *("Broken Compass", "The Tall Stranger", "Seven Letters", "Hidden Lake", "The Clock Tower"),
            ),
            "dev": ("Distant Thunder", "The Glass Piano", "Lost Summer"),
            "test": ("Empty Harbour", "The Iron Orchard", "Falling Leaves", "A Borrowed Coat"),
        },
        ("plot", "acting", "ending", "dialogue", "soundtrack", "camera work", "first half", "main character"),
        (
            "It was shown in the big hall.",
            "The story is set at sea.",
            "The hall was half full.",
            "It is in colour.",
        ),
    ),
)


def _owner(first: int, second: int) -> str:
    return {0: "test", 1: "dev"}.get((2 * first + second) % 6, "train")


def _pair(rng: random.Random, split: str, left: int, right: int) -> tuple[int, int]:
    while True:
        pair = rng.randrange(left), rng.randrange(right)
        if _owner(*pair) == split:
            return pair


def review(rng: random.Random, split: str, label: str) -> str:
    """A review of 3 to 5 sentences whose verdict is `label`: its last and most of its judgements agree."""
    domain = rng.choice(_DOMAINS)

    free = list(domain.aspects)

    def judged(polarity: str) -> tuple[str, str]:
        while True:
            i, j = _pair(rng, split, len(domain.aspects), len(_JUDGEMENTS[polarity]))
            if domain.aspects[i] in free:
                free.remove(domain.aspects[i])
                return domain.aspects[i], _JUDGEMENTS[polarity][j]

    other = NEGATIVE if label == POSITIVE else POSITIVE
    aspect, word = judged(label)
    rival, rival_word = judged(other)
    body = [
        rng.choice(
            (
                f"The {aspect} was {word}, though the {rival} was {rival_word}.",
                f"The {rival} was {rival_word}, but the {aspect} was {word}.",
                f"Although the {rival} was {rival_word}, the {aspect} was {word}.",
                f"The {aspect} was {word}.",
            )
        ),
    ]
    aspect, word = judged(label)
    critic, closer = _pair(rng, split, len(_CRITICS), len(_CLOSERS[label]))
    denied, denied_word = judged(other)
    body.append(
        rng.choice(
            (
                f"I found the {aspect} {word}.",
                f"The {aspect} was really {word}.",
                f"The {denied} was not {denied_word} at all.",
                f"{_CRITICS[critic]} {_CLOSERS[label][closer]}.",
                f"{_CRITICS[critic]} {_CLOSERS[label][closer]}.",
            )
        )
    )
    if rng.random() < 0.6:
        body.insert(rng.randrange(3), rng.choice(domain.neutral))
    opening = rng.choice(domain.openings).format(rng.choice(domain.things[split]))
    return " ".join([opening, *body])


_VERDICTS = {
    POSITIVE: (
        "The review is positive.",
        "The writer was happy.",
        "The writer liked it.",
        "Good or bad? Good.",
    ),
    NEGATIVE: (
        "The review is negative.",
        "The writer was unhappy.",
        "The writer hated it.",
        "Good or bad? Bad.",
    ),
}


def document(rng: random.Random) -> str:
    """A training review with its verdict in plain words, not in the notation of the review task."""
    label = rng.choice(LABELS)
    return f"{review(rng, 'train', label)} {rng.choice(_VERDICTS[label])}"
