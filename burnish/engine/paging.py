"""AdamW whose two moments live in pages outside of the training's memory and are brought in when they are stepped.

Source: QLoRA (arXiv 2305.14314), section 3, paged optimisers. There the driver moves pages when a GPU runs short; here
they move at every step, at most `limit` bytes of them at a time, so that the optimiser takes no more whatever its size.

- On a CPU the pages are a mapped file without a name, which is gone with the process however it ends. After use they go
  back to the kernel, which keeps in its cache what has room and leaves the rest on the disk.
- On a GPU they are pinned memory of the host, copied to the device for a step and back.

The numbers are those of the unpaged optimiser, bit for bit: its kernel runs on slices, and it is elementwise.
"""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from burnish.config import UserError

PAGE = mmap.PAGESIZE
SMALLEST_LIMIT = 2 * PAGE  # one page of each moment
MOMENTS = ("exp_avg", "exp_avg_sq")


class PagedAdamW(torch.optim.AdamW):
    """torch's fused AdamW, whose state has the same names and shapes; its moments lie in pages.

    `limit`: bytes of moments that are in memory at a time, at least `SMALLEST_LIMIT`; `folder`: where the file of a
    CPU's pages is, none for the system's temporary folder. Parameters are contiguous.
    """

    def __init__(
        self, groups: list[dict[str, Any]], betas: tuple[float, float], eps: float, limit: int, folder: Path | None
    ):
        super().__init__(groups, betas=betas, eps=eps, fused=True)
        self.limit, self.resident = limit, 0
        self.places: dict[Tensor, int] = {}  # where in the file a parameter's pages begin
        size = 0
        for p in self._parameters():
            if p.device.type == "cpu":
                self.places[p] = size
                size += _paged_bytes(p)
        self.file = _map_scratch(size, folder or Path(tempfile.gettempdir())) if size else None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient, slice by slice."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p not in self.state:
                    self.state[p] = {"step": torch.zeros((), device=p.device), **self._moments(p)}
                count = self.state[p]["step"].add_(1)
                whole = (p, p.grad, *(self.state[p][name] for name in MOMENTS))
                for part in zip(*(self._slices(tensor) for tensor in whole), strict=True):
                    self._update(group, count, *part)
        self.give_back()
        for device in {p.device for p in self.state if p.device.type == "cuda"}:
            torch.cuda.synchronize(device)  # the pages are whole when a checkpoint reads them

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """The state of an AdamW, paged or not, copied into pages."""
        super().load_state_dict({**state_dict, "state": {}})
        parameters = self._parameters()
        for index, loaded in state_dict["state"].items():
            p = parameters[index]
            self.state[p] = {"step": loaded["step"].to(p.device, copy=True), **self._moments(p)}
            for name in MOMENTS:
                for page, values in zip(self._slices(self.state[p][name]), self._slices(loaded[name]), strict=True):
                    page.copy_(values)
                    self.give_back()

    def give_back(self) -> None:
        """Take the pages out of this process's memory; what they hold stays."""
        self.resident = 0
        if self.file is not None and hasattr(mmap, "MADV_DONTNEED"):
            self.file.madvise(mmap.MADV_DONTNEED)

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _moments(self, p: Tensor) -> dict[str, Tensor]:
        """A parameter's pages, which hold zeros at first."""
        if self.file is None or p not in self.places:
            return {name: torch.zeros(p.shape, dtype=p.dtype, pin_memory=True) for name in MOMENTS}
        starts = self.places[p], self.places[p] + _paged_bytes(p) // 2
        return {
            name: torch.frombuffer(self.file, dtype=p.dtype, count=p.numel(), offset=start).view(p.shape)
            for name, start in zip(MOMENTS, starts, strict=True)
        }

    def _slices(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Flat views of whole pages, but for the last one; both moments of a slice are within the limit."""
        return tensor.view(-1).split(self.limit // SMALLEST_LIMIT * PAGE // tensor.element_size())

    def _update(
        self, group: dict[str, Any], count: Tensor, p: Tensor, gradient: Tensor, first: Tensor, second: Tensor
    ) -> None:
        """One slice's step, the `count`-th."""
        taken = _paged_bytes(p)
        if self.resident + taken > self.limit:
            self.give_back()
        self.resident += taken
        near = [page.to(p.device, non_blocking=True) for page in (first, second)]
        torch._fused_adamw_(
            [p],
            [gradient],
            near[:1],
            near[1:],
            [],
            [count],
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )
        for page, moment in zip((first, second), near, strict=True):
            if moment is not page:
                page.copy_(moment, non_blocking=True)


def _paged_bytes(p: Tensor) -> int:
    """Bytes of the whole pages that hold both moments of p."""
    return 2 * (-(-p.numel() * p.element_size() // PAGE) * PAGE)


def _map_scratch(size: int, folder: Path) -> mmap.mmap:
    """A mapped file of zeros in `folder` that has no name and all its room on the disk, since a full disk would end the
    process later on. Raises UserError where there is no room, or no writing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if size > free:
            raise OSError(0, f"it needs {size >> 20} MiB, and {free >> 20} MiB are free")
        with tempfile.TemporaryFile(dir=folder) as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
            return mmap.mmap(file.fileno(), size)
    except OSError as error:
        raise UserError(
            f"optim: paged_adamw cannot keep its pages in {folder}: {error.strerror}; "
            "set output_dir to a folder on another disk, or optim: adamw"
        ) from None
