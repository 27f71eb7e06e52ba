"""One piece of a comparison, run in a process of its own by `bench.launcher`. Kinds of jobs:
"quality" trains and measures one chain on one task over all seeds, "fit" measures training memory and writes the
artefact that "serve", in a fresh process, loads to measure memory and latency.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from burnish import chain, device
from burnish.bench import strategy_job
from burnish.bench.latency import LatencyConfig, latency
from burnish.bench.measure import measure
from burnish.bench.tasks import load_task, parse_task, shuffled
from burnish.config import UserError, from_mapping
from burnish.engine.settings import TrainConfig
from burnish.engine.train import train
from burnish.model.bundle import Context, Model
from burnish.model.example import Example
from burnish.store.checkpoint import load, save
from burnish.store.hub import resolve
from burnish.store.identity import stored_bytes
from burnish.store.tensors import write_json

Job = Mapping[str, Any]


def artifact_bytes(model: Model, folder: Path) -> int:
    """Bytes of the tensors that `save` writes for the model, or of the base itself where nothing was applied."""
    if not model.chain:
        return stored_bytes(resolve(model.path))
    return stored_bytes(save(model, folder))


def parameters(model: Model) -> dict[str, Any]:
    """How much of the model trains."""
    count = sum(p.numel() for p in model.trainable().values())
    return {"trainable_parameters": count, "trainable_share": count / max(1, model.parameter_count())}


def quality(job: Job) -> dict[str, Any]:
    """Train (if anything trains and `train` is given) and measure, for every seed."""
    task = load_task(parse_task(job["task"]))
    scores: list[float] = []
    seconds: list[float] = []
    curves: list[list[tuple[int, float]]] = []
    result: dict[str, Any] = {}
    seeds = job["seeds"] if job["train"] is not None else job["seeds"][:1]
    for seed in seeds:
        torch.manual_seed(seed)
        model = load(job["model"], device=device.pick_device(), techniques=job["techniques"])
        examples = []
        if job["train"] is not None:
            examples = task.encode(model, shuffled(task, seed) if job.get("shuffle") else task.train)
        chain.apply(model, job["techniques"], Context(seed=seed, examples=examples))
        result = result or parameters(model)
        if job["train"] is not None:
            settings = from_mapping(TrainConfig, {**job["train"], "seed": seed}, "row")
            done = train(model, examples, settings)
            seconds.append(done.seconds)
            curves.append(done.losses)
            chain.finalize(model)
        scores.append(measure(model, task))
        if "artifact_bytes" not in result:
            with tempfile.TemporaryDirectory() as folder:
                result["artifact_bytes"] = artifact_bytes(model, Path(folder))
    spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
    result["quality"] = {"metric": task.metric, "mean": statistics.fmean(scores), "spread": spread, "seeds": scores}
    result["train_seconds"] = statistics.fmean(seconds) if seconds else None
    result["curve"] = [
        [points[0][0], statistics.fmean(loss for _, loss in points)] for points in zip(*curves, strict=True)
    ]
    return result


def fit(job: Job) -> dict[str, Any]:
    """Apply the chain, take two training steps of `shape` [rows, tokens] where something trains, save."""
    device.return_freed_memory()  # else what training gives back would be missing from the difference
    before = device.resident_memory()
    device.reset_peak_memory()
    model = load(job["model"], device=device.pick_device(), techniques=job["techniques"])
    result: dict[str, Any] = {"train_memory_bytes": None}
    examples: list[Example] = []
    rows, tokens = job["shape"]
    if job["train"] is not None:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(5, model.spec.vocab_size, (2 * rows, tokens), generator=generator).tolist()
        label = 0 if model.spec.head == "classification" or chain.exchanges_head(job["techniques"]) else None
        fields = {"prompt": "", "completion": ""}
        known = tokens // 2 if model.spec.paired else 1
        plain = [Example(row, [-100] * known + row[known:], dict(fields), label=label) for row in ids]
        examples = [replace(example, choices=[example]) for example in plain]  # for a loss that compares two
    chain.apply(model, job["techniques"], Context(examples=examples))
    if model.trainable() and examples:
        settings = {**job["train"], "max_steps": 2, "per_device_train_batch_size": rows, "logging_steps": 1}
        began = time.perf_counter()
        train(model, examples, from_mapping(TrainConfig, settings, "row"))
        result["train_tokens_per_second"] = 2 * rows * tokens / (time.perf_counter() - began)
        result["train_memory_bytes"] = device.peak_memory() - before
        chain.finalize(model)
    if model.chain:
        save(model, job["artifact"])
    return result


def serve(job: Job) -> dict[str, Any]:
    """Load the artefact (the model itself for an empty chain) and time requests."""
    device.return_freed_memory()  # else what training gives back would be missing from the difference
    before = device.resident_memory()
    device.reset_peak_memory()
    model = load(job["artifact"] if job["techniques"] else job["model"], device=device.pick_device())
    result = latency(model, from_mapping(LatencyConfig, job["latency"], "latency"))
    return result | {"inference_memory_bytes": device.peak_memory() - before}


KINDS = {"quality": quality, "fit": fit, "serve": serve, "bench": strategy_job.requests, "limits": strategy_job.limits}
OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "DefaultCPUAllocator",
    "Cannot allocate memory",
    "Thread creation failed",
)


def limit_memory(count: int) -> None:
    """Let this process allocate `count` bytes more than it has now (Linux; elsewhere nothing happens)."""
    import resource

    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmData"))
        limit = int(line.split()[1]) * 1024 + count
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def main(job_path: str, result_path: str) -> int:
    """Run the job and write {"status", "error", ...}; the exit status is 0 whenever a result was written."""
    job = json.loads(Path(job_path).read_text())
    torch.set_num_threads(job["threads"])
    if job.get("memory_limit"):
        limit_memory(int(job["memory_limit"]))
    try:
        result = {"status": "ok", "error": None, **KINDS[job["kind"]](job)}
    except UserError as error:
        result = {"status": "failed", "error": str(error), "refused": True}
    except (RuntimeError, MemoryError) as error:
        oom = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(x in str(error) for x in OUT_OF_MEMORY)
        if not oom and os.environ.get("BURNISH_DEBUG"):
            raise
        first = (str(error) or "out of memory").strip().splitlines()[0]
        result = {"status": "oom" if oom else "failed", "error": first}
    write_json(result, Path(result_path))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
