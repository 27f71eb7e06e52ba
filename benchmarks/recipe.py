"""Run a comparison's recipe and keep its results.

    python benchmarks/recipe.py recipes/tuning.yaml

Writes benchmarks/results/NAME.json, NAME being the recipe's: the comparison's results.json without learning curves and
without paths of the machine. The full report stays in the recipe's output_dir, where a rerun finds what is finished.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from burnish.bench.compare import CompareConfig, compare
from burnish.config import read_config


def main(path: str) -> None:
    config = read_config(CompareConfig, path)
    found = compare(config, progress=lambda line: print(line, flush=True))
    del found["recipe"], found["notes"]
    for row in found["rows"]:
        row.pop("curve")
        row["model"] = Path(row.get("model") or config.model).name
    kept = Path(__file__).parent / "results" / f"{Path(path).stem.replace('-', '_')}.json"
    kept.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
