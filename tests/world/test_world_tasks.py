"""The tasks: right answers, closed choices, and splits that share nothing."""

import contextlib
import hashlib
import io
import json
import random
import re
from itertools import combinations

import pytest

from burnish.world import TASKS, World
from burnish.world.__main__ import main
from burnish.world.arithmetic import LIMIT, NAMES, OBJECTS
from burnish.world.entailment import people
from burnish.world.facts import ANSWERS, RELATIONS
from burnish.world.language import LEXICON, MEANINGS, PLURAL, phrases, translate
from burnish.world.passkey import passkey
from burnish.world.phrasings import PHRASINGS, SPLITS, phrasings
from burnish.world.reviews import _DOMAINS

GOLDEN = "8d491b12ba4bfeab5639bd84c124899007dd9bc31b2ba8ebb57249e9ed4534e5"


@pytest.fixture(scope="module")
def rows():
    return {(task, split): make(split) for task, make in TASKS.items() for split in SPLITS}


def test_the_world_is_closed_and_its_names_are_unique():
    world = World()
    assert len(world.facts) == 1800 and len({(f.relation, f.subject) for f in world.facts}) == 1800
    assert all(fact.answer in world.answers(fact.relation) for fact in world.facts)
    assert all(len(set(answers)) == len(answers) for answers in ANSWERS.values())
    for part in (str.split, lambda name: [name.split()[1]]):
        assert len({tuple(part(name)) for name in world.people}) == len(world.people) == 260
    assert world.of("Ashford")["country"] in world.countries
    assert World(1).people != world.people


def test_rows_keep_their_bytes(rows):
    text = json.dumps([[*key, value] for key, value in rows.items()])
    assert hashlib.sha256(text.encode()).hexdigest() == GOLDEN


@pytest.mark.parametrize("task", TASKS)
def test_rows_are_distinct_and_no_prompt_is_in_two_splits(rows, task):
    prompts = [{row["prompt"] for row in rows[task, split]} for split in SPLITS]
    assert [len(each) for each in prompts] == [len(rows[task, split]) for split in SPLITS]
    assert all(first.isdisjoint(second) for first, second in combinations(prompts, 2))
    for split in SPLITS:
        for row in rows[task, split]:
            assert row["completion"][0] == " " and not row["prompt"][-1].isspace()
            assert row["completion"] in row.get("choices", [row["completion"]])


def test_the_seed_draws_and_orders_but_never_moves_rows_between_splits():
    for task in ("near", "far"):
        first, second = (TASKS[task]("train", seed) for seed in (0, 1))
        assert first != second
        assert sorted(row["prompt"] for row in first) == sorted(row["prompt"] for row in second)
    with pytest.raises(ValueError, match="choose one of train, dev, test"):
        TASKS["near"]("validation")


def test_phrasings_are_enough_disjoint_and_recombine_trained_words():
    trained = [template for relation in RELATIONS for template in phrasings(relation, "train")]
    known = set(re.findall(r"\w+", " ".join(trained)))
    for relation in RELATIONS:
        train, dev, test = (phrasings(relation, split) for split in SPLITS)
        assert len(train) >= 14 and len(dev) == 3 and len(test) == 4
        assert len({*train, *dev, *test}) == len(train) + 7
        assert known.issuperset(re.findall(r"\w+", " ".join(dev + test)))
    assert all(template.count("{subject}") == 1 for group in PHRASINGS.values() for template in group)


def test_fact_rows_cover_every_fact_in_phrasings_of_their_split(rows):
    for split in SPLITS:
        assert len(rows["facts", split]) == 1800
        for row in rows["facts", split]:
            assert row["prompt"].replace(row["subject"], "{subject}") in phrasings(row["relation"], split)
            assert row["completion"][1:] in ANSWERS[row["relation"]]


def test_near_rows_are_facts_about_disjoint_people(rows):
    world = World()
    subjects = [{row["subject"] for row in rows["near", split]} for split in SPLITS]
    assert [len(group) for group in subjects] == [75, 25, 50]
    assert all(first.isdisjoint(second) for first, second in combinations(subjects, 2))
    assert [len(rows["near", split]) for split in SPLITS] == [300, 100, 200]
    for row in rows["near", "test"]:
        assert row["completion"] == f" {world.of(row['subject'])[row['relation']]}"


def test_tavic_follows_its_grammar():
    bird, dog, red, black, three, see = map(LEXICON.get, ("bird", "dog", "red", "black", "three", "see"))
    assert translate("red bird") == f"{bird} {red}"
    assert translate("three black red birds") == f"{bird} {PLURAL} {black} {red} {three}"
    assert translate("birds see three red dogs") == f"{bird} {PLURAL} {dog} {PLURAL} {red} {three} {see}"
    with pytest.raises(ValueError, match="'elephants'"):
        translate("red elephants")
    assert len({PLURAL, *LEXICON.values()}) == 1 + len(LEXICON) == 1 + sum(map(len, MEANINGS.values())) == 24
    assert not set(LEXICON) & {PLURAL, *LEXICON.values()}


def test_tavic_splits_are_disjoint_and_every_word_is_trained():
    groups = phrases()
    assert [len(groups[split]) for split in SPLITS] == [300, 60, 120]
    assert len({phrase for group in groups.values() for phrase in group}) == 480
    trained = {word for phrase in groups["train"] for word in phrase.split()}
    for phrase in (*groups["dev"], *groups["test"]):
        assert trained.issuperset(phrase.split()) and 2 <= len(phrase.split()) <= 3
    assert len({translate(phrase) for group in groups.values() for phrase in group}) == 480


def test_programs_and_steps_compute_the_answer(rows):
    for split in SPLITS:
        for row in rows["arithmetic", split]:
            scope: dict = {}
            exec(row["program"], {}, scope)
            assert str(scope["answer"]) == row["label"] == row["completion"].split("#### ")[1]
            for left, right in re.findall(r"(\d+ [-+*] \d+) = (\d+)\.", row["completion"]):
                assert eval(left) == int(right) <= LIMIT
            assert all(int(number) <= LIMIT for number in re.findall(r"\d+", row["question"]))


def test_arithmetic_splits_share_no_name_object_or_numbers(rows):
    for table in (NAMES, OBJECTS):
        assert len({word for words in table.values() for word in words}) == sum(map(len, table.values()))
    solved = [{row["completion"] for row in rows["arithmetic", split]} for split in SPLITS]
    assert all(first.isdisjoint(second) for first, second in combinations(solved, 2))


def test_classes_are_balanced_and_entities_disjoint(rows):
    for task in ("reviews", "entailment"):
        for split in SPLITS:
            labels = [row["label"] for row in rows[task, split]]
            assert {labels.count(label) * 2 for label in set(labels)} == {len(labels)}
    world = World()
    groups = [people(world, split) for split in SPLITS]
    assert sorted(sum(groups, ())) == sorted(world.people)
    for split, group in zip(SPLITS, groups, strict=True):
        for row in rows["entailment", split]:
            named = [person for person in world.people if re.search(rf"\b{person}\b", row["prompt"])]
            assert named and set(named) <= set(group)
    for domain in _DOMAINS:
        things = [thing for group in domain.things.values() for thing in group]
        assert len(set(things)) == len(things)


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_a_passkey_lies_where_it_was_asked_for(depth):
    row = passkey(random.Random("test"), 200, depth, "test")
    key = row["completion"].strip()
    assert row["prompt"].count(key) == 2 and int(key) % 7 == 0
    assert 195 <= row["words"] <= 210
    assert row["prompt"].index(key) / len(row["prompt"]) == pytest.approx(depth, abs=0.12)


def test_the_command_writes_jsonl(tmp_path):
    main(["corpus", "near", "--documents", "20", "--output", str(tmp_path)])
    main(["far", "--split", "dev", "--output", str(tmp_path)])
    written = {path.name: len(path.read_text().splitlines()) for path in tmp_path.iterdir()}
    assert written == {
        "corpus.jsonl": 20,
        "near.train.jsonl": 300,
        "near.dev.jsonl": 100,
        "near.test.jsonl": 200,
        "far.dev.jsonl": 60,
    }
    with contextlib.redirect_stderr(io.StringIO()), pytest.raises(SystemExit, match="2"):
        main(["nothing", "--output", str(tmp_path)])
