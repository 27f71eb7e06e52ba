"""The frozen description of a transformer: everything that decides its tensors and its arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Head = Literal["lm", "masked_lm", "classification", "none"]


@dataclass(frozen=True)
class Spec:
    """Shape and arithmetic of one `Transformer`.

    Sizes count elements. `fused_qkv` is the row layout of one fused projection: "heads" holds q|k|v per head
    (BLOOM), "blocks" holds all q, then all k, then all v (GPT-2), "" means three projections.
    """

    family: str
    kind: Literal["decoder", "encoder"]
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_positions: int
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    post_norm: bool = False
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    gated: bool = False
    fused_qkv: Literal["", "heads", "blocks"] = ""
    qkv_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True
    positions: Literal["rotary", "alibi", "learned", "none"] = "rotary"
    rope_theta: float = 10000.0
    rope_scaling: tuple[tuple[str, float | str], ...] = ()
    token_types: int = 0
    embed_norm: bool = False
    head_bias: bool = False
    tied: bool = False
    head: Head = "lm"
    num_labels: int = 0
    pooler: bool = False

    @property
    def causal(self) -> bool:
        return self.kind == "decoder"
