"""The n-gram language model: the next token from counts of the last few, with modified Kneser-Ney smoothing.

    p_k(w | h) = (c(h w) - D(c(h w))) / c(h .) + g(h) p_{k-1}(w | h'),    g(h) = sum_w D(c(h w)) / c(h .)

with h the last k - 1 tokens, h' those without the first, p_0 uniform. c counts occurrences at the highest order and
for what begins a text; below, in how many different contexts a sequence ends (so that a word which follows only one
other is not likely everywhere). D is one of three discounts per order, for counts of 1, 2 and more. Source: Chen and
Goodman, "An Empirical Study of Smoothing Techniques for Language Modeling" (1998), section 3.

It is a `Network`, so that loading, perplexity, generation and comparison are everybody's: a position's hidden state is
the window of the last order - 1 token ids, and `logits` gives log-probabilities. A k-gram is a row of table k, whose
sorted keys are (row of its first k - 1 tokens in table k - 1) * (vocabulary + 1) + last token. Limits: it has nothing
to tune; no peer reads its folder; its size grows with the text.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from burnish.config import UserError
from burnish.model.cache import KVCache
from burnish.model.network import Layout, Network
from burnish.model.spec import Spec

ARCHITECTURE = "NGramForCausalLM"
ROWS = 256  # contexts whose distributions are worked out at once


def ngram_spec(config: dict[str, Any]) -> Spec:
    """The Spec of a config.json with `vocab_size` and `order`, the longest sequence counted."""
    order = config.get("order", 5)
    if not isinstance(order, int) or not 2 <= order <= 10:
        raise UserError(f"config.json: order: an n-gram model counts 2 to 10 tokens at a time, not {order}")
    none = dict.fromkeys(("num_layers", "num_heads", "num_kv_heads", "head_dim", "intermediate_size"), 0)
    fixed: dict[str, Any] = {"kind": "decoder", "positions": "none", "max_positions": 1 << 30, **none}
    return Spec(family="ngram", vocab_size=config["vocab_size"], hidden_size=order - 1, **fixed)


class Window(KVCache):
    """The last ids of each row, (B, order - 1) from old to new, and how many tokens the row has had."""

    shortens = False

    def __init__(self, spec: Spec, rows: int, device: torch.device):
        super().__init__(spec, rows, 0, torch.float32, device)
        self.ids = torch.zeros(rows, spec.hidden_size, device=device)
        self.counts = torch.zeros(rows, dtype=torch.long, device=device)

    def next_positions(self) -> Tensor:
        return self.counts

    def select(self, rows: Tensor) -> None:
        self.ids, self.counts = self.ids[rows], self.counts[rows]


class NGram(Network):
    """Counts by order: `embed_tokens` (vocabulary + 1, 1) for single tokens, the last row the begin of a text;
    `keys` and `counts` of the longer ones, `discounts` (order, 3)."""

    body = ()
    fixed = "an n-gram model has no parameters to train; pretrain it on other text instead"

    def __init__(self, spec: Spec, entries: list[int]):
        super().__init__()
        self.spec, self.techniques = spec, nn.ModuleDict()
        self.compute_dtype, self.gradient_checkpointing = None, False
        self.embed_tokens = nn.Embedding(spec.vocab_size + 1, 1)
        self.layers = nn.ModuleList()

        def table(*shape: int, dtype: torch.dtype) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False)

        self.keys = nn.ParameterList(table(count, dtype=torch.int64) for count in entries)
        self.counts = nn.ParameterList(table(count, dtype=torch.int32) for count in entries)
        self.discounts = table(spec.hidden_size + 1, 3, dtype=torch.float32)

    @property
    def layout(self) -> Layout:
        names = [name for name, _ in self.named_parameters()]
        return Layout({}, {name: name for name in names}, "", ARCHITECTURE, ())

    def tie(self) -> None:
        """Nothing is shared."""

    def head_modules(self) -> list[nn.Module]:
        return []

    def set_head(self, spec: Spec) -> None:
        raise UserError(f"model: {self.fixed}")

    def new_cache(self, rows: int, capacity: int) -> KVCache:
        return Window(self.spec, rows, self.discounts.device)

    def embed(self, input_ids: Tensor) -> Tensor:
        return input_ids[..., None].float()  # exact below 2^24

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: KVCache | None = None,
        **unused: Any,  # positions tell documents apart; there is no prefix
    ) -> Tensor:
        """Windows (B, T, order - 1) of ids that end with each token; the id `vocab_size` is the begin, -1 nothing."""
        ids = (self.embed(input_ids) if inputs_embeds is None else inputs_embeds)[..., 0]  # type: ignore[arg-type]
        rows, length = ids.shape
        valid = None if attention_mask is None else attention_mask.bool()
        positions = self.positions(rows, length, valid, position_ids, cache, None, ids.device)
        width = self.spec.hidden_size
        before = cache.ids if isinstance(cache, Window) else ids.new_zeros(rows, width)
        known = torch.cat((before, ids), dim=1)
        lags = torch.arange(width - 1, -1, -1, device=ids.device)
        windows = known.unfold(1, width, 1)[:, 1:]  # (B, T, width), each ending with its token
        place = positions[..., None] - lags
        windows = torch.where(place >= 0, windows, torch.where(place == -1, float(self.spec.vocab_size), -1.0))
        if isinstance(cache, Window):
            cache.ids, cache.length = known[:, -width:], cache.length + length
            cache.counts = positions[:, -1] + 1
        return windows

    def logits(self, hidden: Tensor) -> Tensor:
        """Windows (..., order - 1) -> log-probabilities (..., vocab)."""
        flat = hidden.reshape(-1, self.spec.hidden_size).long()
        found = [self.distribution(part) for part in flat.split(ROWS)]
        return (
            torch.cat(found).log().view(*hidden.shape[:-1], -1) if found else hidden.new_zeros(0, self.spec.vocab_size)
        )

    def distribution(self, windows: Tensor) -> Tensor:
        """(N, order - 1) -> probabilities (N, vocab), float32."""
        vocab, rows = self.spec.vocab_size, len(windows)
        single = self.embed_tokens.weight[:vocab, 0].expand(1, -1)
        cut = torch.where(single > 0, self.discount(0, single), 0.0)
        total = single.sum().clamp(min=1)
        p = ((single - cut + cut.sum() / vocab) / total).repeat(rows, 1)
        for order in range(2, self.spec.hidden_size + 2):
            context = self.row_of(windows[:, windows.shape[1] - (order - 1) :])
            keys = self.keys[order - 2]
            begin = torch.searchsorted(keys, context * (vocab + 1))
            sizes = torch.where(context >= 0, torch.searchsorted(keys, (context + 1) * (vocab + 1)) - begin, 0)
            row = torch.repeat_interleave(torch.arange(rows, device=p.device), sizes)
            offset = torch.arange(len(row), device=p.device) - (sizes.cumsum(0) - sizes)[row]
            entry = begin[row] + offset
            count = self.counts[order - 2][entry].float()
            cut = self.discount(order - 1, count)
            total = p.new_zeros(rows).index_add_(0, row, count)
            weight = p.new_zeros(rows).index_add_(0, row, cut) / total.clamp(min=1)
            p = p * torch.where(sizes > 0, weight, 1.0)[:, None]
            p[row, keys[entry] % (vocab + 1)] += (count - cut) / total[row]
        return p

    def discount(self, order: int, counts: Tensor) -> Tensor:
        return self.discounts[order][(counts.long() - 1).clamp(0, 2)]

    def row_of(self, tokens: Tensor) -> Tensor:
        """The rows of sequences (N, k) in table k; -1 for those that were never seen, or reach before the begin."""
        row = tokens[:, 0]
        for k in range(1, tokens.shape[1]):
            keys = self.keys[k - 1]
            wanted = row * (self.spec.vocab_size + 1) + tokens[:, k]
            at = torch.searchsorted(keys, wanted).clamp(max=max(len(keys) - 1, 0))
            row = torch.where((row >= 0) & (keys[at] == wanted), at, -1) if len(keys) else torch.full_like(row, -1)
        return row


def count(spec: Spec, texts: Iterable[list[int]]) -> NGram:
    """The model of the texts' token ids. Raises UserError where there is none."""
    begin, order = spec.vocab_size, spec.hidden_size + 1
    pieces = [torch.tensor([begin, *ids]) for ids in texts if ids]
    if not pieces:
        raise UserError("data: there is no text to count")
    tokens = torch.cat(pieces)
    places = torch.cat([torch.arange(len(piece)) for piece in pieces])  # 0: the begin of a text
    rows = tokens  # of the k-gram that ends at each token
    tables: list[tuple[Tensor, Tensor]] = []
    adjusted: list[Tensor] = []
    raw = torch.bincount(tokens, minlength=begin + 1)
    for k in range(2, order + 1):
        inside = (places >= k - 1).nonzero()[:, 0]
        keys = rows[inside - 1] * (begin + 1) + tokens[inside]
        unique, inverse, counts = keys.unique(return_inverse=True, return_counts=True)
        first = torch.full((len(unique),), len(tokens)).scatter_reduce_(0, inverse, inside, "amin")
        contexts = torch.bincount(rows[first], minlength=len(raw))  # in which the (k - 1)-gram ends
        adjusted.append(torch.where(contexts > 0, contexts, raw))
        rows = torch.full_like(rows, -1).index_copy_(0, inside, inverse)
        tables.append((unique, counts))
        raw = counts
    adjusted[0][begin] = 0  # nothing predicts it
    adjusted.append(raw)
    net = NGram(spec, [len(keys) for keys, _ in tables])
    with torch.no_grad():
        net.embed_tokens.weight.copy_(adjusted[0][:, None])
        for k, (keys, _) in enumerate(tables):
            net.keys[k].copy_(keys)
            net.counts[k].copy_(adjusted[k + 1])
        net.discounts.copy_(torch.stack([discounts(counts) for counts in adjusted]))
    net.embed_tokens.weight.requires_grad_(False)
    return net


def discounts(counts: Tensor) -> Tensor:
    """(3,) what is taken from counts of 1, 2 and more (Chen and Goodman, equation 26), from counts of counts."""
    n = [max(1, int((counts == k).sum())) for k in range(1, 5)]
    y = n[0] / (n[0] + 2 * n[1])
    return (
        torch.tensor([k - (k + 1) * y * n[k] / n[k - 1] for k in (1, 2, 3)])
        .clamp(min=0.05)
        .minimum(torch.tensor([0.95, 1.95, 2.95]))
    )
