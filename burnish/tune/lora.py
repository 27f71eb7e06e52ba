"""LoRA: a trained low-rank correction beside a frozen projection.

    y = W x + (alpha / r) B A x,    A in R^{r x in} Gaussian, B in R^{out x r} zero

so that training starts at the base's outputs. Source: LoRA (arXiv 2106.09685), section 4.1; alpha / sqrt(r) with
`use_rslora` from rsLoRA (arXiv 2312.03732). The wrapped projection may have any `Weight`. A and B are kept in
float32 and applied in the activations' dtype, or some tokens at a time in float32 where that is the faster way.

`use_dora` trains the length of every row of the sum as well (DoRA, arXiv 2402.09353, equation 5):

    y = m (W + V) x / ||W + V||,    V = (alpha / r) B A,    m = ||W|| at the start

with the norm taken for a constant in the gradient (section 4.3). Options have peft's names and meaning. Biases and
`modules_to_save` train in place and are saved with the adapter, as peft saves them. Limit: a matrix that is shared, as
a tied head's is, is not saved as one of two; peft:lora gives it a copy of its own.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from burnish.config import UserError, nearest, option
from burnish.model.bundle import Context, Model
from burnish.model.linear import ROUNDED_TOKENS, Dense, Linear, Weight, arithmetic, by_tokens, is_flat
from burnish.model.network import Network
from burnish.model.surgery import TARGETS, by_path, select
from burnish.model.surgery import replace as put
from burnish.tune.folding import fold


@dataclass(frozen=True)
class Config:
    """Options have peft's names and meaning."""

    r: int = option(8, "rank of the correction")
    lora_alpha: float = option(16.0, "the correction is scaled by lora_alpha / r")
    lora_dropout: float = option(0.0, "share of a projection's inputs that the correction does not see in training")
    target_modules: list[str] | str | None = option(
        None, f"{TARGETS}; none: the family's query and value projections (section 4.2)"
    )
    use_rslora: bool = option(False, "rank-stabilised LoRA: scale by lora_alpha / sqrt(r)")
    use_dora: bool = option(False, "DoRA (arXiv 2402.09353): the lengths of the weight's rows train too")
    bias: Literal["none", "all", "lora_only"] = option("none", "which biases of the base train")
    modules_to_save: list[str] | None = option(
        None, "ends of names of modules that train whole and are saved with the adapter, as lm_head or norm"
    )
    rank_pattern: dict[str, int] = option({}, "another r by a regular expression over the ends of projections' names")
    alpha_pattern: dict[str, float] = option({}, "another lora_alpha, in the same way")

    def of(self, path: str) -> Config:
        """The config of one projection, the patterns being resolved to paths."""
        r, alpha = self.rank_pattern.get(path, self.r), self.alpha_pattern.get(path, self.lora_alpha)
        return replace(self, r=r, lora_alpha=alpha)

    @property
    def scaling(self) -> float:
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


class _Corrected(torch.autograd.Function):
    """The sum over a frozen projection, in place, and its gradients without one for W; in `arithmetic(x)`.

    The thin products give (r, tokens), not (tokens, r): on a CPU up to 2.5 times as fast.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: Linear, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
        kind = arithmetic(x)
        a, b, y = lora_A.to(kind), lora_B.to(kind), base(x)
        low = x.new_empty(len(a), len(x), dtype=kind)
        for part in _parts(x, kind):
            low[:, part] = a @ x[part].to(kind).t()
            _add(y[part], low[:, part].t(), b.t(), scaling)
        ctx.save_for_backward(x, low, a, b)
        ctx.base, ctx.scaling, ctx.dtypes = base, scaling, (lora_A.dtype, lora_B.dtype)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, low, a, b = ctx.saved_tensors
        grad_x = ctx.base.weight.matmul_transposed(grad) if ctx.needs_input_grad[0] else None
        of_a, of_b = [], []
        for part in _parts(x, a.dtype):
            wide = grad[part].to(a.dtype)
            grad_low = (b.t() @ wide.t()).mul_(ctx.scaling)  # (r, tokens)
            of_a.append(grad_low @ x[part].to(a.dtype))
            of_b.append(low[:, part] @ wide)
            if grad_x is not None:
                _add(grad_x[part], grad_low.t(), a, 1.0)
        grad_a, grad_b = (sum(found[1:], found[0]) for found in (of_a, of_b))
        grad_b = grad_b.t().to(ctx.dtypes[1]).mul(ctx.scaling).contiguous()
        return grad_x, None, grad_a.to(ctx.dtypes[0]), grad_b, None


def _parts(x: Tensor, kind: torch.dtype) -> list[slice]:
    """All tokens of x, or where they are widened some at a time."""
    step = len(x) if x.dtype == kind else ROUNDED_TOKENS
    return [slice(first, first + step) for first in range(0, len(x) or 1, step or 1)]  # one part of no tokens too


def _add(y: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """y += scale * left @ right, in place."""
    if y.dtype == left.dtype:
        y.addmm_(left, right, alpha=scale)
    else:
        y.add_(left @ right, alpha=scale)


class LoRALinear(nn.Module):
    """A `Linear` and its low-rank correction; x (tokens, in) -> (tokens, out)."""

    def __init__(self, base: Linear, config: Config):
        super().__init__()
        device = next(base.weight.parameters()).device
        self.base, self.foreign = base, base.foreign
        self.scaling = config.scaling
        self.dropout = config.lora_dropout
        self.lora_A = nn.Parameter(torch.empty(config.r, base.in_features, device=device, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, config.r, device=device, dtype=torch.float32))
        self.train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        if self.foreign and not is_flat(x):
            return by_tokens(self, x)
        frozen = not any(parameter.requires_grad for parameter in self.base.parameters())
        if frozen and not (self.dropout and self.training) and not torch.compiler.is_compiling():
            return self.scaled(_Corrected.apply(x, self.base, self.lora_A, self.lora_B, self.scaling))
        return self.onto(self.base(x), F.dropout(x, self.dropout, self.training))

    def onto(self, y: Tensor, x: Tensor) -> Tensor:
        """What the base gave for x (tokens, in), y (tokens, out), with the correction."""
        low = x @ self.lora_A.to(x.dtype).t()
        return self.scaled(torch.addmm(y, low, self.lora_B.to(x.dtype).t(), alpha=self.scaling))

    def scaled(self, y: Tensor) -> Tensor:
        """The sum of the base's output and the correction's, y (tokens, out), as it is."""
        return y

    def delta(self) -> Tensor:
        """The correction as a matrix (out, in), float32."""
        return self.scaling * (self.lora_B @ self.lora_A)

    def folded(self, weight: Tensor) -> Tensor:
        """weight (out, in), float32, with the correction in it."""
        return weight + self.delta()


class DoRALinear(LoRALinear):
    """A `Linear`, its low-rank correction, and the lengths of the rows of their sum.

    `known` is the norm in evaluation, for as long as nothing changes.
    """

    known: tuple[Any, Tensor] | None

    def __init__(self, base: Linear, config: Config):
        if not isinstance(base, Linear):
            raise UserError("technique 'lora': use_dora needs the bare projection; put lora before what is around it")
        super().__init__(base, config)
        self.lora_magnitude_vector = nn.Parameter(torch.ones(base.out_features, device=self.lora_A.device))

    def train(self, mode: bool = True) -> DoRALinear:
        self.known = None
        return super().train(mode)

    @torch.no_grad()
    def norm(self) -> Tensor:
        """(out,) lengths of the rows of the weight with its correction, float32; a constant for the gradient."""
        if self.training or torch.compiler.is_compiling():  # torch's fused optimisers leave `_version` as it is
            return self.folded_norm()
        parts = (*self.base.weight.parameters(), self.lora_A, self.lora_B)
        state = [(part.data_ptr(), part._version) for part in parts]
        if self.known is None or self.known[0] != state:
            self.known = state, self.folded_norm()
        return self.known[1]

    def folded_norm(self) -> Tensor:
        return (self.base.weight.dequantize().float() + self.delta()).norm(dim=1)

    def forward(self, x: Tensor) -> Tensor:
        if not (self.dropout and self.training):
            return super().forward(x)
        if self.foreign and not is_flat(x):
            return by_tokens(self, x)
        dropped = F.dropout(x, self.dropout, True)  # the scale changes what this gives, the base sees x
        plain = self.base(dropped)
        return self.base(x) - plain + self.onto(plain, dropped)

    def scaled(self, y: Tensor) -> Tensor:
        """y with rows of their trained lengths in the weight; the bias is left as it is."""
        scale = (self.lora_magnitude_vector / self.norm()).to(y.dtype)
        return scale * y if self.base.bias is None else scale * y + (1 - scale) * self.base.bias.to(y.dtype)

    def folded(self, weight: Tensor) -> Tensor:
        summed = super().folded(weight)
        return summed * (self.lora_magnitude_vector / summed.norm(dim=1))[:, None]


def apply(model: Model, config: Config, context: Context) -> Config:
    """Wrap the targets; the resolved config lists their paths, and those of the saved modules."""
    ranks = {"r": config.r, **{f"rank_pattern: {name}": rank for name, rank in config.rank_pattern.items()}}
    for name, rank in ranks.items():
        if rank < 1:
            raise UserError(f"technique 'lora': {name} is {rank}; it must be at least 1")
    patterned = {f"alpha_pattern: {name}": alpha for name, alpha in config.alpha_pattern.items()}
    for name, alpha in {"lora_alpha": config.lora_alpha, **patterned}.items():
        if not 0 < alpha < math.inf:
            raise UserError(f"technique 'lora': {name} is {alpha}; it must be above 0")
    if not 0 <= config.lora_dropout < 1:
        raise UserError(f"technique 'lora': lora_dropout is {config.lora_dropout}; it must be at least 0 and below 1")
    if config.target_modules is not None and not config.target_modules:
        raise UserError("technique 'lora': target_modules is empty; name projections, or leave it away")
    saved = saved_modules(model.net, config.modules_to_save or [])
    targets = list(model.net.layout.lora_targets) if config.target_modules is None else config.target_modules
    chosen = select(model.net, targets)
    paths = sorted(path for path, _ in chosen if path not in saved)
    patterns: dict[str, Any] = {
        option: by_path(getattr(config, option), model.net, paths, f"technique 'lora': {option}")
        for option in ("rank_pattern", "alpha_pattern")
    }
    config = replace(config, target_modules=paths, modules_to_save=saved or None, **patterns)
    rebuild(model, config)
    generator = torch.Generator().manual_seed(context.seed)
    with torch.no_grad():
        for layer in layers(model).values():
            bound = 1 / math.sqrt(layer.base.in_features)
            layer.lora_A.copy_(torch.empty(layer.lora_A.shape).normal_(0, bound, generator=generator))
            if isinstance(layer, DoRALinear):
                layer.lora_magnitude_vector.copy_(layer.norm())
    return config


def rebuild(model: Model, config: Config) -> None:
    kind = DoRALinear if config.use_dora else LoRALinear
    for path in config.target_modules or ():
        put(model.net, path, lambda base, path=path: kind(base, config.of(path)), "lora")  # type: ignore[misc]
    for part in base_parameters(model, config):
        part.requires_grad_(True)


def base_parameters(model: Model, config: Config) -> list[nn.Parameter]:
    """The parameters of the base that train: those of saved modules, and biases."""
    net = model.net
    found = [p for path in config.modules_to_save or () for p in net.get_submodule(path).parameters()]
    if config.bias == "all":
        return found + [p for name, p in net.named_parameters() if name.endswith(".bias")]
    wrapped = [layer.base.bias for layer in layers(model).values() if config.bias == "lora_only"]
    return found + [bias for bias in wrapped if bias is not None]


def saved_modules(net: Network, names: Sequence[str]) -> list[str]:
    """The paths of the modules below those whose names, in either vocabulary, end with one of `names`, as peft reads
    modules_to_save. Raises UserError for a name that ends none, and for a matrix that is shared or quantised."""
    aliases = net.layout.modules
    native = {path: module for path, module in net.named_modules() if path in aliases}
    found: list[str] = []
    for name in names:
        hits = [path for path in native if any(ends(full, name) for full in (path, aliases[path]))]
        if not hits:
            leaves = {part for path in native for part in (*path.split("."), *aliases[path].split("."))}
            what = f"'{name}' is no module of this {net.spec.family} model{nearest(name, sorted(leaves))}"
            raise UserError(f"technique 'lora': modules_to_save: {what}")
        found += hits
    for path in found:
        if shared(net, path):
            raise UserError(
                f"technique 'lora': modules_to_save: '{path}' shares its matrix with another module, which would "
                "train too; leave it away"
            )
        if any(isinstance(part, Weight) and not isinstance(part, Dense) for part in native[path].modules()):
            raise UserError(f"technique 'lora': modules_to_save: '{path}' is stored quantised and cannot train")
    return sorted(set(found))


def ends(path: str, name: str) -> bool:
    """Whether the path of a module, or of one that it is in, ends with `name`."""
    parts = path.split(".")
    return any(".".join(parts[: count + 1]).endswith(name) for count in range(len(parts)))


def shared(net: Network, path: str) -> bool:
    """Whether a module's parameters are another's too, as those of a tied head are."""
    owners = Counter(id(parameter) for _, parameter in net.named_parameters(remove_duplicate=False))
    return any(owners[id(parameter)] > 1 for parameter in net.get_submodule(path).parameters())


def layers(model: Model) -> dict[str, LoRALinear]:
    """The wrapped projections by path."""
    return {path: module for path, module in model.net.named_modules() if isinstance(module, LoRALinear)}


def merge(model: Model, config: Config) -> str:
    """Add the corrections to the weights; a quantised weight becomes dense first, and the note says so."""
    for part in base_parameters(model, config):
        part.requires_grad_(False)
    return fold(model, "lora", layers(model), lambda layer, weight: layer.folded(weight))
