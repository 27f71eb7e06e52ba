"""Direct reads: every byte goes where it belongs, however ranges lie in files."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
import threading

import pytest
import torch

from burnish.config import UserError
from burnish.place.reading import BLOCK, PIECE, THREADS, File, Reader, cut
from burnish.store.tensors import Entry


def entry(path, start: int, end: int) -> Entry:
    return Entry(path, torch.uint8, (end - start,), start, end)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A file that is no multiple of a block, and its bytes."""
    path = tmp_path_factory.mktemp("reading") / "data"
    content = random.Random(0).randbytes(3 * PIECE + 12345)
    path.write_bytes(content)
    return path, content


def read(ranges) -> list[bytes]:
    targets = [torch.zeros(x.end - x.start, dtype=torch.uint8) for x in ranges]
    reader = Reader()  # which would take its threads along
    reader.read(cut(ranges), targets, lambda: None).wait()
    return [target.numpy().tobytes() for target in targets]


@pytest.mark.parametrize("seed", range(4))
def test_ranges_anywhere_are_read(file, tmp_path, seed):
    path, content = file
    other = tmp_path / "other"
    other.write_bytes(content[::-1])
    draw = random.Random(seed)
    ranges = [entry(path, len(content) - 1, len(content)), entry(path, 7, 7 + PIECE), entry(other, 0, len(content))]
    for _ in range(20):
        start = draw.randrange(len(content) - 1)
        ranges.append(entry(draw.choice([path, other]), start, min(len(content), start + draw.choice([1, 99, 5000]))))
    expected = [(content if x.path == path else content[::-1])[x.start : x.end] for x in ranges]
    assert read(ranges) == expected


def test_reads_are_whole_blocks_and_near_ranges_share_them(file):
    path, _ = file
    pieces = cut([entry(path, 10, 2 * PIECE), entry(path, 2 * PIECE + 100, 2 * PIECE + 200), entry(path, 0, 10)])
    assert [piece.start for piece in pieces] == [0, PIECE, 2 * PIECE]
    assert all(piece.start % BLOCK == 0 and piece.needed <= PIECE for piece in pieces)
    assert sum(count for piece in pieces for *_, count in piece.copies) == 2 * PIECE + 100


def test_plain_reads_where_direct_ones_are_refused(file, monkeypatch):
    """At opening, as tmpfs did, and at the first read."""
    path, content = file
    open_, preadv = os.open, os.preadv
    opened: list[int] = []

    def refuse_open(name, flags, *more):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no direct reads here")
        return open_(name, flags, *more)

    def refuse_read(handle, *more):
        if handle == opened[0]:
            raise OSError(errno.EINVAL, "nor here")
        return preadv(handle, *more)

    def remember(name, flags, *more):
        opened.append(open_(name, flags, *more))
        return opened[-1]

    for name, replacement in (("open", refuse_open), ("open", remember), ("preadv", refuse_read)):
        monkeypatch.setattr(os, name, replacement)
        if replacement is remember:
            continue
        found = File(path)
        buffer = bytearray(2 * BLOCK)
        found.read(memoryview(buffer), BLOCK, BLOCK + 10)
        assert not found.direct and buffer[: BLOCK + 10] == content[BLOCK : 2 * BLOCK + 10]
        found.close()


def test_a_read_that_was_cut_short_goes_on(file, monkeypatch):
    path, content = file
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda handle, views, start: preadv(handle, [views[0][: 3 * BLOCK]], start))
    assert read([entry(path, 5, len(content))]) == [content[5:]]


def test_what_goes_wrong_is_told_where_it_is_waited_for(file, tmp_path):
    path, content = file
    for wrong, message in (
        (entry(path, len(content) - 5, len(content) + 5), "ends inside a tensor"),
        (entry(tmp_path / "gone", 0, 5), "gone: cannot be read: No such file"),
    ):
        with pytest.raises(UserError, match=message):
            read([wrong])


def test_threads_end_with_their_reader():
    before = set(threading.enumerate())
    reader = Reader()
    own = set(threading.enumerate()) - before
    assert len(own) == THREADS
    del reader
    for thread in own:
        thread.join(5)
    assert not own & set(threading.enumerate())


def test_the_interpreter_may_end_while_they_read(file):
    """Threads that then run torch's code would end the process by a signal."""
    code = f"""
import torch
from pathlib import Path
from burnish.place.reading import Reader, cut
from burnish.store.tensors import Entry
ranges = [Entry(Path({str(file[0])!r}), torch.uint8, (900,), i, i + 900) for i in range(0, 2_000_000, 1000)]
reader = Reader()
for _ in range(20):
    for start in range(0, 2000, 20):
        some = ranges[start : start + 20]
        targets = [torch.empty(900, dtype=torch.uint8) for _ in some]
        job = reader.read(cut(some), targets, lambda: torch.empty(300, 300).view(-1).sum())
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
