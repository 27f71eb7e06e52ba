"""Several adapters on one base: a mixed batch gives each row what its adapter alone gives."""

from __future__ import annotations

import json

import peft
import pytest
import tiny
import tiny_foreign
import torch
from test_lora_options import applied, disturb
from test_lora_peft import NATIVE, reference, theirs_written

import burnish
from burnish import chain
from burnish.chain import forward
from burnish.cli import main
from burnish.config import UserError
from burnish.engine.generate import GenerationConfig
from burnish.engine.order import collated
from burnish.model.example import IGNORE, Example
from burnish.store.checkpoint import load, save

CLOSE = {"atol": 2e-5, "rtol": 1e-5}
ROWS = ["fr", None, "de", "fr", "es"]
PROMPTS = ["the cat", "where is the dog ?", "a red bird sees the big fish", "paris", "question : who runs ?"]
FAMILIES = ("llama", "gpt2", "bert", "mistral", "t5", "stablelm", "roberta", "bart")


def folder_of(root, family):
    return (tiny_foreign if family in tiny_foreign.CONFIGS else tiny).folder(root, family)


@pytest.fixture
def folders(tmp_path):
    """Adapters of three ranks and kinds on other projections each."""

    def write(base, family):
        first = NATIVE.get(family, ["query" if family == "roberta" else "q_proj"])[:1]
        kinds = {
            "fr": {"r": 2, "target_modules": "all-linear"},
            "de": {"r": 4, "target_modules": first, "use_dora": True},
            "es": {"r": 3, "target_modules": None, "use_rslora": True, "rank_pattern": {first[0]: 5}},
        }
        for seed, (name, options) in enumerate(kinds.items()):
            model = applied(base, family, **options)
            disturb(model.trainable().values(), seed)
            save(model, tmp_path / name)
        return {name: tmp_path / name for name in kinds}

    return write


def examples(model):
    draw = torch.Generator().manual_seed(5)
    found = []
    for size in (9, 5, 7, 6, 8):
        ids = torch.randint(6, 50, (size,), generator=draw).tolist()
        found.append(Example(ids, [IGNORE] * (size - 3) + ids[-3:]))
    return found


def outputs(model, rows, side="right", **extra):
    """Logits of each row's real tokens."""
    batch = collated(model, rows, side)
    with torch.no_grad():
        logits = model.net.logits(forward(model, {**batch, **extra}))
    return [logits[row][batch["attention_mask"][row]] for row in range(len(rows))]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixed_batch_is_each_adapter_alone(root, folders, family):
    base = folder_of(root, family)
    paths = folders(base, family)
    mixed = burnish.load_adapters(load(base), paths)
    rows = examples(mixed)
    ids = torch.tensor([mixed.adapters.number(name) for name in ROWS])
    models = {name: load(path) for name, path in paths.items()} | {None: load(base)}
    alone = [outputs(models[name], [row])[0] for name, row in zip(ROWS, rows, strict=True)]
    assert not torch.allclose(alone[0], outputs(models[None], [rows[0]])[0], atol=1e-2)
    for side in ("right",) if family == "bart" else ("right", "left"):
        for got, want in zip(outputs(mixed, rows, side, adapter_ids=ids), alone, strict=True):
            torch.testing.assert_close(got, want, **CLOSE)
    for name, model in models.items():
        mixed.adapters.active = name
        for got, want in zip(outputs(mixed, rows), outputs(model, rows), strict=True):
            torch.testing.assert_close(got, want, **CLOSE)


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "stablelm", "bart"])
def test_generation_mixes_adapters(root, folders, family):
    base = folder_of(root, family)
    paths = folders(base, family)
    mixed = burnish.load_adapters(load(base), paths)
    config = GenerationConfig(max_new_tokens=6, batch_size=5)
    got = burnish.generate(mixed, PROMPTS, config, adapters=ROWS)
    models = {name: load(path) for name, path in paths.items()} | {None: load(base)}
    alone = [burnish.generate(models[name], [prompt], config)[0] for name, prompt in zip(ROWS, PROMPTS, strict=True)]
    assert [done.ids for done in got] == [done.ids for done in alone]
    mixed.adapters.active = "de"
    assert burnish.generate(mixed, PROMPTS[:1], config) == burnish.generate(models["de"], PROMPTS[:1], config)
    assert burnish.generate(mixed, PROMPTS[:1], config, adapters=[None]) == burnish.generate(
        models[None], PROMPTS[:1], config
    )


def test_pefts_folders_on_a_quantised_base(root, tmp_path):
    base = tiny.folder(root, "llama")
    for name, rank in (("a", 2), ("b", 6)):
        theirs_written(base, "llama", tmp_path / name, r=rank)
    mixed = burnish.load_adapters(chain.apply(load(base), "nf4"), {name: tmp_path / name for name in "ab"})
    rows = examples(mixed)[:2]
    got = outputs(mixed, rows, adapter_ids=torch.tensor([1, 0]))
    for name, row, own in zip("ba", rows, got, strict=True):
        single = burnish.load_adapters(chain.apply(load(base), "nf4"), {name: tmp_path / name})
        single.adapters.active = name
        torch.testing.assert_close(own, outputs(single, [row])[0], **CLOSE)


def test_pefts_own_mixed_batch(root, tmp_path):
    base = tiny.folder(root, "llama")
    for name in "ab":
        theirs_written(base, "llama", tmp_path / name, r=2 if name == "a" else 6)
    other = peft.PeftModel.from_pretrained(reference(base), tmp_path / "a", adapter_name="a")
    other.load_adapter(tmp_path / "b", adapter_name="b")
    ids = torch.randint(6, 80, (3, 9), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        want = other.eval()(input_ids=ids, adapter_names=["b", "__base__", "a"]).logits
        mixed = burnish.load_adapters(load(base), {name: tmp_path / name for name in "ab"})
        got = mixed.net.logits(forward(mixed, {"input_ids": ids, "adapter_ids": torch.tensor([1, -1, 0])}))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_mistakes(root, tmp_path, folders):
    base = tiny.folder(root, "llama")
    model = burnish.load_adapters(load(base), folders(base, "llama"))
    for name, options in (("biased", {"bias": "all"}), ("saved", {"modules_to_save": ["norm"]})):
        save(applied(base, "llama", **options), tmp_path / name)
        with pytest.raises(UserError, match=f"adapter '{name}': its biases or saved modules"):
            burnish.load_adapters(model, {name: tmp_path / name})
    with pytest.raises(UserError, match="adapter 'fr': the name is taken"):
        burnish.load_adapters(model, {"new": tmp_path / "de", "fr": tmp_path / "fr"})
    assert model.adapters.names == ["fr", "de", "es"]
    with pytest.raises(UserError, match="adapter 'x': .* has no adapter_config.json"):
        burnish.load_adapters(model, {"x": base})
    other = load(tiny.write(tmp_path / "wider", tiny.reference("llama", hidden_size=48)))
    with pytest.raises(UserError, match="adapter 'fr': made for another base: hidden_size 32, not 48"):
        burnish.load_adapters(other, {"fr": tmp_path / "fr"})
    (tmp_path / "fr" / "burnish.json").unlink()
    with pytest.raises(
        UserError, match=r"made for another base: .*lora_A has shape \[2, 32\] where \[2, 48\] is needed"
    ):
        burnish.load_adapters(other, {"fr": tmp_path / "fr"})
    assert other.adapters is None
    with pytest.raises(UserError, match="adapter 'ed' is not loaded"):
        model.adapters.active = "ed"
    with pytest.raises(UserError, match="a list of 2 names is needed"):
        burnish.generate(model, PROMPTS[:2], adapters=["fr"])
    with pytest.raises(UserError, match="none is loaded under a name"):
        burnish.generate(load(base), PROMPTS[:1], adapters=["fr"])
    with pytest.raises(UserError, match="are not saved"):
        save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="a technique is around 'layers.0.self_attn.q_proj' already"):
        burnish.load_adapters(load(tmp_path / "de"), {"es": tmp_path / "es"})


def test_the_command(root, folders, capsys):
    base = tiny.folder(root, "llama")
    paths = folders(base, "llama")
    words = ["generate", str(base), "--prompt", "the cat", "--max-new-tokens", "5", "--json"]
    adapters = ["--adapters", json.dumps({name: str(path) for name, path in paths.items()})]
    for name in (None, "de"):
        assert main([*words, *adapters, *(["--adapter", name] if name else [])]) == 0
        got = json.loads(capsys.readouterr().out)
        assert main([words[0], str(paths[name] if name else base), *words[2:]]) == 0
        assert got == json.loads(capsys.readouterr().out)
    assert main([*words, "--adapter", "de"]) == 2
    assert main([*words, *adapters, "--adapter", "dee"]) == 2
    assert "did you mean 'de'" in capsys.readouterr().err
