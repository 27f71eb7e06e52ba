"""`burnish compare`: every chain of techniques on every task, measured side by side."""

from __future__ import annotations

import json
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from burnish import device
from burnish.bench import report
from burnish.bench.jobs import Jobs
from burnish.bench.rows import RowConfig, learning_rates, majority_row, result_row, task_cells
from burnish.bench.tasks import load_task, parse_task, without_choices
from burnish.chain import compares, parse_chain
from burnish.config import UserError, from_mapping, load_yaml, make_folder, nearest, to_mapping
from burnish.plan import check_memory
from burnish.store.hub import resolve
from burnish.store.identity import identity
from burnish.store.sources import read_json
from burnish.store.tensors import write_json

DEFAULT = Path(__file__).parent.parent / "assets" / "compare.yaml"


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass(frozen=True)
class CompareConfig:
    """The comparison; without rows the default ones. Times are in seconds, memory in bytes."""

    positional: ClassVar[str] = "model"
    model: str = field(default="pebble", metadata=_help("checkpoint folder, hub id or 'pebble'"))
    tasks: list[Any] = field(default_factory=list, metadata=_help("built-in names, or mappings with name and data"))
    rows: list[Any] = field(default_factory=list, metadata=_help("mappings with name, techniques, learning_rate"))
    examples: list[int] = field(
        default_factory=list, metadata=_help("measure trained rows with so many training examples too: a curve")
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata=_help("seeds of every trained row"))
    controls: bool = field(default=True, metadata=_help("add the majority answer and shuffled labels"))
    learning_rate: float = field(default=1e-3, metadata=_help("for trained rows that name none"))
    max_steps: int = field(default=100, metadata=_help("training steps of every row"))
    per_device_train_batch_size: int = field(default=16, metadata=_help("rows per step"))
    warmup_ratio: float = field(default=0.1, metadata=_help("share of steps with rising learning rate"))
    bf16: bool = field(default=False, metadata=_help("compute in bfloat16 (in float32 on a CPU without it)"))
    cost: Literal["auto", "model", "twin"] = field(
        default="auto", metadata=_help("measure cost on the model or on a 134M twin; auto: the twin for pebble")
    )
    latency: dict[str, int] = field(default_factory=dict, metadata=_help("prompt_tokens, new_tokens, warmups, runs"))
    shape: list[int] = field(default_factory=lambda: [4, 128], metadata=_help("rows, tokens of the memory measurement"))
    budget: dict[str, float] = field(
        default_factory=dict,
        metadata=_help("max_latency_ms, max_memory_bytes, max_artifact_bytes, max_train_seconds"),
    )
    workers: int = field(default=0, metadata=_help("training jobs at a time; 0: one per core, at most 4"))
    timeout: float = field(default=1800, metadata=_help("seconds that one job may take"))
    memory_limit: float = field(default=0, metadata=_help("bytes that one job may allocate; 0: all"))
    output_dir: Path = field(default=Path("runs/compare"), metadata=_help("folder of results.json and report.html"))
    overwrite: bool = field(default=False, metadata=_help("replace another comparison in output_dir"))
    json: bool = field(default=False, metadata=_help("print results.json"))


def compare(config: CompareConfig, progress: Callable[[str], None] = print) -> dict[str, Any]:
    """Run the comparison and write results.json and report.html. Returns the results.

    Raises UserError before anything runs for unknown names or keys, unreadable data, a folder that holds another
    comparison, or a model that memory cannot hold.
    """
    began = time.perf_counter()
    config = with_defaults(config)
    rows = [from_mapping(RowConfig, dict(row), f"row '{dict(row).get('name', '?')}'") for row in config.rows]
    rows = [replace(row, model=row.model or config.model) for row in rows]
    names = [row.name for row in rows]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"rows: the name '{name}' stands twice; names tell rows apart")
    if not config.seeds:
        raise UserError("seeds: give at least one, as in [0, 1, 2]")
    if config.max_steps < 1:
        raise UserError(f"max_steps: must be at least 1, is {config.max_steps}")
    for row in rows:
        if row.max_steps < 0:
            raise UserError(f"row '{row.name}': max_steps: must be 0 (the comparison's) or more, is {row.max_steps}")
    tasks = [load_task(parse_task(task)) for task in config.tasks]
    known = [task.name for task in tasks]
    for row in rows:
        parse_chain(row.techniques)
        for name in row.tasks:
            if name not in known:
                raise UserError(f"row '{row.name}': task '{name}' is none of the comparison's{nearest(name, known)}")
        for name in known:
            learning_rates(row, name)
    models = {name: resolve(name) for name in {config.model: None} | {row.model: None for row in rows}}
    for name, folder in models.items():
        check_memory(folder, [row.techniques for row in rows if row.model == name])
    cells = [cell for task in tasks for cell in task_cells(rows, task, config.controls)]
    for cell in cells:
        compared = compares(cell.techniques)
        lacks = without_choices(cell.task.train, cell.task.config) if compared else 0
        if lacks:
            raise UserError(
                f"row '{cell.row.name}': {compared} needs rows with 'choices', and training row {lacks} of task "
                f"'{cell.task.name}' has none; give the row only tasks that have them, as in tasks: [reviews]"
            )
    claim(config, models[config.model])
    with tempfile.TemporaryDirectory(dir=config.output_dir) as scratch:
        jobs = Jobs(config, models, Path(scratch))
        measured = jobs.run(cells, progress)
    majorities = [majority_row(task) for task in tasks] if config.controls else []
    results = {
        "environment": device.environment(),
        "budget": config.budget,
        "rows": [*(result_row(cell, *found) for cell, found in measured), *(row for row in majorities if row)],
        "seconds": time.perf_counter() - began,
        "notes": notes(config, any(map(jobs.has_twin, cells)), jobs.workers),
        "recipe": to_mapping(config),
        "command": "burnish compare",
    }
    report.write(results, config.output_dir)
    return results


def with_defaults(config: CompareConfig) -> CompareConfig:
    """Missing tasks and rows from the packaged recipe; its steps and rates too where none of both is given."""
    if config.tasks and config.rows:
        return config
    default = load_yaml(DEFAULT)
    given = {name: value for name, value in to_mapping(config).items() if value != to_mapping(CompareConfig())[name]}
    if config.tasks:
        for row in default["rows"]:  # rates were found for the default tasks; another one takes the first of them
            rate = row.get("learning_rate")
            row["learning_rate"] = next(iter(rate.values())) if rate else 0.0
    return from_mapping(CompareConfig, {**default, **given}, str(DEFAULT.name))


def claim(config: CompareConfig, model: Path) -> None:
    """Take the output folder, or refuse it when it holds a comparison of something else."""
    ours = {"model": identity(model), "tasks": to_mapping(config)["tasks"], "seeds": config.seeds}
    record = config.output_dir / "compare.json"
    if record.exists() and not config.overwrite:
        theirs = read_json(record).get("run", {})
        differing = [key for key, value in ours.items() if theirs.get(key) != value]
        if differing:
            raise UserError(
                f"{config.output_dir}: holds a comparison with other {' and '.join(differing)}; choose another "
                "--output-dir, or --overwrite"
            )
    elif config.output_dir.is_dir() and any(config.output_dir.iterdir()) and not record.exists():
        raise UserError(f"{config.output_dir}: is not empty and holds no comparison; choose another --output-dir")
    make_folder(config.output_dir)
    write_json({"run": ours, "config": to_mapping(config)}, record)


def notes(config: CompareConfig, twin: bool, workers: int) -> list[str]:
    """How the figures were measured, for the report."""
    request = {"prompt_tokens": 64, "new_tokens": 16, "warmups": 2, "runs": 10, **config.latency}
    where = "the model itself"
    if twin:
        where = "a random-weight Llama of 134M parameters with the same chain where the model is pebble, else on itself"
    return [
        "exact match: the share of test rows whose greedy continuation begins with the expected completion; "
        "accuracy: of classes; rank classification: the share whose completion is the likeliest per token of its "
        "choices; perplexity: exp of the mean loss per trained token.",
        f"Quality: mean over {len(config.seeds)} seeds of the trained rows, spread is their standard deviation; rows "
        "that do not train are deterministic and measured once.",
        f"Training ran {workers} jobs at a time; train seconds are means over seeds under that load.",
        f"Latency, tokens per second and memory: on {where}; {request['prompt_tokens']} prompt tokens and "
        f"{request['new_tokens']} new ones, {request['warmups']} warm-ups, {request['runs']} runs, one at a time.",
        f"Peak memory is the larger of training ({config.shape[0]} rows of {config.shape[1]} tokens) and serving the "
        "saved artefact in a fresh process, each above the process's memory after imports.",
        "Artefact: bytes of the tensor files that the row saves; for adapters and prompts without the base.",
        "Learning rates of rows that name several: the best on the development rows, one seed that is not among the "
        "others; every such row gets the trials that it lists.",
        "Controls: the most frequent training answer, and training with the answers dealt out at random.",
    ]


def run(config: CompareConfig) -> int:
    """Compare, print the table and the verdict, and say where the files are."""
    import rich

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that jobs end and files are removed
    slower = device.compiler_line()
    if slower:
        print(slower, file=sys.stderr)
    results = compare(config, progress=lambda line: print(line, file=sys.stderr, flush=True))
    if config.json:
        print(json.dumps(results))
        return 0
    rich.print(report.table(results))
    for line in report.verdict(results):
        print(line)
    print(f"{config.output_dir / 'report.html'}\n{config.output_dir / 'results.json'}")
    return 0
