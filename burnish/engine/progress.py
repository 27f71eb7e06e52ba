"""Where a training run tells how far it is: the terminal and TensorBoard."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Protocol, TextIO

from burnish.config import UserError


class Progress(Protocol):
    """Called after every step; `eta` is the time left in seconds, `loss` the mean per target of the step."""

    def __call__(self, step: int, total: int, loss: float, lr: float, tokens_per_second: float, eta: float) -> None: ...


class Terminal:
    """One line that renews itself on a terminal; elsewhere a plain line every `seconds`, and for the first
    and last step.
    """

    def __init__(self, stream: TextIO | None = None, seconds: float = 10.0):
        self.stream = stream or sys.stderr
        self.renews = self.stream.isatty()
        self.seconds = 0.1 if self.renews else seconds
        self.shown = float("-inf")

    def __call__(self, step: int, total: int, loss: float, lr: float, tokens_per_second: float, eta: float) -> None:
        now = time.monotonic()
        if now - self.shown < self.seconds and step < total:
            return
        self.shown = now
        text = (
            f"step {step}/{total} {step * 100 // total}%  loss {loss:.4f}  lr {lr:.2e}  "
            f"{tokens_per_second:,.0f} tokens/s  {duration(eta)} left"
        )
        # The cursor waits at the start of the renewing line, so that a message overwrites it.
        ending = "\n" if step == total or not self.renews else "\r"
        self.stream.write(text + ("\x1b[K" if self.renews else "") + ending)
        self.stream.flush()


def duration(seconds: float) -> str:
    """ "42s", "3m05s" or "2h10m"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02}m"


class Board:
    """Scalars for TensorBoard under `folder`; from `step` on, what an interrupted run wrote later is hidden."""

    def __init__(self, folder: Path, step: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError("report_to: tensorboard is not installed; pip install tensorboard") from None
        self.writer = SummaryWriter(str(folder), purge_step=step + 1)

    def __call__(self, step: int, **scalars: float) -> None:
        for name, value in scalars.items():
            self.writer.add_scalar(f"train/{name}", value, step)

    def close(self) -> None:
        self.writer.close()
