"""The jobs behind `burnish bench`: one strategy's requests, and the machine's limits."""

from __future__ import annotations

import json
import math
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from burnish import chain, device
from burnish.bench.rows import Result
from burnish.compress.gguf import Table
from burnish.config import UserError
from burnish.engine.decoding import GenerationConfig
from burnish.engine.generate import Prompt, stream
from burnish.model.bundle import Model
from burnish.model.example import IGNORE, Example
from burnish.model.linear import Weight
from burnish.native import choice, products
from burnish.place.choice import placed, ranks_of
from burnish.store.checkpoint import load
from burnish.store.hub import resolve
from burnish.store.identity import stored_bytes

READ = 1 << 30  # bytes read to measure the bandwidth
SIDE = 2048  # of the matrices multiplied to measure the rate
DECODER = re.compile(r"(^|\.)decoder\.")  # of an encoder-decoder
SOURCE = re.compile(r"(cross|encoder)_attn\.[kv]_proj\.")  # its part that is multiplied with the source, once
ROOM = 256 << 20  # bytes for an offloaded model's tokenizer and for what it works with


def requests(job: Result) -> dict[str, Any]:
    """Load the model as a strategy runs it and time its requests at every batch size; over ranks in a process each."""
    if job["ranks"] > 1 and "RANK" not in os.environ:
        return over_ranks(job)
    device.return_freed_memory()
    device.reset_peak_memory()
    before = device.resident_memory()
    began = time.perf_counter()
    place = job["place"] if job["place"] != "offload" else None
    with ranks_of(place) as ranks:
        where, kind = ranks.device, device.parse_dtype(job["dtype"] or None)
        limit = None
        if job["place"] == "offload":
            limit = job["offload_limit"] or half_beside(job["model"], where)
        model = load(
            job["model"], kind, where, techniques=job["techniques"], unread=place is not None, memory_limit=limit
        )
        placed(chain.apply(model, job["techniques"]), place, ranks)
        loaded = time.perf_counter() - began
        result: dict[str, Any] = {"load_seconds": loaded, "new_tokens": job["new_tokens"], **weights(model)}
        result["batches"] = [batch(model, job, size) for size in job["batch_sizes"]]
        result["kernels"] = choice.used()
    return result | {"peak_memory_bytes": device.peak_memory(where) - (before if where.type == "cpu" else 0)}


def half_beside(model: str, where: torch.device) -> int:
    """Bytes that leave room for half of a model, and for a little to work with."""
    base = torch.cuda.memory_allocated(where) if where.type == "cuda" else device.resident_memory()
    return base + stored_bytes(resolve(model)) // 2 + ROOM


def over_ranks(job: Result) -> dict[str, Any]:
    """The job in `ranks` processes: the first one's times, and the memory and weights of all. Raises RuntimeError with
    what the ranks said last where one failed, UserError where they refused what they were given."""
    count = job["ranks"]
    with tempfile.TemporaryDirectory() as scratch, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        given = Path(scratch) / "job.json"
        given.write_text(json.dumps({**job, "threads": max(1, job["threads"] // count)}))
        started = []
        for rank in range(count):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1"}
            environment = {**os.environ, **{name: str(x) for name, x in place.items()}, "MASTER_PORT": str(port)}
            command = [sys.executable, "-m", "burnish.bench.job", str(given), str(Path(scratch) / f"{rank}.json")]
            with open(Path(scratch) / f"{rank}.log", "wb") as log:
                started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        try:
            codes = [process.wait() for process in started]
        finally:
            for process in started:
                process.kill()
        results = [Path(scratch) / f"{rank}.json" for rank in range(count)]
        found = [json.loads(path.read_text()) for path in results if path.exists()]
        failed = [one for one in found if one["status"] != "ok"]
        said = [one["error"] for one in failed]
        for path in sorted(Path(scratch).glob("*.log")):
            said += [line for line in path.read_text(errors="replace").split("\n") if any(codes) and line.strip()][-1:]
    if said or any(codes):
        alone = set(codes) <= {0, 2} and len(said) == len(failed)  # the other ranks end silently, with 2
        refused = alone and all(one.get("refused") for one in failed)
        raise (UserError if refused else RuntimeError)(
            "; ".join(dict.fromkeys(said)) or f"the ranks ended with status {codes}"
        )
    memory = [one["peak_memory_bytes"] for one in found]
    summed = {name: sum(one[name] for one in found) for name in ("weight_bytes", "prompt_weights", "answer_weights")}
    devices = count if torch.cuda.is_available() else 1
    return {**found[0], **summed, "peak_memory_bytes": max(memory), "rank_memory_bytes": memory, "devices": devices}


def batch(model: Model, job: Result, size: int) -> dict[str, Any]:
    """Times of requests of `size` equal prompts, in milliseconds, and what the first of them was answered."""
    count = job["new_tokens"]
    settings = GenerationConfig(max_new_tokens=count, min_new_tokens=count, batch_size=size, fused=job["fused"])
    prompt: Prompt = job["prompt"]
    if job["prompt_tokens"]:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(10, model.spec.vocab_size, (job["prompt_tokens"],), generator=generator).tolist()
        prompt = Example(ids, [IGNORE] * len(ids), fields={"prompt": ""})
    first, total, text, read = [], [], "", 0
    for number in range(job["warmups"] + job["runs"]):
        start = device.clock(model.device)
        begun = 0.0
        for piece in stream(model, [prompt] * size, settings):
            begun = begun or device.clock(model.device) - start
            if piece.done and piece.row == 0:
                text, read = piece.done.text, piece.done.prompt_tokens
        if number >= job["warmups"]:
            first.append(1000 * begun)
            total.append(1000 * (device.clock(model.device) - start))
    return {"first_ms": first, "total_ms": total, "text": text, "prompt_tokens": read}


def weights(model: Model) -> dict[str, int]:
    """The bytes of weights that one token of decoding reads; how many weights of matrices every token of a prompt is
    multiplied with; and how many are multiplied once in a row, for its answer: the head, and a decoder beside an
    encoder. Of an embedding rows are looked up: it counts only where it is the head too."""
    net, paired = model.net, model.spec.paired
    head = {of(p) for module in net.head_modules() for p in module.parameters()}
    counted = {of(p) for m in net.modules() if isinstance(m, nn.Embedding | Table) for p in m.parameters()} - head
    sizes = {of(p): p.numel() if p.dim() > 1 else 0 for p in net.parameters()}
    for weight in (m for m in net.modules() if isinstance(m, Weight)):  # a quantised one has several parameters
        sizes |= dict.fromkeys(map(of, weight.parameters()), 0)
        sizes[of(next(weight.parameters()))] = math.prod(weight.shape)
    found = {"weight_bytes": 0, "prompt_weights": 0, "answer_weights": 0}
    for path, parameter in net.named_parameters():
        part = of(parameter)
        if part not in counted:
            counted.add(part)
            answers = part in head or (paired and bool(DECODER.search(path)) and not SOURCE.search(path))
            found["answer_weights" if answers else "prompt_weights"] += sizes[part]
            found["weight_bytes"] += parameter.nbytes * (answers or not paired)
    return found


def of(parameter: torch.Tensor) -> int:
    """What tells a storage from others; an offloaded one has none."""
    return parameter.data_ptr() or id(parameter)


def limits(job: Result) -> dict[str, Any]:
    """The bandwidth of reading memory, and the rate of matrix products in the dtype of the activations."""
    where = device.pick_device()
    kind = device.parse_dtype(job["dtype"] or None) or torch.bfloat16
    if where.type == "cpu" and not device.multiplies_bfloat16():
        kind = torch.float32
    block = torch.ones(READ // 4, dtype=torch.float32, device=where)
    native = where.type == "cpu" and products.usable(where, torch.float32)
    seconds = fastest((lambda: products.read_memory(block)) if native else block.sum, where)
    a, b = (torch.randn(SIDE, SIDE, device=where).to(kind) for _ in range(2))
    multiplied = fastest(lambda: a @ b, where)
    return {
        "read_bytes_per_second": READ / seconds,
        "operations_per_second": 2 * SIDE**3 / multiplied,
        "dtype": str(kind).removeprefix("torch."),
    }


def fastest(work: Callable[[], Any], where: torch.device, times: int = 6) -> float:
    """The least seconds that it took."""
    found = []
    for _ in range(times):
        start = device.clock(where)
        work()
        found.append(device.clock(where) - start)
    return min(found)
