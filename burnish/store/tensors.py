"""Reading and writing safetensors files.

Reading goes through plain file reads straight into each tensor's final memory: loading then holds the model once,
where a memory map would hold its file pages beside it. The header is checked against the file before anything is
allocated.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from burnish.config import UserError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
HEADER_LIMIT = 100_000_000
MARK = 112  # bytes that parsing a header takes for each of its "{", "[" and ","; at most
SPARE = 1 << 16  # bytes that it may take beyond four times the file


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one tensor lies: its file, dtype, shape, and byte range in the file."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    def read(self, scratch: Tensor | None = None) -> Tensor:
        """The tensor, in memory of its own, or at the start of `scratch` (uint8), where the next read overwrites it."""
        if scratch is None:
            tensor = torch.empty(self.shape, dtype=self.dtype)
        else:
            tensor = scratch[: self.nbytes].view(self.dtype).view(self.shape)
        if tensor.numel():
            view = memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
            with open(self.path, "rb", buffering=0) as file:
                file.seek(self.start)
                done = 0
                while done < len(view):
                    count = file.readinto(view[done:])
                    if not count:
                        raise UserError(f"{self.path}: the file ends inside a tensor; copy or download it again")
                    done += count
        return tensor


@dataclass(frozen=True, eq=False)
class Held:
    """A tensor that is in memory already, in the role of an `Entry`."""

    tensor: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def nbytes(self) -> int:
        return 0  # needs no room to be read

    def read(self, scratch: Tensor | None = None) -> Tensor:
        return self.tensor


@dataclass(frozen=True)
class Later:
    """A tensor to be written, made when it is its turn."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file by name. Raises UserError for a truncated file or a header that lies."""

    def broken(why: str) -> UserError:
        return UserError(f"{path}: not a complete safetensors file ({why}); copy or download it again")

    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, HEADER_LIMIT):
            raise broken("its header is cut off")
        text = file.read(length)
        if MARK * sum(map(text.count, (b"{", b"[", b","))) > 4 * size + SPARE:
            raise broken("its header lists more than the file has room for")
        try:
            header = json.loads(text)
            entries = {}
            for name, info in header.items():
                if name == "__metadata__":
                    continue
                start, end = info["data_offsets"]
                shape = tuple(info["shape"])
                dtype = DTYPES.get(info["dtype"])
                if dtype is None:
                    raise UserError(f"{path}: tensor {name} has dtype {info['dtype']}; known: {', '.join(DTYPES)}")
                if not all(isinstance(n, int) and n >= 0 for n in (*shape, start, end)):
                    raise broken(f"tensor {name} has a negative or fractional size")
                count = dtype.itemsize
                for n in shape:
                    count *= n
                if end - start != count or 8 + length + end > size:
                    raise broken(f"tensor {name} does not fit the file")
                entries[name] = Entry(path, dtype, shape, 8 + length + start, 8 + length + end)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise broken(f"its header does not parse: {error}") from None
    return entries


def read_folder(folder: Path, stem: str = "model") -> dict[str, Entry]:
    """All tensors of `<stem>.safetensors`, or of the shards that its index names."""
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if index.exists():
        try:
            files = sorted({str(name) for name in json.loads(index.read_text())["weight_map"].values()})
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{index}: not a safetensors index; download it again") from None
        missing = [name for name in files if Path(name).name != name or not (folder / name).exists()]
        if missing:
            raise UserError(f"{folder}: shards named by the index are missing: {', '.join(missing)}")
        return {name: entry for file in files for name, entry in read_header(folder / file).items()}
    if single.exists():
        return read_header(single)
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(pattern))
    if pickled:
        raise UserError(
            f"{folder}: {pickled[0]} is a pickle, which can run code when it is read; if you trust it, convert it: "
            f'python -c "import transformers as t; p = {str(folder)!r}; c = t.AutoConfig.from_pretrained(p); '
            'getattr(t, c.architectures[0]).from_pretrained(p).save_pretrained(p)"'
        )
    raise UserError(f"{folder}: no {stem}.safetensors in this folder; give a checkpoint folder or a hub id")


def heading(tensors: Mapping[str, Tensor | Later]) -> tuple[bytes, list[str], int]:
    """How a safetensors file of these tensors begins, their order in it, and its bytes in all."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    names, end = {dtype: name for name, dtype in DTYPES.items()}, 0
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))  # so that all are aligned
    for name in order:
        start, shape, dtype = end, tuple(tensors[name].shape), tensors[name].dtype
        end += math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": names[dtype], "shape": shape, "data_offsets": (start, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, order, 8 + len(text) + end


def write_tensors(tensors: Mapping[str, Tensor | Later], path: Path) -> None:
    """Write a safetensors file under a temporary name, sync it, then rename it to `path`.

    One tensor after the other is made contiguous, on the CPU, so that the file is never in memory as a whole.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    text, order, _ = heading(tensors)
    with open(temporary, "wb") as file:
        file.write(text)
        for name in order:
            found = tensors[name]
            tensor = found.make() if isinstance(found, Later) else found
            tensor = tensor.detach().cpu().contiguous()
            if tensor.numel():
                file.write(memoryview(tensor.view(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
    replace_file(temporary, path)


def write_json(data: object, path: Path) -> None:
    """Write JSON under a temporary name, sync it, then rename it to `path`."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    replace_file(temporary, path)


def replace_file(temporary: Path, path: Path) -> None:
    """Sync `temporary` to disk, then rename it to `path`."""
    descriptor = os.open(temporary, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(temporary, path)
