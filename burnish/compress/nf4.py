"""NF4: four-bit weights whose sixteen levels are quantiles of a normal distribution.

Source: QLoRA (arXiv 2305.14314), section 3: 4-bit NormalFloat. `four_bit.py` has the equations.
"""

from __future__ import annotations

from dataclasses import replace

from burnish.compress.four_bit import Config, FourBit
from burnish.model.bundle import Context, Model
from burnish.model.surgery import reserve, store

CHANGES_BASE = True
STORES_ANEW = True
FROM_BASE = True
__all__ = ["Config"]


class NF4(FourBit):
    LEVELS = (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    )


def apply(model: Model, config: Config, context: Context) -> Config:
    paths = store(model.net, config.target_modules, NF4, context, double_quant=config.double_quant)
    return replace(config, target_modules=paths)


def rebuild(model: Model, config: Config) -> None:
    reserve(model.net, config.target_modules, NF4, double_quant=config.double_quant)
