"""One training step of a soft prompt, burnish against peft: the same weights, start, data, threads and core.

    python benchmarks/soft_prompt_step.py --rounds 1 --steps 8 --threads 1 --cpu 0

Prompt tuning, P-tuning with an LSTM and prefix tuning (without a projection), of 20 tokens each, on the model, the
batch and by the method of `lora_step.py`: peft eager and compiled, the fastest is the one compared with. peft draws the
start of each; burnish takes it over, so that the losses of both fall in the same course.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lora_step import SHAPE
from training import CLIP, RATE, Meter, base_of_peft, spawn, train_burnish, train_peft, versus, write_base

TOKENS = 20
CASE: dict[str, Any] = {"batch": 4, "length": 256, "trained": 1.0}
METHODS = {"prompt tuning": "prompt_tuning", "P-tuning, LSTM": "p_tuning", "prefix tuning": "prefix_tuning"}
RUNS = {"burnish": False, "peft": False, "peft, compile": True}
RESULT = Path(__file__).parent / "results" / "soft_prompt_step.json"


def peft_config(method: str) -> Any:
    import peft

    given: dict[str, Any] = {"num_virtual_tokens": TOKENS, "task_type": "CAUSAL_LM"}
    if method == "p_tuning":  # the shapes of the paper, which are burnish's
        wide = SHAPE["hidden_size"] // 2
        return peft.PromptEncoderConfig(**given, encoder_reparameterization_type="LSTM", encoder_hidden_size=wide)
    return peft.PromptTuningConfig(**given) if method == "prompt_tuning" else peft.PrefixTuningConfig(**given)


def write_models(folder: Path) -> None:
    """The base with a one-word tokenizer, and the start of each method, below `folder`."""
    import peft
    import torch

    write_base(folder / "base", SHAPE)
    for method in METHODS.values():
        model = peft.get_peft_model(base_of_peft(folder / "base"), peft_config(method))
        torch.save(model.prompt_encoder["default"].state_dict(), folder / f"{method}.pt")


def run_burnish(folder: Path, method: str, steps: int, compile: bool) -> dict[str, Any]:
    import torch

    from burnish import chain
    from burnish.store.checkpoint import load

    meter = Meter()
    options = {"prefix_tuning": {"prefix_projection": False}, "p_tuning": {"template": f"[P*{TOKENS}] {{prompt}}"}}
    length = {} if method == "p_tuning" else {"num_virtual_tokens": TOKENS}
    model = chain.apply(load(folder / "base"), {method: {**length, **options.get(method, {})}})
    own: Any = model.net.techniques[method]
    start = torch.load(folder / f"{method}.pt")
    if method == "prompt_tuning":
        start = {"embedding": start["embedding.weight"]}
    own.load_state_dict({name.replace("_head.", "."): tensor for name, tensor in start.items()})
    return train_burnish(meter, model, CASE, steps, compile=compile)


def run_peft(folder: Path, method: str, steps: int, compile: bool) -> dict[str, Any]:
    import peft
    import torch

    meter = Meter()
    model: Any = peft.get_peft_model(base_of_peft(folder / "base"), peft_config(method))
    model.prompt_encoder["default"].load_state_dict(torch.load(folder / f"{method}.pt"))
    return train_peft(meter, model, CASE, steps, compile)


def worker(task: dict[str, Any]) -> dict[str, Any]:
    """What a child process does; what it imports first belongs to the baseline of its memory."""
    import torch

    torch.set_num_threads(task["threads"])
    call = run_burnish if task["run"] == "burnish" else run_peft
    if call is run_burnish:
        import burnish.engine.train
        import burnish.store.checkpoint  # noqa: F401
    else:
        import peft  # noqa: F401
        from transformers import LlamaForCausalLM  # noqa: F401
    return call(Path(task["folder"]), task["method"], task["steps"], RUNS[task["run"]])


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over all rounds, without each run's first two steps."""
    return {
        "step_seconds": statistics.median(second for run in runs for second in run["seconds"][2:]),
        "step_cpu_seconds": statistics.median(second for run in runs for second in run["cpu_seconds"][2:]),
        "peak_bytes": statistics.median(run["peak_bytes"] for run in runs),
        "steady_peak_bytes": statistics.median(run["steady_peak_bytes"] for run in runs),
        "losses": runs[0]["losses"],
        "rounds": [run["cpu_seconds"] for run in runs],
    }


def compare(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """burnish over peft's fastest run."""
    ours = rows["burnish"]
    best = min((name for name in rows if name != "burnish"), key=lambda name: rows[name]["step_cpu_seconds"])
    theirs = rows[best]
    return {
        "peft": best,
        **versus(ours, theirs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=8, help="per run; the first two are not timed")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cpu", default="", help="cores to pin to, as taskset takes them")
    parser.add_argument("--models", type=Path, help="a folder with the models, which are written there if need be")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(worker(json.loads(arguments.worker))))
        return

    from burnish.device import environment

    report: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/soft_prompt_step.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": environment(),
        "work": {"shape": SHAPE, **CASE, "tokens": TOKENS, "learning_rate": RATE, "max_grad_norm": CLIP},
        "methods": {},
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = arguments.models or Path(name)
        if not (folder / "base").exists():
            write_models(folder)
        for method in arguments.methods:
            by_run: dict[str, list[Any]] = {run: [] for run in arguments.runs}
            for turn in range(arguments.rounds):
                for run in arguments.runs[:: -1 if turn % 2 else 1]:
                    task = {"folder": str(folder), "steps": arguments.steps, "threads": arguments.threads, "run": run}
                    found = spawn(__file__, {**task, "method": METHODS[method]}, arguments.threads, arguments.cpu)
                    by_run[run].append(found)
                    print(
                        f"{method:16} {run:14} {statistics.median(found['cpu_seconds'][2:]):6.3f} CPU s, "
                        f"{statistics.median(found['seconds'][2:]):6.3f} s a step, {found['peak_bytes'] >> 20} MiB, "
                        f"loss {found['losses'][0]:.4f} -> {found['losses'][-1]:.4f}",
                        flush=True,
                    )
            rows = {run: summary(found) for run, found in by_run.items()}
            versus = compare(rows) if "burnish" in rows and len(rows) > 1 else {}
            report["methods"][method] = {"comparison": versus, "runs": rows}
            print(method, json.dumps(versus, indent=2), flush=True)
            arguments.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
