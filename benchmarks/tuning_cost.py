"""What a training step of every way of fine-tuning costs, on a model of realistic size.

    python benchmarks/tuning_cost.py --threads 2

The rows are those of recipes/tuning.yaml, on the random Llama of 134 million parameters that comparisons measure cost
on: 4 rows of 128 tokens in bfloat16, all of them trained. Every row runs in a process of its own, in the recipe's
order and backwards in turn; a step is the mean of three after a first one, the fastest of the rounds. Memory is the
process's peak above what it had before loading. Writes results/tuning_cost.json.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from burnish import chain, device, load
from burnish.bench.twin import write_twin
from burnish.chain import Context
from burnish.config import load_yaml
from burnish.engine.settings import TrainConfig
from burnish.engine.train import train
from burnish.model.example import Example

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "tuning_cost.json"
ROWS, TOKENS, STEPS = 4, 128, 3


def worker(folder: str, techniques: list[Any], threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    before = device.resident_memory()
    device.reset_peak_memory()
    model = load(folder, techniques=techniques)
    ids = torch.randint(
        5, model.spec.vocab_size, (ROWS * (STEPS + 1), TOKENS), generator=torch.Generator().manual_seed(0)
    )
    examples = [Example(row, [-100, *row[1:]], {"prompt": "", "completion": ""}) for row in ids.tolist()]
    chain.apply(model, techniques, Context(examples=examples))
    run = {"learning_rate": 1e-4, "per_device_train_batch_size": ROWS, "bf16": True}
    train(model, examples, TrainConfig(max_steps=1, **run))
    seconds = train(model, examples, TrainConfig(max_steps=STEPS, **run)).seconds
    trained = sum(parameter.numel() for parameter in model.trainable().values())
    return {"step_seconds": seconds / STEPS, "peak_bytes": device.peak_memory() - before, "trained_parameters": trained}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        print(json.dumps(worker(*json.loads(given.worker))))
        return
    rows = {
        row["name"]: row["techniques"] for row in load_yaml(ROOT / "recipes" / "tuning.yaml")["rows"] if len(row) > 1
    }
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in rows}
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_twin(Path(scratch) / "twin", "pebble")
        for name in [name for turn in range(given.rounds) for name in list(rows)[:: -1 if turn % 2 else 1]]:
            task = json.dumps([str(folder), rows[name], given.threads])
            done = subprocess.run(
                [sys.executable, __file__, "--worker", task], capture_output=True, text=True, check=True, cwd=ROOT
            )
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(name, found[name][-1], flush=True)
    best = {name: min(runs, key=lambda run: run["step_seconds"]) for name, runs in found.items()}
    record = {"command": shlex.join(["python", "benchmarks/tuning_cost.py", *sys.argv[1:]])}
    record |= {"environment": device.environment(), "rows_a_step": ROWS, "tokens_a_row": TOKENS, "rows": best}
    RESULT.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
