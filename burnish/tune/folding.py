"""What remains to be done once trained corrections are folded into base weights."""

from __future__ import annotations

from collections.abc import Collection

from burnish.model.bundle import Model


def folded(model: Model, name: str, where: str, expanded: Collection[str]) -> str:
    """Note that technique `name` was merged into what `where` says; the paths `expanded` were quantised and are dense.

    The weights are then no stored checkpoint's any more, so the model loses its identity, and a quantisation in the
    chain the projections that are dense now.
    """
    for link in list(model.chain):
        if expanded and hasattr(link.config, "without"):
            link.config = link.config.without(expanded)
            if not link.config.target_modules:
                model.chain.remove(link)
    model.identity = ""
    note = f"{name}: merged into {where}"
    return note + (f", {len(expanded)} of them quantised and now dense in bfloat16" if expanded else "")
