"""Tavic, a made-up language that no corpus contains, so that learning it means moving weights.

Grammar: an adjective follows its noun, a numeral follows the adjectives, the verb stands last (subject,
object, verb), and a plural noun is followed by a particle. "three red birds" becomes bird PLURAL red three.

Its words are English words with other meanings, so that the base model knows every token of it, and what it
must learn is the language and not an alphabet.
"""

import random
from functools import cache

from burnish.world.facts import ANSWERS
from burnish.world.table import listed

_ENGLISH = {
    "noun": """
        bird dog tree house river stone boat king queen farmer horse star garden letter window road
        cloud island flower hammer bottle candle spider forest
    """,
    "adjective": "red blue green white black big small old young warm cold happy quiet clean",
    "verb": "see hear follow paint carry find help want watch move break like wash hide",
    "numeral": "two three four five six seven eight nine",
}
WORDS: dict[str, tuple[str, ...]] = {kind: listed(text) for kind, text in _ENGLISH.items()}
"""Plain English words that the corpus uses too."""
_SIZES = {"noun": 8, "adjective": 5, "verb": 5, "numeral": 5}
MEANINGS = {kind: WORDS[kind][:size] for kind, size in _SIZES.items()}
"""The English words that Tavic has words for."""
# Words of an English phrase -> how many such phrases are drawn; + marks a plural.
_PATTERNS = {
    "adjective noun": 30,
    "adjective noun+": 30,
    "numeral noun+": 30,
    "numeral adjective noun+": 170,
    "noun+ verb noun+": 220,
}
SPLIT_SIZES = {"train": 300, "dev": 60, "test": 120}


def _lexicon() -> dict[str, str]:
    rng = random.Random("tavic/lexicon")
    pool = [word for relation in ("food", "instrument", "pet", "profession") for word in ANSWERS[relation]]
    taken = {word for words in WORDS.values() for word in words}
    free = sorted({word for word in pool if word.isalpha() and word not in taken})
    english = [*(word for words in MEANINGS.values() for word in words), "PLURAL"]
    return dict(zip(english, rng.sample(free, len(english)), strict=True))


LEXICON = _lexicon()
"""English base form -> Tavic word."""
PLURAL = LEXICON.pop("PLURAL")
_KIND = {word: kind for kind, words in MEANINGS.items() for word in words}


def translate(english: str) -> str:
    """The Tavic for a phrase of words of `MEANINGS` (nouns may end in a plural s).

    Raises ValueError for a word that Tavic does not have.
    """
    translated: list[str] = []
    numerals: list[str] = []
    adjectives: list[str] = []
    verbs: list[str] = []
    for word in english.split():
        base = word if word in LEXICON else word.removesuffix("s")
        if base not in LEXICON:
            raise ValueError(f"Tavic has no word for {word!r}")
        if _KIND[base] == "noun":
            translated += [LEXICON[base], *([PLURAL] if word != base else []), *adjectives, *numerals]
            adjectives, numerals = [], []
        else:
            {"adjective": adjectives, "numeral": numerals, "verb": verbs}[_KIND[base]].append(LEXICON[base])
    return " ".join(translated + verbs)


@cache
def phrases() -> dict[str, tuple[str, ...]]:
    """Split -> distinct English phrases of 2 or 3 words; every word of dev and test occurs in train."""
    rng = random.Random("tavic/phrases")
    drawn: dict[str, None] = {}
    for pattern, count in _PATTERNS.items():
        goal = len(drawn) + count
        while len(drawn) < goal:
            words = [rng.choice(MEANINGS[slot.rstrip("+")]) + "s" * slot.endswith("+") for slot in pattern.split()]
            if len(set(words)) == len(words):
                drawn[" ".join(words)] = None
    shuffled = rng.sample(list(drawn), len(drawn))
    train = shuffled[: SPLIT_SIZES["train"]]
    known = {word for phrase in train for word in phrase.split()}
    rest = [phrase for phrase in shuffled[len(train) :] if known.issuperset(phrase.split())]
    dev, test = rest[: SPLIT_SIZES["dev"]], rest[SPLIT_SIZES["dev"] :][: SPLIT_SIZES["test"]]
    return {"train": tuple(train), "dev": tuple(dev), "test": tuple(test)}
