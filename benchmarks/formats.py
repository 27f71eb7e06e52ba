"""What every format costs: the embedded model, and a decoder trained on real text, stored in each and measured.

    python benchmarks/formats.py --train wikitext2-valid.txt --test wikitext2-test.txt

The embedded model is measured on held-out text of its made-up world, the decoder (a Llama of 4.5M parameters, trained
here on the first file and calibrated on it) on the second file. For each format: bits a weight of the projections,
perplexity, the mean divergence KL(16 bits || format) of the next token, and the seconds that storing took. Without the
two files the embedded model alone is measured. Writes results/formats.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from gptq import LENGTH, Judge, held_out

import burnish
from burnish import chain, device
from burnish.chain import Context, Model
from burnish.compress import calibration
from burnish.engine.procedures.pretrain import PretrainConfig
from burnish.engine.procedures.pretrain import run as pretrain
from burnish.model.surgery import linears
from burnish.store.data import encode_rows, read_rows
from burnish.store.gguf_model import write

SHAPE = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 4096, "hidden_size": 256}
SHAPE |= {"intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4}
SHAPE |= {"max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": True}
FORMATS: dict[str, list[Any]] = {
    "int8": ["int8"],
    "LLM.int8": [{"int8": {"llm_int8_threshold": 6.0}}],
    "fp8": ["fp8"],
    "fp8, activations too": [{"fp8": {"activation_scheme": "dynamic"}}],
    "nf4": ["nf4"],
    "nf4, plain constants": [{"nf4": {"double_quant": False}}],
    "fp4": ["fp4"],
    "rounded, 8 bits": [{"int_groups": {"bits": 8}}],
    "rounded, 4 bits": [{"int_groups": {"bits": 4}}],
    "rounded, 4 bits, asymmetric": [{"int_groups": {"bits": 4, "sym": False}}],
    "rounded, 3 bits": [{"int_groups": {"bits": 3}}],
    "rounded, 3 bits, asymmetric": [{"int_groups": {"bits": 3, "sym": False}}],
    "rounded, 2 bits": [{"int_groups": {"bits": 2}}],
    "smoothquant, int8": ["smoothquant", {"int8": {"llm_int8_threshold": 1e9}}],
    "gptq, 8 bits": [{"gptq": {"bits": 8}}],
    "gptq, 4 bits": [{"gptq": {"bits": 4}}],
    "gptq, 3 bits": [{"gptq": {"bits": 3}}],
    "gptq, 2 bits": [{"gptq": {"bits": 2}}],
    "awq, gptq, 3 bits": [{"awq": {"bits": 3}}, {"gptq": {"bits": 3}}],
}
TYPES = ("f16", "bf16", "q8_0", "q6_k", "q5_k", "q4_k", "q4_0")


def trained(text: Path, folder: Path, epochs: float) -> Path:
    """A decoder of the shape above, trained on a text."""
    if not folder.exists():
        options = {"learning_rate": 2e-3, "per_device_train_batch_size": 16, "max_length": 128, "warmup_ratio": 0.05}
        options |= {"lr_scheduler_type": "cosine", "weight_decay": 0.1, "adam_beta2": 0.95, "num_train_epochs": epochs}
        pretrain(PretrainConfig(data=str(text), model=SHAPE, output_dir=folder, save_steps=0, **options))
    return folder


def tokens_of(model: Model, text: Path) -> torch.Tensor:
    """Rows of 256 tokens of a file, one after the other."""
    examples = encode_rows(read_rows(text), model.tokenizer, 1 << 20, "all", str(text))
    ids = [token for example in examples for token in example.ids]
    return torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)


def bits(model: Model) -> float:
    """Stored bits a weight of the projections, scales and all; the model must be in 16 bits where it is dense."""
    stored = count = 0
    for _, linear in linears(model.net):
        stored += sum(p.numel() * p.element_size() for p in linear.weight.parameters())
        count += linear.in_features * linear.out_features
    return round(8 * stored / count, 3)


def measured(source: str, rows: torch.Tensor, calibrated: list[torch.Tensor]) -> list[dict[str, Any]]:
    """A row for each format of one model."""
    base = burnish.load(source)
    judge, found = Judge(rows, base), []

    def add(name: str, model: Model, seconds: float) -> None:
        found.append({"row": name, "bits": bits(model), "seconds": round(seconds, 2), **judge(model)})
        print(found[-1], flush=True)

    add("bf16", base, 0.0)
    for name, techniques in FORMATS.items():
        fresh = burnish.load(source, techniques=techniques)
        start = time.perf_counter()
        chain.apply(fresh, techniques, Context([calibration.as_batch(fresh, part) for part in calibrated]))
        add(name, fresh, time.perf_counter() - start)
    with tempfile.TemporaryDirectory() as scratch:
        for kind in TYPES:
            path = Path(scratch) / f"{kind}.gguf"
            start = time.perf_counter()
            write(burnish.load(source), path, kind)
            seconds = time.perf_counter() - start
            add(f"GGUF {kind}", burnish.load(path), seconds)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, help="text to train and calibrate the decoder on")
    parser.add_argument("--test", type=Path, help="text to measure it on")
    parser.add_argument("--epochs", type=float, default=6)
    parser.add_argument("--rows", type=int, default=64, help="of calibration, 256 tokens each")
    parser.add_argument("--held-out", type=int, default=160, help="rows to measure on")
    parser.add_argument("--folder", type=Path, default=Path("runs/formats-decoder"), help="of the decoder, kept")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "formats.json")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    pebble = burnish.load("pebble")
    world = [b["input_ids"] for b in islice(calibration.batches(pebble, Context(), given.rows, LENGTH, ""), given.rows)]
    found = {"pebble": measured("pebble", held_out(pebble, given.held_out), world)}
    if given.train and given.test:
        source = str(trained(given.train, given.folder, given.epochs))
        decoder = burnish.load(source)
        known = tokens_of(decoder, given.train)
        known = known[torch.randperm(len(known), generator=torch.Generator().manual_seed(0))[: given.rows]]
        unseen = tokens_of(decoder, given.test)[: given.held_out]
        found["decoder"] = measured(source, unseen, list(known.split(8)))
    record = {"environment": device.environment(), "threads": given.threads, "calibration_rows": given.rows}
    record |= {"held_out_rows": given.held_out, "tokens_a_row": LENGTH, "epochs": given.epochs, "rows": found}
    given.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
