"""GPTQ: codes chosen one input after the other, each against the errors that those before it left in the outputs.

    minimise tr((W - Q) H (W - Q)^T),   H = X^T X + damp_percent mean(diag) I,   H = L L^T
    q_i = nearest to w_i + (sum over j > i of L_ji e_j) / L_ii,   e = w - q,   from the last input to the first

Source: GPTQ (arXiv 2210.17323), section 3.3 and algorithm 1, in the equivalent form of Babai's nearest plane
("The Geometry of LLM Quantization", arXiv 2507.18553): with the inputs in reverse order the rounded weights are the
same, and one Cholesky factorisation takes the place of two and an inverse. Inputs that are always 0 get weights of 0.
The layers are taken in turn, each calibrated on what the quantised ones before it give, projections too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from burnish import device
from burnish.compress import calibration
from burnish.compress.grouped import HELP, Form, Grouped
from burnish.config import UserError, option
from burnish.model.bundle import Context, Model
from burnish.model.linear import Dense, Linear
from burnish.model.surgery import TARGETS, by_path, linears, select
from burnish.native import plane

NAME = "gptq"
BLOCK = 128  # inputs between two updates by a product
GRAM = 512  # columns of X^T X computed together
TRIES = 4  # each with ten times the dampening

CHANGES_BASE = True
STORES_ANEW = True
CALIBRATES = True


@dataclass(frozen=True)
class Config:
    """The form of the numbers, and how they are calibrated."""

    bits: int = option(4, HELP["bits"])
    group_size: int = option(128, HELP["group_size"])
    sym: bool = option(True, HELP["sym"])
    desc_act: bool = option(True, "the inputs with the largest activations first")
    static_groups: bool = option(True, "groups of neighbours all the same, with grids from the weights as they were")
    damp_percent: float = option(0.01, "what is added to H's diagonal, over its mean")
    nsamples: int = option(128, calibration.HELP["nsamples"])
    max_length: int = option(512, calibration.HELP["max_length"])
    target_modules: list[str] | str = option("all-linear", TARGETS)
    bits_pattern: dict[str, int] = option({}, HELP["bits_pattern"])

    def form(self, path: str) -> Form:
        """Of one projection, the pattern being resolved to paths."""
        bits = self.bits_pattern.get(path, self.bits)
        return Form(bits, self.group_size, self.sym, self.desc_act and not self.static_groups)

    def without(self, paths: Sequence[str]) -> Config:
        """Where the projections at `paths` are no longer stored this way."""
        return replace(self, target_modules=[path for path in self.target_modules if path not in paths])


def apply(model: Model, config: Config, context: Context) -> Config:
    """Quantise the targets, layer by layer. Raises UserError for weights that are quantised already, data that is too
    short, and activations that are not finite."""
    if not 0 < config.damp_percent < 1:
        raise UserError(f"technique '{NAME}': damp_percent is {config.damp_percent}; give a number between 0 and 1")
    targets = select(model.net, config.target_modules)
    for path, linear in targets:
        if not isinstance(linear.weight, Dense):
            kind = type(linear.weight).__name__
            raise UserError(f"technique '{NAME}': {path} is stored as {kind} already; take the model as it was before")
    paths = [path for path, _ in targets]
    pattern = by_path(config.bits_pattern, model.net, paths, f"technique '{NAME}': bits_pattern")
    config = replace(config, target_modules=paths, bits_pattern=pattern)
    for path in ("", *pattern):
        config.form(path).check(NAME)
    if model.device.type == "meta":
        with model.device:
            rebuild(model, config)
        return config
    data = calibration.batches(model, context, config.nsamples, config.max_length, NAME)
    left = {linear: path for path, linear in targets}
    with calibration.computing(model.net):
        for layer, calls in calibration.in_turn(model, data, NAME):
            for stage in calibration.stages(layer, calls[0]):
                quantise_stage(layer, calls, [linear for _, linear in stage if linear in left], config, left, context)
        for linear, path in left.items():  # what no token reached, as some experts
            linear.weight = config.form(path).round(linear.weight.dequantize())
            context.report({"layer": path, "error": None})
    return config


def quantise_stage(
    layer: nn.Module,
    calls: Sequence[calibration.Call],
    chosen: Sequence[Linear],
    config: Config,
    left: dict[Linear, str],
    context: Context,
) -> None:
    """Quantise projections of a layer that read the same, and take them out of those that are left."""
    if not chosen:
        return
    factor, order = factorised(layer, calls, chosen[0], config, left[chosen[0]])
    for linear in chosen:
        path = left.pop(linear)
        dense = linear.weight.dequantize()
        linear.weight, error = quantise(dense, factor, order, config.form(path), config.static_groups)
        context.report({"layer": path, "error": error})
    del factor
    device.return_freed_memory()  # the pieces' small blocks leave holes, 30 MiB of them in a model of 400


def factorised(
    layer: nn.Module, calls: Sequence[calibration.Call], linear: Linear, config: Config, path: str
) -> tuple[Tensor, Tensor]:
    """The lower Cholesky factor of H for what a projection reads, and the input at each of its positions, of which the
    last is rounded first; -1 - input where that is always 0."""
    for attempt in range(TRIES):
        gram = gram_matrix(layer, calls, linear)
        diagonal = gram.diagonal()
        if not diagonal.isfinite().all():
            raise UserError(
                f"technique '{NAME}': the activations that {path} reads are not finite; run the model in bf16"
            )
        dead = diagonal == 0
        diagonal[dead] = 1
        first = diagonal.argsort(stable=True) if config.desc_act else torch.arange(len(gram)).flip(0).to(gram.device)
        diagonal += config.damp_percent * 10**attempt * diagonal.mean()
        permute(gram, first)
        failed = torch.empty((), dtype=torch.int32, device=gram.device)
        torch.linalg.cholesky_ex(gram.t(), out=(gram.t(), failed))  # in place, as LAPACK lays matrices out
        if not int(failed):
            return gram.t(), torch.where(dead[first], -1 - first, first)
    raise UserError(
        f"technique '{NAME}': the activations that {path} reads depend on each other too closely; "
        f"raise damp_percent above {config.damp_percent}, or give more text"
    )


def gram_matrix(layer: nn.Module, calls: Sequence[calibration.Call], linear: Linear) -> Tensor:
    """X^T X of what a projection reads, float32."""
    gram = torch.zeros(linear.in_features, linear.in_features, device=calls[0].x.device)
    parts = [(start, slice(start, start + GRAM)) for start in range(0, len(gram), GRAM)]
    for x in calibration.inputs(layer, calls, linear):
        wide = x.float()
        for start, part in parts:  # the lower triangle
            gram[start:, part].addmm_(wide[:, start:].t(), wide[:, part])
    for _, part in parts:
        gram[part, part.stop :] = gram[part.stop :, part].t()
    return gram


def permute(matrix: Tensor, order: Tensor) -> None:
    """matrix[order][:, order] in place, some rows and then some columns at a time."""
    for part in (*matrix.split(BLOCK), *matrix.t().split(BLOCK)):
        part.copy_(part[:, order])


def quantise(dense: Tensor, factor: Tensor, order: Tensor, form: Form, static_groups: bool) -> tuple[Grouped, float]:
    """dense (out, in) as codes by `factorised`'s results, and the share of the calibrated outputs' power that is lost.
    Rows do not depend on each other: some are taken at a time."""
    found = [quantise_rows(part, factor, order, form, static_groups) for part in calibration.pieces(dense)]
    parts, power, lost = zip(*found, strict=True)
    whole = {name: torch.cat([part.get_parameter(name) for part in parts]) for name, _ in parts[0].named_parameters()}
    if form.ordered:
        whole["order"] = parts[0].get_parameter("order")
    return Grouped(form, (dense.shape[0], dense.shape[1]), whole), sum(lost) / max(sum(power), 1e-30)


def quantise_rows(
    dense: Tensor, factor: Tensor, order: Tensor, form: Form, static_groups: bool
) -> tuple[Grouped, float, float]:
    """The codes of rows (rows, in) float32, and their outputs' power, all and lost."""
    rows, columns = dense.shape
    dense = dense.index_fill(1, -1 - order[order < 0], 0)  # inputs that are always 0
    order = torch.where(order < 0, -1 - order, order)
    size = form.size(columns)
    group_of = torch.arange(columns, device=dense.device).flip(0) // size  # by position, as they are rounded
    if static_groups:
        group_of = order // size
        grids = form.grid(nn.functional.pad(dense, (0, -columns % size)).view(rows, -1, size))
        scales, zeros = (x.t().contiguous() for x in grids)
    else:
        scales, zeros = (torch.empty(-(-columns // size), rows, device=dense.device) for _ in range(2))
    work = dense.t()[order]  # (in, rows) by position; becomes the errors
    del dense
    power = outputs_power(factor, work)
    codes = torch.empty(work.shape, dtype=torch.uint8, device=work.device)
    step = BLOCK if static_groups else size
    for end in range(columns, 0, -step):
        start = max(0, end - step)
        here = slice(start, end)
        pull = factor[end:, here].t() @ work[end:]
        own = factor[here, here].contiguous()
        if not static_groups:
            moved = work[here] + torch.linalg.solve_triangular(own.t(), pull, upper=True)
            group = int(group_of[start])
            scales[group], zeros[group] = form.grid(moved.t())
        codes[here] = plane.nearest_plane(work[here], pull, own, scales, zeros, group_of[here], form.top)
    lost = outputs_power(factor, work)
    del work
    stored = codes.flip(0)
    if not form.ordered:
        stored[order] = codes
    return Grouped.of(form, stored.t(), scales.t(), zeros.t(), order.flip(0) if form.ordered else None), power, lost


def outputs_power(factor: Tensor, matrix: Tensor) -> float:
    """tr(M^T H M) for M (in, out)."""
    ends = range(0, len(factor), BLOCK)
    return sum(float((factor[a:, a : a + BLOCK].t() @ matrix[a:]).square().sum()) for a in ends)


def rebuild(model: Model, config: Config) -> None:
    wanted = set(config.target_modules)
    for path, linear in linears(model.net):
        if path in wanted:
            linear.weight = Grouped.empty(config.form(path), linear.out_features, linear.in_features)
