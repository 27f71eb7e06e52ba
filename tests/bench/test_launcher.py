"""Jobs in processes of their own, and what a comparison that is stopped leaves behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import tiny

from burnish.bench.jobs import run_job
from burnish.bench.launcher import launchers

JOB = {"kind": "nothing of that kind", "threads": 1}


@pytest.fixture
def free():
    with launchers(1) as free:
        yield free


def test_a_failing_job_tells_its_last_line_and_the_launcher_goes_on(free, tmp_path):
    for _ in range(2):
        result = run_job(JOB, tmp_path, 60, free)
        assert result["status"] == "failed" and "nothing of that kind" in result["error"]


def test_a_launcher_that_died_is_a_failed_job_and_starts_again(free, tmp_path):
    run_job(JOB, tmp_path, 60, free)
    launcher = free.get()
    launcher.process.kill()
    launcher.process.wait()
    free.put(launcher)
    assert "nothing of that kind" in run_job(JOB, tmp_path, 60, free)["error"]


def test_a_stopped_comparison_removes_its_scratch_and_ends_its_jobs(root, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": "the cat", "completion": " runs"}) + "\n" for _ in range(8)))
    recipe = {
        "model": str(tiny.folder(root, "llama")),
        "tasks": [{"name": "mine", "data": str(data), "eval_data": str(data)}],
        "rows": [{"name": "full", "techniques": ["full"]}],
        "max_steps": 1_000_000,
        "output_dir": str(tmp_path / "out"),
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    command = [sys.executable, "-m", "burnish", "compare", str(tmp_path / "recipe.yaml")]
    process = subprocess.Popen(command, cwd=tmp_path, start_new_session=True)
    try:
        wait(lambda: running(tmp_path))
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 128 + signal.SIGTERM
    finally:
        process.kill()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["compare.json", "jobs"]
    wait(lambda: not running(tmp_path))


def running(folder) -> bool:
    """Whether a process writes to a log in the folder, as a job does."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.readlink(f"/proc/{pid}/fd/1").startswith(str(folder / "out")):
                return True
        except OSError:
            continue
    return False


def wait(condition) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)
