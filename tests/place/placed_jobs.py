"""What the ranks of the tests do, and how the tests start them."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from burnish import chain
from burnish.chain import Model
from burnish.config import UserError
from burnish.device import resident_memory, return_freed_memory
from burnish.engine.decoding import GenerationConfig
from burnish.engine.generate import generate
from burnish.engine.order import collated, encode
from burnish.model.example import IGNORE, Example
from burnish.model.linear import Unread
from burnish.place.choice import placed
from burnish.place.ranks import Ranks, joined
from burnish.store.checkpoint import load

PROMPTS = [[6, 9, 12, 7, 30, 31, 8], [11, 10], [8, 22, 35, 6, 41], [17, 18, 19, 20, 21, 22, 23, 24, 25]]
DRAWN = {"do_sample": True, "temperature": 1.3, "seed": 5}
LOOPS = ({}, {"num_beams": 3}, {"penalty_alpha": 0.5, "top_k": 3}, {"prompt_lookup_num_tokens": 3})


@dataclass(frozen=True)
class Case:
    """A model's folder, what is applied to it, and where it runs."""

    name: str
    folder: str
    place: str
    techniques: list[Any] = field(default_factory=list)
    loops: bool = False
    measured: bool = False

    def load(self, ranks: Ranks | None = None) -> Model:
        placing = ranks is not None
        model = load(self.folder, techniques=self.techniques, unread=placing)
        chain.apply(model, self.techniques)
        return placed(model, self.place, ranks) if placing else model


@torch.no_grad()
def results(model: Model, loops: bool = False) -> dict[str, Any]:
    """Logits or hidden states at the real tokens of a padded batch, and replies where the model gives some."""
    examples = [Example(ids, [IGNORE] * 2 + ids[2:]) for ids in PROMPTS]
    batch = collated(model, encode(model, examples), "right" if model.spec.paired else "left")
    hidden = chain.forward(model, batch)
    found: dict[str, Any] = {"hidden": hidden[batch["attention_mask"].bool()]}
    if model.spec.head != "none":
        found["logits"] = model.net.logits(found["hidden"])
    if model.spec.generates:
        prompts = [Example(ids, [IGNORE] * len(ids)) for ids in PROMPTS]
        for options in (DRAWN, *(LOOPS if loops else ())):
            config = GenerationConfig(max_new_tokens=6 if loops else 3, batch_size=3 if loops else 4, **options)
            found[str(options)] = [reply.ids for reply in generate(model, prompts, config)]
    return found


def growth(case: Case, ranks: Ranks) -> int:
    """Bytes by which the process grows with its part of a model."""
    return_freed_memory()
    before = resident_memory()
    kept = case.load(ranks)
    assert not any(isinstance(part, Unread) for part in kept.net.modules())
    return resident_memory() - before


def answers(ranks: Ranks, cases: list[Case]) -> dict[str, Any]:
    """Each case's results, or the line that refuses it."""
    found: dict[str, Any] = {}
    for case in cases:
        try:
            found[case.name] = growth(case, ranks) if case.measured else results(case.load(ranks), case.loops)
        except UserError as error:
            found[case.name] = str(error)
    return found


def _rank(rank: int, world: int, port: int, job: Callable[..., Any], given: Any, out: str) -> None:
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()}
    with joined("cpu") as ranks:
        torch.save(job(ranks, given), f"{out}/{rank}.pt")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def on_ranks(world: int, job: Callable[..., Any], given: Any, out: Path) -> list[Any]:
    """What `job(ranks, given)` returns on every rank."""
    out.mkdir(parents=True)
    start, port = multiprocessing.get_context("spawn"), free_port()
    started = [start.Process(target=_rank, args=(rank, world, port, job, given, str(out))) for rank in range(world)]
    for process in started:
        process.start()
    for process in started:
        process.join(400)
        if process.is_alive():
            process.kill()
    assert [process.exitcode for process in started] == [0] * world
    return [torch.load(out / f"{rank}.pt") for rank in range(world)]
