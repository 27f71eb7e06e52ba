"""`burnish merge`: fold what was trained into the base weights, as a plain checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from burnish import chain
from burnish.chain import Model
from burnish.config import UserError
from burnish.engine.proof import Made, ProofOptions, proven
from burnish.store.checkpoint import load, save


@dataclass(frozen=True)
class MergeConfig(ProofOptions):
    """An adapter folder and where the merged model goes."""

    positional: ClassVar[str] = "model"
    model: str = field(default="", metadata={"help": "folder of a tuned model or adapter"})
    output_dir: Path | None = field(default=None, metadata={"help": "folder of the merged model"})


def run(config: MergeConfig) -> int:
    """Merge and save. Raises UserError where nothing can be merged, or something would stay unmerged."""
    if not config.model or config.output_dir is None:
        raise UserError("merge: give the adapter's folder and --output-dir")

    def write(model: Model, place: Path) -> Made:
        notes = chain.merge(model)
        chain.finalize(model)
        if not notes:
            names = [link.name for link in model.chain] or "nothing"
            raise UserError(
                f"{config.model}: holds {names}, which cannot be folded into the weights; mergeable: lora, ia3, peft:*"
            )
        save(model, place)
        return Made(notes, {"notes": notes})

    return proven(lambda: load(config.model), write, config.output_dir, config)
