"""Which blocks of a key-value pool are whose.

A block has users, or is idle, or is empty. Full blocks may be known by what they hold and what stands before it, so
that rows which begin alike share them; those without users stay known until the room is needed, the longest unused
going first (PagedAttention, arXiv 2309.06180, sections 4.3 to 4.5).
"""

from __future__ import annotations

from collections import OrderedDict


class Blocks:
    """`count` blocks by number, and their users."""

    def __init__(self, count: int):
        self.count = count
        self.users = [0] * count
        self.empty = list(range(count))
        self.idle: OrderedDict[int, None] = OrderedDict()  # known, without users, the longest unused first
        self.known: dict[bytes, int] = {}
        self.names: dict[int, bytes] = {}

    @property
    def available(self) -> int:
        return len(self.empty) + len(self.idle)

    def take(self) -> int | None:
        """A block with one user and nothing in it; None where all are in use."""
        if self.empty:
            block = self.empty.pop()
        elif self.idle:
            block, _ = self.idle.popitem(last=False)
            del self.known[self.names.pop(block)]
        else:
            return None
        self.users[block] = 1
        return block

    def find(self, name: bytes) -> int | None:
        """The block of that name, with one more user; None where none is known."""
        block = self.known.get(name)
        if block is not None:
            self.idle.pop(block, None)
            self.users[block] += 1
        return block

    def publish(self, block: int, name: bytes) -> None:
        """Make a full block known, unless another of that name is."""
        if self.known.setdefault(name, block) == block:
            self.names[block] = name

    def release(self, block: int) -> None:
        """One user less."""
        self.users[block] -= 1
        if not self.users[block]:
            if block in self.names:
                self.idle[block] = None
            else:
                self.empty.append(block)
