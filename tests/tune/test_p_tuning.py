"""P-tuning's templates and its prompt encoder."""

from __future__ import annotations

import json

import pytest
import tiny
import torch

import burnish
from burnish import chain
from burnish.chain import Context, Model, forward
from burnish.cli import main
from burnish.config import UserError
from burnish.engine.decoding import GenerationConfig
from burnish.engine.generate import generate
from burnish.engine.order import encode
from burnish.engine.settings import TrainConfig
from burnish.engine.train import train
from burnish.model.example import IGNORE, Example
from burnish.store.batch import collate
from burnish.store.checkpoint import load, save
from burnish.store.data import encode_rows
from burnish.tune.p_tuning import parts

WORDS = {word: number for number, word in enumerate(["[MASK]", *tiny.WORDS], start=5)}


def ids(text: str) -> list[int]:
    return [{"<eos>": 1, "[CLS]": 3, "[SEP]": 4}.get(word) or WORDS[word] for word in text.split()]


def tuned(root, family: str, template: str, **options) -> Model:
    technique = {"p_tuning": {"template": template, **options}}
    return chain.apply(load(tiny.folder(root, family)), technique, Context(seed=2))


def example(prompt: str, completion: str, **more) -> Example:
    before, after = ids(prompt), ids(completion)
    return Example(before + after, [IGNORE] * len(before) + after, **more)


def shown(encoded: Example) -> str:
    """ids, pseudo tokens and (targets) as text."""
    names = {number: word for word, number in WORDS.items()} | {0: "<pad>", 1: "<eos>", 3: "[CLS]", 4: "[SEP]"}
    assert len(encoded.ids) == len(encoded.labels) == len(encoded.slots)
    words = []
    for token, label, slot in zip(encoded.ids, encoded.labels, encoded.slots, strict=True):
        assert slot < 0 or (token == 0 and label == IGNORE)
        word = f"P{slot}" if slot >= 0 else names[token]
        words.append(word if label == IGNORE else f"{word}({names[label]})")
    return " ".join(words)


@pytest.mark.parametrize(
    ("template", "found"),
    [
        ("[P*3] {prompt} [P*3]", [("soft", 3), ("field", "prompt"), ("soft", 3)]),
        ("[P][P]{prompt}", [("soft", 1), ("soft", 1), ("field", "prompt")]),
        ("{premise} ? [P*2] , {hypothesis}", [("field", "premise"), ("text", " ? "), ("soft", 2), ("text", " , "),
                                              ("field", "hypothesis")]),
        ("[P*10]{prompt}answer : ", [("soft", 10), ("field", "prompt"), ("text", "answer : ")]),
        ("[PAD] {a b} [P*] {prompt}[P*2]", [("text", "[PAD] {a b} [P*] "), ("field", "prompt"), ("soft", 2)]),
    ],
)  # fmt: skip
def test_templates_parse(template, found):
    assert parts(template) == found


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("[P*3] {prompt} [P*3]", "P0 P1 P2 the cat P3 P4 P5 runs(runs) <eos>(<eos>)"),
        ("{prompt}[P*2]", "the cat P0 P1 runs(runs) <eos>(<eos>)"),
        ("[P] question {prompt} ? answer [P*2] :", "P0 question the cat ? answer P1 P2 : runs(runs) <eos>(<eos>)"),
        ("{place} [P] {prompt} {place} [P]", "paris P0 the cat paris P1 runs(runs) <eos>(<eos>)"),
    ],
)
def test_pseudo_tokens_stand_anywhere(root, template, text):
    model = tuned(root, "llama", template)
    (encoded,) = encode(model, [example("the cat", "runs <eos>", fields={"place": "paris"})])
    assert shown(encoded) == text


@pytest.mark.parametrize(
    ("length", "text"),
    [
        (None, "P0 P1 the P2 P3 runs(runs)"),
        (0, "the runs(runs)"),
        (1, "P0 the runs(runs)"),
        (3, "P0 P1 the P2 runs(runs)"),
    ],
)
def test_a_row_may_have_fewer_pseudo_tokens(root, length, text):
    model = tuned(root, "gpt2", "[P*2] {prompt} [P*2]")
    (encoded,) = encode(model, [example("the", "runs", virtual_tokens=length)])
    assert shown(encoded) == text


def test_mask_takes_the_completions_place_on_bert(root):
    """The cloze templates of the paper: the masked word is the target, the words around it are not."""
    model = tuned(root, "bert", "[P*2] {prompt} [P] answer : [MASK] . [P]")
    rows = [example("the cat runs ?", "yes"), example("[CLS] a dog ? [SEP]", "true false")]
    one, two = encode(model, rows)
    assert shown(one) == "P0 P1 the cat runs ? P2 answer : [MASK](yes) . P3"
    assert shown(two) == "P0 P1 [CLS] a dog ? [SEP] P2 answer : [MASK](true) [MASK](false) . P3"
    torch.manual_seed(0)
    before = train(model, rows, TrainConfig(max_steps=1, learning_rate=1e-2, logging_steps=1)).losses[0][1]
    after = train(model, rows, TrainConfig(max_steps=25, learning_rate=1e-2, logging_steps=1)).losses[-1][1]
    assert after < before


def test_a_prompt_alone_gets_its_pseudo_tokens(root):
    model = tuned(root, "llama", "[P*2] {prompt} [P*2]")
    prompt = Example(ids("the cat"), [IGNORE] * 2)
    assert shown(encode(model, [prompt])[0]) == "P0 P1 the cat P2 P3"


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_rows_from_data_go_through(root, family):
    model = tuned(root, family, "{place} [P*2] {prompt} [P*2]" + (" [MASK]" if family == "bert" else ""))
    rows = [{"prompt": "the cat", "completion": "runs", "place": "rome"}]
    (encoded,) = encode(model, encode_rows(rows, model.tokenizer, 32))
    assert shown(encoded).startswith("rome P0 P1") and "(runs)" in shown(encoded)


def test_a_masked_language_model_must_not_see_its_answer(root):
    """Rows that are masked already need no [MASK] in the template; a classifier's have no answer in words."""
    model = tuned(root, "bert", "[P*2] {prompt} answer :")
    with pytest.raises(UserError, match=r"'\[P\*2\] {prompt} answer :' shows the model the answer.*write \[MASK\]"):
        encode(model, [example("the cat ?", "yes")])
    masked = Example(ids("[CLS] the [MASK] runs [SEP]"), [IGNORE, IGNORE, *ids("cat"), IGNORE, IGNORE])
    assert shown(encode(model, [masked])[0]) == "P0 P1 [CLS] the answer : [MASK](cat) runs [SEP]"
    model = chain.apply(load(tiny.folder(root, "bert")), ["transfer", {"p_tuning": {"template": "[P*2] {prompt}"}}])
    (encoded,) = encode(model, [Example(ids("[CLS] the cat [SEP]"), [IGNORE] * 4, label=1)])
    assert shown(encoded) == "P0 P1 [CLS] the cat [SEP]"


def test_a_missing_column_names_those_there_are(root):
    model = tuned(root, "llama", "[P] {plac} {prompt}")
    with pytest.raises(UserError, match=r"names \{plac\} \(did you mean 'place'\?\); .* columns are: place, word"):
        encode(model, [example("the cat", "runs", fields={"place": "paris", "word": "cat"})])
    with pytest.raises(UserError, match="the data's columns are: none"):
        encode(model, [example("the cat", "runs")])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"template": "answer {prompt}"}, r"has no \[P\*3\]"),
        ({"template": "[P*3] answer"}, r"has no \{prompt\}"),
        ({"encoder": "gru"}, "encoder"),
        ({"template": "[P*0] {prompt}"}, r"has \[P\*0\]; the number of pseudo tokens must be a positive"),
        ({"template": "[P*-3] {prompt}"}, r"has \[P\*-3\]; the number of pseudo tokens must be a positive"),
        ({"template": "[P*64] {prompt}"}, "64, and the model has 64 positions"),
        ({"template": "[P*2] {completion}"}, "shows the model the answer; leave {completion} away"),
        ({"template": "[P*3] {prompt} [MASK]"}, r"has \[MASK\]: a llama decoder has no such token"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0; give 0 or more"),
    ],
)
def test_a_template_that_cannot_work_is_refused(root, options, reason):
    with pytest.raises(UserError, match=reason):
        chain.apply(load(tiny.folder(root, "llama")), {"p_tuning": options})


@torch.no_grad()
def logits(model: Model) -> torch.Tensor:
    batch = collate(list(encode(model, [example("the cat", "runs <eos>"), example("a", "dog")])), 0)
    return model.net.logits(forward(model, batch))[batch["attention_mask"]]


@pytest.mark.parametrize("kind", ["lstm", "mlp", "embedding"])
def test_finalize_drops_the_encoder_and_keeps_the_outputs(root, tmp_path, kind):
    model = tuned(root, "llama", "[P*2] {prompt} [P*3]", encoder=kind)
    names = {name.split(".")[2] for name in model.trainable()}
    assert names == {"embedding", kind} | ({"mlp"} if kind == "lstm" else set())
    train(model, [example("the cat", "runs")], TrainConfig(max_steps=2, learning_rate=1e-2))
    want = logits(model)
    chain.finalize(model)
    assert set(model.trainable()) == {"techniques.p_tuning.embedding.weight"}
    torch.testing.assert_close(logits(model), want)
    again = burnish.load(save(model, tmp_path))
    assert set(again.trainable()) == {"techniques.p_tuning.embedding.weight"}
    torch.testing.assert_close(logits(again), logits(model), atol=0, rtol=0)
    train(again, [example("the cat", "runs")], TrainConfig(max_steps=1, learning_rate=1e-2))  # and trains on


def test_the_encoder_is_the_papers(root):
    """Section 3.2: a two-layer bidirectional LSTM, each way half as wide as the model, and a two-layer ReLU MLP."""
    encoder = tuned(root, "bloom", "[P*2] {prompt}").net.techniques["p_tuning"]
    assert (encoder.lstm.num_layers, encoder.lstm.bidirectional, encoder.lstm.hidden_size) == (2, True, 36 // 2)
    assert [type(part).__name__ for part in encoder.mlp] == ["Linear", "ReLU", "Linear"]
    with torch.no_grad():
        first = encoder()
        encoder.embedding.weight[1] += 1
        assert not torch.allclose(encoder()[0], first[0])  # pseudo tokens depend on each other


def test_two_soft_prompts_do_not_share_slots(root, tmp_path):
    model = chain.apply(
        load(tiny.folder(root, "llama")),
        [{"prompt_tuning": {"num_virtual_tokens": 3}}, {"p_tuning": {"template": "{prompt} [P*2]"}}],
    )
    (encoded,) = encode(model, [example("the cat", "runs")])
    assert shown(encoded) == "P0 P1 P2 the cat P3 P4 runs(runs)"
    want = logits(model)
    torch.testing.assert_close(logits(burnish.load(save(model, tmp_path))), want, atol=0, rtol=0)


@pytest.mark.parametrize("order", [0, 1])
def test_the_model_trains_with_its_prompts_at_a_rate_of_their_own(root, tmp_path, order):
    """[full, p_tuning], as on SuperGLUE (section 4.2)."""

    def moved(**options) -> tuple[Model, dict[str, torch.Tensor]]:
        soft = {"p_tuning": {"template": "[P*2] {prompt} [P*2]", **options}}
        model = chain.apply(load(tiny.folder(root, "llama")), ["full", soft][:: -1 if order else 1], Context(seed=2))
        before = {name: p.detach().clone() for name, p in model.trainable().items()}
        rate = TrainConfig(max_steps=1, learning_rate=1e-3, lr_scheduler_type="constant")
        train(model, [example("the cat", "runs <eos>")], rate)
        return model, {name: (p.detach() - before[name]).abs() for name, p in model.trainable().items()}

    model, one = moved()
    _, both = moved(learning_rate=1e-2)
    own = {name for name in one if name.startswith("techniques.p_tuning.")}
    assert len(own) == 21 and set(one) > own
    assert all(change.max() > 0 for change in both.values())
    for name in one:  # Adam's first step has the size of the rate
        largest = 1e-2 if name in own else 1e-3
        assert one[name].max() == pytest.approx(1e-3, rel=0.02) and both[name].max() == pytest.approx(largest, rel=0.02)
    want = logits(model)
    torch.testing.assert_close(logits(burnish.load(save(model, tmp_path))), want, atol=0, rtol=0)


def test_generate_takes_the_columns_of_a_template(root, tmp_path, capsys):
    template = "[P*2] {subject} likes [P]"
    model = chain.apply(load(tiny.folder(root, "llama")), {"p_tuning": {"template": template}}, Context(seed=1))
    save(chain.finalize(model), tmp_path / "tuned")
    words = ["generate", str(tmp_path / "tuned"), "--max-new-tokens", "4", "--json"]
    assert main([*words, "--values", "{subject: the cat}"]) == 0
    shown = json.loads(capsys.readouterr().out)
    again = load(tmp_path / "tuned")
    config = GenerationConfig(max_new_tokens=4)
    cat, dog = generate(again, [{"subject": "the cat"}, {"subject": "a dog", "prompt": ""}], config)
    assert shown["ids"] == cat.ids
    by_hand = Example([], [], fields={"subject": "a dog"})
    assert generate(again, [by_hand], config)[0].ids == dog.ids
    assert main([*words, "--values", "{object: x}"]) == 2
    assert "columns are: prompt, object; generate takes others by --values '{subject: text}'" in capsys.readouterr().err
    assert main([*words, "--values", "{subject: x}", "--chat"]) == 2
    assert "leave chat away" in capsys.readouterr().err
