"""Every recipe runs: shortened, on a tiny model where its own would take long."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny

from burnish.cli import main
from burnish.store.checkpoint import load

ROOT = Path(__file__).resolve().parents[1]
PRETRAINED = {"pebble": 6_000_000, "pebble-encoder": 1_800_000}  # recipe -> its model has more parameters than these
TUNED = sorted(path.name for path in (ROOT / "recipes").glob("*.yaml") if path.stem not in (*PRETRAINED, "compare"))


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("name", TUNED)
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


@pytest.mark.parametrize("name", PRETRAINED)
def test_pretrain(tmp_path, name):
    out = tmp_path / "out"
    words = ["pretrain", f"recipes/{name}.yaml", "--documents", "300", "--max-steps", "3", "--no-compile"]
    assert main([*words, "--output-dir", str(out)]) == 0
    model = load(out)
    assert model.parameter_count() > PRETRAINED[name] and len(model.tokenizer) <= model.spec.vocab_size


def test_compare(root, tmp_path):
    words = ["compare", "recipes/compare.yaml", "--model", str(tiny.folder(root, "llama")), "--max-steps", "3"]
    quick = ["--seeds", "0", "--latency", "{runs: 2, warmups: 1, new_tokens: 2}", "--shape", "2,16", "--no-controls"]
    assert main([*words, *quick, "--output-dir", str(tmp_path / "out")]) == 0
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert len(rows) == 6 and {row["status"] for row in rows} == {"ok"}
