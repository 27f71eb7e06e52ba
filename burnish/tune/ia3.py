"""(IA)^3: learned vectors that rescale keys, values and the inner activations of the feed-forward.

    softmax(Q (l_k * K)^T / sqrt(d)) (l_v * V),    (l_ff * f(W1 x)) W2,    l_k, l_v, l_ff = 1 at the start

Source: T-Few (arXiv 2205.05638), section 3.3. Keys and values are scaled as their projection gives them: before
rotation, and before what a family does to them (norms, MPT's clipping). Of a fused projection only the rows of keys
and values are. `peft_compatible` scales what peft's IA3 does instead, where that differs: a fused projection's whole
output, and in some families queries instead of keys. The projections may have any `Weight`; the vectors are kept in
float32 and applied in the activations' dtype.

Limits: models through transformers with fused projections take `peft_compatible` or target_modules only, and are
scaled whole there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from burnish.config import UserError, option
from burnish.model.bundle import Context, Model
from burnish.model.linear import Linear
from burnish.model.surgery import TARGETS, select
from burnish.model.surgery import replace as put
from burnish.tune.folding import fold
from burnish.tune.roles import projections


@dataclass(frozen=True)
class Config:
    """Which projections are scaled."""

    peft_compatible: bool = option(
        False, "scale what peft's IA3 does: fused projections whole, and in some families queries instead of keys"
    )
    target_modules: list[str] | str | None = option(
        None, f"what has its outputs scaled: {TARGETS}; none: the paper's keys and values, or peft's"
    )
    feedforward_modules: list[str] | str | None = option(
        None, "what has its inputs scaled, whether or not target_modules names them too; none: as above"
    )


class Scaled(nn.Module):
    """A projection between scales; x (..., in) -> (..., out).

    `ia3_l` is (1, in) for the inputs. For the outputs it is (scaled, 1): all of them, or of each of `groups` equal
    parts all but the first `skipped`, which are queries.
    """

    def __init__(self, base: Linear, feedforward: bool, groups: int = 1, skipped: int = 0):
        super().__init__()
        device = next(base.weight.parameters()).device
        self.base, self.feedforward, self.groups, self.skipped = base, feedforward, groups, skipped
        shape = (1, base.in_features) if feedforward else (base.out_features - groups * skipped, 1)
        self.ia3_l = nn.Parameter(torch.ones(shape, device=device, dtype=torch.float32))
        self.train(base.training)

    def scale(self) -> Tensor:
        """The factor of every input, or of every output."""
        if not self.skipped:
            return self.ia3_l.flatten()
        return F.pad(self.ia3_l.view(self.groups, -1), (self.skipped, 0), value=1.0).flatten()

    def forward(self, x: Tensor) -> Tensor:
        if self.feedforward:
            return self.base(x * self.scale().to(x.dtype))
        y = self.base(x)
        return y * self.scale().to(y.dtype)

    def folded(self, weight: Tensor) -> Tensor:
        """weight (out, in) with the scales in it."""
        return weight * (self.scale() if self.feedforward else self.scale()[:, None])


def apply(model: Model, config: Config, context: Context) -> Config:
    """Wrap the projections; the resolved config lists their paths.

    Raises UserError where they are not known.
    """
    outputs, inputs = config.target_modules, config.feedforward_modules
    if outputs is None and inputs is None:
        outputs, inputs = peft_targets(model) if config.peft_compatible else paper_targets(model)
    scaled = sorted(path for path, _ in select(model.net, inputs or []))
    others = sorted(path for path, _ in select(model.net, outputs or []) if path not in scaled)
    if not scaled and not others:
        raise UserError("technique 'ia3': target_modules and feedforward_modules are empty; nothing would be scaled")
    config = replace(config, target_modules=others, feedforward_modules=scaled)
    rebuild(model, config)
    return config


def rebuild(model: Model, config: Config) -> None:
    spec = model.spec
    groups, skipped = 1, 0
    if spec.fused_qkv and not config.peft_compatible:  # the queries come first: of each key-value head, or of all
        groups = spec.num_kv_heads if spec.fused_qkv == "heads" else 1
        skipped = spec.num_heads * spec.head_dim // groups
    for path in config.target_modules or ():
        part = (groups, skipped) if path.endswith("qkv_proj") else (1, 0)
        put(model.net, path, lambda base, part=part: Scaled(base, False, *part), "ia3")  # type: ignore[misc]
    for path in config.feedforward_modules or ():
        put(model.net, path, lambda base: Scaled(base, True), "ia3")  # type: ignore[arg-type]


def paper_targets(model: Model) -> tuple[list[str], list[str]]:
    """(keys and values, the feed-forward's output projections) by path."""
    roles = ("fused",) if model.spec.fused_qkv else ("key", "value")
    outputs = [path for role in roles for path in projections(model.net, role, "ia3")]
    return outputs, projections(model.net, "feed-forward output", "ia3")


def peft_targets(model: Model) -> tuple[list[str], list[str]]:
    """What peft's IA3 scales in this architecture, in Hugging Face's words."""
    try:
        from peft.utils import constants
    except ImportError:
        raise UserError("technique 'ia3': peft_compatible asks peft for its targets; pip install peft") from None
    family = model.spec.family
    outputs = constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING.get(family)
    if outputs is None:
        raise UserError(
            f"technique 'ia3': peft has no targets for {family}; give target_modules and feedforward_modules"
        )
    return outputs, constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING[family]


def layers(model: Model) -> dict[str, Scaled]:
    """The wrapped projections by path."""
    return {path: module for path, module in model.net.named_modules() if isinstance(module, Scaled)}


def merge(model: Model, config: Config) -> str:
    """Multiply the weights and biases by the scales; a quantised weight becomes dense first, and the note says so."""
    with torch.no_grad():
        for layer in layers(model).values():
            if layer.base.bias is not None and not layer.feedforward:
                layer.base.bias.mul_(layer.scale())
    return fold(model, "ia3", layers(model), Scaled.folded)
