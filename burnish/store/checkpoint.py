"""Loading and saving models in folders.

A folder that burnish writes holds `config.json`, the tokenizer, and `burnish.json` with the chain of techniques and
the base's identity. Dense base weights go to `model.safetensors` under their family's own names, so that
transformers loads the folder unchanged; everything else (quantised storage, prompts, masks) goes to
`burnish.safetensors` under burnish's names. A chain that leaves the base alone is saved without the base, and LoRA,
(IA)^3, a soft prompt or one of peft's methods in PEFT's format, a class head with it (`store/adapters.py`). So are
LoRA, (IA)^3 and soft prompts behind a quantisation that needs no data: loading quantises the base again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from burnish import chain as chains
from burnish.compress.gguf import GGUF
from burnish.config import UserError
from burnish.device import parse_dtype
from burnish.model.bundle import Model, build
from burnish.model.families import read_spec
from burnish.model.linear import Dense, Linear, Weight
from burnish.model.spec import Head
from burnish.model.surgery import select
from burnish.place.offload import Offload
from burnish.place.units import movable
from burnish.store import adapters, gguf_tokenizer, gptq_layout
from burnish.store.gguf_model import TABLE
from burnish.store.identity import base_record, check_base, identity
from burnish.store.matching import BLOCKS, DENSE, Source, Stored, as_before, canonical, match, place, stored_names
from burnish.store.sources import Sources, has_tokenizer, read_json, sources
from burnish.store.tensors import DTYPES, Entry, Held, Later, heading, write_json, write_tensors
from burnish.store.tokenizer import load_tokenizer, save_tokenizer


def load(
    source: str | Path,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    head: Head | None = None,
    techniques: Sequence[chains.TechniqueSpec] = (),
    unread: bool = False,
    memory_limit: int | None = None,
) -> Model:
    """The model in a folder: a Hugging Face checkpoint, what burnish saved, or a PEFT adapter.

    dtype ("bf16", say, or torch's own) is that of floating tensors, None as they are stored; a technique's own tensors
    keep their dtype. `head` overrides the checkpoint's own; `techniques` are those that will be applied: where they
    exchange the head of an encoder-decoder, its decoder is not read, and where they quantise, each weight is read when
    it is its turn. So are with `unread` all dense weights of the layers' projections, for a placement. With
    `memory_limit` the model only runs, within so many bytes of this process, or on a GPU of its memory: see
    `burnish.place.offload`. Raises UserError for a folder that is no checkpoint, listing every missing, unexpected or
    misshapen tensor, and for too low a limit.
    """
    found, dtype = sources(source), parse_dtype(dtype)
    model, stored, others = skeleton(found, head, techniques, dtype)
    again = chains.repeated(found.adapter.saved) if found.adapter is not None else []
    if again and memory_limit is not None:
        raise UserError(
            f"memory_limit: {found.folder} is an adapter whose base is quantised as it is loaded, in memory as a "
            "whole; leave the limit away, or burnish merge it and quantise the result"
        )
    if again:
        chosen = [select(model.net, options["target_modules"]) for link in again for options in link.values()]
        linears = {id(linear) for those in chosen for _, linear in those}
        later = {path for path, module in model.net.named_modules() if id(module) in linears}
    else:
        later = set() if model.chain and not model.whole else chains.stored_anew(model, techniques)
    if unread:
        bodies = ((path, part) for path, part in model.net.named_modules() if path.startswith(model.net.body))
        later |= {path for path, part in bodies if isinstance(part, Linear)}
    plan = match(model, stored, others, found.folder, dtype)
    if again:
        before = found.saved.get("dtype", "")
        model.dtype = {str(kind).removeprefix("torch."): kind for kind in DTYPES.values()}.get(before)
        plan = as_before(plan, stored, later, model.dtype, dtype)
    away = movable(model.net, bool(model.chain)) - {TABLE} if memory_limit is not None else set()  # rows are looked up
    away = {name for name in away if name.removesuffix(DENSE) not in later}
    limited = {name: (x, y, z) for name, (x, y, z) in plan.items() if name in away and type(x) is Entry}
    place(model.net, {name: plan[name] for name in plan if name not in limited}, torch.device(device), later)
    if again:
        chains.apply(model, again)
    if found.adapter is not None and found.adapter.saved:
        order = [link["name"] for link in found.adapter.saved]
        model.chain.sort(key=lambda link: order.index(link.name))
    complete(model, found)
    if found.gguf is not None:
        model.net.compute_dtype = dtype or torch.float32  # as llama.cpp, whatever the weights are
    model.net.eval()
    if memory_limit is not None:
        Offload(model.net, limited, memory_limit, torch.device(device), bool(model.chain))
    return model


def skeleton(
    found: Sources, head: Head | None, techniques: Sequence[chains.TechniqueSpec], dtype: torch.dtype | None
) -> tuple[Model, Stored, dict[str, Source]]:
    """The model on the meta device with its chain, the base's tensors by their family's full names, and all others by
    burnish's."""
    names = {*found.entries, *found.extras}
    spec = read_spec(found.hf_config, head, names)
    if not found.alone and found.saved.get("identity"):
        where = f"{found.folder}, on {found.base}"
        check_base(found.saved, spec, identity(found.base), where, "give the base that it was trained on")
    if spec.paired and not found.chain and found.adapter is None and chains.exchanges_head(techniques):
        spec = read_spec(found.hf_config, "none", names)
    with torch.device("meta"):
        model = Model(build(spec, found.hf_config), None, found.hf_config, path=found.origin, dtype=dtype)
    net = model.net
    held = None if found.ours or found.gguf else net.read_converted(found.base)
    stored: Stored = dict(found.entries) if held is None else {name: Held(tensor) for name, tensor in held.items()}
    stored = canonical(stored, net.layout)
    others: dict[str, Source] = {}
    links: list[dict[str, Any]] = []
    if found.quantization is not None and not found.ours:
        packed, stored = gptq_layout.read(found.quantization, net, stored, str(found.base / "config.json"))
        others |= packed.parts()
        links = packed.links(found.chain)
    with torch.device("meta"):
        if found.gguf is not None:
            gguf = found.gguf if spec.head == "lm" else found.gguf.without_head()
            gguf.rebuild(net, dtype)
            others |= gguf.tensors
        chains.rebuild(model, links)
        if found.adapter is None:
            chains.rebuild(model, found.chain)
            others |= found.extras
        else:
            before = set(net.layout.tensors.values())
            others |= adapters.rebuild(model, found.adapter)
            exchanged = before.difference(net.layout.tensors.values())  # the base's head for another
            stored = {name: entry for name, entry in stored.items() if name not in exchanged}
    model.whole = found.alone and chains.leaves_plain(model) and model.spec == spec
    return model, stored, others


def complete(model: Model, found: Sources) -> None:
    """Give the model what belongs to it beside its weights: tokenizer, generation config, and what it is made of."""
    base, gguf = found.base, found.gguf
    model.tokenizer = tokenizer_of(found)
    check_vocabulary(model, found.folder)
    if gguf is not None:
        model.generation_config = gguf.generation_config
    elif (base / "generation_config.json").exists():
        model.generation_config = read_json(base / "generation_config.json")
    own = found.alone and (not found.chain or model.whole)  # such weights are a base of their own
    model.plain = gguf is None and found.quantization is None and (own or not found.alone)
    model.identity = identity(base) if own else found.saved.get("identity") or identity(base)


def tokenizer_of(found: Sources) -> Any:
    """The folder's own tokenizer, else its base's. Raises UserError where it cannot be read."""
    if has_tokenizer(found.folder):
        return load_tokenizer(found.folder)
    return gguf_tokenizer.rebuilt(found.gguf.file) if found.gguf else load_tokenizer(found.base)


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
