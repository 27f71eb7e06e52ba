"""Checkpoint folders: what is refused and how, memory while loading, and saves that die half-way."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import burnish
from burnish import chain
from burnish.chain import forward
from burnish.config import UserError
from burnish.engine.settings import TrainConfig
from burnish.engine.train import train
from burnish.model.example import Example
from burnish.store import tensors
from burnish.store.checkpoint import load, save
from burnish.store.tensors import read_header

ROOT = Path(__file__).resolve().parents[2]
IDS = {"input_ids": torch.arange(6, 15)[None]}


@pytest.fixture
def llama(root, tmp_path) -> Path:
    return shutil.copytree(tiny.folder(root, "llama"), tmp_path / "llama")


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.net.logits(forward(model, IDS))


def test_a_dtype_by_its_name(llama):
    assert load(llama, "bf16").net.dtype == load(llama, torch.bfloat16).net.dtype == torch.bfloat16
    with pytest.raises(UserError, match="dtype: 'bf17' is not one of"):
        load(llama, "bf17")


def change_weights(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    found = load_file(path)
    change(found)
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, path, {"format": "pt"})


def change_json(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_one_error_lists_every_mismatch(llama):
    layer = "model.layers.0.self_attn"

    def change(found):
        del found["model.norm.weight"]
        found[f"{layer}.k_proj.weight"] = torch.zeros(16, 31)
        found[f"{layer}.v_proj.weight"] = torch.zeros(16, 32, dtype=torch.int64)
        found[f"{layer}.q_proj.bias"] = torch.zeros(32)
        found["model.layers.7.input_layernorm.weight"] = torch.zeros(32)

    change_weights(llama, change)
    with pytest.raises(UserError) as caught:
        load(llama)
    text = str(caught.value)
    for part in (
        "missing model.norm.weight",
        f"{layer}.k_proj.weight has shape [16, 31] where [16, 32] is needed",
        f"{layer}.v_proj.weight has dtype torch.int64",
        f"unexpected {layer}.q_proj.bias",
        "unexpected model.layers.7.input_layernorm.weight",
    ):
        assert part in text
    assert str(llama) in text and "\n" not in text


def test_shapes_of_transposed_matrices_are_the_files(root, tmp_path):
    folder = shutil.copytree(tiny.folder(root, "gpt2"), tmp_path / "gpt2")
    change_weights(folder, lambda found: found.update({"transformer.h.0.mlp.c_fc.weight": torch.zeros(128, 32)}))
    with pytest.raises(UserError, match=r"has shape \[128, 32\] where \[32, 128\] is needed"):
        load(folder)


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_tensors_of_another_head_and_copies_of_tied_ones_are_left_unread(root, tmp_path, family):
    want = logits(load(tiny.folder(root, family)))
    folder = shutil.copytree(tiny.folder(root, family), tmp_path / family)

    def change(found):
        if family == "gpt2":
            found["lm_head.weight"] = found["transformer.wte.weight"].clone()
            found["transformer.h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
        else:
            found["cls.predictions.decoder.weight"] = found["bert.embeddings.word_embeddings.weight"].clone()
            found["cls.predictions.decoder.bias"] = found["cls.predictions.bias"].clone()
            found["cls.seq_relationship.weight"] = torch.zeros(2, 32)
            found |= {"bert.pooler.dense.weight": torch.zeros(32, 32), "bert.pooler.dense.bias": torch.zeros(32)}

    change_weights(folder, change)
    assert torch.equal(logits(load(folder)), want)
    body = load(folder, head="none")
    assert body.net.lm_head is None


def test_truncated_file(llama):
    path = llama / "model.safetensors"
    whole = path.read_bytes()
    for size in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match="not a complete safetensors file.*download it again"):
            load(llama)


def header_file(path: Path, header: object, body: int = 64) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(body))
    return path


@pytest.mark.parametrize(
    "info",
    [
        {"dtype": "F32", "shape": [4], "data_offsets": [0, 80]},
        {"dtype": "F32", "shape": [4], "data_offsets": [0, 15]},
        {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]},
        {"dtype": "F32", "shape": [2**63, 2**63, 0], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-4], "data_offsets": [16, 0]},
        {"dtype": "F32", "shape": [-2, -2], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]},
        {"dtype": "F32", "shape": [4.0], "data_offsets": [0, 16.0]},
        {"dtype": "F32", "shape": "4", "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4], "data_offsets": [0, 8, 16]},
        {"dtype": "F32", "shape": [4]},
        {"dtype": "E8M0", "shape": [4], "data_offsets": [0, 4]},
        {"dtype": ["F32"], "shape": [4], "data_offsets": [0, 16]},
        [1, 2],
    ],
)
def test_a_lying_header_is_refused(tmp_path, info):
    with pytest.raises(UserError, match="model.safetensors"):
        read_header(header_file(tmp_path / "model.safetensors", {"w": info}))


@pytest.mark.parametrize("header", [b"[]", b"[" * 200_000, b"\xff\xfe", b'{"w": 1', b"12", b""])
def test_a_header_that_is_no_object_is_refused(tmp_path, header):
    with pytest.raises(UserError, match="not a complete safetensors file"):
        read_header(header_file(tmp_path / "model.safetensors", header))


@given(st.binary(max_size=40), st.integers(0, 400))
def test_a_damaged_header_gives_tensors_or_a_user_error(tmp_path_factory, noise, at):
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    save_file({"a": torch.ones(3, 4), "b": torch.ones(5, dtype=torch.int64)}, path)
    raw = path.read_bytes()
    path.write_bytes(raw[:at] + noise + raw[at + len(noise) :])
    try:
        for entry in read_header(path).values():
            assert entry.read().numel() * entry.dtype.itemsize == entry.end - entry.start
    except UserError as error:
        assert str(path) in str(error)


@pytest.mark.parametrize("weight_map", [None, 3, {"a": 5}, {"a": ["x"]}, ["a"]])
def test_a_bad_index_is_refused(llama, weight_map):
    (llama / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match="not a safetensors index|shards named by the index are missing"):
        load(llama)


def test_missing_shards_and_paths_out_of_the_folder_are_named(llama):
    index = {"weight_map": {"a": "../llama/model.safetensors", "b": "model-2.safetensors"}}
    (llama / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"missing: \.\./llama/model.safetensors, model-2.safetensors"):
        load(llama)


def test_a_pickle_is_refused_with_a_command_that_converts_it(root, llama):
    want = logits(load(llama))
    torch.save(load_file(llama / "model.safetensors"), llama / "pytorch_model.bin")
    (llama / "model.safetensors").unlink()
    with pytest.raises(UserError, match="pytorch_model.bin is a pickle") as caught:
        load(llama)
    command = str(caught.value).partition("convert it: ")[2].replace("python", sys.executable, 1)
    subprocess.run(command, shell=True, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert torch.equal(logits(load(llama)), want)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "mambo"}, r"model_type 'mambo' is known neither to burnish nor .* \(did you mean 'mamba'\?\)"),
        ({"architectures": ["LlamaForTokenClassification"]}, "architecture 'LlamaForTokenClassification'"),
        ({"hidden_act": "mish"}, "activation 'mish'"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "rope_scaling type 'longrope'"),
    ],
)
def test_an_architecture_that_is_not_known(llama, changes, reason):
    change_json(llama / "config.json", **changes)
    with pytest.raises(UserError, match=reason):
        logits(load(llama))


def test_a_missing_config_field_is_named(llama):
    config = json.loads((llama / "config.json").read_text())
    del config["num_hidden_layers"]
    (llama / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="a llama config needs 'num_hidden_layers'"):
        load(llama)


def test_folders_that_are_no_checkpoints(llama, tmp_path):
    (tmp_path / "empty").mkdir()
    for source, reason in (
        (tmp_path / "empty", "no config.json"),
        (tmp_path / "nowhere", "no such folder"),
        (llama / "config.json", "a file, where a checkpoint folder is needed"),
        ("a/b/c", "no such folder, and not a hub id"),
        ("runs/missing.gguf", "no such file"),
    ):
        with pytest.raises(UserError, match=reason):
            load(source)
    (llama / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        load(llama)
    (llama / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        load(llama)


@pytest.mark.parametrize("techniques", [["lora"], ["prompt_tuning"], ["prefix_tuning"]])
def test_a_chain_on_another_base_is_refused(llama, tmp_path, techniques):
    model = chain.apply(load(llama), techniques)
    save(model, tmp_path / "tuned")
    assert not (tmp_path / "tuned" / "model.safetensors").exists()
    assert logits(load(tmp_path / "tuned")).isfinite().all()
    change_weights(llama, lambda found: found["model.norm.weight"].add_(1))
    with pytest.raises(UserError, match=f"the same shape, other weights .identity {model.identity[:12]}, not"):
        load(tmp_path / "tuned")


def test_a_folder_that_names_no_base_is_refused(llama, tmp_path):
    save(chain.apply(load(llama), "prompt_tuning"), tmp_path / "prompt")
    change_json(tmp_path / "prompt" / "burnish.json", base=None)
    with pytest.raises(UserError, match="names no base model"):
        load(tmp_path / "prompt")


@pytest.mark.parametrize(
    ("first", "second"),
    [("nf4", None), (None, "nf4"), ("lora", None), ("lora", "full"), ("adapters", "lora")],
)
def test_a_save_that_would_mix_with_another_model_is_refused(llama, tmp_path, first, second):
    models = [chain.apply(load(llama), name) if name else load(llama) for name in (first, second)]
    for _ in range(2):  # the same kind again is fine
        save(models[0], tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(UserError, match="choose another folder"):
        save(models[1], tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize("techniques", [None, "nf4", "lora"])
@pytest.mark.parametrize("moment", ["write", "rename"])
def test_a_save_that_dies_leaves_the_old_model(llama, tmp_path, monkeypatch, techniques, moment):
    model = load(llama)
    if techniques:
        chain.apply(model, techniques)
    save(model, tmp_path / "out")
    want = logits(load(tmp_path / "out"))
    with torch.no_grad():
        for parameter in model.net.parameters():
            if parameter.is_floating_point():
                parameter.add_(1)

    def die(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        if moment == "rename":
            patched.setattr(tensors.os, "replace", die)
        else:  # half of the file is written
            patched.setattr(torch.Tensor, "contiguous", die)
        with pytest.raises(KeyboardInterrupt):
            save(model, tmp_path / "out")
    assert torch.equal(logits(load(tmp_path / "out")), want)
    save(model, tmp_path / "out")
    assert not torch.equal(logits(load(tmp_path / "out")), want)


def test_dtype_converts_floating_tensors(llama):
    model = load(llama, dtype=torch.bfloat16)
    assert {p.dtype for p in model.net.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in load(llama).net.parameters()} == {torch.float32}


@pytest.mark.parametrize("technique", ["lora", "prompt_tuning", "nf4"])
def test_dtype_leaves_a_techniques_own_tensors(llama, tmp_path, technique):
    model = chain.apply(load(llama), technique)
    save(model, tmp_path / "saved")
    theirs = {name for name, _ in load(llama).net.named_parameters()}
    for name, parameter in load(tmp_path / "saved", dtype=torch.bfloat16).net.named_parameters():
        before = model.net.get_parameter(name).dtype
        assert parameter.dtype == (torch.bfloat16 if name.replace(".base.", ".") in theirs else before), name


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize(
    "techniques", [["nf4", "lora"], [{"int8": {"target_modules": ["0.mlp.up_proj"]}}], ["transfer", "nf4"]]
)
def test_weights_that_are_read_when_it_is_their_turn_are_the_same(root, family, techniques):
    folder = tiny.folder(root, family)
    late = load(folder, techniques=techniques)
    assert any(p.is_meta for p in late.net.parameters())
    late, early = chain.apply(late, techniques), chain.apply(load(folder), techniques)
    for (name, parameter), (other, expected) in zip(
        late.net.named_parameters(), early.net.named_parameters(), strict=True
    ):
        assert name == other and torch.equal(parameter, expected), name


def test_a_fine_tuned_folder_is_a_base_of_its_own(llama, tmp_path):
    """Merged weights have another identity than the base they came from, and adapters follow it."""
    model = chain.apply(load(llama), "lora")
    with torch.no_grad():
        for parameter in model.trainable().values():
            parameter.add_(0.1)
    chain.merge(model)
    merged = burnish.load(save(model, tmp_path / "merged"))
    assert merged.identity != load(llama).identity
    again = burnish.load(save(chain.apply(merged, "lora"), tmp_path / "adapter"))
    assert again.identity == merged.identity and not (tmp_path / "adapter" / "model.safetensors").exists()


@pytest.mark.parametrize("techniques", [["full"], ["transfer"], ["full", "choice_loss"]])
def test_a_folder_that_full_wrote_is_a_base_on_which_nothing_else_trains(llama, tmp_path, techniques):
    wanted = {name for name in chain.apply(load(llama), "lora").trainable()}
    tuned = chain.apply(load(llama), techniques)
    with torch.no_grad():
        for parameter in tuned.trainable().values():
            parameter.add_(0.1)
    folder = save(tuned, tmp_path / "tuned")
    assert set(load(folder).trainable()) == set(tuned.trainable())  # as it was saved, until techniques are applied
    model = chain.apply(load(folder), "lora")
    assert set(model.trainable()) == wanted and [link.name for link in model.chain] == ["lora"]
    for parameter in model.trainable().values():
        torch.nn.init.normal_(parameter)
    save(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    again, ids = burnish.load(tmp_path / "adapter"), torch.arange(6, 14)[None]
    with torch.no_grad():
        torch.testing.assert_close(again.net.logits(again.net(ids)), model.net.logits(model.net(ids)), atol=0, rtol=0)
    assert set(chain.apply(load(folder), techniques).trainable()) == set(tuned.trainable())


def test_weights_that_were_trained_after_loading_are_saved_with_the_next_chain(llama, tmp_path):
    model = load(save(chain.apply(load(llama), "full"), tmp_path / "tuned"))
    train(model, [Example([6, 7, 8], [-100, 7, 8])], TrainConfig(max_steps=1, learning_rate=0.1))
    want = model.net.layers[0].mlp.up_proj.weight.dense.detach().clone()
    again = load(save(chain.apply(model, "lora"), tmp_path / "on"))
    assert torch.equal(again.net.layers[0].mlp.up_proj.weight.dense, want)
