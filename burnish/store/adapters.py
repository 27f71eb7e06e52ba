"""Adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

LoRA, IA3 and methods of virtual tokens are burnish's own techniques where they have all that the adapter asks for;
anything else goes through peft itself. Which modules an adapter changes, and LoRA's ranks, are read from its tensors.

Beside the adapter a chain may have quantisations of the base that need no data, which loading repeats, losses, and,
with LoRA and IA3, a new class head, which is PEFT's saved module of a SEQ_CLS adapter.
"""

from __future__ import annotations

import json
import re
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from burnish import chain as chains
from burnish.config import UserError
from burnish.model.bundle import Link, Model
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
    re.escape(ROOT)
    + r"((?!.*\.(base_layer|original_module|modules_to_save)\.|.*\.(lora_|ia3_l)).+|.+\.base_layer\.bias)"
)
HEADS = ("classifier", "score")  # modules that PEFT saves with SEQ_CLS
HEAD = re.compile(re.escape(ROOT) + rf"({'|'.join(HEADS)})\..+")
LABELS = re.compile(re.escape(ROOT) + rf"({'|'.join(HEADS)})(\.out_proj)?\.weight")  # (labels, hidden)
# SEQ_CLS is of chains with a new head: with it PEFT expects the classifier's weights in the adapter
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
    def own(self) -> list[dict[str, Any]]:
        """The link of `saved` that is the adapter itself, if there is one."""
        return [link for link in self.saved if in_peft(link["name"])]

    @property
    def head(self) -> dict[str, Entry]:
        """The tensors of a class head."""
        return {key: entry for key, entry in self.tensors.items() if HEAD.fullmatch(key)}

    @property
    def technique(self) -> str:
        """The technique of burnish that has all that the adapter asks for; "" where none has."""
        name = str(self.record.get("peft_type")).lower()
        if name not in OWN or any(link["name"] != name for link in self.own):
            return ""
        plain = [key for key in self.tensors if PLAIN.fullmatch(key)]
        known = set(TOLD)
        if name == "lora":
            known |= {*LORA_OPTIONS, "modules_to_save", "rank_pattern", "alpha_pattern"}
        elif all(key in self.head for key in plain) or any(link["name"] == "transfer" for link in self.saved):
            known.add("modules_to_save")
        if self.record.get("init_lora_weights", True) in (*peft_method.OFF["init_lora_weights"], "eva"):
            known |= {"init_lora_weights", "eva_config"}
        asked = {key for key, value in self.record.items() if value and key not in known}
        names = (OWN[name], PLAIN) if "modules_to_save" in known else (OWN[name],)
        read = all(any(pattern.fullmatch(key) for pattern in names) for key in self.tensors)
        return name if read and not asked else ""


def in_peft(name: str) -> bool:
    """Whether a technique is one that PEFT's format may hold."""
    return name in OWN or name in virtual_tokens.METHODS or name.startswith(peft_method.PREFIX)


def takes(model: Model) -> bool:
    """Whether the chain is one adapter that PEFT's format holds, with nothing beside it but what is repeated at
    loading, losses, and a new class head."""
    found = [link.name for link in model.chain if in_peft(link.name)]
    if len(found) != 1:
        return False
    (name,) = found
    parts = any(layer.skipped for layer in ia3.layers(model).values())  # of fused projections, which PEFT cannot say
    if not (name in OWN and not parts or name.startswith(peft_method.PREFIX) or virtual_tokens.takes(model, name)):
        return False
    before = True
    for link in model.chain:
        module = chains.technique(link.name)
        rounds = getattr(module, "FROM_BASE", False) and before and ":" not in name
        head = name in OWN and heads(link, model)
        before = before and link.name != name
        if not (link.name == name or rounds or head or getattr(module, "LOSS_ONLY", False)):
            return False
    return True


def heads(link: Link, model: Model) -> bool:
    """Whether a link is a new class head and nothing else, of a kind that transformers has."""
    config = link.config
    own = link.name == "transfer" and config.head == "classification" and config.train_layers == 0
    return own and not model.spec.mean_pool


def write(model: Model, tensors: dict[str, Tensor], folder: Path) -> None:
    """Write a chain that `takes` accepts; `tensors` are its parameters by burnish's names."""
    (name,) = (link.name for link in model.chain if in_peft(link.name))
    task = "SEQ_2_SEQ_LM" if model.spec.paired else TASKS[model.spec.head]
    if any(link.name == "transfer" for link in model.chain):
        task = "SEQ_CLS"
    if name in OWN:
        renamed, record = own(model, name, tensors)
    elif name in virtual_tokens.METHODS:
        renamed, record = virtual_tokens.written(model, name, tensors)
        task = task or "FEATURE_EXTRACTION"  # of another class peft leaves virtual tokens away
    else:
        found = peft_method.tensors(model, name)
        renamed = {key: tensor.clone() for key, tensor in found.items()}
        record = peft_method.record(model, name)
    write_tensors(renamed, folder / "adapter_model.safetensors")
    known = {"task_type": task, "base_model_name_or_path": model.path, "inference_mode": True}
    write_json({**record, **known}, folder / "adapter_config.json")


def own(model: Model, name: str, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors by PEFT's names, options) of burnish's own LoRA or IA3."""
    layout = model.net.layout
    (config,) = (link.config for link in model.chain if link.name == name)

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
        record |= {"target_modules": targets + inner, "feedforward_modules": inner}
        return renamed, {**record, "modules_to_save": head_names(model) or None}
    record |= {key: getattr(config, key) for key in LORA_OPTIONS}
    for key in ("rank_pattern", "alpha_pattern"):
        record[key] = {foreign(path): value for path, value in getattr(config, key).items()}
    saved = [*map(foreign, config.modules_to_save or ()), *head_names(model)]
    return renamed, {**record, "modules_to_save": saved or None}


def new_head(model: Model) -> set[str]:
    """The paths of what the chain put on the body as a new head, and of a pooler below it."""
    if not any(link.name == "transfer" for link in model.chain):
        return set()
    parts = model.net.head_modules()
    return {path for path, module in model.net.named_modules() if any(module is part for part in parts)}


def head_names(model: Model) -> list[str]:
    """The modules of a new head in PEFT's modules_to_save."""
    found = [
        name.rpartition(".")[0]
        for key, name in model.net.layout.tensors.items()
        if any(key.startswith(f"{path}.") for path in new_head(model))
    ]
    return sorted({part if (part := name.split(".")[0]) in HEADS else name for name in found})


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
    for link in adapter.saved:
        if link["name"] == "transfer" or getattr(chains.technique(link["name"]), "LOSS_ONLY", False):
            chains.rebuild(model, [link])
    if not adapter.saved:
        put_head(model, adapter)
    if adapter.technique == "ia3":
        chain = adapter.own or [{"name": "ia3", "config": {"peft_compatible": True}}]
        tensors = rename(model.net.layout, adapter.tensors, OWN["ia3"])
        inner = [name.removesuffix(".ia3_l") for name, x in tensors.items() if x.shape[0] == 1]  # (1, in), or (out, 1)
        outputs = sorted({name.removesuffix(".ia3_l") for name in tensors}.difference(inner))
        chain[0]["config"] |= {"target_modules": outputs, "feedforward_modules": sorted(inner)}
        chains.rebuild(model, chain)
        return tensors | plain(model.net, adapter)[0]
    where = str(adapter.folder / "adapter_config.json")
    if virtual_tokens.holds(adapter.record):
        prompt = virtual_tokens.read(adapter.record, adapter.tensors, where)
        return virtual_tokens.rebuild(model, adapter.own or prompt, adapter.tensors)
    if adapter.technique == "lora":
        config, tensors = lora_of(model.net, adapter, new_head(model))
        if not any(lora.shared(model.net, path) for path in config["modules_to_save"] or ()):
            chains.rebuild(model, [{"name": "lora", "config": config}])
            return tensors
    link = peft_method.link(adapter.record, where)
    chains.rebuild(model, adapter.own or [link])
    own = {id(tensor): name for name, tensor in model.net.stored_tensors().items()}
    copies = ".base_layer.weight"  # of the base, which PEFT writes beside an adapted embedding
    found = {key: entry for key, entry in adapter.tensors.items() if not key.endswith(copies)}
    for key, tensor in peft_method.tensors(model, model.chain[-1].name).items():
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


def put_head(model: Model, adapter: Adapter) -> None:
    """Put the class head on that an adapter of peft brings, unless LoRA finds one of its size in the base, which it
    then saves."""
    labels = next((x.shape[0] for key, x in adapter.tensors.items() if LABELS.fullmatch(key)), 0)
    spec = model.spec
    fits = spec.head == "classification" and spec.num_labels == labels and adapter.technique == "lora"
    if labels and adapter.technique and not fits:
        names = model.hf_config.get("id2label") or {}
        known = list(names.values()) if len(names) == labels else None
        chains.rebuild(model, [{"name": "transfer", "config": {"num_labels": labels, "label_names": known}}])


def lora_of(net: Network, adapter: Adapter, head: Set[str] = frozenset()) -> tuple[dict[str, Any], dict[str, Entry]]:
    """(config of burnish's LoRA, tensors as `rebuild` returns them) of an adapter whose technique it is; what is at the
    paths `head` is not LoRA's."""
    record = adapter.record
    tensors = rename(net.layout, adapter.tensors, OWN["lora"])
    beside, saved = plain(net, adapter)
    ranks = {name.removesuffix(".lora_A"): x.shape[0] for name, x in tensors.items() if name.endswith(".lora_A")}
    alphas = by_path(record.get("alpha_pattern") or {}, net, sorted(ranks))
    config = {key: record[key] for key in LORA_OPTIONS if key in record}
    rank = config.get("r", 8)
    kept = sorted(path for path in saved if not any(path == part or path.startswith(f"{part}.") for part in head))
    config |= {"target_modules": sorted(ranks), "modules_to_save": kept or None, "alpha_pattern": alphas}
    return {**config, "rank_pattern": {path: r for path, r in ranks.items() if r != rank}}, tensors | beside


def plain(net: Network, adapter: Adapter) -> tuple[dict[str, Entry], set[str]]:
    """(the base's tensors in an adapter by the family's names, the paths of the modules whose matrices are among them).

    Raises UserError for one that the base does not have.
    """
    layout = net.layout
    known, modules = {name: native for native, name in layout.tensors.items()}, dict(net.named_modules())
    tensors: dict[str, Entry] = {}
    saved: set[str] = set()
    for key, entry in adapter.tensors.items():
        found = PLAIN.fullmatch(key)
        if found is None:
            continue
        name = found[1].replace(".base_layer.bias", ".bias")
        name = name if name in known or name in layout.spare else layout.prefix + name
        path, _, leaf = known.get(name, name).rpartition(".")
        if modules.get(path) is None if name in known else name not in layout.spare:
            raise UserError(f"the adapter has a tensor '{name}' that its base does not have")
        tensors[name] = entry
        if name in known and leaf == "weight":
            saved.add(path)
    return tensors, saved


def rename(layout: Layout, tensors: dict[str, Entry], names: re.Pattern[str]) -> dict[str, Entry]:
    """Those tensors that PEFT called as in `names`, by burnish's names."""
    native = {foreign: path for path, foreign in layout.modules.items()}
    native |= {foreign.removeprefix(layout.prefix): path for foreign, path in native.items()}
    renamed = {}
    for name, entry in tensors.items():
        found = names.fullmatch(name)
        if found is None:
            continue
        foreign, *leaves = found.groups()
        if foreign not in native:
            raise UserError(f"the adapter has a module '{foreign}' that its base does not have")
        renamed[f"{native[foreign]}.{next(filter(None, leaves))}"] = entry
    return renamed
