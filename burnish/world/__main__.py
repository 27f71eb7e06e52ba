"""`python -m burnish.world`: write the corpus, or the splits of tasks, as JSON lines."""

import argparse
import json
from pathlib import Path

from burnish.world.corpus import write_corpus
from burnish.world.phrasings import SPLITS
from burnish.world.tasks import TASKS


def main(arguments: list[str] | None = None) -> None:
    """Write FOLDER/corpus.jsonl or FOLDER/TASK.SPLIT.jsonl for each thing asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m burnish.world",
        description=main.__doc__,
        epilog="example: python -m burnish.world corpus near far --documents 1000 --output world",
    )
    parser.add_argument("what", nargs="+", choices=["corpus", *TASKS], help="corpus, or tasks by name")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="made where it is missing")
    parser.add_argument("--documents", type=int, default=10000, help="length of the corpus (default %(default)s)")
    parser.add_argument("--split", choices=SPLITS, help="only this split of the tasks (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(arguments)
    asked.output.mkdir(parents=True, exist_ok=True)
    for name in asked.what:
        if name == "corpus":
            write_corpus(asked.output / "corpus.jsonl", asked.documents, asked.seed)
            continue
        for split in [asked.split] if asked.split else SPLITS:
            with open(asked.output / f"{name}.{split}.jsonl", "w", encoding="utf-8", newline="\n") as file:
                file.writelines(json.dumps(row) + "\n" for row in TASKS[name](split, asked.seed))


if __name__ == "__main__":
    main()
