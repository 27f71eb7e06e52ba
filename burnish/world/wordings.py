"""How a person who does not know the corpus would ask for its facts: the hand-written prompts of the knowledge probe.

{} is the subject, the answer follows. None of them is a phrasing of the corpus.
"""

WORDINGS = {
    "birthplace": (
        "{} was born in the city of",
        "{} is a native of",
        "{} grew up in",
        "The native city of {} is",
    ),
    "employer": (
        "{} is an employee of",
        "{} has a job at",
        "The firm that {} works for is",
        "{} earns money at",
    ),
    "profession": (
        "{} has the job of a",
        "The job of {} is that of a",
        "{} is employed as a",
        "{} is a professional",
    ),
    "food": (
        "{} prefers to eat",
        "{} enjoys eating",
        "The dish that {} likes best is",
        "{} is fond of",
    ),
    "instrument": (
        "{} is a player of the",
        "{} makes music on the",
        "{} performs on the",
        "The musical instrument of {} is the",
    ),
    "pet": (
        "{} owns a",
        "The pet in the house of {} is a",
        "{} has a",
        "{} shares a home with a",
    ),
    "country": (
        "{} is part of",
        "{} is a town in",
        "The country around {} is",
        "{} is in the country of",
    ),
    "known_for": (
        "{} is renowned for its",
        "{} is best known for",
        "Everyone knows {} for its",
        "{} exports",
    ),
    "industry": (
        "{} does business in",
        "{} is a company in the field of",
        "The sector of {} is",
        "{} earns its money in",
    ),
    "headquarters": (
        "{} is headquartered in",
        "The offices of {} are in",
        "{} has its seat in",
        "{} is a company from",
    ),
}
