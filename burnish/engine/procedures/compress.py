"""`burnish quantize`: store a model's weights in fewer bits."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from burnish import chain
from burnish.config import UserError
from burnish.store.checkpoint import load, save


@dataclass(frozen=True)
class QuantizeConfig:
    """One model, one method."""

    positional: ClassVar[str] = "model"
    model: str = field(default="pebble", metadata={"help": "checkpoint folder, hub id or 'pebble'"})
    method: Literal["int8", "nf4"] = field(default="nf4", metadata={"help": "how the weights are stored"})
    output_dir: Path | None = field(default=None, metadata={"help": "folder of the quantised model"})


def run(config: QuantizeConfig) -> int:
    """Quantise and save; prints the bytes before and after."""
    if config.output_dir is None:
        raise UserError("output_dir: say where the result goes, as in --output-dir runs/small")
    if config.output_dir.exists() and any(config.output_dir.iterdir()):
        raise UserError(f"{config.output_dir}: is not empty; choose another --output-dir")
    model = load(config.model, techniques=[config.method])

    def size() -> int:
        return sum(p.numel() * p.element_size() for p in model.net.parameters())

    before = size()
    chain.apply(model, [config.method])
    save(model, config.output_dir)
    print(f"{before / 2**20:.1f} MiB -> {size() / 2**20:.1f} MiB ({size() / before:.0%}); saved to {config.output_dir}")
    return 0
