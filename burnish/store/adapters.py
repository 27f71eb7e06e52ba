"""LoRA adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from burnish.config import UserError
from burnish.model.bundle import Model
from burnish.model.network import Layout
from burnish.store.tensors import Entry, read_folder, write_json, write_tensors

ROOT = "base_model.model."
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


def write(model: Model, tensors: dict[str, Tensor], folder: Path) -> None:
    """Write a chain of LoRA alone; `tensors` are its parameters by burnish's names."""
    layout = model.net.layout
    config = model.chain[0].config

    def foreign(path: str) -> str:
        name = layout.modules[path]
        return name.removeprefix(layout.prefix) if model.spec.head == "none" else name

    renamed = {}
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        renamed[f"{ROOT}{foreign(path)}.{leaf}.weight"] = tensor
    write_tensors(renamed, folder / "adapter_model.safetensors")
    record = {
        "peft_type": "LORA",
        "task_type": "SEQ_2_SEQ_LM" if model.spec.paired else TASKS[model.spec.head],
        "base_model_name_or_path": model.path,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "use_rslora": config.use_rslora,
        "bias": "none",
        "fan_in_fan_out": bool(layout.transposed),
        "inference_mode": True,
        "target_modules": [foreign(path) for path in config.target_modules],
    }
    write_json(record, folder / "adapter_config.json")


def read(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Entry], str]:
    """(chain, tensors by PEFT's module paths, base) of a PEFT LoRA adapter.

    The tensor names are `<module>.lora_A` with the base's own module names; `rename` makes them burnish's. Raises
    UserError for another PEFT method or an option that burnish's LoRA does not have.
    """
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{folder}/adapter_config.json: not valid JSON ({error})") from None
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UserError(f"{folder}/adapter_config.json: peft_type {kind} is not supported; supported: LORA")
    for key, off in UNSUPPORTED.items():
        if config.get(key, off) not in (off, None, [], {}):
            raise UserError(f"{folder}/adapter_config.json: {key}: {config[key]} is not supported")
    entries = read_folder(folder, "adapter_model")
    tensors = {}
    for name, entry in entries.items():
        match = re.fullmatch(re.escape(ROOT) + r"(.+)\.(lora_[AB])\.weight", name)
        if match is None:
            raise UserError(f"{folder}: tensor {name} is not part of a LoRA adapter")
        tensors[f"{match[1]}.{match[2]}"] = entry
    options = {key: config[key] for key in ("r", "lora_alpha", "lora_dropout", "use_rslora") if key in config}
    modules = list({name.rpartition(".")[0] for name in tensors})
    chain = [{"name": "lora", "config": {**options, "target_modules": modules}}]
    return chain, tensors, config.get("base_model_name_or_path") or ""


def rename(layout: Layout, chain: list[dict[str, Any]], tensors: dict[str, Entry]) -> dict[str, Entry]:
    """Put burnish's module paths into a chain (in place) and tensors that `read` gave."""
    native = {foreign: path for path, foreign in layout.modules.items()}
    native |= {foreign.removeprefix(layout.prefix): path for foreign, path in native.items()}

    def path(foreign: str) -> str:
        if foreign not in native:
            raise UserError(f"the adapter has a module '{foreign}' that its base does not have")
        return native[foreign]

    chain[0]["config"]["target_modules"] = sorted(path(name) for name in chain[0]["config"]["target_modules"])
    return {f"{path(name.rpartition('.')[0])}.{name.rpartition('.')[2]}": entry for name, entry in tensors.items()}
