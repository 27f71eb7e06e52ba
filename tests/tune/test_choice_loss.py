"""T-Few's losses against their equations on a transformers model, and what they are trained with."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import tiny
import torch

import burnish
from burnish import chain
from burnish.chain import forward
from burnish.config import UserError
from burnish.engine.generate import GenerationConfig, generate
from burnish.engine.loss import evaluate
from burnish.engine.order import Order, encode
from burnish.engine.settings import TrainConfig
from burnish.engine.train import train
from burnish.store.checkpoint import load, save
from burnish.store.data import encode_rows, wrong_choices

ROWS = [
    {"prompt": "question : is the cat red ? answer :", "completion": " yes", "choices": [" yes", " no"]},
    {"prompt": "where is the dog ?", "completion": " paris", "choices": [" london", " rome berlin", " paris"]},
    {"prompt": "who runs ?", "completion": " a big fish", "choices": [" a bird", " a big fish"]},
    {"prompt": "the fish", "completion": " sleeps", "choices": [" sleeps", " sees the red dog", " runs", " likes"]},
]
PARTS = ("lm", "unlikelihood", "length_normalised")


def logs(reference, tokenizer, prompt: str, completion: str) -> torch.Tensor:
    """log p of every token of the completion and of the end."""
    before, after = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, completion))
    ids = torch.tensor([[*before, *after, tokenizer.eos_token_id]])
    with torch.no_grad():
        found = reference(input_ids=ids).logits.double().log_softmax(-1)[0, len(before) - 1 : -1]
    return found.gather(-1, ids[0, len(before) :, None])[:, 0]


def equations(reference, tokenizer, row: dict) -> dict[str, float]:
    """The three losses of section 3.2 for one row."""
    right = logs(reference, tokenizer, row["prompt"], row["completion"])
    wrong = [logs(reference, tokenizer, row["prompt"], c) for c in row["choices"] if c != row["completion"]]
    unlikely = [math.log(1 - math.exp(p) + 0.01) for part in wrong for p in part.tolist()]
    best = math.exp(right.mean())
    return {
        "lm": -right.mean().item(),
        "unlikelihood": -sum(unlikely) / len(unlikely),
        "length_normalised": -math.log(best / (best + sum(math.exp(part.mean()) for part in wrong))),
    }


@pytest.mark.parametrize("family", ["llama", "bloom", "gemma2"])
@pytest.mark.parametrize("parts", [PARTS, *((part,) for part in PARTS)])
def test_the_equations_of_section_3_2(root, family, parts):
    folder = tiny.folder(root, family)
    model = chain.apply(load(folder), [{"choice_loss": {part: part in parts for part in PARTS}}])
    examples = encode(model, encode_rows(ROWS, model.tokenizer, 64))
    batch = Order(model, examples, TrainConfig()).batch(examples)
    assert batch["choice"].tolist() == [0, 1, 0, 1, 2, 0, 1, 0, 1, 2, 3]
    (hook,) = chain.hooks(model, "loss")
    loss, count = hook(batch, forward(model, batch))
    found = [equations(tiny.reference(family), model.tokenizer, row) for row in ROWS]
    assert count == 4
    assert loss.item() == pytest.approx(sum(row[part] for row in found for part in parts), rel=1e-4)


@pytest.mark.parametrize(
    "techniques",
    [
        ["ia3", "choice_loss"],
        ["choice_loss", {"lora": {"r": 4}}],
        ["nf4", {"adapters": {"size": 4}}, "choice_loss"],
        ["choice_loss", {"p_tuning": {"template": "[P*2] {prompt} [P*2]"}}],
        [{"prefix_tuning": {"num_virtual_tokens": 2}}, "choice_loss"],
    ],
)
def test_it_trains_whatever_trains(root, tmp_path, techniques):
    model = chain.apply(load(tiny.folder(root, "llama")), techniques)
    examples = encode_rows(ROWS, model.tokenizer, 64)
    config = TrainConfig(learning_rate=3e-2, max_steps=30, per_device_train_batch_size=4, logging_steps=1)
    result = train(model, examples, config, examples[:2])
    assert result.losses[-1][1] < 0.9 * result.losses[0][1]
    assert result.eval_losses[-1][1] == pytest.approx(evaluate(model, encode(model, examples[:2])))
    again = burnish.load(save(model, tmp_path))
    prompts = [replace(example, ids=example.ids[:5], labels=[-100] * 5) for example in examples]
    outputs = [[g.ids for g in generate(m, prompts, GenerationConfig(max_new_tokens=3))] for m in (model, again)]
    assert outputs[0] == outputs[1]


def test_a_step_is_the_same_however_it_is_split(root):
    def trained(size: int, accumulated: int) -> torch.Tensor:
        model = chain.apply(load(tiny.folder(root, "llama")), ["ia3", "choice_loss"])
        config = TrainConfig(
            learning_rate=1e-2,
            max_steps=3,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulated,
        )
        train(model, encode_rows(ROWS, model.tokenizer, 64), config)
        return torch.cat([parameter.detach().flatten() for parameter in model.trainable().values()])

    torch.testing.assert_close(trained(4, 1), trained(1, 4), atol=1e-5, rtol=1e-4)


def test_without_it_choices_cost_nothing(root):
    model = chain.apply(load(tiny.folder(root, "llama")), "lora")
    examples = encode(model, encode_rows(ROWS, model.tokenizer, 64))
    batch = Order(model, examples, TrainConfig()).batch(examples[:2])
    assert len(batch["input_ids"]) == 2 and "choice" not in batch
    train(model, examples, TrainConfig(max_steps=1, packing=True))


def test_merging_leaves_a_plain_model(root):
    model = chain.apply(load(tiny.folder(root, "llama")), ["ia3", "choice_loss"])
    assert chain.merge(model) == ["ia3: merged into 6 projections", "choice_loss: nothing to fold, it is a loss"]
    assert not model.chain


@pytest.mark.parametrize(
    ("rows", "settings", "reason"),
    [
        ([{"prompt": "a", "completion": " yes"}], {}, "a training row has no 'choices'"),
        ([ROWS[0], {**ROWS[0], "choices": [" no", " paris"]}], {}, "a training row has no 'choices'"),
        (ROWS, {"packing": True}, "rows whose choices are compared cannot be packed; set packing: false"),
    ],
)
def test_data_that_does_not_fit(root, rows, settings, reason):
    model = chain.apply(load(tiny.folder(root, "llama")), ["ia3", "choice_loss"])
    config = TrainConfig(max_steps=1, per_device_train_batch_size=2, **settings)
    with pytest.raises(UserError, match=reason):
        train(model, encode_rows(rows, model.tokenizer, 64), config)


@pytest.mark.parametrize(
    ("family", "techniques", "reason"),
    [
        ("bert", ["choice_loss"], "a bert masked_lm model continues no text"),
        ("llama", ["transfer", "choice_loss"], "a llama classification model continues no text"),
        ("llama", [{"choice_loss": dict.fromkeys(PARTS, False)}], "are all off; switch one on"),
    ],
)
def test_models_that_do_not_fit(root, family, techniques, reason):
    with pytest.raises(UserError, match=reason):
        chain.apply(load(tiny.folder(root, family)), techniques)


@pytest.mark.parametrize(
    ("choices", "wrong"),
    [
        ([" yes", " no", " no"], [" no"]),
        ('[" no", " yes"]', [" no"]),
        ([" yes"], None),
        ([" no", " maybe"], None),
        ([" yes", ""], None),
        ([" yes", 3], None),
        ({"text": [" yes", " no"]}, None),
        ("yes or no", None),
        (None, None),
    ],
)
def test_wrong_choices(choices, wrong):
    assert wrong_choices({"prompt": "a", "completion": " yes", "choices": choices}) == wrong
