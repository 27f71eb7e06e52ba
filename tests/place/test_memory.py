"""A model four times as large as the memory that it may take answers as the plain one does, seen from outside."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny

from burnish import load
from burnish.engine.decoding import GenerationConfig
from burnish.engine.generate import generate

CGROUPS = Path("/sys/fs/cgroup")


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """A random Llama of 300 MB."""
    return tiny.large_folder(tmp_path_factory.mktemp("large"), 768, 3072)


def answer(model: Path, *flags: str, group: Path | None = None) -> tuple[int, list[int], int]:
    """Exit status, tokens and most resident bytes of `burnish generate`, in a group of processes."""
    words = ["generate", str(model), "--prompt", "the cat sees", "--max_new_tokens", "3", "--json", *flags]
    status, reply, most = tiny.peak(words, group)
    return status, [] if status else json.loads(reply)["ids"], most


@pytest.fixture
def group() -> Iterator[Path]:
    """A new memory cgroup, of version 2 or 1."""
    own = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    version_2 = next((CGROUPS / path.strip("/") for _, names, path in own if not names), CGROUPS)
    for parent in (version_2, CGROUPS / "memory"):
        found = parent / f"burnish-test-{os.getpid()}"
        try:
            found.mkdir()
        except OSError:
            continue
        if limit_of(found) is not None:
            yield found
            found.rmdir()
            return
        found.rmdir()
    pytest.skip("no memory cgroup can be made here, in which the process would be confined")


def limit_of(group: Path) -> Path | None:
    files = [group / name for name in ("memory.max", "memory.limit_in_bytes")]
    return next((file for file in files if os.access(file, os.W_OK)), None)


@pytest.mark.skipif(sys.platform != "linux", reason="cgroups are Linux's")
def test_a_model_four_times_the_limit_gives_the_same_tokens(large, root, group):
    """The limit is what the process takes anyway and a quarter of the model; the cgroup kills what takes more."""
    (plain,) = generate(load(large), ["the cat sees"], GenerationConfig(max_new_tokens=3))
    base = answer(tiny.folder(root, "llama"))[2]
    quarter = (large / "model.safetensors").stat().st_size // 4
    file = limit_of(group)
    assert file is not None
    file.write_text(str(base + quarter))
    assert answer(large, group=group)[0] == -9
    status, tokens, peak = answer(large, "--memory-limit", str(base + quarter), group=group)
    assert status == 0 and tokens == plain.ids
    assert base < peak <= base + quarter
