"""The fast path of decoding gives what the layers give, for every family, storage and situation."""

from __future__ import annotations

import pytest
import tiny
import torch
from placed_jobs import on_ranks

from burnish import chain
from burnish.engine.decoding import GenerationConfig
from burnish.engine.generate import generate
from burnish.model.example import IGNORE, Example
from burnish.native import products
from burnish.place import fused as fast
from burnish.place.choice import placed
from burnish.place.fused import fused
from burnish.store.checkpoint import load

BLOCKS = {"hidden_size": 64, "intermediate_size": 128}  # matrices of whole blocks, as real models have
WIDE = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gpt_neox", "gemma2", "gemma3_text"), BLOCKS),
    "bloom": {"hidden_size": 64, "n_head": 4},
    "falcon": {"hidden_size": 64},
    "opt": {"hidden_size": 64, "ffn_dim": 128},
    "gpt2": {"n_embd": 64},
    "mpt": {"d_model": 64, "n_heads": 4},
}
CAPPED = ("gemma2",)  # scores through a tanh: its layers run as they are
STEPS = 6
PROMPTS = [[7, 8, 9, 10, 11, 12, 13], [20, 21, 22], [30], [7, 9, 11, 20, 22]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("wide")
    return {name: tiny.write(root / name, tiny.reference(name, **changes)) for name, changes in WIDE.items()}


@pytest.fixture
def steps(monkeypatch):
    """The layers that went through C, by call."""
    if products.library() is None:
        pytest.skip("no compiler")
    seen: list[int] = []
    run = fast.decode.Layers.run

    def counted(self, layers, *given, **named):
        seen.append(len(layers))
        return run(self, layers, *given, **named)

    monkeypatch.setattr(fast.decode.Layers, "run", counted)
    return seen


@torch.inference_mode()
def decoded(model):
    """Hidden states of tokens fed one by one to rows of unlike length."""
    rows = torch.tensor([[0, 0, 7, 8], [9, 10, 11, 12], [0, 20, 21, 22]])
    cache = model.net.new_cache(3, 4 + STEPS + 4)
    chain.forward(model, {"input_ids": rows, "attention_mask": (rows > 0).long()}, cache)
    ids = torch.arange(10, 10 + 3 * STEPS).view(STEPS, 3, 1)
    return torch.cat([chain.forward(model, {"input_ids": step}, cache) for step in ids], dim=1)


def both(model):
    plain = decoded(model)
    with fused(model.net):
        return plain, decoded(model)


@pytest.mark.parametrize("family", WIDE)
def test_states_are_the_layers(folders, family, steps):
    model = load(folders[family], torch.float32)
    want, got = both(model)
    assert (sum(steps) == STEPS * len(model.net.layers)) == (family not in CAPPED)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
    assert model.net.run_layers is None


@pytest.mark.parametrize("family", ["llama", "bloom", "gpt2"])
@pytest.mark.parametrize("techniques", [[], ["int8"], ["fp8"], ["nf4"]], ids=["dense", "int8", "fp8", "nf4"])
def test_in_bfloat16_it_is_nearer_to_float32_than_the_layers(folders, family, techniques, steps):
    model = chain.apply(load(folders[family], torch.bfloat16), techniques)
    plain, got = both(model)
    assert sum(steps) == STEPS * 2
    model.net.compute_dtype = torch.float32
    want = decoded(model)
    error = [(states.float() - want).norm() / want.norm() for states in (plain, got)]
    assert error[1] < 1.1 * error[0] and error[1] < 2e-2, error


@pytest.mark.parametrize("technique", ["int8", "fp8", "nf4"])
def test_in_float32_quantised_states_are_the_layers(folders, technique, steps):
    want, got = both(chain.apply(load(folders["llama"], torch.float32), technique))
    assert steps
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


def test_layers_that_round_their_activations_run_as_they_are(folders, steps):
    want, got = both(chain.apply(load(folders["llama"], torch.float32), {"fp8": {"activation_scheme": "dynamic"}}))
    assert not steps and torch.equal(got, want)


def test_a_wrapped_or_hooked_layer_runs_as_it_is(folders, steps):
    config = {"target_modules": ["layers.0.self_attn.q_proj"], "r": 4}
    model = chain.apply(load(folders["llama"], torch.float32), {"lora": config})
    for parameter in model.trainable().values():
        torch.nn.init.normal_(parameter, std=0.2)
    want, got = both(model)
    assert steps == [1] * STEPS
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
    seen = []
    model.net.layers[1].mlp.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(both(model)[1], want, atol=2e-5, rtol=1e-4)
    assert len(seen) > 2 * STEPS and len(steps) == STEPS


@pytest.mark.parametrize("settings", [{}, {"do_sample": True, "seed": 3}, {"num_beams": 3}])
def test_replies_are_the_same(folders, settings, steps):
    model = chain.apply(load(folders["llama"], torch.float32), {"prefix_tuning": {"num_virtual_tokens": 3}})
    examples = [Example(ids, [IGNORE] * len(ids), fields={"prompt": ""}) for ids in PROMPTS]
    replies = [
        [done.ids for done in generate(model, examples, GenerationConfig(max_new_tokens=12, fused=on, **settings))]
        for on in (False, True)
    ]
    assert replies[0] == replies[1] and steps


def halves_on_a_rank(ranks, folders):
    """States of a split model with and without the fast path, and what was run of its layers, by name."""
    found = {}
    ran = []
    run = fast.decode.Layers.run

    def counted(self, *given, part, **named):
        ran.append(part)
        return run(self, *given, part=part, **named)

    fast.decode.Layers.run = counted
    for name, (folder, techniques) in folders.items():
        ran.clear()
        model = load(folder, torch.float32, techniques=techniques, unread=True)
        plain, got = both(placed(chain.apply(model, techniques), "tensor_parallel", ranks))
        found[name] = (plain, got, list(ran))
    return found


@pytest.mark.parametrize("world", [2, 4])
def test_split_over_ranks_a_layer_is_run_in_its_halves(tmp_path, world):
    if products.library() is None:
        pytest.skip("no compiler")
    width = 64 * world  # a whole block of NF4 for every rank
    wide = {
        "llama": {"hidden_size": width, "intermediate_size": 2 * width},
        "bloom": {"hidden_size": width, "n_head": 4},
        "falcon": {"hidden_size": width},
        "gpt2": {"n_embd": width},
    }
    names = {name: tiny.write(tmp_path / name, tiny.reference(name, **changes)) for name, changes in wide.items()}
    cases = {name: (str(folder), []) for name, folder in names.items()}
    cases |= {kind: (str(names["llama"]), [kind]) for kind in ("int8", "fp8", "nf4")}
    alone = {name: decoded(chain.apply(load(folder, torch.float32), kind)) for name, (folder, kind) in cases.items()}
    for rank in on_ranks(world, halves_on_a_rank, cases, tmp_path / "out"):
        for name, (plain, got, ran) in rank.items():
            assert ran == [fast.decode.ATTENTION, fast.decode.FEED_FORWARD] * STEPS * 2, name
            torch.testing.assert_close(got, plain, atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(got, alone[name], atol=2e-5, rtol=1e-4)


def test_training_and_prefill_do_not_go_through_it(folders, steps):
    model = load(folders["llama"], torch.float32)
    with fused(model.net):
        with torch.inference_mode():
            chain.forward(model, {"input_ids": torch.tensor([[7, 8, 9]])}, model.net.new_cache(1, 8))
        model.net.requires_grad_(True)
        states = chain.forward(model, {"input_ids": torch.tensor([[7]])}, model.net.new_cache(1, 8))
    assert states.requires_grad and not steps
