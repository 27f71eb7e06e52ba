"""Bottleneck adapters: small trained layers behind the sub-blocks of a frozen network.

    y = W x + b,    out = y + U f(D y + d) + u,    D in R^{size x hidden} Gaussian, U in R^{hidden x size} zero

so that training starts at the base's outputs. They stand where a sub-block's output projection ends, before the
residual is added: behind attention and feed-forward, with trained layer norms and classification head ("houlsby"), or
behind the feed-forward alone ("pfeiffer"; here at the same place, not behind the sum and its norm). Source: arXiv
1902.00751, section 2.1, for houlsby; AdapterFusion (arXiv 2005.00247), section 3.1, for pfeiffer. The projection may
have any `Weight`; D and U are kept in float32 and applied in the activations' dtype.

Limits: nothing to merge, as f is not linear; models through transformers need output projections with a usual name;
saved in burnish's own format, as peft has no bottleneck adapters.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from burnish.config import UserError, option
from burnish.model.bundle import Context, Model
from burnish.model.network import Network
from burnish.model.surgery import replace as put
from burnish.model.transformer import ACTIVATIONS
from burnish.tune.roles import projections
from burnish.tune.unfreeze import unfreeze

ROLES = {"houlsby": ("attention output", "feed-forward output"), "pfeiffer": ("feed-forward output",)}
STD = 0.01  # of D's start, cut at two of them (Houlsby et al., section 3.1)


@dataclass(frozen=True)
class Config:
    """Where the adapters stand and what trains beside them."""

    size: int = option(64, "units of the bottleneck")
    reduction_factor: float | None = option(None, "hidden size over bottleneck, instead of size")
    placement: Literal["houlsby", "pfeiffer"] = option(
        "houlsby", "behind attention and feed-forward, or behind the feed-forward alone"
    )
    activation: Literal["relu", "gelu", "gelu_tanh", "silu"] = option("gelu", "function between the two layers")
    train_norms: bool | None = option(None, "layer norms train too; none: with houlsby")
    train_head: bool | None = option(None, "a classifier's head trains too; none: with houlsby")


class Adapter(nn.Module):
    """A projection, whatever is around it already, and the bottleneck behind it; x (..., in) -> (..., hidden)."""

    def __init__(self, base: nn.Module, width: int, config: Config):
        super().__init__()
        device = next(base.parameters()).device
        self.base = base
        self.act = ACTIVATIONS[config.activation]
        self.down = nn.Parameter(torch.zeros(config.size, width, device=device, dtype=torch.float32))
        self.down_bias = nn.Parameter(torch.zeros(config.size, device=device, dtype=torch.float32))
        self.up = nn.Parameter(torch.zeros(width, config.size, device=device, dtype=torch.float32))
        self.up_bias = nn.Parameter(torch.zeros(width, device=device, dtype=torch.float32))
        self.train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        low = self.act(F.linear(y, self.down.to(y.dtype), self.down_bias.to(y.dtype)))
        return y + F.linear(low, self.up.to(y.dtype), self.up_bias.to(y.dtype))


def apply(model: Model, config: Config, context: Context) -> Config:
    """Wrap the output projections; the resolved config has the bottleneck's size.

    Raises UserError for a size below 1, `train_head` without a classifier, and where a model's output projections are
    not found.
    """
    size, factor = config.size, config.reduction_factor
    if factor is not None:
        size = int(model.spec.hidden_size / factor) if factor > 0 else 0
    if size < 1:
        what = f"size is {size}" if factor is None else f"reduction_factor is {factor}"
        raise UserError(f"technique 'adapters': {what}; the bottleneck needs at least 1 of {model.spec.hidden_size}")
    own = config.placement == "houlsby"
    norms_too = own if config.train_norms is None else config.train_norms
    head_too = own and model.spec.head == "classification" if config.train_head is None else config.train_head
    if head_too and model.spec.head != "classification":
        raise UserError(f"technique 'adapters': train_head is for classifiers; this model's head is {model.spec.head}")
    config = replace(config, size=size, reduction_factor=None, train_norms=norms_too, train_head=head_too)
    rebuild(model, config)
    generator = torch.Generator().manual_seed(context.seed)
    for module in model.net.modules():
        if isinstance(module, Adapter):
            start = nn.init.trunc_normal_(torch.empty(module.down.shape), 0, STD, -2 * STD, 2 * STD, generator)
            module.down.data.copy_(start)
    return config


def rebuild(model: Model, config: Config) -> None:
    width = model.spec.hidden_size
    for role in ROLES[config.placement]:
        for path in projections(model.net, role, "adapters"):
            put(model.net, path, lambda base: Adapter(base, width, config))
    for norm in norms(model.net) if config.train_norms else ():
        norm.requires_grad_(True)
    for head in model.net.head_modules() if config.train_head else ():
        unfreeze(head)


def norms(net: Network) -> list[nn.Module]:
    """The norms of the body, whoever wrote them; a head's are its own."""
    heads = {module for head in net.head_modules() for module in head.modules()}
    return [module for module in net.modules() if type(module).__name__.endswith("Norm") and module not in heads]
