"""The jobs behind `burnish bench`: one strategy's requests, and the machine's limits."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from burnish import chain, device
from burnish.bench.rows import Result
from burnish.engine.decoding import GenerationConfig
from burnish.engine.generate import Prompt, stream
from burnish.model.bundle import Model
from burnish.model.example import IGNORE, Example
from burnish.native import products
from burnish.store.checkpoint import load

READ = 1 << 30  # bytes read to measure the bandwidth
SIDE = 2048  # of the matrices multiplied to measure the rate


def requests(job: Result) -> dict[str, Any]:
    """Load the model by a strategy's chain and time its requests at every batch size."""
    device.return_freed_memory()
    device.reset_peak_memory()
    before = device.resident_memory()
    began = time.perf_counter()
    where = device.pick_device()
    model = load(job["model"], device.parse_dtype(job["dtype"] or None), where, techniques=job["techniques"])
    chain.apply(model, job["techniques"])
    loaded = time.perf_counter() - began
    result: dict[str, Any] = {"load_seconds": loaded, "new_tokens": job["new_tokens"], **weights(model)}
    result["batches"] = [batch(model, job, size) for size in job["batch_sizes"]]
    return result | {"peak_memory_bytes": device.peak_memory(where) - (before if where.type == "cpu" else 0)}


def batch(model: Model, job: Result, size: int) -> dict[str, Any]:
    """Times of requests of `size` equal prompts, in milliseconds, and what the first of them was answered."""
    count = job["new_tokens"]
    settings = GenerationConfig(max_new_tokens=count, min_new_tokens=count, batch_size=size)
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
    """The bytes of weights that one token of decoding reads, and how many weights a token is multiplied with: all but
    an embedding that is not the head's too."""
    table = model.net.embed_tokens.weight
    sizes = {p.data_ptr(): p.numel() * p.element_size() for p in model.net.parameters()}
    heads = {p.data_ptr() for module in model.net.head_modules() for p in module.parameters()}
    apart = table.data_ptr() not in heads
    bare = sizes[table.data_ptr()] * apart
    return {
        "weight_bytes": sum(sizes.values()) - bare,
        "multiplied_weights": model.parameter_count() - table.numel() * apart,
    }


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
