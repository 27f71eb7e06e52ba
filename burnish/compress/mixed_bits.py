"""Bits chosen for each projection, so that a model of a given size says most nearly what it said before.

    KL(p || p') ~ 1/2 sum over outputs of (sum over a text's tokens of g (Q - W) x)^2,   g = d log p(y) / dz,   z = W x

for one projection rounded alone, with y drawn from the model's own p: the Hessian by the Fisher information, from one
forward and one backward pass for all projections and all numbers of bits. Source: BRECQ (arXiv 2102.05426), section
3.2, equation 10, which takes the diagonal over outputs: their errors are independent, as each row of W is rounded for
itself; those of a text's tokens, which meet the same row, are not. The damages are added up; the least sum within the
bytes is a multiple-choice knapsack.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from burnish.compress import calibration
from burnish.compress.grouped import Form
from burnish.config import UserError
from burnish.model.bundle import Context, Model
from burnish.model.linear import Linear, is_flat

ROWS, LENGTH = 32, 128  # of text
PART = 256  # tokens whose probabilities are in memory together
UNITS = 1 << 16  # steps that a budget is divided into at most


def damages(
    model: Model, targets: Sequence[tuple[str, Linear]], forms: Mapping[int, Form], context: Context
) -> dict[str, dict[int, float]]:
    """The divergence in nats a token of each projection, by path, rounded alone to each of the forms, by bits.

    Weights that are in their files are read as they are used. Raises UserError where no figure is finite.
    """
    net, device = model.net, model.device
    found = {path: dict.fromkeys(forms, 0.0) for path, _ in targets}
    data = calibration.batches(model, context, ROWS, LENGTH, "target_size")
    draw, done = torch.Generator().manual_seed(context.seed), 0

    def watch(path: str, linear: Linear) -> Callable[..., None]:
        def after(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            if is_flat(args[0]):  # else it is called again, with tokens
                x = args[0].detach().float()
                out.register_hook(lambda grad: add(path, linear, x, grad.float()))

        return after

    def add(path: str, linear: Linear, x: Tensor, grad: Tensor) -> None:
        dense = linear.weight.dequantize().float()
        for bits, form in forms.items():
            moved = x @ (form.round(dense).dequantize() - dense).t()
            found[path][bits] += float((moved * grad).view(texts(x), -1, len(dense)).sum(1).square().sum()) / 2

    def texts(x: Tensor) -> int:
        """How many texts the tokens are of; each of its own where they are not all of a batch, as an expert's."""
        ids = batch["input_ids"]
        return len(ids) if len(x) == ids.numel() else len(x)

    net.requires_grad_(False)
    net.eval()
    handles = [linear.register_forward_hook(watch(path, linear)) for path, linear in targets]
    handles.append(net.embed_tokens.register_forward_hook(lambda _, args, out: out.requires_grad_()))
    try:
        with calibration.computing(net), torch.enable_grad():
            for batch in data:
                states = calibration.feed(net, batch)
                if net.spec.head == "classification":
                    states = net.pool(states, batch["attention_mask"])
                states = states.flatten(0, -2)
                leaf = states.detach().requires_grad_()
                for part in leaf.split(PART):
                    logs = net.logits(part).float().log_softmax(-1)
                    drawn = torch.multinomial(logs.detach().exp().cpu(), 1, generator=draw).to(device)
                    logs.gather(1, drawn).sum().backward()
                states.backward(leaf.grad)
                done += batch["input_ids"].numel()
                context.report({"scanned": done, "of": sum(each["input_ids"].numel() for each in data)})
    finally:
        for handle in handles:
            handle.remove()
    if not all(math.isfinite(value) for own in found.values() for value in own.values()):
        raise UserError("target_size: the scan's gradients are not finite; run the model in bf16")
    return {path: {bits: value / done for bits, value in own.items()} for path, own in found.items()}


def choose(
    damage: Mapping[str, Mapping[int, float]], cost: Mapping[str, Mapping[int, int]], budget: int
) -> dict[str, int]:
    """The bits by path whose damages have the least sum within `budget` bytes, which all at their least cost keep to.

    Dynamic programming over what is spent beyond the least; in bytes, or where these are many in steps of some.
    """
    extra = {path: {bits: each - min(own.values()) for bits, each in own.items()} for path, own in cost.items()}
    budget = min(
        budget - sum(min(own.values()) for own in cost.values()), sum(max(own.values()) for own in extra.values())
    )
    unit = max(math.gcd(*(each for own in extra.values() for each in own.values())), -(-budget // UNITS), 1)
    best = torch.zeros(budget // unit + 1, dtype=torch.float64)  # by what may be spent
    picks: list[tuple[list[tuple[int, int]], Tensor]] = []
    for path, own in damage.items():
        options = [(bits, -(-extra[path][bits] // unit)) for bits in own]
        sums = torch.full((len(options), len(best)), torch.inf, dtype=torch.float64)
        for row, (bits, step) in zip(sums, options, strict=True):
            row[step:] = best[: max(0, len(best) - step)] + own[bits]
        best, pick = sums.min(0)
        picks.append((options, pick.byte()))
    chosen: dict[str, int] = {}
    left = len(best) - 1
    for path, (options, pick) in reversed([*zip(damage, picks, strict=True)]):
        chosen[path], step = options[int(pick[left])]
        left -= step
    return {path: chosen[path] for path in damage}


def table(bits: Mapping[str, int]) -> list[str]:
    """The bits by layer, a line each."""
    rows: dict[str, list[str]] = {}
    for path, count in bits.items():
        layer, name = re.fullmatch(r"(?:(.*?\.\d+)\.)?(.*)", path).groups("other")  # type: ignore[union-attr]
        rows.setdefault(layer, []).append(f"{name} {count}")
    return [f"{layer}: {', '.join(names)}" for layer, names in rows.items()]
