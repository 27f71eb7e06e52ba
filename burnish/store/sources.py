"""What a name of a model leads to: the files of its base, of a chain on it, or of an adapter."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from burnish.config import UserError
from burnish.store import adapters
from burnish.store.gguf_model import Opened, opened
from burnish.store.hub import resolve
from burnish.store.tensors import Entry, read_folder


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError where it is missing or does not parse."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path.parent}: no {path.name} in this folder; it is not a checkpoint") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: a JSON object is needed")
    return data


@dataclass
class Sources:
    """The folder that was asked for, the folder or GGUF file of its base (often the same), and what they hold.

    `entries` are the base's tensors under their family's names, `extras` those under burnish's own; `saved` is
    burnish.json, `chain` the techniques that it names, and `quantization` what config.json says of GPTQ's layout.
    """

    folder: Path
    base: Path
    origin: str
    saved: dict[str, Any]
    chain: list[dict[str, Any]]
    hf_config: dict[str, Any]
    quantization: dict[str, Any] | None
    entries: dict[str, Entry]
    extras: dict[str, Entry]
    adapter: adapters.Adapter | None
    gguf: Opened | None

    @property
    def alone(self) -> bool:
        """Whether the folder holds its base."""
        return self.base == self.folder

    @property
    def ours(self) -> bool:
        """Whether the base's weights are among `extras`."""
        return self.alone and not (self.folder / "model.safetensors").exists() and bool(self.extras)


def sources(source: str | Path) -> Sources:
    """Raises UserError for a folder that is no checkpoint, and where the base that it names is not found."""
    folder = resolve(source)
    saved = read_json(folder / "burnish.json") if (folder / "burnish.json").exists() else {}
    adapter, chain, extras = None, saved.get("chain", []), {}
    if (folder / "adapter_config.json").exists():
        adapter = adapters.read(folder, chain)
        source = based_on(folder, {"base": adapter.record.get("base_model_name_or_path"), **saved})
        chain, extras = adapter.saved, adapter.tensors
    else:
        extras = read_folder(folder, "burnish") if (folder / "burnish.safetensors").exists() else {}
        source = source if saved.get("complete", True) else based_on(folder, saved)
    base = resolve(source)
    gguf = opened(base) if base.is_file() else None
    hf_config = gguf.config if gguf else read_json(base / "config.json")
    quantization = hf_config.pop("quantization_config", None)
    found = Sources(folder, base, origin(source), saved, chain, hf_config, quantization, {}, extras, adapter, gguf)
    if gguf is None and not found.ours:
        found.entries = read_folder(base)
    return found


def origin(source: str | Path) -> str:
    """What finds the model again from anywhere: a hub id or "pebble" as given, a folder or a file by its absolute
    path."""
    return str(Path(source).resolve()) if Path(source).exists() else str(source)


def based_on(folder: Path, saved: dict[str, Any]) -> str:
    """The base that a folder without base weights names."""
    if not isinstance(saved.get("base"), str) or not saved["base"]:
        raise UserError(f"{folder}: names no base model; write it into adapter_config.json or burnish.json")
    return saved["base"]


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder brings a tokenizer of its own."""
    return any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"))
