"""Batched steps over pages go through the fast path and give what the layers give."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_fused import CAPPED, WIDE, folders, steps  # noqa: F401 fixtures

from burnish import chain
from burnish.engine.batching import BatchConfig, Batcher
from burnish.engine.decoding import GenerationConfig
from burnish.engine.generate import generate
from burnish.model.example import IGNORE, Example
from burnish.model.pages import Pages, Step, View
from burnish.place.fused import fused
from burnish.store.checkpoint import load

COUNT, TABLES, LENGTHS = 5, [[3, 1, 7, 0, 6], [2, 5, 4]], [13, 4]
CONFIG = GenerationConfig(max_new_tokens=12, min_new_tokens=12)
PROMPTS = [[7, 8, 9, 10, 11, 12, 13], [20, 21, 22], [30], [7, 9, 11, 20, 22, 8, 14, 15, 16, 9]]
EXAMPLES = [Example(ids, [IGNORE] * len(ids), fields={"prompt": ""}) for ids in PROMPTS]


def loud(folder, techniques=(), dtype=torch.float32):
    """A model whose layers say more than its embeddings."""
    model = load(folder, dtype)
    with torch.no_grad():
        for parameter in model.net.layers.parameters():
            parameter.mul_(4 if parameter.dim() > 1 else 1)
    return chain.apply(model, techniques)


@torch.inference_mode()
def decoded(model, int8: bool = False):
    """States of tokens fed one by one to two rows of unlike length, and what is then in their pages."""
    pool = Pages(model.spec, 8, 4, model.net.dtype, torch.device("cpu"), int8)
    for table, length in zip(TABLES, LENGTHS, strict=True):
        view = View(pool, [table], [length], length, [0])
        chain.forward(model, {"input_ids": torch.arange(7, 7 + length)[None]}, Step([view]))
    states = []
    for step in range(1, COUNT + 1):
        view = View(pool, TABLES, [length + step for length in LENGTHS], 1, [0, 0])
        ids = torch.tensor([[10 + step, 20 + step]])
        states.append(chain.forward(model, {"input_ids": ids}, Step([view])))
    kept = [part for layer in range(model.spec.num_layers) for part in pool.read(layer, view.slots)]
    return torch.cat(states), torch.stack(kept)


@pytest.mark.parametrize("family", WIDE)
def test_states_are_the_layers(folders, family, steps):  # noqa: F811
    model = load(folders[family], torch.float32)
    want = decoded(model)
    with fused(model.net):
        got = decoded(model)
    assert (sum(steps) == COUNT * len(model.net.layers)) == (family not in CAPPED)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen3", "bloom", "falcon"])
def test_int8_pages(folders, family, steps):  # noqa: F811
    """A code may be the next one where a rounding before it decides."""
    model = loud(folders[family])
    exact, want = decoded(model), decoded(model, int8=True)
    with fused(model.net):
        got = decoded(model, int8=True)
    assert sum(steps) == COUNT * len(model.net.layers)
    for mine, theirs, true in zip(got, want, exact, strict=True):
        assert (mine - theirs).norm() < 0.2 * (theirs - true).norm()
        assert 0 < (mine - true).norm() < 0.03 * true.norm()


@pytest.mark.parametrize("family", ["llama", "bloom", "gpt2"])
def test_in_bfloat16_it_is_nearer_to_float32_than_the_layers(folders, family, steps):  # noqa: F811
    model = load(folders[family], torch.bfloat16)
    plain = decoded(model)[0]
    with fused(model.net):
        got = decoded(model)[0]
    assert sum(steps) == COUNT * 2
    model.net.compute_dtype = torch.float32
    want = decoded(model)[0]
    errors = [(states.float() - want).norm() / want.norm() for states in (plain, got)]
    assert errors[1] < 1.1 * errors[0] and errors[1] < 2e-2, errors


CASES = {
    "mistral": ("mistral", []),
    "gemma3_text": ("gemma3_text", []),
    "bloom": ("bloom", []),
    "gpt2": ("gpt2", []),
    "prefix": ("llama", [{"prefix_tuning": {"num_virtual_tokens": 3}}]),
    "prefix, bias": ("bloom", [{"prefix_tuning": {"num_virtual_tokens": 3}}]),
    "window": ("llama", [{"sparse_attention": {"pattern": "window", "sliding_window": 3}}]),
    "blocks": ("llama", ["prefix_tuning", {"sparse_attention": {"block_size": 2, "global_blocks": 1}}]),
    "a wrapped layer": ("llama", [{"lora": {"target_modules": ["layers.0.self_attn.q_proj"], "r": 4}}]),
    "int8": ("llama", ["int8"]),
    "fp8": ("llama", ["fp8"]),
}


def served(model, config=CONFIG, blocks: int = 60, **options):
    """Replies to the prompts together, in a pool of so many blocks of 4 tokens."""
    size = Pages.bytes_of(model.spec, 4, model.net.dtype, options.get("kv_cache_dtype") == "int8")
    pool = Batcher(model, BatchConfig(kv_memory=blocks * size, block_size=4, **options))
    requests = [pool.submit(prompt, config) for prompt in EXAMPLES]
    return [request.result().ids for request in requests]


@pytest.mark.parametrize("case", CASES)
def test_replies_are_those_alone_by_modules(folders, case, steps):  # noqa: F811
    family, techniques = CASES[case]
    model = loud(folders[family], techniques)
    for parameter in model.trainable().values():
        parameter.data.normal_(0, 0.5, generator=torch.Generator().manual_seed(parameter.numel()))
    plain = replace(CONFIG, fused=False)
    want = [generate(model, [prompt], plain)[0].ids for prompt in EXAMPLES]
    assert len(set(map(tuple, want))) == 4
    assert served(model, plain) == want and not steps
    assert served(model) == want and sum(steps) >= 10 * (1 if "wrapped" in case else len(model.net.layers))
    assert model.net.run_layers is None
    steps.clear()
    assert served(model, blocks=9, max_batch_tokens=6, max_batch_size=4) == want and steps  # some are sent back


def test_one_that_asks_for_modules_gets_them(folders, steps):  # noqa: F811
    model = loud(folders["llama"])
    pool = Batcher(model, BatchConfig(kv_memory=1 << 20))
    pool.submit(EXAMPLES[0], CONFIG)
    plain = pool.submit(EXAMPLES[1], replace(CONFIG, max_new_tokens=3, min_new_tokens=3, fused=False))
    while not plain.over:
        pool.step()
    assert not steps
    pool.step()
    assert sum(steps) == len(model.net.layers)


def test_what_changed_while_nothing_ran_counts(folders, steps):  # noqa: F811
    model = loud(folders["llama"])
    pool = Batcher(model, BatchConfig(kv_memory=1 << 20))
    first = pool.submit(EXAMPLES[0], CONFIG).result()
    model = chain.apply(model, {"lora": {"target_modules": ["layers.0.self_attn.q_proj"], "r": 4}})
    for parameter in model.trainable().values():
        parameter.data.normal_(0, 1, generator=torch.Generator().manual_seed(1))
    fresh = Batcher(model, BatchConfig(kv_memory=1 << 20)).submit(EXAMPLES[3], CONFIG).result()
    assert pool.submit(EXAMPLES[3], CONFIG).result() == fresh != first
