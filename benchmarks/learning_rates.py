"""Learning rates for the default comparison: equal trials for every trained row, judged on the development split.

    python benchmarks/learning_rates.py [--tasks near,far] [--steps 80] [--workers 2]

Every row of burnish/assets/compare.yaml that trains is run with each rate of its grid (four rates, a factor of two or
three apart) with one seed that the comparison does not use. The test split is never read. Writes
benchmarks/results/learning_rates.json; the best rates are copied into compare.yaml by hand.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from burnish import device
from burnish.bench.compare import DEFAULT
from burnish.bench.jobs import run_job
from burnish.bench.launcher import launchers
from burnish.config import load_yaml
from burnish.store.hub import resolve
from burnish.store.identity import identity

SEED = 17
GRIDS = {
    "full": [3e-4, 6e-4, 1e-3, 2e-3],
    "LoRA": [2e-3, 5e-3, 1e-2, 2e-2],
    "prompt tuning": [1e-2, 3e-2, 1e-1, 3e-1],
    "P-tuning": [1e-3, 3e-3, 1e-2, 3e-2],
    "prefix tuning": [3e-4, 1e-3, 2e-3, 4e-3],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default="near,far")
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--model", default="pebble")
    options = parser.parse_args()
    recipe = load_yaml(DEFAULT)
    steps = options.steps or recipe["max_steps"]
    trials = []
    for row in recipe["rows"]:
        for task in options.tasks.split(",") if row.get("learning_rate") else []:
            for rate in GRIDS[row["name"]]:
                train = {
                    "learning_rate": rate,
                    "max_steps": steps,
                    "per_device_train_batch_size": recipe["per_device_train_batch_size"],
                    "warmup_ratio": recipe["warmup_ratio"],
                    "bf16": recipe["bf16"],
                }
                job = {"kind": "quality", "model": options.model, "techniques": row["techniques"], "train": train}
                job |= {"task": {"name": task, "split": "dev"}, "seeds": [SEED], "threads": 1}
                trials.append((row["name"], task, rate, job))

    with tempfile.TemporaryDirectory() as scratch, launchers(options.workers) as free:
        pool = ThreadPoolExecutor(options.workers)
        results = pool.map(lambda trial: run_job(trial[3], Path(scratch), 600, free), trials)
        table: dict[str, dict[str, dict[str, float | None]]] = {}
        for (name, task, rate, _), result in zip(trials, results, strict=True):
            score = result["quality"]["mean"] if result["status"] == "ok" else None
            table.setdefault(task, {}).setdefault(name, {})[f"{rate:g}"] = score
            print(name, task, f"{rate:g}", score, flush=True)
    best = {
        task: {name: max(found, key=lambda rate: found[rate] or 0.0) for name, found in rows.items()}
        for task, rows in table.items()
    }
    for task, rows in table.items():
        for name, found in rows.items():
            print(task, name, found, "best", best[task][name])
    record = {
        "environment": device.environment(),
        "model": identity(resolve(options.model)),
        "split": "dev",
        "seed": SEED,
        "steps": steps,
        "exact_match": table,
        "best": best,
    }
    path = Path(__file__).parent / "results" / "learning_rates.json"
    path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
