"""The model families, each a declaration: how its config.json reads, how its tensors are called and laid out.

`modules` pairs burnish's module paths (in Llama's Hugging Face words) with the family's own; `{i}` is the layer.
The pairs are used by `store` to read and write checkpoints, and to resolve `target_modules`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from burnish.config import UserError
from burnish.model.spec import Head, Spec

Config = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """One family. `fields` maps a Spec field to a config key, a tuple of keys (the first present), or a function."""

    name: str
    fields: dict[str, Any]
    modules: tuple[tuple[str, str], ...]
    architectures: dict[Head, str]
    lora_targets: tuple[str, ...]
    constants: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, str] = field(default_factory=dict)  # names that do not follow from `modules`
    prefix: str = ""
    transposed: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    refuse: Callable[[Config], str | None] = lambda config: None


def _rope_scaling(config: Config) -> tuple[tuple[str, Any], ...]:
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    rope = {("rope_type" if key == "type" else key): value for key, value in rope.items()}
    return tuple(sorted((key, value) for key, value in rope.items() if key != "rope_theta"))


def _rope_theta(config: Config) -> float:
    rope = config.get("rope_parameters") or {}
    return float(config.get("rope_theta") or rope.get("rope_theta") or 10000.0)


ACTIVATION_NAMES = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


def _activation(key: str, default: str) -> Callable[[Config], str]:
    def read(config: Config) -> str:
        name = config.get(key, default)
        if name not in ACTIVATION_NAMES:
            raise UserError(f"config.json: activation '{name}' is not supported; known: {sorted(ACTIVATION_NAMES)}")
        return ACTIVATION_NAMES[name]

    return read


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
        "activation": _activation("hidden_act", "silu"),
        "qkv_bias": lambda c: bool(c.get("attention_bias", False)),
        "out_bias": lambda c: bool(c.get("attention_bias", False)),
        "mlp_bias": lambda c: bool(c.get("mlp_bias", False)),
        "rope_theta": _rope_theta,
        "rope_scaling": _rope_scaling,
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
    architectures={
        "lm": "LlamaForCausalLM",
        "classification": "LlamaForSequenceClassification",
        "none": "LlamaModel",
    },
    lora_targets=("q_proj", "v_proj"),
    ignored=("rotary_emb.inv_freq",),
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
    architectures={
        "lm": "BloomForCausalLM",
        "classification": "BloomForSequenceClassification",
        "none": "BloomModel",
    },
    lora_targets=("qkv_proj",),
    refuse=lambda c: (
        "apply_residual_connection_post_layernorm: true is not supported"
        if c.get("apply_residual_connection_post_layernorm")
        else None
    ),
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
        "activation": _activation("activation_function", "gelu_new"),
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
    architectures={
        "lm": "GPT2LMHeadModel",
        "classification": "GPT2ForSequenceClassification",
        "none": "GPT2Model",
    },
    lora_targets=("qkv_proj",),
    transposed=("qkv_proj", "o_proj", "up_proj", "down_proj"),
    ignored=("attn.bias", "attn.masked_bias"),
    refuse=lambda c: (
        "scale_attn_by_inverse_layer_idx: true is not supported" if c.get("scale_attn_by_inverse_layer_idx") else None
    ),
)

BERT = Family(
    name="bert",
    fields={
        "vocab_size": "vocab_size",
        "hidden_size": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_attention_heads",
        "head_dim": lambda c: c["hidden_size"] // c["num_attention_heads"],
        "intermediate_size": "intermediate_size",
        "max_positions": "max_position_embeddings",
        "norm_eps": lambda c: c.get("layer_norm_eps", 1e-12),
        "activation": _activation("hidden_act", "gelu"),
        "token_types": "type_vocab_size",
        "tied": lambda c: bool(c.get("tie_word_embeddings", True)),
    },
    constants={
        "kind": "encoder",
        "norm": "layer",
        "post_norm": True,
        "positions": "learned",
        "embed_norm": True,
        "head_bias": True,
    },
    prefix="bert.",
    modules=(
        ("embed_tokens", "bert.embeddings.word_embeddings"),
        ("embed_positions", "bert.embeddings.position_embeddings"),
        ("embed_token_types", "bert.embeddings.token_type_embeddings"),
        ("embed_norm", "bert.embeddings.LayerNorm"),
        ("layers.{i}.self_attn.q_proj", "bert.encoder.layer.{i}.attention.self.query"),
        ("layers.{i}.self_attn.k_proj", "bert.encoder.layer.{i}.attention.self.key"),
        ("layers.{i}.self_attn.v_proj", "bert.encoder.layer.{i}.attention.self.value"),
        ("layers.{i}.self_attn.o_proj", "bert.encoder.layer.{i}.attention.output.dense"),
        ("layers.{i}.post_attention_layernorm", "bert.encoder.layer.{i}.attention.output.LayerNorm"),
        ("layers.{i}.mlp.up_proj", "bert.encoder.layer.{i}.intermediate.dense"),
        ("layers.{i}.mlp.down_proj", "bert.encoder.layer.{i}.output.dense"),
        ("layers.{i}.post_feedforward_layernorm", "bert.encoder.layer.{i}.output.LayerNorm"),
        ("pooler", "bert.pooler.dense"),
        ("head_transform.dense", "cls.predictions.transform.dense"),
        ("head_transform.norm", "cls.predictions.transform.LayerNorm"),
        ("lm_head", "cls.predictions.decoder"),
        ("score", "classifier"),
    ),
    architectures={
        "masked_lm": "BertForMaskedLM",
        "classification": "BertForSequenceClassification",
        "none": "BertModel",
    },
    lora_targets=("q_proj", "v_proj"),
    tensors={"lm_head.bias": "cls.predictions.bias"},
    ignored=("embeddings.position_ids", "cls.seq_relationship"),
)

FAMILIES: dict[str, Family] = {family.name: family for family in (LLAMA, BLOOM, GPT2, BERT)}


def read_spec(config: Config, head: Head | None = None, pooler: bool = True) -> Spec:
    """The Spec of a Hugging Face config. Raises UserError for an unknown architecture or a missing field.

    `head` overrides what `architectures` names; `pooler` tells whether an encoder's checkpoint has one.
    """
    name = str(config.get("model_type", ""))
    family = FAMILIES.get(name)
    if family is None:
        raise UserError(f"config.json: model_type '{name}' is not supported; supported: {', '.join(FAMILIES)}")
    reason = family.refuse(config)
    if reason:
        raise UserError(f"config.json: {reason}")
    values: Config = dict(family.constants)
    for target, source in family.fields.items():
        keys = (source,) if isinstance(source, str) else source
        try:
            values[target] = source(config) if callable(source) else next(config[key] for key in keys if key in config)
        except (KeyError, StopIteration) as error:
            raise UserError(
                f"config.json: a {name} config needs '{error.args[0] if error.args else keys[0]}'"
            ) from None
    heads = {architecture: key for key, architecture in family.architectures.items()}
    declared = (config.get("architectures") or [next(iter(family.architectures.values()))])[0]
    if head is None and declared not in heads:
        raise UserError(f"config.json: architecture '{declared}' is not supported; supported: {', '.join(heads)}")
    values["head"] = head or heads[declared]
    if values["head"] == "classification":
        values["num_labels"] = len(config.get("id2label") or {}) or config.get("num_labels", 2)
    values["pooler"] = pooler and name == "bert" and values["head"] in ("classification", "none")
    return Spec(family=name, **values)


def tensor_names(spec: Spec) -> dict[str, str]:
    """Module path in burnish -> module path in the family's checkpoint, layers expanded."""
    names: dict[str, str] = {}
    for native, foreign in FAMILIES[spec.family].modules:
        if "{i}" in native:
            names |= {native.format(i=i): foreign.format(i=i) for i in range(spec.num_layers)}
        else:
            names[native] = foreign
    return names
