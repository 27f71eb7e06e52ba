"""`burnish quantize`: store a model's weights in fewer bits."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from burnish import chain
from burnish.chain import Model
from burnish.config import UserError
from burnish.engine.proof import ProofOptions, proven
from burnish.store.checkpoint import load, save


@dataclass(frozen=True)
class QuantizeConfig(ProofOptions):
    """One model, one method."""

    positional: ClassVar[str] = "model"
    model: str = field(default="pebble", metadata={"help": "checkpoint folder, hub id or 'pebble'"})
    method: Literal["int8", "nf4"] = field(default="nf4", metadata={"help": "how the weights are stored"})
    output_dir: Path | None = field(default=None, metadata={"help": "folder of the quantised model"})


def run(config: QuantizeConfig) -> int:
    """Quantise and save; prints the bytes before and after, and the proof."""
    if config.output_dir is None:
        raise UserError("output_dir: say where the result goes, as in --output-dir runs/small")

    def write(model: Model, place: Path) -> list[str]:
        before = size(model)
        chain.apply(model, [config.method])
        save(model, place)
        after = size(model)
        return [f"{before / 2**20:.1f} MiB -> {after / 2**20:.1f} MiB ({after / before:.0%})"]

    print(*proven(lambda: load(config.model, techniques=[config.method]), write, config.output_dir, config), sep="\n")
    return 0


def size(model: Model) -> int:
    return sum(p.numel() * p.element_size() for p in model.net.parameters())
