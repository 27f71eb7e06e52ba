"""The parts of a network whose parameters come and go together, and which of them stay."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from burnish.model.linear import Weight
from burnish.model.network import Network
from burnish.model.transformer import Layer
from burnish.place.reading import Job, Range, Reader, cut

ALIGNMENT = 64  # as torch's own memory: products of other addresses may round otherwise


class Entry(Range, Protocol):
    """A tensor in a file, as the store's."""

    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def nbytes(self) -> int: ...


Plan = Mapping[str, tuple[Entry, bool, torch.dtype]]  # parameter -> its tensor, whether transposed, its dtype


def padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def absent(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """NaNs (zeros of integers) that take no memory."""
    return torch.full((), torch.nan if dtype.is_floating_point else 0, dtype=dtype, device=device).expand(tuple(shape))


class Part:
    """A parameter of `module` that comes and goes, `offset` bytes into the memory of its unit."""

    def __init__(self, module: nn.Module, leaf: str, entry: Entry, transposed: bool, dtype: torch.dtype, offset: int):
        self.module, self.leaf, self.entry, self.transposed, self.dtype = module, leaf, entry, transposed, dtype
        old: Any = module._parameters[leaf]
        self.shape, self.requires_grad = old.shape, old.requires_grad
        self.offset, self.end = offset, offset + math.prod(self.shape) * dtype.itemsize
        self.direct = not transposed and dtype == entry.dtype

    def view(self, memory: Tensor) -> Tensor:
        return memory[self.offset : self.end].view(self.dtype).view(self.shape)

    def put(self, tensor: Tensor) -> None:
        self.module._parameters[self.leaf] = nn.Parameter(tensor, requires_grad=self.requires_grad)


@dataclass(eq=False)
class Unit:
    """The parameters below a module. `memory` is theirs when they are there or on their way, which `job` tells; `host`
    is what a GPU's are copied from, by the event `copied`."""

    parts: list[Part]
    stays: bool = False
    there: bool = False
    memory: Tensor | None = None
    host: Tensor | None = None
    job: Job | None = None
    copied: Any = None

    def __post_init__(self) -> None:
        self.nbytes = padded(self.parts[-1].end)
        self.pieces = cut([part.entry for part in self.parts])
        self.converted = sum(part.entry.nbytes for part in self.parts if not part.direct)
        narrow = [part for part in self.parts if part.dtype != torch.float32]
        shapes = [part.module.shape if isinstance(part.module, Weight) else part.shape for part in narrow]
        self.expanded = 4 * max(map(math.prod, shapes), default=0)  # bytes of its largest matrix in float32

    def read(self, reader: Reader, memory: Tensor) -> Job:
        """Begin to read into `memory`, on the CPU; what is stored in another form is converted afterwards."""
        views = [part.view(memory) for part in self.parts]
        targets = [
            view.view(-1).view(torch.uint8) if part.direct else torch.empty(part.entry.nbytes, dtype=torch.uint8)
            for part, view in zip(self.parts, views, strict=True)
        ]

        def finish() -> None:
            for part, view, target in zip(self.parts, views, targets, strict=True):
                if not part.direct:
                    stored = target.view(part.entry.dtype).view(part.entry.shape)
                    view.copy_(stored.t() if part.transposed else stored)

        return reader.read(self.pieces, targets, finish)

    def show(self, device: torch.device) -> None:
        """Put the parameters in from `memory`; where there is none, empty ones of NaNs."""
        for part in self.parts:
            here = self.memory is not None
            part.put(part.view(self.memory) if here else absent(part.shape, part.dtype, device))  # type: ignore[arg-type]
        self.there = self.memory is not None


def units(net: Network, plan: Plan, trained: bool) -> dict[nn.Module, Unit]:
    """The parameters of `plan` by the modules that need them, in the order in which those run."""
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    found = {}
    for root in roots(net):
        parts: list[Part] = []
        for owner, leaf, parameter in matrices(root, trained):
            if names[id(parameter)] in plan:
                parts.append(Part(owner, leaf, *plan[names[id(parameter)]], padded(parts[-1].end if parts else 0)))
        if parts:
            found[root] = Unit(parts)
    return found


def movable(net: Network, trained: bool) -> set[str]:
    """The names of the parameters that only units and the embedding hold. `trained` tells that what requires gradients
    is a technique's, and stays."""
    known = {(owner, leaf) for root in roots(net) for owner, leaf, _ in matrices(root, trained)}
    known.add((net.embed_tokens, "weight"))
    others = {id(p) for owner in net.modules() for leaf, p in owner._parameters.items() if (owner, leaf) not in known}
    return {name for name, parameter in net.named_parameters() if id(parameter) not in others}


def roots(net: Network) -> list[nn.Module]:
    """The modules before which their parameters are brought in, in the order in which they run."""
    layers = (layer.children() if isinstance(layer, Layer) else [layer] for layer in net.all_layers)
    return [*(module for modules in layers for module in modules), *net.head_modules()]


def matrices(module: nn.Module, trained: bool) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """(owner, name, parameter) of the stored weights and other matrices below a module."""
    for owner in module.modules():
        for leaf, parameter in owner._parameters.items():
            stored = parameter is not None and (isinstance(owner, Weight) or parameter.dim() > 1)
            if stored and not (trained and parameter.requires_grad):  # type: ignore[union-attr]
                yield owner, leaf, parameter  # type: ignore[misc]


def buffer_size(sizes: Sequence[int]) -> int:
    """Bytes for units that are read in this order, over and over: the two largest that follow each other."""
    return max(map(sum, zip(sizes, [*sizes[1:], sizes[0]], strict=True))) if sizes[1:] else sum(sizes)


def choose(sizes: Sequence[int], free: int) -> set[int] | None:
    """Which units stay, by their bytes in the order of their use: as many bytes as fit beside the buffer for the
    others. None where even the buffer alone does not fit."""
    if buffer_size(sizes) > free:
        return None
    spread = sorted(range(len(sizes)), key=lambda index: index * 0.6180339887 % 1)  # any first few lie far apart
    best: set[int] = set()
    for order in (spread, sorted(spread, key=lambda index: -sizes[index])):
        stays: set[int] = set()
        for index in order:
            more = {*stays, index}
            others = [size for place, size in enumerate(sizes) if place not in more]
            if sum(sizes[place] for place in more) + buffer_size(others) <= free:
                stays = more
        best = max(best, stays, key=lambda chosen: sum(sizes[place] for place in chosen))
    return best
