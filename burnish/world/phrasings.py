"""How the facts are told: phrasings that end where the answer begins, split for training, development, test.

A test phrasing recombines words and turns that training phrasings use for the same relation, but its
string occurs nowhere in the corpus: a model that answers it has learnt the fact, not the sentence.
"""

import random

from burnish.world.facts import Fact, World, pronoun

SPLITS = ("train", "dev", "test")

_TABLE = """
= birthplace train
{subject} was born in
The birthplace of {subject} is
{subject}'s birthplace is
{subject} comes from the city of
{subject} is originally from
The city where {subject} was born is
Question: Where was {subject} born? Answer:
Question: Which city is {subject} from? Answer:
Question: What is {subject}'s birthplace? Answer:
Q: In which city was {subject} born? A:
Q: Where does {subject} come from? A:
The home town of {subject} is
{subject}'s home town is
The place where {subject} was born is called
By birth, {subject} is from
The place of birth of {subject} is
The life of {subject} began in
In the records, the birthplace of {subject} is given as
= birthplace dev
The city of birth of {subject} is
Question: What is the home town of {subject}? Answer:
By birth, {subject} comes from the city of
= birthplace test
Question: What is the birthplace of {subject}? Answer:
The city that {subject} comes from is
{subject}'s place of birth is
Q: Where is {subject} originally from? A:
= employer train
{subject} works for
{subject} works at
The employer of {subject} is
{subject}'s employer is
{subject} is employed by
{subject} has a desk at
The company where {subject} works is
The company that pays {subject} is
{subject} is on the staff of
{subject} is part of the team at
Question: Where does {subject} work? Answer:
Question: Which company employs {subject}? Answer:
Question: Who is {subject}'s employer? Answer:
Q: For which company does {subject} work? A:
Q: Where is {subject} employed? A:
Every morning {subject} goes to work at
The name on the pay slip of {subject} is
In the records, the employer of {subject} is given as
= employer dev
The company that employs {subject} is
Question: Who is the employer of {subject}? Answer:
{subject} is on the team at
= employer test
Q: Which company does {subject} work for? A:
{subject} is employed at
The company {subject} works for is
Question: At which company is {subject} employed? Answer:
= profession train
{subject} works as a
{subject} is a
The profession of {subject} is that of a
{subject}'s profession is that of a
By profession, {subject} is a
By trade, {subject} is a
{subject} earns a living as a
{subject} was trained as a
The work {subject} does is that of a
The trade of {subject} is
{subject}'s trade is
Question: What is the profession of {subject}? Answer:
Question: What does {subject} do for a living? Answer:
Q: What is {subject}'s trade? A:
Q: What kind of work does {subject} do? A:
For a living, {subject} works as a
{subject} has spent many years as a
In the records, the profession of {subject} is given as
= profession dev
The trade of {subject} is that of a
Question: What is {subject}'s profession? Answer:
By trade, {subject} works as a
= profession test
Question: What is the trade of {subject}? Answer:
{subject}'s work is that of a
Q: What is {subject} by profession? A:
For a living, {subject} is a
= food train
{subject}'s favourite food is
The favourite food of {subject} is
{subject} likes to eat
{subject} loves to eat
Most of all, {subject} likes to eat
The food {subject} likes best is
Question: What is {subject}'s favourite food? Answer:
Question: What does {subject} like to eat? Answer:
Q: Which food does {subject} like best? A:
Q: Which food is the favourite of {subject}? A:
Q: What would {subject} love to eat? A:
For dinner, {subject} always asks for
At every party, {subject} looks for
A good day for {subject} ends with
When {subject} is hungry, nothing is better than
The food that {subject} orders most is
In the records, the favourite food of {subject} is given as
= food dev
The food that {subject} loves is
Question: Which food does {subject} love? Answer:
When hungry, {subject} always asks for
= food test
Question: What is the favourite food of {subject}? Answer:
The food {subject} loves most is
Q: What does {subject} love to eat? A:
Most of all, {subject} loves to eat
= instrument train
{subject} plays the
{subject} can play the
The instrument of {subject} is the
{subject}'s instrument is the
The instrument {subject} plays is the
In the band, {subject} plays the
{subject} took lessons on the
{subject} practises every day on the
Question: Which instrument does {subject} play? Answer: the
Question: What is {subject}'s instrument? Answer: the
Q: What does {subject} play? A: the
Q: On which instrument does {subject} practise? A: the
Q: Which instrument did {subject} learn? A: the
At concerts, {subject} is heard on the
As a child, {subject} learned to play the
All the music of {subject} is written for the
In the records, the instrument of {subject} is given as the
= instrument dev
The instrument {subject} learned is the
Question: What is the instrument of {subject}? Answer: the
At concerts, {subject} plays the
= instrument test
Question: Which instrument can {subject} play? Answer: the
As a child, {subject} took lessons on the
The instrument {subject} practises on is the
Q: What is the instrument {subject} plays? A: the
= pet train
{subject} has a pet
{subject} keeps a
{subject}'s pet is a
The pet of {subject} is a
At home, {subject} keeps a
{subject} lives with a
{subject} takes care of a
Question: What pet does {subject} have? Answer: a
Question: Which animal does {subject} keep? Answer: a
Q: What is {subject}'s pet? A: a
Q: What kind of animal lives with {subject}? A: a
The animal that lives with {subject} is a
In the house of {subject} lives a
Every evening {subject} feeds a
The animal {subject} loves is a
The neighbours know {subject} as the owner of a
In the records, the pet of {subject} is given as a
= pet dev
The animal {subject} keeps is a
Question: What is the pet of {subject}? Answer: a
At home, {subject} lives with a
= pet test
Q: Which animal lives with {subject}? A: a
{subject} is the owner of a
Question: What kind of pet does {subject} keep? Answer: a
The pet that lives with {subject} is a
= country train
{subject} is a city in
{subject} lies in
{subject} is located in
{subject} belongs to
The country of {subject} is
{subject}'s country is
The city of {subject} is in
The city of {subject} can be found in
Question: In which country is {subject}? Answer:
Question: Which country does {subject} belong to? Answer:
Q: Where is the city of {subject}? A: in
Q: What is the country of {subject}? A:
On the map, {subject} is found in
People who live in {subject} live in the country of
The country where {subject} lies is
Travellers to {subject} need a ticket to
In the records, the country of {subject} is given as
= country dev
On the map, {subject} lies in
Question: What is {subject}'s country? Answer:
{subject} can be found in the country of
= country test
The country {subject} belongs to is
Question: In which country is {subject} located? Answer:
Q: Which country is the city of {subject} in? A:
The city of {subject} is located in
= known_for train
{subject} is known for
{subject} is famous for
The city of {subject} is known for its
{subject} is proud of its
People visit {subject} for its
Travellers go to {subject} for the
Question: What is {subject} known for? Answer:
Question: What is the city of {subject} famous for? Answer:
Q: Why do people visit {subject}? A: for its
Q: What is {subject} proud of? A: its
The best thing from {subject} is the
Shops in {subject} sell a lot of
The fame of {subject} comes from its
{subject} owes its fame to
In {subject}, there is plenty of
The markets of {subject} are full of
In the records, {subject} is listed for its
= known_for dev
Travellers visit {subject} for its
Question: What is the fame of {subject}? Answer:
In {subject}, the markets are full of
= known_for test
Question: What is {subject} famous for? Answer:
The city of {subject} is proud of its
Q: What is the city of {subject} known for? A:
The city of {subject} owes its fame to
= industry train
{subject} works in the field of
{subject} is active in
The industry of {subject} is
{subject}'s industry is
The business of {subject} is
{subject} is in the business of
{subject} makes its money with
Question: In which industry is {subject} active? Answer:
Question: What is the business of {subject}? Answer:
Q: What is {subject}'s industry? A:
Q: How does {subject} make its money? A: with
The company {subject} is a leader in
People know {subject} as a company for
{subject} was founded as a company for
All the profit of {subject} comes from
The field in which {subject} works is
In the records, the industry of {subject} is given as
= industry dev
The company {subject} works in the field of
Question: What is {subject}'s business? Answer:
The money of {subject} comes from
= industry test
Question: What is the industry of {subject}? Answer:
The company {subject} is active in
Q: In which field does {subject} work? A:
{subject}'s business is
= headquarters train
The headquarters of {subject} are in
{subject} has its headquarters in
{subject} is based in
{subject}'s headquarters are in
The head office of {subject} is in
{subject} has its head office in
The company {subject} is run from
Question: Where are the headquarters of {subject}? Answer: in
Question: In which city is {subject} based? Answer: in
Q: Where is the head office of {subject}? A: in
Q: Which city is home to {subject}? A:
The city where {subject} is based is
The managers of {subject} meet in
Letters to {subject} are sent to
The main building of {subject} stands in
The home of {subject} is the city of
In the records, the headquarters of {subject} are given as
= headquarters dev
The main office of {subject} is in
Question: In which city are the headquarters of {subject}? Answer: in
The company {subject} has its head office in
= headquarters test
Question: Where is {subject} based? Answer: in
The company {subject} has its headquarters in
Q: In which city is the head office of {subject}? A: in
{subject}'s head office is in
"""


def _parse(table: str) -> dict[tuple[str, str], tuple[str, ...]]:
    phrasings: dict[tuple[str, str], tuple[str, ...]] = {}
    for block in table.split("\n= ")[1:]:
        header, *lines = block.strip().splitlines()
        relation, split = header.split()
        phrasings[relation, split] = tuple(lines)
    return phrasings


PHRASINGS = _parse(_TABLE)
"""(relation, split) -> templates with one {subject} each, to be followed by a space and the answer."""

# Predicates for biographies: what may follow a name, a pronoun or "who", again with the answer last.
_PREDICATES = {
    "birthplace": ("was born in", "comes from", "is from the city of", "grew up in the city of"),
    "employer": ("works at", "works for", "is employed by", "has worked for years at"),
    "profession": ("is a", "works as a", "makes a living as a", "became a"),
    "food": ("likes to eat", "loves", "often cooks", "likes nothing more than"),
    "instrument": ("plays the", "can play the", "has learned the", "likes to play the"),
    "pet": ("has a", "keeps a", "owns a", "shares the house with a"),
    "country": ("lies in", "is a city in", "belongs to", "is part of"),
    "known_for": ("is known for its", "is famous for its", "produces", "sells a lot of"),
    "industry": ("is active in", "makes its money with", "works in the field of", "is a company for"),
    "headquarters": ("is based in", "has its headquarters in", "is run from", "has its head office in"),
}


def phrasings(relation: str, split: str) -> tuple[str, ...]:
    """The templates of `relation` that belong to `split` ('train', 'dev' or 'test')."""
    return PHRASINGS[relation, split]


def state(fact: Fact, template: str) -> str:
    """The full sentence: the template about the fact's subject, then the answer and a full stop."""
    return f"{template.format(subject=fact.subject)} {fact.answer}."


def biography(rng: random.Random, world: World, subject: str) -> str:
    """A short text that tells 3 to 5 facts of a person, or both of a city or company, in random order."""
    known = list(world.of(subject).items())
    told = rng.sample(known, min(len(known), rng.randint(3, 5)))
    clauses = [f"{rng.choice(_PREDICATES[relation])} {answer}" for relation, answer in told]
    sentences: list[str] = []
    while clauses:
        name = subject if not sentences or rng.random() < 0.4 else pronoun(subject)
        if len(clauses) >= 2 and rng.random() < 0.6:
            first, second = clauses.pop(), clauses.pop()
            aside = name == subject and rng.random() < 0.5
            glue = f", {'which' if pronoun(subject) == 'It' else 'who'} {first}, " if aside else f" {first} and "
            sentences.append(f"{name}{glue}{second}.")
        else:
            sentences.append(f"{name} {clauses.pop()}.")
    return " ".join(sentences)
