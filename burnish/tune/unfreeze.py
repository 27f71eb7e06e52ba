"""Which parameters may train."""

from __future__ import annotations

from torch import nn

from burnish.model.linear import Dense, Weight


def unfreeze(module: nn.Module) -> None:
    """Let every floating parameter below train, but for quantised storage."""
    for part in module.modules():
        if not isinstance(part, Weight) or isinstance(part, Dense):
            for parameter in part.parameters(recurse=False):
                parameter.requires_grad_(parameter.is_floating_point())
