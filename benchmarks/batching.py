"""Many requests at once against one after the other, on a CPU: the same prompts, settings and model.

    python benchmarks/batching.py --shape 0.85B --ways alone together

The model is a random Llama in bfloat16, the prompts are random ids, their lengths evenly spread, and every reply has
the same number of tokens. `alone` continues one prompt after the other by `generate`; `together` submits all of them
to a `Batcher` at once and steps until all are done, reading the prompts included. `transformers` is its own `generate`
over all prompts padded on the left, in float32, since bfloat16 takes it longer on a processor without instructions for
it. Random weights make flat distributions, so that roundings decide some tokens, and replies need not be equal. Each
way is a process of its own; ways measured before stay in the results file, so that runs can be split.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, int]] = {
    "0.85B": {"hidden_size": 2048, "num_layers": 16, "num_heads": 32, "num_kv_heads": 8, "intermediate_size": 5632},
    "0.13B": {"hidden_size": 768, "num_layers": 12, "num_heads": 12, "num_kv_heads": 12, "intermediate_size": 2048},
}
VOCAB, HEAD = 32000, 64
WAYS: dict[str, dict[str, Any]] = {
    "alone": {},
    "together": {"batch": {}},
    "together, 2304 tokens a step": {"batch": {"max_batch_tokens": 2304}},
    "together, int8 keys and values": {"batch": {"kv_cache_dtype": "int8"}},
    "alone, int8 weights": {"techniques": ["int8"]},
    "together, int8 weights": {"techniques": ["int8"], "batch": {}},
    "transformers, float32": {},
}
RESULT = Path(__file__).parent / "results" / "batching.json"


def prompts_of(work: dict[str, Any]) -> list[list[int]]:
    """Random ids, from the least length to the most in equal steps, shuffled."""
    draw, (least, most), count = random.Random(0), work["prompt_tokens"], work["requests"]
    lengths = [least + round(i * (most - least) / (count - 1)) for i in range(count)]
    draw.shuffle(lengths)
    return [[draw.randrange(VOCAB) for _ in range(length)] for length in lengths]


def fill(parameters: Any) -> None:
    """The same noise over and over, which takes a second where drawing each number takes a minute."""
    import torch

    noise = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).mul_(0.02)
    with torch.no_grad():
        for parameter in parameters:
            if parameter.dim() > 1:
                flat = parameter.view(-1)
                for start in range(0, len(flat), len(noise)):
                    part = flat[start : start + len(noise)]
                    part.copy_(noise[: len(part)])


def model_of(shape: str, techniques: list[str]) -> Any:
    import torch

    from burnish import chain
    from burnish.model.bundle import Model
    from burnish.model.spec import Spec
    from burnish.model.transformer import Transformer

    sizes = {**SHAPES[shape], "vocab_size": VOCAB, "head_dim": HEAD, "max_positions": 4096}
    plain = {"gated": True, "qkv_bias": False, "out_bias": False, "mlp_bias": False}
    torch.set_default_dtype(torch.bfloat16)
    net = Transformer(Spec(family="llama", kind="decoder", **sizes, **plain))  # type: ignore[arg-type]
    torch.set_default_dtype(torch.float32)
    fill(net.parameters())
    model = Model(net, None, {})
    return chain.apply(model, techniques) if techniques else model


def run_burnish(work: dict[str, Any], techniques: list[str], batch: dict[str, Any] | None) -> dict[str, Any]:
    from burnish.engine.batching import BatchConfig, Batcher
    from burnish.engine.decoding import GenerationConfig
    from burnish.engine.generate import generate
    from burnish.model.example import IGNORE, Example

    model = model_of(work["shape"], techniques)
    prompts = [Example(ids, [IGNORE] * len(ids)) for ids in prompts_of(work)]
    config = GenerationConfig(max_new_tokens=work["new_tokens"])
    generate(model, [Example([1, 2, 3], [IGNORE] * 3)], GenerationConfig(max_new_tokens=2))  # builds the kernels
    if batch is None:
        began = time.perf_counter()
        replies = [generate(model, [prompt], config)[0].ids for prompt in prompts]
        return {"seconds": time.perf_counter() - began, "replies": replies}
    batcher = Batcher(model, BatchConfig(kv_memory=1 << 28, **batch))
    batcher.submit(Example([1, 2, 3], [IGNORE] * 3), GenerationConfig(max_new_tokens=2)).result()
    began, steps, first = time.perf_counter(), [], {}
    requests = [batcher.submit(prompt, config) for prompt in prompts]
    while batcher.busy:
        pieces, now = batcher.step(), time.perf_counter()
        steps.append(now - began - sum(steps))
        for piece in pieces:
            first.setdefault(piece.row, now - began)
    found = {"seconds": sum(steps), "steps": len(steps), "longest_step_seconds": max(steps)}
    found |= {"median_step_seconds": sorted(steps)[len(steps) // 2], "mean_first_token_seconds": mean(first.values())}
    return {**found, "replies": [request.row.ids for request in requests]}


def mean(values: Any) -> float:
    return sum(values) / len(values)


def run_transformers(work: dict[str, Any]) -> dict[str, Any]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {("num_hidden_layers" if k == "num_layers" else k): v for k, v in SHAPES[work["shape"]].items()}
    names = {"num_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads"}
    sizes = {names.get(name, name): size for name, size in sizes.items()}
    with torch.device("meta"):
        net = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=VOCAB, tie_word_embeddings=False))
    net = net.to_empty(device="cpu").eval()
    net.model.rotary_emb = type(net.model.rotary_emb)(net.config)
    fill(net.parameters())
    for parameter in net.parameters():
        if parameter.dim() == 1:
            torch.nn.init.ones_(parameter)
    rows, width = prompts_of(work), work["prompt_tokens"][1]
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    settings = {"max_new_tokens": work["new_tokens"], "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    net.generate(ids[:1, -3:], attention_mask=mask[:1, -3:], **{**settings, "max_new_tokens": 2})
    began = time.perf_counter()
    with torch.inference_mode():
        out = net.generate(ids, attention_mask=mask, **settings)
    return {"seconds": time.perf_counter() - began, "replies": out[:, width:].tolist()}


def worker(task: dict[str, Any]) -> dict[str, Any]:
    import torch

    torch.set_num_threads(task["work"]["threads"])
    if task["way"].startswith("transformers"):
        return run_transformers(task["work"])
    way = WAYS[task["way"]]
    return run_burnish(task["work"], way.get("techniques", []), way.get("batch"))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--shape", choices=SHAPES, default="0.85B")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["alone", "together"])
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, nargs=2, default=[32, 256], help="least and most")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(worker(json.loads(arguments.worker))))
        return

    from burnish.device import environment

    keys = ("shape", "requests", "prompt_tokens", "new_tokens", "threads")
    work = {key: getattr(arguments, key) for key in keys}
    work |= {"sizes": SHAPES[arguments.shape], "vocab_size": VOCAB, "head_dim": HEAD}
    before = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    ways = before.get("ways", {}) if before.get("work") == work else {}
    for way in arguments.ways:
        task = json.dumps({"way": way, "work": work})
        done = subprocess.run([sys.executable, __file__, "--worker", task], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{way}:\n{done.stderr}")
        found = json.loads(done.stdout.splitlines()[-1])
        found["tokens_per_second"] = sum(map(len, found["replies"])) / found["seconds"]
        found["replies"] = [" ".join(map(str, ids)) for ids in found["replies"]]
        found["command"] = shlex.join(["python", "benchmarks/batching.py", *sys.argv[1:]])
        ways[way] = found
        print(f"{way}: {found['seconds']:.1f} s, {found['tokens_per_second']:.2f} tokens a second", flush=True)
    for way, found in ways.items():
        base = ways.get(way.replace("together", "alone").split(", int8 keys")[0].split(", 2304")[0])
        if way.startswith("together") and base:
            same = [a == b for a, b in zip(found["replies"], base["replies"], strict=True)]
            found |= {"ratio": base["seconds"] / found["seconds"], "equal_replies": sum(same)}
            print(f"{way}: {found['ratio']:.2f} times as fast as alone, {sum(same)} of {len(same)} replies equal")
    report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": environment(),
        "work": work,
        "ways": ways,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
