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

    def read() -> Model:
        model = load(config.model)
        names = [link.name for link in model.chain]
        if not names or model.whole:
            raise UserError(
                f"{config.model}: is a plain checkpoint already, with nothing to fold in; merge takes folders of lora, "
                "ia3 or peft:*"
            )
        if not any(hasattr(chain.technique(name), "merge") for name in names):
            what = ", ".join(names)
            raise UserError(
                f"{config.model}: holds {what}, which cannot be folded into the weights; mergeable: lora, ia3, peft:*"
            )
        return model

    def write(model: Model, place: Path) -> Made:
        notes = chain.merge(model)
        chain.finalize(model)
        save(model, place)
        return Made(notes, {"notes": notes})

    return proven(read, write, config.output_dir, config)
