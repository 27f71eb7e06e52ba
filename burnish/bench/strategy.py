"""A way to run a model, named by its parts: `int8+fused` is int8 weights on the fast path."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from burnish.config import UserError, nearest

STORAGE = ("int8", "nf4")
PLACES = ("layer_parallel", "tensor_parallel", "offload")
PARTS = ("plain", "fused", *STORAGE, *PLACES)
DEFAULT = (
    "plain", "fused", "int8", "int8+fused", "nf4+fused", "layer_parallel", "tensor_parallel", "tensor_parallel+fused",
    "offload",
)  # fmt: skip


@dataclass(frozen=True)
class Strategy:
    """`techniques` store the weights, `fused` decodes by the fast path, `place` is where the layers are, over `ranks`
    processes. Offload runs within `offload_limit` bytes; 0: half the model beside what the process takes."""

    techniques: Sequence[str] = ()
    fused: bool = False
    place: str | None = None
    ranks: int = 1
    offload_limit: int = 0

    def job(self) -> dict[str, Any]:
        return {**asdict(self), "techniques": list(self.techniques)}


def parse(name: str, ranks: int, memory_limit: int) -> Strategy:
    """Raises UserError for parts that are unknown or do not go together."""
    parts = name.split("+")
    for part in parts:
        if part not in PARTS:
            raise UserError(
                f"strategies: '{part}' is unknown{nearest(part, PARTS)}; known: {', '.join(PARTS)}, joined by +"
            )
    storage, places = ([part for part in parts if part in some] for some in (STORAGE, PLACES))
    place = places[0] if places else None
    if len(set(parts)) < len(parts) or len(storage) > 1 or len(places) > 1 or ("plain" in parts and len(parts) > 1):
        raise UserError(f"strategies: the parts of '{name}' exclude each other")
    if place == "offload" and len(parts) > 1:
        raise UserError(f"strategies: '{name}': offload runs a checkpoint as it is stored; save that one, and bench it")
    if place == "layer_parallel" and "fused" in parts:
        raise UserError(f"strategies: '{name}': layers that are spread over processes are not fused; leave one away")
    spread = ranks if place in ("layer_parallel", "tensor_parallel") else 1
    return Strategy(storage, "fused" in parts, place, spread, memory_limit if place == "offload" else 0)
