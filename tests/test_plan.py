"""The prediction from headers against the loaded model."""

from __future__ import annotations

import pytest
import tiny
import torch

from burnish import chain
from burnish.bench.twin import write_twin
from burnish.model.cache import KVCache
from burnish.plan import plan
from burnish.store.checkpoint import load, read_json


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
