"""GGUF files, version 3: metadata and tensors in one file.

    "GGUF", u32 version, u64 tensors, u64 keys;  keys: string name, u32 type, value
    tensors: string name, u32 dimensions, u64 each (the inner one first), u32 type, u64 offset;  data, aligned

Source: ggml's `docs/gguf.md`. A file is not trusted: every count, length and offset is checked against the bytes that
are there before anything is allocated for it, arrays of text are kept as the file's bytes until they are asked for, and
tensors are ranges of the file (`Entry`) that are read later.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from burnish.compress.gguf import FORMATS
from burnish.config import UserError
from burnish.store.tensors import Entry, replace_file

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
U32, I32, F32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9
PLAIN = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
PLAIN_CODES = {"f32": 0, "f16": 1, "bf16": 30}
QUANTISED = {found.code: found for found in FORMATS.values()}
MOST_DIMENSIONS = 4
# Bytes of a file for each tensor and each key beyond the first SPARE bytes: reading then takes less than four times the
# file. Models have far more.
TENSOR_ROOM, KEY_ROOM, SPARE = 128, 48, 1 << 13
LENGTH = struct.Struct("<Q")  # of a string, before it


class Broken(Exception):
    """What is wrong with a file."""


@dataclass(frozen=True)
class Texts:
    """An array of `count` strings, as the file's bytes: length and text of each."""

    raw: bytes
    count: int

    def __iter__(self) -> Iterator[str]:
        at = 0
        for _ in range(self.count):
            (length,) = LENGTH.unpack_from(self.raw, at)
            yield self.raw[at + 8 : at + 8 + length].decode("utf-8", "replace")
            at += 8 + length

    def __len__(self) -> int:
        return self.count


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of a file: its `entry`, uint8 (rows, bytes of a row) where `code` is a quantised type's."""

    code: int
    shape: tuple[int, ...]
    entry: Entry


@dataclass(frozen=True)
class File:
    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Stored]


class Cursor:
    """Goes through a file's bytes; raises Broken where they end."""

    def __init__(self, data: mmap.mmap):
        self.data, self.at = data, 0

    def skip(self, count: int) -> int:
        """Go on by `count` bytes; where they begin."""
        if count > len(self.data) - self.at:
            raise Broken(f"it ends where {count} more bytes should follow byte {self.at}")
        self.at += count
        return self.at - count

    def number(self, code: str) -> Any:
        return struct.unpack_from(f"<{code}", self.data, self.skip(struct.calcsize(f"<{code}")))[0]

    def text(self) -> str:
        length = self.number("Q")
        start = self.skip(length)
        try:
            return self.data[start : start + length].decode()
        except UnicodeDecodeError:
            raise Broken(f"the text at byte {start} is not UTF-8") from None

    def value(self) -> Any:
        kind = self.number("I")
        return self.array() if kind == ARRAY else self.single(kind)

    def single(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind not in NUMBERS:
            raise Broken(f"a value has type {kind}, which GGUF does not have")
        return self.number(NUMBERS[kind])

    def array(self) -> Any:
        kind, count = self.number("I"), self.number("Q")
        if kind == STRING:
            start = at = self.at
            last = len(self.data) - 8
            for _ in range(count):
                if at > last:
                    raise Broken(f"an array of {count} strings does not fit it")
                at += 8 + LENGTH.unpack_from(self.data, at)[0]
            self.skip(at - start)
            return Texts(self.data[start:at], count)
        if kind not in NUMBERS:
            raise Broken(f"an array has elements of type {kind}, which is not supported")
        size = struct.calcsize(f"<{NUMBERS[kind]}")
        start = self.skip(count * size)
        return np.frombuffer(self.data[start : self.at], dtype=np.dtype(f"<{NUMBERS[kind]}"))


def read_gguf(path: Path) -> File:
    """The metadata and the tensors' places. Raises UserError, in one line, for a file that is not whole or lies."""
    try:
        size = path.stat().st_size
        if size < 24:
            raise Broken(f"it has {size} bytes")
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read(path, data)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except Broken as error:
        raise UserError(f"{path}: not a complete GGUF file: {error}; copy, download or convert it again") from None


def _read(path: Path, data: mmap.mmap) -> File:
    cursor = Cursor(data)
    if data[cursor.skip(4) : 4] != MAGIC:
        raise Broken("it does not begin with GGUF")
    version, count, keys = cursor.number("I"), cursor.number("Q"), cursor.number("Q")
    if version != VERSION:
        raise UserError(f"{path}: GGUF version {version} is not supported; convert the model again, to version 3")
    if max(24 * count, 13 * keys, TENSOR_ROOM * count + KEY_ROOM * keys - SPARE) > len(data):
        raise Broken(f"{count} tensors and {keys} keys do not fit it")
    metadata: dict[str, Any] = {}
    for _ in range(keys):
        name = cursor.text()
        metadata[name] = cursor.value()
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or not 0 < alignment <= 1 << 16 or alignment % 8:
        raise Broken(f"general.alignment is {alignment!r}")
    headers = [_header(cursor) for _ in range(count)]
    start = -(-cursor.at // alignment) * alignment
    tensors = {}
    for name, shape, code, offset in headers:
        tensors[name] = _stored(path, name, shape, code, start + offset, len(data))
        if offset % alignment:
            raise Broken(f"tensor {name} is not aligned to {alignment} bytes")
    if len(tensors) < count:
        raise Broken("two tensors have one name")
    return File(path, metadata, tensors)


def _header(cursor: Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name, dimensions = cursor.text(), cursor.number("I")
    if not 0 < dimensions <= MOST_DIMENSIONS:
        raise Broken(f"tensor {name} has {dimensions} dimensions")
    shape = tuple(cursor.number("Q") for _ in range(dimensions))[::-1]
    return name, shape, cursor.number("I"), cursor.number("Q")


def _stored(path: Path, name: str, shape: tuple[int, ...], code: int, start: int, size: int) -> Stored:
    """One tensor, its bytes checked to be in the file."""
    found = QUANTISED.get(code)
    if found is None and code not in PLAIN:
        known = ", ".join([*PLAIN_CODES, *FORMATS])
        raise UserError(f"{path}: tensor {name} has type {code}, which is not supported; supported: {known}")
    if found is not None and shape[-1] % found.size:
        raise Broken(f"tensor {name} has rows of {shape[-1]}, no whole blocks of {found.size}")
    if found is None:
        dtype, inner = PLAIN[code], shape
    else:
        dtype, inner = torch.uint8, (math.prod(shape[:-1]), found.row(shape[-1]))
    end = start + math.prod(inner) * dtype.itemsize
    if end > size or not math.prod(shape):
        raise Broken(f"tensor {name} of shape {list(shape)} does not fit it")
    return Stored(code, shape, Entry(path, dtype, inner, start, end))


@dataclass(frozen=True)
class Piece:
    """A tensor to be written: its type, its shape, and what gives its values, floats or blocks, in its turn."""

    code: int
    shape: tuple[int, ...]
    values: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        found = QUANTISED.get(self.code)
        rows = math.prod(self.shape[:-1])
        return rows * (found.row(self.shape[-1]) if found else self.shape[-1] * PLAIN[self.code].itemsize)


def heading(metadata: Mapping[str, Any], tensors: Mapping[str, Piece]) -> tuple[bytes, int]:
    """How a file of these begins, and its bytes in all.

    Metadata: bool, int (as u32), float (as f32), str, or a list of int (as i32), float or str.
    """
    found = MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(metadata))
    found += b"".join(_text(name) + _value(value) for name, value in metadata.items())
    offset = 0
    for name, piece in tensors.items():
        sizes = struct.pack(f"<I{len(piece.shape)}Q", len(piece.shape), *piece.shape[::-1])
        found += _text(name) + sizes + struct.pack("<IQ", piece.code, offset)
        offset += _padded(piece.nbytes)
    found += bytes(-len(found) % ALIGNMENT)
    return found, len(found) + offset


def write_gguf(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, Piece]) -> None:
    """Write a file under a temporary name, one tensor after the other, sync it, then rename it to `path`."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(heading(metadata, tensors)[0])
            for name, piece in tensors.items():
                values = piece.values().detach().cpu()
                values = values if values.dtype == torch.uint8 else values.to(PLAIN[piece.code])
                raw = values.contiguous().flatten().view(torch.uint8).numpy()
                if len(raw) != piece.nbytes:
                    raise ValueError(f"tensor {name} has {len(raw)} bytes where {piece.nbytes} were announced")
                file.write(raw.data)
                file.write(bytes(-len(raw) % ALIGNMENT))
        replace_file(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None
    finally:
        with suppress(OSError):
            os.unlink(temporary)


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Any) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _text(value)
    if isinstance(value, list):
        kind = I32 if isinstance(value[0], int) else _kind(value[0])
        body = b"".join(map(_text, value)) if kind == STRING else np.array(value, f"<{NUMBERS[kind]}").tobytes()
        return struct.pack("<IIQ", ARRAY, kind, len(value)) + body
    return struct.pack(f"<I{NUMBERS[_kind(value)]}", _kind(value), value)


def _kind(value: Any) -> int:
    if isinstance(value, (str, bool)):
        return STRING if isinstance(value, str) else BOOL
    return F32 if isinstance(value, float) else U32
