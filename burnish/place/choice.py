"""Where a model runs: whole, in layers over devices, or over the processes that torchrun started."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch

from burnish.config import UserError
from burnish.device import available_memory, pick_device, return_freed_memory
from burnish.model.bundle import Model
from burnish.model.transformer import Transformer
from burnish.place.layer_parallel import over_devices, over_ranks
from burnish.place.ranks import Ranks, joined
from burnish.place.tensor_parallel import split

Place = Literal["layer_parallel", "tensor_parallel"]
FREE_SHARE = 0.8  # of a device's free memory for layers; the rest is for keys, values and states


@contextmanager
def ranks_of(place: Place | None, device: str = "auto", max_memory: Mapping[str, int] | None = None) -> Iterator[Ranks]:
    """The processes that run the model, until the block ends: those of torchrun where `place` is over ranks.

    Raises UserError for a device that is not here, and for what does not go together.
    """
    started = int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ
    if max_memory and (place != "layer_parallel" or started):
        raise UserError("max_memory: is for place layer_parallel in one process; leave it away, or torchrun")
    if place == "tensor_parallel" and not started:
        raise UserError(
            "place: tensor_parallel needs several processes; start them with "
            "torchrun --nproc-per-node 2 -m burnish generate MODEL --place tensor_parallel"
        )
    if place is None and started:
        raise UserError("place: several processes were started, and each would run it all; say how to spread the model")
    if started:
        with joined(device) as ranks:
            yield ranks
        return
    for name in max_memory or ():
        pick_device(name)
    yield Ranks(device=pick_device(next(iter(max_memory)) if max_memory else device))


def placed(model: Model, place: Place | None, ranks: Ranks, max_memory: Mapping[str, int] | None = None) -> Model:
    """Leave of the model what belongs here, in place, for inference; best after `load(..., unread=True)`.

    `max_memory`: bytes by device for layer_parallel in one process, by default of what is free. Techniques are applied
    before. Raises UserError for a model that cannot be placed so.
    """
    if place is None:
        return model
    net = model.net
    if not isinstance(net, Transformer):
        raise UserError(f"place: a {model.spec.family} model is not burnish's own network; it runs in one place only")
    if model.adapters is not None:
        raise UserError("place: adapters under names run in one place only; give one adapter's folder as the model")
    net.requires_grad_(False)
    if place == "tensor_parallel":
        split(net, ranks)
    elif ranks.world > 1:
        over_ranks(net, ranks)
    else:
        over_devices(net, max_memory or free_memory(ranks.device))
    net.fixed = net.runs_only = f"the model is placed ({place}); apply techniques before that, and save it before that"
    return_freed_memory()
    return model


def free_memory(home: torch.device) -> dict[str, int]:
    """Bytes for layers on every device, `home` first, then the other GPUs, then the CPU."""
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())] if home.type == "cuda" else []
    named = str(home) if home.index is not None or home.type == "cpu" else f"{home.type}:0"
    names = dict.fromkeys([named, *gpus, "cpu"])
    return {name: int(FREE_SHARE * available_memory(name)) for name in names}
