"""Self-attention: which key each query sees, and the product over them.

Visibility is a function of (query, key): `visibility` builds it once per forward as one mask for all layers, so that
padding, packed documents, a cache and a prefix are handled in one place. `narrow` leaves of it what a pattern shows
(`model/patterns.py`): that of the layers with a sliding window, or one that a technique gives to all layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from burnish.model.cache import KVCache, Prefix
from burnish.model.linear import Linear
from burnish.model.norm import norm
from burnish.model.patterns import Pattern, causal
from burnish.model.positions import relative_buckets, rotate
from burnish.model.spec import Spec


@dataclass
class Frame:
    """What the layers share in one forward over (batch, length) tokens.

    `mask` is None, a bool (B, 1, T, S), or an additive bias (B, heads, T, S); `causal` asks for the plain causal
    triangle and then `mask` is None. `real` are the places (N,) of the real tokens among B * T, None where all are: the
    layers' activations are theirs alone, (N, hidden), and only attention lays them out in rows. `source` is what an
    encoder-decoder's layers attend to. `parts`, where there are any, are frames of the tokens in their order, each of
    which attends by itself.
    """

    batch: int
    length: int
    mask: Tensor | None
    causal: bool
    rotary: tuple[Tensor, Tensor] | None
    cache: KVCache | None
    prefix: Prefix | None
    real: Tensor | None = None
    source: Any = None
    parts: Sequence[Frame] = ()

    def flat(self, x: Tensor) -> Tensor:
        """(B, T, ...) -> (N, ...), the real tokens."""
        x = x.reshape(self.batch * self.length, *x.shape[2:])
        return x if self.real is None else x.index_select(0, self.real)

    def rows(self, x: Tensor) -> Tensor:
        """(N, ...) -> (B, T, ...), with zeros at padding."""
        if self.real is not None:
            x = x.new_zeros(self.batch * self.length, *x.shape[1:]).index_copy(0, self.real, x)
        return x.view(self.batch, self.length, *x.shape[1:])

    def part(self, rows: slice) -> Frame:
        """The frame of some of the rows, whose slots in the cache are reserved."""
        real = self.real
        if real is not None:
            first, end = rows.start * self.length, rows.stop * self.length
            real = real[(real >= first) & (real < end)] - first
        return replace(
            self,
            batch=rows.stop - rows.start,
            mask=None if self.mask is None else self.mask[rows],
            rotary=None if self.rotary is None else (self.rotary[0][rows], self.rotary[1][rows]),
            cache=self.cache and self.cache.part(rows),
            real=real,
            source=self.source and self.source.part(rows),
        )

    def on(self, device: torch.device) -> Frame:
        """The frame for layers on another device, where their part of the cache lies already."""
        mask, real = (None if x is None else x.to(device) for x in (self.mask, self.real))
        rotary = None if self.rotary is None else (self.rotary[0].to(device), self.rotary[1].to(device))
        prefix, source = (x and x.on(device) for x in (self.prefix, self.source))
        return replace(self, mask=mask, real=real, rotary=rotary, prefix=prefix, source=source)


def visibility(
    spec: Spec,
    positions: Tensor,
    valid: Tensor | None,
    segments: Tensor | None,
    cache: KVCache | None,
    prefix: Prefix | None,
    dtype: torch.dtype,
    bias: Tensor | None = None,
) -> tuple[Tensor | None, bool]:
    """(mask, causal) of a `Frame` for queries at `positions` (B, T).

    valid: (B, T) real tokens, None for all. segments: (B, T) document numbers, tokens of different documents do not
    see each other. A query that would see nothing (padding) sees itself, so that no row of the softmax is empty.
    bias: what is added to the scores by the distance: its slopes (heads,), or a number per bucket (buckets, heads).
    """
    batch, length = positions.shape
    device = positions.device
    fresh = cache is None or cache.length == length
    if valid is None and segments is None and prefix is None and bias is None:
        if fresh:
            return None, spec.causal and length > 1
        if length == 1 and not cache.holes:  # type: ignore[union-attr]
            return None, False

    if cache is not None:
        slots, steps = torch.arange(cache.length, device=device), cache.newest(length)
        seen = cache.valid[:, None, : cache.length].expand(batch, length, -1)
        key_positions = cache.positions[:, : cache.length]
    else:
        slots = steps = torch.arange(length, device=device)
        seen = torch.ones(batch, length, length, dtype=torch.bool, device=device)
        if valid is not None:
            seen = seen & valid[:, None, :]
        if segments is not None:
            seen = seen & (segments[:, :, None] == segments[:, None, :])
        key_positions = positions
    if spec.causal:
        seen = seen & causal(steps[:, None], slots[None, :])
    seen = seen | (slots[None, :] == steps[:, None])

    if prefix is not None:
        index = torch.arange(prefix.size, device=device)
        full = positions.new_full((batch, length), prefix.size)
        lengths = full if prefix.lengths is None else prefix.lengths
        shown = index >= prefix.size - lengths[..., None]
        seen = torch.cat((shown, seen), dim=2)
    mask = seen[:, None]
    if bias is None:
        return mask, False
    key_positions = key_positions[:, None, :].expand(batch, length, -1)
    if prefix is not None:
        key_positions = torch.cat((index - (prefix.size - lengths[..., None]), key_positions), dim=2)
    distance = key_positions - positions[:, :, None]
    if bias.dim() == 2:
        added = F.embedding(relative_buckets(spec, distance), bias).permute(0, 3, 1, 2)
    else:
        added = bias[None, :, None, None] * distance[:, None].to(torch.float32)
    return added.masked_fill(~mask, float("-inf")).to(dtype), False


def narrow(pattern: Pattern, spec: Spec, frame: Frame, positions: Tensor) -> Frame:
    """The `frame` of layers that see of it only what `pattern` shows, for queries at `positions` (B, T).

    A prefix is seen from anywhere.
    """
    if frame.parts:
        queries = positions[0].split([part.batch * part.length for part in frame.parts])
        each = zip(frame.parts, queries, strict=True)
        return replace(frame, parts=[narrow(pattern, spec, part, at.view(part.batch, -1)) for part, at in each])
    cache = frame.cache
    if pattern.covers(frame.length if cache is None else cache.length):
        return frame
    key_positions = positions if cache is None else cache.positions[:, : cache.length].clamp(min=0)
    seen = pattern(positions[:, :, None], key_positions[:, None, :], spec.causal)  # (B, T, S)
    if cache is not None:
        seen = seen | cache.of_prefix()[:, None]
    if frame.prefix is not None:
        seen = F.pad(seen, (frame.prefix.size, 0), value=True)
    mask = seen[:, None]
    if frame.mask is not None:
        additive = frame.mask.dtype != torch.bool
        mask = frame.mask.masked_fill(~mask, float("-inf")) if additive else frame.mask & mask
    return replace(frame, mask=mask, causal=False)


class Attention(nn.Module):
    """Multi-head self-attention over flattened tokens, (N, hidden) -> (N, hidden)."""

    def __init__(self, spec: Spec, layer: int):
        super().__init__()
        self.spec, self.layer = spec, layer
        query, key = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        if spec.fused_qkv:
            self.qkv_proj = Linear(spec.hidden_size, query + 2 * key, spec.qkv_bias)
        else:
            self.q_proj = Linear(spec.hidden_size, query, spec.qkv_bias)
            self.k_proj = Linear(spec.hidden_size, key, spec.qkv_bias)
            self.v_proj = Linear(spec.hidden_size, key, spec.qkv_bias)
        self.o_proj = Linear(query, spec.hidden_size, spec.out_bias)
        self.q_norm = norm(spec, spec.head_dim) if spec.qk_norm else None
        self.k_norm = norm(spec, spec.head_dim) if spec.qk_norm else None
        self.scale = spec.attention_scale or None

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (N, hidden) -> q, k, v, each (N, heads, head_dim)."""
        spec, size = self.spec, self.spec.head_dim
        if spec.fused_qkv == "heads":
            fused = self.qkv_proj(x).unflatten(1, (spec.num_kv_heads, -1, size))  # queries, key, value
            return fused[:, :, :-2].flatten(1, 2), fused[:, :, -2], fused[:, :, -1]
        if spec.fused_qkv == "blocks":
            fused = self.qkv_proj(x).unflatten(1, (3, spec.num_heads, size))
            if spec.clip_qkv:
                fused = fused.clamp(-spec.clip_qkv, spec.clip_qkv)
            return fused[:, 0], fused[:, 1], fused[:, 2]
        q, k, v = (part(x).unflatten(1, (-1, size)) for part in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q.flatten(0, 1)).view_as(q), self.k_norm(k.flatten(0, 1)).view_as(k)
        return q, k, v

    def forward(self, x: Tensor, frame: Frame) -> Tensor:
        q, k, v = (frame.rows(part) for part in self.project(x))
        return self.o_proj(frame.flat(self.attend(q, k, v, frame)).flatten(1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, frame: Frame) -> Tensor:
        """q, k, v (B, T, heads, head_dim), not yet rotated -> (B, T, heads, head_dim)."""
        if frame.rotary is not None:
            q, k = rotate(q, *frame.rotary), rotate(k, *frame.rotary)
        if not frame.parts:
            return self.mix(q, k, v, frame)
        sizes = [part.batch * part.length for part in frame.parts]
        pieces = zip(frame.parts, *(x[0].split(sizes) for x in (q, k, v)), strict=True)
        out = []
        for part, *each in pieces:
            queries, keys, values = (x.view(part.batch, part.length, *x.shape[1:]) for x in each)
            out.append(self.mix(queries, keys, values, part).flatten(0, 1))
        return torch.cat(out)[None]

    def mix(self, q: Tensor, k: Tensor, v: Tensor, frame: Frame) -> Tensor:
        """The same after the rotation."""
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, T, head_dim)
        if frame.cache is not None:
            if not self.spec.attention_softcap:
                direct = frame.cache.attend(self.layer, q, k, v, frame.mask, self.scale or self.spec.head_dim**-0.5)
                if direct is not None:
                    return direct
            k, v = frame.cache.update(self.layer, k, v)
        k, v = self.after_prefix(k, v, frame)
        grouped = self.spec.num_kv_heads != self.spec.num_heads
        if self.spec.attention_softcap:
            return self.capped(q, k, v, frame).transpose(1, 2)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=frame.mask, is_causal=frame.causal, scale=self.scale, enable_gqa=grouped
        )
        return out.transpose(1, 2)

    def after_prefix(self, k: Tensor, v: Tensor, frame: Frame) -> tuple[Tensor, Tensor]:
        """Keys and values (B, kv_heads, T, head_dim) behind those of the prefix."""
        if frame.prefix is None:
            return k, v
        keys, values = frame.prefix.keys[self.layer], frame.prefix.values[self.layer]
        expand = (frame.batch, -1, -1, -1)
        return torch.cat((keys.expand(expand).to(k.dtype), k), 2), torch.cat((values.expand(expand).to(v.dtype), v), 2)

    def capped(self, q: Tensor, k: Tensor, v: Tensor, frame: Frame) -> Tensor:
        """Attention over scores c * tanh(score / c) (Gemma 2, arXiv 2408.00118, section 2), (B, heads, T, head_dim)."""
        cap, shared = self.spec.attention_softcap, self.spec.num_heads // self.spec.num_kv_heads
        k, v = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)
        scores = q @ k.transpose(2, 3) * (self.scale or self.spec.head_dim**-0.5)
        scores = cap * torch.tanh(scores / cap)
        mask = frame.mask
        if frame.causal:
            mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).tril()
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return scores.to(torch.promote_types(q.dtype, torch.float32)).softmax(-1).to(q.dtype) @ v
