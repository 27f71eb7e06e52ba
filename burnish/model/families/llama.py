"""Llama and the families in its words: Mistral, Qwen2, Qwen3, Gemma 2 and Gemma 3 (text)."""

from __future__ import annotations

from dataclasses import replace

from burnish.model.families.declare import (
    Config,
    Family,
    activation,
    decoder,
    optional,
    rope,
    rope_scaling,
    rope_theta,
    sliding_layers,
    unless,
    window,
)

LLAMA = Family(
    name="llama",
    fields={
        "vocab_size": "vocab_size",
        "hidden_size": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "num_kv_heads": lambda c: c.get("num_key_value_heads") or c["num_attention_heads"],
        "head_dim": lambda c: c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"],
        "intermediate_size": "intermediate_size",
        "max_positions": lambda c: c.get("max_position_embeddings", 2048),
        "norm_eps": lambda c: c.get("rms_norm_eps", 1e-6),
        "activation": activation("hidden_act", "silu"),
        "qkv_bias": lambda c: bool(c.get("attention_bias", False)),
        "out_bias": lambda c: bool(c.get("attention_bias", False)),
        "mlp_bias": lambda c: bool(c.get("mlp_bias", False)),
        "rope_theta": rope_theta(),
        "rope_scaling": rope_scaling,
        "tied": lambda c: bool(c.get("tie_word_embeddings", False)),
    },
    constants={"kind": "decoder", "norm": "rms", "gated": True, "positions": "rotary"},
    prefix="model.",
    modules=(
        ("embed_tokens", "model.embed_tokens"),
        ("layers.{i}.self_attn.q_proj", "model.layers.{i}.self_attn.q_proj"),
        ("layers.{i}.self_attn.k_proj", "model.layers.{i}.self_attn.k_proj"),
        ("layers.{i}.self_attn.v_proj", "model.layers.{i}.self_attn.v_proj"),
        ("layers.{i}.self_attn.o_proj", "model.layers.{i}.self_attn.o_proj"),
        ("layers.{i}.mlp.gate_proj", "model.layers.{i}.mlp.gate_proj"),
        ("layers.{i}.mlp.up_proj", "model.layers.{i}.mlp.up_proj"),
        ("layers.{i}.mlp.down_proj", "model.layers.{i}.mlp.down_proj"),
        ("layers.{i}.input_layernorm", "model.layers.{i}.input_layernorm"),
        ("layers.{i}.post_attention_layernorm", "model.layers.{i}.post_attention_layernorm"),
        ("norm", "model.norm"),
        ("lm_head", "lm_head"),
        ("score", "score"),
    ),
    architectures=decoder("Llama"),
    lora_targets=("q_proj", "v_proj"),
    ignored=("rotary_emb.inv_freq",),
)

QK_NORMS = tuple((f"layers.{{i}}.self_attn.{x}_norm", f"model.layers.{{i}}.self_attn.{x}_norm") for x in "qk")
SANDWICH_NORMS = tuple(
    (f"layers.{{i}}.{place}_feedforward_layernorm", f"model.layers.{{i}}.{place}_feedforward_layernorm")
    for place in ("pre", "post")
)


def _no_bias(config: Config) -> bool:
    return False


def _qwen_window(config: Config) -> int:
    return window(config) if config.get("use_sliding_window") else 0


MISTRAL = replace(
    LLAMA,
    name="mistral",
    fields={
        **LLAMA.fields,
        "qkv_bias": _no_bias,
        "out_bias": _no_bias,
        "mlp_bias": _no_bias,
        "max_positions": optional("max_position_embeddings", 131072),
        "sliding_window": window,
        "sliding_layers": sliding_layers(lambda config, layer: True),
    },
    architectures=decoder("Mistral"),
    refuse=unless(layer_types=None),
)

QWEN2 = replace(
    LLAMA,
    name="qwen2",
    fields={
        **LLAMA.fields,
        "qkv_bias": lambda c: True,
        "out_bias": _no_bias,
        "mlp_bias": _no_bias,
        "max_positions": optional("max_position_embeddings", 32768),
        "sliding_window": _qwen_window,
        "sliding_layers": sliding_layers(lambda c, layer: layer >= c.get("max_window_layers", 28), _qwen_window),
    },
    architectures=decoder("Qwen2"),
)

QWEN3 = replace(
    QWEN2,
    name="qwen3",
    fields={
        **QWEN2.fields,
        "head_dim": optional("head_dim", 128),
        "qkv_bias": LLAMA.fields["qkv_bias"],
        "out_bias": LLAMA.fields["out_bias"],
    },
    constants={**LLAMA.constants, "qk_norm": True},
    modules=LLAMA.modules + QK_NORMS,
    architectures=decoder("Qwen3"),
)

GEMMA2 = replace(
    LLAMA,
    name="gemma2",
    fields={
        **LLAMA.fields,
        "head_dim": optional("head_dim", 256),
        "mlp_bias": _no_bias,
        "max_positions": optional("max_position_embeddings", 8192),
        "activation": activation("hidden_activation", "gelu_pytorch_tanh"),
        "embed_scale": lambda c: c["hidden_size"] ** 0.5,
        "attention_scale": lambda c: c.get("query_pre_attn_scalar", 256) ** -0.5,
        "attention_softcap": lambda c: float(c.get("attn_logit_softcapping", 50.0) or 0),
        "logit_softcap": lambda c: float(c.get("final_logit_softcapping", 30.0) or 0),
        "sliding_window": window,
        "sliding_layers": sliding_layers(lambda c, layer: layer % 2 == 0),
        "tied": optional("tie_word_embeddings", True),
    },
    constants={**LLAMA.constants, "norm": "centred_rms", "sandwich_norm": True},
    modules=LLAMA.modules + SANDWICH_NORMS,
    architectures=decoder("Gemma2"),
    refuse=unless(use_bidirectional_attention=False),
)


def _refuse_gemma3(config: Config) -> str | None:
    local = rope(config, "sliding_attention") if config.get("rope_parameters") else {}
    if local.get("rope_type", "default") != "default":
        return f"rope_parameters: sliding_attention: rope_type '{local['rope_type']}' is not supported"
    # transformers 5 reads the key and leaves the arithmetic as it is
    return unless(use_bidirectional_attention=False, attn_logit_softcapping=None)(config)


def _gemma3_local_theta(config: Config) -> float:
    local = rope({"rope_parameters": config.get("rope_parameters")}, "sliding_attention")
    return float(local.get("rope_theta") or config.get("rope_local_base_freq") or 10000.0)


GEMMA3 = replace(
    GEMMA2,
    name="gemma3_text",
    fields={
        **GEMMA2.fields,
        "max_positions": optional("max_position_embeddings", 131072),
        "attention_softcap": lambda c: 0.0,
        "logit_softcap": lambda c: float(c.get("final_logit_softcapping") or 0),
        "rope_theta": rope_theta(1e6),
        "rope_local_theta": _gemma3_local_theta,
        "sliding_layers": sliding_layers(lambda c, layer: bool((layer + 1) % c.get("sliding_window_pattern", 6))),
    },
    constants={**GEMMA2.constants, "qk_norm": True},
    modules=GEMMA2.modules + QK_NORMS,
    architectures={
        "lm": "Gemma3ForCausalLM",
        "classification": "Gemma3TextForSequenceClassification",
        "none": "Gemma3TextModel",
    },
    spare_tokens=("<image_soft_token>",),
    refuse=_refuse_gemma3,
)
