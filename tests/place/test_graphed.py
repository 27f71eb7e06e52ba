"""The step that a GPU takes as one graph gives what the layers give; here without a graph, on the CPU."""

from __future__ import annotations

import warnings

import pytest
import tiny
import torch

from burnish import chain
from burnish.config import UserError
from burnish.engine.decoding import GenerationConfig
from burnish.engine.generate import generate
from burnish.model.example import IGNORE, Example
from burnish.place import fused as fast
from burnish.place import graphed
from burnish.store.checkpoint import load

FAMILIES = ("llama", "mistral", "qwen3", "gemma2", "gemma3_text", "bloom", "falcon", "gpt2", "opt", "gpt_neox", "mpt")
PROMPTS = [[7, 8, 9, 10, 11, 12, 13], [20, 21, 22], [30], [7, 9, 11, 20, 22]]
TOKENS = 24  # beyond two buckets


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = tmp_path_factory.mktemp("graphed")
    return lambda family: tiny.folder(made, family)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Buckets of a few slots, steps that are not compiled, and no other way than the steps'."""
    monkeypatch.setattr(graphed, "SLOTS", 8)
    monkeypatch.setattr(graphed, "COMPILES_FROM", 10**9)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="decoding goes on")
        yield


@pytest.fixture
def captures(monkeypatch):
    """(rows, slots) of every graph that is made, in a run on the CPU."""
    monkeypatch.setattr(fast, "GRAPHED", ("cpu",))
    seen: list[tuple[int, int]] = []
    captured = graphed.Stepper.captured

    def counted(self, room, slots, prefix):
        seen.append((len(room.ids), slots))
        return captured(self, room, slots, prefix)

    monkeypatch.setattr(graphed.Stepper, "captured", counted)
    return seen


def examples(prompts):
    return [Example(ids, [IGNORE] * len(ids), fields={"prompt": ""}) for ids in prompts]


def replies(model, prompts=PROMPTS, **settings):
    """Those of the layers, and those of the steps."""
    settings = {"max_new_tokens": TOKENS, **settings}
    both = [
        [done.ids for done in generate(model, examples(prompts), GenerationConfig(fused=on, **settings))]
        for on in (False, True)
    ]
    assert model.net.step is None
    return both


def ends(model, prompts=PROMPTS):
    """A token that ends the replies at different steps, where there is one."""
    found = [done.ids for done in generate(model, examples(prompts), GenerationConfig(max_new_tokens=12, fused=False))]
    seen = [{ids.index(token) for ids in found if token in ids} for token in set(sum(found, []))]
    return max(zip(map(len, seen), set(sum(found, [])), strict=True))[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_replies_are_the_layers(folders, family, captures):
    model = load(folders(family), torch.float32)
    plain, got = replies(model, stop_token_ids=[ends(model)])
    assert got == plain
    plain, got = replies(model)
    assert got == plain and len({slots for _, slots in captures}) > 1


@pytest.mark.parametrize("technique", ["int8", "nf4", "fp8", "int_groups", "lora", "prefix_tuning", "prompt_tuning"])
def test_techniques(folders, technique, captures):
    model = chain.apply(load(folders("llama"), torch.float32), technique)
    for parameter in model.trainable().values():
        torch.nn.init.normal_(parameter, std=0.2)
    plain, got = replies(model)
    assert got == plain and captures


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True, "seed": 3},
        {"num_beams": 3},
        {"repetition_penalty": 1.3},
        {"min_new_tokens": 9},
        {"prompt_lookup_num_tokens": 4},
        {"penalty_alpha": 0.5, "top_k": 3},
        {"batch_size": 2},
    ],
)
def test_settings(folders, settings, captures):
    model = load(folders("llama"), torch.float32)
    plain, got = replies(model, stop_token_ids=[ends(model)], **settings)
    assert got == plain
    assert bool(captures) == ("prompt_lookup_num_tokens" not in settings and "penalty_alpha" not in settings)
    assert len(captures) == len(set(captures)), "one graph for a number of rows and slots"


@pytest.mark.parametrize(
    ("family", "technique", "prompts"),
    [("llama", [], PROMPTS[:3]), ("bloom", [], PROMPTS[:2]), ("gpt2", ["nf4"], PROMPTS[:1])],
)
def test_compiled_replies_are_the_layers(folders, family, technique, prompts, captures, monkeypatch):
    monkeypatch.setattr(graphed, "COMPILES_FROM", 0)
    counted = torch._dynamo.utils.counters["stats"]
    before = counted["unique_graphs"]
    model = chain.apply(load(folders(family), torch.float32), technique)
    plain, got = replies(model, prompts, stop_token_ids=[ends(model, prompts)] if family == "llama" else [])
    assert got == plain and len(captures) > 2
    assert counted["unique_graphs"] - before <= 3 * len({min(rows, 2) for rows, _ in captures}), "not for each bucket"


def test_a_cache_is_right_whatever_way_tokens_go(folders):
    """Steps, several tokens at once, tokens taken back, rows that change places, two caches in turn."""
    model = load(folders("llama"), torch.float32)
    net, rows = model.net, torch.tensor([[0, 0, 7, 8], [9, 10, 11, 12], [0, 20, 21, 22]])
    stepper = graphed.Stepper(net, False)
    draw = torch.Generator().manual_seed(0)

    def ids(count, width):
        return torch.randint(5, 60, (count, width), generator=draw)

    with torch.inference_mode():
        caches = [[net.new_cache(3, 64) for _ in range(2)] for _ in range(2)]  # by way, then by number
        for cache in sum(caches, []):
            net(rows, attention_mask=(rows > 0).long(), cache=cache)
        for turn in range(40):
            number, width = turn % 2, 3 if turn % 7 == 6 else 1
            plain, other = caches[0][number], caches[1][number]
            new = ids(len(plain.valid), width)
            want = net.logits(net(new, cache=plain))
            found = stepper(new, other)
            assert (found is None) == (width > 1)
            got = net.logits(net(new, cache=other)) if found is None else found.logits[:, None]
            torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
            if found is not None:
                assert torch.equal(found.tokens, want[:, 0].argmax(-1))
            for cache in (plain, other):
                if turn % 9 == 8:
                    cache.shorten(cache.length - 1)
                if turn in (15, 22, 30):
                    cache.select(torch.tensor([2, 0, 1] if turn == 15 else [1, 0]))
        assert caches[1][0].length == caches[0][0].length


def test_what_it_does_not_know_goes_the_ordinary_way(folders, captures):
    for techniques in ("sparse_attention", {"int8": {"llm_int8_threshold": 6.0}}, {"lora": {"use_dora": True}}):
        model = chain.apply(load(folders("llama"), torch.float32), techniques)
        plain, got = replies(model)
        assert got == plain and not captures
    model = load(folders("llama"), torch.float32)
    model.net.layers[1].mlp.register_forward_hook(lambda *_: None)
    plain, got = replies(model)
    assert got == plain and not captures


def test_a_step_that_cannot_be_made_is_told_once(folders, captures, monkeypatch):
    monkeypatch.setattr(graphed, "capture", lambda run, device: (_ for _ in ()).throw(RuntimeError("no\nroom")))
    model = load(folders("llama"), torch.float32)
    with pytest.warns(UserWarning, match="decoding goes on without CUDA graphs: no room") as seen:
        plain, got = replies(model)
    assert got == plain and len(seen) == 1


def test_logits_that_are_not_numbers_are_told(folders, captures):
    model = load(folders("llama"), torch.float32)
    generate(model, examples(PROMPTS), GenerationConfig(max_new_tokens=2))
    model.net.embed_tokens.weight.data[43] = float("nan")
    plain = generate(load(folders("llama"), torch.float32), examples(PROMPTS[:1]), GenerationConfig(max_new_tokens=8))
    model.net.embed_tokens.weight.data[plain[0].ids[0]] = float("nan")  # a tied head, or the token that is fed
    with pytest.raises(UserError, match=r"prompt 1: the model's logits are not numbers \(NaN\) at token"):
        generate(model, examples(PROMPTS[:1]), GenerationConfig(max_new_tokens=8))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compiles_from", [0, 10**9])
@pytest.mark.parametrize("technique", [[], ["int8"], ["nf4"]], ids=["dense", "int8", "nf4"])
@pytest.mark.parametrize("family", ["llama", "bloom", "gpt2", "gemma3_text"])
def test_on_a_gpu(folders, family, technique, compiles_from, captures, monkeypatch):
    """In float32; captured once for each number of rows and slots."""
    monkeypatch.setattr(fast, "GRAPHED", ("cuda",))
    monkeypatch.setattr(graphed, "COMPILES_FROM", compiles_from)
    model = chain.apply(load(folders(family), torch.float32, device="cuda"), technique)
    plain, got = replies(model, PROMPTS * 2, stop_token_ids=[ends(model)], batch_size=4)
    assert got == plain
    assert captures and len(captures) == len(set(captures))
