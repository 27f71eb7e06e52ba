"""Continuous batching under random requests that come, go, are given up and fail."""

from __future__ import annotations

import os
import random

import pytest
from test_batching import alone, batcher, drawn, load_for
from test_batching_failures import PATHS, assert_known_blocks_are_numbers, break_token, outcome

from burnish.engine.decoding import GenerationConfig
from burnish.model.example import IGNORE, Example
from burnish.native import decode

SOAK = int(os.environ.get("BURNISH_SOAK", "200"))  # random requests; 2000 take minutes a test
BROKEN = 5  # what is read after this token gives NaN


def request_of(draw: random.Random, texts: list[list[int]]) -> tuple[Example, GenerationConfig]:
    """A prompt, which may begin as others do, and its settings."""
    ids = [*draw.choice(texts)[: draw.randrange(31)], *drawn(draw.random(), draw.randrange(1, 12)).ids]
    if draw.random() < 0.05:
        ids[draw.randrange(len(ids))] = BROKEN
    config = GenerationConfig(
        max_new_tokens=draw.randrange(1, 12), do_sample=draw.random() < 0.5, seed=draw.randrange(9)
    )
    return Example(ids, [IGNORE] * len(ids)), config


@PATHS
@pytest.mark.parametrize("pages", ["auto", "int8"])
def test_soak(root, monkeypatch, path, pages):
    """What comes of every request is what comes of it alone, in pages of 8 bits too, and all blocks come back."""
    model, draw, calls, run = load_for(root, path, "mistral"), random.Random(1), [], decode.Layers.run
    break_token(model, BROKEN)
    monkeypatch.setattr(decode.Layers, "run", lambda *given, **named: calls.append(1) or run(*given, **named))
    options = {"blocks": 24, "max_batch_size": 5, "max_batch_tokens": 11, "kv_cache_dtype": pages}
    pool = batcher(model, **options)
    texts = [drawn(seed, 30).ids for seed in range(3)]
    requests = []
    while len(requests) < SOAK or pool.busy:
        for _ in range(draw.choice((0, 0, 0, 1, 1, 5)) if len(requests) < SOAK else 0):
            prompt, config = request_of(draw, texts)
            requests.append((pool.submit(prompt, config), prompt, config))
        pool.step()
        if draw.random() < 0.03:
            draw.choice(requests)[0].cancel()
    assert pool.blocks.available == pool.blocks.count and pool.again and bool(calls) == (path == "in C")
    assert_known_blocks_are_numbers(pool)

    def by_itself(prompt, config):
        if pages == "auto":
            return alone(model, prompt, config)
        return batcher(model, **options).submit(prompt, config).result()  # what 8 bits change, they change alone too

    found = [outcome(request.result) for request, *_ in requests]
    for came, (request, *given) in zip(found, requests, strict=True):
        assert request.cancelled if came is None else came == outcome(lambda given=given: by_itself(*given))
    assert found.count(None) < SOAK / 3 and SOAK / 50 < sum(isinstance(came, str) for came in found) < SOAK / 3
