"""The prediction from headers against the loaded model."""

from __future__ import annotations

import json
import shutil

import pytest
import tiny
import torch

from burnish import chain
from burnish.bench.twin import write_twin
from burnish.cli import main
from burnish.model.cache import KVCache
from burnish.plan import FORMATS, plan, sizes
from burnish.store import gguf_model
from burnish.store.checkpoint import load, save
from burnish.store.hub import resolve
from burnish.store.identity import stored_bytes
from burnish.store.sources import read_json


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_parameters_weights_and_cache_are_those_of_the_loaded_model(root, family):
    folder = tiny.folder(root, family)
    found, model = plan(folder, ["lora"], rows=3, tokens=20), chain.apply(load(folder), "lora")
    trainable = sum(p.numel() for p in model.trainable().values())
    assert (found.parameters, found.trainable) == (model.parameter_count(), trainable)
    assert found.weights == sum(p.numel() * p.element_size() for p in model.net.parameters())
    cache = KVCache(model.spec, 3, 20, torch.float32)
    assert found.cache == (
        sum(x.nbytes for x in (*cache.keys.values(), *cache.values.values())) if model.spec.causal else 0
    )


SAVED = [
    ["nf4"],
    [{"int_groups": {"group_size": 32}}],
    ["lora"],
    ["nf4", "lora"],
    ["prompt_tuning"],
    [{"magnitude": {"sparsity": 0.5}}],
]


@pytest.mark.parametrize("techniques", SAVED, ids=str)
def test_what_burnish_saved_is_planned_as_it_is(tmp_path, techniques, capsys):
    """Quantised, pruned or an adapter: its weights as they will be in memory; its formats only where it is dense."""
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    base = tiny.folder(tmp_path, "llama", **shape)
    save(chain.apply(load(base), techniques), tmp_path / "saved")
    model = load(tmp_path / "saved")
    found = plan(tmp_path / "saved")
    assert found.weights == sum(p.numel() * p.element_size() for p in model.net.parameters())
    assert found.trainable == sum(p.numel() for p in model.trainable().values())
    if techniques == ["nf4"]:
        assert main(["plan", str(tmp_path / "saved"), "--formats"]) == 2
        assert "is stored in fewer bits; give the model that it was made of" in capsys.readouterr().err


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_twin_of_any_family_has_its_shape(root, tmp_path, family):
    folder = tiny.folder(root, family)
    twin = load(write_twin(tmp_path, str(folder), read_json(folder / "config.json")))
    model = load(folder)
    assert twin.spec == model.spec
    shapes = [{name: p.shape for name, p in m.net.named_parameters()} for m in (twin, model)]
    assert shapes[0] == shapes[1]


def test_a_paged_optimiser_is_capped(root):
    folder = tiny.folder(root, "llama")
    plain, paged = plan(folder, ["full"]), plan(folder, ["full"], optimizer_limit=8192)
    assert (plain.optimizer, paged.optimizer) == (8 * plain.trainable, 8192)
    assert plain.training - paged.training == plain.optimizer - 8192
    assert plan(folder, ["full"], optimizer_limit=1 << 40) == plain


def test_formats_are_those_of_the_files(tmp_path):
    """Every format's file, and its weights in memory when it is read back."""
    shape = {"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 512}
    folder = tiny.write(tmp_path / "base", tiny.reference("llama", **shape))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(resolve("pebble") / name, folder / name)
    found = {size.format: size for size in sizes(folder, 2, 24)}
    made = {}
    for name, techniques in FORMATS.items():
        out = tmp_path / (name or "float32")
        save(chain.apply(load(folder), techniques), out)
        made[name or "float32"] = out
    for kind in gguf_model.TYPES:
        made[f"GGUF {kind}"] = tmp_path / f"{kind}.gguf"
        gguf_model.write(load(folder), made[f"GGUF {kind}"], kind)
    assert found.keys() == made.keys()
    for name, path in made.items():
        model = load(path)
        cache = KVCache(model.spec, 2, 24, torch.float32)
        weights = sum(p.numel() * p.element_size() for p in model.net.parameters())
        assert found[name].bytes == pytest.approx(stored_bytes(path), rel=0.002)
        held = sum(x.nbytes for x in (*cache.keys.values(), *cache.values.values()))
        assert found[name].memory == pytest.approx(weights + held, rel=0.002)
        bits = 8 * stored_bytes(path) / load(folder).parameter_count()
        assert found[name].bits_per_weight == pytest.approx(bits, rel=0.002)


def test_seventy_thousand_million_parameters_by_a_config_alone(tmp_path, capsys):
    shape = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    shape |= {"num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "torch_dtype": "float16", **shape}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["plan", str(tmp_path), "--formats", "--json"]) == 0
    found = {size["format"]: size for size in json.loads(capsys.readouterr().out)["formats"]}
    assert round(found["bfloat16"]["bytes"] / 1e9) == round(found["GGUF f16"]["bytes"] / 1e9) == 138
    four = ("int_groups or gptq, 4 bits", "nf4", "nf4, double quantised", "GGUF q4_0", "GGUF q4_k")
    assert all(36e9 < found[name]["bytes"] < 40e9 and 4.2 < found[name]["bits_per_weight"] < 4.6 for name in four)
    cache = found["GGUF q6_k"]["memory"] - found["GGUF q6_k"]["bytes"]
    assert cache == pytest.approx(2 * 80 * 1024 * 4096 * 2, rel=0.01)
    assert main(["plan", str(tmp_path)]) == 0 and "68,976,648,192" in capsys.readouterr().out


def test_formats_of_what_gguf_cannot_hold(root, capsys):
    assert main(["plan", str(tiny.folder(root, "bert")), "--formats"]) == 0
    shown = capsys.readouterr().out
    assert "int_groups or gptq, 3 bits" in shown and "GGUF" not in shown
    assert main(["plan", "pebble", "--formats", "--techniques", "[nf4]"]) == 2
    assert "formats are of the plain model" in capsys.readouterr().err
