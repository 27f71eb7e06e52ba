"""A prompt that a batcher continues: what stands at its positions, and the pieces that its readers get."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from burnish.engine.chooser import Chooser
from burnish.engine.reply import Ends, Generation, Piece, Row

if TYPE_CHECKING:
    from burnish.engine.batching import Batcher


class Request:
    """Iterating gives its pieces as they come, and takes steps where nobody else does; it raises what the request
    failed of. `ids` and `slots` tell what stands at each position: -1 a token, above a pseudo token, below a prefix."""

    def __init__(self, batcher: Batcher, row: Row, chooser: Chooser, ends: Ends, skipped: int, prefix: int):
        self.batcher, self.row, self.chooser, self.ends, self.prefix = batcher, row, chooser, ends, prefix
        example = row.example
        self.ids = [0] * prefix + example.ids
        self.slots = [-2 - skipped - i for i in range(prefix)] + (example.slots or [-1] * len(example.ids))
        self.names: list[bytes] = []
        self.table: list[int] = []
        self.fed = 0  # positions whose keys and values are in the pool
        self.cancelled = self.over = False
        self.error: Exception | None = None
        self.pieces: SimpleQueue[Piece] = SimpleQueue()

    @property
    def left(self) -> int:
        """Tokens to feed before the next one can be chosen."""
        return len(self.ids) - self.fed

    def name(self, block: int) -> bytes:
        """What a full block holds, by digest: its positions, all before them, and whose adapter they went through."""
        size = self.batcher.config.block_size
        for start in range(len(self.names) * size, (block + 1) * size, size):
            before = self.names[-1] if self.names else str(self.row.adapter).encode()
            held = array("q", self.ids[start : start + size] + self.slots[start : start + size])
            self.names.append(hashlib.blake2b(before + held.tobytes(), digest_size=16).digest())
        return self.names[block]

    def cancel(self) -> None:
        """Give up: the next step frees what it holds, and no more pieces come."""
        self.cancelled = True

    def __iter__(self) -> Iterator[Piece]:
        while True:
            with suppress(Empty):
                while True:
                    yield self.pieces.get_nowait()
            if self.over and self.pieces.empty():  # in this order: the last piece comes before the end
                if self.error is not None:
                    raise self.error
                return
            with self.batcher.lock:
                if self.pieces.empty() and not self.over:
                    self.batcher.step()

    def result(self) -> Generation | None:
        """The whole reply; None where the request was cancelled. Raises what the request failed of: UserError where
        its logits are not numbers."""
        for _ in self:
            pass
        return self.row.done
