"""Every recipe runs: shortened, on a tiny model where its own would take long."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import yaml

from burnish.bench import strategies
from burnish.cli import main
from burnish.config import coerce, load_yaml
from burnish.store.checkpoint import load

ROOT = Path(__file__).resolve().parents[1]
BY_VERB: dict[str, list[str]] = {}
for path in sorted((ROOT / "recipes").glob("*.yaml")):  # each says in a comment how it is run
    verb = next(line.split()[2] for line in path.read_text().splitlines() if line.startswith("# burnish "))
    BY_VERB.setdefault(verb, []).append(path.name)


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("name", BY_VERB["tune"])
def test_tune(tmp_path, capsys, name):
    out = tmp_path / "out"
    assert main(["tune", f"recipes/{name}", "--max-steps", "4", "--output-dir", str(out)]) == 0
    assert "saved to" in capsys.readouterr().out
    training = json.loads((out / "training.json").read_text())
    assert training["steps"] == 4
    model = load(out)
    assert [link.name for link in model.chain]
    if model.spec.head == "lm":
        assert main(["generate", str(out), "--prompt", "job Odile Kinlow =", "--max-new-tokens", "4"]) == 0


@pytest.mark.parametrize("name", BY_VERB["pretrain"])
def test_pretrain(tmp_path, name):
    out = tmp_path / "out"
    words = ["pretrain", f"recipes/{name}", "--documents", "300", "--max-steps", "3", "--no-compile"]
    assert main([*words, "--output-dir", str(out)]) == 0
    model = load(out)
    assert model.parameter_count() > 1_000_000 and len(model.tokenizer) <= model.spec.vocab_size


@pytest.mark.parametrize("name", BY_VERB["compare"])
def test_compare(request, root, tmp_path, monkeypatch, name):
    """Every row of the recipe on every task, on tiny models, with one seed and the first of its learning rates."""
    decoder, encoder = (str(tiny.folder(root, family)) for family in ("llama", "bert"))
    monkeypatch.setenv("ENCODER", encoder)
    if "BURNISH_DATA" in Path("recipes", name).read_text():
        monkeypatch.setenv("BURNISH_DATA", str(request.getfixturevalue("shared_data")))
    recipe = load_yaml(f"recipes/{name}")
    for row in recipe["rows"]:
        row |= {"model": decoder} if "model" in row else {}
        row["learning_rate"] = (coerce(row.get("learning_rate", 0), list[float], "row") or [0.0])[0]
    recipe["model"] = encoder if recipe["model"] == encoder else decoder
    recipe |= {"max_steps": 2, "seeds": [0], "examples": recipe.get("examples", [])[:1], "controls": False}
    recipe |= {"latency": {"runs": 1, "warmups": 0, "new_tokens": 1, "prompt_tokens": 4}, "shape": [2, 16]}
    short = [{"name": task} if isinstance(task, str) else task for task in recipe["tasks"]]
    recipe["tasks"] = [task | {"max_rows": 8, "max_length": 48} for task in short]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert main(["compare", str(path), "--output-dir", str(tmp_path / "out")]) == 0
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert [(row["name"], row["task"], row["error"]) for row in rows if row["status"] != "ok"] == []
    assert len(rows) == len(recipe["rows"]) * len(recipe["tasks"])


@pytest.mark.parametrize("name", BY_VERB["bench"])
def test_bench(tmp_path, monkeypatch, name):
    """Every strategy of the recipe once, on a small model of its family."""
    monkeypatch.setattr(strategies, "ROUNDS", 1)
    recipe = load_yaml(f"recipes/{name}")
    folder = tiny.write(tmp_path / "model", tiny.reference("bloom", hidden_size=128, n_head=4))
    recipe |= {"model": str(folder), "runs": 1, "warmups": 0, "max_new_tokens": 2, "prompt_tokens": 4}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert main(["bench", str(path), "--output-dir", str(tmp_path / "out")]) == 0
    rows = json.loads((tmp_path / "out" / "bench.json").read_text())["rows"]
    assert [(row["strategy"], row["error"]) for row in rows] == [(name, None) for name in recipe["strategies"]]
