"""Bottleneck adapters, held against transformers models with the formula in forward hooks."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import tiny_foreign
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from burnish import chain
from burnish.chain import Context, Model, forward
from burnish.config import UserError
from burnish.engine.loss import loss_sum
from burnish.store.batch import collate
from burnish.store.checkpoint import load, save
from burnish.store.data import Example
from burnish.tune.adapters import Adapter

IDS = torch.randint(6, 80, (3, 9), generator=torch.Generator().manual_seed(2))
LLAMA = ("model.layers", "self_attn.o_proj", "mlp.down_proj")
BERT = ("encoder.layer", "attention.output.dense", "output.dense")
PLACES = {  # Hugging Face's paths: the layers, and in each where attention and feed-forward end
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "stablelm", "cohere"), LLAMA),
    "bloom": ("transformer.h", "self_attention.dense", "mlp.dense_4h_to_h"),
    "gpt2": ("transformer.h", "attn.c_proj", "mlp.c_proj"),
    "opt": ("model.decoder.layers", "self_attn.out_proj", "fc2"),
    "gpt_neox": ("gpt_neox.layers", "attention.dense", "mlp.dense_4h_to_h"),
    "falcon": ("transformer.h", "self_attention.dense", "mlp.dense_4h_to_h"),
    "mpt": ("transformer.blocks", "attn.out_proj", "ffn.down_proj"),
    "phi": ("model.layers", "self_attn.dense", "mlp.fc2"),
    "gptj": ("transformer.h", "attn.out_proj", "mlp.fc_out"),
    "gpt_bigcode": ("transformer.h", "attn.c_proj", "mlp.c_proj"),
    "openai-gpt": ("transformer.h", "attn.c_proj", "mlp.c_proj"),
    "distilbert": ("distilbert.transformer.layer", "attention.out_lin", "ffn.lin2"),
    **{name: (f"{name}.{BERT[0]}", *BERT[1:]) for name in ("bert", "roberta", "electra")},
}


def checkpoint(root: Path, family: str) -> Path:
    return (tiny_foreign if family in tiny_foreign.CONFIGS else tiny).folder(root, family)


@torch.no_grad()
def ours(model: Model) -> torch.Tensor:
    return model.net.logits(forward(model, {"input_ids": IDS}))


def applied(folder: Path, **options) -> Model:
    return chain.apply(load(folder), {"adapters": {"size": 5, **options}}, Context(seed=1))


@torch.no_grad()
def disturb(model: Model) -> Model:
    draw = torch.Generator().manual_seed(8)
    for parameter in model.trainable().values():
        parameter += 0.2 * torch.randn(parameter.shape, generator=draw)
    return model


def theirs(root: Path, family: str, stored: dict[str, torch.Tensor], placement: str, activation) -> torch.Tensor:
    """A transformers model with y + up(act(down(y))) behind its sub-blocks, and the norms that were saved."""
    model = (tiny_foreign if family in tiny_foreign.CONFIGS else tiny).reference(family)
    layout = load(checkpoint(root, family)).net.layout
    native = {foreign: own for own, foreign in layout.modules.items()}
    layers, attention, feed_forward = PLACES[family]
    for number in range(2):
        for place in (attention, feed_forward) if placement == "houlsby" else (feed_forward,):
            path = f"{layers}.{number}.{place}"
            part = {leaf: stored.pop(f"{native[path]}.{leaf}") for leaf in ("down", "down_bias", "up", "up_bias")}

            def hook(module, inputs, y, part=part):
                return y + activation(y @ part["down"].T + part["down_bias"]) @ part["up"].T + part["up_bias"]

            model.get_submodule(path).register_forward_hook(hook)
    for name, tensor in stored.items():
        model.get_parameter(layout.tensors[name]).data.copy_(tensor)
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("family", PLACES)
@pytest.mark.parametrize(
    ("placement", "activation", "function"), [("houlsby", "gelu", F.gelu), ("pfeiffer", "relu", F.relu)]
)
def test_the_formula_in_a_transformers_model(root, tmp_path, family, placement, activation, function):
    model = applied(checkpoint(root, family), placement=placement, activation=activation)
    assert torch.equal(ours(model), ours(load(checkpoint(root, family))))
    want = ours(disturb(model))
    stored = load_file(save(model, tmp_path) / "burnish.safetensors")
    norms = [name for name in stored if "norm" in name.lower() or "ln_" in name]
    assert bool(norms) == (placement == "houlsby")
    torch.testing.assert_close(theirs(root, family, stored, placement, function), want, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "bert", "gpt2", "stablelm"])
def test_a_folder_without_the_base(root, tmp_path, family):
    model = disturb(applied(checkpoint(root, family)))
    save(model, tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    again = load(tmp_path)
    assert set(again.trainable()) == set(model.trainable())
    torch.testing.assert_close(ours(again), ours(model), atol=0, rtol=0)
    again = load(tmp_path, dtype=torch.bfloat16)
    kinds = {p.dtype for name, p in again.trainable().items() if name.endswith(("down", "up", "_bias"))}
    assert kinds == {torch.float32}


def test_sizes_and_what_trains(root):
    folder = tiny.folder(root, "llama")
    model = applied(folder, reduction_factor=4, placement="pfeiffer")
    found = {path: module for path, module in model.net.named_modules() if isinstance(module, Adapter)}
    assert set(found) == {"layers.0.mlp.down_proj", "layers.1.mlp.down_proj"}
    assert {tuple(module.down.shape) for module in found.values()} == {(8, 32)}
    assert model.chain[0].config.size == 8 and not any("norm" in name for name in model.trainable())
    assert any("norm" in name for name in applied(folder, placement="pfeiffer", train_norms=True).trainable())
    assert not any("norm" in name for name in applied(folder, train_norms=False).trainable())
    down = torch.cat([module.down.detach().flatten() for module in found.values()])
    assert 0.007 < down.std() < 0.011 and down.abs().max() <= 0.02  # cut at two standard deviations


def test_with_a_new_head_the_head_trains(root):
    model = chain.apply(load(tiny.folder(root, "bert")), ["transfer", {"adapters": {"size": 2}}])
    assert {name for name in model.trainable() if name.startswith(("score", "pooler"))}
    assert not any(name.startswith("embed_tokens") for name in model.trainable())


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_classifiers_own_head_trains_and_is_saved(root, tmp_path, family):
    base = tiny.folder(root, family, "classification")
    head = {name for name, _ in load(base).net.named_parameters() if name.startswith(("score", "pooler"))}
    assert head and not head & set(applied(base, placement="pfeiffer").trainable())
    assert not head & set(applied(base, train_head=False).trainable())
    model = applied(base)
    assert head <= set(model.trainable())
    disturb(model)
    again = load(save(model, tmp_path / "adapters"))
    assert set(again.trainable()) == set(model.trainable())
    for name in head:
        assert torch.equal(again.net.get_parameter(name), model.net.get_parameter(name))
    with pytest.raises(UserError, match="train_head is for classifiers; this model's head is"):
        applied(tiny.folder(root, family), train_head=True)


@pytest.mark.parametrize("before", [[], ["int8"], ["nf4"]])
def test_bfloat16_gives_gradients_to_float32_parameters(root, before):
    model = chain.apply(load(tiny.folder(root, "llama")), [*before, {"adapters": {"size": 4}}])
    want = ours(disturb(model))
    model.net.compute_dtype = torch.bfloat16
    loss_sum(model, collate([Example([6, 7, 8, 9], [-100, 7, 8, 9])], 0))[0].backward()
    for name, parameter in model.trainable().items():
        assert parameter.dtype == torch.float32 and torch.isfinite(parameter.grad).all(), name
    assert (ours(model).float() - want).norm() < 0.1 * want.norm()


@pytest.mark.parametrize(
    ("family", "techniques", "reason"),
    [
        ("llama", [{"adapters": {"size": 0}}], "size is 0; the bottleneck needs at least 1 of 32"),
        ("llama", [{"adapters": {"reduction_factor": 64}}], "reduction_factor is 64.*at least 1 of 32"),
        ("llama", [{"adapters": {"placement": "both"}}], "placement"),
        ("mamba", ["adapters"], "no attention output projection is known in this mamba model; it has: in_proj"),
        ("mixtral", ["adapters"], "no feed-forward output projection is known in this mixtral model"),
        ("llama", ["adapters", {"lora": {"target_modules": ["o_proj"]}}], "put 'lora' before it in the chain"),
    ],
)
def test_refusals(root, family, techniques, reason):
    with pytest.raises(UserError, match=reason):
        chain.apply(load(checkpoint(root, family)), techniques)


def test_they_cannot_be_merged(root):
    model = applied(tiny.folder(root, "llama"))
    assert chain.merge(model) == [] and [link.name for link in model.chain] == ["adapters"]
