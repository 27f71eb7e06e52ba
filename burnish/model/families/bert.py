"""BERT."""

from __future__ import annotations

from burnish.model.families.declare import Family, activation, unless

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
        "activation": activation("hidden_act", "gelu"),
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
    refuse=unless(position_embedding_type="absolute", is_decoder=False, add_cross_attention=False),
)
