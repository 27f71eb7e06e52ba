"""A random-weight stand-in of realistic size for the embedded model, on which cost is measured.

On a model of a few million parameters the interpreter outweighs the arithmetic, so that latency and memory would say
nothing about the techniques.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from burnish.model.bundle import Model, build
from burnish.model.families import read_spec
from burnish.store.checkpoint import load, save

SHAPE: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}


def write_twin(folder: Path, tokenizer_of: str, shape: dict[str, Any] = SHAPE) -> Path:
    """Write a random bfloat16 checkpoint of `shape` (a Llama of 134M parameters) with another model's tokenizer."""
    with torch.device("meta"):
        net = build(read_spec(shape), shape)
    torch.manual_seed(0)
    for name, parameter in list(net.named_parameters()):
        module, _, leaf = name.rpartition(".")
        fresh = torch.empty(parameter.shape, dtype=torch.bfloat16)
        fresh.fill_(1.0) if parameter.dim() == 1 else fresh.normal_(0, 0.02)
        setattr(net.get_submodule(module), leaf, nn.Parameter(fresh))
    net.tie()
    return save(Model(net, load(tokenizer_of).tokenizer, dict(shape)), folder)
