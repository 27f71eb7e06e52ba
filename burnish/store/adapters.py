"""Adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

LoRA, IA3 and methods of virtual tokens are burnish's own techniques where they have all that the adapter asks for;
anything else goes through peft itself. Which modules an adapter changes, and LoRA's ranks, are read from its tensors.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from burnish import chain as chains
from burnish.config import UserError
from burnish.model.bundle import Model
from burnish.model.network import Layout, Network
from burnish.model.surgery import by_path
from burnish.store import virtual_tokens
from burnish.store.tensors import Entry, read_folder, write_json, write_tensors
from burnish.tune import ia3, lora, peft_method

ROOT = "base_model.model."
OWN = {  # burnish's techniques that PEFT knows, and how it names their tensors
    "lora": re.compile(re.escape(ROOT) + r"(.+)\.(?:(lora_[AB])\.weight|(lora_magnitude_vector))"),
    "ia3": re.compile(re.escape(ROOT) + r"(.+)\.(ia3_l)"),
}
LORA_OPTIONS = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "bias")
PLAIN = re.compile(  # a tensor of the base, not one that peft wraps
    re.escape(ROOT) + r"((?!.*\.(base_layer|original_module|modules_to_save)\.|.*\.lora_).+|.+\.base_layer\.bias)"
)
# no SEQ_CLS: with it PEFT expects the classifier's weights in the adapter
TASKS = {"lm": "CAUSAL_LM", "classification": None, "none": "FEATURE_EXTRACTION", "masked_lm": None}
# what need not be asked for: it tells where PEFT's changes are, which the tensors tell too, or how they began
TOLD = {"target_modules", "feedforward_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
TOLD |= {"fan_in_fan_out", "init_ia3_weights", "megatron_core", "qalora_group_size", *peft_method.RECORD}


@dataclass(frozen=True)
class Adapter:
    """What a folder in PEFT's format holds: its adapter_config.json, its tensors by PEFT's names, and the chain that
    burnish wrote beside them, if it did."""

    folder: Path
    record: dict[str, Any]
    tensors: dict[str, Entry]
    saved: list[dict[str, Any]]

    @property
    def technique(self) -> str:
        """The technique of burnish that has all that the adapter asks for; "" where none has."""
        name = str(self.record.get("peft_type")).lower()
        if name not in OWN or (self.saved and self.saved[0]["name"] != name):
            return ""
        known = TOLD | (
            {*LORA_OPTIONS, "modules_to_save", "rank_pattern", "alpha_pattern"} if name == "lora" else set()
        )
        if self.record.get("init_lora_weights", True) in (*peft_method.OFF["init_lora_weights"], "eva"):
            known |= {"init_lora_weights", "eva_config"}
        asked = {key for key, value in self.record.items() if value and key not in known}
        names = (OWN[name], PLAIN) if name == "lora" else (OWN[name],)
        read = all(any(pattern.fullmatch(key) for pattern in names) for key in self.tensors)
        return name if read and not asked else ""


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

    def bare(name: str) -> str:
        return name.removeprefix(layout.prefix) if model.spec.head == "none" else name

    def foreign(path: str) -> str:
        return bare(layout.modules[path])

    renamed = {}
    for key, tensor in tensors.items():
        path, _, leaf = key.rpartition(".")
        if leaf == "bias" and path in config.target_modules:
            renamed[f"{ROOT}{foreign(path)}.base_layer.bias"] = tensor
        elif key in layout.tensors:
            renamed[ROOT + bare(layout.tensors[key])] = tensor.t() if key in layout.transposed else tensor
        else:
            renamed[f"{ROOT}{foreign(path)}.{leaf}{'.weight' if leaf in ('lora_A', 'lora_B') else ''}"] = tensor
    targets = [foreign(path) for path in config.target_modules]
    record = {"peft_type": name.upper(), "fan_in_fan_out": bool(layout.transposed), "target_modules": targets}
    if name == "ia3":
        inner = [foreign(path) for path in config.feedforward_modules]
        return renamed, {**record, "target_modules": targets + inner, "feedforward_modules": inner}
    record |= {key: getattr(config, key) for key in LORA_OPTIONS}
    for key in ("rank_pattern", "alpha_pattern"):
        record[key] = {foreign(path): value for path, value in getattr(config, key).items()}
    return renamed, {**record, "modules_to_save": [foreign(path) for path in config.modules_to_save or ()] or None}


def read(folder: Path, saved: list[dict[str, Any]]) -> Adapter:
    """The adapter in a folder; `saved` is the chain that burnish wrote beside it."""
    try:
        record = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{folder}/adapter_config.json: not valid JSON ({error})") from None
    return Adapter(folder, record, read_folder(folder, "adapter_model"), saved)


def rebuild(model: Model, adapter: Adapter) -> dict[str, Entry]:
    """Rebuild the adapter's chain on the model; returns the tensors by burnish's names, those of the base by the
    family's.

    Raises UserError for a method or an option that does not run here, and where the adapter's modules are not the
    base's.
    """
    if adapter.technique == "ia3":
        chain = adapter.saved or [{"name": "ia3", "config": {"peft_compatible": True}}]
        tensors = rename(model.net.layout, adapter.tensors, OWN["ia3"])
        inner = [name.removesuffix(".ia3_l") for name, x in tensors.items() if x.shape[0] == 1]  # (1, in), or (out, 1)
        outputs = sorted({name.removesuffix(".ia3_l") for name in tensors}.difference(inner))
        chain[0]["config"] |= {"target_modules": outputs, "feedforward_modules": sorted(inner)}
        chains.rebuild(model, chain)
        return tensors
    where = str(adapter.folder / "adapter_config.json")
    if virtual_tokens.holds(adapter.record):
        prompt = virtual_tokens.read(adapter.record, adapter.tensors, where)
        return virtual_tokens.rebuild(model, adapter.saved or prompt, adapter.tensors)
    if adapter.technique == "lora":
        config, tensors = lora_of(model.net, adapter)
        if not any(lora.shared(model.net, path) for path in config["modules_to_save"] or ()):
            chains.rebuild(model, [{"name": "lora", "config": config}])
            return tensors
    link = peft_method.link(adapter.record, where)
    chains.rebuild(model, adapter.saved or [link])
    own = {id(tensor): name for name, tensor in model.net.stored_tensors().items()}
    copies = ".base_layer.weight"  # of the base, which PEFT writes beside an adapted embedding
    found = {key: entry for key, entry in adapter.tensors.items() if not key.endswith(copies)}
    for key, tensor in peft_method.tensors(model, model.chain[0].name).items():
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


def lora_of(net: Network, adapter: Adapter) -> tuple[dict[str, Any], dict[str, Entry]]:
    """(config of burnish's LoRA, tensors as `rebuild` returns them) of an adapter whose technique it is."""
    layout, record = net.layout, adapter.record
    tensors = rename(layout, {key: x for key, x in adapter.tensors.items() if OWN["lora"].fullmatch(key)}, OWN["lora"])
    ranks = {name.removesuffix(".lora_A"): x.shape[0] for name, x in tensors.items() if name.endswith(".lora_A")}
    known, modules = {name: native for native, name in layout.tensors.items()}, dict(net.named_modules())
    saved = set()
    for key, entry in adapter.tensors.items():
        plain = PLAIN.fullmatch(key)
        if plain is None:
            continue
        name = plain[1].replace(".base_layer.bias", ".bias")
        name = name if name in known or name in layout.spare else layout.prefix + name
        path, _, leaf = known.get(name, name).rpartition(".")
        if modules.get(path) is None if name in known else name not in layout.spare:
            raise UserError(f"the adapter has a tensor '{name}' that its base does not have")
        tensors[name] = entry
        if name in known and leaf == "weight":
            saved.add(path)
    alphas = by_path(record.get("alpha_pattern") or {}, net, sorted(ranks))
    config = {key: record[key] for key in LORA_OPTIONS if key in record}
    rank = config.get("r", 8)
    config |= {"target_modules": sorted(ranks), "modules_to_save": sorted(saved) or None, "alpha_pattern": alphas}
    return {**config, "rank_pattern": {path: r for path, r in ranks.items() if r != rank}}, tensors


def rename(layout: Layout, tensors: dict[str, Entry], names: re.Pattern[str]) -> dict[str, Entry]:
    """Tensors that PEFT called as in `names`, by burnish's names."""
    native = {foreign: path for path, foreign in layout.modules.items()}
    native |= {foreign.removeprefix(layout.prefix): path for foreign, path in native.items()}
    renamed = {}
    for name, entry in tensors.items():
        foreign, *leaves = names.fullmatch(name).groups()  # type: ignore[union-attr]
        if foreign not in native:
            raise UserError(f"the adapter has a module '{foreign}' that its base does not have")
        renamed[f"{native[foreign]}.{next(filter(None, leaves))}"] = entry
    return renamed
