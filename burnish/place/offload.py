"""Offload: a model larger than the memory it may take, its layers read again whenever they run.

The parts of the network (a layer's attention, its feed-forward, the head) are divided into those that stay in memory,
as many as fit, and those that are read for every forward into one buffer, which holds the two largest that follow each
other: while one computes, the next is read. What comes next is learnt from the last time, since the encoder of an
encoder-decoder does not run at every token. Of the embedding only the rows of a forward's tokens are read. Weights are
read as they are stored, quantised ones too, and lie at multiples of 64 bytes, so that results equal the plain
network's to the last bit. For a GPU, what does not stay lies in pinned memory of the host, and a side stream copies it.

The limit is on the memory of the whole process, interpreter and libraries included, or on what torch takes of a GPU's.
It is divided anew when a request needs more for its cache and activations than any before. Source: FlexGen (arXiv
2303.06865), section 3, for one request at a time. Limits: no training; what a technique computes of a whole weight at
every token (DoRA) is not counted.
"""

from __future__ import annotations

import os
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from burnish import device as machine
from burnish.config import UserError
from burnish.model import linear
from burnish.model.network import Network
from burnish.native import choice, products
from burnish.place.reading import BUFFERS, Reader
from burnish.place.units import Entry, Plan, Unit, absent, buffer_size, choose, units

RUNS_ONLY = "a model under memory_limit only runs, most of it is in its files; load it without the limit"
SLACK = 24 << 20  # what allocators and libraries take over time
MIB = 1 << 20


class Offload:
    """Moves the parameters of `plan`, which the network lacks, in and out as it runs, within `limit` bytes.

    `trained` tells that parameters which require gradients are a technique's. Raises UserError, here and in a forward,
    where the limit is too low.
    """

    def __init__(self, net: Network, plan: Plan, limit: int, device: torch.device, trained: bool):
        self.limit, self.device = limit, device
        modules = units(net, plan, trained)  # not kept, so that a network and its memory go with their last user
        self.units = list(modules.values())
        if not self.units:
            raise UserError("memory_limit: this model has no layers that could be read as they run; leave it away")
        net.fixed = net.runs_only = RUNS_ONLY
        self.after = dict(zip(self.units, [*self.units[1:], *self.units[:1]], strict=True))
        self.last = self.newest = self.units[-1]  # that ran, and that was sent for
        self.running: Unit | None = None
        self.buffer = torch.empty(0, dtype=torch.uint8, device=device)
        self.spans: dict[Unit, tuple[int, int]] = {}  # of the buffer
        self.needed = -1  # bytes for cache and activations that the division has room for
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None
        for unit in self.units:
            unit.show(device)
        table = next((name for name, p in net.named_parameters() if p is net.embed_tokens.weight), "")
        if table in plan:
            Rows(net.embed_tokens, plan[table][0], plan[table][2], device)
        machine.return_large_blocks()
        choice.measures = False  # for which there is no room
        self.fitting(self.activations(net, 1, 1, 0))
        self.reader = Reader()
        net.register_forward_pre_hook(self.prepare, with_kwargs=True)
        for module, unit in modules.items():
            module.register_forward_pre_hook(lambda *_, unit=unit: self.bring(unit))
            module.register_forward_hook(lambda *_, unit=unit: self.release(unit))

    def prepare(self, net: Network, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the network runs: divide the memory anew if this needs more than there is room for."""
        if torch.is_grad_enabled():
            raise UserError(f"{RUNS_ONLY}, or run it in torch.inference_mode()")
        given = [*args[:1], *(kwargs.get(name) for name in ("input_ids", "inputs_embeds", "source_embeds"))]
        shapes = [tensor.shape[:2] for tensor in given if tensor is not None]
        cache, filled = kwargs.get("cache"), 0
        if cache is not None and cache.length:
            filled = sum(x.nbytes for part in (cache.keys, cache.values) for x in part.values())
            filled = filled * cache.length // cache.capacity
        capacity = 0 if cache is None else cache.capacity
        needed = self.activations(net, max(s[0] for s in shapes), max(s.numel() for s in shapes), capacity)
        if needed > self.needed:
            self.drop()
            self.divide(self.fitting(needed - filled))
            self.needed = needed

    def activations(self, net: Network, rows: int, tokens: int, capacity: int) -> int:
        """Bytes that a forward of so many tokens takes beside the weights, with a cache for `capacity` in each row."""
        spec, size = net.spec, net.dtype.itemsize
        heads = (spec.num_kv_heads or spec.num_heads) * spec.head_dim
        slots = rows * capacity + (tokens if spec.paired and capacity else 0)  # the source's keys and values stay too
        cache = 2 * (spec.decoder_layers or spec.num_layers) * heads * slots * size
        width = 6 * spec.hidden_size + 4 * spec.intermediate_size + 4 * spec.num_heads * spec.head_dim
        length = tokens // rows
        masks = tokens * max(capacity, length) * size if length > 1 else 0
        logits = 16 * rows * spec.vocab_size  # four copies in float32
        expanded = max(unit.expanded for unit in self.units)  # for a product
        if products.library() is not None:
            expanded = min(expanded, 4 * linear.PIECE) if tokens > products.FEW_DENSE_TOKENS else 0
        copies = 2 if rows > 1 else 1  # where rows end, or beams change places
        return copies * cache + tokens * width * size + masks + logits + expanded

    def fitting(self, needed: int) -> set[int]:
        """Which units stay beside `needed` bytes for cache and activations."""
        own = self.buffer.nbytes + sum(unit.nbytes for unit in self.units if unit.stays and unit.memory is not None)
        if self.side is not None:
            base = torch.cuda.memory_allocated(self.device) - own
        else:
            machine.return_freed_memory()
            stored = buffer_size([unit.converted for unit in self.units])  # what is converted lies there in both forms
            base = machine.resident_memory() - own + BUFFERS + stored
        free = self.limit - base - needed - SLACK
        sizes = [unit.nbytes for unit in self.units]
        stays = choose(sizes, free)
        if stays is None:
            least = buffer_size(sizes)
            raise UserError(
                f"memory_limit: {self.limit // MIB} MiB are too few for this model and request, which need "
                f"{(self.limit - free + least) // MIB + 1} MiB: {base // MIB} for the process itself, {needed // MIB} "
                f"for cache and activations, {least // MIB} for weights, {SLACK // MIB} to spare; raise it"
            )
        return stays

    @torch.inference_mode(False)
    def divide(self, stays: set[int]) -> None:
        """Let these units stay, and make the buffer for the others."""
        for index, unit in enumerate(self.units):
            if unit.stays and index not in stays:
                self.forget(unit)
            unit.stays = index in stays
        others = [unit.nbytes for unit in self.units if not unit.stays]
        del self.buffer  # before the next one is made
        self.buffer = torch.empty(buffer_size(others), dtype=torch.uint8, device=self.device)

    @torch.inference_mode(False)
    def bring(self, unit: Unit) -> None:
        """Before its module runs: wait until a unit is there, and send for those after it."""
        if self.running is not None:  # it was broken off
            self.release(self.running)
        self.after[self.last] = self.last = unit
        if unit.memory is None:
            self.drop()
            self.send(unit)
        if unit.job is not None:
            try:
                unit.job.wait()
            except Exception:
                self.forget(unit)
                unit.host = None  # not what the file has
                raise
            unit.job = None
            if self.side is not None:
                self.copy(unit)
        if not unit.there:
            if self.side is not None:
                torch.cuda.current_stream(self.device).wait_event(unit.copied)
            unit.show(self.device)
        if not unit.stays:
            self.running = unit
        self.ahead()

    @torch.inference_mode(False)
    def release(self, unit: Unit) -> None:
        """After its module ran: make room for the next."""
        self.running = None
        if not unit.stays:
            self.forget(unit)
            self.ahead()

    def ahead(self) -> None:
        """Send for what comes next, as far as there is room."""
        unit = self.newest
        for _ in self.units:
            unit = self.after[unit]
            if unit.memory is None and not self.send(unit):
                return

    def send(self, unit: Unit) -> bool:
        """Begin to bring a unit in; False where there is no room."""
        if unit.stays:
            unit.memory = torch.empty(unit.nbytes, dtype=torch.uint8, device=self.device)
        else:
            taken = sorted(self.spans.values())
            starts = [0, *(end for _, end in taken)]
            free = [start for start, (end, _) in zip(starts, [*taken, (self.buffer.nbytes, 0)], strict=True)
                    if start + unit.nbytes <= end]  # fmt: skip
            if not free:
                return False
            self.spans[unit] = free[0], free[0] + unit.nbytes
            unit.memory = self.buffer[slice(*self.spans[unit])]
        self.newest = unit
        if self.side is None:
            unit.job = unit.read(self.reader, unit.memory)
        elif unit.host is None:
            unit.host = torch.empty(unit.nbytes, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
            unit.job = unit.read(self.reader, unit.host)
        else:
            self.copy(unit)
        return True

    def copy(self, unit: Unit) -> None:
        """From the host's memory to the GPU's, once what has been sent to the GPU is done with the place."""
        assert self.side is not None and unit.memory is not None and unit.host is not None
        self.side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.side):
            unit.memory.copy_(unit.host, non_blocking=True)
            unit.copied = self.side.record_event()
        if unit.stays:
            unit.host = None

    def forget(self, unit: Unit) -> None:
        """Give a unit's memory back."""
        unit.memory = unit.job = None
        self.spans.pop(unit, None)
        if unit.there:
            unit.show(self.device)

    def drop(self) -> None:
        """Wait until nothing is on its way, and forget what was sent for into the buffer."""
        for unit in self.units:
            if unit.job is not None:
                unit.job.done.wait()
                if unit.job.error is not None:
                    self.forget(unit)
                    unit.host = None
        if self.side is not None:  # whoever gets this memory next must not find a copy still writing there
            torch.cuda.current_stream(self.device).wait_stream(self.side)
        for unit in list(self.spans):
            self.forget(unit)


class Rows:
    """Brings in the rows of an embedding that a forward's tokens need; the matrix stays in its file."""

    def __init__(self, module: nn.Embedding, entry: Entry, dtype: torch.dtype, device: torch.device):
        self.entry, self.dtype, self.device = entry, dtype, device
        self.empty = nn.Parameter(absent(entry.shape, dtype, device), requires_grad=False)
        module._parameters["weight"] = self.empty
        module.padding_idx = None  # would be a row of what is brought in; it matters to gradients only
        self.file = os.open(entry.path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.file)
        module.register_forward_pre_hook(self.bring)
        module.register_forward_hook(self.release)

    def bring(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Put the rows in, and give the tokens their numbers among them."""
        ids, places = args[0].unique(return_inverse=True)
        count, width = self.entry.shape
        if ids.numel() and not 0 <= int(ids[0]) <= int(ids[-1]) < count:
            raise IndexError(f"token {int(ids[-1])} of {count}")
        rows = torch.empty(len(ids), width, dtype=self.entry.dtype)
        size = width * rows.element_size()
        view = memoryview(rows.view(torch.uint8).view(-1).numpy())  # type: ignore[arg-type]
        for place, token in enumerate(ids.tolist()):
            row = view[place * size : (place + 1) * size]
            if os.preadv(self.file, [row], self.entry.start + token * size) < size:
                raise UserError(f"{self.entry.path}: the file ends inside a tensor; copy or download it again")
        module._parameters["weight"] = nn.Parameter(rows.to(self.device, self.dtype), requires_grad=False)
        return (places, *args[1:])

    def release(self, module: nn.Module, args: Any, out: Tensor) -> None:
        module._parameters["weight"] = self.empty
