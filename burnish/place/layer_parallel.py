"""Layer parallelism: consecutive layers lie on different devices or ranks, and hidden states move between them.

In one process the layers fill the devices in the order in which they are given, each up to its memory; embedding,
final norm and head lie on the first. Over ranks each has the layers that make the largest share of bytes smallest;
rank 0 has the embedding, the last the head. A batch is run in parts, so that a rank computes one while the next rank
computes the part before it (GPipe, arXiv 1811.06965, section 2.3). A layer's keys and values lie with it. Limits:
inference only; a part is at least `LEAST_TOKENS` tokens, since small products cost what reading their weights costs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from burnish.config import UserError
from burnish.model.attention import Frame
from burnish.model.linear import Linear, Unread
from burnish.model.seq2seq import CrossAttention, Seq2Seq
from burnish.model.transformer import Layer, Transformer
from burnish.place.ranks import Ranks

LEAST_TOKENS = 16


def stacks(net: Transformer) -> list[Transformer]:
    """The network, and the decoder of an encoder-decoder."""
    return [net, net.decoder] if isinstance(net, Seq2Seq) and net.decoder is not None else [net]


def nbytes(*modules: nn.Module | None) -> int:
    """Bytes of the modules' parameters, shared ones once."""
    found = {p for module in modules if module is not None for p in module.parameters()}
    return sum(p.numel() * p.element_size() for p in found)


def read(layer: nn.Module) -> nn.Module:
    """The layer with its weights read that are still in their files."""
    for module in layer.modules():
        if isinstance(module, Linear) and isinstance(module.weight, Unread):
            module.weight = module.weight.shard(0, [(0, module.out_features)])
    return layer


class OverDevices:
    """Runs layers one after the other, each on its own device."""

    def __init__(self, layers: Sequence[nn.Module], devices: Sequence[torch.device]):
        self.layers, self.devices = layers, devices

    def __call__(self, x: Tensor, frames: Sequence[Frame]) -> Tensor:
        home = x.device
        moved: dict[tuple[int, torch.device], Frame] = {}
        for layer, device, frame in zip(self.layers, self.devices, frames, strict=True):
            key = id(frame), device
            if key not in moved:
                moved[key] = frame.on(device)
            x = layer(x.to(device), moved[key])
        return x.to(home)


def fill_devices(sizes: Sequence[int], rest: int, memory: Mapping[str, int]) -> list[str]:
    """The device of each layer, of `sizes` bytes: as many as it has room for, in the order of `memory`, after `rest`
    bytes on the first. Raises UserError where something does not fit."""
    names = list(memory)
    room = dict(memory)
    room[names[0]] -= rest
    if room[names[0]] < 0:
        raise UserError(
            f"max_memory: embedding and head take {_gb(rest)} and {names[0]} has {_gb(memory[names[0]])}; "
            "give it more, or name a larger device first"
        )
    if max(memory.values()) < max(sizes):
        raise UserError(f"max_memory: a layer takes {_gb(max(sizes))}, more than any device; give one of them more")
    found: list[str] = []
    for size in sizes:
        while names and room[names[0]] < size:
            names.pop(0)
        if not names:
            raise UserError(
                f"max_memory: the model takes {_gb(rest + sum(sizes))} and the devices have room for {len(found)} of "
                f"{len(sizes)} layers; give them more, or load it quantised"
            )
        room[names[0]] -= size
        found.append(names[0])
    return found


def _gb(count: int) -> str:
    return f"{count / 1e9:.3g} GB"


def over_devices(net: Transformer, memory: Mapping[str, int]) -> list[str]:
    """Put the layers on the devices of `memory` (bytes by name, the network's own first); each layer's device."""
    layers: list[nn.Module] = [layer for stack in stacks(net) for layer in stack.layers]
    sizes = [nbytes(layer) for layer in layers]
    found = fill_devices(sizes, nbytes(net) - sum(sizes), memory)
    for layer, name in zip(layers, found, strict=True):
        read(layer).to(name)
    devices = [torch.device(name) for name in found]
    for stack in stacks(net):
        own, devices = devices[: len(stack.layers)], devices[len(stack.layers) :]
        stack.run_layers = OverDevices(list(stack.layers), own)
    return found


class OverRanks:
    """Runs the layers that are here, between the ranks before and after; the last states reach all ranks."""

    def __init__(self, layers: Sequence[Layer], ranks: Ranks):
        self.layers, self.ranks = layers, ranks

    def __call__(self, x: Tensor, frames: Sequence[Frame]) -> Tensor:
        ranks, frame = self.ranks, frames[0]
        self.keep_source(frame)
        x = x.clone(memory_format=torch.contiguous_format)
        bounds = parts(frame, ranks.world)
        pieces = list(x.split([end - start for _, start, end in bounds]))  # views, filled in place
        begun = [ranks.receive(piece) for piece in pieces] if ranks.rank else []
        sent = []
        kinds = {id(kind): kind for kind in frames}
        for at, (rows, _, _) in enumerate(bounds):
            if begun:
                ranks.wait(begun[at])
            split = {key: kind.part(rows) for key, kind in kinds.items()}
            y = pieces[at]
            for layer in self.layers:
                y = layer(y, split[id(frames[layer.index])])
            if ranks.rank < ranks.last:
                y = y.contiguous()
                sent.append((ranks.send(y), y))  # which must live until it is sent
            else:
                pieces[at].copy_(y)
        for work, _ in sent:
            ranks.wait(work)
        return ranks.from_last(x)

    def keep_source(self, frame: Frame) -> None:
        """Compute a source's keys and values for all rows at once where the cache keeps them."""
        if frame.source is None or not frame.source.kept:
            return
        for layer in self.layers:
            attention: CrossAttention = layer.cross_attn  # type: ignore[assignment]
            if layer.index not in frame.source.keys:
                attention.read(frame.source, next(attention.parameters()).device)


def parts(frame: Frame, world: int) -> list[tuple[slice, int, int]]:
    """The rows of each part of a batch, and where its tokens begin and end among the real ones."""
    tokens = frame.batch * frame.length
    count = max(min(world, frame.batch, tokens // LEAST_TOKENS), 1)
    edges = [frame.batch * at // count for at in range(count + 1)]
    ends = [edge * frame.length for edge in edges]
    if frame.real is not None:
        ends = torch.searchsorted(frame.real, torch.tensor(ends, device=frame.real.device)).tolist()
    return [(slice(*rows), *tokens) for rows, tokens in zip(pairwise(edges), pairwise(ends), strict=True)]


class Elsewhere(nn.Embedding):
    """An embedding that another rank has; gives zeros of its shape."""

    def __init__(self, weight: Tensor):
        super().__init__(0, weight.shape[1], _weight=weight.detach()[:0].clone(), _freeze=True)

    def forward(self, input: Tensor) -> Tensor:
        return self.weight.new_zeros(*input.shape, self.embedding_dim)


class OnLast(nn.Module):
    """A head that the last rank has; its outputs (tokens, width) reach all ranks."""

    def __init__(self, base: nn.Module, width: int, ranks: Ranks):
        super().__init__()
        self.width, self.ranks = width, ranks
        self.base = base if ranks.rank == ranks.last else None

    def forward(self, x: Tensor) -> Tensor:
        y = x.new_empty(len(x), self.width) if self.base is None else self.base(x).contiguous()
        return self.ranks.from_last(y)


def balanced(sizes: Sequence[int], world: int, first: int = 0, last: int = 0) -> list[range]:
    """Consecutive layers for every rank, at least one, so that the largest sum of `sizes` is smallest; the first and
    the last rank hold so much beside them."""
    count = len(sizes)
    before = [0]
    for size in sizes:
        before.append(before[-1] + size)
    worst = {0: (0, [0])}  # layers dealt out so far -> the largest share at best, and where the shares begin
    for rank in range(world):
        extra = (first if rank == 0 else 0) + (last if rank == world - 1 else 0)
        ends = range(rank + 1, count - (world - 1 - rank) + 1) if rank < world - 1 else (count,)
        worst = {
            end: min(
                (max(share, before[end] - before[start] + extra), [*edges, end])
                for start, (share, edges) in worst.items()
                if start < end
            )
            for end in ends
        }
    return [range(*pair) for pair in pairwise(worst[count][1])]


def over_ranks(net: Transformer, ranks: Ranks) -> None:
    """Leave this rank's layers here, and the embedding or the head where they are its own.

    Raises UserError where there are more ranks than layers.
    """
    rank, world = ranks.rank, ranks.world
    fewest = min(len(stack.layers) for stack in stacks(net))
    if world > fewest:
        raise UserError(f"layer_parallel: {world} ranks for a model of {fewest} layers; start at most {fewest}")
    head = net.lm_head if net.lm_head is not None else net.score
    first, last = nbytes(net.embed_tokens), nbytes(*net.head_modules())
    for stack in stacks(net):
        sizes = [nbytes(layer) for layer in stack.layers]
        own = balanced(sizes, world, first, last)[rank]
        stack.layers = nn.ModuleList(read(stack.layers[index]) for index in own)
        stack.run_layers = OverRanks(list(stack.layers), ranks)  # type: ignore[arg-type]
        if rank:
            stack.embed_tokens = Elsewhere(net.embed_tokens.weight) if stack is net else net.embed_tokens
    if rank < ranks.last:
        net.head_transform = net.pooler = None
    if head is not None:
        name, width = ("lm_head", net.spec.vocab_size) if head is net.lm_head else ("score", net.spec.num_labels)
        setattr(net, name, OnLast(head, width, ranks))
