"""burnish: adapt, shrink, stretch and run a language model, and measure what each choice costs and buys."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

PUBLIC = {
    "load": "burnish.store.checkpoint",
    "load_adapters": "burnish.store.mixed",
    "apply": "burnish.chain",
    "merge": "burnish.chain",
    "unmerge": "burnish.chain",
    "train": "burnish.engine.train",
    "generate": "burnish.engine.generate",
    "measure": "burnish.bench.measure",
    "compare": "burnish.bench.compare",
    "plan": "burnish.plan",
}
__all__ = ["__version__", *PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module 'burnish' has no attribute '{name}'")
    return getattr(importlib.import_module(PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(ModuleType):
    """Keeps `burnish.plan` the function: importing the submodule of that name would put the module there."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in PUBLIC and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
