"""The fast path of decoding on a GPU: a step of one token a row through the whole network as one CUDA graph.

Run as modules, a step is some hundred launches, and the host needs longer for them than the GPU for the weights. A
graph is launched at once, and whatever it does has fixed shapes and addresses: keys and values lie in storage that
stays (`Room`), the slot that is written is a number on the device, attention goes over the first 256, 512, 1024, ...
slots, and masks made on the device hide what is not filled. A graph is captured for each number of rows and of slots.
Many steps pay torch.compile besides, which puts what stands between the products, and the expansion of quantised
weights for one row, into few kernels; a layer is compiled once, not all of them. The step also gives the likeliest
tokens, so that greedy replies go on before the host has read them.

The step is the network's own code over another cache; what it does not know (several tokens, a pattern of blocks,
wrappers, hooks, layers elsewhere) goes the ordinary way over the same storage, in any order. The ideas are those of
gpt-fast (`generate.py`, "Accelerating Generative AI with PyTorch II") and transformers' `StaticCache`. Limits: greedy
steps are sent off one ahead, so that one is in vain at the end; a batch's keys and values lie twice in memory for as
long as they move to the room. On a CPU, where tests run it, a step is the same without a graph.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache as once
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from burnish.compress.four_bit import FourBit
from burnish.compress.fp4 import FP4
from burnish.compress.fp8 import FP8
from burnish.compress.gguf import GGUF, Table
from burnish.compress.grouped import Grouped
from burnish.compress.int8 import Int8
from burnish.compress.nf4 import NF4
from burnish.model.attention import Attention, Frame
from burnish.model.cache import KVCache
from burnish.model.linear import Dense, Linear
from burnish.model.network import Network
from burnish.model.norm import CentredNorm, Norm
from burnish.model.patterns import Window
from burnish.model.transformer import MLP, CappedLinear, Layer, Transformer
from burnish.tune.adapters import Adapter
from burnish.tune.ia3 import Scaled
from burnish.tune.lora import LoRALinear

SLOTS = 256  # that the smallest graph looks at
COMPILES_FROM = 512  # steps that are expected; compiling takes some seconds, as long as so many uncompiled ones
KNOWN = (
    Layer, Attention, MLP, Linear, CappedLinear, Norm, CentredNorm, nn.Embedding, nn.ModuleList, nn.ModuleDict, Table,
    Dense, Int8, NF4, FP4, FP8, Grouped, GGUF, LoRALinear, Scaled, Adapter,
)  # fmt: skip


class Next(NamedTuple):
    """What follows each row: the likeliest `tokens` (B,), -1 where logits are NaN, and `logits` (B, V), which the next
    step overwrites."""

    tokens: Tensor
    logits: Tensor


@contextmanager
def graphed(net: Network, steps: int) -> Iterator[None]:
    """Give the network its `step` inside the block, where it can have one; about so many are expected.

    Weights stay where they are in it.
    """
    if not knows(net):
        yield
        return
    net.step = Stepper(net, steps >= COMPILES_FROM)  # type: ignore[arg-type]
    try:
        yield
    finally:
        net.step = None
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the last step may be in vain, and its graph goes now


def knows(net: Network) -> bool:
    """Whether all of a network is code that asks nothing of the host, on one device."""
    if type(net) is not Transformer or net.run_layers is not None or not isinstance(net.pattern, Window | None):
        return False
    if not net.spec.causal or not net.spec.generates or len({p.device for p in net.parameters()}) > 1:
        return False
    others = set(net.techniques.modules())
    for part in (net, *(part for part in net.modules() if part not in others)):
        hooked = part._forward_hooks or part._forward_pre_hooks
        if hooked or (part is not net and type(part) not in KNOWN) or getattr(part, "threshold", False):
            return False
    return True


class Lane:
    """One layer's keys and values (B, kv_heads, S, head_dim), a token of which is written at `slot` (1,)."""

    def __init__(self, keys: Tensor, values: Tensor, slot: Tensor):
        self.keys, self.values, self.slot = keys, values, slot

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self.slot, keys)
        self.values.index_copy_(2, self.slot, values)
        return self.keys, self.values

    def attend(self, layer: int, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
        """As a `KVCache`'s. The heads that share keys are the rows of one product, so that keys are not repeated."""
        keys, values = self.update(layer, keys, values)
        batch, heads, _, size = q.shape
        shared = keys.shape[1]
        scores = (q.reshape(batch, shared, heads // shared, size) @ keys.transpose(2, 3)) * scale
        if mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, float("-inf"))
        else:
            scores = scores + mask.expand(-1, heads, -1, -1).reshape(-1, shared, heads // shared, mask.shape[3])
        wide = torch.promote_types(scores.dtype, torch.float32)
        return (scores.softmax(-1, dtype=wide).to(q.dtype) @ values).reshape(batch, 1, heads, size)


class Static(KVCache):
    """A cache whose length is that of its storage and whose one new token has its place on the device, `slot` (1,).

    What lies at or behind it is not there, so that a step may be repeated.
    """

    holes = True  # type: ignore[assignment]

    def __init__(self, valid: Tensor, positions: Tensor, slot: Tensor, prefix: int):
        self.valid, self.positions, self.slot, self.prefix = valid, positions, slot, prefix
        self.source = None

    @property
    def length(self) -> int:  # type: ignore[override]
        return self.valid.shape[1]

    def newest(self, count: int) -> Tensor:
        return self.slot

    def next_positions(self) -> Tensor:
        slots = torch.arange(self.length, device=self.valid.device)
        past = torch.where(self.valid & (slots < self.slot), self.positions, -1)
        return past.max(dim=1).values + 1

    def reserve(self, valid: Tensor | None, positions: Tensor) -> None:
        self.valid.index_fill_(1, self.slot, True)
        self.positions.index_copy_(1, self.slot, positions)


class Room:
    """Storage for the caches of some number of rows, one after the other, and the graphs over it."""

    def __init__(self, net: Transformer, rows: int, capacity: int):
        self.most = -(-capacity // SLOTS) * SLOTS
        with torch.inference_mode(False):
            self.cache = own = net.new_cache(rows, self.most + 1)  # no part is the whole: torch would compile anew
            own.valid, own.positions = own.valid[:, :-1], own.positions[:, :-1]
            for kept in (own.keys, own.values):
                kept.update({layer: x[:, :, :-1] for layer, x in kept.items()})
            device = own.valid.device
            self.ids = torch.zeros(rows, 1, dtype=torch.long, device=device)
            self.slot = torch.zeros(1, dtype=torch.long, device=device)
        self.graphs: dict[tuple[int, int], Callable[[], Next]] = {}  # by slots, and slots of the prefix
        self.guest: Callable[[], KVCache | None] = lambda: None

    def take(self, cache: KVCache) -> None:
        """Let `cache` lie here from now on; who was here before keeps a copy."""
        own, before = self.cache, self.guest()
        if before is cache and cache.valid is own.valid:
            return
        if before is not None and before.valid is own.valid:
            before.select(torch.arange(len(own.valid), device=own.valid.device))
        filled = cache.length
        for layer, keys in own.keys.items():
            keys[:, :, :filled] = cache.keys[layer][:, :, :filled]
            own.values[layer][:, :, :filled] = cache.values[layer][:, :, :filled]
        own.positions[:, :filled] = cache.positions[:, :filled]
        own.valid[:, :filled] = cache.valid[:, :filled]
        own.valid[:, filled:] = False
        cache.keys, cache.values = dict(own.keys), dict(own.values)
        cache.valid, cache.positions = own.valid, own.positions
        self.guest = weakref.ref(cache)

    def lanes(self, slots: int) -> list[Lane]:
        found = []
        for keys, values in zip(self.cache.keys.values(), self.cache.values.values(), strict=True):
            found.append(Lane(keys[:, :, :slots], values[:, :, :slots], self.slot))
        return found


class Stepper:
    """Takes the last tokens of rows one step on; None where the ordinary way has to."""

    def __init__(self, net: Transformer, compiled: bool):
        self.net, self.compiled = net, compiled
        self.rooms: dict[int, Room] = {}  # by rows
        self.off = False

    def __call__(self, ids: Tensor, cache: KVCache) -> Next | None:
        """ids (B, 1) behind what the cache holds. The cache's storage may be another afterwards."""
        if self.off or type(cache) is not KVCache or not cache.length or ids.shape[1] != 1 or torch.is_grad_enabled():
            return None
        rows, end = len(ids), cache.length + 1
        room = self.rooms.get(rows)
        try:
            if room is None or room.most < max(end, cache.capacity):
                self.rooms.pop(rows, None)
                room = self.rooms[rows] = Room(self.net, rows, max(end, cache.capacity))
            room.take(cache)
            room.ids.copy_(ids)
            room.slot.fill_(cache.length)
            run = self.graph(room, end, cache.prefix)
        except Exception as error:  # of a compiler, a driver, or the memory: any
            warnings.warn(f"decoding goes on without CUDA graphs: {reason(error)}", stacklevel=2)
            self.off, self.rooms = True, {}
            return None
        found = run()
        cache.length = end
        return Next(found.tokens.clone(), found.logits)

    def graph(self, room: Room, end: int, prefix: int) -> Callable[[], Next]:
        """A step over the slots before `end`, captured if need be."""
        slots = SLOTS
        while slots < end:
            slots *= 2
        slots = min(slots, room.most)
        if (slots, prefix) not in room.graphs:
            room.graphs[slots, prefix] = self.captured(room, slots, prefix)
        return room.graphs[slots, prefix]

    def captured(self, room: Room, slots: int, prefix: int) -> Callable[[], Next]:
        valid, positions = (x[:, :slots] for x in (room.cache.valid, room.cache.positions))
        cache, lanes, ids = Static(valid, positions, room.slot, prefix), room.lanes(slots), room.ids
        if self.compiled:
            for part in self.net.modules():
                if isinstance(part, FourBit):
                    part.tables()  # which the compiler finds, and cannot make
            try:
                return capture(lambda: step(self.net, ids, cache, lanes, compiled()), ids.device)
            except Exception as error:
                warnings.warn(f"decoding goes on without torch.compile: {reason(error)}", stacklevel=2)
                self.compiled = False
        return capture(lambda: step(self.net, ids, cache, lanes, PARTS), ids.device)


def enter(net: Transformer, ids: Tensor, cache: Static) -> tuple[Tensor, list[Frame]]:
    return net.enter(ids.clamp(min=0), cache=cache)  # what follows NaN, -1, is told when the host comes to read it


def through(layer: Layer, x: Tensor, mask: Tensor, rotary: tuple[Tensor, Tensor] | None, lane: Lane) -> Tensor:
    return layer(x, Frame(len(x), 1, mask, False, rotary, lane, None))  # type: ignore[arg-type]


def choose(net: Transformer, x: Tensor) -> Next:
    """The choice from the last states (B, hidden)."""
    logits = net.logits(x if net.norm is None else net.norm(x))
    tokens = torch.where(logits.isnan().any(-1), -1, logits.argmax(-1))
    return Next(tokens, logits)


PARTS = (enter, through, choose)


@once
def compiled() -> tuple[Any, ...]:
    """The parts of a step as torch.compile's, made when they are first called.

    Its search along coordinates is what lets it write products with one row as sums, into which it draws the expansion
    of a quantised weight.
    """
    options: dict[str, Any] = {"coordinate_descent_tuning": True}
    parts: list[Any] = [torch.compile(part, fullgraph=True, options=options) for part in PARTS]
    begin, pass_through, end = parts

    def first(net: Transformer, ids: Tensor, cache: Static) -> tuple[Tensor, list[Frame]]:
        varying(cache.valid, 0, 1), varying(cache.positions, 0, 1)
        x, frames = begin(net, varying(ids, 0), cache)
        for frame in frames:
            varying(frame.mask, 0, 3)
            for angles in frame.rotary or ():
                varying(angles, 0)
        return varying(x, 0), frames

    def layer(module: Layer, x: Tensor, mask: Tensor, rotary: tuple[Tensor, Tensor] | None, lane: Lane) -> Tensor:
        varying(lane.keys, 0, 2), varying(lane.values, 0, 2)
        return varying(pass_through(module, x, mask, rotary, lane), 0)

    return first, layer, end


def step(net: Transformer, ids: Tensor, cache: Static, lanes: list[Lane], parts: tuple[Any, ...]) -> Next:
    first, layer, last = parts
    x, frames = first(net, ids, cache)
    for module, frame, lane in zip(net.layers, frames, lanes, strict=True):
        x = layer(module, x, frame.mask, frame.rotary, lane)
    return last(net, x)


def varying(x: Any, *dims: int) -> Any:
    """x, of whose shape the compiler may expect more than one; a size of 1 stays what it is."""
    from torch._dynamo import maybe_mark_dynamic

    for dim in dims:
        if x.shape[dim] > 1:
            maybe_mark_dynamic(x, dim)
    return x


def capture(run: Callable[[], Next], device: torch.device) -> Callable[[], Next]:
    """`run` as one graph that is launched at each call; its results lie in the same memory each time."""
    if device.type != "cuda":
        run()
        return run
    with torch.cuda.device(device):
        main, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
        side.wait_stream(main)
        with torch.cuda.stream(side):
            for _ in range(2):  # the first compiles and fills caches, which a graph cannot
                run()
        main.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may do as they like
            found = run()

    def launch() -> Next:
        with torch.cuda.device(device):
            graph.replay()
        return found

    return launch


def reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
