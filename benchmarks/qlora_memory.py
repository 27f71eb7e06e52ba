"""What QLoRA saves of LoRA's memory, burnish beside peft with bitsandbytes.

    python benchmarks/qlora_memory.py --steps 2 --threads 2

The model is a random Llama of 0.85 thousand million parameters that transformers writes in bfloat16; every run trains
rank-8 adapters on all of its projections, on one row of 512 random tokens. Each is a process of its own that imports,
starts a new peak of resident memory (VmHWM), loads, quantises and trains: the whole run's peak above what the imports
took is its memory, so that a 16-bit model held while it is quantised would count. Pages of mapped files count as well,
by which transformers reads weights. The first step is not timed. Adapters start with B = 0, so that the first losses
tell how near the quantised model is to the other.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from training import Meter, base_of_peft, spawn, train_burnish, train_peft, write_base

SHAPE = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
RANK, ALPHA, TOKENS = 8, 16, 512
CASE: dict[str, Any] = {"batch": 1, "length": TOKENS, "trained": 1.0}
LORA = {"lora": {"r": RANK, "lora_alpha": ALPHA, "target_modules": "all-linear"}}
NF4 = {"nf4": {"double_quant": True}}
PAGED = {"optim": "paged_adamw", "optim_memory_limit": 4 << 20}
RUNS: dict[str, dict[str, Any]] = {
    "burnish LoRA": {"techniques": [LORA]},
    "burnish QLoRA": {"techniques": [NF4, LORA]},
    "burnish QLoRA, paged AdamW": {"techniques": [NF4, LORA], **PAGED},
    "peft LoRA": {"quantised": False},
    "peft QLoRA, bitsandbytes": {"quantised": True},
}
RESULT = Path(__file__).parent / "results" / "qlora_memory.json"


def run_burnish(
    folder: Path, steps: int, gradient_checkpointing: bool, techniques: list[Any], **optim: Any
) -> dict[str, Any]:
    from burnish.chain import apply
    from burnish.model.surgery import linears
    from burnish.store.checkpoint import load

    meter = Meter()
    model = apply(load(folder, techniques=techniques), techniques)
    weights = [linear.weight for _, linear in linears(model.net)]
    options = {"gradient_checkpointing": gradient_checkpointing, **optim}
    found = train_burnish(meter, model, CASE, steps, **options)
    stored = sum(weight.nbytes for weight in weights)
    return found | {"linears_ratio": stored / sum(2 * w.shape[0] * w.shape[1] for w in weights)}


def run_peft(folder: Path, steps: int, gradient_checkpointing: bool, quantised: bool) -> dict[str, Any]:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import BitsAndBytesConfig

    meter = Meter()
    torch.manual_seed(0)
    options: dict[str, Any] = {}
    if quantised:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        options["device_map"] = {"": "cpu"}
    base = base_of_peft(folder, **options)
    kinds = [module for path, module in base.named_modules() if path.endswith("_proj")]
    stored = sum(_stored_bytes(module.weight) for module in kinds)
    if gradient_checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        base.enable_input_require_grads()
    model = get_peft_model(
        base, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    found = train_peft(meter, model, CASE, steps)
    dense = sum(2 * module.in_features * module.out_features for module in kinds)
    return found | {"linears_ratio": stored / dense}


def _stored_bytes(weight: Any) -> int:
    """Bytes of a weight and, where bitsandbytes quantised it, of its constants."""
    state = getattr(weight, "quant_state", None)
    tensors = [weight]
    if state is not None:
        tensors += [state.absmax, state.state2.absmax, state.offset]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def worker(task: dict[str, Any]) -> dict[str, Any]:
    """What a child process does: one run."""
    import torch

    torch.set_num_threads(task["threads"])
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], fused=True)  # whose imports belong to the baseline
    if task["run"].startswith("burnish"):
        import burnish.engine.train
        import burnish.store.checkpoint  # noqa: F401

        call = run_burnish
    else:
        import bitsandbytes  # noqa: F401
        import peft  # noqa: F401
        from transformers import LlamaForCausalLM  # noqa: F401

        call = run_peft
    options = {**RUNS[task["run"]], "gradient_checkpointing": task["gradient_checkpointing"]}
    return call(Path(task["folder"]), task["steps"], **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--steps", type=int, default=2, help="timed ones, after one that is not")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--gradient-checkpointing", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--add", action="store_true", help="keep the other runs of the report that is there")
    parser.add_argument("--folder", type=Path, help="where the model is, or is written; else a temporary folder")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(worker(json.loads(arguments.worker))))
        return

    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = arguments.folder or Path(name)
        if not (folder / "config.json").exists():
            write_base(folder, SHAPE)
        for run in arguments.runs:
            task = {"folder": str(folder), "steps": 1 + arguments.steps, "threads": arguments.threads, "run": run}
            task["gradient_checkpointing"] = arguments.gradient_checkpointing
            found = spawn(__file__, task, arguments.threads)
            medians = {f"step_{kind}": statistics.median(found[kind][1:]) for kind in ("seconds", "cpu_seconds")}
            rows[run] = found | medians
            write_report(arguments, rows)
            sizes = {name: found[f"{name}_bytes"] >> 20 for name in ("peak", "load_peak", "loaded")}
            losses = " ".join(f"{loss:.4f}" for loss in found["losses"])
            print(
                f"{run:28} {medians['step_seconds']:.1f} s, {medians['step_cpu_seconds']:.1f} CPU s a step, "
                f"MiB {sizes}, projections at {found['linears_ratio']:.3f} of bf16, losses {losses}",
                flush=True,
            )


def write_report(arguments: argparse.Namespace, rows: dict[str, Any]) -> None:
    from burnish.device import environment

    if arguments.add and arguments.output.exists():
        rows = json.loads(arguments.output.read_text())["runs"] | rows
    pairs = [("burnish QLoRA", "burnish LoRA"), ("burnish QLoRA", "peft LoRA"), ("burnish LoRA", "peft LoRA")]
    pairs += [("burnish QLoRA", "peft QLoRA, bitsandbytes"), ("peft QLoRA, bitsandbytes", "peft LoRA")]
    report = {
        "command": f"python benchmarks/qlora_memory.py --steps {arguments.steps} --threads {arguments.threads}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": environment(),
        "work": {
            "shape": SHAPE,
            "r": RANK,
            "tokens": TOKENS,
            "gradient_checkpointing": arguments.gradient_checkpointing,
            "threads": arguments.threads,
        },
        "peak_ratios": {
            f"{a} / {b}": rows[a]["peak_bytes"] / rows[b]["peak_bytes"] for a, b in pairs if a in rows and b in rows
        },
        "runs": rows,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
