"""Soft prompts against peft: the same outputs on the same vectors, and folders that go both ways."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import tiny
import torch
import transformers

from burnish import chain
from burnish.chain import Context, Model, forward
from burnish.config import UserError
from burnish.engine.order import collated, encode
from burnish.model.example import IGNORE, Example
from burnish.store.checkpoint import load, save

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
COUNT = 3
TEXTS = ([6, 7, 8, 9, 10], [20, 21, 22])
DECODERS = ("llama", "gpt2", "bloom", "qwen3", "opt")
NAMES = ("prompt_tuning", "p_tuning", "prefix_tuning", "p_tuning_v2")
CASES = [(family, name) for family in DECODERS for name in NAMES]
CASES += [("gemma2", "prompt_tuning"), ("bert", "p_tuning"), ("bert", "p_tuning_v2")]
CASES += [("t5", "prompt_tuning"), ("t5", "p_tuning")]
KINDS = {"prompt_tuning": peft.PromptTuningConfig, "p_tuning": peft.PromptEncoderConfig}
OPTIONS = {
    "p_tuning": {"template": f"[P*{COUNT}] {{prompt}}"},
    "prefix_tuning": {"num_virtual_tokens": COUNT, "encoder_hidden_size": 16},
    **{name: {"num_virtual_tokens": COUNT} for name in ("prompt_tuning", "p_tuning_v2")},
}
TASKS = {"bert": "FEATURE_EXTRACTION", "t5": "SEQ_2_SEQ_LM"}


def reference(folder: Path):
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, architecture).from_pretrained(folder).eval()


@torch.no_grad()
def ours(model: Model) -> torch.Tensor:
    """Logits of the texts' tokens (of the last two for an encoder-decoder, which writes them)."""
    paired = model.spec.paired
    rows = [Example(ids, [IGNORE] * (len(ids) - 2) + ids[-2:] if paired else [IGNORE] * len(ids)) for ids in TEXTS]
    batch = collated(model, list(encode(model, rows)))
    hidden = forward(model, batch)
    if model.spec.head == "classification":
        return model.net.logits(model.net.pool(hidden, batch["attention_mask"]))
    shown = batch["attention_mask"] & (True if paired or "slots" not in batch else batch["slots"] < 0)
    return model.net.logits(hidden[shown])


@torch.no_grad()
def theirs(model) -> torch.Tensor:
    """The same of a peft model, row by row."""
    found = []
    for ids in TEXTS:
        row = torch.tensor([ids])
        if model.peft_config["default"].task_type == "SEQ_2_SEQ_LM":
            target = torch.tensor([[0, *ids[-2:]]])
            out = model(input_ids=row[:, :-2], attention_mask=torch.ones_like(row[:, :-2]), decoder_input_ids=target)
        else:
            out = model(input_ids=row, attention_mask=torch.ones_like(row))
        found.append(out.logits[0, -len(ids) :] if out.logits.dim() == 3 else out.logits)
    return torch.cat(found)


def trained(folder: Path, name: str, *before) -> Model:
    """A finished soft prompt of burnish that moved away from its start."""
    model = chain.apply(load(folder), [*before, {name: OPTIONS[name]}], Context(seed=1))
    with torch.no_grad():
        for parameter in model.trainable().values():
            parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(8))
    return chain.finalize(model)


@pytest.mark.parametrize(("family", "name"), CASES)
def test_what_burnish_wrote_loads_in_peft(root, tmp_path, family, name):
    folder = tiny.folder(root, family)
    model = trained(folder, name)
    want = ours(model)
    save(model, tmp_path)
    assert not (tmp_path / "burnish.safetensors").exists()
    loaded = peft.PeftModel.from_pretrained(reference(folder), tmp_path).eval()
    torch.testing.assert_close(theirs(loaded), want, **CLOSE)
    again = load(tmp_path)
    assert chain.describe(again) == chain.describe(model)
    torch.testing.assert_close(ours(again), want, atol=0, rtol=0)
    assert not torch.allclose(want, ours(load(folder)), atol=1e-2)


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize(("family", "name"), [case for case in CASES if case != ("bert", "p_tuning")])
def test_what_peft_wrote_loads_here(root, tmp_path, family, name, projection):
    """Its encoders, an MLP or an LSTM, and its projection are what its file leaves away."""
    folder, task = tiny.folder(root, family), TASKS.get(family, "CAUSAL_LM")
    options = {"num_virtual_tokens": COUNT, "task_type": task}
    if name == "p_tuning":
        options["encoder_reparameterization_type"] = "LSTM" if projection else "MLP"
    elif name != "prompt_tuning":
        options["prefix_projection"] = projection
    torch.manual_seed(4)
    model = peft.get_peft_model(reference(folder), KINDS.get(name, peft.PrefixTuningConfig)(**options)).eval()
    with torch.no_grad():
        for parameter in model.prompt_encoder.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path)
    here = load(tmp_path)
    (link,) = here.chain
    assert link.name == (name if name != "p_tuning_v2" or family == "bert" else "prefix_tuning")
    torch.testing.assert_close(ours(here), theirs(model), **CLOSE)


def test_bert_prompts_of_peft_stand_before_the_first_token(root, tmp_path):
    """And its classifier then reads the first of them."""
    folder = tiny.folder(root, "bert", "classification")
    config = peft.PromptTuningConfig(num_virtual_tokens=COUNT, task_type="FEATURE_EXTRACTION")
    model = peft.get_peft_model(reference(folder), config).eval()
    model.save_pretrained(tmp_path)
    here = load(tmp_path)
    assert [link.name for link in here.chain] == ["p_tuning"]
    torch.testing.assert_close(ours(here), theirs(model), **CLOSE)


@pytest.mark.parametrize(
    ("family", "techniques"),
    [
        ("bert", ["prompt_tuning"]),
        ("t5", [{"prefix_tuning": {"prefix_projection": False}}]),
        ("t5", ["p_tuning_v2"]),
        ("falcon", [{"prefix_tuning": {"prefix_projection": False}}]),
        ("llama", ["prefix_tuning"]),  # not finalized
        ("llama", [{"p_tuning": {"template": "[P*2] {prompt}"}}]),
        ("llama", [{"p_tuning": {"template": "{prompt} [P*2]", "encoder": "embedding"}}]),
        ("llama", ["lora", "prompt_tuning"]),
        ("llama", ["transfer", "p_tuning_v2"]),
    ],
)
def test_other_chains_stay_in_burnishs_own_format(root, tmp_path, family, techniques):
    save(chain.apply(load(tiny.folder(root, family)), techniques), tmp_path)
    assert (tmp_path / "burnish.safetensors").exists() and not (tmp_path / "adapter_config.json").exists()


@pytest.mark.parametrize(
    ("family", "options", "changes", "reason"),
    [
        ("bert", {"task_type": "SEQ_CLS"}, {}, "holds 'prompt_embeddings' alone, and this one has .*classifier"),
        ("llama", {}, {"num_virtual_tokens": 9}, "num_virtual_tokens is 9, the tensor has 3 rows"),
        ("t5", {"task_type": "SEQ_2_SEQ_LM"}, {}, "peft deals the prefix of a t5 seq2seq to its layers otherwise"),
        ("gpt2", {}, {"base_model_name_or_path": "llama"}, r"has shape \[3, 128\] where \[3, 64\] is needed"),
    ],
)
def test_what_does_not_fit_is_refused(root, tmp_path, family, options, changes, reason):
    folder = tiny.folder(root, family, "classification" if family == "bert" else "")
    config = peft.PrefixTuningConfig(num_virtual_tokens=COUNT, **{"task_type": "CAUSAL_LM", **options})
    peft.get_peft_model(reference(folder), config).save_pretrained(tmp_path)
    if "base_model_name_or_path" in changes:
        changes = {"base_model_name_or_path": str(tiny.folder(root, changes["base_model_name_or_path"]))}
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=reason):
        load(tmp_path)
