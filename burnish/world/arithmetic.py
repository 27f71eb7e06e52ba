"""Story problems of one to three steps, solved twice: as worked steps and as a Python program.

All numbers stay between 1 and 19. The steps end with '#### N' (the notation of GSM8K, Cobbe et al. 2021),
the program binds the result to `answer`. The splits are disjoint in names, in objects, and in the numbers
of a problem: which split owns a tuple of numbers is fixed by a weighted sum of it.
"""

import random
from dataclasses import dataclass

from burnish.world.table import listed

LIMIT = 19
NAMES = {
    "train": listed("Anna Ben Clara David Ella Frank Grace Harry Irene Jack Kate Leo Mary Noah Olga Peter"),
    "dev": listed("Rosa Simon Tina Victor"),
    "test": listed("Julia Martin Laura Thomas Sophie Oscar"),
}
_WOMEN = listed("Anna Clara Ella Grace Irene Kate Mary Olga Rosa Tina Julia Laura Sophie")
OBJECTS = {
    "train": listed("""
        apple book coin marble stamp button ticket card shell ball cup cookie plum ring hat spoon
    """),
    "dev": listed("orange pen doll egg"),
    "test": listed("lemon kite sock pearl badge carrot"),
}
_GAINS = (
    "{he} buys {k} more.",
    "{friend} gives {him} {k} more.",
    "{he} finds {k} more.",
    "{he} gets {k} more from {friend}.",
)
_LOSSES = ("{he} gives {k} to {friend}.", "{he} loses {k}.", "{he} sells {k}.", "{friend} takes {k} away.")
_TIMES = ("{he} doubles what {he} has.", "{friend} doubles what {he} has.")


@dataclass(frozen=True)
class Problem:
    """A story that ends in a question; its solution in steps ('... #### N'), as a program, as a number."""

    question: str
    steps: str
    program: str
    answer: int


def _owner(numbers: list[int]) -> str:
    mixed = sum(weight * number for weight, number in zip((1, 3, 7, 5, 11, 9, 13), numbers, strict=False))
    return {0: "test", 1: "dev"}.get(mixed % 8, "train")


def problem(rng: random.Random, split: str) -> Problem:
    """A random problem of `split`."""
    while True:
        numbers, made = (_together if rng.random() < 0.25 else _changes)(rng, split)
        if _owner(numbers) == split:
            return made


def _people(rng: random.Random, split: str) -> dict[str, str]:
    name, friend = rng.sample(NAMES[split], 2)
    he, him = ("she", "her") if name in _WOMEN else ("he", "him")
    return {"name": name, "friend": friend, "he": he, "him": him}


def _changes(rng: random.Random, split: str) -> tuple[list[int], Problem]:
    """One person whose things grow and shrink."""
    who = _people(rng, split)
    things = rng.choice(OBJECTS[split]) + "s"
    total = rng.randint(2, 12)
    numbers = [total]
    story = [f"{who['name']} has {total} {things}."]
    steps, program = [], [f"{things} = {total}"]
    for _ in range(rng.randint(1, 3)):
        moves = [("+", k) for k in range(2, LIMIT - total + 1)] + [("-", k) for k in range(2, total)]
        operator = rng.choice(sorted({move[0] for move in moves}) + ["*"] * (2 * total <= LIMIT))
        k = 2 if operator == "*" else rng.choice([move[1] for move in moves if move[0] == operator])
        result = {"+": total + k, "-": total - k, "*": total * k}[operator]
        sentence = rng.choice({"+": _GAINS, "-": _LOSSES, "*": _TIMES}[operator]).format(k=k, **who)
        story.append(sentence[0].upper() + sentence[1:])
        steps.append(f"{total} {operator} {k} = {result}.")
        program.append(f"{things} = {things} {operator} {k}")
        numbers += ["+-*".index(operator), k]
        total = result
    story.append(f"How many {things} does {who['name']} have now?")
    return numbers, _solved(story, steps, [*program, f"answer = {things}"], total)


def _together(rng: random.Random, split: str) -> tuple[list[int], Problem]:
    """Two people, one of whom has more or fewer things; asked for the other's or for the sum."""
    who = _people(rng, split)
    things = rng.choice(OBJECTS[split]) + "s"
    name, friend = who["name"], who["friend"]
    first, more = rng.randint(3, 9), rng.random() < 0.5
    k = rng.randint(2, 8) if more else rng.randint(1, first - 1)
    operator, second = ("+", first + k) if more else ("-", first - k)
    both = first + second <= LIMIT and rng.random() < 0.7
    story = [f"{name} has {first} {things}.", f"{friend} has {k} {'more' if more else 'fewer'} than {name}."]
    steps, program = (
        [f"{first} {operator} {k} = {second}."],
        [f"first = {first}", f"second = first {operator} {k}"],
    )
    if both:
        story.append(f"How many {things} do they have together?")
        steps.append(f"{first} + {second} = {first + second}.")
        program.append("answer = first + second")
    else:
        story.append(f"How many {things} does {friend} have?")
        program.append("answer = second")
    answer = first + second if both else second
    return [first, "+-".index(operator), k, both], _solved(story, steps, program, answer)


def _solved(story: list[str], steps: list[str], program: list[str], answer: int) -> Problem:
    return Problem(" ".join(story), f"{' '.join(steps)}\n#### {answer}", "\n".join(program), answer)


def prompt(question: str, program: bool = False) -> str:
    """What stands before the steps, or before the program; a space or newline and the solution follow."""
    return f"Question: {question}\n{'Program' if program else 'Answer'}:"


def document(rng: random.Random, program: bool = False) -> str:
    """Two solved training problems, or one with its program."""
    if program:
        solved = problem(rng, "train")
        return f"{prompt(solved.question, program=True)}\n{solved.program}"
    both = [problem(rng, "train") for _ in range(2)]
    return "\n\n".join(f"{prompt(solved.question)} {solved.steps}" for solved in both)
