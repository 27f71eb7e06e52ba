"""Whose names the classes have and in which order, from `burnish tune` to `burnish eval`, and a kept head."""

from __future__ import annotations

import json

import pytest
import tiny
import torch

from burnish.bench.rows import RowConfig, task_cells
from burnish.bench.tasks import load_task, parse_task
from burnish.cli import main
from burnish.config import UserError
from burnish.store.checkpoint import load

TEXTS = {"negative": "the dog sleeps", "positive": "the cat runs"}


def rows_of(path, labels):
    """Eight rows of each label, told apart by their texts; the labels stand for TEXTS in their order."""
    texts = [*TEXTS.values(), "a red fish", "a big bird"]
    rows = [{"text": text, "label": label} for text, label in zip(texts, labels, strict=False)] * 8
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tune(model, data, out, techniques, *more):
    """Train on `data`; the names of config.json in the order of their classes."""
    words = ["tune", str(model), "--data", str(data), "--text-columns", "text", "--label-column", "label"]
    words += ["--techniques", json.dumps(techniques), "--output-dir", str(out), "--learning-rate", "5e-3"]
    assert main([*words, "--max-steps", "40", "--logging-steps", "1", *more]) == 0
    return list(load(out).hf_config["id2label"].values())


def accuracy(model, data, capsys):
    words = ["eval", str(model), "--data", str(data), "--text-columns", "text", "--label-column", "label", "--json"]
    capsys.readouterr()
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)[str(data)]
    assert found["metric"] == "accuracy"
    return found["value"]


FULL = {"train_layers": -1}


@pytest.mark.parametrize("given", [["positive", "negative"], ["negative", "positive"], None])
def test_names_are_the_datas_labels_in_the_order_given(root, tmp_path, capsys, given):
    data = rows_of(tmp_path / "rows.jsonl", ["negative", "positive"])
    techniques = [{"transfer": FULL | ({"label_names": given} if given else {})}]
    names = tune(tiny.folder(root, "bert", "none"), data, tmp_path / "out", techniques)
    assert names == (given or ["negative", "positive"])
    model = load(tmp_path / "out")
    for label, text in TEXTS.items():
        batch = model.tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            hidden = model.net(batch["input_ids"])
            picked = model.net.logits(model.net.pool(hidden, batch["attention_mask"].bool())).argmax(-1)
        assert names[int(picked)] == label
    assert accuracy(tmp_path / "out", data, capsys) == 1.0
    one = tmp_path / "one.jsonl"  # rows of the last class alone
    one.write_text(json.dumps({"text": TEXTS["positive"], "label": "positive"}) + "\n")
    assert accuracy(tmp_path / "out", one, capsys) == 1.0


@pytest.mark.parametrize("labels", [[0, 1], [1, 2], ["0", "1"]])
def test_names_of_whole_numbers_are_by_position(root, tmp_path, capsys, labels):
    data = rows_of(tmp_path / "rows.jsonl", labels)
    techniques = [{"transfer": FULL | {"label_names": ["bad", "good"]}}]
    assert tune(tiny.folder(root, "bert", "none"), data, tmp_path / "out", techniques) == ["bad", "good"]
    assert accuracy(tmp_path / "out", data, capsys) == 1.0


def test_whole_numbers_are_sorted_by_value(root, tmp_path):
    data = rows_of(tmp_path / "rows.jsonl", [10, 2])
    assert tune(tiny.folder(root, "bert", "none"), data, tmp_path / "out", ["transfer"]) == ["2", "10"]


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_a_classifier_keeps_its_head_where_it_has_the_classes(root, tmp_path, capsys, family):
    head = "none" if family == "bert" else ""
    data = rows_of(tmp_path / "rows.jsonl", ["negative", "positive"])
    techniques = [{"transfer": FULL | {"label_names": ["positive", "negative"]}}]
    tune(tiny.folder(root, family, head), data, tmp_path / "first", techniques)
    assert tune(tmp_path / "first", data, tmp_path / "on", ["lora"]) == ["positive", "negative"]
    assert "keeps its head for positive, negative" in capsys.readouterr().out
    first, on = load(tmp_path / "first"), load(tmp_path / "on")
    if family != "t5":  # whose head only its chain tells: it goes on training
        assert (tmp_path / "on" / "adapter_config.json").exists()
        assert torch.equal(first.net.score.weight.dense, on.net.score.weight.dense)
    assert accuracy(tmp_path / "on", data, capsys) == 1.0
    if family != "t5":
        other = rows_of(tmp_path / "other.jsonl", ["a", "b", "c"])
        assert tune(tmp_path / "first", other, tmp_path / "new", ["lora"]) == ["a", "b", "c"]
        assert tune(tmp_path / "on", data, tmp_path / "again", [{"prompt_tuning": {"num_virtual_tokens": 2}}]) == [
            "positive",
            "negative",
        ]


def test_an_adapter_with_a_head_goes_on_with_it(root, tmp_path, capsys):
    data = rows_of(tmp_path / "rows.jsonl", ["negative", "positive"])
    tune(tiny.folder(root, "bert", "none"), data, tmp_path / "first", ["lora"])
    assert (tmp_path / "first" / "adapter_config.json").exists()
    more = [{"prompt_tuning": {"num_virtual_tokens": 2}}]
    assert tune(tmp_path / "first", data, tmp_path / "on", more) == ["negative", "positive"]
    assert "keeps its head for negative, positive" in capsys.readouterr().out


def test_a_comparison_knows_names_by_the_same_rule(tmp_path):
    data = str(rows_of(tmp_path / "rows.jsonl", ["negative", "positive"]))
    task = {"name": "mine", "data": data, "eval_data": data, "text_columns": ["text"], "label_column": "label"}
    row = RowConfig("a", [{"transfer": {"label_names": ["positive", "negative"]}}], model="pebble")
    (cell,) = task_cells([row], load_task(parse_task(task)), False)
    assert cell.techniques == [{"transfer": {"num_labels": 2, "label_names": ["negative", "positive"]}}]
    row = RowConfig("a", [{"transfer": {"label_names": ["positive", "bad"]}}], model="pebble")
    with pytest.raises(UserError, match="positive, bad are not the data's labels, negative, positive"):
        task_cells([row], load_task(parse_task(task)), False)
