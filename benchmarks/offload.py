"""A model four times as large as the memory that it may take: its tokens a second, against the disk's own rate.

    python benchmarks/offload.py [--tokens 12] [--threads 2] [--layers 44] [--folder MODEL]

The model is a random Llama in bfloat16, of 44 layers 2.1 thousand million parameters. A process that may take a
quarter of the model's bytes in all, torch and burnish included, in a cgroup that kills it beyond where one can be
made, generates greedily, one prompt of 8 tokens; the first token, with which everything is read for the first time,
is not counted. Bytes read are the kernel's count (/proc/self/io). Since a disk's rate changes by the second, the same
process reads the model's file once after every token, by direct reads of the same size with as many threads and
nothing else, once what was sent for ahead is there: the share is a token's rate of reading over that of the two passes
around it, and beside it over the fastest of all passes. Another process generates the same tokens with the model in
memory; they must be equal. Writes benchmarks/results/offload.json.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from qlora_memory import SHAPE
from training import write_base

PROMPT = [5, 17, 29, 311, 2048, 7, 19, 23]
SHARE = 4  # the limit is the model's bytes over this
GROUPS = [Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/memory")]  # of version 2 and 1
ROOM = 32 << 20  # that the cgroup counts besides the process's resident bytes: page tables, buffers of the kernel
RESULT = Path(__file__).parent / "results" / "offload.json"


def read_bytes() -> int:
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["read_bytes"])


def disk_rate(path: Path, piece: int, threads: int) -> float:
    """Bytes per second of reading a file from its begin to its end, past the page cache."""
    pieces, lock = iter(range(0, path.stat().st_size, piece)), threading.Lock()
    file = os.open(path, os.O_RDONLY | os.O_DIRECT)

    def work() -> None:
        buffer = mmap.mmap(-1, piece)
        while True:
            with lock:
                start = next(pieces, None)
            if start is None:
                return
            os.preadv(file, [buffer], start)

    workers = [threading.Thread(target=work) for _ in range(threads)]
    began = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    os.close(file)
    return path.stat().st_size / (time.perf_counter() - began)


def run(task: dict[str, Any]) -> dict[str, Any]:
    """What a child process does: generate, in memory or under the limit."""
    import torch

    torch.set_num_threads(task["threads"])
    from burnish import device
    from burnish.engine.generate import GenerationConfig, stream
    from burnish.model.example import IGNORE, Example
    from burnish.place.reading import PIECE, THREADS
    from burnish.store.checkpoint import load

    path = Path(task["folder"]) / "model.safetensors"
    found: dict[str, Any] = {"base_bytes": device.resident_memory()}
    limit = None
    if task["limited"]:
        limit = found["memory_limit_bytes"] = path.stat().st_size // SHARE
    began = time.perf_counter()
    model = load(path.parent, memory_limit=limit)
    found["load_seconds"] = time.perf_counter() - began
    device.reset_peak_memory()
    settings = GenerationConfig(max_new_tokens=task["tokens"] + 1, min_new_tokens=task["tokens"] + 1)
    pieces = stream(model, [Example(PROMPT, [IGNORE] * len(PROMPT))], settings)
    seconds, read, disk = [], [], []
    while not found.get("ids"):
        before, began = read_bytes(), time.perf_counter()
        piece = next(pieces)
        seconds.append(time.perf_counter() - began)
        read.append(read_bytes() - before)
        found["ids"] = piece.done.ids if piece.done else []
        if limit is not None:
            settle()
            disk.append(disk_rate(path, PIECE, THREADS))
    found["peak_bytes"] = device.peak_memory()
    found |= {"first_token_seconds": seconds[0], "token_seconds": seconds[1:]}
    found["seconds_per_token"] = statistics.median(seconds[1:])
    found["bytes_read_per_token"] = statistics.median(read[1:])
    if limit is not None:
        around = [(a + b) / 2 for a, b in zip(disk, disk[1:], strict=False)]
        rates = [count / time for count, time in zip(read[1:], seconds[1:], strict=True)]
        found |= {"bytes_per_second": rates, "disk_bytes_per_second": around}
        found["share_of_disk_rate"] = statistics.median(a / b for a, b in zip(rates, around, strict=True))
        found["share_of_fastest_pass"] = statistics.median(rates) / max(disk)
    return found


def settle() -> None:
    """Wait until nothing more is read."""
    before = -1
    while (now := read_bytes()) != before:
        before = now
        time.sleep(0.05)


@contextmanager
def confined(limit: int) -> Iterator[Path | None]:
    """A memory cgroup of so many bytes; None where none can be made."""
    for parent in GROUPS:
        group = parent / f"burnish-offload-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        files = [group / name for name in ("memory.max", "memory.limit_in_bytes")]
        file = next((file for file in files if os.access(file, os.W_OK)), None)
        if file is not None:
            file.write_text(str(limit + ROOM))
            yield group
            group.rmdir()
            return
        group.rmdir()
    yield None


def spawn(task: dict[str, Any], group: Path | None = None) -> dict[str, Any]:
    paths = {"OMP_NUM_THREADS": str(task["threads"]), "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, __file__, "--worker", json.dumps(task)]
    if group is not None:
        command = ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh", *command]
    done = subprocess.run(command, env={**os.environ, **paths}, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--tokens", type=int, default=12, help="counted ones, after the first")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=44)
    parser.add_argument("--folder", type=Path, help="where the model is, or is written; else a temporary folder")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(run(json.loads(arguments.worker))))
        return

    from burnish.device import environment

    shape = {**SHAPE, "num_hidden_layers": arguments.layers}
    with tempfile.TemporaryDirectory() as name:
        folder = arguments.folder or Path(name)
        if not (folder / "config.json").exists():
            write_base(folder, shape)
        size = (folder / "model.safetensors").stat().st_size
        task = {"folder": str(folder), "tokens": arguments.tokens, "threads": arguments.threads}
        with confined(size // SHARE) as group:
            runs = {"offload": {**spawn(task | {"limited": True}, group), "in_a_cgroup": group is not None}}
        runs["in memory"] = spawn(task | {"limited": False})
    assert runs["offload"].pop("ids") == runs["in memory"].pop("ids")
    report = {
        "command": shlex.join(["python", "benchmarks/offload.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": environment(),
        "work": {
            "shape": {**SHAPE, "num_hidden_layers": arguments.layers},
            "model_bytes": size,
            "prompt_tokens": len(PROMPT),
            "threads": arguments.threads,
        },
        "runs": runs,
    }
    RESULT.write_text(json.dumps(report, indent=2) + "\n")
    for name, found in runs.items():
        print(
            f"{name}: {1 / found['seconds_per_token']:.2f} tokens/s, first token {found['first_token_seconds']:.1f} s, "
            f"peak {found['peak_bytes'] >> 20} MiB, {found['bytes_read_per_token'] / 1e6:.0f} MB read a token"
        )
    found = runs["offload"]
    print(
        f"limit {found['memory_limit_bytes'] >> 20} MiB, base {found['base_bytes'] >> 20} MiB; disk "
        f"{statistics.median(found['disk_bytes_per_second']) / 1e6:.0f} MB/s, of which a token reads "
        f"{found['share_of_disk_rate']:.0%}, and {found['share_of_fastest_pass']:.0%} of its fastest pass"
    )


if __name__ == "__main__":
    main()
