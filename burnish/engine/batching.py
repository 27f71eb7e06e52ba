"""Continuous batching: requests join and leave between steps, their keys and values in pages of one pool.

A step is one forward (Orca, OSDI 2022, section 3.1) over the next token of every request that is writing and, in what
is left of `max_batch_tokens`, a chunk of every prompt that is being read, in equal shares: a long prompt holds up
neither the replies nor the short prompts (chunked prefill, Sarathi-Serve, arXiv 2403.02310, section 4). Requests are
admitted in their order, each when the pool has room for what it has to read. Where the pool runs full, the youngest
goes back to the front of the queue and reads its tokens again later (arXiv 2309.06180, section 4.5); the oldest always
goes on, so that all come to an end. Blocks of equal beginnings are shared.

A reply is the one that the request would get alone by `generate`, but for ties that rounding decides. So is a failure:
what goes wrong over one request's logits or text ends that one, and what goes wrong over all of a step is its caller's,
who may take it again.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from queue import SimpleQueue
from types import EllipsisType
from typing import Literal
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from burnish import chain
from burnish.chain import Model
from burnish.config import Bytes, UserError, option
from burnish.engine.blocks import Blocks
from burnish.engine.chooser import Chooser, not_numbers
from burnish.engine.decoding import LOOPS, GenerationConfig
from burnish.engine.generate import PLAIN, Prompt, rows_of
from burnish.engine.reply import Piece, Row, batch_of, ends_of
from burnish.engine.request import Request
from burnish.model.cache import Prefix
from burnish.model.pages import Pages, Step, View
from burnish.model.transformer import Transformer
from burnish.place.fused import Stepper, stepper_of, stepping


@dataclass(frozen=True)
class BatchConfig:
    """How requests share a model. Raises UserError for a number that makes no sense."""

    kv_memory: Bytes = option(1 << 30, "bytes of all keys and values together, taken from the start")
    kv_cache_dtype: Literal["auto", "int8"] = option("auto", "keys and values as the model computes them, or in 8 bits")
    block_size: int = option(16, "tokens of a block of keys and values; full ones are shared")
    max_batch_size: int = option(16, "most requests that run at once")
    max_batch_tokens: int = option(512, "most tokens of a step: prompts are read in chunks")

    def __post_init__(self) -> None:
        for name in ("kv_memory", "block_size", "max_batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: must be at least 1, is {getattr(self, name)}")
        if self.kv_cache_dtype not in ("auto", "int8"):
            raise UserError(f"kv_cache_dtype: must be auto or int8, is {self.kv_cache_dtype!r}")
        if self.max_batch_tokens < self.max_batch_size:
            raise UserError(
                f"max_batch_tokens: {self.max_batch_tokens} are too few for a token of each of"
                f" max_batch_size={self.max_batch_size} requests; raise it"
            )


class Batcher:
    """Requests of one model, which is in evaluation mode from now on and not to be changed meanwhile.

    `submit` may be called from any thread, beside a `step`. Steps are taken by whoever reads a request's pieces, or by
    a loop over `step`.
    """

    def __init__(self, model: Model, config: BatchConfig = BatchConfig()):
        """Takes the pool's memory. Raises UserError for a model without pages, and where not one block fits."""
        spec = model.spec
        if not isinstance(model.net, Transformer) or spec.paired or not spec.generates:
            raise UserError(
                f"model: a {spec.family} {spec.kind} with the head '{spec.head}' has no pages to batch requests over;"
                " decoders of burnish's own families have; use generate"
            )
        dtype, int8 = model.net.dtype, config.kv_cache_dtype == "int8"
        size = Pages.bytes_of(spec, config.block_size, dtype, int8)
        if config.kv_memory < size:
            raise UserError(
                f"kv_memory: {config.kv_memory} bytes hold no block of {config.block_size} tokens, which takes {size};"
                " raise it, or lower block_size"
            )
        self.model, self.config, self.blocks = model, config, Blocks(config.kv_memory // size)
        self.pages = Pages(spec, self.blocks.count, config.block_size, dtype, model.device, int8)
        self.lock = threading.RLock()
        self.numbers = itertools.count()
        self.arrived: SimpleQueue[Request] = SimpleQueue()
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in the order of their numbers
        self.choosers: WeakValueDictionary[str, Chooser] = WeakValueDictionary()
        self.stepper: Stepper | None = None
        model.net.eval()

    def submit(
        self, prompt: Prompt, config: GenerationConfig = PLAIN, adapter: str | EllipsisType | None = ...
    ) -> Request:
        """Queue a prompt; `adapter` names one of those loaded, None the bare base, and without it the active one.

        Raises UserError for what `generate` refuses, for another loop than the plain one, and for a request that the
        pool could never hold.
        """
        for name, (off, words) in LOOPS.items():
            if getattr(config, name) != off:
                raise UserError(f"{name}: {words} does not run in a batch of requests; use generate")
        row = rows_of(self.model, [prompt], config, None if isinstance(adapter, EllipsisType) else [adapter])[0]
        row.index, row.name = next(self.numbers), "prompt"
        prefix, shown = self._prefix(row)
        ends, key = ends_of(self.model, config), repr(config)
        chooser = self.choosers.get(key) or Chooser(self.model, config, ends)
        self.choosers[key] = chooser
        request = Request(self, row, chooser, ends, prefix.size - shown if prefix else 0, shown)
        most = len(request.ids) + config.max_new_tokens - 1  # the last token is not fed
        if self._blocks_for(most) > self.blocks.count:
            size = self.config.block_size
            raise UserError(
                f"prompt: {len(request.ids)} tokens and max_new_tokens={config.max_new_tokens} need"
                f" {self._blocks_for(most)} blocks of {size} tokens, and kv_memory={self.config.kv_memory} holds"
                f" {self.blocks.count}; raise it, shorten the prompt or lower max_new_tokens"
            )
        self.arrived.put(request)
        return request

    @property
    def busy(self) -> bool:
        """Whether there is something for `step` to do."""
        return bool(self.running or self.waiting or not self.arrived.empty())

    @torch.inference_mode()
    def step(self) -> list[Piece]:
        """Advance every request that runs: a token of its reply, or a chunk of its prompt. Gives the new pieces, none
        where nothing is to be done. A request that fails gives none, and its reader the error. Where the step itself
        raises, it may be taken again."""
        with self.lock:
            while not self.arrived.empty():
                self.waiting.append(self.arrived.get())
            for request in [*self.running, *self.waiting]:
                if request.cancelled:
                    self._leave(request)
            if not self.running:  # the network stays as it is until all that run are done
                self.stepper = stepper_of(self.model.net)
            self._admit()
            feeds = self._plan()
            self._make_room(feeds)
            if not feeds:
                return []
            states = self._forward(feeds)
            ends = dict(zip(feeds, itertools.accumulate(feeds.values()), strict=True))
            for request, count in feeds.items():
                if request.left > 1:
                    self._check_read(request, states[ends[request] - count : ends[request]])
            ready = [request for request, count in feeds.items() if count == request.left and not request.over]
            tokens = self._choose(ready, states[[ends[request] - 1 for request in ready]]) if ready else {}
            for request, count in feeds.items():  # from here on nothing can fail but a request alone
                if not request.over:
                    self._advance(request, request.fed + count)
            pieces = list[Piece]()
            for request, token in tokens.items():
                with self._alone(request):
                    pieces.append(self._push(request, token))
            return pieces

    @contextmanager
    def _alone(self, request: Request) -> Iterator[None]:
        """What is raised inside is the request's own, which leaves with it."""
        try:
            yield
        except Exception as error:
            request.error = error
            self._leave(request)

    def _check_read(self, request: Request, states: Tensor) -> None:
        """Let a request fail whose states (tokens, hidden) of what it read are NaN, before its blocks are known: under
        a mask, NaN reaches the tokens before it too, and so blocks that others would take for theirs."""
        with self._alone(request):
            if states.isnan().any():
                raise not_numbers(request.row, len(request.row.ids))

    def _leave(self, request: Request) -> None:
        (self.running if request in self.running else self.waiting).remove(request)
        self._free(request)
        request.over = True

    def _free(self, request: Request) -> None:
        while request.table:  # the end first: beginnings are what others may want
            self.blocks.release(request.table.pop())
        request.fed = 0

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.config.block_size)

    def _admit(self) -> None:
        """Let requests in, in their order, as long as there is room for what all have to read, equal blocks once, and
        for a block more of each."""
        size = self.config.block_size
        while self.waiting and len(self.running) < self.config.max_batch_size:
            request = self.waiting[0]
            self._adopt(request)
            together = [*self.running, request]
            full = {each.name(i) for each in together for i in range(len(each.table), len(each.ids) // size)}
            if self.running and self.blocks.available < len(full) + len(together):
                self._free(request)
                return
            self.waiting.popleft()
            self.running.append(request)
            if request.fed < request.prefix:
                with self._alone(request):
                    prefix, shown = self._prefix(request.row)
                    assert prefix is not None
                    self._fit(request, shown)
                    View(self.pages, [request.table], [shown], shown - request.fed, [shown]).load(prefix)
                    self._advance(request, shown)

    def _prefix(self, row: Row) -> tuple[Prefix | None, int]:
        """The keys and values that techniques put before a row, and how many of the last it sees."""
        with torch.inference_mode():
            batch, size = batch_of(self.model, [row])
            if not size:
                return None, 0
            prefix = [hook(batch) for hook in chain.hooks(self.model, "initial_cache")][-1]
            return prefix, size if prefix.lengths is None else int(prefix.lengths[0, 0])

    def _adopt(self, request: Request) -> None:
        """Take over the blocks known to hold what the request is to read next; its last token stays to be fed."""
        size = self.config.block_size
        while request.fed == len(request.table) * size and request.fed + size < len(request.ids):
            block = self.blocks.find(request.name(len(request.table)))
            if block is None:
                return
            request.table.append(block)
            request.fed += size

    def _fit(self, request: Request, tokens: int) -> bool:
        """Whether blocks for so many of the request's tokens were to be had; it holds those that were."""
        while len(request.table) < self._blocks_for(tokens):
            block = self.blocks.take()
            if block is None:
                return False
            request.table.append(block)
        return True

    def _make_room(self, feeds: dict[Request, int]) -> None:
        """Give every request blocks for what it is fed, the oldest first; the youngest go back where there are none."""
        for request in list(self.running):
            while request in self.running and not self._fit(request, request.fed + feeds.get(request, 0)):
                youngest = self.running.pop()
                feeds.pop(youngest, None)
                self._free(youngest)
                self.waiting.appendleft(youngest)

    def _plan(self) -> dict[Request, int]:
        """How many tokens of which request to feed, the fewest first."""
        size, coming, reading = self.config.block_size, set[bytes](), list[Request]()
        for request in self.running:
            self._adopt(request)
            if request.left == 1:
                continue
            number, full = request.fed // size, len(request.ids) // size
            wanted = request.name(number) if not request.fed % size and number < full else b""
            if wanted not in coming:  # else an older request is computing just that
                reading.append(request)
                coming |= {request.name(i) for i in range(number, full)}
        feeds = {request: 1 for request in self.running if request.left == 1}
        room = self.config.max_batch_tokens - len(feeds)
        for done, request in enumerate(sorted(reading, key=lambda request: request.left)):
            count = min(request.left, room // (len(reading) - done))  # at least 1: there are fewer than room
            feeds[request] = count
            room -= count
        return dict(sorted(feeds.items(), key=lambda feed: feed[1]))

    def _forward(self, feeds: dict[Request, int]) -> Tensor:
        """The states (tokens, hidden) of what the requests are fed, one's after the other's."""
        single = [request for request, count in feeds.items() if count == 1]
        groups = [(single, 1)] * bool(single) + [([request], count) for request, count in feeds.items() if count > 1]
        views = []
        for requests, count in groups:
            ends = [request.fed + count for request in requests]
            tables, prefixes = [request.table for request in requests], [request.prefix for request in requests]
            views.append(View(self.pages, tables, ends, count, prefixes))
        ids, slots, adapters = list[int](), list[int](), list[int]()
        for request, count in feeds.items():
            ids += request.ids[request.fed : request.fed + count]
            slots += request.slots[request.fed : request.fed + count]
            adapters += [request.row.adapter] * count
        device = self.model.device
        batch = {"input_ids": torch.tensor([ids], device=device)}
        if max(slots) >= 0:
            batch["slots"] = torch.tensor([slots], device=device)
        if self.model.adapters is not None:
            batch["adapter_ids"] = torch.tensor(adapters, device=device)
        fast = all(request.chooser.config.fused for request in feeds)
        with stepping(self.model.net, self.stepper, len(ids)) if fast else nullcontext():
            return chain.forward(self.model, batch, Step(views))[0]

    def _advance(self, request: Request, to: int) -> None:
        """Note that the positions before `to` are in the pool."""
        size = self.config.block_size
        before, request.fed = request.fed, to
        for number in range(before // size, to // size):
            self.blocks.publish(request.table[number], request.name(number))

    def _choose(self, requests: list[Request], states: Tensor) -> dict[Request, int]:
        """The next token of each request, from its states (requests, hidden); without those that fail over it."""
        logits = self.model.net.logits(states)
        groups: dict[tuple[int, int], list[int]] = {}
        for place, request in enumerate(requests):
            groups.setdefault((id(request.chooser), len(request.row.ids)), []).append(place)
        tokens: dict[Request, int] = {}
        for places in groups.values():
            group = [requests[place] for place in places]
            try:
                tokens |= self._tokens(group, logits[places])
            except Exception:  # whose it is shows one by one
                for request, line in zip(group, logits[places], strict=True):
                    with self._alone(request):
                        tokens |= self._tokens([request], line[None])
        return {request: tokens[request] for request in requests if request in tokens}

    def _tokens(self, requests: list[Request], logits: Tensor) -> dict[Request, int]:
        """The next tokens of requests with one chooser, whose replies are equally long."""
        first = requests[0]
        chosen = first.chooser(logits, [request.row for request in requests], len(first.row.ids))
        return dict(zip(requests, chosen.tolist(), strict=True))

    def _push(self, request: Request, token: int) -> Piece:
        """Add a token to a reply, and let the request leave where it ends."""
        piece = request.row.push(token, request.ends)
        request.ids.append(token)
        request.slots.append(-1)
        request.pieces.put(piece)
        if piece.done:
            self._leave(request)
        return piece
