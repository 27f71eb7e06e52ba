"""Which stored tensor each parameter takes, and reading them there."""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from functools import partial
from pathlib import Path

import torch
from torch import nn

from burnish.config import UserError
from burnish.model.bundle import Model
from burnish.model.linear import Unread
from burnish.model.network import Layout, Network
from burnish.store import gptq_layout
from burnish.store.gguf_names import Rearranged
from burnish.store.tensors import Entry, Held

DENSE = ".weight.dense"
BLOCKS = re.compile(r"\.(storage|weight)\.blocks$")  # of a GGUF file's matrix
Source = Entry | Held | gptq_layout.Part
Stored = dict[str, Entry | Held]
Plan = dict[str, tuple[Source, bool, torch.dtype]]  # parameter -> its tensor, whether transposed, its dtype


def canonical(entries: Stored, layout: Layout) -> Stored:
    """The entries under their family's full names: base-only checkpoints leave the outer prefix away, some begin names
    otherwise, and some name a shared tensor by its copy."""
    for old, new in layout.aliases:
        entries = {new + key.removeprefix(old) if key.startswith(old) else key: entry for key, entry in entries.items()}
    for copy, name in layout.copies.items():
        if copy in entries and name not in entries:
            entries = {**entries, name: entries[copy]}
    prefix = layout.prefix
    if not prefix or any(key.startswith(prefix) for key in entries):
        return entries
    heads = ("lm_head.", "embed_out.", "score.", "classifier.", "cls.")
    return {key if key.startswith(heads) else prefix + key: entry for key, entry in entries.items()}


def stored_names(model: Model) -> dict[str, tuple[str, str | None]]:
    """Parameter name -> (burnish's stored name, the family's name or None where only burnish knows the tensor).

    Stored names leave away wrappers' `.base` and a dense weight's `.dense`.
    """
    tensors = model.net.layout.tensors
    names: dict[str, tuple[str, str | None]] = {}
    for name in model.net.stored_tensors():
        native = re.sub(r"(\.base)+\.", ".", name).removesuffix(".dense")
        names[name] = (native, tensors.get(BLOCKS.sub(".weight", native)))
    return names


def match(model: Model, entries: Stored, extras: Mapping[str, Source], folder: Path, dtype: torch.dtype | None) -> Plan:
    """Every parameter's stored tensor; raises one UserError that lists all that do not match."""
    net, layout = model.net, model.net.layout
    plan: Plan = {}
    problems: list[str] = []
    tensors = net.stored_tensors()
    for name, (native, foreign) in stored_names(model).items():
        key = native if native in extras else foreign or native
        entry = extras.get(key) or entries.get(key)
        if entry is None and not isinstance(tensors[name], nn.Parameter) and not tensors[name].is_meta:
            continue  # a buffer that holds what its model's code put there
        if entry is None:
            drawn = foreign is None and not tensors[name].is_meta and not tensors[name].requires_grad
            if not drawn:  # again by its technique, from the seed in its config
                problems.append(f"missing {key}")
            continue
        transposed = native not in extras and native in layout.transposed
        shape = tuple(tensors[name].shape)[:: -1 if transposed else 1]
        if entry.shape != shape:
            problems.append(f"{key} has shape {list(entry.shape)} where {list(shape)} is needed")
        wanted = tensors[name].dtype
        if entry.dtype != wanted and not (entry.dtype.is_floating_point and wanted.is_floating_point):
            problems.append(f"{key} has dtype {entry.dtype} where {wanted} is needed")
        kind = entry.dtype
        if kind.is_floating_point and foreign is None:
            kind = wanted  # a technique knows its own tensors' dtype
        elif kind.is_floating_point and isinstance(tensors[name], nn.Parameter):
            kind = dtype or kind
        plan[name] = (entry, transposed, kind)
    used = {entry for entry, _, _ in plan.values()}
    replaced = {foreign for native, foreign in stored_names(model).values() if native in extras or foreign in extras}
    for key, entry in [*entries.items(), *extras.items()]:
        known = key in layout.spare or key in replaced or any(re.search(pattern, key) for pattern in layout.ignored)
        if entry not in used and not known:
            problems.append(f"unexpected {key}")
    if problems:
        raise UserError(f"{folder}: the weights do not fit config.json: {'; '.join(problems)}")
    return plan


def as_before(
    plan: Plan, stored: Stored, later: Set[str], before: torch.dtype | None, dtype: torch.dtype | None
) -> Plan:
    """The plan with the base's tensors as they were when it was quantised, in the dtype `before` (None: as stored), but
    for what `dtype` asks of those that the paths `later` leave out."""
    base = {id(entry) for entry in stored.values()}
    found = {}
    for name, (entry, transposed, kind) in plan.items():
        if id(entry) in base and entry.dtype.is_floating_point:
            kind = before or entry.dtype
            kind = kind if name.removesuffix(DENSE) in later else dtype or kind
        found[name] = entry, transposed, kind
    return found


def place(net: Network, plan: Plan, device: torch.device, later: Set[str]) -> None:
    """Read every parameter's (entry, whether it is transposed, dtype) into the network; the weights of the projections
    whose paths are in `later` stay in their files.

    What cannot be read into place goes through one buffer: freed ones would leave holes as large as the model.
    """
    indirect = {name for name, (entry, transposed, kind) in plan.items() if transposed or kind != entry.dtype}
    indirect = set(plan) if device.type != "cpu" else indirect
    unread = {name for name in plan if name.endswith(DENSE) and name.removesuffix(DENSE) in later}
    through = indirect | unread | {name for name, (entry, _, _) in plan.items() if isinstance(entry, Rearranged)}
    scratch = torch.empty(max((plan[name][0].nbytes for name in through), default=0), dtype=torch.uint8)
    before = net.stored_tensors()

    def read(name: str) -> torch.Tensor:
        entry, transposed, kind = plan[name]
        tensor = entry.read(scratch if name in through else None)
        if name in indirect:
            tensor = tensor.t() if transposed else tensor
            tensor = tensor.to(device, kind, copy=True, memory_format=torch.contiguous_format)
        return tensor

    for name in plan:
        old = before[name]
        if name in unread:
            empty = torch.empty(old.shape, dtype=plan[name][2], device="meta")
            net.get_submodule(name.removesuffix(DENSE)).weight = Unread(empty, partial(read, name))
            continue
        put(net, name, old, read(name))
    net.tie()
    for part in net.modules():
        part._buffers.update({name: x.to(device) for name, x in part._buffers.items() if x is not None})


def put(net: Network, name: str, old: torch.Tensor, tensor: torch.Tensor) -> None:
    """Let `tensor` stand for `old`, the parameter or buffer of that name."""
    new = nn.Parameter(tensor, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else tensor
    module, _, leaf = name.rpartition(".")
    setattr(net.get_submodule(module), leaf, new)


def announce(net: Network, plan: Plan) -> None:
    """Give every parameter the dtype that it will have, without storage."""
    before = net.stored_tensors()
    for name, (_, _, kind) in plan.items():
        put(net, name, before[name], torch.empty(before[name].shape, dtype=kind, device="meta"))
    net.tie()
