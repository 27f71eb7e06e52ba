"""The knowledge probe: its precision against a loop over the objects, its templates, its data and the whole of it."""

from __future__ import annotations

import json

import pytest
import tiny
import torch

import burnish
from burnish.bench.probe import METHODS, RATES, ROWS, Probe, template
from burnish.bench.relations import Relation, mined, read_relations, world_relations
from burnish.cli import main
from burnish.config import UserError
from burnish.engine.order import encode
from burnish.model.example import IGNORE
from burnish.world.facts import World
from burnish.world.phrasings import SPLITS, phrasings

SUBJECTS = ("paris", "london", "rome", "berlin", "cat", "dog", "bird", "fish", "red", "blue")
OBJECTS = ("yes", "no", "big fish", "the small bird")
FACTS = tuple((subject, OBJECTS[i % len(OBJECTS)]) for i, subject in enumerate(SUBJECTS))
RELATION = Relation("kind", ("{} is", "what is {} :"), FACTS)


def by_hand(theirs, tokenizer, wording, subject, wanted, masks):
    """The mean log-probability per token of one object, by one forward of transformers' model."""
    target = tokenizer(wanted, add_special_tokens=False)["input_ids"]
    text = wording.replace("{}", subject)
    if masks:
        ids = tokenizer(f"{text} {' '.join([tokenizer.mask_token] * len(target))} .")["input_ids"]
        at = [i for i, token in enumerate(ids) if token == tokenizer.mask_token_id]
    else:
        before = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids, at = before + target, range(len(before) - 1, len(before) + len(target) - 1)
    with torch.no_grad():
        logs = theirs(input_ids=torch.tensor([ids])).logits.log_softmax(-1)[0]
    return sum(logs[i, token].item() for i, token in zip(at, target, strict=True)) / len(target)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("wording", RELATION.wordings)
def test_precision_is_a_loop_over_the_objects(root, family, wording):
    model, theirs = burnish.load(tiny.folder(root, family)), tiny.reference(family)
    probe = Probe(model, RELATION, steps=1)
    best = [
        max(OBJECTS, key=lambda wanted: by_hand(theirs, model.tokenizer, wording, subject, wanted, family == "bert"))
        for subject in SUBJECTS
    ]
    answered = [(subject, found) for subject, found in zip(SUBJECTS, best, strict=True)]
    assert probe.precision(model, probe.examples(answered, wording)) == 1.0
    other = [(subject, OBJECTS[OBJECTS.index(found) - 1]) for subject, found in answered]
    assert probe.precision(model, probe.examples(other, wording)) == 0.0
    hits = [found == best[i] for i, (_, found) in enumerate(FACTS)]
    assert probe.precision(model, probe.examples(FACTS, wording)) == sum(hits) / len(hits)


@pytest.mark.parametrize("around", ["subject", "wording"])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_templates_put_pseudo_tokens_around_what_is_asked(root, family, around):
    model = burnish.load(tiny.folder(root, family))
    burnish.apply(model, [{"p_tuning": {"template": template(model)}}])
    wording = "{}" if around == "subject" else "what is {} :"
    probe = Probe(model, RELATION, steps=1)
    (example,) = encode(model, probe.examples([("rome", "the small bird")], wording, soft=True))
    tokens = model.tokenizer.convert_ids_to_tokens(example.ids)
    shown = ["P" if slot >= 0 else token for token, slot in zip(tokens, example.slots, strict=True)]
    words = ["rome"] if around == "subject" else ["what", "is", "rome", ":"]
    expected = {
        "llama": [*"PPP", *words, *"PPP", "the", "small", "bird"],
        "bert": ["[CLS]", *words, *"PPPPPP", *["[MASK]"] * 3, ".", "[SEP]"],
    }[family]
    assert shown == expected
    told = [model.tokenizer.convert_ids_to_tokens(label) for label in example.labels if label != IGNORE]
    assert told == ["the", "small", "bird"]


def test_an_encoder_gets_a_mask_for_each_token_of_the_object(root):
    model = burnish.load(tiny.folder(root, "bert"))
    (example,) = Probe(model, RELATION, steps=1).examples([("rome", "big fish")], "{} is")
    lengths = {choice.ids.count(5) for choice in (example, *example.choices)}
    assert lengths == {1, 2, 3} and len(example.choices) == 3
    assert model.tokenizer.decode(example.ids) == "[CLS] rome is [MASK] [MASK] . [SEP]"


def test_a_split_is_by_subject_and_always_the_same():
    train, dev, test = RELATION.split()
    assert sorted([*train, *dev, *test]) == sorted(FACTS) and (len(train), len(dev), len(test)) == (4, 2, 4)
    assert RELATION.split() == (train, dev, test)
    assert sum(map(len, RELATION.split(most=5))) == 5
    with pytest.raises(UserError, match="relation 'kind': 2 facts"):
        Relation("kind", ("{} is",), FACTS[:2]).split()


def test_hand_written_wordings_are_not_the_corpus_own():
    world = World()
    for relation in world_relations():
        own = {t.replace("{subject}", "{}") for split in SPLITS for t in phrasings(relation.name, split)}
        assert 3 <= len(relation.wordings) <= 5 and not own & set(relation.wordings)
        assert all(wording.count("{}") == 1 for wording in relation.wordings)
        assert {world.of(subject)[relation.name] for subject, _ in relation.facts} == set(relation.objects)


def test_mined_wordings_end_where_the_object_begins():
    texts = ["Rome lies in Italy. Everyone knows that Paris lies in France!", "Paris lies in France. France has Paris."]
    facts = [("Rome", "Italy"), ("Paris", "France"), ("Oslo", "Norway")]
    assert mined(facts, [*texts, "Rome was seen by Italy's queen."]) == [
        "{} lies in",
        "Everyone knows that {} lies in",
        "{} was seen by",
    ]


def write(folder, **changes):
    samples = [{"subject": subject, "object": found} for subject, found in FACTS]
    relation = {"name": "kind", "prompt_templates": list(RELATION.wordings), "samples": samples, **changes}
    folder.mkdir(exist_ok=True)
    (folder / "kind.json").write_text(json.dumps({key: value for key, value in relation.items() if value is not None}))
    return folder


def test_relation_files(tmp_path, shared_data):
    assert read_relations(write(tmp_path / "one")) == [RELATION]
    found = {relation.name: relation for relation in read_relations(shared_data / "relations" / "factual")}
    assert ("John Adams", "1796") in found["president election year"].facts
    assert all(len(relation.objects) > 1 for relation in found.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": None}, "no samples"),
        ({"samples": []}, "no samples"),
        ({"samples": [{"subject": "rome"}]}, "sample 1 needs a subject and an object"),
        ({"prompt_templates": None}, "no prompt_templates"),
        ({"prompt_templates": ["rome is"]}, "template 'rome is' needs {} once"),
        ({"samples": [{"subject": "rome", "object": "yes"}]}, "cannot be split"),
    ],
)
def test_a_bad_relation_is_one_line(root, tmp_path, capsys, changes, message):
    words = ["eval", str(tiny.folder(root, "llama")), "--task", "lama", "--data", str(write(tmp_path, **changes))]
    assert main(words) == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--task", "lama,facts"], "lama is measured alone"),
        (["--task", "lama", "--methods", "p_tunning"], "(did you mean 'p_tuning'?)"),
        (["--task", "lama", "--relations", "emploier"], "(did you mean 'employer'?)"),
        (["--task", "lama", "--seeds", "[]"], "seeds, max_steps: at least one of each"),
        (["--task", "lama", "--data", "nowhere"], "nowhere: cannot be read as JSON"),
    ],
)
def test_bad_settings_are_one_line(capsys, words, message):
    assert main(["eval", "pebble", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_the_whole_probe(root, tmp_path, capsys, family):
    data, text = write(tmp_path / "data"), tmp_path / "text.txt"
    text.write_text("\n".join(f"where {subject} likes {found}." for subject, found in FACTS))
    words = ["eval", str(tiny.folder(root, family)), "--task", "lama", "--data", str(data), "--mine-from", str(text)]
    assert main([*words, "--seeds", "0,1", "--max-steps", "3", "--output-dir", str(tmp_path / "out"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "out" / "probe.json").read_text()) == found
    entry = found["relations"]["kind"]
    assert entry["facts"] == [4, 2, 4] and entry["objects"] == 4
    assert {*ROWS, "stability", "manual", "facts", "objects"} == set(entry)
    assert all(0 <= entry[row]["value"] <= 1 for row in (*ROWS, "stability"))
    assert entry["search"]["candidates"] == 3  # one was mined
    assert len(entry["p_tuning"]["values"]) == 2 and set(entry["p_tuning"]["learning_rates"]) <= {*RATES["p_tuning"]}
    assert {len(values) for values in entry["stability"]["wordings"].values()} == {2}
    assert main([*words, "--methods", "manual"]) == 0
    table = capsys.readouterr().out
    assert "best manual" in table and "standard deviation over wordings" in table and METHODS[0] == "manual"


@pytest.mark.parametrize("method", ["fine_tuning", "p_tuning"])
def test_training_brings_out_what_the_facts_share(root, method, monkeypatch):
    """All objects but one are the same: a method that trains finds that, whatever the base says."""
    monkeypatch.setitem(RATES, method, (1e-2,))
    relation = Relation("same", ("{} is",), tuple((name, "yes" if i else "no") for i, name in enumerate(SUBJECTS)))
    found = Probe(burnish.load(tiny.folder(root, "llama")), relation, steps=40).run([method], [0], [])
    assert found[method]["value"] >= 0.75
