"""The facts of the small world: who was born where, what a city is known for, what a company makes.

Every answer comes from a closed set of mostly single short words, so that a tokenizer trained on the
corpus spells it in one or two tokens and exact match is a fair measure. The seed decides the last
names and all assignments; the same seed gives the same world on any Python.
"""

import random
from dataclasses import dataclass

from burnish.world.table import listed

FEMALE_NAMES = listed("""
    Maren Elka Sanna Brisa Tilda Ronja Wilma Petra Nelly Ida Hedda Vera Lotta Carla Dina Freya Greta
    Ilse Jorun Katrin Linnea Mirja Noemi Odile Pilar Runa Silke Tova Ulla Ylva Zelda Alma
""")
MALE_NAMES = listed("""
    Joren Bram Casper Dario Emil Falk Gustav Henrik Ivar Jasper Klaus Lorens Matteo Nils Otto Pavel
    Rasmus Sander Tobin Ulrik Viktor Wim Yannick Zoran Anton Bruno Conrad Edwin Felix Goran Hugo Leif
""")
_LAST_STARTS = listed("""
    Tol Bre Kar Fen Hal Mor Vin Sel Dor Gra Lin Pas Ros Stel Ber Ned Wal Cas Hol Jan Kol Mal Nor Per Ran
    Tam Ver Wes Bol Dal Far Gil Ham Kin Lar Mun
""")
_LAST_ENDS = listed("""
    vik den strom mont ley rick low gard ner bach lund kamp zen dorf quist sby well rup fold hagen brook
    stad
""")

CITIES = listed("""
    Ashford Birchwick Brackwell Coldmere Corvale Dunmoor Eastlow Elmsworth Fairhaven Fernhill Foxley
    Glenrock Goldcrest Greystone Hartwood Hazelbay Highgate Hollin Ironbridge Ivyport Juniper Keldale
    Kingsmouth Larkfield Limeham Longmarsh Maplewick Merrow Millbrook Mossgate Netherby Northam
    Oakridge Oldbury Orchard Pebblesea Pinecliff Portwen Quarry Ravenhurst Redmill Riverton Rosewood
    Saltburn Sandwick Seaton Silverlake Southbank Starling Stonehall Summerby Swanley Thornbury
    Tidewater Underhill Valebridge Westhaven Whitcombe Willowdale Yarrow
""")
COUNTRIES = listed("""
    Norland Veloria Kestria Dravia Osmere Palonia Zembla Tharia Ruvania Calderon Isgard Lumeria
""")
COMPANIES = listed("""
    Acorn Beacon Cobalt Dynamo Ember Falcon Granary Harbor Indigo Jupiter Keystone Lantern Meridian
    Nimbus Octave Pinnacle Quantum Radius Saffron Titan Umbra Vertex Willow Xenon Yonder Zephyr Anchor
    Bluebird Compass Delta Evergreen Firefly Gemini Horizon Ivory Jigsaw Kingfisher Lotus Magnet
    Northstar Orbit Pelican Quiver Rainbow Sundial Trident Unison Voyager Windmill Zenith Atlas Bonfire
    Cascade Driftwood Eclipse Frontier Glacier Hourglass Monsoon Pioneer
""")

# Everything below takes the article "a" or no article at all, so that a prompt never betrays the answer.
_WORDS = {
    "profession": """
        baker teacher nurse farmer lawyer painter pilot dentist plumber sailor tailor judge doctor
        chemist barber butcher carpenter driver gardener librarian miner poet singer soldier surgeon
        waiter writer weaver potter banker
    """,
    "food": """
        soup rice pizza pasta noodles pancakes salad curry stew waffles dumplings sausages beans bread
        fish cheese cherries chocolate potatoes mushrooms lentils porridge pie cake ham toast shrimp
        peas yogurt figs
    """,
    "instrument": """
        violin piano guitar flute drum harp trumpet cello banjo clarinet trombone tuba organ fiddle lute
        bassoon
    """,
    "pet": """
        dog cat parrot rabbit hamster turtle goldfish pony canary lizard snake ferret goat hen mouse
        donkey
    """,
    "known_for": """
        glass salt wool lace honey wine silk pottery marble amber paper leather copper silver coal
        timber tea pepper ginger cotton linen ink perfume jade granite butter cider rope tin wax
    """,
    "industry": """
        steel software banking shipping farming mining fashion insurance printing tourism energy
        medicine furniture fishing television logistics
    """,
}
ANSWERS: dict[str, tuple[str, ...]] = {
    "birthplace": CITIES,
    "employer": COMPANIES,
    **{relation: listed(text) for relation, text in _WORDS.items()},
    "country": COUNTRIES,
    "headquarters": CITIES,
}
PERSON_RELATIONS = ("birthplace", "employer", "profession", "food", "instrument", "pet")
CITY_RELATIONS = ("country", "known_for")
COMPANY_RELATIONS = ("industry", "headquarters")
RELATIONS = PERSON_RELATIONS + CITY_RELATIONS + COMPANY_RELATIONS


@dataclass(frozen=True)
class Fact:
    """One truth of the world: `relation` of `subject` is `answer`."""

    relation: str
    subject: str
    answer: str


class World:
    """People, cities and companies with their facts, drawn from `seed`.

    `people` holds 260 unique full names whose last names are unique too. `facts` lists every fact once,
    in a fixed order: all of a subject's facts stand together.
    """

    def __init__(self, seed: int = 0, people: int = 260) -> None:
        rng = random.Random(f"world/{seed}")
        last_names = rng.sample([start + end for start in _LAST_STARTS for end in _LAST_ENDS], people)
        first_names = [name for pair in zip(FEMALE_NAMES, MALE_NAMES, strict=True) for name in pair]
        self.seed = seed
        self.cities, self.countries, self.companies = CITIES, COUNTRIES, COMPANIES
        self.people = tuple(
            f"{first_names[i % len(first_names)]} {last_name}" for i, last_name in enumerate(last_names)
        )
        self.facts: tuple[Fact, ...] = tuple(
            Fact(relation, subject, rng.choice(ANSWERS[relation]))
            for subjects, relations in (
                (self.people, PERSON_RELATIONS),
                (self.cities, CITY_RELATIONS),
                (self.companies, COMPANY_RELATIONS),
            )
            for subject in subjects
            for relation in relations
        )
        self._by_subject: dict[str, dict[str, str]] = {}
        for fact in self.facts:
            self._by_subject.setdefault(fact.subject, {})[fact.relation] = fact.answer

    def of(self, subject: str) -> dict[str, str]:
        """All that is known of `subject`, as relation -> answer."""
        return self._by_subject[subject]

    def answers(self, relation: str) -> tuple[str, ...]:
        """The closed set from which the answers of `relation` come."""
        return ANSWERS[relation]


def pronoun(subject: str) -> str:
    """'She' or 'He' for a person of the world, 'It' for a city or company."""
    first = subject.split()[0]
    if first in FEMALE_NAMES:
        return "She"
    return "He" if first in MALE_NAMES else "It"
