"""The SHA-256 identity of a checkpoint's weights, cached by path, size and time of change."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from burnish.config import UserError
from burnish.model.spec import Spec
from burnish.store.tensors import write_json

KEPT = 1000  # checkpoints whose identity is remembered
SHAPE = ("family", "hidden_size", "num_layers", "num_heads", "vocab_size")  # by which people tell bases apart


def base_record(spec: Spec, identity: str) -> dict[str, Any]:
    """What a folder without weights of its own keeps of its base, for `check_base`."""
    return {"identity": identity, "shape": {name: getattr(spec, name) for name in SHAPE}}


def check_base(saved: Mapping[str, Any], spec: Spec, found: str, where: str, instead: str) -> None:
    """Raise UserError, its message starting with `where`, if a record of `base_record` is not of the base with this
    spec and the identity `found`; `instead` is what to do. An identity that is "" fits all."""
    wanted = saved.get("identity") or found
    if not found or wanted == found:
        return
    here = {name: getattr(spec, name) for name in SHAPE}
    differs = [f"{name} {old}, not {here[name]}" for name, old in saved.get("shape", {}).items() if old != here[name]]
    what = ", ".join(differs) or "the same shape, other weights"
    raise UserError(f"{where}: made for another base: {what} (identity {wanted[:12]}, not {found[:12]}); {instead}")


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a checkpoint's weights, in the order that the identity hashes them; a GGUF file itself."""
    if folder.is_file():
        return [folder]
    return sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("burnish.safetensors"))


def stored_bytes(folder: Path) -> int:
    """Bytes of a checkpoint's tensors on disk."""
    files = [folder] if folder.is_file() else folder.glob("*.safetensors")
    return sum(path.stat().st_size for path in files)


def identity(folder: Path) -> str:
    """SHA-256 (hex) over the bytes of the weight files."""
    files = weight_files(folder)
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    key = hashlib.sha256(repr(stats).encode()).hexdigest()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "burnish" / "identity.json"
    try:
        known = json.loads(cache.read_text())
    except (OSError, ValueError):
        known = {}
    if key not in known:
        digest = hashlib.sha256()
        for path in files:
            with open(path, "rb") as file:
                while chunk := file.read(1 << 22):
                    digest.update(chunk)
        known = dict([*known.items(), (key, digest.hexdigest())][-KEPT:])
        try:
            cache.parent.mkdir(parents=True, exist_ok=True)
            write_json(known, cache)
        except OSError:
            pass  # a read-only home only costs the hashing next time
    return known[key]
