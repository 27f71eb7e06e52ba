"""The jobs behind a comparison: what runs, in which process, and what is kept for the next run.

Training and measuring jobs run several at a time with one share of the cores each; requests are timed alone with all
cores. Finished jobs are kept in `output_dir/jobs` under a key made of everything that decides their result, so that a
rerun, or a run with one more row, skips them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from burnish.bench.job import OUT_OF_MEMORY
from burnish.bench.launcher import Launcher, launchers
from burnish.bench.report_plots import lower_is_better
from burnish.bench.rows import Cell, learning_rates
from burnish.bench.twin import write_twin
from burnish.config import to_mapping
from burnish.store.identity import identity
from burnish.store.sources import read_json
from burnish.store.tensors import write_json

if TYPE_CHECKING:
    from burnish.bench.compare import CompareConfig

Job = dict[str, Any]
PLACES = ("model", "artifact")  # parts of a job that say where things lie, not what they are
DATA = ("data", "eval_data", "dev_data")


def key(value: Any) -> str:
    """A short name for JSON-able data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def file_digest(path: str) -> str:
    """SHA-256 of a file's bytes; the name itself where it is no file."""
    file = Path(path)
    return hashlib.sha256(file.read_bytes()).hexdigest() if path and file.is_file() else path


def run_job(job: Job, scratch: Path, timeout: float, free: SimpleQueue[Launcher]) -> Job:
    """Run one job by one of the free launchers and return its result; a death becomes a result too."""
    name = key(job)
    job_path, result_path, log = (scratch / f"{name}{end}" for end in (".json", ".result.json", ".log"))
    job_path.write_text(json.dumps(job))
    launcher = free.get()
    try:
        code = launcher.run(job_path, result_path, log, timeout)
    except EOFError as error:
        return {"status": "failed", "error": str(error)}
    finally:
        free.put(launcher)
    if code is None:
        return {"status": "timeout", "error": f"stopped after {timeout:.0f} s"}
    if result_path.exists():
        return json.loads(result_path.read_text())
    if code == -signal.SIGKILL:
        return {"status": "oom", "error": "killed by the system, which is what running out of memory looks like"}
    last = (log.read_text(errors="replace").strip().splitlines() or [f"ended with status {code}"])[-1]
    short = any(sign in last for sign in OUT_OF_MEMORY)
    return {"status": "oom" if short else "failed", "error": last}


class Jobs:
    """The jobs of one comparison, with files in `scratch` while it runs; `models` are the folders of its bases."""

    def __init__(self, config: CompareConfig, models: dict[str, Path], scratch: Path):
        self.config, self.models, self.scratch = config, models, scratch
        self.identities = {str(folder): identity(folder) for folder in models.values()}
        self.cores = os.cpu_count() or 1
        self.workers = config.workers or min(4, self.cores)
        self.threads = max(1, self.cores // self.workers)
        self.rates: dict[tuple[str, str], dict[str, float | None]] = {}  # score of each tried rate, by row and task
        self.folder = config.output_dir / "jobs"
        if config.overwrite and self.folder.exists():
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def has_twin(self, cell: Cell) -> bool:
        """Whether the cost of the cell's chain is measured on the twin."""
        return self.config.cost == "twin" or (self.config.cost == "auto" and cell.row.model == "pebble")

    def rate(self, cell: Cell) -> float:
        """The learning rate of a cell: the one given, or the best of those tried; 0 where it does not train."""
        rates = learning_rates(cell.row, cell.task.name)
        tried = self.rates.get((cell.row.name, cell.task.name), {})
        scores = {rate: score for rate in rates if (score := tried.get(f"{rate:g}")) is not None}
        if not scores:
            return rates[0] if rates else 0.0
        return (min if lower_is_better(cell.task.metric) else max)(scores, key=lambda rate: scores[rate])

    def training(self, cell: Cell) -> dict[str, Any] | None:
        """The training settings of a cell, None for one that does not train."""
        config, rate = self.config, self.rate(cell)
        if not rate:
            return None
        steps = cell.row.max_steps or config.max_steps
        return {
            "learning_rate": rate,
            "max_steps": steps,
            "per_device_train_batch_size": config.per_device_train_batch_size,
            "warmup_ratio": config.warmup_ratio,
            "logging_steps": max(1, steps // 10),
            "bf16": config.bf16,
            **cell.row.train,
        }

    def quality(self, cell: Cell, examples: int = 0) -> Job:
        """The job that trains, on so many examples (0: all), and measures a cell."""
        model = str(self.models[cell.row.model])
        job = {"kind": "quality", "model": model, "techniques": cell.techniques, "shuffle": cell.shuffle}
        seeds = self.config.seeds[:1] if cell.shuffle else self.config.seeds  # a control needs no spread
        task = to_mapping(cell.task.config) | ({"train_rows": examples} if examples else {})
        return {**job, "task": task, "seeds": seeds, "train": self.training(cell), "threads": self.threads}

    def trials(self, cell: Cell) -> dict[str, Job]:
        """The jobs that try the learning rates of a cell on the development rows, with a seed of their own."""
        rates = learning_rates(cell.row, cell.task.name)
        if len(rates) < 2:
            return {}
        job = self.quality(cell)
        job |= {"task": {**job["task"], "split": "dev"}, "seeds": [1 + max(self.config.seeds)]}
        return {f"{rate:g}": {**job, "train": {**job["train"], "learning_rate": rate}} for rate in rates}

    def sizes(self, cell: Cell) -> list[int]:
        """The numbers of training examples that a cell is measured at, besides all."""
        trains = self.rate(cell) and not cell.control
        return [count for count in self.config.examples if trains and count < len(cell.task.train)]

    def cost(self, cell: Cell) -> tuple[Job, Job]:
        """The jobs that measure a chain's training memory, and its artefact's latency."""
        model = str(self.scratch / "twin" if self.has_twin(cell) else self.models[cell.row.model])
        artifact = str(self.scratch / f"artifact-{self.chain(cell)}")
        common = {"model": model, "techniques": cell.techniques, "artifact": artifact}
        fit = {**common, "kind": "fit", "threads": self.threads, "shape": self.config.shape}
        serve = {**common, "kind": "serve", "threads": self.cores, "latency": self.config.latency}
        return {**fit, "train": self.training(cell)}, serve

    def chain(self, cell: Cell) -> str:
        """What tells apart the chains whose cost is measured."""
        return key([cell.row.model, cell.techniques])

    def path(self, job: Job) -> Path:
        """Where the job's result is kept."""
        stable = {name: value for name, value in job.items() if name not in PLACES}
        data = [file_digest(job["task"][name]) for name in DATA] if "task" in job else []
        return self.folder / f"{key([stable, self.identities.get(job['model'], 'twin'), data])}.json"

    def run(self, cells: list[Cell], progress: Callable[[str], None]) -> list[tuple[Cell, tuple[Job, ...]]]:
        """Run what is not kept; every cell with the results of its quality, fit and serve jobs, and with its learning
        rate, trials and quality by number of examples."""
        tried = {(cell.row.name, cell.task.name): self.trials(cell) for cell in cells if not cell.control}
        chains = {self.chain(cell): cell for cell in reversed(cells) if not cell.shuffle}
        trials = [(f"{row} on {task} at {rate}", job) for (row, task), t in tried.items() for rate, job in t.items()]
        qualities = [self.quality(cell, count) for cell in cells for count in (0, *self.sizes(cell))]
        measures = [job for cell in chains.values() for job in self.cost(cell)]
        expected = [*(job for _, job in trials), *qualities, *measures]  # by rates yet to be chosen: as many
        total = len({self.path(job) for job in expected})
        results: dict[Path, Job] = {}

        with launchers(self.workers) as free:
            pool = ThreadPoolExecutor(self.workers)

            def finish(name: str, job: Job, again: bool = False) -> None:
                results[self.path(job)], said = self.finished(job, free, again)
                progress(f"[{len(results)}/{total}] {name}: {said}")

            def together(items: list[tuple[Any, ...]]) -> None:
                once = {self.path(item[1]): item for item in reversed(items)}  # equal rows share a job and its files
                for future in [pool.submit(finish, *item) for item in reversed(once.values())]:
                    future.result()

            try:
                together(trials)
                for cell_name, jobs in tried.items():
                    found = {rate: results[self.path(job)] for rate, job in jobs.items()}
                    self.rates[cell_name] = {rate: (r.get("quality") or {}).get("mean") for rate, r in found.items()}
                costs = {name: self.cost(cell) for name, cell in chains.items()}
                stale = {name for name, pair in costs.items() if not all(self.path(job).exists() for job in pair)}
                if any(self.has_twin(chains[name]) for name in stale):
                    write_twin(self.scratch / "twin", "pebble")
                parallel: list[tuple[Any, ...]] = []
                for cell in cells:
                    name = f"{cell.row.name}{' shuffled' * cell.shuffle} on {cell.task.name}"
                    parallel.append((name, self.quality(cell)))
                    parallel += [(f"{name}, {n} rows", self.quality(cell, n)) for n in self.sizes(cell)]
                parallel += [(f"{chains[n].row.name}: memory", pair[0], n in stale) for n, pair in costs.items()]
                together(parallel)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
            for name, pair in costs.items():
                finish(f"{chains[name].row.name}: latency", pair[1], name in stale)

        measured = []
        for cell in cells:
            of_cell = (self.quality(cell), *costs[self.chain(cell)])
            measured.append((cell, (*(results[self.path(job)] for job in of_cell), self.found(cell, results))))
        return measured

    def finished(self, job: Job, free: SimpleQueue[Launcher], again: bool) -> tuple[Job, str]:
        """The job's result, kept or from running it (`again`: even if kept), and what to say of it."""
        path = self.path(job)
        if path.exists() and not again:
            return read_json(path), "kept"
        limited = {**job, "memory_limit": self.config.memory_limit}
        result = run_job(limited, self.scratch, self.config.timeout, free)
        if result["status"] == "ok":
            write_json(result, path)
        return result, ": ".join(part for part in (result["status"], result["error"]) if part)

    def found(self, cell: Cell, results: dict[Path, Job]) -> Job:
        """A cell's learning rate, the trials that led to it, and its [examples, mean, spread] by number of examples."""
        counts = self.sizes(cell)
        by_count = {n: results[self.path(self.quality(cell, n))] for n in counts}
        if counts:
            by_count[len(cell.task.train)] = results[self.path(self.quality(cell))]
        curve = [[n, r["quality"]["mean"], r["quality"]["spread"]] for n, r in by_count.items() if "quality" in r]
        trials = self.rates.get((cell.row.name, cell.task.name), {})
        return {"learning_rate": self.rate(cell), "trials": trials, "examples": sorted(curve)}
