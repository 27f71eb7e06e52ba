"""Tiny checkpoints that llama.cpp knows: of every family, with a byte-level BPE tokenizer."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import tiny
import torch

from burnish.chain import forward
from burnish.store.tokenizer import save_tokenizer, train_tokenizer

TEXT = "the cat likes paris and the red bird, 1234 times"
TEXTS = ["the cat sees the dog", "where is paris? question answer: 0 1 2 3 yes no", "a big red bird likes small fish"]
SCALED = {"rope_theta": 10000.0, "original_max_position_embeddings": 16}
LLAMA3 = {**SCALED, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CASES = {  # name -> (family, changes of its config)
    "llama": ("llama", {}),
    "llama with biases, scaled as Llama 3": (
        "llama",
        {"rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "llama with YaRN": ("llama", {"rope_parameters": {**SCALED, "rope_type": "yarn", "factor": 4.0}}),
    "llama of scaled positions": (
        "llama",
        {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "linear", "factor": 2.0}},
    ),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {"use_sliding_window": False, "layer_types": None}),
    "qwen3": ("qwen3", {}),
    "gpt2": ("gpt2", {}),
    "gpt_neox": ("gpt_neox", {}),
    "gpt_neox in series": ("gpt_neox", {"use_parallel_residual": False}),
    "bloom": ("bloom", {}),
    "falcon": ("falcon", {"bias": False}),
    "falcon of 7B's kind": (
        "falcon",
        {"bias": False, "new_decoder_architecture": False, "multi_query": True, "parallel_attn": True},
    ),
    "mpt": ("mpt", {}),
}


@cache
def tokenizer():
    return train_tokenizer(TEXTS * 5, 320)


def checkpoint(folder: Path, family: str, **changes) -> Path:
    """A folder of the family's tiny random model, with some more rows in the embedding than tokens."""
    tiny.reference(family, vocab_size=len(tokenizer()) + 3, **changes).save_pretrained(folder)
    save_tokenizer(tokenizer(), folder)
    return folder


def logits(model, text: str = TEXT) -> torch.Tensor:
    """(T, vocab) of the text's tokens."""
    with torch.no_grad():
        ids = torch.tensor([model.tokenizer(text)["input_ids"]])
        return model.net.logits(forward(model, {"input_ids": ids})).float()[0]
