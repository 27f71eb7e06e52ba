"""GPT-2 and its kin with names of their own: BLOOM, OPT, GPT-NeoX (Pythia), Falcon and MPT."""

from __future__ import annotations

from burnish.model.families.declare import (
    Config,
    Family,
    activation,
    decoder,
    optional,
    rope_scaling,
    rope_theta,
    rotary_share,
    unless,
)

BLOOM = Family(
    name="bloom",
    fields={
        "vocab_size": "vocab_size",
        "hidden_size": ("hidden_size", "n_embed"),
        "num_layers": ("n_layer", "num_hidden_layers"),
        "num_heads": ("n_head", "num_attention_heads"),
        "num_kv_heads": ("n_head", "num_attention_heads"),
        "head_dim": lambda c: c.get("hidden_size", c.get("n_embed")) // c.get("n_head", c.get("num_attention_heads")),
        "intermediate_size": lambda c: 4 * c.get("hidden_size", c.get("n_embed")),
        "max_positions": lambda c: c.get("seq_length", 2048),
        "norm_eps": lambda c: c.get("layer_norm_epsilon", 1e-5),
        "tied": lambda c: bool(c.get("tie_word_embeddings", True)),
    },
    constants={
        "kind": "decoder",
        "norm": "layer",
        "activation": "gelu_tanh",
        "fused_qkv": "heads",
        "positions": "alibi",
        "embed_norm": True,
    },
    prefix="transformer.",
    modules=(
        ("embed_tokens", "transformer.word_embeddings"),
        ("embed_norm", "transformer.word_embeddings_layernorm"),
        ("layers.{i}.self_attn.qkv_proj", "transformer.h.{i}.self_attention.query_key_value"),
        ("layers.{i}.self_attn.o_proj", "transformer.h.{i}.self_attention.dense"),
        ("layers.{i}.mlp.up_proj", "transformer.h.{i}.mlp.dense_h_to_4h"),
        ("layers.{i}.mlp.down_proj", "transformer.h.{i}.mlp.dense_4h_to_h"),
        ("layers.{i}.input_layernorm", "transformer.h.{i}.input_layernorm"),
        ("layers.{i}.post_attention_layernorm", "transformer.h.{i}.post_attention_layernorm"),
        ("norm", "transformer.ln_f"),
        ("lm_head", "lm_head"),
        ("score", "score"),
    ),
    architectures=decoder("Bloom"),
    lora_targets=("qkv_proj",),
    refuse=unless(apply_residual_connection_post_layernorm=False),
)

GPT2 = Family(
    name="gpt2",
    fields={
        "vocab_size": "vocab_size",
        "hidden_size": ("n_embd", "hidden_size"),
        "num_layers": ("n_layer", "num_hidden_layers"),
        "num_heads": ("n_head", "num_attention_heads"),
        "num_kv_heads": ("n_head", "num_attention_heads"),
        "head_dim": lambda c: c["n_embd"] // c["n_head"],
        "intermediate_size": lambda c: c.get("n_inner") or 4 * c["n_embd"],
        "max_positions": ("n_positions", "n_ctx"),
        "norm_eps": lambda c: c.get("layer_norm_epsilon", 1e-5),
        "activation": activation("activation_function", "gelu_new"),
        "tied": lambda c: bool(c.get("tie_word_embeddings", True)),
    },
    constants={"kind": "decoder", "norm": "layer", "fused_qkv": "blocks", "positions": "learned"},
    prefix="transformer.",
    modules=(
        ("embed_tokens", "transformer.wte"),
        ("embed_positions", "transformer.wpe"),
        ("layers.{i}.self_attn.qkv_proj", "transformer.h.{i}.attn.c_attn"),
        ("layers.{i}.self_attn.o_proj", "transformer.h.{i}.attn.c_proj"),
        ("layers.{i}.mlp.up_proj", "transformer.h.{i}.mlp.c_fc"),
        ("layers.{i}.mlp.down_proj", "transformer.h.{i}.mlp.c_proj"),
        ("layers.{i}.input_layernorm", "transformer.h.{i}.ln_1"),
        ("layers.{i}.post_attention_layernorm", "transformer.h.{i}.ln_2"),
        ("norm", "transformer.ln_f"),
        ("lm_head", "lm_head"),
        ("score", "score"),
    ),
    architectures={**decoder("GPT2"), "lm": "GPT2LMHeadModel"},
    lora_targets=("qkv_proj",),
    transposed=("qkv_proj", "o_proj", "up_proj", "down_proj"),
    ignored=("attn.bias", "attn.masked_bias"),
    refuse=unless(scale_attn_by_inverse_layer_idx=False, scale_attn_weights=True, add_cross_attention=False),
)

OPT = Family(
    name="opt",
    fields={
        "vocab_size": "vocab_size",
        "hidden_size": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_attention_heads",
        "head_dim": lambda c: c["hidden_size"] // c["num_attention_heads"],
        "intermediate_size": "ffn_dim",
        "max_positions": "max_position_embeddings",
        "activation": activation("activation_function", "relu"),
        "qkv_bias": optional("enable_bias", True),
        "out_bias": optional("enable_bias", True),
        "mlp_bias": optional("enable_bias", True),
        "tied": optional("tie_word_embeddings", True),
    },
    constants={"kind": "decoder", "norm": "layer", "positions": "learned", "position_offset": 2},
    prefix="model.",
    modules=(
        ("embed_tokens", "model.decoder.embed_tokens"),
        ("embed_positions", "model.decoder.embed_positions"),
        ("layers.{i}.self_attn.q_proj", "model.decoder.layers.{i}.self_attn.q_proj"),
        ("layers.{i}.self_attn.k_proj", "model.decoder.layers.{i}.self_attn.k_proj"),
        ("layers.{i}.self_attn.v_proj", "model.decoder.layers.{i}.self_attn.v_proj"),
        ("layers.{i}.self_attn.o_proj", "model.decoder.layers.{i}.self_attn.out_proj"),
        ("layers.{i}.mlp.up_proj", "model.decoder.layers.{i}.fc1"),
        ("layers.{i}.mlp.down_proj", "model.decoder.layers.{i}.fc2"),
        ("layers.{i}.input_layernorm", "model.decoder.layers.{i}.self_attn_layer_norm"),
        ("layers.{i}.post_attention_layernorm", "model.decoder.layers.{i}.final_layer_norm"),
        ("norm", "model.decoder.final_layer_norm"),
        ("lm_head", "lm_head"),
        ("score", "score"),
    ),
    architectures=decoder("OPT"),
    lora_targets=("q_proj", "v_proj"),
    refuse=lambda c: unless(
        do_layer_norm_before=True,
        _remove_final_layer_norm=False,
        layer_norm_elementwise_affine=True,
        word_embed_proj_dim=c.get("hidden_size"),
    )(c),
)

GPT_NEOX = Family(
    name="gpt_neox",
    fields={
        "vocab_size": "vocab_size",
        "hidden_size": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_attention_heads",
        "head_dim": lambda c: c["hidden_size"] // c["num_attention_heads"],
        "intermediate_size": "intermediate_size",
        "max_positions": optional("max_position_embeddings", 2048),
        "norm_eps": optional("layer_norm_eps", 1e-5),
        "activation": activation("hidden_act", "gelu"),
        "qkv_bias": optional("attention_bias", True),
        "out_bias": optional("attention_bias", True),
        "rope_theta": rope_theta(10000.0, "rotary_emb_base"),
        "rope_scaling": rope_scaling,
        "rotary_share": rotary_share(0.25, "rotary_pct"),
        "parallel_norms": lambda c: 2 if c.get("use_parallel_residual", True) else 0,
        "tied": optional("tie_word_embeddings", False),
    },
    constants={"kind": "decoder", "norm": "layer", "fused_qkv": "heads", "positions": "rotary"},
    prefix="gpt_neox.",
    modules=(
        ("embed_tokens", "gpt_neox.embed_in"),
        ("layers.{i}.self_attn.qkv_proj", "gpt_neox.layers.{i}.attention.query_key_value"),
        ("layers.{i}.self_attn.o_proj", "gpt_neox.layers.{i}.attention.dense"),
        ("layers.{i}.mlp.up_proj", "gpt_neox.layers.{i}.mlp.dense_h_to_4h"),
        ("layers.{i}.mlp.down_proj", "gpt_neox.layers.{i}.mlp.dense_4h_to_h"),
        ("layers.{i}.input_layernorm", "gpt_neox.layers.{i}.input_layernorm"),
        ("layers.{i}.post_attention_layernorm", "gpt_neox.layers.{i}.post_attention_layernorm"),
        ("norm", "gpt_neox.final_layer_norm"),
        ("lm_head", "embed_out"),
        ("score", "score"),
    ),
    architectures=decoder("GPTNeoX"),
    lora_targets=("qkv_proj",),
    aliases=(("lm_head.", "embed_out."),),
    ignored=("attention.bias", "attention.masked_bias", "rotary_emb.inv_freq"),
)


def _falcon_heads(config: Config) -> int:
    return config["num_attention_heads"] if "num_attention_heads" in config else config["n_head"]


def _falcon_size(config: Config) -> int:
    return config["hidden_size"] if "hidden_size" in config else config["n_embed"]


def _falcon_kv_heads(config: Config) -> int:
    if not config.get("new_decoder_architecture"):
        return 1 if config.get("multi_query", True) else _falcon_heads(config)
    return config.get("num_kv_heads") or config.get("n_head_kv") or _falcon_heads(config)


def _falcon_norms(config: Config) -> int:
    if config.get("new_decoder_architecture"):
        return config.get("num_ln_in_parallel_attn") or 2
    return 1 if config.get("parallel_attn", True) else 0


def _refuse_falcon(config: Config) -> str | None:
    new = bool(config.get("new_decoder_architecture"))
    norms = (1, 2) if new else (1,)
    if config.get("num_ln_in_parallel_attn") not in (None, *norms):
        return f"num_ln_in_parallel_attn: {config['num_ln_in_parallel_attn']} is not supported"
    if new and not config.get("parallel_attn", True):
        return "parallel_attn: false with new_decoder_architecture is not supported"
    return unless(apply_residual_connection_post_layernorm=False)(config)


TWO_NORMS = (
    ("layers.{i}.input_layernorm", "transformer.h.{i}.ln_attn"),
    ("layers.{i}.post_attention_layernorm", "transformer.h.{i}.ln_mlp"),
)
FALCON = Family(
    name="falcon",
    fields={
        "vocab_size": "vocab_size",
        "hidden_size": ("hidden_size", "n_embed"),
        "num_layers": ("num_hidden_layers", "n_layer"),
        "num_heads": ("num_attention_heads", "n_head"),
        "num_kv_heads": _falcon_kv_heads,
        "head_dim": lambda c: _falcon_size(c) // _falcon_heads(c),
        "intermediate_size": lambda c: c.get("ffn_hidden_size") or 4 * _falcon_size(c),
        "max_positions": optional("max_position_embeddings", 2048),
        "norm_eps": optional("layer_norm_epsilon", 1e-5),
        "activation": activation("activation", "gelu"),
        "qkv_bias": optional("bias", False),
        "out_bias": optional("bias", False),
        "mlp_bias": optional("bias", False),
        "positions": lambda c: "alibi" if c.get("alibi") else "rotary",
        "alibi_scale": lambda c: (_falcon_size(c) // _falcon_heads(c)) ** -0.5,
        "rope_theta": rope_theta(),
        "rope_scaling": rope_scaling,
        "parallel_norms": _falcon_norms,
        "tied": optional("tie_word_embeddings", True),
    },
    constants={"kind": "decoder", "norm": "layer", "fused_qkv": "heads"},
    prefix="transformer.",
    modules=tuple(pair for pair in BLOOM.modules if pair[0] != "embed_norm"),  # its code grew out of BLOOM's
    variant=lambda spec: TWO_NORMS if spec.parallel_norms == 2 else (),
    architectures=decoder("Falcon"),
    lora_targets=("qkv_proj",),
    ignored=("rotary_emb.inv_freq",),
    refuse=_refuse_falcon,
)


def _refuse_mpt(config: Config) -> str | None:
    attention = unless(
        alibi=True,
        alibi_bias_max=8,  # transformers computes with 8 whatever the config says
        attn_type="multihead_attention",
        attn_uses_sequence_id=False,
        prefix_lm=False,
        qk_ln=False,
        rope=False,
        sliding_window_size=-1,
    )(config.get("attn_config") or {})
    if attention:
        return f"attn_config: {attention}"
    if config.get("norm_type", "layernorm") not in ("layernorm", "low_precision_layernorm"):
        return f"norm_type: '{config['norm_type']}' is not supported"
    return unless(no_bias=True, logit_scale=None, embedding_fraction=1.0)(config)


MPT = Family(
    name="mpt",
    fields={
        "vocab_size": "vocab_size",
        "hidden_size": ("d_model", "hidden_size"),
        "num_layers": ("n_layers", "num_hidden_layers"),
        "num_heads": ("n_heads", "num_attention_heads"),
        "num_kv_heads": ("n_heads", "num_attention_heads"),
        "head_dim": lambda c: c["d_model"] // c["n_heads"],
        "intermediate_size": lambda c: c.get("expansion_ratio", 4) * c["d_model"],
        "max_positions": optional("max_seq_len", 2048),
        "norm_eps": optional("layer_norm_epsilon", 1e-5),
        "attention_scale": lambda c: (c.get("attn_config") or {}).get("softmax_scale") or 0.0,
        "clip_qkv": lambda c: (c.get("attn_config") or {}).get("clip_qkv") or 0.0,
        "tied": optional("tie_word_embeddings", True),
    },
    constants={
        "kind": "decoder",
        "norm": "layer",
        "norm_bias": False,
        "activation": "gelu",
        "fused_qkv": "blocks",
        "qkv_bias": False,
        "out_bias": False,
        "mlp_bias": False,
        "positions": "alibi",
    },
    prefix="transformer.",
    modules=(
        ("embed_tokens", "transformer.wte"),
        ("layers.{i}.self_attn.qkv_proj", "transformer.blocks.{i}.attn.Wqkv"),
        ("layers.{i}.self_attn.o_proj", "transformer.blocks.{i}.attn.out_proj"),
        ("layers.{i}.mlp.up_proj", "transformer.blocks.{i}.ffn.up_proj"),
        ("layers.{i}.mlp.down_proj", "transformer.blocks.{i}.ffn.down_proj"),
        ("layers.{i}.input_layernorm", "transformer.blocks.{i}.norm_1"),
        ("layers.{i}.post_attention_layernorm", "transformer.blocks.{i}.norm_2"),
        ("norm", "transformer.norm_f"),
        ("lm_head", "lm_head"),
        ("score", "score"),
    ),
    architectures=decoder("Mpt"),
    lora_targets=("qkv_proj",),
    refuse=_refuse_mpt,
)
