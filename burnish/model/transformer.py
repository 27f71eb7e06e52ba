"""One transformer for decoders and encoders, decided by its `Spec`.

Inside a layer activations are kept as (tokens, hidden), without padding: on a CPU a 3-D bf16 product goes through
batched matmul with copies that cost about half of a training step. Parameters are cast to the activations' dtype where
they are used, so that `compute_dtype = torch.bfloat16` over float32 parameters is mixed precision with float32 masters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from burnish.config import UserError
from burnish.model.attention import Attention, Frame, narrow, visibility
from burnish.model.cache import KVCache, Prefix, Recorder
from burnish.model.families import layout
from burnish.model.linear import Linear
from burnish.model.network import Layout, Network
from burnish.model.norm import norm
from burnish.model.pages import Step
from burnish.model.patterns import Window
from burnish.model.positions import alibi_slopes, inverse_frequencies, rotary_angles, rotary_scale
from burnish.model.spec import Spec

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def table(rows: int, width: int) -> nn.Embedding:
    """An embedding without a start: torch's own would, on the meta device, import its compiler (a second)."""
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)


class MLP(nn.Module):
    """Feed-forward: down(act(up(x))), or down(act(gate(x)) * up(x)) where gated."""

    def __init__(self, spec: Spec):
        super().__init__()
        self.act = ACTIVATIONS[spec.activation]
        self.gate_proj = Linear(spec.hidden_size, spec.intermediate_size, spec.mlp_bias) if spec.gated else None
        self.up_proj = Linear(spec.hidden_size, spec.intermediate_size, spec.mlp_bias)
        self.down_proj = Linear(spec.intermediate_size, spec.hidden_size, spec.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_proj is None:
            return self.down_proj(self.act(self.up_proj(x)))
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Attention and feed-forward with residuals, the norms where `Spec` says: before each by default.

    Where they run in parallel on norms of their own, `post_attention_layernorm` is the feed-forward's (GPT-NeoX).
    """

    def __init__(self, spec: Spec, index: int):
        super().__init__()
        self.spec, self.index = spec, index
        self.plain = not (spec.post_norm or spec.sandwich_norm or spec.parallel_norms)
        self.self_attn = Attention(spec, index)
        self.mlp = MLP(spec)
        if not spec.post_norm:
            self.input_layernorm = norm(spec, spec.hidden_size)
        if spec.parallel_norms != 1:
            self.post_attention_layernorm = norm(spec, spec.hidden_size)
        if spec.sandwich_norm:
            self.pre_feedforward_layernorm = norm(spec, spec.hidden_size)
        if spec.post_norm or spec.sandwich_norm:
            self.post_feedforward_layernorm = norm(spec, spec.hidden_size)

    def forward(self, x: Tensor, frame: Frame) -> Tensor:
        if self.plain:
            x = x + self.self_attn(self.input_layernorm(x), frame)
            return x + self.mlp(self.post_attention_layernorm(x))
        if self.spec.post_norm:
            x = self.post_attention_layernorm(x + self.self_attn(x, frame))
            return self.post_feedforward_layernorm(x + self.mlp(x))
        if self.spec.sandwich_norm:
            x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), frame))
            return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        first = self.input_layernorm(x)
        second = first if self.spec.parallel_norms == 1 else self.post_attention_layernorm(x)
        return x + self.self_attn(first, frame) + self.mlp(second)


class HeadTransform(nn.Module):
    """BERT's masked-LM transform before the decoder: dense, activation, norm."""

    def __init__(self, spec: Spec):
        super().__init__()
        self.dense = Linear(spec.hidden_size, spec.hidden_size, True)
        self.act = ACTIVATIONS[spec.activation]
        self.norm = norm(spec, spec.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.act(self.dense(x)))


class CappedLinear(Linear):
    """A head whose logits are c * tanh(logit / c) (Gemma 2, arXiv 2408.00118, section 2)."""

    def __init__(self, in_features: int, out_features: int, bias: bool, cap: float):
        super().__init__(in_features, out_features, bias)
        self.cap = cap

    def forward(self, x: Tensor) -> Tensor:
        return self.cap * torch.tanh(super().forward(x) / self.cap)


class Transformer(Network):
    """The native network. `forward` gives hidden states after the final norm; `logits` applies the head.

    A placement may leave only some `heads`, with their `kv_heads`, of every layer here, or only some of the `layers`;
    then, or where they lie on several devices, `run_layers(x, frames)` takes x (N, hidden) through all of them, given
    each layer's frame.
    """

    body: tuple[str, ...] = ("layers.",)
    layer: type[Layer] = Layer
    heads = slice(None)
    kv_heads: list[int] | None = None
    run_layers: Callable[[Tensor, Sequence[Frame]], Tensor | None] | None = None  # None: as the layers stand here

    def __init__(self, spec: Spec):
        super().__init__()
        self.spec = spec
        self.compute_dtype: torch.dtype | None = None
        self.gradient_checkpointing = False
        self.embed_tokens = table(spec.vocab_size, spec.hidden_size)
        if spec.positions == "learned":
            self.embed_positions = table(spec.max_positions + spec.position_offset, spec.hidden_size)
        if spec.token_types:
            self.embed_token_types = table(spec.token_types, spec.hidden_size)
        self.embed_norm = norm(spec, spec.hidden_size) if spec.embed_norm else None
        if spec.positions == "relative":
            self.relative_bias = table(spec.relative_buckets, spec.num_heads)
        self.layers = nn.ModuleList(self.layer(spec, index) for index in range(spec.num_layers))
        self.norm = None if spec.post_norm else norm(spec, spec.hidden_size)
        self.techniques = nn.ModuleDict()
        self.set_head(spec)

    def set_head(self, spec: Spec) -> None:
        self.spec = spec
        pooler = getattr(self, "pooler", None)
        self.pooler = (pooler or Linear(spec.hidden_size, spec.hidden_size, True)) if spec.pooler else None
        self.head_transform = HeadTransform(spec) if spec.head == "masked_lm" else None
        self.lm_head = None
        self.score = None
        if spec.head in ("lm", "masked_lm"):
            shape = (spec.hidden_size, spec.vocab_size, spec.head_bias)
            self.lm_head = CappedLinear(*shape, spec.logit_softcap) if spec.logit_softcap else Linear(*shape)
            self.tie()
        elif spec.head == "classification":
            self.score = Linear(spec.hidden_size, spec.num_labels, not spec.causal)

    def tie(self) -> None:
        if self.lm_head is None or not self.spec.tied:
            return
        storage = getattr(self.embed_tokens, "storage", None)  # of rows that are not dense
        if storage is None:
            self.lm_head.weight.dense = self.embed_tokens.weight  # type: ignore[union-attr]
        else:
            self.lm_head.weight = storage

    @property
    def layout(self) -> Layout:
        return layout(self.spec, {name for name, part in self._modules.items() if part is not None})

    def head_modules(self) -> list[nn.Module]:
        parts = (self.head_transform, self.lm_head, self.score, self.pooler)
        return [part for part in parts if part is not None]

    def record(self, embeds: Tensor) -> tuple[Tensor, Prefix] | None:
        everything = self.spec.causal and not self.spec.sliding_layers and self.pattern is None
        if not everything or self.gradient_checkpointing or self.run_layers is not None:
            return None
        recorder = Recorder(self.spec, embeds.shape[1], self.dtype, embeds.device)
        return self(inputs_embeds=embeds, cache=recorder), recorder.as_prefix()

    def new_cache(self, rows: int, capacity: int) -> KVCache:
        places = {layer.index: next(layer.parameters()).device for layer in self.layers}  # type: ignore[misc]
        spec = self.spec if self.kv_heads is None else replace(self.spec, num_kv_heads=len(self.kv_heads))
        return KVCache(spec, rows, capacity, self.dtype, self.embed_tokens.weight.device, places)  # type: ignore[arg-type]

    def own(self, prefix: Prefix) -> Prefix:
        return prefix if self.kv_heads is None else prefix.heads(self.kv_heads)

    def bias(self) -> Tensor | None:
        """What the scores of the heads that are here are changed by, with the distance: see `visibility`."""
        if self.spec.positions == "relative":
            return self.relative_bias.weight
        if self.spec.positions == "alibi":
            slopes = alibi_slopes(self.spec.num_heads, self.embed_tokens.weight.device)
            return self.spec.alibi_scale * slopes[self.heads]
        return None

    @torch.no_grad()
    def initialize(self, std: float = 0.02) -> Transformer:
        """Random start: Gaussian matrices of the given standard deviation, zero biases, unit norms (GPT-2, 2.3)."""
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                scaled = name.endswith(("o_proj.weight.dense", "down_proj.weight.dense"))
                parameter.normal_(0, std / (2 * self.spec.num_layers) ** 0.5 if scaled else std)
        return self

    def embed(self, input_ids: Tensor) -> Tensor:
        """input_ids (B, T) -> token embeddings (B, T, hidden), without positions."""
        x = self.embed_tokens(input_ids).to(self.dtype)
        if self.spec.embed_scale:  # rounded to the activations' dtype, as Gemma was trained
            x = x * torch.tensor(self.spec.embed_scale, dtype=x.dtype)
        return x

    def forward(self, input_ids: Tensor | None = None, **given: Any) -> Tensor:
        """Hidden states (B, T, hidden) of what `enter` takes; 0 at padding."""
        x, frames = self.enter(input_ids, **given)
        frame = frames[0]
        ran = None if self.run_layers is None else self.run_layers(x, frames)
        if ran is not None:
            x, frames = ran, []
        for layer, own in zip(self.layers, frames, strict=False):
            if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
                x = checkpoint(layer, x, own, use_reentrant=False)
            else:
                x = layer(x, own)
        if self.norm is not None:
            x = self.norm(x)
        return frame.rows(x)

    def enter(
        self,
        input_ids: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        cache: KVCache | None = None,
        prefix: Prefix | None = None,
        source: Any = None,
    ) -> tuple[Tensor, list[Frame]]:
        """What the layers begin with, x (N, hidden), and the frame of each, for T new tokens given as ids (B, T) or
        embeddings (B, T, hidden).

        attention_mask (B, T): real tokens among the new ones. position_ids (B, T) default to counting real tokens,
        on from the cache or the prefix. segment_ids (B, T): documents of a packed row. `cache` is written in place.
        source: what an encoder-decoder's layers attend to.
        """
        x = self.embed(input_ids) if inputs_embeds is None else inputs_embeds.to(self.dtype)  # type: ignore[arg-type]
        batch, length, _ = x.shape
        valid = None if attention_mask is None or bool(attention_mask.all()) else attention_mask.bool()
        positions = self.positions(batch, length, valid, position_ids, cache, prefix, x.device)
        if cache is not None:
            cache.reserve(valid, positions)
        parts = cache.parts(self.spec, x.dtype, self.bias()) if isinstance(cache, Step) else ()
        mask, causal = None, False
        if not parts:
            mask, causal = visibility(self.spec, positions, valid, segment_ids, cache, prefix, x.dtype, self.bias())
        rotary = None
        if self.spec.positions == "rotary":
            frequencies = inverse_frequencies(self.spec, x.device)
            rotary = rotary_angles(positions, frequencies, x.dtype, rotary_scale(self.spec))
        elif self.spec.positions == "learned":
            if length > 1 and (last := int(positions.max())) >= self.spec.max_positions:
                raise UserError(
                    f"a row of {last + 1} tokens is longer than the model's {self.spec.max_positions} positions; "
                    "shorten the text, or lower max_length"
                )
            rows = positions + self.spec.position_offset if self.spec.position_offset else positions
            x = x + self.embed_positions(rows).to(x.dtype)
        if self.spec.token_types:
            types = torch.zeros_like(positions) if token_type_ids is None else token_type_ids
            x = x + self.embed_token_types(types).to(x.dtype)

        real = None if valid is None else valid.flatten().nonzero().squeeze(1)
        frame = Frame(batch, length, mask, causal, rotary, cache, prefix, real, source, parts)
        if self.pattern is not None:
            frame = narrow(self.pattern, self.spec, frame, positions)
        frames = [frame] * self.spec.num_layers
        if self.spec.sliding_layers:
            near = self.near(frame, positions, x.dtype)
            frames = [near if layer in self.spec.sliding_layers else frame for layer in range(self.spec.num_layers)]
        x = frame.flat(x)
        if self.embed_norm is not None:
            x = self.embed_norm(x)
        return x, frames

    def near(self, frame: Frame, positions: Tensor, dtype: torch.dtype) -> Frame:
        """The frame of the sliding layers, from that of the others."""
        frame = narrow(Window(self.spec.sliding_window), self.spec, frame, positions)
        if not self.spec.rope_local_theta:
            return frame
        frequencies = inverse_frequencies(self.spec, positions.device, local=True)
        return replace(frame, rotary=rotary_angles(positions, frequencies, dtype))

    def logits(self, hidden: Tensor) -> Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        if self.head_transform is not None:
            flat = self.head_transform(flat)
        head = self.lm_head if self.lm_head is not None else self.score
        if head is None:
            raise ValueError("this network has no head: it gives hidden states only")
        if self.score is not None and self.pooler is not None:
            flat = torch.tanh(self.pooler(flat))
        return head(flat).view(*hidden.shape[:-1], -1)
