"""The plain loss of a model on a batch, and its mean over held-out examples."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from burnish import chain
from burnish.chain import Model
from burnish.engine.order import collated
from burnish.kernels.cross_entropy import linear_cross_entropy
from burnish.model.example import IGNORE, Example
from burnish.model.linear import Linear
from burnish.model.network import Network
from burnish.model.scoring import beside_labels
from burnish.model.transformer import Transformer

ROWS_PER_CHUNK = 256  # for a head that is more than one Linear


def loss_sum(model: Model, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
    """(cross-entropy summed over the targets of a collated batch, their number).

    A decoder's states predict the next token, a masked language model the token in place; a batch with `label` (B,)
    is classified.
    """
    net = model.net
    hidden = chain.forward(model, batch)  # (B, T, H)
    if "label" in batch:
        logits = net.logits(net.pool(hidden, batch["attention_mask"]))  # (B, num_labels)
        classes = batch["label"]
        return F.cross_entropy(logits.float(), classes, reduction="sum"), int((classes != IGNORE).sum())
    hidden, labels = beside_labels(net, hidden, batch["labels"])
    kept = labels != IGNORE
    return _head_loss(net, hidden[kept], labels[kept])


def distillation_sum(
    model: Model, batch: dict[str, Tensor], teacher: AbstractContextManager[None]
) -> tuple[Tensor, int]:
    """(cross-entropy with the distribution that the model itself gives inside `teacher`, summed over the targets, their
    number): arXiv 1503.02531, section 2, at temperature 1."""
    net = model.net
    with torch.no_grad(), teacher:
        wanted, _ = beside_labels(net, chain.forward(model, batch), batch["labels"])
    hidden, labels = beside_labels(net, chain.forward(model, batch), batch["labels"])
    kept = labels != IGNORE

    def part(x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            target = net.logits(y).float().softmax(-1)
        return -(target * net.logits(x).float().log_softmax(-1)).sum()

    parts = zip(hidden[kept].split(ROWS_PER_CHUNK), wanted[kept].split(ROWS_PER_CHUNK), strict=True)
    total = sum((checkpoint(part, x, y, use_reentrant=False) for x, y in parts), hidden.new_zeros(()))
    return total, int(kept.sum())


def _head_loss(net: Network, hidden: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    if isinstance(net, Transformer) and type(head := net.lm_head) is Linear:
        if net.head_transform is not None:
            hidden = net.head_transform(hidden)
        return linear_cross_entropy(hidden, head.weight.dequantize(), head.bias, labels)

    def part(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(net.logits(x).float(), y, reduction="sum")

    parts = zip(hidden.split(ROWS_PER_CHUNK), labels.split(ROWS_PER_CHUNK), strict=True)
    return sum((checkpoint(part, x, y, use_reentrant=False) for x, y in parts), hidden.new_zeros(())), len(labels)


@torch.no_grad()
def evaluate(model: Model, examples: Sequence[Example], batch_size: int = 8) -> float:
    """Mean plain loss per target over encoded examples, in evaluation mode; nan where there is no target."""
    net = model.net
    training = net.training
    net.eval()
    try:
        loss, count = torch.zeros((), dtype=torch.float64, device=model.device), 0
        by_length = sorted(range(len(examples)), key=lambda index: len(examples[index].ids))
        for start in range(0, len(by_length), batch_size):
            chosen = [examples[index] for index in by_length[start : start + batch_size]]
            batch = collated(model, chosen, multiple_of=8)
            part, targets = loss_sum(model, {name: tensor.to(model.device) for name, tensor in batch.items()})
            loss, count = loss + part, count + targets
        return loss.item() / count if count else float("nan")
    finally:
        net.train(training)
