"""`burnish export`: a model as one file for other programs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from burnish.chain import Model
from burnish.config import UserError
from burnish.engine.proof import Made, ProofOptions, proven
from burnish.store.checkpoint import load
from burnish.store.gguf_model import write


@dataclass(frozen=True)
class ExportConfig(ProofOptions):
    """A model, and the file that it goes into."""

    positional: ClassVar[str] = "model"
    model: str = field(default="pebble", metadata={"help": "checkpoint folder, hub id or 'pebble'"})
    format: Literal["gguf"] = field(default="gguf", metadata={"help": "gguf, which llama.cpp and its kin load"})
    type: Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_k", "q5_k", "q6_k"] = field(
        default="q8_0", metadata={"help": "how matrices are stored"}
    )
    output: Path | None = field(default=None, metadata={"help": "the file, as in --output model-q8_0.gguf"})


def run(config: ExportConfig) -> int:
    """Write the file; prints its size, what differs from the model, and the proof."""
    if config.output is None:
        raise UserError("output: say which file is written, as in --output model-q8_0.gguf")
    if config.output.suffix != ".gguf":
        raise UserError(f"output: {config.output}: its name must end in .gguf, by which a reader knows it")

    def made(model: Model, place: Path) -> Made:
        notes, size = write(model, place, config.type), place.stat().st_size
        return Made([*notes, f"{size / 2**20:.1f} MiB"], {"notes": notes, "bytes": size})

    return proven(lambda: load(config.model, unread=True), made, config.output, config)
