"""An encoder-decoder: a Transformer that reads a source, and one that writes the target and attends to it.

The encoder is the network itself, so that without its decoder it is a plain encoder, on which a new head can stand.
The decoder's layers have a second attention, whose keys and values are projections of the encoder's last states
("Attention Is All You Need", arXiv 1706.03762, section 3.2.3; T5, arXiv 1910.10683, section 2.1). While generating,
the source is encoded once and those keys and values are computed once: they stay in the cache.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from burnish.model.attention import Attention, Frame
from burnish.model.cache import KVCache, Prefix
from burnish.model.norm import norm
from burnish.model.spec import Spec
from burnish.model.transformer import Layer, Transformer


@dataclass
class Source:
    """What a decoder attends to: states (B, S, hidden), and mask (B, 1, 1, S), True at real tokens, None for all.

    `keys` holds each layer's keys and values (B, S, heads, head_dim) where they are `kept`.
    """

    states: Tensor
    mask: Tensor | None
    kept: bool = False
    keys: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def select(self, rows: Tensor) -> Source:
        """The source of the rows that `rows` (B',) indexes."""
        keys = {layer: (k[rows.to(k.device)], v[rows.to(v.device)]) for layer, (k, v) in self.keys.items()}
        return Source(self.states[rows], None if self.mask is None else self.mask[rows], self.kept, keys)

    def part(self, rows: slice) -> Source:
        """A view of some rows."""
        keys = {layer: (k[rows], v[rows]) for layer, (k, v) in self.keys.items()}
        return Source(self.states[rows], None if self.mask is None else self.mask[rows], self.kept, keys)

    def on(self, device: torch.device) -> Source:
        """The source for layers on another device, which keep keys and values there and read the states but once."""
        return replace(self, mask=None if self.mask is None else self.mask.to(device))


class CrossAttention(Attention):
    """Attention to the source: queries of the decoder's tokens, keys and values of the encoder's last states."""

    def forward(self, x: Tensor, frame: Frame) -> Tensor:
        source: Source = frame.source
        q = frame.rows(self.q_proj(x).unflatten(1, (-1, self.spec.head_dim)))
        k, v = source.keys.get(self.layer) or self.read(source, x.device)
        alone = Frame(frame.batch, frame.length, source.mask, False, None, None, None)
        return self.o_proj(frame.flat(self.attend(q, k, v, alone)).flatten(1))

    def read(self, source: Source, device: torch.device) -> tuple[Tensor, Tensor]:
        """The source's keys and values on the layer's `device`, each (B, S, heads, head_dim). The weights do not tell
        it: they may still be in their files."""
        rows, tokens = source.states.shape[:2]
        shape = (rows, tokens, -1, self.spec.head_dim)
        flat = source.states.flatten(0, 1).to(device)
        k, v = self.k_proj(flat).view(shape), self.v_proj(flat).view(shape)
        if source.kept:
            source.keys[self.layer] = k, v
        return k, v


class CrossLayer(Layer):
    """A decoder's layer: attention to the target so far, attention to the source, feed-forward."""

    def __init__(self, spec: Spec, index: int):
        super().__init__(spec, index)
        self.cross_attn = CrossAttention(spec, index)
        self.cross_attn_layernorm = norm(spec, spec.hidden_size)

    def forward(self, x: Tensor, frame: Frame) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), frame)
        x = x + self.cross_attn(self.cross_attn_layernorm(x), frame)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(Transformer):
    layer = CrossLayer


class Seq2Seq(Transformer):
    """The native encoder-decoder; with another head than a language model's, its encoder alone."""

    decoder: Decoder | None

    def __init__(self, spec: Spec):
        super().__init__(spec)
        self.body = ("layers.", "decoder.layers.")
        self.decoder = Decoder(spec.decoder)
        self.decoder.embed_tokens = self.embed_tokens

    @property
    def all_layers(self) -> list[nn.Module]:
        return [*self.layers, *(self.decoder.layers if self.decoder is not None else ())]

    def new_cache(self, rows: int, capacity: int) -> KVCache:
        if self.decoder is None:
            return super().new_cache(rows, capacity)
        self.decoder.compute_dtype = self.compute_dtype
        return self.decoder.new_cache(rows, capacity)

    def set_head(self, spec: Spec) -> None:
        if spec.head != "lm":
            self.decoder, spec = None, replace(spec, kind="encoder")
        super().set_head(spec)

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        source_embeds: Tensor | None = None,
        source_mask: Tensor | None = None,
        source_prefix: Prefix | None = None,
        inputs_embeds: Tensor | None = None,
        cache: KVCache | None = None,
        **given: Any,
    ) -> Tensor:
        """Hidden states (B, T, hidden) of T new target tokens, or of the source where there is no decoder.

        source_embeds (B, S, hidden) and source_mask (B, S), its real tokens, are the whole source, after
        `source_prefix`; a filled cache holds it already. The other arguments are the `Transformer`'s, of the target.
        """
        if self.decoder is None:
            return super().forward(input_ids, inputs_embeds=inputs_embeds, cache=cache, **given)
        decoder = self.decoder
        if source_embeds is None:
            source = cache.source  # type: ignore[union-attr]
        else:
            states = super().forward(inputs_embeds=source_embeds, attention_mask=source_mask, prefix=source_prefix)
            mask = None if source_mask is None or bool(source_mask.all()) else source_mask[:, None, None].bool()
            source = Source(states, mask, kept=cache is not None)
            if cache is not None:
                cache.source = source
        decoder.compute_dtype, decoder.gradient_checkpointing = self.compute_dtype, self.gradient_checkpointing
        decoder.pattern = self.pattern
        embeds = self.embed(input_ids) if inputs_embeds is None else inputs_embeds  # type: ignore[arg-type]
        hidden = decoder(inputs_embeds=embeds, cache=cache, source=source, **given)
        return hidden * self.spec.logit_scale if self.spec.logit_scale else hidden
