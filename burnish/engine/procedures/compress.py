"""`burnish quantize`: store a model's weights in fewer bits."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from burnish import chain
from burnish.chain import Context, Model
from burnish.config import UserError
from burnish.engine.proof import Made, ProofOptions, proven
from burnish.store.checkpoint import load, save
from burnish.store.data import encode_rows, read_rows

LONGEST = 1 << 20  # tokens of a row of calibration text, which is joined and cut anyway


@dataclass(frozen=True)
class QuantizeConfig(ProofOptions):
    """One model, one method or a chain of them."""

    positional: ClassVar[str] = "model"
    model: str = field(default="pebble", metadata={"help": "checkpoint folder, hub id or 'pebble'"})
    method: Literal["int8", "nf4", "fp4", "fp8", "int_groups", "gptq"] = field(
        default="nf4", metadata={"help": "how the weights are stored"}
    )
    techniques: list[Any] = field(
        default_factory=list, metadata={"help": "instead of a method, as in '[awq, {gptq: {bits: 3}}]'"}
    )
    data: str = field(default="", metadata={"help": "text to calibrate on; none: a built-in sample"})
    output_dir: Path | None = field(default=None, metadata={"help": "folder of the quantised model"})


def run(config: QuantizeConfig) -> int:
    """Quantise and save; prints each calibrated projection's error, the bytes before and after, and the proof."""
    if config.output_dir is None:
        raise UserError("output_dir: say where the result goes, as in --output-dir runs/small")
    techniques = config.techniques or [config.method]
    names = [name for name, _ in chain.parse_chain(techniques)]
    if config.data and not any(getattr(chain.technique(name), "CALIBRATES", False) for name in names):
        raise UserError(f"data: none of {', '.join(names)} calibrates; leave it away")

    def write(model: Model, place: Path) -> Made:
        before = size(model)
        chain.apply(model, techniques, Context(examples=examples(model, config.data), report=printer(config.json)))
        save(model, place)
        after = size(model)
        line = f"{before / 2**20:.1f} MiB -> {after / 2**20:.1f} MiB ({after / before:.0%})"
        return Made([line], {"before": before, "after": after})

    return proven(lambda: load(config.model, techniques=techniques), write, config.output_dir, config)


def size(model: Model) -> int:
    return sum(p.numel() * p.element_size() for p in model.net.parameters())


def examples(model: Model, data: str) -> list[Any]:
    """The rows of a file or data set, every token of theirs."""
    return encode_rows(read_rows(data), model.tokenizer, LONGEST, "all", data) if data else []


def printer(as_json: bool) -> Any:
    """What prints a projection's record: JSON, or a line on the error stream."""

    def show(record: dict[str, Any]) -> None:
        if as_json:
            print(json.dumps(record), flush=True)
            return
        error = record["error"]
        told = "rounded: no token reached it" if error is None else f"error {error:.2%}"
        print(f"{record['layer']}  {told}", file=sys.stderr, flush=True)

    return show
