"""Processes that end, and what the user reads."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

import pytest
import tiny
from placed_jobs import free_port

from burnish.cli import main

PROGRAM = """
import os, sys
from burnish.place import ranks
{changes}
from burnish.cli import main
sys.exit(main(sys.argv[1:]))
"""
QUICK = "ranks.SILENCE = 4"
DIES_HERE = f"""
{QUICK}
if os.environ["RANK"] == "1":
    ranks.dist.init_process_group = lambda *_, **__: os._exit(9)
"""


def start(world: int, *words: str, changes: str = QUICK, only: Sequence[int] = ()) -> list[subprocess.Popen]:
    """`burnish` with `words` in every rank of `world`, or in `only` some, with `changes` to `ranks`."""
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world)}
    pipe = subprocess.PIPE
    return [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM.format(changes=changes), *words],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=pipe, stderr=pipe, text=True,
        )
        for rank in only or range(world)
    ]  # fmt: skip


@pytest.mark.parametrize(("world", "place"), [(2, "tensor_parallel"), (4, "tensor_parallel"), (4, "layer_parallel")])
def test_torchrun_gives_the_text_of_one_process(tmp_path, capfd, world, place):
    folder = tiny.write(tmp_path / "model", tiny.reference("llama", num_hidden_layers=4))
    words = ["-m", "burnish", "generate", str(folder), "--device", "cpu", "--prompt", "the cat sees"]
    words += ["--max-new-tokens", "12", "--min-new-tokens", "12"]
    assert main(words[2:]) == 0
    alone = capfd.readouterr().out
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world)]
    torchrun += ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    done = subprocess.run([*torchrun, *words, "--place", place], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and done.stdout == alone and len(alone.split()) > 6, done.stderr


ENDLESS = ["--prompt", "the cat", "--max-new-tokens", "1000000", "--min-new-tokens", "1000000", "--device", "cpu"]


@pytest.mark.parametrize(
    ("place", "world", "dead", "changes"),
    [("layer_parallel", 3, 2, QUICK), ("tensor_parallel", 2, 0, QUICK), ("tensor_parallel", 2, 1, "")],
    ids=["in layers", "with the store", "at the real pace"],
)
def test_a_dead_rank_ends_the_others_and_is_named(tmp_path, place, world, dead, changes):
    folder = tiny.write(tmp_path / "model", tiny.reference("bloom", n_layer=3))
    running = start(world, "generate", str(folder), "--place", place, *ENDLESS, changes=changes)
    try:
        assert running[0].stdout.read(20), "generation is under way"
        running[dead].send_signal(signal.SIGKILL)
        began = time.monotonic()
        for rank, process in enumerate(running):
            _, error = process.communicate(timeout=60)
            if rank != dead:
                assert f"rank {dead} " in error.strip().splitlines()[-1] and process.returncode == 1, error
        assert time.monotonic() - began < 60
    finally:
        for process in running:
            process.kill()


@pytest.mark.parametrize(
    ("world", "only", "missing"), [(2, [0], "rank 1"), (2, [1], "rank 0"), (4, [0, 2], "ranks 1, 3")]
)
def test_a_rank_that_never_comes_is_named_in_time(root, world, only, missing):
    """One of those that wait says it; the others end with 2, too, and silently."""
    folder = str(tiny.folder(root, "llama"))
    words = ["generate", folder, "--place", "tensor_parallel", "--prompt", "x"]
    running = start(world, *words, changes="ranks.ARRIVAL = 8", only=only)
    try:
        ended = [(process.communicate(timeout=60)[1], process.returncode) for process in running]
    finally:
        for process in running:
            process.kill()
    assert [status for _, status in ended] == [2] * len(only), ended
    (line,) = [line for error, _ in ended for line in error.splitlines()]
    assert line.startswith(f"burnish generate: {missing} of {world} did not come to 127.0.0.1:"), line


def test_a_rank_that_dies_between_coming_and_the_group_is_named(root):
    words = ["generate", str(tiny.folder(root, "llama")), "--place", "tensor_parallel", "--prompt", "x"]
    running = start(2, *words, changes=DIES_HERE)
    try:
        _, error = running[0].communicate(timeout=60)
        assert running[1].wait(60) == 9 and running[0].returncode == 1
        assert "rank 1 gave no sign of life for 4 s" in error.splitlines()[-1]
    finally:
        for process in running:
            process.kill()


def test_a_mistake_is_told_once_and_all_ranks_end_with_2(root):
    running = start(2, "generate", str(tiny.folder(root, "mt5")), "--prompt", "x", "--place", "layer_parallel")
    ended = [(process.communicate(timeout=60)[1], process.returncode) for process in running]
    assert [status for _, status in ended] == [2, 2]
    lines = [line for error, _ in ended for line in error.splitlines() if line.startswith("burnish")]
    assert len(lines) == 1 and "2 ranks for a model of 1 layers; start at most 1" in lines[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--place", "tensor_parallel"], "torchrun --nproc-per-node 2 -m burnish generate"),
        (["--place", "tensor-parallel"], "did you mean 'tensor_parallel'"),
        (["--max-memory", "{cpu: 1GB}"], "max_memory: is for place layer_parallel"),
        (["--place", "layer_parallel", "--max-memory", "{cuda:7: 8GB}"], "device: 'cuda:7'"),
        (["--place", "layer_parallel", "--max-memory", "{cpu: 8Gb}"], "expected bytes"),
        (["--place", "layer_parallel", "--max-memory", "{cpu: 20KB}"], "max_memory: embedding and head take"),
        (["--place", "layer_parallel", "--max-memory", "{cpu: 25KB}"], "max_memory: a layer takes"),
        (["--place", "layer_parallel", "--max-memory", "{cpu: 50KB}"], "max_memory: the model takes"),
        (["--place", "layer_parallel", "--adapters", "{a: lora}"], "lora"),
    ],
)
def test_mistakes(root, capsys, words, message):
    assert main(["generate", str(tiny.folder(root, "llama")), "--prompt", "x", *words]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert message in error[-1]


def test_ranks_that_nothing_is_spread_over(root, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert main(["generate", str(tiny.folder(root, "llama")), "--prompt", "x"]) == 2
    assert "place: several processes were started" in capsys.readouterr().err


def test_a_network_of_transformers_is_refused(tmp_path, capsys):
    import tiny_foreign

    folder = tiny_foreign.folder(tmp_path, "stablelm")
    assert main(["generate", str(folder), "--prompt", "x", "--place", "layer_parallel"]) == 2
    assert "is not burnish's own network" in capsys.readouterr().err
