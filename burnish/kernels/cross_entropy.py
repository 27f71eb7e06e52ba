"""Cross-entropy of a linear head, without the logits.

For hidden states x (N, H), head W (V, H) and targets y, the loss of a row is `logsumexp(xW') - xW'[y]`, and
its gradient with respect to the logits is `softmax(xW') - onehot(y)`. Both need one chunk of rows at a time,
so the forward pass walks over chunks whose float32 logits fit `chunk_bytes`, and turns each chunk's logits
into its gradient in place while they are there. Memory is one chunk plus the gradients themselves, instead of
N x V floats several times over; nothing is recomputed in the backward pass. Rows without a target cost
nothing: they are dropped first.

Source of the idea: Liger Kernel's FusedLinearCrossEntropy (arXiv:2410.10989, section 3.2). Cut Cross-Entropy
(arXiv:2411.09009) saves the chunk as well, by a GPU kernel that recomputes the logits in the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from burnish.kernels import training
from burnish.model.example import IGNORE
from burnish.model.linear import arithmetic


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, chunk_bytes: int
    ) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        kind = arithmetic(hidden)
        rows_per_chunk = max(1, chunk_bytes // (weight.shape[0] * max(4, hidden.element_size())))
        words = weight.shape[0]  # of a part of the head
        if kind.itemsize > weight.element_size() and weight.numel() * kind.itemsize > 2 * chunk_bytes:
            words = max(1, chunk_bytes // (4 * weight.shape[1] * kind.itemsize))  # widened one at a time
        heads = weight.split(words) if words < weight.shape[0] else (weight.to(kind),)
        widened = weight.new_empty(heads[0].shape, dtype=kind) if heads[0].dtype != kind else weight
        shifts = [None] * len(heads) if bias is None else bias.to(kind).split(words)
        loss = hidden.new_zeros((), dtype=wide)
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if need_weight else None
        grad_bias = weight.new_zeros(weight.shape[0], dtype=wide) if need_bias else None

        room = hidden.new_empty(min(rows_per_chunk, hidden.shape[0]), weight.shape[0], dtype=kind)
        for start in range(0, hidden.shape[0], rows_per_chunk):
            x = hidden[start : start + rows_per_chunk].to(kind)  # (n, H)
            target = labels[start : start + rows_per_chunk, None]  # (n, 1)
            logits = room[: len(x)]  # (n, V)
            for head, shift, out in zip(heads, shifts, logits.split(words, dim=1), strict=True):
                wide_head = _in(kind, head, widened).T
                torch.mm(x, wide_head, out=out) if shift is None else torch.addmm(shift, x, wide_head, out=out)
            part, slope = _loss_and_slope(logits, target, any(ctx.needs_input_grad))
            loss += part
            if slope is None:
                continue
            if grad_hidden is not None:
                part_of_hidden = grad_hidden[start : start + rows_per_chunk]
                gradient = part_of_hidden if kind == hidden.dtype else torch.empty_like(x)
                for index, (head, part) in enumerate(zip(heads, slope.split(words, dim=1), strict=True)):
                    gradient.addmm_(part, _in(kind, head, widened), beta=min(index, 1))
                if gradient is not part_of_hidden:
                    part_of_hidden.copy_(gradient)
            if grad_weight is not None:
                if wide == kind:
                    grad_weight.addmm_(slope.T, x)
                else:
                    grad_weight += slope.T @ x
            if grad_bias is not None:
                grad_bias += slope.sum(0, dtype=wide)

        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        if grad_bias is not None and bias is not None:
            grad_bias = grad_bias.to(bias.dtype)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # In place: autograd refuses a second backward pass over tensors changed so, instead of scaling twice.
        return *(None if saved is None else saved.mul_(grad) for saved in ctx.saved_tensors), None, None


def _in(kind: torch.dtype, head: Tensor, room: Tensor) -> Tensor:
    """A part of the head in `kind`, in the room of the part before if it has to be widened: fresh memory for each would
    leave holes that none of them fits."""
    return head if head.dtype == kind else room[: len(head)].copy_(head)


def _loss_and_slope(logits: Tensor, target: Tensor, wanted: bool) -> tuple[Tensor, Tensor | None]:
    """logits (n, V), target (n, 1) -> the summed loss and, if wanted, its gradient by the logits, in their dtype."""
    if logits.dtype in training.DTYPES and logits.device.type == "cpu" and training.library():
        return training.cross_entropy_(logits, target, wanted).sum(), logits if wanted else None
    values = logits.to(torch.promote_types(logits.dtype, torch.float32))
    values -= values.amax(1, keepdim=True)
    at_target = values.gather(1, target)
    total = values.exp_().sum(1, keepdim=True)
    loss = (total.log() - at_target).sum()
    if not wanted:
        return loss, None
    values /= total
    values.scatter_add_(1, target, torch.full_like(at_target, -1.0))
    return loss, values.to(logits.dtype)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, chunk_bytes: int = 64 << 20
) -> tuple[Tensor, int]:
    """Summed cross-entropy of the head's predictions.

    hidden (N, H); weight (V, H) and bias (V) or None, cast to hidden's dtype for the products; labels (N,)
    int64, -100 where a row has no target. Returns the loss summed over targets (float32 scalar, float64 for
    float64 hidden states) and their number. No tensor of logits exceeds `chunk_bytes` (or one row), and no copy
    of the head in a wider dtype twice as many. The gradients come from the forward pass, for the inputs that
    require one; backward may run once.
    """
    kept = (labels != IGNORE).nonzero().squeeze(1)
    count = kept.shape[0]
    if count < labels.shape[0]:
        hidden, labels = hidden[kept], labels[kept]
    return _LinearCrossEntropy.apply(hidden.contiguous(), weight, bias, labels, chunk_bytes), count


def reference_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> tuple[Tensor, int]:
    """The same from plain torch operations and all logits at once: the oracle of the tests."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logits = F.linear(hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)).to(wide)
    return F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum"), int((labels != IGNORE).sum())
