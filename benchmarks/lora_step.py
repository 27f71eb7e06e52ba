"""One LoRA training step, burnish against peft: the same weights, adapter, data, threads and core.

    python benchmarks/lora_step.py --rounds 3 --steps 7 --threads 1 --cpu 0

The model is a random 134M Llama that transformers writes in bfloat16; peft writes the adapter that both start from.
Every run is a process of its own, over one fixed batch, so that the losses of both fall in the same course. burnish
runs its own `train`; peft a plain loop with fused AdamW and the Trainer's clipping, in every combination of
`autocast_adapter_dtype` and `torch.compile`, and both with the model itself in float32, which takes twice the bytes
and is peft's only usable way on a processor for which torch has no fast products of bfloat16; peft's fastest is the
one compared with. Rounds go through the runs forwards and backwards in turn. A step's time is the median over the
rounds' steps after the first two, in seconds and in CPU seconds of the process, which others on the machine disturb
less; memory is the peak resident size above what the imports took. Compiling starts from an empty cache; its time is
the first step's.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from training import CLIP, RATE, Meter, base_of_peft, batch_of, spawn, train_burnish, train_peft, versus, write_base

SHAPE = {
    "vocab_size": 32000,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
RANK, ALPHA = 8, 16
TARGETS: dict[str, Any] = {"q_proj,v_proj": ["q_proj", "v_proj"], "all-linear": "all-linear"}
CASES: dict[str, dict[str, Any]] = {  # `trained`: the share of each row, at its end, that is a target
    "q,v 4 x 256": {"adapter": "q_proj,v_proj", "batch": 4, "length": 256, "trained": 1.0},
    "all-linear 4 x 256": {"adapter": "all-linear", "batch": 4, "length": 256, "trained": 1.0},
    "all-linear 1 x 1024": {"adapter": "all-linear", "batch": 1, "length": 1024, "trained": 1.0},
    "all-linear 4 x 256, quarter": {"adapter": "all-linear", "batch": 4, "length": 256, "trained": 0.25},
}
RUNS: dict[str, dict[str, Any]] = {
    "burnish": {"compile": False},
    "peft": {"compile": False, "autocast_adapter_dtype": True},
    "peft, bf16 adapter": {"compile": False, "autocast_adapter_dtype": False},
    "burnish, compile": {"compile": True},
    "burnish, float32": {"compile": False, "dtype": "float32"},
    "peft, compile": {"compile": True, "autocast_adapter_dtype": True},
    "peft, bf16 adapter, compile": {"compile": True, "autocast_adapter_dtype": False},
    "peft, float32": {"compile": False, "autocast_adapter_dtype": True, "dtype": "float32"},
    "peft, float32, compile": {"compile": True, "autocast_adapter_dtype": True, "dtype": "float32"},
}
RESULT = Path(__file__).parent / "results" / "lora_step.json"


def write_models(folder: Path) -> None:
    """The base with a one-word tokenizer, and an adapter for each of `TARGETS`, below `folder`."""
    from peft import LoraConfig, get_peft_model

    write_base(folder / "base", SHAPE)
    for name, modules in TARGETS.items():
        base = base_of_peft(folder / "base")
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=modules, task_type="CAUSAL_LM")
        get_peft_model(base, config).save_pretrained(folder / name)


def run_burnish(
    folder: Path, case: dict[str, Any], steps: int, compile: bool, dtype: str = "bfloat16"
) -> dict[str, Any]:
    import torch

    from burnish.store.checkpoint import load

    meter = Meter()
    return train_burnish(meter, load(folder / case["adapter"], getattr(torch, dtype)), case, steps, compile=compile)


def run_peft(
    folder: Path, case: dict[str, Any], steps: int, compile: bool, autocast_adapter_dtype: bool, dtype: str = "bfloat16"
) -> dict[str, Any]:
    from peft import PeftModel

    meter = Meter()
    model = PeftModel.from_pretrained(
        base_of_peft(folder / "base", dtype),
        folder / case["adapter"],
        is_trainable=True,
        autocast_adapter_dtype=autocast_adapter_dtype,
    )
    return train_peft(meter, model, case, steps, compile)


def matrix_rate(case: dict[str, Any]) -> dict[str, Any]:
    """Best GFLOP/s of the step's own products, in bfloat16 or, where torch is faster so, float32; the seconds of all.

    Counted are 2 * tokens * parameters for the forward pass and as much for the gradient of the inputs, which the
    lowest layer's projections of the embeddings do not need; the frozen weights need none.
    """
    import torch
    import torch.nn.functional as F

    hidden, wide, vocab, layers = (
        SHAPE[key] for key in ("hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers")
    )
    tokens = case["batch"] * case["length"]
    targets = sum(label != -100 for row in batch_of(case, SHAPE["vocab_size"])[1] for label in row[1:])
    products = [  # (rows, out, in, forwards, backwards)
        (tokens, hidden, hidden, 4 * layers, 4 * layers - 3),
        (tokens, wide, hidden, 2 * layers, 2 * layers),
        (tokens, hidden, wide, layers, layers),
        (targets, vocab, hidden, 1, 1),
    ]
    square = {dtype: torch.randn(256, 256, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
    dtype = min(square, key=lambda kind: _best(lambda: square[kind] @ square[kind]))
    rates, seconds, flops = {}, 0.0, 0.0
    for rows, out, inner, forwards, backwards in products:
        x, grad, weight = (torch.randn(*size, dtype=dtype) for size in ((rows, inner), (rows, out), (out, inner)))
        pair = {"x W^T": _best(lambda x=x, w=weight: F.linear(x, w)), "g W": _best(lambda g=grad, w=weight: g @ w)}
        work = 2 * rows * out * inner
        rates[f"{rows} x {inner} x {out}"] = {name: round(work / spent / 1e9, 1) for name, spent in pair.items()}
        seconds += forwards * pair["x W^T"] + backwards * pair["g W"]
        flops += work * (forwards + backwards)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "gflops_per_second": rates,
        "step_gflop": flops / 1e9,
        "step_seconds": seconds,
    }


def _best(call: Any, repeats: int = 12) -> float:
    """The least CPU seconds per thread of a call."""
    times = []
    for _ in range(repeats + 1):
        began = time.thread_time()
        call()
        times.append(time.thread_time() - began)
    return min(times[1:])


def worker(task: dict[str, Any]) -> dict[str, Any]:
    """What a child process does: one run, or the machine's rate."""
    import torch

    torch.set_num_threads(task["threads"])
    if task["run"] == "matrix rate":
        return matrix_rate(task["case"])
    call = run_burnish if task["run"].startswith("burnish") else run_peft
    if call is run_burnish:  # what is imported belongs to the baseline
        import burnish.engine.train
        import burnish.store.checkpoint  # noqa: F401
    else:
        import peft  # noqa: F401
        from transformers import LlamaForCausalLM  # noqa: F401
    return call(Path(task["folder"]), task["case"], task["steps"], **RUNS[task["run"]])


def summary(runs: list[dict[str, Any]], tokens: int, threads: int, rate: dict[str, Any]) -> dict[str, Any]:
    """Medians of the runs of one kind over all rounds."""
    steady = [second for run in runs for second in run["seconds"][2:]]
    cpu = [second for run in runs for second in run["cpu_seconds"][2:]]
    median = statistics.median(cpu)
    return {
        "step_seconds": statistics.median(steady),
        "step_cpu_seconds": median,
        "step_cpu_seconds_least": min(cpu),
        "tokens_per_second": tokens / statistics.median(steady),
        "tokens_per_cpu_second": tokens / median,
        "gflop_per_cpu_second": rate["step_gflop"] / median,
        "fraction_of_matrix_rate": rate["step_seconds"] * threads / median,
        "first_step_cpu_seconds": statistics.median(run["cpu_seconds"][0] for run in runs),
        "peak_bytes": statistics.median(run["peak_bytes"] for run in runs),
        "steady_peak_bytes": statistics.median(run["steady_peak_bytes"] for run in runs),
        "losses": runs[0]["losses"],
        "rounds": [run["cpu_seconds"] for run in runs],
    }


def compare(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """burnish's fastest run that takes no more memory than peft's fastest (any, if none does), over that."""

    def fastest(names: list[str]) -> str:
        return min(names, key=lambda name: rows[name]["step_cpu_seconds"])

    best = {"peft": fastest([name for name in rows if name.startswith("peft")])}
    theirs = rows[best["peft"]]
    own = [name for name in rows if name.startswith("burnish")]
    best["burnish"] = fastest([n for n in own if rows[n]["peak_bytes"] <= theirs["peak_bytes"]] or own)
    ours = rows[best["burnish"]]
    return {
        "burnish": best["burnish"],
        "peft": best["peft"],
        **versus(ours, theirs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=7, help="per run; the first two are not timed")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cpu", default="", help="cores to pin to, as taskset takes them")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(worker(json.loads(arguments.worker))))
        return

    from burnish.device import environment

    measured: dict[str, dict[str, list[Any]]] = {
        case: {run: [] for run in ["matrix rate", *arguments.runs]} for case in arguments.cases
    }
    with tempfile.TemporaryDirectory() as name:
        write_models(Path(name))
        for turn in range(arguments.rounds):
            for case, by_run in measured.items():
                for run in list(by_run)[:: -1 if turn % 2 else 1]:
                    task = {"folder": name, "steps": arguments.steps, "threads": arguments.threads, "case": CASES[case]}
                    found = spawn(__file__, {**task, "run": run}, arguments.threads, arguments.cpu)
                    by_run[run].append(found)
                    if run != "matrix rate":
                        print(
                            f"{turn + 1}/{arguments.rounds} {case:28} {run:28} "
                            f"{statistics.median(found['cpu_seconds'][2:]):6.3f} CPU s, "
                            f"{statistics.median(found['seconds'][2:]):6.3f} s a step, "
                            f"{found['peak_bytes'] >> 20} MiB, "
                            f"loss {found['losses'][0]:.4f} -> {found['losses'][-1]:.4f}",
                            flush=True,
                        )
    report: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/lora_step.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": environment(),
        "work": {"shape": SHAPE, "r": RANK, "lora_alpha": ALPHA, "learning_rate": RATE, "max_grad_norm": CLIP},
        "runs": {run: RUNS[run] for run in arguments.runs},
        "cases": {},
    }
    for case, by_run in measured.items():
        rate = min(by_run.pop("matrix rate"), key=lambda found: found["step_seconds"])
        tokens = CASES[case]["batch"] * CASES[case]["length"]
        rows = {run: summary(found, tokens, arguments.threads, rate) for run, found in by_run.items()}
        both = len({run.split(",")[0] for run in rows}) == 2
        versus = compare(rows) if both else {}
        report["cases"][case] = {**CASES[case], "comparison": versus, "matrix_rate": rate, "runs": rows}
        print(case, json.dumps(versus, indent=2))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
