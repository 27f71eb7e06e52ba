"""Reading parts of files into memory past the page cache, several reads at a time.

Reads are direct (O_DIRECT) where the file system has them, so that what is read is not kept a second time in the page
cache. They take whole blocks of the file into a page-aligned buffer of their thread, from where the bytes are copied,
still in the processor's cache, to any place in memory. Elsewhere the page cache gives its pages back after each read.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Protocol

from torch import Tensor

from burnish.config import UserError

PIECE = 1 << 20  # bytes of one read
BLOCK = 4096  # no device's block is larger than a page
THREADS = 4  # each waits for the disk most of the time
BUFFERS = THREADS * PIECE


class Range(Protocol):
    """Bytes of a file, as the store's `Entry`."""

    @property
    def path(self) -> Path: ...
    @property
    def start(self) -> int: ...
    @property
    def end(self) -> int: ...


@dataclass
class Piece:
    """One read of whole blocks from `start` on, and what of it goes where: (offset in it, number of the target,
    offset there, bytes)."""

    path: Path
    start: int
    copies: list[tuple[int, int, int, int]] = field(default_factory=list)

    @property
    def needed(self) -> int:
        return max(offset + count for offset, _, _, count in self.copies)


def cut(ranges: Sequence[Range]) -> list[Piece]:
    """The reads that bring each range into the target of its number; ranges that lie near each other share reads."""
    pieces: list[Piece] = []
    for number, wanted in sorted(enumerate(ranges), key=lambda pair: (pair[1].path, pair[1].start)):
        at = wanted.start
        while at < wanted.end:
            last = pieces[-1] if pieces else None
            if last is None or last.path != wanted.path or not last.start <= at < last.start + PIECE:
                pieces.append(Piece(wanted.path, at // BLOCK * BLOCK))
            start = pieces[-1].start
            count = min(wanted.end, start + PIECE) - at
            pieces[-1].copies.append((at - start, number, at - wanted.start, count))
            at += count
    return pieces


class File:
    """A file opened for direct reads, or for plain ones where those are refused."""

    def __init__(self, path: Path):
        self.path, self.direct = path, hasattr(os, "O_DIRECT")
        try:
            self.handle = os.open(path, os.O_RDONLY | (os.O_DIRECT if self.direct else 0))
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self.direct, self.handle = False, os.open(path, os.O_RDONLY)

    def close(self) -> None:
        os.close(self.handle)

    def read(self, into: memoryview, start: int, needed: int) -> None:
        """Fill at least `needed` bytes of `into`, a page-aligned buffer, from `start` on."""
        blocks, done = into[: -(-needed // BLOCK) * BLOCK], 0
        while done < needed:
            done = done // BLOCK * BLOCK  # a read that was cut short goes on where a block begins
            try:
                count = os.preadv(self.handle, [blocks[done:]], start + done)
            except OSError as error:
                if error.errno != errno.EINVAL or not self.direct:
                    raise
                self.direct, old = False, self.handle
                self.handle = os.open(self.path, os.O_RDONLY)
                os.close(old)
                continue
            if not count or done + count < needed and count < BLOCK:
                raise UserError(f"{self.path}: the file ends inside a tensor; copy or download it again")
            done += count
        if not self.direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.handle, start, len(blocks), os.POSIX_FADV_DONTNEED)


class Job:
    """Reads that belong together; `finish` runs after the last one, in a thread of the reader."""

    def __init__(self, targets: Sequence[Tensor], left: int, finish: Callable[[], None]):
        self.targets, self.left, self.finish = targets, left, finish
        self.lock, self.done = threading.Lock(), threading.Event()
        self.error: Exception | None = None

    def run(self, piece: Piece, files: dict[Path, File], buffer: memoryview, address: int) -> None:
        try:
            if piece.path not in files:
                files[piece.path] = File(piece.path)
            files[piece.path].read(buffer, piece.start, piece.needed)
            for offset, number, to, count in piece.copies:
                ctypes.memmove(self.targets[number].data_ptr() + to, address + offset, count)
        except OSError as error:
            self.error = UserError(f"{piece.path}: cannot be read: {error.strerror}")
        except Exception as error:
            self.error = error
        with self.lock:
            self.left -= 1
            last = not self.left
        if last:
            try:
                self.finish()
            except Exception as error:
                self.error = error
            del self.targets, self.finish  # a waiting thread still holds the job
            self.done.set()

    def wait(self) -> None:
        """Until everything is read. Raises what went wrong, a UserError where a file could not be read."""
        self.done.wait()
        if self.error is not None:
            raise self.error


class Reader:
    """Threads that read the pieces of jobs in their order; they end with the reader, or before the interpreter does."""

    def __init__(self) -> None:
        self.tasks: SimpleQueue[tuple[Job, Piece] | None] = SimpleQueue()
        threads = [threading.Thread(target=_work, args=(self.tasks,), daemon=True) for _ in range(THREADS)]
        for thread in threads:
            thread.start()
        weakref.finalize(self, _end, self.tasks, threads)

    def read(self, pieces: Sequence[Piece], targets: Sequence[Tensor], finish: Callable[[], None]) -> Job:
        """Begin to fill the targets (uint8) by the pieces that `cut` gave for them."""
        job = Job(targets, len(pieces), finish)
        for piece in pieces:
            self.tasks.put((job, piece))
        return job


def _end(tasks: SimpleQueue[tuple[Job, Piece] | None], threads: Sequence[threading.Thread]) -> None:
    """Drop what is still to be read, and wait for the threads: one that ran torch's code while the interpreter ends
    would end the process by SIGABRT."""
    with contextlib.suppress(Empty):
        while task := tasks.get_nowait():
            task[0].error = RuntimeError("the reader ended first")
            task[0].done.set()
    for _ in threads:
        tasks.put(None)
    for thread in threads:
        if thread is not threading.current_thread():  # it may be the one that held the reader last
            thread.join()


def _work(tasks: SimpleQueue[tuple[Job, Piece] | None]) -> None:
    files: dict[Path, File] = {}
    memory = mmap.mmap(-1, PIECE)
    address, buffer = ctypes.addressof(ctypes.c_char.from_buffer(memory)), memoryview(memory)
    while (task := tasks.get()) is not None:
        task[0].run(task[1], files, buffer, address)
    for file in files.values():
        file.close()
