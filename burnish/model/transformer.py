"""One transformer for decoders and encoders, decided by its `Spec`.

Inside a layer activations are kept as (tokens, hidden): on a CPU a 3-D bf16 product goes through batched matmul with
copies that cost about half of a training step. Parameters are cast to the activations' dtype where they are used, so
that `compute_dtype = torch.bfloat16` over float32 parameters is mixed precision with float32 masters.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from burnish.model.attention import Attention, Frame, visibility
from burnish.model.cache import KVCache, Prefix
from burnish.model.linear import Linear
from burnish.model.positions import inverse_frequencies, rotary_angles
from burnish.model.spec import Spec

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


class Norm(nn.Module):
    """RMSNorm (arXiv 1910.07467) or LayerNorm over the last dimension, computed in float32."""

    def __init__(self, kind: str, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if kind == "layer" else None

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype)
        if self.bias is None:
            return F.rms_norm(x, weight.shape, weight, self.eps)
        return F.layer_norm(x, weight.shape, weight, self.bias.to(x.dtype), self.eps)


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
    """Attention and feed-forward with residuals; norms before each (default) or after each sum (`post_norm`)."""

    def __init__(self, spec: Spec, index: int):
        super().__init__()
        norm = (spec.norm, spec.hidden_size, spec.norm_eps)
        self.post_norm = spec.post_norm
        self.self_attn = Attention(spec, index)
        self.mlp = MLP(spec)
        if not spec.post_norm:
            self.input_layernorm = Norm(*norm)
        self.post_attention_layernorm = Norm(*norm)
        if spec.post_norm:
            self.post_feedforward_layernorm = Norm(*norm)

    def forward(self, x: Tensor, frame: Frame) -> Tensor:
        if self.post_norm:
            x = self.post_attention_layernorm(x + self.self_attn(x, frame))
            return self.post_feedforward_layernorm(x + self.mlp(x))
        x = x + self.self_attn(self.input_layernorm(x), frame)
        return x + self.mlp(self.post_attention_layernorm(x))


class HeadTransform(nn.Module):
    """BERT's masked-LM transform before the decoder: dense, activation, norm."""

    def __init__(self, spec: Spec):
        super().__init__()
        self.dense = Linear(spec.hidden_size, spec.hidden_size, True)
        self.act = ACTIVATIONS[spec.activation]
        self.norm = Norm(spec.norm, spec.hidden_size, spec.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.act(self.dense(x)))


class Transformer(nn.Module):
    """The network. `forward` gives hidden states after the final norm; `logits` applies the head."""

    def __init__(self, spec: Spec):
        super().__init__()
        self.spec = spec
        self.compute_dtype: torch.dtype | None = None
        self.gradient_checkpointing = False
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.hidden_size)
        if spec.positions == "learned":
            self.embed_positions = nn.Embedding(spec.max_positions, spec.hidden_size)
        if spec.token_types:
            self.embed_token_types = nn.Embedding(spec.token_types, spec.hidden_size)
        self.embed_norm = Norm(spec.norm, spec.hidden_size, spec.norm_eps) if spec.embed_norm else None
        self.layers = nn.ModuleList(Layer(spec, index) for index in range(spec.num_layers))
        self.norm = None if spec.post_norm else Norm(spec.norm, spec.hidden_size, spec.norm_eps)
        self.techniques = nn.ModuleDict()
        self.set_head(spec)

    def set_head(self, spec: Spec) -> None:
        """Give the network the head that `spec` names; the body stays."""
        self.spec = spec
        self.pooler = Linear(spec.hidden_size, spec.hidden_size, True) if spec.pooler else None
        self.head_transform = HeadTransform(spec) if spec.head == "masked_lm" else None
        self.lm_head = None
        self.score = None
        if spec.head in ("lm", "masked_lm"):
            self.lm_head = Linear(spec.hidden_size, spec.vocab_size, spec.head_bias)
            self.tie()
        elif spec.head == "classification":
            self.score = Linear(spec.hidden_size, spec.num_labels, not spec.causal)

    def tie(self) -> None:
        """Share the embedding with the language-model head where the spec says so."""
        if self.lm_head is not None and self.spec.tied:
            self.lm_head.weight.dense = self.embed_tokens.weight  # type: ignore[union-attr]

    @torch.no_grad()
    def initialize(self, std: float = 0.02) -> Transformer:
        """Random start: Gaussian matrices of the given standard deviation, zero biases, unit norms (GPT-2, 2.3)."""
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                scaled = name.endswith(("o_proj.weight.dense", "down_proj.weight.dense"))
                parameter.normal_(0, std / (2 * self.spec.num_layers) ** 0.5 if scaled else std)
        return self

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the activations."""
        return self.compute_dtype or self.embed_tokens.weight.dtype

    def embed(self, input_ids: Tensor) -> Tensor:
        """input_ids (B, T) -> token embeddings (B, T, hidden), without positions."""
        return self.embed_tokens(input_ids).to(self.dtype)

    def forward(
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
    ) -> Tensor:
        """Hidden states (B, T, hidden) of T new tokens given as ids (B, T) or embeddings (B, T, hidden).

        attention_mask (B, T): real tokens among the new ones. position_ids (B, T) default to counting real tokens,
        on from the cache or the prefix. segment_ids (B, T): documents of a packed row. `cache` is written in place.
        """
        x = self.embed(input_ids) if inputs_embeds is None else inputs_embeds.to(self.dtype)  # type: ignore[arg-type]
        batch, length, _ = x.shape
        valid = None if attention_mask is None or bool(attention_mask.all()) else attention_mask.bool()
        positions = self.positions(batch, length, valid, position_ids, cache, prefix, x.device)
        if cache is not None:
            cache.reserve(valid, positions)
        mask, causal = visibility(self.spec, positions, valid, segment_ids, cache, prefix, x.dtype)
        rotary = None
        if self.spec.positions == "rotary":
            rotary = rotary_angles(positions, inverse_frequencies(self.spec, x.device), x.dtype)
        elif self.spec.positions == "learned":
            x = x + self.embed_positions(positions).to(x.dtype)
        if self.spec.token_types:
            types = torch.zeros_like(positions) if token_type_ids is None else token_type_ids
            x = x + self.embed_token_types(types).to(x.dtype)

        frame = Frame(batch, length, mask, causal, rotary, cache, prefix)
        x = x.view(batch * length, -1)
        if self.embed_norm is not None:
            x = self.embed_norm(x)
        for layer in self.layers:
            if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
                x = checkpoint(layer, x, frame, use_reentrant=False)
            else:
                x = layer(x, frame)
        if self.norm is not None:
            x = self.norm(x)
        return x.view(batch, length, -1)

    def positions(
        self,
        batch: int,
        length: int,
        valid: Tensor | None,
        position_ids: Tensor | None,
        cache: KVCache | None,
        prefix: Prefix | None,
        device: torch.device,
    ) -> Tensor:
        """(B, T) positions of the new tokens; what the prefix or the cache holds comes before them."""
        if position_ids is not None:
            positions = position_ids.expand(batch, length)
        elif valid is not None:
            positions = (valid.long().cumsum(1) - 1).clamp(min=0)
        else:
            positions = torch.arange(length, device=device).expand(batch, length)
        if cache is not None and cache.length and position_ids is None:
            positions = positions + cache.next_positions()[:, None]
        if prefix is not None:
            positions = positions + (prefix.size if prefix.lengths is None else prefix.lengths)
        return positions

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (..., hidden) -> (..., vocab) for language models, (..., labels) for classifiers."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        if self.head_transform is not None:
            flat = self.head_transform(flat)
        head = self.lm_head if self.lm_head is not None else self.score
        if head is None:
            raise ValueError("this network has no head: it gives hidden states only")
        if self.score is not None and self.pooler is not None:
            flat = torch.tanh(self.pooler(flat))
        return head(flat).view(*hidden.shape[:-1], -1)

    def pool(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, T, hidden) -> (B, hidden): the first token of an encoder, the last real token of a decoder."""
        steps = torch.arange(hidden.shape[1], device=hidden.device)
        real = attention_mask.long()
        chosen = (real * steps if self.spec.causal else real).argmax(dim=1)
        return hidden[torch.arange(len(hidden), device=hidden.device), chosen]
