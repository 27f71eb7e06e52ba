"""Loading several LoRA folders beside each other on one model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from burnish.config import UserError, from_mapping
from burnish.model.bundle import Model
from burnish.model.linear import Linear
from burnish.store import adapters
from burnish.store.hub import resolve
from burnish.store.identity import check_base
from burnish.store.sources import read_json
from burnish.store.tensors import Entry
from burnish.tune.lora import Config
from burnish.tune.mixing import Adapters, Mixed


def load_adapters(model: Model, folders: Mapping[str, str | Path]) -> Model:
    """Load LoRA folders, burnish's or PEFT's, under names; `model.adapters.active = name` switches, and rows of one
    batch may name different ones (`adapter_ids`, or `generate`'s adapters). Changes and returns `model`.

    Raises UserError, before anything is changed, for a name that is taken, for what is no LoRA adapter of this base,
    and for one that changes the base, which all of them share.
    """
    taken = model.adapters.names if model.adapters is not None else []
    found = {name: _read(model, f"adapter '{name}'", folder, name in taken) for name, folder in folders.items()}
    model.adapters = model.adapters or Adapters()
    for name, (config, tensors) in found.items():
        for path, layer in model.adapters.add(model, name, config).items():
            for leaf, parameter in layer.named_parameters(recurse=False):
                with torch.no_grad():
                    parameter.copy_(tensors[f"{path}.{leaf}"].read())
    return model


def _read(model: Model, where: str, source: str | Path, taken: bool) -> tuple[Config, dict[str, Entry]]:
    folder = resolve(source)
    if taken:
        raise UserError(f"{where}: the name is taken; choose another")
    if not (folder / "adapter_config.json").exists():
        raise UserError(f"{where}: {folder} has no adapter_config.json; only LoRA folders stand beside each other")
    saved = read_json(folder / "burnish.json") if (folder / "burnish.json").exists() else {}
    adapter = adapters.read(folder, saved.get("chain", []))
    if adapter.technique != "lora":
        raise UserError(f"{where}: {folder} is not LoRA as burnish has it; load it alone")
    check_base(saved, model.spec, model.identity, where, "load it onto its own")
    mapping, tensors = adapters.lora_of(model.net, adapter)
    config: Any = from_mapping(Config, mapping, where)
    if config.modules_to_save or config.bias != "none":
        raise UserError(f"{where}: its biases or saved modules are the base's, which all adapters share; load it alone")
    problems = []
    for path in config.target_modules:
        base: Any = model.net.get_submodule(path)
        base = base.base if isinstance(base, Mixed) else base
        if "expert" in path:
            raise UserError(f"{where}: '{path}' sees tokens of its own choice, not rows; load it alone")
        if not isinstance(base, Linear):
            raise UserError(f"{where}: a technique is around '{path}' already; load adapters onto the bare base")
        r = config.of(path).r
        wanted: dict[str, tuple[int, ...]] = {"lora_A": (r, base.in_features), "lora_B": (base.out_features, r)}
        wanted |= {"lora_magnitude_vector": (base.out_features,)} if config.use_dora else {}
        have = {leaf: tensors[name].shape if (name := f"{path}.{leaf}") in tensors else () for leaf in wanted}
        problems += [
            f"{path}.{leaf} has shape {list(have[leaf])} where {list(x)} is needed"
            for leaf, x in wanted.items()
            if have[leaf] != x
        ]
    if problems:
        raise UserError(f"{where}: made for another base: {'; '.join(problems)}")
    return config, tensors
