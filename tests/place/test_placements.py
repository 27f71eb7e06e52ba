"""Models spread over processes against the same models in one."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from placed_jobs import Case, answers, on_ranks, results

from burnish import chain
from burnish.store.checkpoint import load, save

PLACES = ("tensor_parallel", "layer_parallel")
BLOCKS = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 192}
UNEVEN = {"hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8, "vocab_size": 81}
LARGE = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4, "num_key_value_heads": 4}
MQA = {"new_decoder_architecture": False, "multi_query": True, "num_kv_heads": None}
VARIANTS = {  # name -> (family, head, changes to its tiny config)
    "falcon-mqa": ("falcon", "", MQA),
    "falcon-alibi": ("falcon", "", {**MQA, "alibi": True}),
    "bert-hidden": ("bert", "none", {}),
    "bert-classes": ("bert", "classification", {}),
    "t5-encoder": ("t5", "none", {}),
    "uneven": (
        "llama",
        "",
        {"hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8, "vocab_size": 81},
    ),
    "deep": ("llama", "", {"num_hidden_layers": 5, "tie_word_embeddings": True}),
    "deep-bloom": ("bloom", "", {"hidden_size": 32, "n_head": 4, "n_layer": 4}),
    "deep-t5": ("t5", "", {"num_layers": 4, "num_decoder_layers": 5}),
    "blocks": ("llama", "", BLOCKS),
    "large": ("llama", "", LARGE),
}
LORA = {"lora": {"r": 4, "target_modules": "all-linear"}}
ADAPTED = {  # name -> chain on the tiny Llama, disturbed and saved
    "lora": [LORA],
    "dora": [{"lora": {"use_dora": True}}],
    "adapters": ["adapters"],
    "ia3": ["ia3"],
    "prefix": [{"prefix_tuning": {"num_virtual_tokens": 3}}],
    "prompt": [{"prompt_tuning": {"num_virtual_tokens": 3}}],
}
QUANTISED = {"int8": ["int8"], "nf4": ["nf4"], "nf4-single": [{"nf4": {"double_quant": False}}], "qlora": ["nf4", LORA]}
IN_FOUR = ("falcon-mqa", "gpt2", "deep", "deep-bloom", "deep-t5", "uneven", "int8", "nf4")


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> dict[str, tuple[str, list]]:
    """Name -> (folder, techniques)."""
    root = tmp_path_factory.mktemp("placed")
    found = {family: (str(tiny.folder(root, family)), []) for family in tiny.CONFIGS}
    for name, (family, head, changes) in VARIANTS.items():
        found[name] = str(tiny.write(root / name, tiny.reference(family, head, **changes))), []
    for name, techniques in ADAPTED.items():
        model = chain.apply(load(found["llama"][0]), techniques)
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in model.trainable().values():
                parameter.add_(torch.randn_like(parameter) * 0.2)
        found[name] = str(save(model, root / name)), []
    quantised = {name: (found["blocks"][0], techniques) for name, techniques in QUANTISED.items()}
    stored = chain.apply(load(found["blocks"][0]), "nf4")
    return found | quantised | {"nf4-stored": (str(save(stored, root / "stored")), [])}


def run(world: int, cases: dict[str, tuple[str, list]], names, out: Path) -> dict[str, list]:
    """Name and place -> what each rank found."""
    jobs = [
        Case(f"{name} {place}", cases[name][0], place, cases[name][1], loops=name == "llama", measured=name == "large")
        for name in names
        for place in PLACES
    ]
    found = on_ranks(world, answers, jobs, out)
    return {case.name: [rank[case.name] for rank in found] for case in jobs}


@pytest.fixture(scope="module")
def two(cases, tmp_path_factory):
    return run(2, cases, [*cases], tmp_path_factory.mktemp("two") / "out")


@pytest.fixture(scope="module")
def four(cases, tmp_path_factory):
    return run(4, cases, IN_FOUR, tmp_path_factory.mktemp("four") / "out")


def check(cases, name: str, place: str, found: list) -> None:
    """Every rank's results are those of the model in one process."""
    folder, techniques = cases[name]
    want = results(Case(name, folder, place, techniques).load(), name == "llama")
    for rank in found:
        assert not isinstance(rank, str), rank
        assert rank.keys() == want.keys()
        for part, expected in want.items():
            if isinstance(expected, list):
                assert rank[part] == expected, part
            else:
                torch.testing.assert_close(rank[part], expected, atol=1e-4, rtol=1e-4, msg=part)


ALL = (*tiny.CONFIGS, *(name for name in VARIANTS if name != "large"), *ADAPTED, *QUANTISED, "nf4-stored")
REFUSED = {
    ("dora", "tensor_parallel"): "merge the adapter first",
    ("ia3", "tensor_parallel"): "merge the adapter first",
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ALL)
def test_two_ranks_give_what_one_process_gives(cases, two, name, place):
    if (name, place) in REFUSED or (name == "mt5" and place == "layer_parallel"):
        lines = two[f"{name} {place}"]
        assert all(REFUSED.get((name, place), "2 ranks for a model of 1 layers") in line for line in lines)
    else:
        check(cases, name, place, two[f"{name} {place}"])


@pytest.mark.parametrize("place", PLACES)
def test_a_rank_keeps_its_share_only(cases, two, place):
    model = load(cases["large"][0])
    whole = sum(p.numel() * p.element_size() for p in model.net.parameters())
    assert whole > 60e6
    assert all(0.4 * whole < grown < 0.65 * whole for grown in two[f"large {place}"]), two[f"large {place}"]


@pytest.mark.parametrize("name", IN_FOUR)
def test_four_ranks(cases, four, name):
    refused = {
        "uneven tensor_parallel": "6 attention heads cannot be dealt out evenly to 4 ranks; start 2 or 3 or 6",
        "nf4 tensor_parallel": "would cut its blocks of 64 inputs",
    }
    for place in PLACES:
        found = four[f"{name} {place}"]
        if place == "layer_parallel" and not name.startswith("deep"):
            assert "layer_parallel: 4 ranks for a model of 2 layers; start at most 2" in found[0]
        elif f"{name} {place}" in refused:
            assert all(refused[f"{name} {place}"] in line for line in found)
        else:
            check(cases, name, place, found)
