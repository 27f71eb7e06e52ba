"""Weights that are made while a model loads and are too many for its memory: they wait in a temporary file."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Set
from pathlib import Path

import torch
from torch import nn

from burnish.model.linear import Linear
from burnish.model.network import Network
from burnish.place.units import ALIGNMENT
from burnish.store.tensors import Entry


class Spill:
    """A file that projections' weights are written to as soon as they are stored anew, those whose dense matrices have
    their names in `away`. It goes when the network does. `plan`: parameter -> its place in the file, for `Offload`."""

    def __init__(self, net: Network, away: Set[str]):
        folder = tempfile.TemporaryDirectory(prefix="burnish-")
        weakref.finalize(net, folder.cleanup)
        self.file = Path(folder.name) / "weights"
        found = {id(module): path for path, module in net.named_modules() if isinstance(module, Linear)}
        self.paths = {key: path for key, path in found.items() if f"{path}.weight.dense" in away}
        self.plan: dict[str, tuple[Entry, bool, torch.dtype]] = {}

    def take(self, path: str, linear: Linear) -> None:
        """Write the weight of a projection, and leave its shape in its place."""
        where = self.paths.get(id(linear))
        if where is None:
            return
        with open(self.file, "ab") as file:
            for name, parameter in list(linear.weight.named_parameters()):
                tensor = parameter.detach().contiguous()
                file.write(bytes(-file.tell() % ALIGNMENT))
                start = file.tell()
                file.write(memoryview(tensor.view(-1).view(torch.uint8).cpu().numpy()))  # type: ignore[arg-type]
                entry = Entry(self.file, tensor.dtype, tuple(tensor.shape), start, file.tell())
                self.plan[f"{where}.weight.{name}"] = entry, False, tensor.dtype
                empty = torch.empty_like(tensor, device="meta")
                setattr(linear.weight, name, nn.Parameter(empty, requires_grad=False))
