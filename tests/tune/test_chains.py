"""Chains of several techniques: they start right, train, and come back from disk as they were."""

from __future__ import annotations

import pytest
import tiny
import torch
import transformers

import burnish
from burnish import chain
from burnish.chain import Model, forward
from burnish.config import UserError
from burnish.engine.order import collated
from burnish.engine.settings import TrainConfig
from burnish.engine.train import train
from burnish.model.example import IGNORE, Example
from burnish.store.batch import collate
from burnish.store.checkpoint import load, save

TEXTS = ([6, 7, 8, 9, 10], [20, 21, 22], [30, 9, 8, 31, 40, 41], [11, 12, 13, 14])
LORA = {"lora": {"r": 4, "target_modules": "all-linear"}}
ADAPTERS = {"adapters": {"size": 4}}


def examples(model: Model) -> list[Example]:
    if model.spec.head == "classification":
        return [Example([3, *ids, 4], [IGNORE] * (len(ids) + 2), label=i % 2) for i, ids in enumerate(TEXTS)]
    return [Example(ids, [IGNORE, *ids[1:]]) for ids in map(list, TEXTS)]


@torch.no_grad()
def outputs(model: Model) -> torch.Tensor:
    batch = collated(model, examples(model))
    hidden = forward(model, batch)
    if model.spec.head == "classification":
        return model.net.logits(model.net.pool(hidden, batch["attention_mask"]))
    return model.net.logits(hidden)[batch["attention_mask"]]


@pytest.mark.parametrize(
    ("family", "techniques"),
    [
        ("llama", ["nf4", LORA]),
        ("gpt2", ["int8", LORA]),
        ("bloom", ["magnitude", LORA]),
        ("bert", ["transfer", LORA]),
        ("bert", ["nf4", {"transfer": {"num_labels": 3, "train_layers": 1}}]),
        ("llama", ["int8", {"transfer": {"train_layers": -1}}]),
        ("llama", [{"transfer": {"train_layers": 1}}, LORA]),
        ("llama", ["nf4", LORA, "transfer"]),
        ("t5", ["nf4", LORA, {"prompt_tuning": {"num_virtual_tokens": 2}}]),
        ("t5", ["int8", {"transfer": {"train_layers": 1}}, LORA]),
        ("t5", ["prefix_tuning", LORA]),
        ("gpt2", [LORA, "nf4"]),
        ("llama", ["nf4", LORA, {"prompt_tuning": {"num_virtual_tokens": 2}}]),
        ("llama", [{"prefix_tuning": {"num_virtual_tokens": 2}}, "p_tuning"]),
        ("bloom", ["magnitude", "nf4", LORA]),
        ("bert", ["transfer", ADAPTERS]),
        ("bert", ["transfer", "ia3"]),
        ("falcon", ["ia3", ADAPTERS, "nf4"]),
        ("gpt_neox", [LORA, ADAPTERS, "nf4"]),
        ("falcon", ["int8", {"lora": {"r": 4}}, ADAPTERS]),
        ("llama", [ADAPTERS, {"prefix_tuning": {"num_virtual_tokens": 2}}]),
    ],
)
def test_a_chain_trains_and_comes_back(root, tmp_path, family, techniques):
    model = chain.apply(load(tiny.folder(root, family)), techniques)
    frozen = {name: p.detach().clone() for name, p in model.net.named_parameters() if not p.requires_grad}
    moving = {name: p.detach().clone() for name, p in model.trainable().items()}
    result = train(model, examples(model), TrainConfig(learning_rate=1e-2, max_steps=12, logging_steps=1))
    assert result.losses[-1][1] < result.losses[0][1]
    for name, parameter in model.net.named_parameters():
        assert name not in frozen or torch.equal(parameter, frozen[name]), name
        assert name not in moving or not torch.equal(parameter, moving[name]), name
    want = outputs(model)
    again = burnish.load(save(model, tmp_path))
    assert chain.describe(again) == chain.describe(model)
    assert set(again.trainable()) == set(moving)
    torch.testing.assert_close(outputs(again), want, atol=0, rtol=0)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_transfer_and_lora_merge_into_a_classifier_that_transformers_loads(root, tmp_path, family):
    labels = ["no", "yes", "maybe"]
    model = load(tiny.folder(root, family))
    chain.apply(model, [{"transfer": {"num_labels": 3, "label_names": labels}}, LORA])
    train(model, examples(model), TrainConfig(learning_rate=1e-2, max_steps=3))
    want = outputs(model)
    chain.merge(model)
    save(model, tmp_path)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert [theirs.config.id2label[i] for i in range(3)] == labels
    batch = collate(examples(model), 0)
    with torch.no_grad():
        got = theirs(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"].long()).logits
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("train_layers", "trains"),
    [
        (0, set()),
        (1, {"layers.1"}),
        (2, {"layers.0", "layers.1"}),
        (-1, {"layers.0", "layers.1", "embed_tokens.weight"}),
    ],
)
def test_transfer_unfreezes_from_the_top(root, train_layers, trains):
    model = chain.apply(load(tiny.folder(root, "llama")), {"transfer": {"train_layers": train_layers}})
    found = {".".join(name.split(".")[:2]) for name in model.trainable()}
    assert found - {"norm.weight"} == trains | {"score.weight"}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_labels": 1}, "a classifier needs at least 2"),
        ({"train_layers": 3}, "the model has 2 layers"),
        ({"num_labels": 3, "label_names": ["a", "b"]}, "2 label_names do not fit num_labels 3"),
    ],
)
def test_transfer_refuses(root, options, reason):
    with pytest.raises(UserError, match=reason):
        chain.apply(load(tiny.folder(root, "bert")), {"transfer": options})


def test_a_technique_stands_once(root):
    model = chain.apply(load(tiny.folder(root, "llama")), "lora")
    with pytest.raises(UserError, match="'lora' is already applied"):
        chain.apply(model, "lora")
    with pytest.raises(UserError, match="stands twice"):
        chain.parse_chain(["lora", "nf4", {"lora": {"r": 2}}])


def test_merging_into_some_of_the_quantised_projections(root, tmp_path):
    """Those become dense; the others stay NF4, and the chain says so when it is loaded again."""
    model = chain.apply(load(tiny.folder(root, "llama")), ["nf4", "lora"])
    (note,) = chain.merge(model)
    assert note == "lora: merged into 4 projections, 4 of them quantised and now dense in bfloat16"
    assert [link.name for link in model.chain] == ["nf4"]
    again = burnish.load(save(model, tmp_path))
    kinds = {path: type(again.net.get_submodule(path).weight).__name__ for path in
             ("layers.0.self_attn.q_proj", "layers.0.self_attn.k_proj")}  # fmt: skip
    assert kinds == {"layers.0.self_attn.q_proj": "Dense", "layers.0.self_attn.k_proj": "NF4"}
    torch.testing.assert_close(outputs(again), outputs(model), atol=0, rtol=0)


def test_full_says_that_quantised_weights_stay_frozen(root, caplog):
    chain.apply(load(tiny.folder(root, "llama")), ["full"])
    assert not caplog.messages
    chain.apply(load(tiny.folder(root, "llama")), ["nf4", "full"])
    (said,) = caplog.messages
    assert "% of the weights are stored quantised and stay frozen" in said
