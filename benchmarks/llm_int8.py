"""Outliers among the activations: what int8 loses to them, and what LLM.int8 keeps.

    python benchmarks/llm_int8.py

pebble gets outliers that change nothing in exact arithmetic: some channels of every norm's output are multiplied by a
factor, and the columns of the projections behind it divided by it, as training does to large models by itself. With
every activation in int8 ("absmax") one large value takes the scale of its token; LLM.int8 keeps the columns that reach
6 out of it. Perplexity on 200 documents of the embedded world that pebble was not trained on.
"""

from __future__ import annotations

import itertools
import json
import math
from datetime import UTC, datetime
from pathlib import Path

import torch

from burnish import chain, device, load
from burnish.chain import Model
from burnish.engine.train import evaluate
from burnish.store.data import encode_rows
from burnish.world.corpus import tagged_documents

RESULT = Path(__file__).parent / "results" / "llm_int8.json"
CHANNELS, FACTORS, DOCUMENTS = 6, (1, 10, 30, 100, 300, 1000), 200
WAYS = {
    "float32": [],
    "int8 weights": ["int8"],
    "int8 weights and activations, absmax": [{"int8": {"llm_int8_threshold": 1e9}}],
    "LLM.int8": [{"int8": {"llm_int8_threshold": 6.0}}],
}


def planted(factor: float) -> Model:
    """pebble with outliers of a factor."""
    model = load("pebble", torch.float32)
    draw = torch.Generator().manual_seed(0)
    for layer in model.net.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, readers in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            channels = torch.randperm(model.spec.hidden_size, generator=draw)[:CHANNELS]
            with torch.no_grad():
                norm.weight[channels] *= factor
                for reader in readers:
                    reader.weight.dense[:, channels] /= factor
    return model


def main() -> None:
    texts = (row for _, row in tagged_documents(12345) if set(row) == {"text"})
    rows = list(itertools.islice(texts, DOCUMENTS))
    found: dict[str, dict[str, float]] = {}
    for name, techniques in WAYS.items():
        for factor in FACTORS:
            model = chain.apply(planted(factor), techniques)
            examples = encode_rows(rows, model.tokenizer, 512, train_on="all", where="world")
            found.setdefault(name, {})[str(factor)] = math.exp(evaluate(model, examples))
        print(name, found[name], flush=True)
    head = {"command": "python benchmarks/llm_int8.py", "date": datetime.now(UTC).isoformat(timespec="seconds")}
    head |= {"environment": device.environment(), "channels": CHANNELS, "documents": DOCUMENTS}  # type: ignore[dict-item]
    RESULT.write_text(json.dumps({**head, "perplexity_by_factor": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
