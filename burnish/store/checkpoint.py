"""Loading and saving models in folders.

A folder that burnish writes holds `config.json`, the tokenizer, and `burnish.json` with the chain of techniques and
the base's identity. Dense base weights go to `model.safetensors` under their family's own names, so that
transformers loads the folder unchanged; everything else (quantised storage, prompts, masks) goes to
`burnish.safetensors` under burnish's names. A chain that leaves the base alone is saved without the base, and LoRA,
(IA)^3, a soft prompt or one of peft's methods in PEFT's format, a class head with it (`store/adapters.py`). So are
LoRA, (IA)^3 and soft prompts behind a quantisation that needs no data: loading quantises the base again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from burnish import chain as chains
from burnish.compress.gguf import GGUF
from burnish.config import UserError
from burnish.model.bundle import Model, build
from burnish.model.families import read_spec
from burnish.model.linear import Dense, Linear, Weight
from burnish.model.spec import Head
from burnish.model.surgery import select
from burnish.place.offload import Offload
from burnish.place.units import movable
from burnish.store import adapters, gguf_tokenizer, gptq_layout
from burnish.store.gguf_model import TABLE, opened
from burnish.store.hub import resolve
from burnish.store.identity import base_record, check_base, identity
from burnish.store.matching import BLOCKS, DENSE, Source, Stored, as_before, canonical, match, place, stored_names
from burnish.store.tensors import DTYPES, Entry, Held, Later, heading, read_folder, write_json, write_tensors
from burnish.store.tokenizer import load_tokenizer, save_tokenizer


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError where it is missing or does not parse."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path.parent}: no {path.name} in this folder; it is not a checkpoint") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: a JSON object is needed")
    return data


def load(
    source: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    head: Head | None = None,
    techniques: Sequence[chains.TechniqueSpec] = (),
    unread: bool = False,
    memory_limit: int | None = None,
) -> Model:
    """The model in a folder: a Hugging Face checkpoint, what burnish saved, or a PEFT adapter.

    dtype None keeps floating tensors as they are stored; a technique's own tensors keep their dtype. `head` overrides
    the checkpoint's own; `techniques` are those that will be applied: where they exchange the head of an
    encoder-decoder, its decoder is not read, and where they quantise, each weight is read when it is its turn. So
    are with `unread` all dense weights of the layers' projections, for a placement. With `memory_limit` the model only
    runs, within so many bytes of this process, or on a GPU of its memory: see `burnish.place.offload`. Raises UserError
    for a folder that is no checkpoint, listing every missing, unexpected or misshapen tensor, and for too low a limit.
    """
    folder = resolve(source)
    saved = read_json(folder / "burnish.json") if (folder / "burnish.json").exists() else {}
    adapter = None
    if (folder / "adapter_config.json").exists():
        adapter = adapters.read(folder, saved.get("chain", []))
        source = based_on(folder, {"base": adapter.record.get("base_model_name_or_path"), **saved})
        chain, extras = adapter.saved, adapter.tensors
    else:
        chain = saved.get("chain", [])
        extras = read_folder(folder, "burnish") if (folder / "burnish.safetensors").exists() else {}
        source = source if saved.get("complete", True) else based_on(folder, saved)
    base = resolve(source)
    gguf = opened(base) if base.is_file() else None
    hf_config = gguf.config if gguf else read_json(base / "config.json")
    quantization = hf_config.pop("quantization_config", None)
    quantised = base == folder and not (folder / "model.safetensors").exists() and bool(extras)
    entries = {} if quantised or gguf else read_folder(base)
    spec = read_spec(hf_config, head, {*entries, *extras})
    if base != folder and saved.get("identity"):
        check_base(saved, spec, identity(base), f"{folder}, on {base}", "give the base that it was trained on")
    if spec.paired and not chain and adapter is None and chains.exchanges_head(techniques):
        spec = read_spec(hf_config, "none", {*entries, *extras})
    with torch.device("meta"):
        model = Model(build(spec, hf_config), None, hf_config, path=origin(source), dtype=dtype)
    held = None if quantised or gguf else model.net.read_converted(base)
    stored: Stored = dict(entries) if held is None else {name: Held(tensor) for name, tensor in held.items()}
    stored = canonical(stored, model.net.layout)
    groups: dict[str, gptq_layout.Part] = {}
    if quantization is not None and not quantised:
        packed, stored = gptq_layout.read(quantization, model.net, stored, str(base / "config.json"))
        groups = packed.parts()
    with torch.device("meta"):
        if gguf is not None:
            gguf = gguf if spec.head == "lm" else gguf.without_head()
            gguf.rebuild(model.net, dtype)
        if groups:
            chains.rebuild(model, packed.links(chain))
        if adapter is not None:
            before = set(model.net.layout.tensors.values())
            extras = adapters.rebuild(model, adapter)
            exchanged = before.difference(model.net.layout.tensors.values())  # the base's head for another
            stored = {name: entry for name, entry in stored.items() if name not in exchanged}
        else:
            chains.rebuild(model, chain)
    model.whole = base == folder and chains.leaves_plain(model) and model.spec == spec
    again = chains.repeated(adapter.saved) if adapter is not None else []
    later = set() if model.chain and not model.whole else chains.stored_anew(model, techniques)
    if again:
        if memory_limit is not None:
            raise UserError(
                f"memory_limit: {folder} is an adapter whose base is quantised as it is loaded, in memory as a whole; "
                "leave the limit away, or burnish merge it and quantise the result"
            )
        chosen = [select(model.net, options["target_modules"]) for link in again for options in link.values()]
        linears = {id(linear) for found in chosen for _, linear in found}
        later = {path for path, module in model.net.named_modules() if id(module) in linears}
    if unread:
        bodies = ((path, part) for path, part in model.net.named_modules() if path.startswith(model.net.body))
        later |= {path for path, part in bodies if isinstance(part, Linear)}
    beside: Mapping[str, Source] = gguf.tensors if gguf else groups
    plan = match(model, stored, {**beside, **extras}, folder, dtype)
    if again:
        model.dtype = {str(kind).removeprefix("torch."): kind for kind in DTYPES.values()}.get(saved.get("dtype", ""))
        plan = as_before(plan, stored, later, model.dtype, dtype)
    away = movable(model.net, bool(model.chain)) if memory_limit is not None else set()
    away.discard(TABLE)  # rows of it are looked up
    limited = {name: (x, y, z) for name, (x, y, z) in plan.items() if name in away and type(x) is Entry}
    limited = {name: part for name, part in limited.items() if name.removesuffix(DENSE) not in later}
    place(model.net, {name: plan[name] for name in plan if name not in limited}, torch.device(device), later)
    if again:
        chains.apply(model, again)
    if adapter is not None and adapter.saved:
        order = [link["name"] for link in adapter.saved]
        model.chain.sort(key=lambda link: order.index(link.name))
    here = folder if has_tokenizer(folder) else base
    model.tokenizer = gguf_tokenizer.rebuilt(gguf.file) if gguf and here == base else load_tokenizer(here)
    check_vocabulary(model, folder)
    if gguf is not None:
        model.generation_config = gguf.generation_config
        model.net.compute_dtype = dtype or torch.float32  # as llama.cpp, whatever the weights are
    elif (base / "generation_config.json").exists():
        model.generation_config = read_json(base / "generation_config.json")
    model.plain = gguf is None and quantization is None and (base != folder or not chain or model.whole)
    own = base == folder and (not chain or model.whole)  # such weights are a base of their own
    model.identity = identity(base) if own else saved.get("identity") or identity(base)
    model.net.eval()
    if memory_limit is not None:
        Offload(model.net, limited, memory_limit, torch.device(device), bool(model.chain))
    return model


def origin(source: str | Path) -> str:
    """What finds the model again from anywhere: a hub id or "pebble" as given, a folder or a file by its absolute
    path."""
    return str(Path(source).resolve()) if Path(source).exists() else str(source)


def based_on(folder: Path, saved: dict[str, Any]) -> str:
    """The base that a folder without base weights names."""
    if not isinstance(saved.get("base"), str) or not saved["base"]:
        raise UserError(f"{folder}: names no base model; write it into adapter_config.json or burnish.json")
    return saved["base"]


def check_vocabulary(model: Model, folder: Path) -> None:
    """Raise UserError where the tokenizer gives ids that the embedding has no row for."""
    rows, spare = model.spec.vocab_size, model.net.layout.spare_tokens
    if len(model.tokenizer) - len(spare) <= rows:
        return
    beyond = [word for word, token in model.tokenizer.get_vocab().items() if token >= rows and word not in spare]
    raise UserError(
        f"{folder}: the tokenizer has {len(model.tokenizer)} tokens and the embedding {rows} rows; nothing stands for "
        f"{', '.join(map(repr, sorted(beyond)[:3]))}: take the tokenizer that the weights were saved with"
    )


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder brings a tokenizer of its own."""
    return any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"))


@dataclass(frozen=True)
class Contents:
    """What is written of a model: tensors under its family's names, others under burnish's, and what config.json says
    of those in GPTQ's layout. `complete`: the base is among them."""

    complete: bool
    foreign: dict[str, torch.Tensor | Later]
    own: dict[str, torch.Tensor]
    quantization: dict[str, Any]

    @property
    def nbytes(self) -> int:
        """Of the files."""
        return sum(heading(tensors)[2] for tensors in (self.foreign, self.own) if tensors)


def contents(model: Model) -> Contents:
    """What `save` writes of the model, which may be on the meta device."""
    spec, layout = model.spec, model.net.layout
    alone = model.plain and adapters.takes(model)
    complete = not (model.path and model.identity) or not model.chain or (chains.changes_base(model) and not alone)
    dense = all(isinstance(m, Dense | GGUF) for m in model.net.modules() if isinstance(m, Weight))
    groups = gptq_layout.fits(model.net) if complete else {}
    parameters = model.net.stored_tensors()
    foreign: dict[str, torch.Tensor] = {}
    extras: dict[str, torch.Tensor] = {}
    for name, (native, other) in stored_names(model).items():
        tensor = parameters[name].detach()
        owner = model.net.get_submodule(name.rpartition(".")[0])
        if complete and isinstance(owner, GGUF):
            tensor, native = owner.dequantize_to(torch.bfloat16), BLOCKS.sub(".weight", native)
        trained = not complete and parameters[name].requires_grad  # norms beside adapters
        if not complete and isinstance(owner, Weight) and not isinstance(owner, Dense):
            continue
        if native.rpartition(".weight.")[0] in groups:
            continue
        if other is None or trained or (complete and not dense and not groups):
            extras[native] = tensor
        elif complete:
            other = other.removeprefix(layout.prefix) if spec.head == "none" else other
            foreign[other] = tensor.t() if native in layout.transposed else tensor
    packed: dict[str, Later] = {}
    forms = {}
    for path, weight in groups.items():
        other = layout.tensors[f"{path}.weight"].removesuffix(".weight")
        other = other.removeprefix(layout.prefix) if spec.head == "none" else other
        packed |= gptq_layout.written(other, weight)
        forms[other] = weight.form
    written: dict[str, torch.Tensor | Later] = {**model.net.converted(foreign), **packed} if foreign else {}
    return Contents(complete, written, extras, gptq_layout.quantization_config(forms) if forms else {})


def save(model: Model, folder: str | Path) -> Path:
    """Write the model into `folder` (made if needed); files already there are replaced one by one, each atomically.

    Raises UserError when the folder holds a different model's files that this save would mix with.
    """
    if model.net.runs_only:
        raise UserError(f"{folder}: {model.net.runs_only}")
    if model.adapters is not None:
        raise UserError(f"{folder}: adapters loaded under names are not saved; their folders hold them")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    found = contents(model)
    alone = not found.complete and adapters.takes(model)
    written = {
        "model.safetensors": bool(found.foreign),
        "burnish.safetensors": bool(found.own) and not alone,
        "adapter_config.json": alone,
        "model.safetensors.index.json": False,
    }
    stale = [name for name, ours in written.items() if not ours and (folder / name).exists()]
    if stale:
        raise UserError(f"{folder}: holds {', '.join(stale)} of another kind of checkpoint; choose another folder")
    record: dict[str, Any] = {"format": 1, "complete": found.complete, "chain": chains.describe(model)}
    record |= {**base_record(model.spec, model.identity), "base": model.path}
    if alone and chains.repeated(record["chain"]):
        record["dtype"] = str(model.dtype).removeprefix("torch.") if model.dtype else None
    if found.foreign:
        write_tensors(found.foreign, folder / "model.safetensors")
    if alone:
        adapters.write(model, found.own, folder)
    elif found.own:
        write_tensors(found.own, folder / "burnish.safetensors")
    if found.complete:
        config = saved_config(model)
        if found.quantization:
            config["quantization_config"] = found.quantization
        write_json(config, folder / "config.json")
        if model.generation_config:
            write_json(model.generation_config, folder / "generation_config.json")
    if model.tokenizer is not None:
        save_tokenizer(model.tokenizer, folder)
    write_json(record, folder / "burnish.json")
    return folder


def saved_config(model: Model) -> dict[str, Any]:
    """config.json of the model as it is now."""
    blocks = any(isinstance(module, GGUF) for module in model.net.modules())
    dtype = "bfloat16" if blocks else str(model.net.embed_tokens.weight.dtype).removeprefix("torch.")
    config = {**model.hf_config, "architectures": [model.net.layout.architecture], "dtype": dtype}
    config.pop("torch_dtype", None)
    return config
