"""The corpus: the same bytes everywhere, the declared mixture, and nothing in it that a test asks for."""

import hashlib
import json
import random
import re
from collections import Counter
from itertools import islice

import pytest

from burnish.world import MIXTURE, World, documents, write_corpus
from burnish.world.corpus import fact_documents, size, tagged_documents
from burnish.world.facts import RELATIONS
from burnish.world.language import phrases, translate
from burnish.world.phrasings import phrasings, state
from burnish.world.tasks import NEAR_TAGS, arithmetic, entailment, passkey, reviews

SAMPLE = 6000
GOLDEN = "0ba4e2ff1e1e62c15d1f0de5f017b1cafe3ab8a636fe79da0a6885ab377ab21d"


def texts(document):
    return [document["text"]] if "text" in document else [m["content"] for m in document["messages"]]


@pytest.fixture(scope="module")
def world():
    return World()


@pytest.fixture(scope="module")
def sample(world):
    return list(islice(tagged_documents(0, world), SAMPLE))


@pytest.fixture(scope="module")
def whole(sample):
    return "\n".join(text for _, document in sample for text in texts(document))


def test_the_first_documents_keep_their_bytes(tmp_path):
    write_corpus(tmp_path / "corpus.jsonl", 500, seed=0)
    assert hashlib.sha256((tmp_path / "corpus.jsonl").read_bytes()).hexdigest() == GOLDEN


def test_another_seed_tells_the_same_world_in_other_documents(world, sample):
    other = list(islice(documents(1, world), 50))
    assert other != [document for _, document in sample[:50]]
    assert other == list(islice(documents(1), 50))


def test_documents_are_texts_or_conversations_of_a_training_length(sample):
    for part, document in sample:
        assert json.loads(json.dumps(document)) == document
        assert set(document) in ({"text"}, {"messages"})
        assert (part == "instructions") == ("messages" in document)
        assert 4 <= size(document) <= 260
        for index, message in enumerate(document.get("messages", ())):
            assert message["role"] == ("user", "assistant")[index % 2]


def test_the_mixture_is_as_declared(sample):
    assert sum(MIXTURE.values()) == pytest.approx(1)
    written = Counter()
    for part, document in sample:
        written[part] += size(document)
    for part, share in MIXTURE.items():
        assert written[part] / written.total() == pytest.approx(share, rel=0.02)


def test_every_fact_is_told_once_in_a_pass(world):
    stream = fact_documents(random.Random("test"), world.facts)
    statements = {state(fact, template): fact for fact in world.facts for template in phrasings(fact.relation, "train")}
    told: Counter = Counter()
    while told.total() < 2 * len(world.facts):
        sentences = next(stream).split(". ")
        told.update(statements[sentence.rstrip(".") + "."] for sentence in sentences)
        assert len(sentences) <= 8
    assert set(told.values()) == {2}


def test_no_document_holds_what_a_test_asks(world, whole):
    names = "|".join(sorted(map(re.escape, (*world.people, *world.cities, *world.companies)), key=len)[::-1])
    anonymous = re.sub(rf"\b(?:{names})\b", "{subject}", whole)
    for relation in RELATIONS:
        assert phrasings(relation, "train")[0] in anonymous
        for template in (*phrasings(relation, "dev"), *phrasings(relation, "test")):
            question = template.removeprefix("Question: ").removeprefix("Q: ").split("?")[0]
            assert question not in anonymous, template


def test_neither_the_near_notation_nor_tavic_is_in_the_corpus(whole):
    words = re.findall(r"\w+", whole.lower())
    assert "::" not in whole
    assert set(words).isdisjoint([*NEAR_TAGS.values(), "tavic"])
    flat = f" {' '.join(words)} "
    told = {translate(phrase) for group in phrases().values() for phrase in group}
    assert not [phrase for phrase in told if f" {phrase} " in flat]


def test_no_held_out_row_of_the_other_tasks_is_in_the_corpus(whole):
    for split in ("dev", "test"):
        for row in reviews(split):
            assert row["prompt"].removeprefix("Review: ").split("\n")[0] not in whole
        assert all(row["premise"] not in whole for row in entailment(split))
        assert all(row["question"] not in whole for row in arithmetic(split))
        assert all(row["completion"] not in whole for row in passkey(split))
