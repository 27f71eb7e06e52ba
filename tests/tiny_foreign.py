"""Tiny random checkpoints of models that burnish runs through transformers, written by transformers."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import tiny
import torch

COMMON = {**tiny.SHAPE, "intermediate_size": 48, "max_position_embeddings": 64}
OLD = {"vocab_size": 80, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 48, "rotary_dim": 4}
CONFIGS = {  # model type -> (transformers' class names without their ends, its config)
    "stablelm": ("StableLm", {**COMMON, "num_key_value_heads": 2}),
    "phi": ("Phi", COMMON),
    "cohere": ("Cohere", {**COMMON, "num_key_value_heads": 2, "logit_scale": 0.5}),
    "gptj": ("GPTJ", OLD),
    "gpt_bigcode": ("GPTBigCode", {key: value for key, value in OLD.items() if key != "rotary_dim"}),
    "openai-gpt": (
        "OpenAIGPT",
        {key: OLD[key] for key in ("vocab_size", "n_embd", "n_layer", "n_head", "n_positions")},
    ),
    "mixtral": ("Mixtral", {**COMMON, "num_key_value_heads": 2, "num_local_experts": 4}),
    "mamba": ("Mamba", {"vocab_size": 80, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
    "roberta": ("Roberta", {**COMMON, "max_position_embeddings": 65, "type_vocab_size": 1}),
    "electra": ("Electra", {**COMMON, "embedding_size": 16, "type_vocab_size": 2}),
    "distilbert": (
        "DistilBert",
        {"vocab_size": 80, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 64},
    ),
}
PAIR = {"vocab_size": 80, "d_model": 32, "max_position_embeddings": 64, "decoder_start_token_id": 1}
for side in ("encoder", "decoder"):
    PAIR |= {f"{side}_layers": 2, f"{side}_attention_heads": 4, f"{side}_ffn_dim": 48}
CONFIGS |= {
    "bart": ("Bart", {**PAIR, "decoder_layers": 1, "forced_eos_token_id": None}),
    "pegasus": ("Pegasus", {**PAIR, "scale_embedding": True, "forced_eos_token_id": None}),
    "m2m_100": ("M2M100", {**PAIR, "scale_embedding": True, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0}),
}
CONFIGS |= {"marian": ("Marian", {**PAIR, "forced_eos_token_id": None, "scale_embedding": True})}
KINDS = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
HYBRID = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4}
SPECIAL = {  # what has windows, sinks or more than attention, for test_registry.py
    "cohere2": ("Cohere2", {**COMMON, **KINDS, "num_key_value_heads": 2}),
    "phi3": ("Phi3", {**COMMON, "num_key_value_heads": 2, "sliding_window": 4}),
    "gpt_oss": ("GptOss", {**COMMON, **KINDS, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4}),
    "falcon_h1": ("FalconH1", {**COMMON, **HYBRID, "num_key_value_heads": 2}),
}
PAIRS = ("bart", "pegasus", "m2m_100", "marian")
ENCODERS = ("roberta", "electra", "distilbert")
DECODERS = tuple(name for name in CONFIGS if name not in (*ENCODERS, *PAIRS))
CONTRACT = ("stablelm", "cohere", "gptj", "mamba", "roberta", "electra", "bart", "m2m_100")  # every technique is tested
ENDS = {"lm": "ForCausalLM", "masked_lm": "ForMaskedLM", "classification": "ForSequenceClassification", "none": "Model"}


def reference(family: str, head: str = "", **changes):
    """A random transformers model; every parameter is random, norms and biases included."""
    import transformers

    torch.manual_seed(0)
    name, kwargs = {**CONFIGS, **SPECIAL}[family]
    config = getattr(transformers, f"{name}Config")(**{**kwargs, **changes})
    config.pad_token_id, config.eos_token_id, config.bos_token_id = 0, 1, 1
    head = head or ("masked_lm" if family in ENCODERS else "lm")
    end = "LMHeadModel" if (family, head) == ("openai-gpt", "lm") else ENDS[head]
    end = ("MTModel" if family == "marian" else "ForConditionalGeneration") if family in PAIRS else end
    model = getattr(transformers, name + end)(config)
    with torch.no_grad():
        for parameter in filter(lambda p: p.requires_grad, model.parameters()):  # sines and cosines are not stored
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@cache
def folder(root: Path, family: str, head: str = "") -> Path:
    """A Hugging Face folder of the tiny model, made once per `root`."""
    path = root / f"{family}-{head or 'default'}"
    reference(family, head).save_pretrained(path)
    kind = "encoder" if family in ENCODERS else "seq2seq" if family in PAIRS else "decoder"
    tiny.tokenizer(kind).save_pretrained(path)
    return path
