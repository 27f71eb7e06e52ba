"""FP4: four-bit weights whose levels are floating-point numbers of two bits of exponent and one of mantissa.

Source: QLoRA (arXiv 2305.14314), section 4, which finds NF4 the better; the levels are bitsandbytes', over the largest.
`four_bit.py` has the equations.
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


class FP4(FourBit):
    LEVELS = (
        -1.0,
        -0.6666666666666666,
        -0.5,
        -0.3333333333333333,
        -0.25,
        -0.16666666666666666,
        -0.005208333333333333,
        -0.0,
        0.0,
        0.005208333333333333,
        0.16666666666666666,
        0.25,
        0.3333333333333333,
        0.5,
        0.6666666666666666,
        1.0,
    )


def apply(model: Model, config: Config, context: Context) -> Config:
    paths = store(model.net, config.target_modules, FP4, context, double_quant=config.double_quant)
    return replace(config, target_modules=paths)


def rebuild(model: Model, config: Config) -> None:
    reserve(model.net, config.target_modules, FP4, double_quant=config.double_quant)
