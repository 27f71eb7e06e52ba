"""`burnish bench` on a tiny model: every strategy's text and times, failures, and what is wrong with the input."""

from __future__ import annotations

import html
import io
import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from burnish import chain, cli
from burnish.bench import strategies, strategies_page
from burnish.bench.strategies import BenchConfig, bench, rows_of, run, tables
from burnish.bench.strategies_page import kernel_lines, page
from burnish.bench.strategy_job import over_ranks, weights
from burnish.config import UserError
from burnish.engine.decoding import GenerationConfig
from burnish.engine.reply import Row, after, begin
from burnish.model.example import IGNORE, Example
from burnish.native import choice
from burnish.store.checkpoint import load

LIMITS = {"read_bytes_per_second": 1e10, "operations_per_second": 1e12, "dtype": "float32"}


def test_every_strategy_is_timed_and_shows_its_text(root, tmp_path, capsys):
    folder = str(tiny.folder(root, "llama"))
    words = ["bench", folder, "--runs", "3", "--warmups", "0", "--max-new-tokens", "4", "--prompt", "the cat sees"]
    words += ["--strategies", "plain,int8,nf4+fused"]
    assert cli.main([*words, "--batch-sizes", "1,3", "--output-dir", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "bench.json").read_text())
    assert [(row["strategy"], row["batch_size"]) for row in found["rows"]] == [
        (name, size) for name in ("plain", "int8", "nf4+fused") for size in (1, 3)
    ]
    text = (tmp_path / "report.html").read_text()
    assert all(row["strategy"] in text for row in found["rows"]) and "decodes fastest" in text
    for row in found["rows"]:
        time = row["latency_ms"]
        assert row["status"] == "ok" and isinstance(row["text"], str) and row["prompt_tokens"] == 3
        assert 0 < time["p50"] <= time["p95"] and 0 < row["first_token_ms"] < time["mean"]
        assert time["mean"] == pytest.approx(row["first_token_ms"] + 3 * row["per_token_ms"])
        assert row["tokens_per_second"] == pytest.approx(4000 * row["batch_size"] / time["mean"])
        assert row["peak_memory_bytes"] > 0 and row["load_seconds"] > 0
        assert 0 < row["of_bandwidth"] < 1 and 0 < row["of_matrix_rate"] < 1
    assert found["limits"]["read_bytes_per_second"] > 1e8


def test_kernels_chosen_by_measurement_are_shown(tmp_path, monkeypatch, capsys):
    """By a model whose feed-forward is large enough to be timed, in the JSON and on the page, and in words."""
    wide = {"num_hidden_layers": 1, "intermediate_size": 32768}
    folder = str(tiny.write(tmp_path / "wide", tiny.reference("llama", **wide)))
    monkeypatch.setenv(choice.SWITCH, "1")
    words = ["bench", folder, "--runs", "2", "--warmups", "0", "--max-new-tokens", "2", "--prompt-tokens", "9"]
    assert cli.main([*words, "--strategies", "int8,plain", "--json", "--output-dir", str(tmp_path / "out")]) == 0
    found = json.loads(capsys.readouterr().out)
    (one,), _ = (row["kernels"] for row in found["rows"])
    assert (
        one["storage"] == "int8" and one["tokens"] == list(choice.COUNTS) and set(one["taken"]) <= {"burnish", "torch"}
    )
    (line,) = kernel_lines(found["rows"])
    assert line in html.unescape((tmp_path / "out" / "report.html").read_text())
    told = {
        "burnish burnish torch torch": "burnish's to 32 tokens, torch's above",
        "torch torch torch torch": "burnish's to 4 tokens, torch's above",
        "burnish burnish burnish burnish": "burnish's for any number of tokens",
    }
    for taken, text in told.items():
        assert text in kernel_lines([row("x", kernels=[{**one, "taken": taken.split()}])])[0]


def row(strategy: str, **found: object) -> dict[str, object]:
    time = {"mean": 13941.7, "std": 1466.4, "p50": 14160.2, "p95": 15267.5}
    return {
        "strategy": strategy, "batch_size": 1, "status": "ok", "error": None, "latency_ms": time,
        "first_token_ms": 780.8, "per_token_ms": 692.7, "tokens_per_second": 1.43, "peak_memory_bytes": 2463481856,
        "rank_memory_bytes": [2463481856, 1588592640], "load_seconds": 0.33, "of_bandwidth": 0.05,
        "of_matrix_rate": 0.27, "kernels": [], **found,
    }  # fmt: skip


@pytest.mark.parametrize("width", [80, 100, 140])
def test_the_tables_fit_their_terminal(width):
    """Every figure is whole, in one table or two; what failed takes no room."""
    rows = [row("int8+tensor_parallel+fused"), row("offload", status="failed", error="no disk " * 40)]
    text = shown(rows, width)
    assert "…" not in text and max(map(len, text.splitlines())) <= width and "disk" not in text
    figures = ("13,942 ± 1,466", "14,160", "15,268", "781", "693", "1.43", "2.29 GiB", "1.48", "0.33", "5%", "27%")
    assert all(text.count(figure) == 1 for figure in figures)
    assert text.count("strategy") == (1 if width == 140 else 2)
    assert text.count("offload") == text.count("failed") == 1
    heads = " ".join(text.split())
    assert all(word in heads for name in strategies_page.COLUMNS for word in name.split())
    assert shown(rows[1:], width).count("strategy") == 1


def shown(rows: list[dict[str, object]], width: int) -> str:
    """What a terminal of so many columns shows of the rows."""
    console = Console(width=width, record=True, file=io.StringIO())
    for one in tables({"rows": rows}, width):
        console.print(one)
    return console.export_text()


def test_two_batch_sizes_are_told_apart_in_both_tables():
    lines = shown([row("int8", batch_size=size, tokens_per_second=size / 7) for size in (3, 64)], 80).splitlines()
    found = [line.split() for line in lines if line.startswith("int8")]
    assert [words[1] for words in found] == ["3", "64"] * 2
    assert "0.429" in found[2] and "9.14" in found[3]


@pytest.mark.parametrize("family", ["llama", "bloom", "gpt2", "t5"])
def test_the_weights_counted_are_those_multiplied(root, family):
    """Of two prompts and of a token after them, by torch's own count of products. Biases and norms are read as well,
    for which there is a tolerance; GPT-2's positions, or what T5 does not use again, would exceed it."""
    model = load(tiny.folder(root, family))
    rows = [Row(0, Example([7, 8, 9] * 4, [IGNORE] * 12), model, GenerationConfig(max_new_tokens=3), Counter())] * 2
    with torch.inference_mode():
        batch, cache = begin(model, rows, 2)
        prompt = multiplied(lambda: after(model, batch, cache))
        token = multiplied(lambda: after(model, {"input_ids": torch.tensor([[7], [8]])}, cache))
    found = weights(model)
    assert 2 * (12 * found["prompt_weights"] + found["answer_weights"]) == prompt
    assert found["weight_bytes"] / 4 == pytest.approx(token / 2, rel=0.05)


def multiplied(work: Callable[[], object]) -> float:
    """How many times a weight was multiplied."""
    with FlopCounterMode(display=False) as counter:
        work()
    aten = torch.ops.aten
    return sum(counter.get_flop_counts()["Global"].get(kind, 0) for kind in (aten.mm, aten.addmm)) / 2


def test_quantised_weights_count_as_many_in_fewer_bytes(root):
    plain, packed = (weights(chain.apply(load(tiny.folder(root, "llama")), names)) for names in ([], ["int8"]))
    assert plain.pop("weight_bytes") > 2 * packed.pop("weight_bytes") and plain == packed


def test_every_place_answers_as_the_model_does(tmp_path):
    """Float32, so that no rounding tells them apart; every rank's memory is reported."""
    wide = {"hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 2}
    folder = tiny.write(tmp_path / "wide", tiny.reference("llama", **wide))
    names = ["plain", "fused", "layer_parallel", "tensor_parallel+fused", "offload"]
    config = BenchConfig(str(folder), names, prompt="the cat sees", runs=2, warmups=0, max_new_tokens=5)
    rows = bench(config)["rows"]
    assert [(row["strategy"], row["error"]) for row in rows] == [(name, None) for name in names]
    assert len({row["text"] for row in rows}) == 1
    ranks = {row["strategy"]: row["rank_memory_bytes"] for row in rows}
    assert all((ranks[name] is not None) == ("parallel" in name) for name in names)
    assert len(ranks["layer_parallel"]) == 2
    assert all(0 < row["of_bandwidth"] < 1 and row["per_token_ms"] > 0 for row in rows)


def test_a_strategy_that_fails_is_its_own_loss(tmp_path, capsys):
    folder = tiny.write(tmp_path / "odd", tiny.reference("llama", num_attention_heads=1, num_key_value_heads=1))
    config = BenchConfig(str(folder), ["tensor_parallel", "plain"], runs=1, warmups=0, max_new_tokens=2)
    assert run(replace(config, json=True)) == 0
    told = capsys.readouterr()
    assert told.err.count("tensor_parallel: failed") == 1 and told.err.count("plain: ok") == 2
    broken, plain = json.loads(told.out)["rows"]
    assert broken["refused"] and broken["status"] == "failed" and "attention heads" in broken["error"]
    assert plain["status"] == "ok"
    assert "attention heads" in page({"rows": [broken], "limits": LIMITS, "environment": {"cpu": "x", "gpus": []}}, "m")


@pytest.mark.parametrize("words", [["--json"], []])
def test_a_bench_of_which_nothing_ran_fails(monkeypatch, capsys, words):
    """With one line that says so and why; the rows are shown all the same."""
    rows = [{"strategy": name, "batch_size": 1, "status": "failed", "error": f"no {name}"} for name in ("int8", "nf4")]
    found = {"rows": rows, "limits": LIMITS, "environment": {}}
    monkeypatch.setattr(strategies, "bench", lambda config: found)
    assert cli.main(["bench", *words]) == 1
    told = capsys.readouterr()
    assert told.err == "burnish bench: no strategy ran; int8: no int8\n"
    assert json.loads(told.out) == found if words else all(f"{name}: no" in told.out for name in ("int8", "nf4"))
    rows[0]["refused"] = True
    assert cli.main(["bench", *words]) == 1
    rows[1]["refused"] = True
    assert cli.main(["bench", *words]) == 2
    capsys.readouterr()
    rows[1] = row("nf4", text="yes")
    assert cli.main(["bench", *words]) == 0 and not capsys.readouterr().err


def test_a_rank_that_dies_at_its_start_is_named_with_its_last_words(tmp_path, monkeypatch):
    quick = "from burnish.place import ranks; ranks.ARRIVAL = 5; from burnish.bench.job import main"
    run = f"exec {sys.executable} -c 'import sys; {quick}; sys.exit(main(*sys.argv[3:]))' \"$@\""
    interpreter = tmp_path / "python"
    interpreter.write_text(f"#!/bin/sh\n[ $RANK = 0 ] && {run}\necho no such library >&2; exit 3\n")
    interpreter.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(interpreter))
    with pytest.raises(RuntimeError, match="^rank 1 of 2 did not come to .* within 5 s.*; no such library$"):
        over_ranks({"kind": "bench", "ranks": 2, "threads": 2, "place": "tensor_parallel"})


@pytest.mark.parametrize("devices", [1, 2])
def test_the_limits_fractions_follow_from_the_times(devices):
    part = {"first_ms": [100.0, 100.0], "total_ms": [300.0, 500.0], "text": "x", "prompt_tokens": 10}
    job = {"status": "ok", "new_tokens": 4, "weight_bytes": 5e8, "prompt_weights": 9e8, "answer_weights": 1e9}
    job |= {"batches": [part], "peak_memory_bytes": 7, "load_seconds": 1.0, "devices": devices, "kernels": []}
    (row,) = rows_of("plain", [job, job], [2], LIMITS)
    dead = {"status": "failed", "error": "no disk\n  is left\n"}
    assert [row["error"] for row in rows_of("plain", [job, dead], [2, 3], LIMITS)] == ["no disk is left"] * 2
    assert row["per_token_ms"] == pytest.approx(100.0) and row["latency_ms"]["p95"] == 500.0
    assert row["of_bandwidth"] == pytest.approx(0.5 / devices)  # 0.5 GB in 0.1 s of 10 GB/s
    assert row["of_matrix_rate"] == pytest.approx(0.4 / devices)  # 2 * (9e8 * 20 + 1e9 * 2) in 0.1 s of 1e12


@pytest.mark.parametrize(("settings", "message"), [
    ({"strategies": ["int9"]}, "'int9' is unknown .did you mean 'int8'"),
    ({"strategies": ["int8+nf4"]}, "exclude each other"),
    ({"strategies": ["offload+fused"]}, "offload runs a checkpoint as it is stored"),
    ({"strategies": ["layer_parallel+fused"]}, "leave one away"),
    ({"ranks": 1}, "ranks: must be at least 2"),
    ({"strategies": []}, "strategies: name at least one"),
    ({"batch_sizes": []}, "batch_sizes: name at least one"),
    ({"runs": 0}, "runs: must be at least 1"),
    ({"max_new_tokens": 1}, "max_new_tokens: must be at least 2"),
    ({"batch_sizes": [1, 0]}, "batch_sizes: must be at least 1, is 0"),
    ({"batch_sizes": [2, 2]}, "batch_sizes: one is named twice"),
    ({"strategies": ["plain", "plain"]}, "strategies: one is named twice"),
    ({"strategies": ["int8+fused", "fused+int8"]}, "'fused.int8' is 'int8.fused' in other words"),
    ({"threads": -1}, "threads: must be at least 0"),
    ({"timeout": 0.0}, "timeout: must be above 0"),
    ({"dtype": "fp8"}, "dtype: 'fp8' is not one of"),
    ({"prompt": ""}, "prompt: it is empty"),
    ({"strategies": ["plain"], "memory_limit": 10**9}, "memory_limit: is offload's"),
    ({"output_dir": Path(__file__)}, "output_dir: .* cannot be made: File exists; choose another"),
    ({"output_dir": Path("made"), "model": "no/such-folder/here"}, "no such folder"),
    ({"model": "no/such-folder/here"}, "no such folder"),
])  # fmt: skip
def test_mistakes(root, tmp_path, monkeypatch, settings, message):
    """Each is told before anything runs, and no folder is left."""
    monkeypatch.setattr(strategies, "run_job", None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        bench(BenchConfig(**{"model": str(tiny.folder(root, "llama")), **settings}))
    assert not (tmp_path / "made").exists()
