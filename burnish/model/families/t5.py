"""T5 (arXiv 1910.10683) and mT5 (arXiv 2010.11934): encoder-decoders.

Version 1.0 has a relu between two matrices and the embedding as its head, version 1.1 (and flan-T5, mT5) a gated gelu
and a head of its own. Whether a checkpoint's head is its own is told by its tensors: configs that transformers 5 writes
always say that it is shared. The encoder alone classifies (`head: classification`) or gives hidden states.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from burnish.config import UserError
from burnish.model.families.declare import Config, Family, activation, optional, unless


def feed_forward(default: str) -> dict[str, Any]:
    """The readers of `feed_forward_proj`, "relu" or "gated-gelu" (which means its tanh form) with any activation."""

    def word(config: Config) -> str:
        return str(config.get("feed_forward_proj") or default)

    def read(config: Config) -> str:
        name = word(config).removeprefix("gated-")
        gelu = "gelu_new" if word(config) == "gated-gelu" else name
        return activation("dense_act_fn", "")({"dense_act_fn": gelu})

    return {"activation": read, "gated": lambda c: word(c).startswith("gated-")}


def start(config: Config) -> int:
    """The decoder's first token, the padding token where the config names none."""
    found = config.get("decoder_start_token_id")
    found = config.get("pad_token_id", 0) if found is None else found
    if not isinstance(found, int) or not 0 <= found < config["vocab_size"]:
        raise UserError(f"config.json: decoder_start_token_id: {found} is no token for the decoder to begin with")
    return found


def refuse(config: Config) -> str | None:
    """What T5's own code takes and this one does not, and buckets that cannot be told apart."""
    count, far = (
        optional(f"relative_attention_{name}", default)(config)
        for name, default in (("num_buckets", 32), ("max_distance", 128))
    )
    if count < 4 or far <= count // 2:
        return f"relative_attention_num_buckets: {count} do not fit relative_attention_max_distance {far}"
    return unless(is_decoder=False)(config)


def logit_scale(config: Config) -> float:
    """d_model ** -0.5 for a head that was trained as the embedding, 0 (none) otherwise."""
    scaled = config.get("scale_decoder_outputs", config.get("tie_word_embeddings") is not False)
    return config["d_model"] ** -0.5 if scaled else 0.0


def stack(name: str, layer: str, cross: bool) -> tuple[tuple[str, str], ...]:
    """The modules of one stack, from burnish's `name` and T5's block path."""
    attention = [("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v"), ("o_proj", "o")]
    block, last = f"{layer}.block", 2 if cross else 1
    index = "{j}" if cross else "{i}"
    own, theirs = f"{name}layers.{index}", f"{block}.{index}.layer"
    pairs = [(f"{name}relative_bias", f"{block}.0.layer.0.SelfAttention.relative_attention_bias")]
    pairs += [(f"{own}.self_attn.{a}", f"{theirs}.0.SelfAttention.{b}") for a, b in attention]
    pairs += [(f"{own}.input_layernorm", f"{theirs}.0.layer_norm")]
    if cross:
        pairs += [(f"{own}.cross_attn.{a}", f"{theirs}.1.EncDecAttention.{b}") for a, b in attention]
        pairs += [(f"{own}.cross_attn_layernorm", f"{theirs}.1.layer_norm")]
    pairs += [(f"{own}.post_attention_layernorm", f"{theirs}.{last}.layer_norm")]
    return (*pairs, (f"{name}norm", f"{layer}.final_layer_norm"))


def mlp(gated: bool) -> tuple[tuple[str, str], ...]:
    """The feed-forward modules of both stacks."""
    names = (("gate_proj", "wi_0"), ("up_proj", "wi_1")) if gated else (("up_proj", "wi"),)
    places = (("layers.{i}", "encoder.block.{i}.layer.1"), ("decoder.layers.{j}", "decoder.block.{j}.layer.2"))
    pairs = (*names, ("down_proj", "wo"))
    return tuple((f"{own}.mlp.{a}", f"{theirs}.DenseReluDense.{b}") for own, theirs in places for a, b in pairs)


T5 = Family(
    name="t5",
    fields={
        "vocab_size": "vocab_size",
        "hidden_size": "d_model",
        "num_layers": "num_layers",
        "decoder_layers": lambda c: optional("num_decoder_layers", c["num_layers"])(c),
        "num_heads": "num_heads",
        "num_kv_heads": "num_heads",
        "head_dim": "d_kv",
        "intermediate_size": "d_ff",
        "max_positions": optional("n_positions", 512),
        "norm_eps": optional("layer_norm_epsilon", 1e-6),
        "relative_buckets": optional("relative_attention_num_buckets", 32),
        "relative_distance": optional("relative_attention_max_distance", 128),
        "decoder_start": start,
        "tied": lambda c: c.get("tie_word_embeddings") is not False,
        "logit_scale": logit_scale,
        **feed_forward("relu"),
    },
    constants={
        "kind": "seq2seq",
        "qkv_bias": False,
        "out_bias": False,
        "mlp_bias": False,
        "attention_scale": 1.0,
        "positions": "relative",
        "mean_pool": True,
    },
    modules=(
        ("embed_tokens", "shared"),
        *stack("", "encoder", cross=False),
        *stack("decoder.", "decoder", cross=True),
        ("pooler", "classification_head.dense"),
        ("lm_head", "lm_head"),
        ("score", "classification_head.out_proj"),
    ),
    variant=lambda spec: mlp(spec.gated),
    architectures={
        "lm": "T5ForConditionalGeneration",
        "classification": "T5EncoderModel",
        "none": "T5EncoderModel",
    },
    former={"T5WithLMHeadModel": "lm"},
    lora_targets=("q_proj", "v_proj"),
    copies=(("encoder.embed_tokens.weight", "shared.weight"), ("decoder.embed_tokens.weight", "shared.weight")),
    ignored=("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias",),
    stored=lambda spec, names: replace(spec, tied=bool(spec.logit_scale) or "lm_head.weight" not in names),
    refuse=refuse,
)

MT5 = replace(
    T5,
    name="mt5",
    fields={**T5.fields, "logit_scale": lambda c: 0.0, **feed_forward("gated-gelu")},
    architectures={"lm": "MT5ForConditionalGeneration", "classification": "MT5EncoderModel", "none": "MT5EncoderModel"},
    former={},
)
