"""Prompt tuning and prefix tuning against transformers: its own embeddings and cache, with our learnt vectors."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
import transformers

from burnish import chain
from burnish.chain import Context, Model, forward
from burnish.config import UserError
from burnish.engine.order import encode
from burnish.model.cache import KVCache
from burnish.model.example import IGNORE, Example
from burnish.store.batch import collate
from burnish.store.checkpoint import load, save

IDS = torch.randint(6, 80, (2, 7), generator=torch.Generator().manual_seed(3))
CLOSE = {"atol": 1e-4, "rtol": 0}


def tuned(folder: Path, name: str, **options) -> Model:
    model = chain.apply(load(folder), {name: options}, Context(seed=4))
    with torch.no_grad():
        for parameter in model.trainable().values():
            parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(6))
    return model


@torch.no_grad()
def logits(model: Model, lengths=(None, None)) -> torch.Tensor:
    examples = [
        Example(row, [IGNORE] * len(row), virtual_tokens=length)
        for row, length in zip(IDS.tolist(), lengths, strict=True)
    ]
    return model.net.logits(forward(model, collate(list(encode(model, examples)), 0)))


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("length", [4, 2])
def test_a_soft_prompt_is_embeddings_before_the_text(root, family, length):
    model, reference = tuned(tiny.folder(root, family), "prompt_tuning", num_virtual_tokens=4), tiny.reference(family)
    prompt = model.net.techniques["prompt_tuning"].embedding.detach()[:length].expand(2, -1, -1)
    words = reference.get_input_embeddings()(IDS)
    at = 1 if family == "bert" else 0  # [CLS] stays first
    with torch.no_grad():
        want = reference(inputs_embeds=torch.cat((words[:, :at], prompt, words[:, at:]), dim=1)).logits
    torch.testing.assert_close(logits(model, (length, length)), want, **CLOSE)


@pytest.mark.parametrize("family", tiny.DECODERS)
@pytest.mark.parametrize("length", [4, 2])
def test_a_prefix_is_keys_and_values_before_the_text(tmp_path, family, length):
    """The reparametrisation's rows hold, layer by layer, the keys and then the values (section 4.3).

    Sliding windows are wide here: transformers counts a prefix into them.
    """
    wide = {"sliding_window": 16} if tiny.CONFIGS[family][1].get("sliding_window") else {}
    reference = tiny.reference(family, **wide)
    model = tuned(tiny.write(tmp_path, reference), "prefix_tuning", num_virtual_tokens=4, encoder_hidden_size=16)
    spec = model.spec
    stored = spec.num_heads if family == "falcon" else spec.num_kv_heads  # its cache in transformers is not grouped
    past = transformers.DynamicCache(config=reference.config)
    with torch.no_grad():
        table = model.net.techniques["prefix_tuning"]()[-length:]
        for layer, part in enumerate(table.chunk(spec.num_layers, dim=1)):
            keys, values = (
                half.view(1, length, spec.num_kv_heads, spec.head_dim).transpose(1, 2).repeat(2, 1, 1, 1)
                for half in part.chunk(2, dim=1)
            )
            past.update(*(x.repeat_interleave(stored // spec.num_kv_heads, dim=1) for x in (keys, values)), layer)
        mask = torch.ones(2, length + IDS.shape[1], dtype=torch.long)
        want = reference(input_ids=IDS, past_key_values=past, attention_mask=mask).logits
    torch.testing.assert_close(logits(model, (length, length)), want, **CLOSE)


def test_a_sliding_window_always_sees_the_prefix(tmp_path):
    reference = tiny.reference("mistral", num_hidden_layers=1)
    model = tuned(tiny.write(tmp_path, reference), "prefix_tuning", num_virtual_tokens=4, encoder_hidden_size=16)

    def last(change: float = 0.0, first: int = 6) -> torch.Tensor:
        batch = collate([Example([first, *range(7, 17)], [IGNORE] * 11)], 0)
        prefix = model.net.techniques["prefix_tuning"].embedding.weight
        with torch.no_grad():
            prefix += change
            found = [
                forward(model, batch)[:, -1],
                forward(model, batch, KVCache(model.spec, 1, 15, torch.float32))[:, -1],
            ]
            prefix -= change
        torch.testing.assert_close(*found, **CLOSE)
        return found[0]

    torch.testing.assert_close(last(), last(first=9), **CLOSE)  # the first token is out of the window
    assert (last() - last(change=0.5)).abs().max() > 0.01


def test_prompts_start_as_configured(root):
    def start(**options) -> torch.Tensor:
        options = {"num_virtual_tokens": 6, **options}
        model = chain.apply(load(tiny.folder(root, "llama")), {"prompt_tuning": options}, Context(seed=1))
        return model.net.techniques["prompt_tuning"].embedding.detach()

    table = load(tiny.folder(root, "llama")).net.embed_tokens.weight.detach()
    assert all((table == row).all(1).any() for row in start())
    assert start(init="random").abs().max() <= 0.5 and start(init="random").std() > 0.2
    words = [6 + tiny.WORDS.index(word) for word in ("the", "red", "cat")]
    assert torch.equal(start(init="text", init_text="the red cat"), table[words * 2])
    with pytest.raises(UserError, match="init_text is empty"):
        start(init="text")


def test_a_prompt_starts_from_the_class_words(root):
    """One pseudo token a class, the mean of its tokens, the most frequent answer first; then sampled vocabulary."""

    def start(*before, examples=(), **options) -> torch.Tensor:
        options = {"num_virtual_tokens": 4, "init": "labels", **options}
        model = load(tiny.folder(root, "llama"))
        chain.apply(model, [*before, {"prompt_tuning": options}], Context(seed=1, examples=examples))
        return model.net.techniques["prompt_tuning"].embedding.detach()

    table = load(tiny.folder(root, "llama")).net.embed_tokens.weight.detach()
    yes, no, cat = (table[6 + tiny.WORDS.index(word)] for word in ("yes", "no", "cat"))
    found = start(init_labels=["no", "yes cat"])
    torch.testing.assert_close(found[:2], torch.stack((no, (yes + cat) / 2)))
    assert all((table == row).all(1).any() for row in found[2:])
    assert torch.equal(start(init_labels=["no"] * 9), no.expand(4, -1))
    head = {"transfer": {"num_labels": 2, "label_names": ["no", "yes"]}}
    assert torch.equal(start(head)[:2], torch.stack((no, yes)))
    ids = [6 + tiny.WORDS.index(word) for word in ("the", "no", "yes")]
    answers = [Example([ids[0], ids[i], 1], [IGNORE, ids[i], 1]) for i in (1, 2, 2)]  # ended by the end token
    assert torch.equal(start(examples=answers)[:2], torch.stack((yes, no)))
    with pytest.raises(UserError, match="no class word is known; list them in init_labels"):
        start()


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("family", tiny.DECODERS)
def test_a_prefix_starts_as_real_words_before_the_text(tmp_path, family, projection):
    wide = {"sliding_window": 16} if tiny.CONFIGS[family][1].get("sliding_window") else {}
    reference = tiny.reference(family, **wide)
    options = {"num_virtual_tokens": 3, "init_text": "the red cat", "prefix_projection": projection}
    model = chain.apply(load(tiny.write(tmp_path, reference)), {"prefix_tuning": options}, Context(seed=4))
    words = torch.tensor([6 + tiny.WORDS.index(word) for word in ("the", "red", "cat")]).expand(2, -1)
    with torch.no_grad():
        want = reference(torch.cat((words, IDS), dim=1)).logits[:, 3:]
    torch.testing.assert_close(logits(model), want, **CLOSE)
    with torch.no_grad():
        for parameter in model.trainable().values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(6))
    moved = logits(model)
    assert not torch.allclose(moved, want, atol=1e-3)
    torch.testing.assert_close(logits(load(save(model, tmp_path / "saved"))), moved, atol=0, rtol=0)
    torch.testing.assert_close(logits(chain.finalize(model)), moved, **CLOSE)
    torch.testing.assert_close(logits(load(save(model, tmp_path / "final"))), moved, **CLOSE)


def test_a_prefix_from_words_needs_one_stack_and_words(root):
    with pytest.raises(UserError, match="init_text is for models of one stack"):
        chain.apply(load(tiny.folder(root, "t5")), {"prefix_tuning": {"init_text": "the cat"}})
    model = chain.apply(load(tiny.folder(root, "llama")), {"prefix_tuning": {"init_text": "the cat"}})
    assert model.net.techniques["prefix_tuning"]().shape[0] == 5  # the text is repeated
    with pytest.raises(UserError, match="the model has a prefix already"):
        chain.apply(model, "p_tuning_v2")


@pytest.mark.parametrize("name", ["prompt_tuning", "prefix_tuning", "p_tuning_v2"])
def test_an_empty_soft_prompt_is_refused(root, name):
    with pytest.raises(UserError, match="num_virtual_tokens is 0; at least 1 is needed"):
        chain.apply(load(tiny.folder(root, "llama")), {name: {"num_virtual_tokens": 0}})
    if name != "prompt_tuning":
        with pytest.raises(UserError, match="encoder_hidden_size is -1; at least 1 is needed"):
            chain.apply(load(tiny.folder(root, "llama")), {name: {"encoder_hidden_size": -1}})


PROMPTS = [
    {"prompt_tuning": {"num_virtual_tokens": 4}},
    {"p_tuning": {"template": "[P*3] {prompt} [P*2]"}},
]


@pytest.mark.parametrize("family", tiny.DECODERS)
@pytest.mark.parametrize("technique", PROMPTS)
@pytest.mark.parametrize("side", ["right", "left"])
def test_pseudo_tokens_that_all_rows_begin_with_are_computed_once(root, monkeypatch, family, technique, side):
    """The same hidden states and gradients as with each row's own, in fewer tokens, where nothing stands before them
    and no window slides."""
    model = chain.apply(load(tiny.folder(root, family)), technique, Context(seed=4))
    rows = [Example(ids, [IGNORE, *ids[1:]]) for ids in (IDS[0].tolist(), IDS[1, :4].tolist())]
    batch = collate(list(encode(model, rows)), 0, side)
    tokens: list[int] = []
    model.net.layers[0].mlp.down_proj.register_forward_hook(lambda module, inputs, out: tokens.append(len(out)))

    def run():
        tokens.clear()
        hidden = forward(model, batch)[batch["attention_mask"]]
        slopes = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
        return [hidden.detach(), *torch.autograd.grad((hidden * slopes).sum(), list(model.trainable().values()))]

    found, once = run(), sum(tokens)
    monkeypatch.setattr(type(model.net), "record", lambda net, embeds: None)
    each, count = run(), int(batch["attention_mask"].sum())
    assert sum(tokens) == count  # padding costs nothing
    shared = {"prompt_tuning": 4, "p_tuning": 3}[next(iter(technique))]
    possible = side == "right" and not model.spec.sliding_layers
    assert once == count - shared * possible
    for ours, want in zip(found, each, strict=True):
        torch.testing.assert_close(ours, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "init"),
    [
        ({}, "vocabulary"),
        ({"init_text": "the cat"}, "text"),
        ({"init": "text", "init_text": "the cat"}, "text"),
        ({"init_labels": ["yes", "no"]}, "labels"),
    ],
)
def test_the_words_of_a_start_are_enough(root, options, init):
    model = load(tiny.folder(root, "llama"))
    table = model.net.embed_tokens.weight
    chain.apply(model, {"prompt_tuning": {"num_virtual_tokens": 2, **options}})
    assert chain.describe(model)[0]["config"]["init"] == init
    words = {"text": ["the", "cat"], "labels": ["yes", "no"]}.get(init)
    if words:
        ids = model.tokenizer.convert_tokens_to_ids(words)
        torch.testing.assert_close(model.net.techniques["prompt_tuning"].embedding.detach(), table[ids].detach())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"init": "random", "init_text": "the"}, "init: random and init_text are different starts"),
        ({"init": "labels", "init_text": "the"}, "init: labels and init_text are different starts"),
        ({"init": "text", "init_labels": ["no"]}, "init: text and init_labels are different starts"),
        ({"init_text": "the", "init_labels": ["no"]}, "init_text and init_labels are different starts"),
        ({"init_text": ""}, "init_text is empty"),
        ({"init": "text"}, "init_text is empty"),
    ],
)
def test_starts_that_contradict_each_other_are_refused(root, options, reason):
    with pytest.raises(UserError, match=reason):
        chain.apply(load(tiny.folder(root, "llama")), {"prompt_tuning": options})
