"""Files that are cut off, lie or are damaged: one clear line, and no memory for what is not there."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import struct
import tracemalloc
from pathlib import Path

import pytest
from gguf_models import checkpoint

from burnish import cli
from burnish.config import UserError
from burnish.store import checkpoint as checkpoint_module
from burnish.store import gguf_tokenizer
from burnish.store.checkpoint import load
from burnish.store.gguf import Piece, read_gguf, write_gguf
from burnish.store.gguf_model import opened, write
from burnish.store.tensors import read_header

GGUF_FILES, SAFETENSORS_FILES = 14_000, 6_000
SECONDS = 20  # of processor time that one file may take
ROOM = 256 << 20  # bytes of address space beyond what the process has, torch's among them: far less than a lie asks for
EXTREMES = (0, 1, 2**8, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)


pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="files in memory are Linux's")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[bytes, bytes, Path]:
    """A GGUF file, the safetensors file that it was made of, and the folder of both."""
    folder = checkpoint(tmp_path_factory.mktemp("llama"), "llama")
    write(load(folder), folder / "m.gguf", "q4_0")
    return (folder / "m.gguf").read_bytes(), (folder / "model.safetensors").read_bytes(), folder


def header_size(raw: bytes, tmp_path: Path) -> int:
    (tmp_path / "whole.gguf").write_bytes(raw)
    return min(stored.entry.start for stored in read_gguf(tmp_path / "whole.gguf").tensors.values())


def mutated(raw: bytes, header: int, rng: random.Random) -> bytes:
    """The file with one to three changes, most of them in its header."""
    data = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(min(header, len(data)) if len(data) > 1 else 1) if data else 0
        way = rng.randrange(6)
        if way == 0:
            data[at : at + 1] = bytes([rng.randrange(256)])
        elif way == 1:
            data[at : at + 8] = struct.pack("<Q", rng.choice((*EXTREMES, len(raw), len(raw) + 1, rng.getrandbits(64))))
        elif way == 2:
            data[at : at + 4] = struct.pack("<I", rng.choice((*range(16), 30, 2**31, 2**32 - 1)))
        elif way == 3:
            del data[rng.randrange(len(data)) if rng.random() < 0.5 and data else at :]
        elif way == 4:
            del data[at : at + rng.randrange(1, 40)]
        else:
            data[at:at] = rng.randbytes(rng.randrange(1, 40))
    return bytes(data)


@pytest.fixture
def memory():
    """A file in memory, as its descriptor: truncating one on a disk takes longer than reading it. What allocates beyond
    ROOM, or goes on beyond SECONDS, fails."""

    def hangs(*_):
        raise AssertionError(f"a file took more than {SECONDS} s")

    descriptor, before = os.memfd_create("damaged"), signal.signal(signal.SIGPROF, hangs)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + ROOM, limits[1]))
    yield descriptor
    resource.setrlimit(resource.RLIMIT_AS, limits)
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.signal(signal.SIGPROF, before)
    os.close(descriptor)


def put(descriptor: int, data: bytes) -> Path:
    os.ftruncate(descriptor, len(data))
    os.pwrite(descriptor, data, 0)
    return Path(f"/proc/self/fd/{descriptor}")


def refused_or_read(read, path: Path, watched: bool) -> object:
    """What `read` gives, None where it raises UserError; anything else it raises fails the test."""
    size = path.stat().st_size
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    if watched:
        tracemalloc.start()
    try:
        return read(path)
    except UserError as error:
        assert "\n" not in str(error) and str(path) in str(error) and len(str(error)) < 2000
        return None
    finally:
        if watched:
            assert tracemalloc.get_traced_memory()[1] < 4 * size + (1 << 16)
            tracemalloc.stop()


def read_everything(path: Path):
    found = opened(path)
    gguf_tokenizer.rebuilt(found.file)
    return found


def test_damaged_gguf_files(files, memory, tmp_path):
    raw, rng = files[0], random.Random(0)
    header, whole, loaded = header_size(raw, tmp_path), 0, 0
    for number in range(GGUF_FILES):
        data = mutated(raw, header, rng)
        path = put(memory, data)
        if number % 10 == 0:
            refused_or_read(read_gguf, path, True)
        found = refused_or_read(read_everything, path, False)
        if found is None:
            continue
        whole += 1
        assert all(0 <= x.entry.start < x.entry.end <= path.stat().st_size for x in found.file.tensors.values())
        if whole % 100 == 0:
            (tmp_path / "m.gguf").write_bytes(data)
            loaded += refused_or_read(load, tmp_path / "m.gguf", False) is not None
    assert whole > 500 and loaded  # the changes are not all in the first bytes


def test_damaged_safetensors_files(files, memory, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_module, "identity", lambda _: "")  # which syncs its cache to the disk each time
    raw, rng = files[1], random.Random(1)
    header, whole, loaded = 8 + int.from_bytes(files[1][:8], "little"), 0, 0
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(files[2] / name, tmp_path)
    for number in range(SAFETENSORS_FILES):
        data = mutated(raw, header, rng)
        path = put(memory, data)
        found = refused_or_read(read_header, path, number % 4 == 0)
        if found is None:
            continue
        whole += 1
        assert all(0 <= x.start <= x.end <= path.stat().st_size for x in found.values())
        assert all(x.read().nbytes == x.end - x.start for x in found.values())
        if whole % 2 == 0:
            (tmp_path / "model.safetensors").write_bytes(data)
            loaded += refused_or_read(load, tmp_path, False) is not None
    assert whole > 50 and loaded


def many(count: int, keys: int, entry: bytes) -> bytes:
    """A GGUF file of `entry` alone, the Ith with I where it has a %d."""
    body = b"".join(entry.replace(b"%d", b"%06d" % number) for number in range(count + keys))
    return b"GGUF" + struct.pack("<IQQ", 3, count, keys) + body + bytes(64)


@pytest.mark.parametrize("pad", [0, 1 << 19])
def test_many_small_entries(tmp_path, pad):
    """Whole files whose entries would take many times their bytes: refused, or there is room for them."""
    name = struct.pack("<Q", 6) + b"%d"
    one = b'"%06d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    listed = b"{" + b",".join(one % number for number in range(5_000)) + b"}"
    refused = []
    for kind, data, read in (
        ("keys", many(0, 10_000, name + struct.pack("<IB", 0, 1)), read_gguf),
        ("arrays", many(0, 10_000, name + struct.pack("<IIQ", 9, 4, 0)), read_gguf),
        ("tensors", many(5_000, 0, name + struct.pack("<IQIQ", 1, 1, 0, 0)), read_gguf),
        ("safetensors", struct.pack("<Q", len(listed)) + listed, read_header),
        ("lists", struct.pack("<Q", 30_007) + b'{"a":[' + b"[]," * 9_999 + b"[]]}", read_header),
    ):
        path = tmp_path / kind
        path.write_bytes(data + bytes(pad))
        tracemalloc.start()
        try:
            read(path)
        except UserError:
            refused.append(kind)
        finally:
            most = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert most < 4 * path.stat().st_size + (1 << 16), kind
    assert pad or refused == ["keys", "arrays", "tensors", "safetensors", "lists"]


def test_every_way_of_being_cut_off(files, tmp_path):
    raw, path = files[0], tmp_path / "m.gguf"
    for size in (0, 3, 23, 24, 100, header_size(raw, tmp_path), len(raw) - 64):
        path.write_bytes(raw[:size])
        with pytest.raises(UserError, match="not a complete GGUF file"):
            load(path)


@pytest.mark.parametrize(
    ("at", "value", "says"),
    [
        (0, b"GGML", "does not begin with GGUF"),
        (4, struct.pack("<I", 2), "GGUF version 2 is not supported"),
        (8, struct.pack("<Q", 2**60), "tensors and .* keys do not fit it"),
        (16, struct.pack("<Q", 2**60), "tensors and .* keys do not fit it"),
        (24, struct.pack("<Q", 2**63), "more bytes should follow"),
    ],
)
def test_a_header_that_lies(files, tmp_path, at, value, says, capsys):
    raw, path = bytearray(files[0]), tmp_path / "m.gguf"
    raw[at : at + len(value)] = value
    path.write_bytes(raw)
    with pytest.raises(UserError, match=says):
        load(path)
    assert cli.main(["generate", str(path), "--prompt", "a"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def changed(files, tmp_path, tensor: bytes, offset: int, value: bytes) -> Path:
    """The file with the bytes `offset` after a tensor's name exchanged."""
    raw, path = bytearray(files[0]), tmp_path / "m.gguf"
    at = raw.index(tensor) + len(tensor) + offset
    raw[at : at + len(value)] = value
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize(
    ("offset", "value", "says"),
    [
        (20, struct.pack("<I", 3), "tensor token_embd.weight has type 3, which is not supported; supported: f32"),
        (0, struct.pack("<I", 9), "has 9 dimensions"),
        (12, struct.pack("<Q", 2**50), "does not fit it"),
        (12, struct.pack("<Q", 0), "does not fit it"),
        (4, struct.pack("<Q", 33), "no whole blocks of 32"),
        (24, struct.pack("<Q", 2**62), "does not fit it"),
        (24, struct.pack("<Q", 8), "is not aligned"),
    ],
)
def test_a_tensor_that_lies(files, tmp_path, offset, value, says):
    with pytest.raises(UserError, match=says):
        load(changed(files, tmp_path, b"token_embd.weight", offset, value))


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        (b"llama.block_count", 2**31, "llama.block_count is 2147483648"),
        (b"llama.block_count", 1, "unexpected blk.1"),
        (b"llama.attention.head_count", 2**20, "llama.attention.head_count is 1048576"),
        (b"llama.attention.head_count_kv", 0, "k_proj.weight.blocks has shape"),
        (b"llama.embedding_length", 64, "partly rotated heads are not supported"),
    ],
)
def test_a_shape_that_lies(files, tmp_path, key, value, says):
    prefixed = struct.pack("<Q", len(key)) + key
    with pytest.raises(UserError, match=says):
        load(changed(files, tmp_path, prefixed, 4, struct.pack("<I", value)))


def test_what_is_left_out_is_named(files, tmp_path):
    import torch

    path, piece = tmp_path / "m.gguf", Piece(0, (4, 4), lambda: torch.zeros(4, 4))
    for metadata, says in (
        ({}, "architecture None is not supported; supported: bloom"),
        ({"general.architecture": "mamba"}, "architecture 'mamba'"),
        ({"general.architecture": "llama"}, "no matrix token_embd.weight"),
    ):
        write_gguf(path, metadata, {"x": piece})
        with pytest.raises(UserError, match=says):
            load(path)
    write_gguf(path, {"general.architecture": "llama"}, {"token_embd.weight": piece})
    with pytest.raises(UserError, match=r"llama.block_count is missing"):
        load(path)
    with pytest.raises(UserError, match="a checkpoint folder is needed, or a file named .gguf"):
        load(__file__)
