"""How near decoding on a GPU comes to the bandwidth of its memory, burnish beside transformers.

    python benchmarks/gpu_inference.py

Random Llamas of 1B and 7B shapes in bfloat16, rows of 128 tokens, each continued by 512, for one row and for 64:
burnish's graphed steps (bfloat16, int8 and NF4 weights) and its modules as they are, transformers' eager generation,
and its static cache with the compiled forward that it then uses. Each engine writes one reply untimed, in which it
compiles, and then --rounds timed ones; --reverse takes the engines in the other order. A step is the median time
between two tokens of a row, without the first eight; a reply's rate counts
everything, prefill and capture too. `of_bandwidth` is the bytes of weights, keys and values that a step must read, over
its time, over the bandwidth of reading 4 GiB, measured before and after and the better taken. One model is in memory at
a time. --device cpu --shapes tiny runs all of it anywhere, as a test of the script.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "gpu_inference.json"
SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 512},
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256},
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 32, "vocab_size": 32000},
}  # fmt: skip
ENGINES = ("burnish", "burnish int8", "burnish nf4", "burnish modules", "transformers", "transformers compiled")
UNSTEADY = 8  # steps at the beginning that are not counted
Reply = Callable[[], Iterator[Any]]


def write_model(folder: Path, shape: dict[str, int], device: str) -> None:
    """A random model with a one-word tokenizer, and without a token that ends a text."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    nothing = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = LlamaConfig(**shape, **nothing, max_position_embeddings=4096, tie_word_embeddings=False)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="a").save_pretrained(folder)


def prompts(rows: int, length: int, vocabulary: int) -> list[list[int]]:
    return [[3 + (37 * at + 101 * row) % (vocabulary - 3) for at in range(length)] for row in range(rows)]


def burnish_reply(folder: Path, way: str, given: Any, texts: list[list[int]]) -> tuple[Reply, int]:
    """A function that gives one thing for each step of a reply, and the bytes of weights that a step reads."""
    from burnish import chain
    from burnish.engine.decoding import GenerationConfig
    from burnish.engine.generate import stream
    from burnish.model.example import IGNORE, Example
    from burnish.store.checkpoint import load

    techniques = [way] if way in ("int8", "nf4") else []
    model = chain.apply(load(folder, device=given.device, techniques=techniques), techniques)
    examples = [Example(ids, [IGNORE] * len(ids), fields={"prompt": ""}) for ids in texts]
    settings = GenerationConfig(max_new_tokens=given.tokens, batch_size=len(texts), fused=way != "modules")

    def reply() -> Iterator[Any]:
        for number, piece in enumerate(stream(model, examples, settings)):
            if number % len(texts) == 0:
                yield piece

    return reply, sum(p.nbytes for name, p in model.net.named_parameters() if not name.startswith("embed_tokens."))


def transformers_reply(folder: Path, way: str, given: Any, texts: list[list[int]]) -> tuple[Reply, int]:
    """The same. A step is counted when its logits are asked for."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(given.device).eval()
    ids = torch.tensor(texts, device=given.device)
    settings: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": given.tokens}
    settings["attention_mask"] = torch.ones_like(ids)
    if way == "compiled":
        settings["cache_implementation"] = "static"

    def reply() -> Iterator[Any]:
        marks: list[float] = []

        def mark(ids: Any, scores: Any) -> Any:
            marks.append(time.perf_counter())
            return scores

        with torch.inference_mode():
            model.generate(ids, logits_processor=[mark], **settings)
        yield from marks

    table = model.get_input_embeddings().weight.nbytes
    return reply, sum(p.nbytes for p in model.parameters()) - table


def measured(name: str, folder: Path, shape: dict[str, int], rows: int, given: Any) -> dict[str, Any]:
    """One engine's replies for so many rows; `error` in the place of figures where it fails."""
    import torch

    engine, _, way = name.partition(" ")
    texts = prompts(rows, given.prompt, shape["vocab_size"])
    make = burnish_reply if engine == "burnish" else transformers_reply
    try:
        start = time.perf_counter()
        reply, weights = make(folder, way, given, texts)
        loaded = time.perf_counter()
        list(reply())
        compiled = time.perf_counter()
        steps: list[float] = []
        whole: list[float] = []
        for _ in range(given.rounds):
            begun = time.perf_counter()
            marks = [item if isinstance(item, float) else time.perf_counter() for item in reply()]
            synchronise(given.device)
            whole.append(time.perf_counter() - begun)
            steps += [after - before for before, after in zip(marks[UNSTEADY:], marks[UNSTEADY + 1 :], strict=False)]
        peak = torch.cuda.max_memory_allocated() if given.device == "cuda" else None
    except Exception as error:  # a peer that fails is a result too
        return {"error": f"{type(error).__name__}: {error}"[:400]}
    head = shape["hidden_size"] // shape["num_attention_heads"]
    kept = 4 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * head  # bytes of a token, bfloat16
    step = statistics.median(steps)
    return {
        "step_ms": 1000 * step, "tokens_per_second": rows / step,
        "reply_tokens_per_second": rows * given.tokens / statistics.median(whole), "load_seconds": loaded - start,
        "first_reply_seconds": compiled - loaded, "weight_bytes": weights, "peak_memory_bytes": peak,
        "step_bytes": weights + rows * kept * (given.prompt + given.tokens // 2), "steps_ms": [1000 * s for s in steps],
    }  # fmt: skip


def synchronise(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def bandwidth(device: str) -> float:
    """Bytes a second of summing 4 GiB (256 MiB on a CPU), the best of ten."""
    import torch

    block = torch.ones(2**30 if device == "cuda" else 2**26, device=device)
    best = float("inf")
    for _ in range(10):
        synchronise(device)
        start = time.perf_counter()
        block.sum()
        synchronise(device)
        best = min(best, time.perf_counter() - start)
    return block.nbytes / best


def forget() -> None:
    """Give back what the last engine held."""
    import torch

    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shapes", default="1B,7B")
    parser.add_argument("--rows", default="1,64")
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--reverse", action="store_true", help="the engines in the other order")
    parser.add_argument("--output", type=Path, default=RESULT)
    given = parser.parse_args()
    import torch

    from burnish.device import environment

    if given.device == "cuda" and not torch.cuda.is_available():
        print("gpu_inference: torch sees no GPU; run it where there is one, or try the script by --device cpu --shapes"
              " tiny", file=sys.stderr)  # fmt: skip
        return 2
    names = given.engines.split(",")
    names = names[::-1] if given.reverse else names
    read = bandwidth(given.device)
    found: dict[str, dict[str, Any]] = {}
    for kind in given.shapes.split(","):
        with tempfile.TemporaryDirectory() as scratch:
            write_model(Path(scratch), SHAPES[kind], given.device)
            for rows in map(int, given.rows.split(",")):
                for name in names:
                    forget()
                    found[f"{kind}, {rows} rows, {name}"] = measured(name, Path(scratch), SHAPES[kind], rows, given)
    read = max(read, bandwidth(given.device))
    for name, row in found.items():
        if "error" in row:
            print(f"{name:40} {row['error']}")
            continue
        row["of_bandwidth"] = row["step_bytes"] / row["step_ms"] * 1000 / read
        print(
            f"{name:40} {row['step_ms']:9.3f} ms a step {row['tokens_per_second']:9.0f} tokens/s "
            f"{row['of_bandwidth']:5.2f} of the bandwidth; first reply {row['first_reply_seconds']:.1f} s"
        )
    ratios = {}
    for name, row in found.items():
        eager = found.get(f"{name.rpartition(', ')[0]}, transformers", {})
        if "tokens_per_second" in row and "tokens_per_second" in eager:
            ratios[name] = row["tokens_per_second"] / eager["tokens_per_second"]
    words = ["python benchmarks/gpu_inference.py", f"--shapes {given.shapes}", f"--rows {given.rows}",
             f"--prompt {given.prompt}", f"--tokens {given.tokens}", f"--rounds {given.rounds}"]  # fmt: skip
    given.output.write_text(json.dumps({
        "command": " ".join([*words, *(["--reverse"] if given.reverse else [])]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "device": given.device, "environment": environment(),
        "shapes": {kind: SHAPES[kind] for kind in given.shapes.split(",")}, "read_bytes_per_second": read,
        "rows": found, "to_transformers_eager": ratios,
    }, indent=1) + "\n")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
