"""How near decoding and prefill come to the machine's limits, burnish beside its peers.

    python benchmarks/inference.py --rounds 2 --tokens 24 --threads 2 --llama-python python

The model is a random Llama of 0.85 thousand million parameters, in bfloat16 and as each engine stores it in 8 and 4
bits; llama.cpp reads files of the same shapes and of its own types, made from other random numbers, and burnish reads
the quantised ones too. bitsandbytes and torchao quantise transformers' model, and torchao's is compiled. Every run is a
process of its own; the order of the runs is turned round from round to round. Decoding counts single tokens after a
prompt of 32, by their median; prefill is a prompt of 256 to its first token, by the fastest of three. The limits, the
bandwidth of reading memory and the rate of matrix products of 2048 in the faster of float32 and bfloat16, are measured
before every run, and the best of each is taken. transformers runs in float32 too, which suits processors without
instructions for bfloat16.
--llama-python is an interpreter with llama-cpp-python and gguf; without it llama.cpp is left away. So are bitsandbytes
and torchao where they cannot be imported.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import qlora_memory
from training import write_base

SHAPE = {"vocab": 32000, "hidden": 2048, "inner": 5632, "layers": 16, "heads": 32, "kv_heads": 8}
PROMPT, PREFILL = 32, 256
RUNS = {
    "burnish bf16": ("burnish", ""),
    "burnish int8": ("burnish", "int8"),
    "burnish fp8": ("burnish", "fp8"),
    "burnish nf4": ("burnish", "nf4"),
    "burnish int_groups": ("burnish", "int_groups"),
    "burnish int_groups, 8 bits": ("burnish", "int_groups 8"),
    "burnish int_groups, 3 bits": ("burnish", "int_groups 3"),
    "burnish int_groups, 2 bits": ("burnish", "int_groups 2"),
    "burnish Q8_0": ("file", "Q8_0"),
    "burnish Q4_0": ("file", "Q4_0"),
    "transformers bf16": ("transformers", ""),
    "transformers float32": ("transformers", "float32"),
    "bitsandbytes int8": ("bitsandbytes", "int8"),
    "bitsandbytes nf4": ("bitsandbytes", "nf4"),
    "torchao int8": ("torchao", "int8"),
    "torchao int4": ("torchao", "int4"),
    "llama.cpp BF16": ("llama", "BF16"),
    "llama.cpp Q8_0": ("llama", "Q8_0"),
    "llama.cpp Q4_0": ("llama", "Q4_0"),
}
RESULT = Path(__file__).parent / "results" / "inference.json"


def ids(count: int) -> list[int]:
    return [10 + 37 * i % (SHAPE["vocab"] - 10) for i in range(count)]


def write_gguf(path: Path, kind: str) -> None:
    """A Llama of the shape in llama.cpp's format; the layers share their random numbers."""
    import gguf
    import numpy

    s, draw = SHAPE, numpy.random.default_rng(0)
    size = s["hidden"] // s["heads"]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(2048)
    writer.add_embedding_length(s["hidden"])
    writer.add_block_count(s["layers"])
    writer.add_feed_forward_length(s["inner"])
    writer.add_head_count(s["heads"])
    writer.add_head_count_kv(s["kv_heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(size)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([b"<unk>", b"<s>", b"</s>", *(f"w{i}".encode() for i in range(3, s["vocab"]))])
    writer.add_token_scores([0.0] * s["vocab"])
    writer.add_token_types([2, 3, 3, *[1] * (s["vocab"] - 3)])
    held: dict[tuple[int, int], Any] = {}
    wanted = gguf.GGMLQuantizationType[kind]

    def matrix(name: str, rows: int, columns: int) -> None:
        if (rows, columns) not in held:
            values = draw.standard_normal((rows, columns), dtype=numpy.float32) * 0.02
            held[rows, columns] = gguf.quants.quantize(values, wanted)
        writer.add_tensor(f"{name}.weight", held[rows, columns], raw_dtype=wanted)

    ones = numpy.ones(s["hidden"], dtype=numpy.float32)
    matrix("token_embd", s["vocab"], s["hidden"])
    for layer in range(s["layers"]):
        for name, rows, columns in (
            ("attn_q", s["hidden"], s["hidden"]), ("attn_k", s["kv_heads"] * size, s["hidden"]),
            ("attn_v", s["kv_heads"] * size, s["hidden"]), ("attn_output", s["hidden"], s["hidden"]),
            ("ffn_gate", s["inner"], s["hidden"]), ("ffn_up", s["inner"], s["hidden"]),
            ("ffn_down", s["hidden"], s["inner"]),
        ):  # fmt: skip
            matrix(f"blk.{layer}.{name}", rows, columns)
        writer.add_tensor(f"blk.{layer}.attn_norm.weight", ones)
        writer.add_tensor(f"blk.{layer}.ffn_norm.weight", ones)
    writer.add_tensor("output_norm.weight", ones)
    matrix("output", s["vocab"], s["hidden"])
    for step in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{step}_to_file")()
    writer.close()


def timed(prefill: Callable[[list[int]], Any], tokens: Callable[[list[int]], Iterator[Any]]) -> dict[str, Any]:
    """Seconds of prefills, after one untimed, and of each token of a reply after its first two."""
    prefill(ids(PREFILL))
    found = []
    for _ in range(3):
        start = time.perf_counter()
        prefill(ids(PREFILL))
        found.append(time.perf_counter() - start)
    marks = [time.perf_counter() for _ in tokens(ids(PROMPT))]
    return {"prefill": found, "token": [end - begin for begin, end in zip(marks[1:], marks[2:], strict=False)]}


def run_burnish(folder: Path, technique: str, count: int) -> dict[str, Any]:
    from burnish import chain
    from burnish.store.checkpoint import load

    name, _, bits = technique.partition(" ")
    techniques = [{name: {"bits": int(bits)} if bits else {}}] if name else []
    return run_model(chain.apply(load(folder / "base", techniques=techniques), techniques), count)


def run_file(folder: Path, kind: str, count: int) -> dict[str, Any]:
    from burnish.store.checkpoint import load

    return run_model(load(folder / f"{kind}.gguf"), count)


def run_model(model: Any, count: int) -> dict[str, Any]:
    from burnish.engine.generate import GenerationConfig, stream
    from burnish.model.example import IGNORE, Example

    def reply(prompt: list[int], length: int) -> Iterator[Any]:
        settings = GenerationConfig(max_new_tokens=length, min_new_tokens=length)
        return stream(model, [Example(prompt, [IGNORE] * len(prompt), fields={"prompt": ""})], settings)

    read = [p.nbytes for name, p in model.net.named_parameters() if not name.startswith("embed_tokens.")]
    found = timed(lambda prompt: list(reply(prompt, 1)), lambda prompt: reply(prompt, count))
    return found | {"bytes": sum(read)}


def run_transformers(folder: Path, kind: str, count: int, **options: Any) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype, **options).eval()
    return timed_by_transformers(model, count)


def run_bitsandbytes(folder: Path, kind: str, count: int) -> dict[str, Any]:
    import torch
    from transformers import BitsAndBytesConfig

    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    four["bnb_4bit_compute_dtype"] = torch.bfloat16
    config = BitsAndBytesConfig(**(four if kind == "nf4" else {"load_in_8bit": True}))
    return run_transformers(folder, "", count, quantization_config=config, device_map="cpu")


def run_torchao(folder: Path, kind: str, count: int) -> dict[str, Any]:
    import torch
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import Int8WeightOnlyConfig, quantize_
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16).eval()
    quantize_(model.model, Int8WeightOnlyConfig() if kind == "int8" else PrototypeInt4WeightOnlyConfig())
    model.forward = torch.compile(model.forward)
    return timed_by_transformers(model, count, cache_implementation="static", disable_compile=True)


def timed_by_transformers(model: Any, count: int, **options: Any) -> dict[str, Any]:
    import torch

    settings = {"do_sample": False, "pad_token_id": 0, **options}

    class Marks:
        def __init__(self) -> None:
            self.seen: list[Any] = []

        def put(self, value: Any) -> None:
            self.seen.append(time.perf_counter())

        def end(self) -> None: ...

    @torch.inference_mode()
    def reply(prompt: list[int], length: int, marks: Marks | None = None) -> None:
        given = torch.tensor([prompt])
        model.generate(given, max_new_tokens=length, min_new_tokens=length, streamer=marks, **settings)

    found = timed(lambda prompt: reply(prompt, 1), lambda prompt: iter(()))
    reply(ids(PROMPT), 4)  # compiles
    marks = Marks()
    reply(ids(PROMPT), count, marks)  # the prompt is put first
    found["token"] = [end - begin for begin, end in zip(marks.seen[2:], marks.seen[3:], strict=False)]
    size = sum(stored(parameter) for parameter in model.parameters()) - model.get_input_embeddings().weight.nbytes
    return found | {"bytes": size}


def stored(tensor: Any) -> int:
    """Bytes of a tensor, or of those that it is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.nbytes
    return sum(stored(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])


def run_llama(folder: Path, kind: str, count: int) -> dict[str, Any]:
    from llama_cpp import Llama

    threads = int(os.environ["OMP_NUM_THREADS"])
    path = folder / f"{kind}.gguf"
    model = Llama(str(path), n_ctx=512, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False)

    def prefill(prompt: list[int]) -> None:
        model.reset()
        model.eval(prompt)
        model.sample(temp=0)

    def tokens(prompt: list[int]) -> Iterator[int]:
        prefill(prompt)
        for _ in range(count):
            token = model.sample(temp=0)
            yield token
            model.eval([token])

    found = timed(prefill, tokens)
    embedding = path.stat().st_size * SHAPE["vocab"] * SHAPE["hidden"] / parameters()
    return found | {"bytes": path.stat().st_size - embedding}


def parameters() -> int:
    s = SHAPE
    layer = 2 * s["hidden"] ** 2 + 2 * s["hidden"] ** 2 * s["kv_heads"] // s["heads"] + 3 * s["hidden"] * s["inner"]
    return s["layers"] * layer + 2 * s["vocab"] * s["hidden"]


def limits() -> dict[str, float]:
    import torch

    from burnish.bench.strategy_job import limits as found

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    return found({"dtype": ""})


def child(folder: Path, name: str, count: int) -> None:
    engine, kind = RUNS[name]
    if engine != "llama":
        import torch

        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    print(json.dumps(globals()[f"run_{engine}"](folder, kind, count)))


def main() -> None:
    from burnish import device

    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--llama-python", default="")
    parser.add_argument("--only", default="", help="engines, separated by commas")
    parser.add_argument("--without", default="", help="rows left out, separated by commas")
    parser.add_argument("--output", type=Path, default=RESULT)
    given = parser.parse_args()
    environment = {**os.environ, "OMP_NUM_THREADS": str(given.threads)}
    here = [sys.executable, __file__]
    engines = set(given.only.split(",")) if given.only else {engine for engine, _ in RUNS.values()}
    engines -= {name for name in ("bitsandbytes", "torchao") if not find_spec(name)}
    engines -= set() if given.llama_python else {"llama", "file"}
    names = [name for name, (engine, _) in RUNS.items() if engine in engines and name not in given.without.split(",")]

    def called(command: list[str]) -> Any:
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{shlex.join(command)}: {done.stderr[-2000:]}")
        return json.loads(done.stdout.splitlines()[-1]) if done.stdout.strip() else None

    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    measured = []
    with tempfile.TemporaryDirectory() as scratch:
        write_base(Path(scratch) / "base", qlora_memory.SHAPE)
        for kind in {kind for engine, kind in map(RUNS.get, names) if engine in ("llama", "file")}:
            called([given.llama_python, __file__, "--gguf", scratch, kind])
        for number in range(given.rounds):
            for name in names if number % 2 == 0 else reversed(names):
                measured.append(called([*here, "--limits"]))
                python = given.llama_python if name.startswith("llama") else sys.executable
                found[name].append(called([python, __file__, "--child", scratch, name, str(given.tokens)]))
                print(name, found[name][-1], flush=True)
    read = max(one["read_bytes_per_second"] for one in measured)
    rate = max(one["operations_per_second"] for one in measured)
    rows = {}
    for name, rounds in found.items():
        token = statistics.median(second for one in rounds for second in one["token"])
        prefill = min(second for one in rounds for second in one["prefill"])
        rows[name] = {
            "token_ms": 1000 * token,
            "tokens_per_second": 1 / token,
            "bytes": rounds[0]["bytes"],
            "of_bandwidth": rounds[0]["bytes"] / token / read,
            "prefill_tokens_per_second": PREFILL / prefill,
            "of_matrix_rate": 2 * PREFILL * (parameters() - 2 * SHAPE["vocab"] * SHAPE["hidden"]) / prefill / rate,
            "rounds": rounds,
        }
    shown = [f"--llama-python {Path(given.llama_python).name}"] if given.llama_python else []
    shown += [f"--{name} '{getattr(given, name)}'" for name in ("only", "without") if getattr(given, name)]
    given.output.write_text(json.dumps({
        "command": " ".join(["python benchmarks/inference.py", f"--rounds {given.rounds}", f"--tokens {given.tokens}",
                             f"--threads {given.threads}", *shown]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": device.environment(), "threads": given.threads, "shape": SHAPE,
        "limits": {"read_bytes_per_second": read, "operations_per_second": rate, "measured": measured}, "rows": rows,
    }, indent=1) + "\n")  # fmt: skip
    for name, row in rows.items():
        print(
            f"{name:42} {row['token_ms']:7.1f} ms a token, {row['of_bandwidth']:.2f} of the bandwidth; "
            f"prefill {row['prefill_tokens_per_second']:6.0f} tokens/s, {row['of_matrix_rate']:.2f} of the rate"
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
    elif sys.argv[1:2] == ["--gguf"]:
        write_gguf(Path(sys.argv[2]) / f"{sys.argv[3]}.gguf", sys.argv[3])
    elif sys.argv[1:2] == ["--limits"]:
        print(json.dumps(limits()))
    else:
        main()
