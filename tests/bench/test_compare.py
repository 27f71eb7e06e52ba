"""The comparison on tiny models and the user's own data: rows, failures, reruns, controls."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny

from burnish.bench.compare import CompareConfig, compare
from burnish.bench.tasks import load_task, majority, parse_task, shuffled
from burnish.cli import main
from burnish.config import UserError

PAIRS = [("the cat sees the", "dog"), ("the dog sees the", "cat"), ("where is the red", "fish")]
LORA = {"name": "LoRA", "techniques": [{"lora": {"r": 2}}], "learning_rate": 0.01}
QUICK = {
    "seeds": [0, 1], "max_steps": 6, "per_device_train_batch_size": 4, "shape": [2, 16],
    "latency": {"prompt_tokens": 8, "new_tokens": 3, "runs": 3, "warmups": 1},
}  # fmt: skip


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def data(tmp_path) -> str:
    rows = [{"prompt": prompt, "completion": " " + answer} for prompt, answer in PAIRS] * 8
    return write_rows(tmp_path / "train.jsonl", rows)


def run(tmp_path, model, tasks, rows, **changes):
    lines: list[str] = []
    config = CompareConfig(model=str(model), tasks=tasks, rows=rows, output_dir=tmp_path / "out", **(QUICK | changes))
    return compare(config, progress=lines.append), lines


def test_rows_failures_and_reruns(root, tmp_path, data):
    task = {"name": "mine", "data": data, "eval_data": data}
    rows = [
        {"name": "base"},
        LORA,
        {"name": "NF4", "techniques": ["nf4"]},
        {"name": "broken", "techniques": ["nf4", "magnitude"]},
    ]
    results, lines = run(tmp_path, tiny.folder(root, "llama"), [task], rows)
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert written["rows"] == json.loads(json.dumps(results["rows"]))
    found = {row["name"]: row for row in results["rows"]}
    assert set(found) == {"base", "LoRA", "NF4", "broken", "shuffled labels (LoRA)", "majority answer"}
    lora = found["LoRA"]
    assert lora["status"] == "ok" and lora["quality"]["metric"] == "exact_match" and len(lora["quality"]["seeds"]) == 2
    assert lora["trainable_parameters"] == 2 * 2 * (2 * 32 + 32 + 16)
    assert 0 < lora["trainable_share"] < 1 and lora["train_seconds"] > 0 and lora["curve"]
    for name in ("base", "LoRA", "NF4"):
        row = found[name]
        assert row["latency_ms"]["p95"] >= row["latency_ms"]["p50"] > 0 and row["tokens_per_second"] > 0
        assert row["artifact_bytes"] > 0 and row["peak_memory_bytes"] > 0
    assert found["NF4"]["artifact_bytes"] < found["base"]["artifact_bytes"]
    assert lora["artifact_bytes"] < found["NF4"]["artifact_bytes"]
    assert found["broken"]["status"] == "failed" and "prune before quantising" in found["broken"]["error"]
    assert found["majority answer"]["control"] and found["majority answer"]["quality"]["mean"] == pytest.approx(1 / 3)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "LoRA" in page and "prune before quantising" in page

    again, lines = run(tmp_path, tiny.folder(root, "llama"), [task], rows)
    ran = [line for line in lines if not line.endswith(": kept")]
    assert ran and all("broken" in line for line in ran)
    assert again["rows"] == results["rows"]
    with pytest.raises(UserError, match="other seeds"):
        run(tmp_path, tiny.folder(root, "llama"), [task], rows, seeds=[5])


def test_rates_are_tried_on_development_rows_and_examples_give_a_curve(root, tmp_path, data):
    task = {"name": "mine", "data": data, "eval_fraction": 0.4}
    tried = {"name": "tried", "techniques": [{"lora": {"r": 2}}], "learning_rate": [1e-9, 0.05], "max_steps": 30}
    other = {"name": "other", "techniques": ["ia3"], "learning_rate": {"mine": 0.1}, "tasks": ["mine"]}
    other["model"] = str(tiny.folder(root, "gpt2"))
    tasks = [task, {"name": "more", "data": data, "metric": "perplexity"}]
    results, lines = run(tmp_path, tiny.folder(root, "llama"), tasks, [tried, other], examples=[1, 4, 1000])
    found = {(row["name"], row["task"]): row for row in results["rows"]}
    assert ("other", "more") not in found and found["other", "mine"]["status"] == "ok"
    assert sum(" at " in line for line in lines) == 4
    assert {line.partition("]")[0].partition("/")[2] for line in lines} == {str(len(lines))}
    perplexities = found["tried", "more"]["trials"]
    assert perplexities["0.05"] < perplexities["1e-09"] and found["tried", "more"]["learning_rate"] == 0.05
    row = found["tried", "mine"]
    assert row["trials"].keys() == {"1e-09", "0.05"} and row["learning_rate"] in (1e-9, 0.05)
    counts = [n for n, _, _ in row["examples"]]
    assert counts[:2] == [1, 4] and 4 < counts[2] < 24 and len(counts) == 3
    assert row["examples"][2][1] == row["quality"]["mean"]
    jobs = [json.loads(path.read_text()) for path in (tmp_path / "out" / "jobs").glob("*.json")]
    assert len(jobs) == len(lines)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Quality by number of training examples" in page


def test_equal_rows_run_once(root, tmp_path, data):
    """Side by side they would write the same files."""
    rows = [{**LORA, "name": name, "learning_rate": [0.01, 0.02]} for name in ("one", "two", "three")]
    results, lines = run(
        tmp_path, tiny.folder(root, "llama"), [{"name": "mine", "data": data}], rows, workers=3, controls=False
    )
    assert [row["name"] for row in results["rows"]] == ["one", "two", "three"]
    assert len({row["quality"]["mean"] for row in results["rows"]}) == 1
    assert [line.partition(" ")[0] for line in lines] == [f"[{n}/5]" for n in range(1, 6)]


def test_the_splits_of_a_task_share_no_row(tmp_path):
    rows = [{"prompt": f"a{i}", "completion": f" b{i}"} for i in range(40)]
    path, held = write_rows(tmp_path / "x.jsonl", rows), write_rows(tmp_path / "dev.jsonl", rows[:3])
    test, dev = (load_task(parse_task({"name": "x", "data": path, "split": split})) for split in ("test", "dev"))
    parts = [[row["prompt"] for row in part] for part in (dev.train, dev.test, test.test)]
    assert sorted(sum(parts, [])) == sorted(row["prompt"] for row in rows)
    assert sorted(parts[0] + parts[1]) == sorted(row["prompt"] for row in test.train)
    given = load_task(parse_task({"name": "x", "data": path, "dev_data": held, "split": "dev"}))
    assert given.test == rows[:3]
    few, more = (load_task(parse_task({"name": "x", "data": path, "train_rows": n})) for n in (4, 9))
    assert few.train == more.train[:4] and len(more.train) == 9 and more.test == test.test


def test_a_row_that_runs_out_of_memory_or_time_is_its_own_loss(root, tmp_path, data):
    task = {"name": "mine", "data": data, "eval_data": data}
    rows = [{"name": "base"}]
    results, _ = run(tmp_path, tiny.folder(root, "llama"), [task], rows, memory_limit=2e6, controls=False)
    assert results["rows"][0]["status"] == "oom"
    results, _ = run(tmp_path / "b", tiny.folder(root, "llama"), [task], rows, timeout=0.01, controls=False)
    assert results["rows"][0]["status"] == "timeout" and results["rows"][0]["quality"]["mean"] is None


def test_classification_on_an_encoder_gets_a_head(root, tmp_path):
    words = [("the cat runs", "yes"), ("the dog sleeps", "no"), ("a red fish runs", "yes"), ("a big dog sleeps", "no")]
    rows = [{"one": text, "two": "the cat", "label": label} for text, label in words] * 8
    path = write_rows(tmp_path / "c.jsonl", rows)
    task = {"name": "c", "data": path, "eval_data": path, "text_columns": ["one", "two"], "label_column": "label"}
    upper = {"name": "upper", "techniques": [{"transfer": {"train_layers": 1}}], "learning_rate": 0.01}
    results, _ = run(tmp_path, tiny.folder(root, "bert", "none"), [task], [{"name": "base"}, LORA, upper])
    assert results["rows"][2]["techniques"] == [
        {"transfer": {"num_labels": 2, "label_names": ["no", "yes"], "train_layers": 1}}
    ]
    found = {row["name"]: row for row in results["rows"]}
    assert found["LoRA"]["status"] == "ok" and found["LoRA"]["quality"]["metric"] == "accuracy"
    assert found["LoRA"]["latency_ms"]["mean"] > 0


@pytest.mark.parametrize(("changes", "message"), [
    ({"tasks": ["neer"]}, "did you mean 'near'"),
    ({"rows": [{"name": "x", "techniques": ["loraa"]}]}, "did you mean 'lora'"),
    ({"rows": [{"name": "x", "tecniques": []}]}, "did you mean 'techniques'"),
    ({"rows": [LORA, LORA]}, "stands twice"),
    ({"rows": [{"name": "x", "tasks": ["mein"]}]}, "did you mean 'mine'"),
    ({"rows": [{**LORA, "learning_rate": ["fast"]}]}, "row 'LoRA': learning_rate: expected number"),
    ({"rows": [{**LORA, "model": "no/such-folder/here"}]}, "no such folder"),
    ({"seeds": []}, "seeds: give at least one"),
    ({"tasks": [{"name": "x", "data": "nowhere.jsonl"}]}, "nowhere.jsonl"),
    ({"model": "no/such-folder/here"}, "no such folder"),
])  # fmt: skip
def test_mistakes_are_told_before_anything_runs(root, tmp_path, data, changes, message):
    task = {"name": "mine", "data": data, "eval_data": data}
    asked = {"model": str(tiny.folder(root, "llama")), "tasks": [task], "rows": [LORA], **changes}
    with pytest.raises(UserError, match=message):
        compare(CompareConfig(output_dir=tmp_path / "out", **asked))
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_else_is_left_alone(root, tmp_path, data):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        run(tmp_path, tiny.folder(root, "llama"), [{"name": "m", "data": data}], [LORA])
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"


def test_controls():
    task = load_task(parse_task("near"))
    assert 0 < majority(task) < 0.2
    dealt = shuffled(task, 0)
    assert sorted(r["completion"] for r in dealt) == sorted(r["completion"] for r in task.train)
    assert [r["completion"] for r in dealt] != [r["completion"] for r in task.train]
    assert [r["prompt"] for r in dealt] == [r["prompt"] for r in task.train]


def test_an_ngram_model_is_a_row_beside_neural_ones(root, tmp_path, data):
    """Of the same tokenizer, so that their perplexities are of the same tokens."""
    base = str(tiny.folder(root, "llama"))
    given = ["--data", data, "--tokenizer", base, "--output-dir", str(tmp_path / "ngram")]
    assert main(["pretrain", "--model", "ngram", *given]) == 0
    rows = [{"name": "base"}, {"name": "n-gram", "model": str(tmp_path / "ngram")}]
    task = {"name": "mine", "data": data, "metric": "perplexity"}
    results, _ = run(tmp_path, base, [task], rows, controls=False)
    found = {row["name"]: row["quality"]["mean"] for row in results["rows"]}
    assert found["n-gram"] < found["base"] / 5  # it has counted these very rows


def test_an_encoder_decoder_is_compared(root, tmp_path, data):
    labels = [{"text": prompt, "label": answer} for prompt, answer in PAIRS] * 4
    path = write_rows(tmp_path / "labels.jsonl", labels)
    tasks = [
        {"name": "mine", "data": data, "eval_data": data},
        {"name": "labels", "data": path, "eval_data": path, "text_columns": ["text"], "label_column": "label"},
    ]
    rows = [{"name": "base"}, LORA, {"name": "prompt", "techniques": ["prompt_tuning"], "learning_rate": 0.1}]
    results, _ = run(tmp_path, tiny.folder(root, "t5"), tasks, rows, controls=False, seeds=[0])
    assert [row["error"] for row in results["rows"] if row["status"] != "ok"] == []
    metrics = {(row["name"], row["task"]): row["quality"]["metric"] for row in results["rows"]}
    assert metrics["LoRA", "mine"] == "exact_match" and metrics["LoRA", "labels"] == "accuracy"
