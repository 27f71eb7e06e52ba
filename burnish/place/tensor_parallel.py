"""Tensor parallelism: every rank has a part of every matrix, and all work on the same token at the same time.

    attention and feed-forward:  y = sum over ranks of  W_out[:, own] f(W_in[own, :] x)

Source: Megatron-LM (arXiv 1909.08053), section 3: queries, keys, values, gate and up are split by outputs, o and down
by inputs, so that each sub-block needs one sum over the ranks; embedding and head are split over the vocabulary. A
rank has whole heads, with the key-value heads that its queries need, also where there are fewer of these than ranks.
Biases behind a sum are added once. Limits: inference only; the heads must divide among the ranks; NF4 is cut between
its blocks of 64; of techniques around projections, LoRA and bottleneck adapters.
"""

from __future__ import annotations

from dataclasses import replace
from math import gcd

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from burnish.compress.gguf import Table
from burnish.config import UserError
from burnish.model.attention import Attention
from burnish.model.linear import Dense, Linear, Spans, Weight, take
from burnish.model.seq2seq import Seq2Seq
from burnish.model.transformer import MLP, Transformer
from burnish.place.ranks import Ranks
from burnish.tune.adapters import Adapter
from burnish.tune.lora import LoRALinear

BLOCK = 64  # inputs that quantised storage may keep together


class Summed(nn.Module):
    """A projection of which each rank has some inputs: x (tokens, own inputs) -> (tokens, out), on all ranks alike."""

    def __init__(self, base: nn.Module, bias: Tensor | None, ranks: Ranks):
        super().__init__()
        self.base, self.ranks = base, ranks
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.total(self.base(x))

    def total(self, y: Tensor, more: Tensor | None = None) -> Tensor:
        """The ranks' y (tokens, out), which may change, in one sum, with the bias and one `more`."""
        y = self.ranks.sum(y.contiguous())
        for bias in (self.bias, more):
            y = y if bias is None else y + bias.to(y.dtype)
        return y


class Gathered(nn.Module):
    """A head of which each rank has some outputs, `sizes` of them: x (tokens, in) -> (tokens, sum of sizes)."""

    def __init__(self, base: nn.Module, sizes: list[int], ranks: Ranks):
        super().__init__()
        self.base, self.sizes, self.ranks = base, sizes, ranks

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        parts = self.ranks.gather(F.pad(y, (0, max(self.sizes) - y.shape[1])))
        return torch.cat([part[:, :size] for part, size in zip(parts, self.sizes, strict=True)], dim=1)


class SplitEmbedding(nn.Module):
    """The rows of an embedding from `start` on, in an embedding of their own; those of other tokens come from the other
    ranks."""

    def __init__(self, rows: nn.Embedding | Table, start: int, ranks: Ranks):
        super().__init__()
        self.rows, self.start, self.ranks = rows, start, ranks

    @property
    def weight(self) -> Tensor:
        return self.rows.weight

    def forward(self, input: Tensor) -> Tensor:
        own = input - self.start
        elsewhere = (own < 0) | (own >= self.rows.num_embeddings)
        found = self.rows(own.masked_fill(elsewhere, 0))
        return self.ranks.sum(found.masked_fill(elsewhere[..., None], 0))


def split(net: Transformer, ranks: Ranks) -> None:
    """Leave this rank's part of the network here, in place; `Unread` weights are read one at a time.

    Raises UserError where heads do not divide among the ranks, or for a projection that cannot be cut.
    """
    spec, world = net.spec, ranks.world
    if spec.num_heads % world:
        possible = [str(count) for count in range(2, spec.num_heads + 1) if spec.num_heads % count == 0]
        raise UserError(
            f"tensor_parallel: {spec.num_heads} attention heads cannot be dealt out evenly to {world} ranks; "
            f"start {' or '.join(possible) or 'layer_parallel with 2'} of them"
        )
    split_vocabulary(net, ranks)  # first: it is here as a whole, where projections may still be in their files
    for path, module in list(net.named_modules()):
        try:
            if isinstance(module, Attention):
                split_attention(module, ranks)
            elif isinstance(module, MLP):
                split_mlp(module, ranks)
        except UserError as error:
            raise UserError(f"tensor_parallel: {path}: {error}") from None
    own = spec.num_heads // world
    decoder = net.decoder if isinstance(net, Seq2Seq) else None
    for stack in (net, decoder) if decoder is not None else (net,):
        stack.heads = slice(ranks.rank * own, (ranks.rank + 1) * own)
        stack.kv_heads = [head for head, _ in key_values(net, ranks)]
        if spec.positions == "relative":
            table = stack.relative_bias.weight[:, stack.heads].detach().clone()
            stack.relative_bias = nn.Embedding.from_pretrained(table)
    if decoder is not None:
        decoder.embed_tokens = net.embed_tokens


def key_values(of: Transformer | Attention, ranks: Ranks) -> list[tuple[int, range]]:
    """A rank's key-value heads, each with the run of queries that share it: all runs are of one length, for which a
    head may be listed twice."""
    spec = of.spec
    own, shared = spec.num_heads // ranks.world, spec.num_heads // spec.num_kv_heads
    run = gcd(own, shared)
    starts = range(ranks.rank * own, (ranks.rank + 1) * own, run)
    return [(start // shared, range(start, start + run)) for start in starts]


def split_attention(attention: Attention, ranks: Ranks) -> None:
    """Leave this rank's heads in one attention."""
    spec, size = attention.spec, attention.spec.head_dim
    own, shared = spec.num_heads // ranks.world, spec.num_heads // spec.num_kv_heads
    queries = (ranks.rank * own, (ranks.rank + 1) * own)
    pairs = key_values(attention, ranks)

    def rows(heads: Spans) -> Spans:
        return [(start * size, end * size) for start, end in heads]

    if spec.fused_qkv == "heads":  # of each key-value head its queries, its key, its value
        heads: list[tuple[int, int]] = []
        for head, run in pairs:
            first = head * (shared + 2)
            at = first + run.start % shared
            heads += [(at, at + len(run)), (first + shared, first + shared + 2)]
        cut(attention.qkv_proj, 0, rows(heads))
    elif spec.fused_qkv == "blocks":
        blocks = [(at + queries[0], at + queries[1]) for at in range(0, 3 * spec.num_heads, spec.num_heads)]
        cut(attention.qkv_proj, 0, rows(blocks))
    else:
        cut(attention.q_proj, 0, rows([queries]))
        for projection in (attention.k_proj, attention.v_proj):
            cut(projection, 0, rows([(head, head + 1) for head, _ in pairs]))
    sum_inputs(attention, "o_proj", rows([queries]), ranks)
    attention.spec = replace(spec, num_heads=own, num_kv_heads=len(pairs))


def split_mlp(mlp: MLP, ranks: Ranks) -> None:
    """Leave this rank's share of the inner features in one feed-forward, in whole blocks where that is possible."""
    width = inner(mlp.up_proj).out_features
    unit = BLOCK if width % BLOCK == 0 and width >= BLOCK * ranks.world else 1
    span = (part(width // unit, ranks, ranks.rank) * unit, part(width // unit, ranks, ranks.rank + 1) * unit)
    for projection in (mlp.gate_proj, mlp.up_proj):
        if projection is not None:
            cut(projection, 0, [span])
    sum_inputs(mlp, "down_proj", [span], ranks)


def part(size: int, ranks: Ranks, rank: int) -> int:
    """Where a rank's part of `size` things begins."""
    return size * rank // ranks.world


def split_vocabulary(net: Transformer, ranks: Ranks) -> None:
    """Leave this rank's tokens in the embedding and in a language-model head."""
    starts = [part(net.spec.vocab_size, ranks, rank) for rank in range(ranks.world + 1)]
    span = (starts[ranks.rank], starts[ranks.rank + 1])
    table: nn.Embedding | Table = net.embed_tokens
    rows: nn.Embedding | Table
    shared: Weight
    if isinstance(table, Table):
        rows = Table(table.storage.shard(0, [span]), table.dtype)
        shared = rows.storage
    else:
        rows = nn.Embedding.from_pretrained(take(table.weight.detach(), 0, [span]))
        shared = Dense(rows.weight)
    net.embed_tokens = SplitEmbedding(rows, span[0], ranks)  # type: ignore[assignment]
    if net.lm_head is None:
        return
    cut(net.lm_head, 0, [span])
    if net.spec.tied:
        inner(net.lm_head).weight = shared
    sizes = [end - start for start, end in zip(starts, starts[1:], strict=False)]
    net.lm_head = Gathered(net.lm_head, sizes, ranks)  # type: ignore[assignment]


def inner(module: nn.Module) -> Linear:
    """The projection that LoRA may be around."""
    while type(module) is LoRALinear:
        module = module.base
    if not isinstance(module, Linear):
        kind = type(module).__name__
        raise UserError(f"a {kind} cannot be split over ranks; merge the adapter first (burnish merge)")
    return module


def cut(module: nn.Module, dim: int, spans: Spans) -> None:
    """Leave the outputs (dim 0) or the inputs (dim 1) in `spans` of a projection here, in place."""
    if type(module) is LoRALinear:
        name = "lora_A" if dim else "lora_B"
        setattr(module, name, nn.Parameter(take(getattr(module, name).detach(), dim, spans), requires_grad=False))
        cut(module.base, dim, spans)
        return
    linear = inner(module)
    linear.weight = linear.weight.shard(dim, spans)
    if dim == 0 and linear.bias is not None:
        linear.bias = nn.Parameter(take(linear.bias.detach(), 0, spans), requires_grad=False)
    linear.out_features, linear.in_features = linear.weight.shape


def sum_inputs(parent: nn.Module, name: str, spans: Spans, ranks: Ranks) -> None:
    """Leave the inputs in `spans` of the projection `name` here, and sum over the ranks behind it."""
    module = getattr(parent, name)
    if isinstance(module, Adapter):  # works on the sum
        return sum_inputs(module, "base", spans, ranks)
    cut(module, 1, spans)
    linear = inner(module)
    bias, linear.bias = linear.bias, None
    setattr(parent, name, Summed(module, None if bias is None else bias.detach(), ranks))
