"""(IA)^3 against peft, and against transformers models whose keys, values and inner activations are scaled."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import tiny
import tiny_foreign
import torch
import transformers

from burnish import chain
from burnish.chain import Model, forward
from burnish.config import UserError
from burnish.engine.loss import loss_sum
from burnish.model.example import Example
from burnish.store.batch import collate
from burnish.store.checkpoint import load, save
from burnish.tune import ia3

IDS = torch.randint(6, 80, (3, 9), generator=torch.Generator().manual_seed(2))
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
PEFT = [family for family in tiny.FAMILIES if family != "mpt"] + ["phi", "gptj", "roberta", "gpt_bigcode"]
FUSED = {  # Hugging Face's paths of the fused projection and the feed-forward's second, and how the former's rows lie
    "bloom": ("transformer.h.{i}.self_attention.query_key_value", "transformer.h.{i}.mlp.dense_4h_to_h", (6, 3)),
    "gpt_neox": ("gpt_neox.layers.{i}.attention.query_key_value", "gpt_neox.layers.{i}.mlp.dense_4h_to_h", (4, 3)),
    "falcon": ("transformer.h.{i}.self_attention.query_key_value", "transformer.h.{i}.mlp.dense_4h_to_h", (2, 4)),
    "gpt2": ("transformer.h.{i}.attn.c_attn", "transformer.h.{i}.mlp.c_proj", (1, 3)),
    "mpt": ("transformer.blocks.{i}.attn.Wqkv", "transformer.blocks.{i}.ffn.down_proj", (1, 3)),
}


def checkpoint(root: Path, family: str) -> Path:
    return (tiny_foreign if family in tiny_foreign.CONFIGS else tiny).folder(root, family)


def reference(folder: Path):
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, architecture).from_pretrained(folder).eval()


@torch.no_grad()
def ours(model: Model) -> torch.Tensor:
    return model.net.logits(forward(model, {"input_ids": IDS}))


@torch.no_grad()
def theirs(model) -> torch.Tensor:
    return model(input_ids=IDS).logits


@torch.no_grad()
def disturb(parameters) -> None:
    draw = torch.Generator().manual_seed(8)
    for parameter in parameters:
        parameter += 0.3 * torch.randn(parameter.shape, generator=draw)


def applied(folder: Path, **options) -> Model:
    model = chain.apply(load(folder), {"ia3": options})
    disturb(model.trainable().values())
    return model


@pytest.mark.parametrize("family", PEFT)
def test_what_peft_saved_loads_here_and_merges(root, tmp_path, family):
    folder = checkpoint(root, family)
    other = peft.get_peft_model(reference(folder), peft.IA3Config()).eval()
    disturb(parameter for parameter in other.parameters() if parameter.requires_grad)
    other.save_pretrained(tmp_path)
    want, model = theirs(other), load(tmp_path)
    assert [link.name for link in model.chain] == ["ia3"]
    torch.testing.assert_close(ours(model), want, **CLOSE)
    assert set(model.trainable()) == set(chain.apply(load(folder), {"ia3": {"peft_compatible": True}}).trainable())
    assert not torch.allclose(want, ours(load(folder)), atol=1e-2)
    chain.merge(model)
    torch.testing.assert_close(ours(model), want, atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("family", PEFT)
def test_what_burnish_saved_loads_in_peft(root, tmp_path, family):
    folder = checkpoint(root, family)
    model = applied(folder, peft_compatible=True)
    want = ours(model)
    loaded = peft.PeftModel.from_pretrained(reference(folder), save(model, tmp_path)).eval()
    torch.testing.assert_close(theirs(loaded), want, **CLOSE)
    again = load(tmp_path)
    assert chain.describe(again) == chain.describe(model)
    torch.testing.assert_close(ours(again), want, atol=0, rtol=0)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "opt", "bert", "stablelm", "phi", "distilbert"])
def test_the_papers_targets_in_peft(root, tmp_path, family):
    folder = checkpoint(root, family)
    model = applied(folder)
    leaves = {path.rpartition(".")[2] for path in ia3.layers(model)}
    assert len(ia3.layers(model)) == 6 and leaves & {"k_proj", "key", "k_lin"} and leaves & {"v_proj", "value", "v_lin"}
    loaded = peft.PeftModel.from_pretrained(reference(folder), save(model, tmp_path)).eval()
    torch.testing.assert_close(theirs(loaded), ours(model), **CLOSE)


@pytest.mark.parametrize("family", FUSED)
def test_of_a_fused_projection_keys_and_values_are_scaled(root, tmp_path, family):
    fused, inner, (groups, parts) = FUSED[family]
    folder = tiny.folder(root, family)
    model, other = applied(folder), reference(folder)
    assert torch.equal(ours(chain.apply(load(folder), "ia3")), ours(load(folder)))
    for i in range(2):
        scale = model.net.get_parameter(f"layers.{i}.self_attn.qkv_proj.ia3_l").detach().view(groups, 2, -1)

        def scaled(module, inputs, y, scale=scale):
            y = y.clone().unflatten(-1, (groups, parts, -1))
            y[..., -2, :] *= scale[:, 0]
            y[..., -1, :] *= scale[:, 1]
            return y.flatten(-3)

        other.get_submodule(fused.format(i=i)).register_forward_hook(scaled)
        ff = model.net.get_parameter(f"layers.{i}.mlp.down_proj.ia3_l").detach().flatten()
        other.get_submodule(inner.format(i=i)).register_forward_pre_hook(lambda _, x, ff=ff: (x[0] * ff, *x[1:]))
    want = theirs(other)
    torch.testing.assert_close(ours(model), want, **CLOSE)
    save(model, tmp_path)
    assert (tmp_path / "burnish.safetensors").exists() and not (tmp_path / "adapter_config.json").exists()
    torch.testing.assert_close(ours(load(tmp_path)), ours(model), atol=0, rtol=0)
    chain.merge(model)
    save(model, tmp_path / "merged")
    torch.testing.assert_close(theirs(reference(tmp_path / "merged")), want, atol=5e-5, rtol=1e-5)


def test_merging_into_a_quantised_base_says_so(root):
    model = chain.apply(load(tiny.folder(root, "llama")), ["nf4", "ia3"])
    disturb(model.trainable().values())
    assert chain.merge(model) == ["ia3: merged into 6 projections, 6 of them quantised and now dense in bfloat16"]


def test_bfloat16_gives_gradients_to_float32_vectors(root):
    model = applied(tiny.folder(root, "llama"))
    want = ours(model)
    model.net.compute_dtype = torch.bfloat16
    loss_sum(model, collate([Example([6, 7, 8, 9], [-100, 7, 8, 9])], 0))[0].backward()
    for name, parameter in model.trainable().items():
        assert parameter.dtype == torch.float32 and torch.isfinite(parameter.grad).all(), name
    assert (ours(model).float() - want).norm() < 0.1 * want.norm()


def test_targets_of_ones_own(root):
    options = {"target_modules": ["v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    model = chain.apply(load(tiny.folder(root, "llama")), {"ia3": options})
    assert {path: layer.feedforward for path, layer in ia3.layers(model).items()} == {
        f"layers.{i}.{path}": path.startswith("mlp") for i in (0, 1) for path in ("self_attn.v_proj", "mlp.down_proj")
    }


@pytest.mark.parametrize(
    ("family", "techniques", "reason"),
    [
        ("mamba", ["ia3"], "no key projection is known in this mamba model; it has: in_proj"),
        ("gpt_bigcode", ["ia3"], "no key projection is known in this gpt_bigcode model"),
        ("mpt", [{"ia3": {"peft_compatible": True}}], "peft has no targets for mpt; give target_modules"),
        ("llama", [{"ia3": {"target_modules": ["k_pro"]}}], "'k_pro' matches no projection"),
        ("llama", [{"ia3": {"target_modules": []}}], "nothing would be scaled"),
        ("llama", ["lora", "ia3"], "another technique is around 'layers.0.self_attn.v_proj'.*put 'ia3' before it"),
        ("llama", ["ia3", "lora"], "another technique is around 'layers.0.self_attn.v_proj'.*put 'lora' before it"),
    ],
)
def test_refusals(root, family, techniques, reason):
    with pytest.raises(UserError, match=reason):
        chain.apply(load(checkpoint(root, family)), techniques)
