"""The processes that run one model together: their group, what they tell each other, and whether all are alive.

Every rank runs the same program on the same prompts and takes part in every exchange, so that there is no protocol
beside the collectives of torch.distributed: gloo between CPUs, NCCL between GPUs. Each counts up in torchrun's store
once a second; one whose count stands still, or that says it failed, ends the others with a line that names it.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from burnish.config import UserError
from burnish.device import pick_device

TIMEOUT = timedelta(minutes=30)  # of one exchange; the dead are found sooner
BEAT = 1.0  # seconds
SILENCE = 20  # beats without a sign of life
FAILED = -(1 << 40)  # added to the count of a rank that ends with an error
CPU = torch.device("cpu")


class Lost(Exception):
    """An exchange failed because another rank is gone."""


@contextmanager
def reaching() -> Iterator[None]:
    """An exchange inside: gloo and NCCL report a dead peer as any RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        raise Lost(str(error).splitlines()[0]) from error


@dataclass(frozen=True)
class Ranks:
    """This process's place among `world`, and its device. Alone, without a group, it is rank 0 of 1."""

    rank: int = 0
    world: int = 1
    device: torch.device = CPU

    @property
    def last(self) -> int:
        return self.world - 1

    def sum(self, x: Tensor) -> Tensor:
        """The sum of all ranks' x, in place; x is contiguous."""
        with reaching():
            dist.all_reduce(x)
        return x

    def gather(self, x: Tensor) -> list[Tensor]:
        """All ranks' x, which have one shape."""
        parts = [torch.empty_like(x) for _ in range(self.world)]
        with reaching():
            dist.all_gather(parts, x.contiguous())
        return parts

    def from_last(self, x: Tensor) -> Tensor:
        """The last rank's x, in place of the others'; x is contiguous."""
        with reaching():
            dist.broadcast(x, self.last)
        return x

    def send(self, x: Tensor) -> Any:
        """Begin to give x to the next rank; waiting for what is returned ends it."""
        with reaching():
            return dist.isend(x, self.rank + 1)

    def receive(self, x: Tensor) -> Any:
        """Begin to fill x from the rank before; waiting for what is returned ends it."""
        with reaching():
            return dist.irecv(x, self.rank - 1)

    def wait(self, begun: Any) -> None:
        with reaching():
            begun.wait()

    def meet(self) -> None:
        """Wait for all ranks."""
        with reaching():
            dist.barrier(device_ids=None if self.device.index is None else [self.device.index])

    def share(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        held = [value]
        if self.world > 1:
            with reaching():
                dist.broadcast_object_list(held, 0, device=self.device)
        return held[0]


class Pulse(threading.Thread):
    """Counts up for this rank and watches the counts of the others; a rank that is lost ends the process."""

    def __init__(self, rank: int, world: int):
        super().__init__(daemon=True)
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self.store = dist.TCPStore(*address, is_master=False)  # a connection of its own: calls on one block each other
        self.rank, self.seen = rank, {other: (0, 0) for other in range(world) if other != rank}
        self.hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        self.stopped = threading.Event()

    def run(self) -> None:
        while not self.stopped.wait(BEAT):
            try:
                self.beat()
            except RuntimeError:  # the store is rank 0's, or torchrun's on its machine
                if not self.stopped.is_set():
                    self.end(0, "is gone, and the store with it")

    def beat(self) -> None:
        """Count up once, and look at the others."""
        self.store.add(f"burnish/beat/{self.rank}", 1)
        if self.store.add("burnish/wrong", 0) and not self.stopped.is_set():
            self.leave()
            os._exit(2)
        if self.store.check(["burnish/verdict"]):
            self.leave()
            self.end(*json.loads(self.store.get("burnish/verdict")))
        for other, (last, silent) in self.seen.items():
            count = self.store.add(f"burnish/beat/{other}", 0)
            if count < 0:
                self.judge(other, "ended with an error")
            self.seen[other] = count, 0 if count != last else silent + 1
            if self.seen[other][1] >= SILENCE:
                self.judge(other, f"gave no sign of life for {SILENCE * BEAT:.0f} s: it has died or hangs")

    def judge(self, other: int, what: str) -> None:
        self.store.set("burnish/verdict", json.dumps([other, what]))
        if self.store.add("burnish/judged", 1) == 1:
            self.store.add("burnish/left", 1)  # for the dead
        self.leave()
        self.end(other, what)

    def leave(self) -> None:
        """Say that this rank knows why the run ends; where the store is its own, wait for the others to know it."""
        self.store.add("burnish/left", 1)
        for _ in range(SILENCE if self.hosts else 0):
            if self.store.add("burnish/left", 0) > len(self.seen):
                return
            time.sleep(BEAT)

    def end(self, other: int, what: str) -> None:
        if self.stopped.is_set():
            return
        print(f"burnish: rank {other} {what}; rank {self.rank} ends too", file=sys.stderr, flush=True)
        os._exit(1)

    def stop(self) -> None:
        self.stopped.set()
        self.join(2 * BEAT)  # a thread in torch's code could abort an interpreter that ends

    def failed(self) -> None:
        """Let the others end."""
        self.stop()
        self.store.add(f"burnish/beat/{self.rank}", FAILED)

    def wrong(self) -> bool:
        """Let the others end because the input is wrong; whether this rank is the first that found it so."""
        self.stop()
        first = self.store.add("burnish/wrong", 1) == 1
        self.leave()
        return first


@contextmanager
def joined(device: str = "auto") -> Iterator[Ranks]:
    """The processes that torchrun started as one group, until the block ends.

    What is wrong with the input is told by the first rank that raises UserError; the others end silently, with 2.
    """
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    ranks = Ranks(rank, world, own_device(device))
    if ranks.device.type == "cuda":
        torch.cuda.set_device(ranks.device)
    store = next(iter(dist.rendezvous("env://")))[0]
    backend = "nccl" if ranks.device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=TIMEOUT)
    ranks.meet()
    pulse = Pulse(rank, world)
    pulse.start()
    try:
        yield ranks
        ranks.meet()
        pulse.stop()
    except UserError:
        if not pulse.wrong():
            time.sleep(BEAT)  # torchrun ends all once one has ended: let the first say why
            raise SystemExit(2) from None
        raise
    except Lost as error:
        pulse.join(2 * SILENCE * BEAT)  # it knows by then who, and ends the process
        raise RuntimeError(f"rank {rank} cannot reach the others: {error}") from error
    except BaseException:
        pulse.failed()
        raise
    dist.destroy_process_group()


def own_device(name: str) -> torch.device:
    """The device of this rank: its own GPU of its machine, by LOCAL_RANK, or the CPU. Raises UserError where the
    machine has fewer GPUs than ranks, or one is named."""
    device = pick_device(name)
    if device.type == "cpu":
        return device
    if device.index is not None:
        raise UserError(f"device: '{name}' is one GPU, and every rank needs its own; say cuda or cpu")
    local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= count:
        raise UserError(
            f"rank {os.environ['RANK']} has no GPU of its own: torch sees {count} CUDA devices; start "
            f"torchrun with --nproc-per-node {count}, or give --device cpu"
        )
    return torch.device("cuda", local)
