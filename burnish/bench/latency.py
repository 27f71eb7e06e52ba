"""How fast a model answers: repeated runs of the same request, timed with a synchronised clock."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from burnish import chain, device
from burnish.engine.generate import GenerationConfig, generate
from burnish.engine.order import collated, encode
from burnish.model.bundle import Model
from burnish.model.example import IGNORE, Example


@dataclass(frozen=True)
class LatencyConfig:
    """One request: a prompt of random tokens, then `new_tokens` greedy ones; a model that does not generate runs one
    forward over the prompt."""

    prompt_tokens: int = 64
    new_tokens: int = 16
    warmups: int = 2
    runs: int = 10


def latency(model: Model, config: LatencyConfig = LatencyConfig()) -> dict[str, Any]:
    """{latency_ms: {mean, std, p50, p95}, tokens_per_second, energy_joules of all timed runs or None}.

    Tokens per second count new tokens for a generating model and prompt tokens for others.
    """
    generator = torch.Generator().manual_seed(0)
    low = min(10, model.spec.vocab_size - 1)
    ids = torch.randint(low, model.spec.vocab_size, (config.prompt_tokens,), generator=generator).tolist()
    example = Example(ids, [IGNORE] * len(ids), fields={"prompt": ""})
    model.net.eval()
    if model.spec.generates:
        count = config.new_tokens
        settings = GenerationConfig(max_new_tokens=count, min_new_tokens=count)

        def request() -> None:
            generate(model, [example], settings)
    else:
        count = config.prompt_tokens
        batch = collated(model, encode(model, [example]))

        @torch.inference_mode()
        def request() -> None:
            hidden = chain.forward(model, {name: t.to(model.device) for name, t in batch.items()})
            if model.spec.head == "classification":
                model.net.logits(model.net.pool(hidden, batch["attention_mask"].to(model.device)))

    for _ in range(config.warmups):
        request()
    times = []
    joules = device.energy_joules()
    for _ in range(config.runs):
        start = device.clock(model.device)
        request()
        times.append(1000 * (device.clock(model.device) - start))
    after = device.energy_joules()
    mean = statistics.fmean(times)
    return {
        "latency_ms": summary(times),
        "tokens_per_second": 1000 * count / mean,
        "energy_joules": None if joules is None or after is None else after - joules,
    }


def summary(times: Sequence[float]) -> dict[str, float]:
    """Mean, standard deviation, median and 95th percentile of times, in their unit."""
    ordered = sorted(times)
    return {
        "mean": statistics.fmean(ordered),
        "std": statistics.stdev(ordered) if len(ordered) > 1 else 0.0,
        "p50": statistics.median(ordered),
        "p95": ordered[round(0.95 * (len(ordered) - 1))],
    }
