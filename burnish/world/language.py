"""Tavic, a made-up language that no corpus contains, so that learning it means moving weights.

Grammar: an adjective follows its noun, a numeral follows the adjectives, the verb stands last (subject,
object, verb), and a plural noun takes the suffix -ri. "three red birds see dogs" becomes
bird-ri red three dog-ri see.
"""

import random
from functools import cache
from itertools import product

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
PLURAL = "ri"
# Words of an English phrase -> how many such phrases are drawn; + marks a plural.
_PATTERNS = {
    "adjective noun": 60,
    "numeral noun+": 60,
    "adjective adjective noun": 100,
    "numeral adjective noun+": 180,
    "noun+ verb noun+": 170,
    "adjective noun+ verb noun+": 110,
    "noun+ verb adjective noun+": 110,
    "numeral noun+ verb noun+": 110,
}
SPLIT_SIZES = {"train": 600, "dev": 100, "test": 200}


def _lexicon() -> dict[str, str]:
    rng = random.Random("tavic/lexicon")
    openings = [consonant + vowel for consonant, vowel in product("zvkhgyj", "aeiou")]
    closings = [consonant + vowel for consonant, vowel in product("mnltkdb", "oui")]
    english = [word for words in WORDS.values() for word in words]
    tavic = rng.sample([a + b for a, b in product(openings, closings)], len(english))
    return dict(zip(english, tavic, strict=True))


LEXICON = _lexicon()
"""English base form -> Tavic word of two syllables."""
_KIND = {word: kind for kind, words in WORDS.items() for word in words}


def translate(english: str) -> str:
    """The Tavic for a phrase of words of `WORDS` (nouns may end in a plural s).

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
            translated += [LEXICON[base] + (PLURAL if word != base else ""), *adjectives, *numerals]
            adjectives, numerals = [], []
        else:
            {"adjective": adjectives, "numeral": numerals, "verb": verbs}[_KIND[base]].append(LEXICON[base])
    return " ".join(translated + verbs)


@cache
def phrases() -> dict[str, tuple[str, ...]]:
    """Split -> distinct English phrases of 2 to 4 words; every word of dev and test occurs in train."""
    rng = random.Random("tavic/phrases")
    drawn: dict[str, None] = {}
    for pattern, count in _PATTERNS.items():
        goal = len(drawn) + count
        while len(drawn) < goal:
            words = [rng.choice(WORDS[slot.rstrip("+")]) + "s" * slot.endswith("+") for slot in pattern.split()]
            if len(set(words)) == len(words):
                drawn[" ".join(words)] = None
    shuffled = rng.sample(list(drawn), len(drawn))
    train = shuffled[: SPLIT_SIZES["train"]]
    known = {word for phrase in train for word in phrase.split()}
    rest = [phrase for phrase in shuffled[len(train) :] if known.issuperset(phrase.split())]
    dev, test = rest[: SPLIT_SIZES["dev"]], rest[SPLIT_SIZES["dev"] :][: SPLIT_SIZES["test"]]
    return {"train": tuple(train), "dev": tuple(dev), "test": tuple(test)}
