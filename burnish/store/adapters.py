"""Adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

LoRA, IA3 and methods of virtual tokens are burnish's own techniques where they have all that the adapter asks for;
anything else goes through peft itself.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from burnish import chain as chains
from burnish.config import UserError
from burnish.model.bundle import Model
from burnish.model.network import Layout
from burnish.store import virtual_tokens
from burnish.store.tensors import Entry, read_folder, write_json, write_tensors
from burnish.tune import ia3, peft_method

ROOT = "base_model.model."
OWN = {  # burnish's techniques that PEFT knows, and how it names their tensors
    "lora": re.compile(re.escape(ROOT) + r"(.+)\.(lora_[AB])\.weight"),
    "ia3": re.compile(re.escape(ROOT) + r"(.+)\.(ia3_l)"),
}
LORA_OPTIONS = ("r", "lora_alpha", "lora_dropout", "use_rslora")
# no SEQ_CLS: with it PEFT expects the classifier's weights in the adapter
TASKS = {"lm": "CAUSAL_LM", "classification": None, "none": "FEATURE_EXTRACTION", "masked_lm": None}
# what PEFT can switch on and burnish's LoRA does not do, with the value that means "off"
UNSUPPORTED: dict[str, Any] = {
    "bias": "none",
    "use_dora": False,
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "layers_to_transform": None,
    "layer_replication": None,
    "trainable_token_indices": None,
    "target_parameters": None,
    "lora_bias": False,
    "alora_invocation_tokens": None,
    "use_qalora": False,
}


def takes(model: Model) -> bool:
    """Whether the chain is one that PEFT's format holds."""
    name = model.chain[0].name if len(model.chain) == 1 else ""
    parts = any(layer.skipped for layer in ia3.layers(model).values())  # of fused projections, which PEFT cannot say
    return (name in OWN and not parts) or name.startswith(peft_method.PREFIX) or virtual_tokens.takes(model)


def write(model: Model, tensors: dict[str, Tensor], folder: Path) -> None:
    """Write a chain that `takes` accepts; `tensors` are its parameters by burnish's names."""
    name = model.chain[0].name
    task = "SEQ_2_SEQ_LM" if model.spec.paired else TASKS[model.spec.head]
    if name in OWN:
        renamed, record = own(model, tensors)
    elif name in virtual_tokens.METHODS:
        renamed, record = virtual_tokens.written(model, tensors)
        task = task or "FEATURE_EXTRACTION"  # of another class peft leaves virtual tokens away
    else:
        found = peft_method.tensors(model, name)
        renamed = {key: tensor.clone() for key, tensor in found.items()}
        record = peft_method.record(model, name)
    write_tensors(renamed, folder / "adapter_model.safetensors")
    known = {"task_type": task, "base_model_name_or_path": model.path, "inference_mode": True}
    write_json({**record, **known}, folder / "adapter_config.json")


def own(model: Model, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors by PEFT's names, options) of burnish's own LoRA or IA3."""
    layout = model.net.layout
    name, config = model.chain[0].name, model.chain[0].config

    def foreign(path: str) -> str:
        name = layout.modules[path]
        return name.removeprefix(layout.prefix) if model.spec.head == "none" else name

    renamed = {}
    for key, tensor in tensors.items():
        path, _, leaf = key.rpartition(".")
        renamed[f"{ROOT}{foreign(path)}.{leaf}{'.weight' if name == 'lora' else ''}"] = tensor
    targets = [foreign(path) for path in config.target_modules]
    record = {"peft_type": name.upper(), "fan_in_fan_out": bool(layout.transposed), "target_modules": targets}
    if name == "ia3":
        inner = [foreign(path) for path in config.feedforward_modules]
        return renamed, {**record, "target_modules": targets + inner, "feedforward_modules": inner}
    options = {key: getattr(config, key) for key in LORA_OPTIONS}
    return renamed, {**record, **options, "bias": "none"}


def read(folder: Path, saved: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, Entry], str]:
    """(chain, tensors by PEFT's names, base) of an adapter; `saved` is the chain that burnish wrote beside it.

    Raises UserError for a method or an option that does not run here.
    """
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{folder}/adapter_config.json: not valid JSON ({error})") from None
    tensors, base = read_folder(folder, "adapter_model"), config.get("base_model_name_or_path") or ""
    asked = [key for key, off in UNSUPPORTED.items() if config.get(key, off) not in (off, None, [], {})]
    if virtual_tokens.holds(config):
        found = virtual_tokens.read(config, tensors, str(folder / "adapter_config.json"))
        return saved or found, tensors, base
    if saved and (saved[0]["name"] == "ia3" or saved[0]["name"].startswith(peft_method.PREFIX)):
        return saved, tensors, base
    name = str(config.get("peft_type")).lower()
    if name not in OWN or asked or not all(map(OWN[name].fullmatch, tensors)):
        return [peft_method.link(config, str(folder / "adapter_config.json"))], tensors, base
    options = (
        {key: config[key] for key in LORA_OPTIONS if key in config} if name == "lora" else {"peft_compatible": True}
    )
    return [{"name": name, "config": options}], tensors, base


def rebuild(model: Model, chain: list[dict[str, Any]], tensors: dict[str, Entry]) -> dict[str, Entry]:
    """Rebuild the chain that `read` gave on the model; returns the tensors by burnish's names.

    Raises UserError where the adapter's modules are not the base's.
    """
    if chain[0]["name"] in OWN:
        tensors = rename(model.net.layout, tensors, OWN[chain[0]["name"]])
        targets = sorted({name.rpartition(".")[0] for name in tensors})
        if chain[0]["name"] == "ia3":  # scales of inputs are (1, in), of outputs (out, 1)
            inner = [path for path in targets if tensors[f"{path}.ia3_l"].shape[0] == 1]
            chain[0]["config"]["feedforward_modules"] = inner
            targets = [path for path in targets if path not in inner]
        chain[0]["config"]["target_modules"] = targets
        chains.rebuild(model, chain)
        return tensors
    if chain[0]["name"] in virtual_tokens.METHODS:
        return virtual_tokens.rebuild(model, chain, tensors)
    chains.rebuild(model, chain)
    own = {id(tensor): name for name, tensor in model.net.stored_tensors().items()}
    copies = ".base_layer.weight"  # of the base, which PEFT writes beside an adapted embedding
    found = {key: entry for key, entry in tensors.items() if not key.endswith(copies)}
    for key, tensor in peft_method.tensors(model, chain[0]["name"]).items():
        entry = found.pop(key, None)
        if entry is None:
            continue
        if id(tensor) in own:
            found[own[id(tensor)]] = entry
            continue
        with torch.device("cpu"):
            same = torch.equal(entry.read(), tensor)
        if not same:  # what the method draws again from its config
            raise UserError(f"{entry.path}: tensor {key} is not what its config gives; it does not load here")
    return found


def rename(layout: Layout, tensors: dict[str, Entry], names: re.Pattern[str]) -> dict[str, Entry]:
    """Tensors that PEFT called as in `names`, by burnish's names."""
    native = {foreign: path for path, foreign in layout.modules.items()}
    native |= {foreign.removeprefix(layout.prefix): path for foreign, path in native.items()}
    renamed = {}
    for name, entry in tensors.items():
        foreign, leaf = names.fullmatch(name).groups()  # type: ignore[union-attr]
        if foreign not in native:
            raise UserError(f"the adapter has a module '{foreign}' that its base does not have")
        renamed[f"{native[foreign]}.{leaf}"] = entry
    return renamed
