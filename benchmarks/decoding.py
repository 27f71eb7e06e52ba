"""What beam search costs beside a batch of its size, and what speculation and n-gram models are worth on pebble.

    python benchmarks/decoding.py --documents 20000 --threads 2

- Beams: a random Llama of 134 million parameters in bfloat16 continues one prompt of 64 tokens with four beams by 64
  tokens, and four prompts as a batch; plain, diverse and contrastive search in turns, three rounds, medians.
- n-gram models of 2 to 5 tokens count documents of the embedded world with pebble's tokens; their perplexity on 300
  other documents stands beside pebble's.
- Speculation: pebble continues 24 of these documents by 64 tokens; guesses by look-up and by the best n-gram model.
  Replies must be the plain ones. Forwards per token say what a model would save whose forward of a few tokens costs
  what one of a single token does.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from burnish import device, load
from burnish.cli import main as burnish
from burnish.engine.generate import GenerationConfig, generate
from burnish.engine.train import evaluate
from burnish.model.bundle import Model
from burnish.model.example import IGNORE, Example
from burnish.model.families import read_spec
from burnish.model.transformer import Transformer
from burnish.store.data import encode_rows
from burnish.world.corpus import tagged_documents

RESULT = Path(__file__).parent / "results" / "decoding.json"
TWIN = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12,
    "num_attention_heads": 12, "num_key_value_heads": 12, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
}  # fmt: skip
ROUNDS, TOKENS, BEAMS, HELD_OUT, CONTINUED = 3, 64, 4, 300, 24


def seconds(run: Any) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def beams() -> dict[str, Any]:
    torch.manual_seed(0)
    model = Model(Transformer(read_spec(TWIN)).initialize().to(torch.bfloat16), None, TWIN)
    prompts = [Example([7 + 11 * i + 101 * row for i in range(64)], [IGNORE] * 64) for row in range(BEAMS)]
    length = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS}
    ways = {
        "batch": (prompts, {}),
        "beams": (prompts[:1], {"num_beams": BEAMS}),
        "diverse beams": (prompts[:1], {"num_beams": BEAMS, "num_beam_groups": 2, "diversity_penalty": 0.5}),
        "one row": (prompts[:1], {}),
        "contrastive": (prompts[:1], {"penalty_alpha": 0.6, "top_k": BEAMS}),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(ROUNDS + 1):
        for name in ways if number % 2 else reversed(ways):
            given, settings = ways[name]
            took = seconds(lambda g=given, s=settings: generate(model, g, GenerationConfig(**length, **s)))
            times[name] += [took] if number else []
    median = {name: statistics.median(found) for name, found in times.items()}
    return {"seconds": times, "of_the_batch": {name: found / median["batch"] for name, found in median.items()}}


def held_out() -> list[dict[str, Any]]:
    texts = (row for _, row in tagged_documents(12345) if set(row) == {"text"})
    return list(itertools.islice(texts, HELD_OUT))


def ngrams(folder: Path, documents: int) -> dict[str, Any]:
    pebble = load("pebble", torch.float32)
    examples = encode_rows(held_out(), pebble.tokenizer, 512, train_on="all", where="world")
    found = {"pebble": {"perplexity": math.exp(evaluate(pebble, examples))}}
    for order in range(2, 6):
        made = ["--tokenizer", "pebble", "--documents", str(documents), "--output-dir", str(folder / str(order))]
        config = folder / f"{order}.yaml"
        config.write_text(json.dumps({"model": {
            "model_type": "ngram", "order": order, "architectures": ["NGramForCausalLM"]}}))  # fmt: skip
        assert burnish(["pretrain", str(config), *made]) == 0
        model = load(folder / str(order))
        size = sum(file.stat().st_size for file in (folder / str(order)).glob("*.safetensors"))
        found[f"{order}-gram"] = {"perplexity": math.exp(evaluate(model, examples)), "bytes": size}
    return found


def speculation(folder: Path) -> dict[str, Any]:
    model = load("pebble", torch.float32)
    examples = encode_rows(held_out()[:CONTINUED], model.tokenizer, 512, train_on="all", where="world")
    prompts = [Example(x.ids[: len(x.ids) // 2], [IGNORE] * (len(x.ids) // 2)) for x in examples]
    length = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "batch_size": 1}
    ways = {
        "plain": {}, "look-up": {"prompt_lookup_num_tokens": 8},
        "5-gram": {"assistant_model": str(folder / "5"), "num_assistant_tokens": 8},
    }  # fmt: skip
    forward, calls, rows, replies = model.net.forward, 0, {}, {}

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return forward(*args, **kwargs)

    model.net.forward = counted  # type: ignore[method-assign]
    for name, settings in ways.items():
        times = []
        for _ in range(3):
            calls, start = 0, time.perf_counter()
            replies[name] = [done.ids for done in generate(model, prompts, GenerationConfig(**length, **settings))]
            times.append(time.perf_counter() - start)
        tokens = sum(map(len, replies[name]))
        rows[name] = {"forwards_per_token": calls / tokens, "tokens_per_second": tokens / min(times)}
        rows[name]["same_as_plain"] = replies[name] == replies["plain"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=20000)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as scratch:
        found = {"beams": beams(), "ngrams": ngrams(Path(scratch), given.documents)}
        found["speculation"] = speculation(Path(scratch))
    command = f"python benchmarks/decoding.py --documents {given.documents} --threads {given.threads}"
    head = {"command": command, "date": datetime.now(UTC).isoformat(timespec="seconds")}
    RESULT.write_text(json.dumps({**head, "environment": device.environment(), **found}, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
