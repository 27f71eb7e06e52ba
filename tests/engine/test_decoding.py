"""Beam search, contrastive search, speculation and penalties: against transformers, or against plain forwards."""

from __future__ import annotations

import json

import pytest
import tiny
import tiny_foreign
import torch
from test_generate import PROMPTS, load

import burnish
from burnish.cli import main
from burnish.config import UserError
from burnish.engine import speculation
from burnish.engine.decoding import GenerationConfig
from burnish.engine.generate import generate
from burnish.engine.guide import Guide
from burnish.engine.reply import eos_ids
from burnish.engine.sampling import NEVER
from burnish.engine.speculation import looked_up
from burnish.model.bundle import Model
from burnish.model.example import IGNORE, Example
from burnish.model.ngram import count, ngram_spec

FAMILIES = ["llama", "bloom", "t5"]


def theirs(family, model, text, **settings):
    """transformers' reply to one prompt."""
    reference = tiny.reference(family)
    ids = torch.tensor([model.tokenizer(text)["input_ids"]])
    found = reference.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **settings)[0]
    return found[1 if model.spec.paired else ids.shape[1] :].tolist()


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3},
        {"num_beams": 4, "length_penalty": 2.0},
        {"num_beams": 4, "length_penalty": -1.0, "early_stopping": True},
        {"num_beams": 2, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_beam_search_equals_transformers(root, family, settings):
    model = burnish.load(tiny.folder(root, family))
    for done, text in zip(
        generate(model, PROMPTS, GenerationConfig(max_new_tokens=10, **settings)), PROMPTS, strict=True
    ):
        assert done.ids == theirs(family, model, text, max_new_tokens=10, **settings)


def likelihood(model, prompt, ids):
    """log p(ids | prompt)."""
    start = model.tokenizer(prompt)["input_ids"]
    with torch.no_grad():
        logs = model.net.logits(model.net(torch.tensor([[*start, *ids]])))[0].log_softmax(-1)
    return sum(float(logs[len(start) - 1 + at, token]) for at, token in enumerate(ids))


def test_more_beams_find_likelier_replies_and_all_of_them_the_likeliest(root):
    model = load(root)
    config = {"max_new_tokens": 3, "min_new_tokens": 3}
    ways = ({"num_beams": n, "length_penalty": 0.0} if n > 1 else {} for n in (1, 2, 40))
    found = [generate(model, PROMPTS[:1], GenerationConfig(**config, **way))[0].ids for way in ways]
    scores = [likelihood(model, PROMPTS[0], ids) for ids in found]
    assert scores[0] <= scores[1] <= scores[2]


def test_groups_keep_apart_as_the_definition_says(root):
    """Groups of one beam: each takes the best token after the penalty for what earlier groups took in this step."""
    model = load(root)
    config = GenerationConfig(
        max_new_tokens=5, min_new_tokens=5, num_beams=3, num_beam_groups=3, diversity_penalty=1.5, length_penalty=0.0
    )
    ends = list(eos_ids(model))
    texts, totals = [[], [], []], [0.0, 0.0, 0.0]
    start = model.tokenizer(PROMPTS[1])["input_ids"]
    for _ in range(5):
        taken = torch.zeros(model.spec.vocab_size)
        for group in range(3):
            with torch.no_grad():
                logs = model.net.logits(model.net(torch.tensor([start + texts[group]])))[0, -1].log_softmax(-1)
            logs[ends] = float("-inf")
            scores = logs - 1.5 * taken + totals[group]
            token = int(scores.argmax())
            totals[group] = float(scores[token])
            texts[group] = [*texts[group], token]
            taken[token] += 1
    best = max(range(3), key=lambda group: totals[group])
    assert generate(model, [PROMPTS[1]], config)[0].ids == texts[best]
    assert len({tuple(text) for text in texts}) == 3


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_contrastive_search_is_the_definition(root, family):
    model, alpha, k = load(root, family), 0.6, 4
    config = GenerationConfig(max_new_tokens=8, min_new_tokens=8, penalty_alpha=alpha, top_k=k)
    for text, done in zip(PROMPTS, generate(model, PROMPTS, config), strict=True):
        ids = list(model.tokenizer(text)["input_ids"])
        prompt = len(ids)
        for _ in range(8):
            with torch.no_grad():
                hidden = model.net(torch.tensor([ids]))[0]
                logits = model.net.logits(hidden[-1])
                logits[list(eos_ids(model))] = float("-inf")
                chances, tokens = logits.softmax(-1).topk(k)
                scores = []
                for chance, token in zip(chances, tokens, strict=True):
                    state = model.net(torch.tensor([[*ids, int(token)]]))[0, -1]
                    near = torch.cosine_similarity(state[None], hidden).max()
                    scores.append(float((1 - alpha) * chance - alpha * near))
            ids.append(int(tokens[max(range(k), key=lambda at: scores[at])]))
        assert done.ids == ids[prompt:]


@pytest.mark.parametrize("settings", [{}, {"do_sample": True, "temperature": 0.7}, {"repetition_penalty": 1.2}])
@pytest.mark.parametrize("family", ["llama", "bloom", "t5", "stablelm"])
def test_speculation_changes_no_reply(root, monkeypatch, family, settings):
    folder = tiny_foreign.folder if family == "stablelm" else tiny.folder
    model = burnish.load(folder(root, family)) if family in ("t5", "stablelm") else load(root, family)
    prompts = [*PROMPTS, "the cat sees the dog , the cat sees the dog , the cat sees"]
    config = {"max_new_tokens": 24, "min_new_tokens": 20, **settings}
    plain = generate(model, prompts, GenerationConfig(**config))
    calls = []
    logits = type(model.net).logits
    monkeypatch.setattr(type(model.net), "logits", lambda self, hidden: calls.append(1) or logits(self, hidden))
    guessed = generate(model, prompts, GenerationConfig(prompt_lookup_num_tokens=4, **config))
    assert guessed == plain
    if not settings:
        assert len(calls) < sum(len(done.ids) for done in plain)  # some guesses were right


def test_speculation_with_soft_prompts(root):
    chain = [{"prompt_tuning": {"num_virtual_tokens": 3}}, {"prefix_tuning": {"num_virtual_tokens": 2}}]
    model = load(root, techniques=chain)
    config = {"max_new_tokens": 16, "min_new_tokens": 16}
    assert generate(model, PROMPTS, GenerationConfig(prompt_lookup_num_tokens=3, **config)) == generate(
        model, PROMPTS, GenerationConfig(**config)
    )


@pytest.mark.parametrize("settings", [{}, {"do_sample": True, "temperature": 0.7}])
@pytest.mark.parametrize("kind", ["ngram", "itself", "other"])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_guesses_of_another_model_change_no_reply(root, monkeypatch, family, kind, settings):
    """An n-gram model of the replies themselves is mostly right, and saves forwards."""
    model = load(root) if family == "llama" else burnish.load(tiny.folder(root, "t5"))
    config = {"max_new_tokens": 20, "min_new_tokens": 20, **settings}
    plain = generate(model, PROMPTS, GenerationConfig(**config))
    helper = load(root) if kind == "other" or model.spec.paired else model
    if kind == "ngram":
        starts = [[]] * len(plain) if model.spec.paired else [model.tokenizer(text)["input_ids"] for text in PROMPTS]
        texts = [[*start, *done.ids] for start, done in zip(starts, plain, strict=True)] * 100
        net = count(ngram_spec({"vocab_size": model.spec.vocab_size, "order": 4}), texts)
        helper = Model(net, model.tokenizer, {})
    monkeypatch.setattr(speculation, "_load", lambda path: helper)
    calls, logits = [], model.net.logits
    monkeypatch.setattr(model.net, "logits", lambda hidden: calls.append(1) or logits(hidden))
    guessed = generate(model, PROMPTS, GenerationConfig(assistant_model="helper", num_assistant_tokens=4, **config))
    assert guessed == plain
    if kind == "ngram" and not settings:
        assert len(calls) < 0.7 * sum(len(done.ids) for done in plain)


def test_an_assistant_of_other_tokens_is_refused(root, tmp_path):
    with pytest.raises(UserError, match="assistant_model: pebble is no decoder with this model's tokens"):
        generate(load(root), PROMPTS, GenerationConfig(assistant_model="pebble"))


def test_guesses_follow_the_latest_longest_agreement():
    assert looked_up([1, 2, 3, 9, 1, 2, 3], 3) == [9, 1, 2]
    assert looked_up([5, 3, 1, 4, 3], 2) == [1, 4]
    assert looked_up([3, 7, 3, 8, 3], 1) == [8]
    assert looked_up([1, 2], 3) == [] and looked_up([4], 3) == []


def test_a_state_cannot_be_taken_back():
    net = count(ngram_spec({"vocab_size": 9, "order": 2}), [[1, 2, 3]])
    prompt = Example([1, 2], [IGNORE] * 2)
    with pytest.raises(UserError, match="cannot be taken back"):
        generate(Model(net, None, {}), [prompt], GenerationConfig(prompt_lookup_num_tokens=2))


def test_penalties_and_stop_tokens_in_the_loop(root):
    model = load(root)
    plain = generate(model, PROMPTS, GenerationConfig(max_new_tokens=12, min_new_tokens=12))
    hard = generate(model, PROMPTS, GenerationConfig(max_new_tokens=12, min_new_tokens=12, presence_penalty=1e4))
    assert all(len(set(done.ids)) == 12 for done in hard) and any(len(set(done.ids)) < 12 for done in plain)
    apart = generate(model, PROMPTS, GenerationConfig(max_new_tokens=12, min_new_tokens=12, no_repeat_ngram_size=1))
    for text, done in zip(PROMPTS, apart, strict=True):
        assert not set(done.ids) & set(model.tokenizer(text)["input_ids"]) and len(set(done.ids)) == 12
    token = plain[0].ids[4]
    stopped = generate(model, PROMPTS[:1], GenerationConfig(max_new_tokens=12, stop_token_ids=[token]))[0]
    assert stopped.finish_reason == "stop" and stopped.ids == plain[0].ids[: plain[0].ids.index(token) + 1]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_beams": 3},
        {"prompt_lookup_num_tokens": 3},
        {"do_sample": True, "seed": 5},
        {"penalty_alpha": 0.95, "top_k": 8},
    ],
)
def test_choices_and_json(settings):
    pytest.importorskip("llguidance")
    model = burnish.load("pebble")
    prompts = ["Question: What does Odile Kinlow like to eat? Answer:", "Review: dull. Sentiment:"]
    choices = ["positive", "negative", "negative, really"]
    found = generate(model, prompts, GenerationConfig(choices=choices, max_new_tokens=12, **settings))
    assert all(done.text.strip() in choices and done.finish_reason == "eos" for done in found)
    kinds = {"name": {"type": "string", "maxLength": 8}, "sure": {"type": "boolean"}}
    schema = {"type": "object", "properties": kinds, "required": ["name", "sure"], "additionalProperties": False}
    for done in generate(model, prompts, GenerationConfig(json_schema=schema, max_new_tokens=64, **settings)):
        value = json.loads(done.text)
        assert value.keys() == {"name", "sure"} and len(value["name"]) <= 8 and isinstance(value["sure"], bool)


WARPED = {"top_k": 5, "top_p": 0.9, "min_p": 0.1, "typical_p": 0.9}


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("settings", [
    {}, {"num_beams": 3}, {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0}, {"do_sample": True},
    {"do_sample": True, **WARPED}, {"prompt_lookup_num_tokens": 3}, {"penalty_alpha": 0.6, "top_k": 4},
])  # fmt: skip
def test_a_choice_is_given_whole_though_all_of_it_was_said(settings, size):
    """The ban of repetitions gives way where nothing else may follow, alone and in a batch."""
    pytest.importorskip("llguidance")
    model = burnish.load("pebble", torch.float32)
    choices = ["positive", "negative", "bread, bread, bread"]
    config = GenerationConfig(choices=choices, max_new_tokens=12, no_repeat_ngram_size=size, **settings)
    prompts = [f"Review: {choices[0]} {choices[1]} {choices[2]}. Sentiment:", "Review: dull. Sentiment:"]
    found = generate(model, prompts, config)
    assert all(done.text.strip() in choices and done.finish_reason == "eos" for done in found)
    assert [generate(model, [text], config)[0].ids for text in prompts] == [done.ids for done in found]


def test_a_beam_without_chance_leaves_the_others_their_grammar():
    """Of a reply that the grammar refuses nothing but the end goes on, and the next reply is judged by itself."""
    pytest.importorskip("llguidance")
    model = burnish.load("pebble")
    guide, logits = Guide(model, ["positive", "negative"], {}, [1]), torch.zeros(3, model.spec.vocab_size)
    start = model.tokenizer(" positive")["input_ids"][:1]
    good, bad, other = guide(logits, [[], [3, 3], start])
    assert (bad > NEVER).nonzero().tolist() == [[1]] and other[1] == 0 and good[start[0]] == 0
    assert torch.equal(guide(logits[:1], [[]])[0], good) and good[1] == NEVER


@pytest.mark.parametrize(("words", "told"), [
    (["--choices", "[Thornbury by the sea]"], "cut off before it was one of choices; raise max_new_tokens"),
    (["--choices", "Thornbury"], ""),
    (["--json-schema", "{type: boolean}"], "cut off before it was the JSON that json_schema asks for; raise max_new"),
    (["--json-schema", "{type: integer, minimum: 7, maximum: 7}"], ""),
    ([], ""),
])  # fmt: skip
@pytest.mark.parametrize("json_lines", [[], ["--json"]])
def test_a_guided_reply_that_is_cut_off_is_told(words, told, json_lines, capsys):
    pytest.importorskip("llguidance")
    prompt = "Question: Where was Maren Larquist born? Answer:"
    assert main(["generate", "pebble", "--prompt", prompt, "--max-new-tokens", "1", *words, *json_lines]) == 0
    error = capsys.readouterr().err
    assert (told in error and error.startswith("prompt 1: " if json_lines else "the reply was")) if told else not error


@pytest.mark.parametrize(("settings", "message"), [
    ({"num_beams": 4, "num_beam_groups": 2}, "num_beam_groups: without diversity_penalty all groups choose alike"),
    ({"length_penalty": 0.5}, "length_penalty: acts in beam search"),
    ({"early_stopping": True}, "early_stopping: acts in beam search"),
    ({"num_assistant_tokens": 4}, "num_assistant_tokens: acts with an assistant_model"),
    ({"choices": "yes"}, "choices: a list of texts is needed, not 'yes'"),
    ({"choices": ["yes", False]}, "choices: a list of texts"),
])  # fmt: skip
def test_settings_that_would_do_nothing(settings, message):
    with pytest.raises(UserError, match=message):
        GenerationConfig(**settings)


@pytest.mark.parametrize("token", [-1, 1 << 20, "a"])
def test_a_stop_token_that_the_model_lacks(token):
    with pytest.raises(UserError, match=f"stop_token_ids: token {token} is none of the model's, 0 to "):
        generate(burnish.load("pebble"), ["a"], GenerationConfig(stop_token_ids=[token]))


def test_a_schema_that_makes_no_sense():
    pytest.importorskip("llguidance")
    with pytest.raises(UserError, match="json_schema: "):
        generate(burnish.load("pebble"), ["a"], GenerationConfig(json_schema={"type": "nonsense"}))
    with pytest.raises(UserError, match="choices: does not go with min_new_tokens"):
        GenerationConfig(choices=["a"], min_new_tokens=3)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_beams": 2},
        {"do_sample": True},
        {"prompt_lookup_num_tokens": 2},
        {"penalty_alpha": 0.6, "top_k": 4},
    ],
)
def test_logits_that_are_no_numbers_are_told_in_a_line(root, settings):
    model = load(root)
    with torch.no_grad():
        model.net.norm.weight[3] = float("nan")
    with pytest.raises(UserError, match=r"prompt 1: the model's logits are not numbers .*--dtype fp32"):
        generate(model, ["the cat"], GenerationConfig(max_new_tokens=3, **settings))


@pytest.mark.parametrize("limit", [1, 4])
def test_a_candidate_of_contrastive_search_that_gives_no_numbers_is_not_chosen(root, limit):
    """Any number compares as less than NaN."""
    model = load(root)
    config = GenerationConfig(max_new_tokens=limit, min_new_tokens=limit, penalty_alpha=0.6, top_k=4)
    with torch.no_grad():
        ids = torch.tensor([model.tokenizer(PROMPTS[0])["input_ids"]])
        likely = model.net.logits(model.net(ids))[0, -1]
        likely[list(eos_ids(model))] = float("-inf")
        (chosen,) = generate(model, PROMPTS[:1], config)[0].ids[:1]
        other = next(token for token in likely.topk(4).indices.tolist() if token != chosen)
        model.net.embed_tokens.weight[other] = float("nan")
    with pytest.raises(
        UserError, match=r"prompt 1: the model's logits are not numbers \(NaN\) at token 1 of the reply"
    ):
        generate(model, PROMPTS[:1], config)
