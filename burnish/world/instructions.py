"""Chat turns: questions about the world, and small jobs on words, that teach the chat format."""

import random
from collections.abc import Callable

from burnish.world import arithmetic, entailment, language
from burnish.world.facts import World
from burnish.world.phrasings import phrasings, state
from burnish.world.table import listed

Message = dict[str, str]

WORDS = tuple(
    dict.fromkeys(
        word
        for groups in (entailment.OBJECTS, arithmetic.OBJECTS, arithmetic.NAMES, language.WORDS)
        for group in groups.values()
        for word in group
    )
)
_COUNTS = listed("zero one two three four five six")


def _listing(words: list[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}"


def _reverse(rng: random.Random) -> tuple[str, str]:
    words = rng.sample(WORDS, rng.randint(2, 4))
    asked = rng.choice(("Say these words in reverse order: {}.", "Turn the order of these words around: {}."))
    return asked.format(" ".join(words)), " ".join(reversed(words))


def _upper(rng: random.Random) -> tuple[str, str]:
    word = rng.choice(WORDS)
    asked = rng.choice(("Write the word {} in capital letters.", "How does {} look in capital letters?"))
    return asked.format(word), word.upper()


def _items(rng: random.Random) -> tuple[str, str]:
    words = rng.sample(WORDS, rng.randint(2, 4))
    asked = rng.choice(("Make a list of these: {}.", "Write these words as a list: {}."))
    return asked.format(_listing(words)), "\n".join(f"- {word}" for word in words)


def _count(rng: random.Random) -> tuple[str, str]:
    words = rng.sample(WORDS, rng.randint(2, 6))
    asked = rng.choice(("How many words are these: {}?", "Count these words: {}."))
    return asked.format(" ".join(words)), f"{_COUNTS[len(words)].capitalize()}."


def _copy(rng: random.Random) -> tuple[str, str]:
    words = " ".join(rng.sample(WORDS, rng.randint(2, 5)))
    return rng.choice(("Copy this: {}", "Say after me: {}")).format(words), words


def _repeat(rng: random.Random) -> tuple[str, str]:
    word, count = rng.choice(WORDS), rng.randint(2, 4)
    return f"Say the word {word} {_COUNTS[count]} times.", " ".join([word] * count)


_JOBS: tuple[Callable[[random.Random], tuple[str, str]], ...] = (
    _reverse,
    _upper,
    _items,
    _count,
    _copy,
    _repeat,
)


def _about_the_world(rng: random.Random, world: World) -> tuple[str, str]:
    fact = rng.choice(world.facts)
    questions = [template for template in phrasings(fact.relation, "train") if "?" in template]
    question = rng.choice(questions).split(": ", 1)[1].rsplit("? ", 1)[0] + "?"
    statements = [template for template in phrasings(fact.relation, "train") if "?" not in template]
    return question.format(subject=fact.subject), state(fact, rng.choice(statements[:4]))


def conversation(rng: random.Random, world: World) -> list[Message]:
    """One to three exchanges, each a user's message and the assistant's, half of them about the world."""
    messages: list[Message] = []
    for _ in range(rng.randint(1, 3)):
        asked, answer = _about_the_world(rng, world) if rng.random() < 0.5 else rng.choice(_JOBS)(rng)
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return messages
