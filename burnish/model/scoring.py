"""How probable a network finds the tokens that are to follow."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from burnish.model.example import IGNORE
from burnish.model.network import Network

TOKENS_PER_CHUNK = 256


def beside_labels(net: Network, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """States (B, T, hidden) and labels (B, T), each state where the label stands that it predicts: the next one of a
    network that generates, else the one in place."""
    return (hidden[:, :-1], labels[:, 1:]) if net.spec.generates else (hidden, labels)


def label_log_probabilities(net: Network, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(log p of every label that is not -100, (N,) float32; its row, (N,)) of states (B, T, hidden), labels (B, T).

    A decoder's states give the next token, an encoder's the token in place. With gradients, logits are computed again
    in the backward pass instead of kept.
    """
    hidden, labels = beside_labels(net, hidden, labels)
    kept = labels != IGNORE

    def part(states: Tensor, wanted: Tensor) -> Tensor:
        return net.logits(states).float().log_softmax(-1).gather(-1, wanted[:, None])[:, 0]

    pieces = zip(hidden[kept].split(TOKENS_PER_CHUNK), labels[kept].split(TOKENS_PER_CHUNK), strict=True)
    if torch.is_grad_enabled():
        found = [checkpoint(part, *piece, use_reentrant=False) for piece in pieces]
    else:
        found = [part(*piece) for piece in pieces]
    return torch.cat(found), kept.nonzero()[:, 0]


def shared_log_probabilities(net: Network, hidden: Tensor, labels: Tensor, owner: Tensor) -> tuple[Tensor, Tensor]:
    """The same of labels (R, T) whose row of states (B, T, hidden) is `owner` (R,): logits are computed once for all
    labels of a state."""
    hidden, labels = beside_labels(net, hidden, labels)
    rows, steps = (labels != IGNORE).nonzero(as_tuple=True)
    used, place = (owner[rows] * labels.shape[1] + steps).unique(return_inverse=True)
    wanted, found = labels[rows, steps], torch.zeros(len(rows), device=hidden.device)
    for start in range(0, len(used), TOKENS_PER_CHUNK):
        states = hidden.flatten(0, 1)[used[start : start + TOKENS_PER_CHUNK]]
        here = (place >= start) & (place < start + TOKENS_PER_CHUNK)
        found[here] = net.logits(states).float().log_softmax(-1)[place[here] - start, wanted[here]]
    return found, rows


def means(values: Tensor, rows: Tensor, count: int) -> Tensor:
    """(count,): the mean of the values (N,) whose row (N,) it is, 0 where there is none."""
    sums = values.new_zeros(count).index_add(0, rows, values)
    return sums / torch.bincount(rows, minlength=count).clamp(min=1)
