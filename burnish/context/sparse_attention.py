"""Sparse attention: every layer's attention sees a window, or BigBird's blocks, instead of all positions.

    window:   |i - j| < sliding_window
    bigbird:  block(j) is global, near block(i), or one of those drawn for it; global blocks see everything

Sources: "Longformer" (arXiv 2004.05150), section 3.1, and "Big Bird" (arXiv 2007.14062), section 2 and appendices D
and E, whose blocks of 64, 2 of them global, 3 near and 3 drawn are the defaults. In a decoder nothing sees what follows
it, and blocks are drawn from earlier ones. Positions count the tokens of a document, so that padding, packing and a
cache change nothing; a prefix is seen from anywhere. Where the model has sliding windows of its own, both hold. Of an
encoder-decoder it is self-attention that changes, on both sides.

Limits: it is a mask over dense attention, which computes what a block-sparse kernel would leave out: it saves neither
time nor memory. BigBird's code also has the last block global and draws for each layer and head; here the first blocks
are, since where a text ends is not known while it is written, and one draw is for all. A model trained with full
attention needs training to get used to it. Models that transformers runs must take their attention function from its
registry.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from burnish.config import UserError, option
from burnish.model.bundle import Context, Model
from burnish.model.patterns import BigBird, Window


@dataclass(frozen=True)
class Config:
    """The pattern and its sizes."""

    pattern: Literal["window", "bigbird"] = option("bigbird", "a window, or BigBird's blocks")
    sliding_window: int = option(512, "window: positions, the query's own included; in an encoder to either side")
    block_size: int = option(64, "bigbird: positions of a block")
    global_blocks: int = option(2, "bigbird: blocks at the beginning that see, and are seen by, all")
    window_blocks: int = option(3, "bigbird: blocks around the query's own, an odd number")
    random_blocks: int = option(3, "bigbird: blocks drawn for each block")
    seed: int = option(0, "bigbird: what they are drawn from")


def apply(model: Model, config: Config, context: Context) -> Config:
    """Raises UserError for sizes that make no sense, and where the pattern cannot reach the model's attention."""
    least = {"sliding_window": 1, "block_size": 1, "global_blocks": 0, "window_blocks": 1, "random_blocks": 0}
    for name, smallest in least.items():
        if getattr(config, name) < smallest:
            raise UserError(
                f"technique 'sparse_attention': {name} is {getattr(config, name)}; at least {smallest} is needed"
            )
    if config.window_blocks % 2 == 0:
        raise UserError(
            f"technique 'sparse_attention': window_blocks is {config.window_blocks}; an odd number is needed, as many "
            "before a block as behind it"
        )
    rebuild(model, config)
    return config


def rebuild(model: Model, config: Config) -> None:
    if config.pattern == "window":
        return model.net.obey(Window(config.sliding_window))
    reach = -(-(model.spec.max_positions or 4096) // config.block_size)
    sizes = (config.block_size, config.global_blocks, config.window_blocks, config.random_blocks)
    model.net.obey(BigBird(*sizes, config.seed, reach))
