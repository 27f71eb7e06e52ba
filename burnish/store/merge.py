"""`burnish merge`: fold what was trained into the base weights, as a plain checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from burnish import chain
from burnish.config import UserError
from burnish.store.checkpoint import load, save


@dataclass(frozen=True)
class MergeConfig:
    """An adapter folder and where the merged model goes."""

    positional: ClassVar[str] = "model"
    model: str = field(default="", metadata={"help": "folder of a tuned model or adapter"})
    output_dir: Path | None = field(default=None, metadata={"help": "folder of the merged model"})


def run(config: MergeConfig) -> int:
    """Merge and save. Raises UserError where nothing can be merged, or something would stay unmerged."""
    if not config.model or config.output_dir is None:
        raise UserError("merge: give the adapter's folder and --output-dir")
    if config.output_dir.exists() and any(config.output_dir.iterdir()):
        raise UserError(f"{config.output_dir}: is not empty; choose another --output-dir")
    model = load(config.model)
    notes = chain.merge(model)
    if not notes:
        names = [link.name for link in model.chain] or "nothing"
        raise UserError(
            f"{config.model}: holds {names}, which cannot be folded into the weights; mergeable: lora, ia3, peft:*"
        )
    save(model, config.output_dir)
    for note in notes:
        print(note)
    print(f"saved to {config.output_dir}")
    return 0
