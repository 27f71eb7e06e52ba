"""Adapters in chains with quantisations, losses and class heads: saved alone in PEFT's format, and back unchanged."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import tiny
import tiny_foreign
import torch
import transformers

import burnish
from burnish import chain
from burnish.chain import Context, Model, forward
from burnish.engine.order import collated, encode
from burnish.model.example import Example
from burnish.store import adapters
from burnish.store.checkpoint import load, save

IDS = torch.randint(6, 80, (3, 9), generator=torch.Generator().manual_seed(2))
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
LORA = {"lora": {"r": 4, "target_modules": "all-linear"}}
PROMPT = {"prompt_tuning": {"num_virtual_tokens": 2}}
MIXED = {"int_groups": {"bits": 3, "group_size": 32, "sym": False, "bits_pattern": {r".*0\..*": 4}}}
REPEATED = [
    ("llama", ["nf4", LORA]),
    ("llama", ["int8", "ia3"]),
    ("llama", ["nf4", {"lora": {"use_dora": True, "bias": "all"}}, "choice_loss"]),
    ("gpt2", ["fp8", PROMPT]),
    ("bloom", ["fp4", {"p_tuning_v2": {"num_virtual_tokens": 2}}]),
    ("t5", [MIXED, LORA]),
    ("llama", [{"nf4": {"target_modules": ["q_proj"]}}, {"int8": {"target_modules": ["up_proj"]}}, LORA]),
    ("bert", ["nf4", {"transfer": {"num_labels": 3}}, LORA]),
    ("gpt2", [{"transfer": {"num_labels": 3}}, "int8", {"ia3": {"peft_compatible": True}}]),
]


def made(folder: Path, techniques, dtype: torch.dtype | None = None) -> Model:
    """A model whose adapter moved away from its start."""
    model = chain.apply(load(folder, dtype, techniques=techniques), techniques, Context(seed=1))
    draw = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for parameter in model.trainable().values():
            parameter += 0.2 * torch.randn(parameter.shape, generator=draw).to(parameter.dtype)
    return chain.finalize(model)


@torch.no_grad()
def ours(model: Model) -> torch.Tensor:
    rows = [Example(row, [-100] * 4 + row[4:]) for row in IDS.tolist()]
    batch = collated(model, list(encode(model, rows)))
    hidden = forward(model, batch)
    if model.spec.head == "classification":
        hidden = model.net.pool(hidden, batch["attention_mask"])
    return model.net.logits(hidden)


@torch.no_grad()
def theirs(model) -> torch.Tensor:
    return torch.cat([model(input_ids=row[None]).logits for row in IDS])


def reference(folder: Path, labels: int = 0):
    if labels:
        kind = transformers.AutoModelForSequenceClassification
        return kind.from_pretrained(folder, num_labels=labels, ignore_mismatched_sizes=True).eval()
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, architecture).from_pretrained(folder).eval()


@pytest.mark.parametrize(("family", "techniques"), REPEATED)
def test_an_adapter_on_a_rounded_base_is_saved_alone(root, tmp_path, family, techniques):
    model = made(tiny.folder(root, family), techniques)
    save(model, tmp_path)
    assert not list(tmp_path.glob("burnish.safetensors")) and not list(tmp_path.glob("model.safetensors"))
    again = load(tmp_path)
    assert chain.describe(again) == chain.describe(model)
    assert set(again.trainable()) == set(model.trainable())
    for name, parameter in model.net.named_parameters():
        assert torch.equal(parameter, again.net.get_parameter(name)), name
    assert torch.equal(ours(again), ours(model))
    save(again, tmp_path / "again")
    first, second = (folder / "adapter_model.safetensors" for folder in (tmp_path, tmp_path / "again"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("technique", [LORA, "ia3"])
def test_peft_loads_an_adapter_of_a_rounded_base_on_its_own(root, tmp_path, technique):
    folder = tiny.folder(root, "llama")
    save(made(folder, ["nf4", technique]), tmp_path)
    found = peft.PeftModel.from_pretrained(reference(folder), tmp_path).eval()
    (tmp_path / "burnish.json").unlink()  # burnish then knows of no rounding either
    torch.testing.assert_close(theirs(found), ours(load(tmp_path)), **CLOSE)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_base_is_rounded_from_what_it_was(root, tmp_path, dtype):
    """Whatever dtype it is loaded in later."""
    model = made(tiny.folder(root, "llama"), ["nf4", LORA], dtype)
    save(model, tmp_path)
    for later in (None, torch.bfloat16, torch.float32):
        again = load(tmp_path, later)
        for name, parameter in model.net.named_parameters():
            found = again.net.get_parameter(name)
            rounded = "lora" in name or name.rpartition(".")[2] in ("packed", "absmax", "absmax2", "offset")
            assert found.dtype == (parameter.dtype if rounded or later is None else later), name
            if rounded or later is None:
                assert torch.equal(found, parameter), name


@pytest.mark.parametrize("name", ["awq", "gptq", "smoothquant", "magnitude"])
def test_what_does_not_follow_from_the_base_is_written(root, tmp_path, name):
    model = made(tiny.folder(root, "llama"), [name, LORA])
    save(model, tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()
    assert torch.equal(ours(load(tmp_path)), ours(model))


def test_a_base_that_is_stored_rounded_is_written_with_the_adapter(root, tmp_path):
    save(chain.apply(load(tiny.folder(root, "llama")), "nf4"), tmp_path / "base")
    model = made(tmp_path / "base", [LORA])
    save(model, tmp_path / "both")
    assert not (tmp_path / "both" / "adapter_config.json").exists()
    assert torch.equal(ours(load(tmp_path / "both")), ours(model))


def test_a_folder_with_its_rounded_base_still_loads(root, tmp_path, monkeypatch):
    model = made(tiny.folder(root, "llama"), ["nf4", LORA])
    monkeypatch.setattr(adapters, "takes", lambda model: False)
    save(model, tmp_path)
    assert (tmp_path / "burnish.safetensors").exists()
    assert torch.equal(ours(load(tmp_path)), ours(model))


def test_another_base_is_refused(root, tmp_path):
    save(made(tiny.folder(root, "llama"), ["nf4", LORA]), tmp_path)
    record = json.loads((tmp_path / "burnish.json").read_text())
    (tmp_path / "burnish.json").write_text(json.dumps(record | {"identity": "0" * 64}))
    with pytest.raises(burnish.config.UserError, match="made for another base: the same shape, other weights"):
        load(tmp_path)


def test_such_an_adapter_merges_and_stands_beside_others(root, tmp_path):
    folder = tiny.folder(root, "llama")
    model = made(folder, ["nf4", LORA])
    save(model, tmp_path)
    want, here = ours(model), load(tmp_path)
    base = chain.apply(load(folder), "nf4")
    burnish.load_adapters(base, {"mine": tmp_path})
    base.adapters.active = "mine"
    torch.testing.assert_close(ours(base), want, **CLOSE)
    assert chain.merge(here) == chain.merge(model)
    assert torch.equal(ours(here), ours(model))


@pytest.mark.parametrize("technique", [LORA, "ia3", PROMPT])
def test_a_loss_changes_nothing_of_what_is_written(root, tmp_path, technique):
    folder = tiny.folder(root, "llama")
    for name, techniques in {"with": [technique, "choice_loss"], "without": [technique]}.items():
        save(made(folder, techniques), tmp_path / name)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "with" / file).read_bytes() == (tmp_path / "without" / file).read_bytes()
    assert [link.name for link in load(tmp_path / "with").chain][1:] == ["choice_loss"]


FAMILIES = ("bert", "llama", "gpt2", "bloom", "qwen3", "opt", "gpt_neox")
HEADED = {"num_labels": 3, "label_names": ["a", "b", "c"]}


@pytest.mark.parametrize("technique", [LORA, {"ia3": {"peft_compatible": True}}])
@pytest.mark.parametrize("family", [*FAMILIES, "roberta"])
def test_a_class_head_goes_to_peft(root, tmp_path, family, technique):
    folder = (tiny_foreign if family == "roberta" else tiny).folder(root, family)
    model = made(folder, [{"transfer": HEADED}, technique])
    save(model, tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    found = peft.PeftModel.from_pretrained(reference(folder, 3), tmp_path).eval()
    torch.testing.assert_close(theirs(found), ours(model), **CLOSE)
    again = load(tmp_path)
    assert chain.describe(again) == chain.describe(model) and again.hf_config["id2label"]["2"] == "c"
    assert torch.equal(ours(again), ours(model)) and set(again.trainable()) == set(model.trainable())


@pytest.mark.parametrize("kind", ["lora", "ia3"])
@pytest.mark.parametrize(("family", "head"), [*((name, "") for name in FAMILIES), ("bert", "classification")])
def test_a_class_head_comes_from_peft(root, tmp_path, family, head, kind):
    folder = tiny.folder(root, family, head)
    torch.manual_seed(4)
    base = reference(folder, 3)
    if family == "bert":  # a pooler that the base's file does not hold would be peft's own draw
        head_folder = tmp_path / "base"
        base.bert.save_pretrained(head_folder)
        load(folder).tokenizer.save_pretrained(head_folder)
        folder = folder if head else head_folder
        base = reference(folder, 3)
    options = {"task_type": "SEQ_CLS"} | ({"init_lora_weights": False, "r": 4} if kind == "lora" else {})
    config = (peft.LoraConfig if kind == "lora" else peft.IA3Config)(**options)
    model = peft.get_peft_model(base, config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "adapter")
    here = load(tmp_path / "adapter")
    assert [link.name for link in here.chain] == ["transfer", kind]
    torch.testing.assert_close(ours(here), theirs(model), **CLOSE)
    assert torch.equal(ours(load(save(here, tmp_path / "again"))), ours(here))
    back = peft.PeftModel.from_pretrained(reference(folder, 3), tmp_path / "again").eval()
    torch.testing.assert_close(theirs(back), ours(here), **CLOSE)


def test_an_encoder_decoder_s_class_head_is_written_whole(root, tmp_path):
    """transformers has no classifier on the mean of T5's encoder."""
    model = made(tiny.folder(root, "t5"), [{"transfer": HEADED}, LORA])
    save(model, tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()
    assert torch.equal(ours(load(tmp_path)), ours(model))
