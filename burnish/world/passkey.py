"""A passkey of five digits hidden in filler text: does a long context still reach the answer?

After the passkey test of Mohtashami and Jaggi 2023 (Landmark Attention, section 4.2), with a filler that
varies and a depth that is chosen.
"""

import random

from burnish.world.table import listed

_SUBJECTS = listed("river field valley harbour street village mountain meadow beach square lake path")
_STATES = listed("wide quiet green empty calm cold sunny old narrow bright misty peaceful")
_FILLERS = (
    "The {} is {}.",
    "The {} was {} all day.",
    "Today the {} looks {}.",
    "In spring the {} is {} again.",
    "People say that the {} is {}.",
    "The {} stays {} for a while.",
)
_INTRO = "There is a passkey in this text. Remember it."


def passkey(rng: random.Random, words: int, depth: float, split: str = "train") -> dict[str, str | int | float]:
    """A row whose prompt is about `words` words long and holds the passkey at `depth` (0 start, 1 end).

    Fields: prompt, completion (a space and the five digits), words (the prompt's true count), depth.
    The remainder of a passkey by 7 says which split owns it, so that no training text holds a test's.
    """
    if not 0 <= depth <= 1:
        raise ValueError(f"depth {depth}: choose one between 0 (start) and 1 (end)")
    while True:
        key = rng.randrange(10000, 100000)
        if {0: "test", 1: "dev"}.get(key % 7, "train") == split:
            break
    needle, ending = f"The passkey is {key}. Keep {key} in mind.", "What is the passkey? The passkey is"
    fixed = sum(len(part.split()) for part in (_INTRO, needle, ending))
    sentences: list[str] = []
    missing = words - fixed
    while missing > 0:
        sentences.append(rng.choice(_FILLERS).format(rng.choice(_SUBJECTS), rng.choice(_STATES)))
        missing -= len(sentences[-1].split())
    sentences.insert(round(depth * len(sentences)), needle)
    prompt = " ".join([_INTRO, *sentences, ending])
    return {"prompt": prompt, "completion": f" {key}", "words": len(prompt.split()), "depth": depth}


def document(rng: random.Random) -> str:
    """A solved training passkey in a text of 40 to 160 words."""
    row = passkey(rng, rng.randint(40, 160), rng.random())
    return f"{row['prompt']}{row['completion']}."
