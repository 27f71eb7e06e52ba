"""The processes that run one model together: their group, what they tell each other, and whether all are alive.

Every rank runs the same program on the same prompts and takes part in every exchange, so that there is no protocol
beside the collectives of torch.distributed: gloo between CPUs, NCCL between GPUs. Each counts up in torchrun's store
once a second, from before the group is made; one whose count stands still, or that says it failed, ends the others with
a line that names it, and so does one that does not come.
"""

from __future__ import annotations

import json
import os
import socket
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
ARRIVAL = 40  # seconds for all to come: ranks that start together differ by a fraction of what importing torch takes
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


def address() -> tuple[str, int]:
    """Where the store is. Raises UserError where torchrun's variables do not say."""
    try:
        return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except (KeyError, ValueError) as error:
        raise UserError(f"MASTER_ADDR, MASTER_PORT: {error} is not set or no number; let torchrun set them") from None


def connect(hosts: bool, until: float) -> dist.TCPStore:
    """A connection to the store, which this rank `hosts`, or else rank 0 or torchrun. Raises UserError where there is
    none by the time `until`."""
    host, port = address()
    libuv = os.environ.get("USE_LIBUV", "1") == "1"  # as torch's own rendezvous
    while not hosts:  # torch's own attempts take up to twice their timeout, and print a stack trace each
        try:
            socket.create_connection((host, port), BEAT).close()
            break
        except OSError as error:
            if time.monotonic() > until:
                raise UserError(absent("rank 0", error.strerror or str(error))) from None
            time.sleep(BEAT / 10)
    try:
        return dist.TCPStore(host, port, is_master=hosts, wait_for_workers=False, use_libuv=libuv)
    except RuntimeError as error:
        raise UserError(f"MASTER_PORT: no store at {host}:{port}: {str(error).splitlines()[0]}; give another") from None


def absent(who: str, why: str = "") -> str:
    """The line about ranks that did not come."""
    return (
        f"{who} of {os.environ['WORLD_SIZE']} did not come to {':'.join(map(str, address()))} within {ARRIVAL} s"
        f"{why and f' ({why})'}: not started, or dead before that; start all together, and read what the missing said"
    )


class Pulse(threading.Thread):
    """Counts up for this rank and watches the counts of the others; a rank that is lost ends the process."""

    def __init__(self, rank: int, world: int):
        super().__init__(daemon=True)
        self.until = time.monotonic() + ARRIVAL
        self.rank, self.seen = rank, {other: (0, 0) for other in range(world) if other != rank}
        self.hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        self.store = connect(self.hosts, self.until)  # its own: calls on one connection block each other
        self.stopped = threading.Event()
        self.count(rank, 1)

    def count(self, rank: int, more: int = 0) -> int:
        """A rank's beats so far; none before it is here."""
        return self.store.add(f"burnish/beat/{rank}", more)

    def await_all(self) -> None:
        """Wait until every rank is here. Raises UserError with those that are not in time."""
        with reaching():
            while missing := [str(other) for other in self.seen if not self.count(other)]:
                if time.monotonic() > self.until:
                    raise UserError(absent(f"{'ranks' if missing[1:] else 'rank'} {', '.join(missing)}"))
                time.sleep(BEAT / 10)

    def run(self) -> None:
        while not self.stopped.wait(BEAT):
            try:
                self.beat()
            except RuntimeError:  # the store is rank 0's, or torchrun's on its machine
                if not self.stopped.is_set():
                    self.end(0, "is gone, and the store with it")

    def beat(self) -> None:
        """Count up once, and look at the others."""
        self.count(self.rank, 1)
        if self.store.add("burnish/wrong", 0) and not self.stopped.is_set():
            self.leave()
            os._exit(2)
        if self.store.check(["burnish/verdict"]):
            self.leave()
            self.end(*json.loads(self.store.get("burnish/verdict")))
        for other, (last, silent) in self.seen.items():
            count = self.count(other)
            if count < 0:
                self.judge(other, "ended with an error")
            self.seen[other] = count, silent + 1 if 0 != count == last else 0
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
        others = sum(self.count(other) != 0 for other in self.seen)
        for _ in range(SILENCE if self.hosts else 0):
            if self.store.add("burnish/left", 0) > others:
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
        self.count(self.rank, FAILED)

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
    pulse = Pulse(rank, world)
    pulse.start()
    try:
        pulse.await_all()
        ranks = Ranks(rank, world, own_device(device))
        if ranks.device.type == "cuda":
            torch.cuda.set_device(ranks.device)
        store = connect(False, pulse.until)
        store.set_timeout(TIMEOUT)
        backend = "nccl" if ranks.device.type == "cuda" else "gloo"
        with reaching():
            dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=TIMEOUT)
        ranks.meet()
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
