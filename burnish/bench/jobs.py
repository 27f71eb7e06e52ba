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
from burnish.bench.rows import Cell, learning_rate
from burnish.bench.twin import write_twin
from burnish.config import to_mapping
from burnish.store.checkpoint import read_json
from burnish.store.identity import identity
from burnish.store.tensors import write_json

if TYPE_CHECKING:
    from burnish.bench.compare import CompareConfig

Job = dict[str, Any]
PLACES = ("model", "artifact")  # parts of a job that say where things lie, not what they are


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
    """The jobs of one comparison of `model`, with files in `scratch` while it runs."""

    def __init__(self, config: CompareConfig, model: Path, scratch: Path, twin: bool):
        self.config, self.model, self.scratch = config, model, scratch
        self.cost_model = scratch / "twin" if twin else model
        self.twin = twin
        self.identity = identity(model)
        self.cores = os.cpu_count() or 1
        self.workers = config.workers or min(4, self.cores)
        self.threads = max(1, self.cores // self.workers)
        self.folder = config.output_dir / "jobs"
        if config.overwrite and self.folder.exists():
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def training(self, cell: Cell) -> dict[str, Any] | None:
        """The training settings of a cell, None for one that does not train."""
        config, rate = self.config, learning_rate(cell.row, cell.task.name)
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

    def quality(self, cell: Cell) -> Job:
        """The job that trains and measures a cell."""
        job = {"kind": "quality", "model": str(self.model), "techniques": cell.techniques, "shuffle": cell.shuffle}
        seeds = self.config.seeds[:1] if cell.shuffle else self.config.seeds  # a control needs no spread
        settings = {"task": to_mapping(cell.task.config), "seeds": seeds, "train": self.training(cell)}
        return {**job, **settings, "threads": self.threads}

    def cost(self, cell: Cell) -> tuple[Job, Job]:
        """The jobs that measure a chain's training memory, and its artefact's latency."""
        artifact = str(self.scratch / f"artifact-{key(cell.techniques)}")
        common = {"model": str(self.cost_model), "techniques": cell.techniques, "artifact": artifact}
        fit = {**common, "kind": "fit", "threads": self.threads, "shape": self.config.shape}
        serve = {**common, "kind": "serve", "threads": self.cores, "latency": self.config.latency}
        return {**fit, "train": self.training(cell)}, serve

    def path(self, job: Job) -> Path:
        """Where the job's result is kept."""
        stable = {name: value for name, value in job.items() if name not in PLACES}
        data = [file_digest(job["task"][name]) for name in ("data", "eval_data")] if "task" in job else []
        return self.folder / f"{key([stable, self.identity, self.twin, data])}.json"

    def run(self, cells: list[Cell], progress: Callable[[str], None]) -> list[tuple[Cell, tuple[Job, Job, Job]]]:
        """Run what is not kept; every cell with the results of its quality, fit and serve jobs."""
        chains = {key(cell.techniques): cell for cell in reversed(cells) if not cell.shuffle}
        costs = {name: self.cost(cell) for name, cell in chains.items()}
        stale = {name for name, pair in costs.items() if not all(self.path(job).exists() for job in pair)}
        parallel = [(f"{c.row.name}{' shuffled' * c.shuffle} on {c.task.name}", self.quality(c), False) for c in cells]
        parallel += [(f"{chains[n].row.name}: memory", pair[0], n in stale) for n, pair in costs.items()]
        alone = [(f"{chains[n].row.name}: latency", pair[1], n in stale) for n, pair in costs.items()]
        total, results = len(parallel) + len(alone), {}

        def finish(free: SimpleQueue[Launcher], name: str, job: Job, again: bool) -> None:
            path = self.path(job)
            kept = path.exists() and not again
            if kept:
                result = read_json(path)
            else:
                limited = {**job, "memory_limit": self.config.memory_limit}
                result = run_job(limited, self.scratch, self.config.timeout, free)
                if result["status"] == "ok":
                    write_json(result, path)
            results[path] = result
            said = "kept" if kept else ": ".join(part for part in (result["status"], result["error"]) if part)
            progress(f"[{len(results)}/{total}] {name}: {said}")

        if stale and self.twin:
            write_twin(self.cost_model, str(self.model))
        with launchers(self.workers) as free:
            pool = ThreadPoolExecutor(self.workers)
            try:
                for future in [pool.submit(finish, free, *item) for item in parallel]:
                    future.result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
            for item in alone:
                finish(free, *item)
        found = []
        for cell in cells:
            pair = costs[key(cell.techniques)]
            found.append((cell, tuple(results[self.path(job)] for job in (self.quality(cell), *pair))))
        return found  # type: ignore[return-value]
