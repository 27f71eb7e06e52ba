"""The frozen description of a transformer: everything that decides its tensors and its arithmetic."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Head = Literal["lm", "masked_lm", "classification", "none"]


@dataclass(frozen=True)
class Spec:
    """Shape and arithmetic of one `Transformer`.

    Sizes count elements. `fused_qkv` is the row layout of one fused projection: "heads" holds, per key-value head, its
    queries, its key and its value (BLOOM, GPT-NeoX, Falcon), "blocks" holds all q, then all k, then all v (GPT-2),
    "" means three projections. `norm` "centred_rms" multiplies by 1 + weight (Gemma).

    Where the norms stand: before attention and feed-forward; after each sum (`post_norm`, BERT); before and after
    each (`sandwich_norm`, Gemma); before both at once, one for both or one for each (`parallel_norms` 1 or 2, Falcon,
    GPT-NeoX). Layers in `sliding_layers` see the last `sliding_window` positions, and rotate by `rope_local_theta`
    where it is not 0. `rotary_share` of each head is rotated (GPT-NeoX). Scales and caps of 0 mean the usual: queries
    over the root of head_dim, embeddings as they are, no cap.

    An encoder-decoder ("seq2seq") has `num_layers` in its encoder and `decoder_layers` in its decoder, whose input
    begins with the token `decoder_start`. `positions` "relative" adds to the scores a trained number per head and
    bucket of distance: half of `relative_buckets` for one distance each, the others up to `relative_distance` (T5).
    `logit_scale` multiplies a decoder's last states; `mean_pool` classifies by the mean of an encoder's states.
    """

    family: str
    kind: Literal["decoder", "encoder", "seq2seq"]
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_positions: int
    norm: Literal["rms", "centred_rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    norm_bias: bool = True
    post_norm: bool = False
    sandwich_norm: bool = False
    parallel_norms: int = 0
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    gated: bool = False
    fused_qkv: Literal["", "heads", "blocks"] = ""
    qkv_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True
    qk_norm: bool = False
    clip_qkv: float = 0.0
    attention_scale: float = 0.0
    attention_softcap: float = 0.0
    sliding_window: int = 0
    sliding_layers: tuple[int, ...] = ()
    positions: Literal["rotary", "alibi", "relative", "learned", "none"] = "rotary"
    position_offset: int = 0
    alibi_scale: float = 1.0
    relative_buckets: int = 0
    relative_distance: int = 0
    rotary_share: float = 1.0
    rope_theta: float = 10000.0
    rope_local_theta: float = 0.0
    rope_scaling: tuple[tuple[str, float | str], ...] = ()
    token_types: int = 0
    embed_norm: bool = False
    embed_scale: float = 0.0
    head_bias: bool = False
    tied: bool = False
    logit_softcap: float = 0.0
    logit_scale: float = 0.0
    decoder_layers: int = 0
    decoder_start: int = 0
    mean_pool: bool = False
    head: Head = "lm"
    num_labels: int = 0
    pooler: bool = False

    @property
    def causal(self) -> bool:
        return self.kind == "decoder"

    @property
    def paired(self) -> bool:
        """Whether a row has a source, which is read whole, and a target, which is written."""
        return self.kind == "seq2seq"

    @property
    def generates(self) -> bool:
        """Whether its states predict the next token."""
        return self.kind != "encoder" and self.head == "lm"

    @property
    def decoder(self) -> Spec:
        """The part that keeps keys and values: an encoder-decoder's decoder, else the whole."""
        return replace(self, kind="decoder", num_layers=self.decoder_layers, head="none") if self.paired else self
