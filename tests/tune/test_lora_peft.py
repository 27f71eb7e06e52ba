"""LoRA against peft: the same outputs, and adapters that go both ways."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import tiny
import torch
import transformers

import burnish
from burnish import chain
from burnish.chain import Context, Model, forward
from burnish.config import UserError
from burnish.store.checkpoint import load, save
from burnish.tune import lora

CASES = [(family, "") for family in tiny.FAMILIES]
CASES += [("bert", "classification"), ("bert", "none"), ("gpt_neox", "none"), ("opt", "none")]
NATIVE = {  # the family's own module names
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"), ["q_proj", "v_proj", "down_proj"]),
    **dict.fromkeys(("bloom", "gpt_neox", "falcon"), ["query_key_value", "dense_h_to_4h"]),
    "opt": ["q_proj", "out_proj", "fc1"],
    "mpt": ["Wqkv", "ffn.down_proj"],
    "gpt2": ["c_attn", "mlp.c_proj"],
    "bert": ["query", "value", "intermediate.dense"],
}
IDS = torch.randint(6, 80, (3, 9), generator=torch.Generator().manual_seed(2))
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@torch.no_grad()
def ours(model: Model) -> torch.Tensor:
    hidden = forward(model, {"input_ids": IDS})
    if model.spec.head == "none":
        return hidden
    if model.spec.head == "classification":
        hidden = model.net.pool(hidden, torch.ones_like(IDS, dtype=torch.bool))
    return model.net.logits(hidden)


@torch.no_grad()
def theirs(model) -> torch.Tensor:
    out = model(input_ids=IDS)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def reference(folder: Path):
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, architecture).from_pretrained(folder).eval()


def theirs_written(folder: Path, family: str, to: Path, **options):
    """A peft model with random adapters, saved."""
    torch.manual_seed(4)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": NATIVE[family], "init_lora_weights": False} | options
    config = peft.LoraConfig(fan_in_fan_out=family == "gpt2", **settings)
    model = peft.get_peft_model(reference(folder), config).eval()
    model.save_pretrained(to)
    return model


def ours_trained(folder: Path, family: str, **options) -> Model:
    """A burnish model with LoRA that moved away from its start."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": NATIVE[family]} | options
    model = chain.apply(load(folder), {"lora": settings}, Context(seed=1))
    draw = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for parameter in model.trainable().values():
            parameter += 0.2 * torch.randn(parameter.shape, generator=draw)
    return model


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(("family", "head"), CASES)
def test_an_adapter_that_peft_wrote_loads_here(root, tmp_path, family, head, rslora):
    folder = tiny.folder(root, family, head)
    want = theirs(theirs_written(folder, family, tmp_path, use_rslora=rslora))
    model = load(tmp_path)
    torch.testing.assert_close(ours(model), want, **CLOSE)
    assert not torch.allclose(want, ours(load(folder)), atol=1e-2)
    assert len(model.trainable()) == 2 * 2 * len(NATIVE[family])
    chain.merge(model)
    assert not model.chain
    torch.testing.assert_close(ours(model), want, **CLOSE)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(("family", "head"), CASES)
def test_an_adapter_that_burnish_wrote_loads_in_peft(root, tmp_path, family, head, rslora):
    folder = tiny.folder(root, family, head)
    model = ours_trained(folder, family, use_rslora=rslora)
    want = ours(model)
    save(model, tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(reference(folder), tmp_path / "adapter").eval()
    torch.testing.assert_close(theirs(loaded), want, **CLOSE)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(theirs(merged), want, **CLOSE)
    chain.merge(model)
    save(model, tmp_path / "merged")
    torch.testing.assert_close(theirs(reference(tmp_path / "merged")), want, **CLOSE)
    torch.testing.assert_close(ours(burnish.load(tmp_path / "merged")), want, **CLOSE)


def test_the_start_is_lora_section_4_1(root):
    model = chain.apply(load(tiny.folder(root, "llama")), {"lora": {"r": 32, "target_modules": "all-linear"}})
    for layer in lora.layers(model).values():
        assert not layer.lora_B.any()
        assert layer.lora_A.std().item() == pytest.approx(layer.base.in_features**-0.5, rel=0.1)


@pytest.mark.parametrize(
    ("targets", "paths"),
    [
        (["c_attn"], ["self_attn.qkv_proj"]),
        (["qkv_proj"], ["self_attn.qkv_proj"]),
        (["attn.c_proj"], ["self_attn.o_proj"]),
        (["c_proj"], ["self_attn.o_proj", "mlp.down_proj"]),
        (r"transformer\.h\.\d+\.mlp\..*", ["mlp.up_proj", "mlp.down_proj"]),
        (r"layers\.\d+\.mlp\.up_proj", ["mlp.up_proj"]),
        (None, ["self_attn.qkv_proj"]),
    ],
)
def test_targets_in_either_vocabulary(root, targets, paths):
    model = chain.apply(load(tiny.folder(root, "gpt2")), {"lora": {"target_modules": targets}})
    assert set(lora.layers(model)) == {f"layers.{i}.{path}" for i in (0, 1) for path in paths}


def test_an_unknown_target_names_the_nearest(root):
    with pytest.raises(UserError, match="'c_atn' matches no projection.*did you mean 'c_attn'"):
        chain.apply(load(tiny.folder(root, "gpt2")), {"lora": {"target_modules": ["c_atn"]}})


def test_dropout_acts_in_training_only(root):
    folder = tiny.folder(root, "llama")
    model = ours_trained(folder, "llama", lora_dropout=0.5)
    torch.testing.assert_close(ours(model), ours(ours_trained(folder, "llama")))
    model.net.train()
    assert not torch.allclose(ours(model), ours(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_adapter_is_kept_in_float32(root, tmp_path, dtype):
    model = theirs_written(tiny.folder(root, "llama"), "llama", tmp_path)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.to(dtype) if "lora_" in name else parameter.data
    model.save_pretrained(tmp_path)
    assert {p.dtype for p in load(tmp_path).trainable().values()} == {torch.float32}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"peft_type": "IA33"}, "adapter_config.json: .*'peft:ia33' is unknown .did you mean 'peft:ia3'"),
        ({"peft_type": "P_TUNING"}, "a P_TUNING adapter holds 'prompt_embeddings' alone, and this one has base_model"),
        ({"bias": "some"}, "bias: expected one of 'none', 'all', 'lora_only', found 'some'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: pissa is not supported"),
        ({"new_option": 3}, "new_option: unknown key"),
        ({"use_dora": True}, "missing .*lora_magnitude_vector"),
        ({"base_model_name_or_path": None}, "names no base model"),
    ],
)
def test_what_does_not_run_here_is_refused(root, tmp_path, changes, reason):
    theirs_written(tiny.folder(root, "llama"), "llama", tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=reason):
        load(tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"lora_bias": True},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"trainable_token_indices": [7, 9]},
    ],
)
def test_lora_that_burnish_does_not_have_goes_through_peft(root, tmp_path, options):
    want = theirs(theirs_written(tiny.folder(root, "llama"), "llama", tmp_path, **options))
    model = load(tmp_path)
    assert [link.name for link in model.chain] == ["peft:lora"]
    torch.testing.assert_close(ours(model), want, **CLOSE)


def test_an_adapter_for_another_architecture_is_refused(root, tmp_path):
    theirs_written(tiny.folder(root, "llama"), "llama", tmp_path)
    path = tmp_path / "adapter_config.json"
    changed = json.loads(path.read_text()) | {"base_model_name_or_path": str(tiny.folder(root, "gpt2"))}
    path.write_text(json.dumps(changed))
    with pytest.raises(UserError, match="a module 'model.layers.*' that its base does not have"):
        load(tmp_path)
