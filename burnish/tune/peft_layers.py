"""How peft sees a burnish network, and how the network runs peft's layers.

peft works on a transformers model. `skeleton` makes one whose matrices take no memory and whose modules are the
network's own under Hugging Face's names; peft changes it, and `install` puts each layer that it replaced into the
network. What peft trains, and what it saves under which name, is then what it does on the transformers model itself.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from burnish.config import UserError
from burnish.model.bundle import Model
from burnish.model.foreign import construct, read_config
from burnish.model.linear import Dense, Linear, by_tokens
from burnish.model.network import Network
from burnish.model.surgery import replace

HALF = (torch.bfloat16, torch.float16)


def zeros(shape: Sequence[int]) -> Tensor:
    """Zeros on the CPU that take no memory."""
    return torch.zeros(1, device="cpu").expand(*shape)


class Shown(nn.Module):
    """A projection as peft knows it: the weight and bias are burnish's, wherever they are kept.

    A quantised weight shows itself dense. A weight without storage is shown as zeros on the CPU, so that what peft
    draws or computes beside it is real while a stored model is rebuilt.
    """

    linear: Linear

    def __init__(self, linear: Linear):
        nn.Module.__init__(self)
        self.__dict__["linear"] = linear  # no child: the network has it
        self.nx = self.in_features = linear.in_features
        self.nf = self.out_features = linear.out_features

    @property
    def matrix(self) -> Tensor:
        """(out, in)"""
        stored = self.linear.weight
        if any(parameter.is_meta for parameter in stored.parameters()):
            return zeros(stored.shape)
        return stored.dense if isinstance(stored, Dense) else stored.dequantize()

    @property
    def weight(self) -> Tensor:
        return self.matrix

    @property
    def bias(self) -> Tensor | None:
        bias = self.linear.bias
        return zeros(bias.shape) if bias is not None and bias.is_meta else bias

    def forward(self, x: Tensor) -> Tensor:
        return by_tokens(self.linear, x)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        """The module with weights of its own, on which peft trains a copy, or merges."""
        kind: Any = nn.Linear if isinstance(self, nn.Linear) else Conv1D
        module = kind.__new__(kind)
        nn.Module.__init__(module)
        module.__dict__.update({name: getattr(self, name) for name in ("in_features", "out_features", "nx", "nf")})
        for name, value in (("weight", self.weight), ("bias", self.bias)):
            copied = None if value is None else value.detach().clone(memory_format=torch.contiguous_format)
            module.register_parameter(name, None if copied is None else nn.Parameter(copied))
        return module


class ShownLinear(Shown, nn.Linear):  # type: ignore[misc, override]
    """torch's, with a weight (out, in)."""


class ShownConv1D(Shown, Conv1D):  # type: ignore[misc]
    """transformers', with a weight (in, out)."""

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.matrix.t()


class Adapted(nn.Module):
    """A module of the network and peft's layer around it.

    Activations are (tokens, width) in the native network, (batch, tokens, width) for peft; 16-bit ones are computed
    under autocast, as peft's own parameters are float32. What is asked of it besides, its base answers.
    """

    def __init__(self, base: nn.Module, layer: nn.Module, owner: PeftModel):
        super().__init__()
        self.base, self.layer = base, layer
        self.__dict__["owner"] = owner
        self.train(base.training)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """What is given to it, as when weights are tied, is its base's."""
        self.base.register_parameter(name, param)

    def merged(self) -> nn.Module:
        """The base with peft's layer folded into it, in float32; a projection is a copy, other modules are changed."""
        layer: Any = self.layer
        if isinstance(self.base, Linear) and hasattr(layer, "base_layer"):
            layer.base_layer = copy.deepcopy(layer.base_layer).float()
        if hasattr(layer, "unload_and_optionally_merge_module"):
            return layer.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
        layer.merge()
        return layer.base_layer

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return self.layer(x)
        mixed = torch.autocast(x.device.type, x.dtype) if x.dtype in HALF else nullcontext()
        with mixed:
            out = self.layer(x[None])[0] if x.dim() == 2 else self.layer(x)
        return out.to(x.dtype)


def skeleton(model: Model) -> tuple[Any, dict[str, str]]:
    """(a transformers model that has the network's own modules, their paths in it -> in the network)."""
    net = model.net
    hf = construct(read_config(model.hf_config), net.spec.head)
    bare = net.layout.prefix if net.spec.head == "none" else ""
    paths = {foreign.removeprefix(bare): path for path, foreign in net.layout.modules.items() if has(net, path)}
    leaves = {path: module for path, module in hf.named_modules() if not any(module.children())}
    paths = {foreign: path for foreign, path in paths.items() if foreign in leaves}
    for foreign, path in paths.items():
        own: Any = net.get_submodule(path)
        if isinstance(own, Linear):
            own = (ShownConv1D if isinstance(leaves[foreign], Conv1D) else ShownLinear)(own)
        replace(hf, foreign, lambda _, own=own: own)  # type: ignore[misc]
    return hf, paths


def has(net: Network, path: str) -> bool:
    try:
        net.get_submodule(path)
    except AttributeError:
        return False
    return True


@contextmanager
def filled(hf: Any) -> Iterator[None]:
    """Inside the block the parameters of leaves that have no storage are zeros, as `Shown` shows them."""
    leaves = [module for module in hf.modules() if not any(module.children())]
    empty = [(m, name, p) for m in leaves for name, p in m._parameters.items() if p is not None and p.is_meta]
    for module, name, parameter in empty:
        module._parameters[name] = nn.Parameter(zeros(parameter.shape), requires_grad=parameter.requires_grad)
    try:
        yield
    finally:
        for module, name, parameter in empty:
            module._parameters[name] = parameter


def peft_model(hf: Any, options: Any, name: str) -> PeftModel:
    """The skeleton changed by peft, for the technique `name`."""
    with filled(hf):
        changed: Any = PeftModel(hf, options)
    changed.technique = name
    return changed


def install(net: Network, changed: PeftModel, paths: dict[str, str]) -> None:
    """Put the layers that peft made in the skeleton into the network. Raises UserError where it has no such module."""
    outermost: dict[str, Any] = {}
    for path, module in changed.get_base_model().named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in outermost)
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper, Adapted)) and not inside:
            outermost[path] = module
    found = {path: module for path, module in outermost.items() if not isinstance(module, Adapted)}
    for path in found:
        own = net.get_submodule(paths[path]) if path in paths else None
        if own is None or (any(own.children()) and type(own) is not Linear):
            raise UserError(
                f"technique '{changed.technique}': it cannot change '{path}' of this {net.spec.family} model"
            )
    for path, layer in found.items():
        replace(net, paths[path], lambda base, layer=layer: Adapted(base, layer, changed))  # type: ignore[misc]
