"""Continuous batching: every request gets the reply that it gets alone, whatever else runs, and the pool keeps its
bounds."""

from __future__ import annotations

import random
import threading
from collections import Counter
from dataclasses import replace

import pytest
import tiny
import torch
from test_generate import CHAINS, LONG, PROMPTS, example, load

import burnish
from burnish import chain
from burnish.config import UserError
from burnish.engine.batching import BatchConfig, Batcher
from burnish.engine.decoding import GenerationConfig
from burnish.engine.generate import generate
from burnish.model.example import IGNORE, Example
from burnish.model.pages import Pages, Step, View, quantize
from burnish.native import paged, products
from burnish.place.fused import stepper_of
from burnish.store.checkpoint import save

WIDE = {"hidden_size": 64, "intermediate_size": 64}  # the least that the fast path knows


class Watched(Batcher):
    """A batcher that checks its books before every forward, and keeps what was fed: {request: tokens} a step."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.log: list[dict[int, int]] = []
        self.again = 0  # prompts read once more, after a preemption

    def _forward(self, feeds):
        size, blocks = self.config.block_size, self.blocks
        users = Counter(block for request in self.running for block in request.table)
        assert not any(request.table for request in self.waiting)
        assert [users[block] for block in range(blocks.count)] == blocks.users
        assert blocks.available == sum(not count for count in blocks.users)
        assert self.pages.nbytes <= self.config.kv_memory
        assert len(self.running) <= self.config.max_batch_size
        assert sum(feeds.values()) <= self.config.max_batch_tokens
        for request, count in feeds.items():
            written = request.table[request.fed // size : (request.fed + count - 1) // size + 1]
            assert all(users[block] == 1 for block in written)
            self.again += request.left > 1 and bool(request.row.ids) and count == request.left
        self.log.append({request.row.index: count for request, count in feeds.items()})
        return super()._forward(feeds)


def batcher(model, blocks: int = 200, **options) -> Watched:
    """With a pool of so many blocks."""
    config = BatchConfig(**{"block_size": 4, **options})
    dtype, int8 = model.net.dtype, config.kv_cache_dtype == "int8"
    return Watched(
        model, replace(config, kv_memory=blocks * Pages.bytes_of(model.spec, config.block_size, dtype, int8))
    )


def alone(model, prompt, config, adapters=None):
    return generate(model, [prompt], config, adapters)[0]


def load_for(root, path: str, family: str = "llama"):
    """A tiny model for which the fast path is as `path` says: "in C", or "as modules"."""
    model = load(root, family, **(WIDE if path == "in C" else {}))
    if path == "in C" and products.library() is None:
        pytest.skip("no compiler")
    assert (stepper_of(model.net) is not None) == (path == "in C")
    return model


def drawn(seed: int, length: int) -> Example:
    draw = random.Random(seed)
    return Example([draw.randrange(6, 50) for _ in range(length)], [IGNORE] * length)


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("family", tiny.DECODERS)
def test_every_family_and_technique(root, family, chain):
    model = load(root, family, CHAINS[chain])
    lengths = [None, 1, 0, 3] if chain != "plain" else [None] * 4
    prompts = [example(model, text, length) for text, length in zip(PROMPTS, lengths, strict=True)]
    config = replace(LONG, max_new_tokens=8, min_new_tokens=8)
    want = generate(model, prompts, config)
    for options in ({}, {"max_batch_tokens": 5, "max_batch_size": 3, "block_size": 3}):
        pool = batcher(model, **options)
        requests = [pool.submit(prompt, config) for prompt in prompts]
        assert [request.result() for request in requests] == want


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
def test_without_the_kernel(root, family, monkeypatch):
    model = load(root, family)
    assert products.library() is None or paged.takes(torch.zeros(1, 2, model.spec.head_dim))
    monkeypatch.setattr(paged, "takes", lambda q: False)
    pool = batcher(model)
    requests = [pool.submit(text, LONG) for text in PROMPTS]
    assert [request.result() for request in requests] == generate(model, PROMPTS, LONG)


def test_sparse_attention_and_window(root):
    for options in ({"pattern": "window", "sliding_window": 3}, {"block_size": 2, "global_blocks": 1}):
        model = load(root, "llama", ["prefix_tuning"])
        chain.apply(model, [{"sparse_attention": options}])
        pool = batcher(model, max_batch_tokens=6, max_batch_size=2)
        prompts = [drawn(length, length) for length in (3, 20, 9)]
        requests = [pool.submit(prompt, LONG) for prompt in prompts]
        assert [request.result() for request in requests] == [alone(model, prompt, LONG) for prompt in prompts]


def test_each_request_has_its_own_settings(root):
    model = load(root)
    sampled = GenerationConfig(max_new_tokens=14, do_sample=True, temperature=2.0, top_p=0.9)
    said = alone(model, PROMPTS[0], LONG).text.split()
    settings = [
        LONG,
        replace(LONG, stop=[" ".join(said[3:5])]),
        replace(LONG, repetition_penalty=1.4, no_repeat_ngram_size=2, presence_penalty=0.5),
        replace(LONG, max_new_tokens=1, min_new_tokens=0),
        *(replace(sampled, seed=seed, top_k=20 * seed) for seed in range(4)),
    ]
    pool = batcher(model, max_batch_size=4, max_batch_tokens=9)
    requests = [(text, config, pool.submit(text, config)) for config in settings for text in PROMPTS[:2]]
    for text, config, request in requests:
        pieces = list(request)
        done = alone(model, text, config)
        assert pieces[-1].done == request.row.done == done
        assert [piece.token for piece in pieces] == done.ids
        assert "".join(piece.text for piece in pieces) == done.text
        assert {piece.row for piece in pieces} == {request.row.index}
    assert not pool.busy and not pool.step()


def test_guided_beside_free():
    pytest.importorskip("llguidance")
    model = burnish.load("pebble", torch.float32)
    prompts = ["Question: What does Odile Kinlow like to eat? Answer:", "Review: dull. Sentiment:"]
    settings = [GenerationConfig(choices=["positive", "negative"]), GenerationConfig(max_new_tokens=12)]
    settings.append(replace(settings[0], no_repeat_ngram_size=1, choices=["dull: dull: dull"], do_sample=True))
    pool = batcher(model, block_size=16)
    requests = [(text, config, pool.submit(text, config)) for config in settings for text in prompts]
    for text, config, request in requests:
        assert request.result() == alone(model, text, config)
        assert not config.choices or request.result().text.strip() in config.choices


def test_mixed_adapters(root, tmp_path):
    base = tiny.folder(root, "llama")
    for seed, name in enumerate(("fr", "de", "es")):
        adapted = chain.apply(burnish.load(base), [{"lora": {"r": 2 + seed, "use_dora": name == "de"}}])
        for parameter in adapted.trainable().values():
            parameter.data.normal_(0, 0.5, generator=torch.Generator().manual_seed(seed))
        save(adapted, tmp_path / name)
    model = burnish.load_adapters(burnish.load(base), {name: tmp_path / name for name in ("fr", "de", "es")})
    names = ["fr", None, "de", "es", "fr"]
    pool = batcher(model, max_batch_tokens=7, max_batch_size=4)
    for text in PROMPTS[:2] * 2:  # the second time from known blocks
        requests = [pool.submit(text, LONG, name) for name in names]
        assert [request.result() for request in requests] == [alone(model, text, LONG, [name]) for name in names]
    model.adapters.active = "de"
    assert pool.submit(PROMPTS[1], LONG).result() == alone(model, PROMPTS[1], LONG, ["de"])
    with pytest.raises(UserError, match="adapter 'it' is not loaded"):
        pool.submit(PROMPTS[1], LONG, "it")


def test_equal_beginnings_are_read_once(root):
    model = load(root)
    shared = drawn(0, 40).ids
    prompts = [Example([*shared, *drawn(seed, 5).ids], [IGNORE] * 45) for seed in (1, 2, 3)]
    pool = batcher(model, max_batch_tokens=16, max_batch_size=4)
    requests = [pool.submit(prompt, LONG) for prompt in prompts]
    held = []
    while pool.busy:
        pool.step()
        held.append(pool.blocks.count - pool.blocks.available)
    assert [request.row.done for request in requests] == [alone(model, prompt, LONG) for prompt in prompts]
    assert max(held) <= 10 + 3 * 4 and held[-1] == 0  # the shared blocks once, and 5 + 11 tokens of each's own
    fed = Counter()
    for step in pool.log:
        fed.update(step)
    assert fed[0] == 45 + 11 and fed[1] == fed[2] == 5 + 11
    pool.log.clear()
    follow = Example([*prompts[0].ids, *requests[0].row.ids, *drawn(9, 3).ids], [IGNORE] * 60)  # the next turn
    assert pool.submit(follow, LONG).result() == alone(model, follow, LONG)
    assert sum(pool.log[0].values()) == 60 - 56  # 14 full blocks of prompt and reply were known


def test_what_shapes_keys_is_not_shared(root):
    model = load(root, "llama", CHAINS["prefix+prompt"])
    pool = batcher(model, max_batch_size=1)
    for virtual in (None, 1, 2, None):
        prompt = replace(drawn(4, 21), virtual_tokens=virtual)
        assert pool.submit(prompt, LONG).result() == alone(model, prompt, LONG)
    first = [max(step.values()) for step in pool.log if max(step.values()) > 1]
    assert first[:3] == [23, 22, 23] and first[3] <= 4  # tokens and soft prompt; the same once more is known


def test_idle_blocks_give_way(root):
    model = load(root)
    pool = batcher(model, blocks=12, max_batch_size=2)
    for seed in range(6):
        prompt = drawn(seed, 24)
        assert pool.submit(prompt, LONG).result() == alone(model, prompt, LONG)
        assert len(pool.blocks.idle) <= 12 and pool.blocks.available == 12
    latest = pool.blocks.known.keys() & {pool.submit(drawn(5, 24), LONG).name(block) for block in range(6)}
    assert len(latest) == 6


def test_a_full_pool_sends_the_youngest_back(root):
    model = load(root)
    pool = batcher(model, blocks=9, max_batch_size=4)
    config = replace(LONG, max_new_tokens=20, min_new_tokens=20)
    prompts = [drawn(seed, 7 + seed) for seed in range(4)]
    requests = [pool.submit(prompt, replace(config, do_sample=True, temperature=3.0, seed=3)) for prompt in prompts]
    order = [piece.row for _ in range(400) if pool.busy for piece in pool.step() if piece.done]
    assert pool.again > 0
    assert order == sorted(order) and not pool.busy
    sampled = replace(config, do_sample=True, temperature=3.0, seed=3)
    assert [request.row.done for request in requests] == [alone(model, prompt, sampled) for prompt in prompts]


def test_a_long_prompt_holds_up_nobody(root):
    model = load(root, "bloom")  # whose positions have no end
    pool = batcher(model, max_batch_tokens=12, max_batch_size=6)
    config = replace(LONG, max_new_tokens=6, min_new_tokens=6)
    early = [pool.submit(drawn(seed, 4), replace(config, max_new_tokens=40, min_new_tokens=40)) for seed in (1, 2)]
    while not all(request.row.ids for request in early):
        pool.step()
    long = pool.submit(drawn(3, 200), config)
    pool.step()
    late = [pool.submit(drawn(seed, 6), config) for seed in (4, 5)]
    pool.log.clear()
    while not long.row.ids:
        pool.step()
    assert all(request.row.done for request in late)
    for step in pool.log:
        assert all(step.get(request.row.index, 1) == 1 for request in early)
    assert all({0, 1} <= step.keys() for step in pool.log[:15])  # who writes gets a token every step
    assert all(step[long.row.index] >= 3 for step in pool.log[:-1])
    assert long.result() == alone(model, drawn(3, 200), config)


def test_cancelled_requests_leave(root):
    model = load(root)
    pool = batcher(model, max_batch_size=2)
    requests = [pool.submit(text, LONG) for text in PROMPTS]
    pool.step()
    pool.step()
    for place in (0, 3):  # one runs, one waits
        requests[place].cancel()
    assert [request.result() for request in requests[1:3]] == generate(model, PROMPTS[1:3], LONG)
    assert len(list(requests[0])) == 2 and requests[0].result() is None and requests[3].result() is None
    assert not pool.busy and pool.blocks.available == pool.blocks.count


def test_threads_submit_and_read(root):
    model = load(root)
    want, pool, got = generate(model, PROMPTS, LONG), batcher(model, max_batch_size=3), {}

    def read(number: int) -> None:
        got[number] = [pool.submit(PROMPTS[(number + turn) % 4], LONG).result() for turn in range(3)]

    threads = [threading.Thread(target=read, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == {number: [want[(number + turn) % 4] for turn in range(3)] for number in range(6)}


def test_refusals(root):
    model = load(root)
    pool = batcher(model, blocks=5)
    pool.submit(drawn(0, 9), LONG)  # 9 + 12 - 1 tokens fill it
    with pytest.raises(UserError, match=r"prompt: 10 tokens and max_new_tokens=12 need 6 blocks .* holds 5; raise it"):
        pool.submit(drawn(0, 10), LONG)
    for other in ({"num_beams": 2}, {"penalty_alpha": 0.5, "top_k": 4}, {"prompt_lookup_num_tokens": 3}):
        with pytest.raises(UserError, match=f"{next(iter(other))}: .* does not run in a batch of requests"):
            pool.submit(PROMPTS[0], GenerationConfig(**other))
    with pytest.raises(UserError, match="token 80 is none of the model's"):
        pool.submit(Example([7, 80], [IGNORE] * 2), LONG)
    with pytest.raises(UserError, match="is empty"):
        pool.submit(Example([], []), LONG)
    with pytest.raises(UserError, match=r"kv_memory: 100 bytes hold no block"):
        Batcher(model, BatchConfig(kv_memory=100))
    with pytest.raises(UserError, match=r"max_batch_tokens: 8 are too few"):
        BatchConfig(max_batch_tokens=8)
    with pytest.raises(UserError, match=r"block_size: must be at least 1"):
        BatchConfig(block_size=0)
    with pytest.raises(UserError, match=r"kv_cache_dtype: must be auto or int8, is 'int4'"):
        BatchConfig(kv_cache_dtype="int4")
    with pytest.raises(UserError, match="stop_token_ids: token 80 is none of the model's, 0 to 79"):
        pool.submit(drawn(0, 3), GenerationConfig(max_new_tokens=1, stop_token_ids=[3, 80]))
    with pytest.raises(UserError, match=r"64 positions"):
        batcher(load(root, "gpt2")).submit(drawn(0, 60), LONG)
    for family in ("t5", "bert"):
        with pytest.raises(UserError, match="use generate"):
            Batcher(burnish.load(tiny.folder(root, family)))


def test_int8_is_within_half_a_step():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(200, 3, 16, generator=draw) * torch.logspace(-20, 10, 200)[:, None, None]
    x[0] = 0
    codes, scales = quantize(x)
    assert codes.dtype == torch.int8 and torch.equal(scales, x.abs().amax(-1, keepdim=True) / 127)
    assert ((codes * scales - x).abs() <= scales * 0.50001).all()


@pytest.mark.parametrize("family", ["llama", "qwen3", "bloom"])
def test_int8_pages(root, family, monkeypatch):
    """Keys and values come back to within 1/254 of a head's largest; states stay close by kernel and by twin."""
    model = load(root, family)
    pools = [Pages(model.spec, 8, 4, torch.float32, torch.device("cpu"), int8) for int8 in (False, True)]
    small, large = (Pages.bytes_of(model.spec, 4, torch.float32, int8) for int8 in (True, False))
    assert pools[1].nbytes == 8 * small < pools[0].nbytes == 8 * large
    states: list[list[torch.Tensor]] = []
    for pool in (*pools, pools[1]):
        states.append([])
        tables = [[3, 1, 7, 0], [2, 5, 4]]
        with torch.inference_mode():
            for table, prompt in zip(tables, (drawn(1, 13), drawn(2, 9)), strict=True):
                view = View(pool, [table], [len(prompt.ids)], len(prompt.ids), [0])
                states[-1].append(chain.forward(model, {"input_ids": torch.tensor([prompt.ids])}, Step([view])))
            view = View(pool, tables, [14, 10], 1, [0, 0])
            states[-1].append(chain.forward(model, {"input_ids": torch.tensor([[8, 9]])}, Step([view])))
        if pool is pools[1]:
            monkeypatch.setattr(paged, "takes", lambda q: False)
    for exact, rough, twin in zip(*states, strict=True):
        assert torch.allclose(rough, twin, atol=1e-4)
        assert 0 < (rough - exact).norm() < 0.03 * exact.norm()
    slots = View(pools[0], tables[:1], [14], 1, [0]).slots
    for exact, rough in zip(pools[0].read(0, slots), pools[1].read(0, slots), strict=True):
        assert ((exact - rough).abs() <= exact.abs().amax(-1, keepdim=True) * 1.001 / 254).all()


def test_int8_replies_do_not_depend_on_the_company(root):
    model = load(root, "qwen3")
    first = [batcher(model, kv_cache_dtype="int8").submit(text, LONG).result() for text in PROMPTS]
    pool = batcher(model, kv_cache_dtype="int8", max_batch_tokens=6, max_batch_size=3)
    requests = [pool.submit(text, LONG) for text in PROMPTS]
    assert [request.result() for request in requests] == first
