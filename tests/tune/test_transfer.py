"""What trains beside a new head, how fast, the new language-model head, and layers taken from another model."""

from __future__ import annotations

import json

import pytest
import tiny
import tiny_foreign
import torch
import transformers

from burnish import chain
from burnish.chain import Context, forward
from burnish.cli import main
from burnish.config import UserError
from burnish.engine.optim import parameter_groups
from burnish.engine.settings import TrainConfig
from burnish.engine.train import train
from burnish.model.example import Example
from burnish.store.checkpoint import load, save
from burnish.store.take import LayersFrom, take

DEEP = {"num_hidden_layers": 4}
IDS = torch.randint(6, 80, (3, 9), generator=torch.Generator().manual_seed(2))


def groups_of(model, rate=1.0, decay=0.1):
    """Parameter name -> (rate, weight decay), every trainable one in exactly one group."""
    own = [group for hook in chain.hooks(model, "parameter_groups") for group in hook(rate, decay)]
    names = {id(parameter): name for name, parameter in model.trainable().items()}
    found = {}
    for group in parameter_groups(model.trainable().values(), rate, decay, own):
        for parameter in group["params"]:
            assert names[id(parameter)] not in found
            found[names[id(parameter)]] = (group["lr"], group["weight_decay"])
    assert found.keys() == set(names.values())
    return found


@pytest.mark.parametrize(
    ("options", "layers", "embeddings"),
    [
        ({"freeze_layers": 3}, {3}, False),
        ({"freeze_layers": 1}, {1, 2, 3}, False),
        ({"freeze_layers": 4}, set(), False),
        ({"freeze_layers": 0}, {0, 1, 2, 3}, True),
        ({"train_layers": 1}, {3}, False),
    ],
)
def test_the_lower_layers_stay_frozen(tmp_path, options, layers, embeddings):
    folder = tiny.write(tmp_path / "deep", tiny.reference("llama", **DEEP))
    model = chain.apply(load(folder), {"transfer": options})
    trains = set(model.trainable())
    assert {int(name.split(".")[1]) for name in trains if name.startswith("layers.")} == layers
    assert ("embed_tokens.weight" in trains) is embeddings and "score.weight.dense" in trains
    again = load(save(model, tmp_path / "saved"))
    assert set(again.trainable()) == trains and chain.describe(again) == chain.describe(model)


@pytest.mark.parametrize("decay", [1 / 2.6, 1.0])
@pytest.mark.parametrize(("family", "technique"), [("llama", "full"), ("bert", "transfer"), ("gpt2", "full")])
def test_rates_fall_from_layer_to_layer(root, family, technique, decay):
    options = {"layer_lr_decay": decay} | ({"train_layers": -1} if technique == "transfer" else {})
    model = chain.apply(load(tiny.folder(root, family)), {technique: options})
    for name, (rate, weight_decay) in groups_of(model).items():
        outside = 3 if name.startswith("embed") else 0
        below = 2 - int(name.split(".")[1]) if name.startswith("layers.") else outside
        assert rate == pytest.approx(decay**below), name
        assert weight_decay == (0.1 if model.trainable()[name].ndim > 1 else 0.0)


def test_every_parameter_has_a_rate_in_pairs_and_through_transformers(root):
    for folder in (tiny.folder(root, "t5"), *(tiny_foreign.folder(root, name) for name in ("gptj", "bart", "roberta"))):
        model = chain.apply(load(folder), {"full": {"layer_lr_decay": 0.5}})
        rates = {name: rate for name, (rate, _) in groups_of(model).items()}
        depth = len(model.net.all_layers) + 1
        assert set(rates.values()) == {0.5**below for below in range(depth + 1)}
        first = next(name for name, p in model.net.named_parameters() if p is model.net.embed_tokens.weight)
        assert rates[first] == 0.5**depth


def test_a_step_moves_layers_by_their_rates(root):
    """AdamW's first step moves every parameter that has a gradient by its rate."""
    model = chain.apply(load(tiny.folder(root, "llama")), {"full": {"layer_lr_decay": 0.25}})
    before = {name: parameter.detach().clone() for name, parameter in model.trainable().items()}
    ids = list(range(6, 40))
    train(model, [Example(ids, ids)], TrainConfig(max_steps=1, learning_rate=1e-3, weight_decay=0.0, warmup_ratio=0.0))
    moved = {name: (parameter - before[name]).abs().max().item() for name, parameter in model.trainable().items()}
    for name, below in (("lm_head.weight.dense", 0), ("norm.weight", 0), ("embed_tokens.weight", 3)):
        assert moved[name] == pytest.approx(1e-3 * 0.25**below, rel=1e-2)
    for layer in (0, 1):
        assert moved[f"layers.{layer}.mlp.up_proj.weight.dense"] == pytest.approx(1e-3 * 0.25 ** (2 - layer), rel=1e-2)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "mpt", "gptj"])
def test_a_new_language_model_head_is_the_models_own(root, tmp_path, family):
    folder = (tiny_foreign if family == "gptj" else tiny).folder(root, family)
    model = chain.apply(load(folder), {"transfer": {"head": "lm"}}, Context(seed=1))
    other = chain.apply(load(folder), {"transfer": {"head": "lm"}}, Context(seed=2))
    assert not any(name.startswith(("layers", "embed", "transformer")) for name in model.trainable())
    with torch.no_grad():
        for parameter in model.trainable().values():
            parameter += 0.1
        states = forward(model, {"input_ids": IDS})
        torch.testing.assert_close(states, forward(load(folder), {"input_ids": IDS}))
        want = model.net.logits(states)
        assert not torch.allclose(want, other.net.logits(states), atol=1e-2)
        save(model, tmp_path)
        again = load(tmp_path)
        torch.testing.assert_close(again.net.logits(forward(again, {"input_ids": IDS})), want, atol=0, rtol=0)
        config = json.loads((tmp_path / "config.json").read_text())
        assert config["tie_word_embeddings"] is False
        kind = getattr(transformers, config["architectures"][0])
        theirs, report = kind.from_pretrained(tmp_path, output_loading_info=True)
        unused = {"cls.predictions.bias"}  # BERT's, which an untied head does not read
        assert set(report.pop("missing_keys")) <= unused and not any(report.values())
        torch.testing.assert_close(theirs.eval()(input_ids=IDS).logits, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "techniques", "reason"),
    [
        (
            "llama",
            {"transfer": {"freeze_layers": 1, "train_layers": 1}},
            "train_layers and freeze_layers are both given",
        ),
        ("llama", {"transfer": {"freeze_layers": 3}}, "freeze_layers is 3; the model has 2 layers"),
        ("llama", {"transfer": {"train_layers": -3}}, "train_layers is -3; the model has 2 layers"),
        ("llama", {"full": {"layer_lr_decay": 0}}, "layer_lr_decay is 0.0; it must be above 0"),
        ("t5", {"transfer": {"head": "lm"}}, "a t5 model's encoder gets a classification head only"),
        ("llama", {"transfer": {"head": "lm", "label_names": ["a", "b"]}}, "label_names are a classifier's"),
        (
            "llama",
            [{"transfer": {"layer_lr_decay": 0.5}}, {"full": {"layer_lr_decay": 0.5}}],
            "'transfer' has a layer_lr_decay already",
        ),
    ],
)
def test_refusals(root, family, techniques, reason):
    with pytest.raises(UserError, match=reason):
        chain.apply(load(tiny.folder(root, family)), techniques)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_taken_layers_are_the_sources(root, tmp_path, family):
    deep = {"llama": DEEP, "gpt2": {"n_layer": 4}, "bert": DEEP}[family]
    source = load(tiny.write(tmp_path / "deep", tiny.reference(family, **deep)))
    model = load(tiny.folder(root, family))
    before = {name: tensor.clone() for name, tensor in model.net.state_dict().items()}
    take(model, source, LayersFrom("deep", [3, 1]))
    for own, taken in ((0, 3), (1, 1)):
        for name, parameter in model.net.layers[own].named_parameters():
            assert torch.equal(parameter, source.net.layers[taken].get_parameter(name))
    rest = {name for name in before if not name.startswith("layers.")}
    assert rest and all(torch.equal(before[name], model.net.state_dict()[name]) for name in rest)
    take(model, source, LayersFrom("deep", [0], [1], embeddings=True, head=True))
    assert torch.equal(model.net.layers[1].mlp.up_proj.weight.dense, source.net.layers[0].mlp.up_proj.weight.dense)
    assert torch.equal(model.net.layers[0].mlp.up_proj.weight.dense, source.net.layers[3].mlp.up_proj.weight.dense)
    assert all(torch.equal(source.net.state_dict()[name], model.net.state_dict()[name]) for name in rest)
    with torch.no_grad():
        want = forward(model, {"input_ids": IDS})
        again = load(save(model, tmp_path / "saved"))
        torch.testing.assert_close(forward(again, {"input_ids": IDS}), want)


def test_layers_that_do_not_fit_are_refused(root, tmp_path):
    model = load(tiny.folder(root, "llama"))
    wide = load(tiny.write(tmp_path / "wide", tiny.reference("llama", hidden_size=48, vocab_size=90)))
    with pytest.raises(UserError, match="hidden_size is 32 here, 48 there; head_dim is 8 here, 12 there$"):
        take(model, wide, LayersFrom("wide", [0]))
    with pytest.raises(UserError, match="vocab_size is 80 here, 90 there; hidden_size"):
        take(model, wide, LayersFrom("wide", [0], embeddings=True))
    with pytest.raises(UserError, match="family is llama here, bert there"):
        take(model, load(tiny.folder(root, "bert")), LayersFrom("bert", [0]))
    same = load(tiny.folder(root, "llama"))
    with pytest.raises(UserError, match="layers_from: same: nothing is taken"):
        take(model, same, LayersFrom("same"))
    with pytest.raises(UserError, match="layers: there is no layer 2; they are 0 to 1"):
        take(model, same, LayersFrom("same", [0, 2]))
    with pytest.raises(UserError, match=r"into: \[1, 1\] are not 2 different layers"):
        take(model, same, LayersFrom("same", [0, 1], [1, 1]))
    with pytest.raises(UserError, match="merge them first"):
        take(model, chain.apply(same, "lora"), LayersFrom("same", [0]))


def test_a_student_starts_from_its_teacher(tmp_path):
    teacher = tiny.write(tmp_path / "teacher", tiny.reference("llama", **DEEP))
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "the cat sees a dog"}\n' * 8)
    options = {"model": str(teacher), "layers": [0, 2], "embeddings": True, "head": True}
    words = ["pretrain", str(data), "--layers-from", json.dumps(options), "--learning-rate", "0", "--max-steps", "1"]
    assert main([*words, "--no-bf16", "--output-dir", str(tmp_path / "student")]) == 0
    student, source = load(tmp_path / "student", torch.float32), load(teacher)
    assert len(student.net.layers) == 2 and student.tokenizer.get_vocab() == source.tokenizer.get_vocab()
    for own, taken in ((0, 0), (1, 2)):
        for name, parameter in student.net.layers[own].named_parameters():
            assert torch.equal(parameter, source.net.layers[taken].get_parameter(name).bfloat16().float())
    assert torch.equal(student.net.embed_tokens.weight, source.net.embed_tokens.weight.bfloat16().float())


def test_a_tuned_model_begins_with_layers_of_another(root, tmp_path):
    other = tiny.write(tmp_path / "other", tiny.reference("llama", initializer_range=0.3))
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "the cat", "completion": "sees a dog"}\n' * 4)
    graft = json.dumps({"model": str(other), "layers": [1], "into": [1]})
    words = ["tune", str(tiny.folder(root, "llama")), "--data", str(data), "--layers-from", graft, "--max-steps", "1"]
    assert main([*words, "--output-dir", str(tmp_path / "out")]) == 0
    model, source = load(tmp_path / "out"), load(other)
    got = dict(model.net.layers[1].named_parameters())
    for name, parameter in source.net.layers[1].named_parameters():
        wrapped = name if name in got else name.replace("_proj.", "_proj.base.")
        assert torch.equal(parameter, got[wrapped])
