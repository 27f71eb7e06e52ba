"""The knowledge probe on the embedded world: every way of asking, three seeds, the spread over wordings.

    python benchmarks/knowledge_probe.py [--models pebble,FOLDER] [--relations food,employer] [--minutes 30]

Relations are taken in the given order while there is time; what is in benchmarks/results/knowledge_probe.json already,
of the same model and settings, is kept. The first relations are those on which pebble's best hand-written wording was
below 100% when the wordings were first tried.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from burnish import device, load
from burnish.bench.probe import METHODS, averages, probe, report
from burnish.bench.relations import world_relations, world_texts

RESULTS = Path(__file__).parent / "results" / "knowledge_probe.json"
RELATIONS = "food,known_for,employer,birthplace,industry,country,instrument,profession,pet,headquarters"
SEEDS, STEPS, FACTS = [0, 1, 2], 60, 80


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="pebble")
    parser.add_argument("--relations", default=RELATIONS)
    parser.add_argument("--minutes", type=float, default=30)
    options = parser.parse_args()
    until = time.monotonic() + 60 * options.minutes
    settings = {"seeds": SEEDS, "steps": STEPS, "most_facts": FACTS}
    known = {relation.name: relation for relation in world_relations()}
    texts = world_texts()
    for name in options.relations.split(","):
        for which in options.models.split(","):
            record = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
            if any(record.get(key) != value for key, value in settings.items()):
                record = {}
            model = load(which, torch.float32)
            kept = record.get("models", {}).get(which, {})
            if kept.get("identity") != model.identity:
                kept = {}
            if name in kept.get("relations", {}) or time.monotonic() > until:
                continue
            found = probe(model, [known[name]], METHODS, SEEDS, texts, STEPS, FACTS)
            relations = {**kept.get("relations", {}), **found["relations"]}
            kept = {"identity": model.identity, "relations": relations, "average": averages(relations)}
            models = {**record.get("models", {}), which: kept}
            record = {"environment": device.environment(), **settings, "models": models}
            RESULTS.write_text(json.dumps(record, indent=1) + "\n")
    for which, found in json.loads(RESULTS.read_text())["models"].items():
        print(which, report(found), sep="\n")


if __name__ == "__main__":
    main()
