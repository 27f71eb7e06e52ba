"""Continuous batching where something fails: a request fails alone, and nobody waits for ever."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
from test_batching import alone, batcher, drawn, load_for
from test_generate import CHAINS, LONG, PROMPTS, load

from burnish.config import UserError
from burnish.engine.batching import Batcher
from burnish.engine.chooser import Chooser
from burnish.engine.generate import generate
from burnish.engine.reply import Generation, Row

PATHS = pytest.mark.parametrize("path", ["as modules", "in C"])


def outcome(find) -> Generation | str | None:
    """What comes of a request: its reply, or the line that it fails with."""
    try:
        return find()
    except UserError as error:
        return str(error).replace("prompt 1:", "prompt:")


def break_token(model, token: int) -> None:
    """Whatever is read after it gives NaN."""
    with torch.no_grad():
        model.net.embed_tokens.weight[token] = float("nan")


def assert_known_blocks_are_numbers(pool) -> None:
    """So that nobody begins with another's NaN."""
    size = pool.config.block_size
    slots = torch.tensor(sorted(pool.blocks.names))[:, None] * size + torch.arange(size)
    for layer in range(pool.model.spec.num_layers):
        assert not any(part.isnan().any() for part in pool.pages.read(layer, slots))


def test_a_step_that_fails_is_taken_again(root, monkeypatch):
    model = load(root)
    pool = batcher(model)
    requests = [pool.submit(text, LONG) for text in PROMPTS]
    pool.step()
    pool.step()
    for owner, name in ((type(model.net), "logits"), (type(model.net), "forward")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                pool.step()
    assert [request.result() for request in requests] == generate(model, PROMPTS, LONG)


@PATHS
@pytest.mark.parametrize("pages", ["auto", "int8"])
@pytest.mark.parametrize("settings", [{}, {"do_sample": True, "temperature": 2.0}])
def test_a_request_without_numbers_fails_alone(root, path, pages, settings):
    """One writes a token whose embedding is broken, one reads such a token; the others go on beside them."""
    model, config = load_for(root, path), replace(LONG, **settings)
    prompts = [drawn(seed, 6 + seed) for seed in range(6)]
    found = [batcher(model, kv_cache_dtype=pages).submit(prompt, config).result() for prompt in prompts]
    used = {token for done, prompt in zip(found[1:], prompts[1:], strict=True) for token in (*done.ids, *prompt.ids)}
    at, written = next((at, token) for at, token in enumerate(found[0].ids[:-1]) if token not in used)
    read = next(token for token in range(6, 50) if token not in used | {*found[0].ids, *prompts[0].ids})
    break_token(model, written)
    break_token(model, read)
    prompts[3].ids[2] = read
    pool = batcher(model, kv_cache_dtype=pages, max_batch_tokens=8, max_batch_size=5)
    requests = [pool.submit(prompt, config) for prompt in prompts]
    assert all(requests[place].result() == found[place] for place in (1, 2, 4, 5))
    for request, token in ((requests[0], at + 2), (requests[3], 1)):
        line = (
            rf"^prompt: the model's logits are not numbers \(NaN\) at token {token} of the reply; .* \(--dtype fp32\)"
        )
        for _ in range(2):  # who reads again gets it again
            with pytest.raises(UserError, match=line):
                request.result()
        assert request.row.done is None and len(request.row.ids) == token - 1
    assert_known_blocks_are_numbers(pool)
    assert not pool.busy and pool.blocks.available == pool.blocks.count
    assert pool.submit(prompts[1], config).result() == found[1]


@PATHS
@pytest.mark.parametrize("pages", ["auto", "int8"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_neox"])
def test_who_begins_like_a_request_without_numbers_has_numbers(root, path, pages, family):
    """Attention under a mask carries NaN to the tokens before it, whose blocks are the same in other requests."""
    model, prompt = load_for(root, path, family), drawn(1, 20)
    want = batcher(model, kv_cache_dtype=pages).submit(prompt, LONG).result()
    broken = next(token for token in range(6, 50) if token not in (*prompt.ids, *want.ids))
    break_token(model, broken)
    other = replace(prompt, ids=[*prompt.ids[:12], broken, *prompt.ids[13:]])
    for chunk in (4, 11, 15, 100):
        pool = batcher(model, kv_cache_dtype=pages, max_batch_tokens=chunk, max_batch_size=2)
        first, second = [pool.submit(each, LONG) for each in (other, prompt)]
        with pytest.raises(UserError, match=r"not numbers \(NaN\) at token 1 of the reply"):
            first.result()
        assert second.result() == want and pool.submit(prompt, LONG).result() == want
        assert_known_blocks_are_numbers(pool)


def test_pieces_come_before_the_failure(root):
    model = load(root)
    ids = alone(model, PROMPTS[0], LONG).ids
    at = next(at for at, token in enumerate(ids) if token not in model.tokenizer(PROMPTS[0])["input_ids"])
    break_token(model, ids[at])
    got = []
    with pytest.raises(UserError, match=f"at token {at + 2} of the reply"):
        got.extend(piece.token for piece in batcher(model).submit(PROMPTS[0], LONG))
    assert got == ids[: at + 1]


def test_what_fails_over_one_request_is_its_own(root, monkeypatch):
    """Its prefix, its choice or its text cannot be had."""
    model = load(root, "llama", CHAINS["prefix"])
    want = generate(model, PROMPTS, LONG)
    for owner, name, mine in (
        (Batcher, "_prefix", lambda call: call[1].index == 0),
        (Chooser, "__call__", lambda call: any(row.index == 0 and len(row.ids) == 3 for row in call[2])),
        (Row, "push", lambda call: call[0].index == 0 and len(call[0].ids) == 3),
    ):
        pool, whole = batcher(model, max_batch_tokens=9, max_batch_size=3), getattr(owner, name)

        def broken(*call, whole=whole, mine=mine):
            return 1 / 0 if mine(call) else whole(*call)

        with monkeypatch.context() as patch:
            first, *rest = [pool.submit(text, LONG) for text in PROMPTS]
            patch.setattr(owner, name, broken)
            assert [request.result() for request in rest] == want[1:]
            with pytest.raises(ZeroDivisionError):
                first.result()
            assert first.row.done is None
        assert not pool.busy and pool.blocks.available == pool.blocks.count
        assert pool.submit(PROMPTS[0], LONG).result() == want[0]


def in_threads(requests) -> list:
    """What a reader of each request gets, all at once; "nothing" where one waits for too long."""
    got = ["nothing"] * len(requests)

    def read(place: int) -> None:
        try:
            got[place] = outcome(requests[place].result)
        except ZeroDivisionError:
            got[place] = "stopped"

    threads = [threading.Thread(target=read, args=(place,), daemon=True) for place in range(len(requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return got


@PATHS
def test_a_loop_goes_on_beside_a_request_that_fails(root, path):
    model = load_for(root, path)
    break_token(model, 5)
    prompts = [drawn(seed, 8) for seed in range(5)]
    prompts[2].ids[3] = 5
    want = [outcome(lambda prompt=prompt: alone(model, prompt, LONG)) for prompt in prompts]
    assert [isinstance(each, str) for each in want] == [False, False, True, False, False]
    pool, over = batcher(model, max_batch_size=3), threading.Event()

    def serve() -> None:
        while not over.wait(0.001):
            pool.step()

    loop = threading.Thread(target=serve, daemon=True)
    loop.start()
    for _ in range(2):
        assert in_threads([pool.submit(prompt, LONG) for prompt in prompts]) == want
        assert loop.is_alive()
    over.set()
    loop.join(60)
    assert not pool.busy and pool.blocks.available == pool.blocks.count


def test_nobody_waits_for_a_loop_that_died(root, monkeypatch):
    model = load(root)
    pool = batcher(model)
    requests = [pool.submit(text, LONG) for text in PROMPTS]
    with monkeypatch.context() as patch:
        patch.setattr(type(model.net), "forward", lambda *_, **__: 1 / 0)
        died: list[BaseException] = []

        def serve() -> None:
            try:
                while True:
                    pool.step()
            except ZeroDivisionError as error:
                died.append(error)

        loop = threading.Thread(target=serve, daemon=True)
        loop.start()
        loop.join(60)
        assert died and in_threads(requests) == ["stopped"] * 4
    assert in_threads(requests) == generate(model, PROMPTS, LONG)
