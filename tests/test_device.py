from __future__ import annotations

import json
import random
import threading
from pathlib import Path

import numpy
import pytest
import torch

from burnish import device
from burnish.config import UserError


def test_pick_device() -> None:
    assert device.pick_device("cpu") == torch.device("cpu")
    assert device.pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(UserError, match="'cuda:99' asked for, but torch sees"):
        device.pick_device("cuda:99")
    with pytest.raises(UserError, match=r"'cudda' is not one of .*did you mean 'cuda'"):
        device.pick_device("cudda")


def test_parse_dtype() -> None:
    assert device.parse_dtype(None) is None
    assert device.parse_dtype("bf16") is device.parse_dtype("torch.bfloat16") is torch.bfloat16
    assert device.parse_dtype(torch.float16) is torch.float16
    with pytest.raises(UserError, match="did you mean 'fp32'"):
        device.parse_dtype("fp23")


def test_seed_everything_repeats_every_generator() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(numpy.random.rand()), torch.rand(()).item()

    device.seed_everything(3)
    first = draw()
    device.seed_everything(3)
    assert draw() == first
    device.seed_everything(4)
    assert not set(draw()) & set(first)


def test_clock_goes_forward() -> None:
    start = device.clock("cpu")
    assert device.clock(torch.device("cpu")) >= start


def test_peak_memory_sees_what_was_freed() -> None:
    block = 64 * 2**20
    torch.ones(2 * block, dtype=torch.uint8)
    device.reset_peak_memory()
    before = device.peak_memory()
    assert before <= device.resident_memory() + block // 4
    torch.ones(block, dtype=torch.uint8)
    assert 0.9 * block < device.peak_memory() - before < 1.5 * block


def test_peak_memory_is_sampled_where_the_kernel_forbids_a_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    block = 64 * 2**20
    sampler = device._Sampler()
    monkeypatch.setattr(device, "_sampler", sampler)
    sampler.start()
    before = device.peak_memory()
    held = torch.ones(block, dtype=torch.uint8)
    threading.Event().wait(0.2)
    del held
    assert 0.9 * block < device.peak_memory() - before < 1.5 * block


def cgroup(folder: Path, files: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)


@pytest.mark.parametrize("version", [1, 2])
def test_available_memory_keeps_within_the_tightest_cgroup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int
) -> None:
    limit, used = (
        ("memory.max", "memory.current")
        if version == 2
        else (
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
        )
    )
    stat = "inactive_file 100\n" if version == 2 else "inactive_file 1\ntotal_inactive_file 100\n"
    root = tmp_path / "cgroup"
    base = root if version == 2 else root / "memory"
    cgroup(base / "a" / "b", {limit: "max" if version == 2 else str(2**62), used: "900", "memory.stat": stat})
    cgroup(base / "a", {limit: "1000000", used: "600100", "memory.stat": stat})
    membership = tmp_path / "membership"
    membership.write_text("0::/a/b\n" if version == 2 else "3:cpu:/x\n4:memory:/a/b\n")
    monkeypatch.setattr(device, "CGROUPS", root)
    monkeypatch.setattr(device, "CGROUP_MEMBERSHIP", membership)
    assert device.memory_limit() == 1_000_000
    assert device.available_memory() == 400_000


def test_available_memory_without_a_cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "CGROUP_MEMBERSHIP", tmp_path / "none")
    assert device.memory_limit() is None
    assert 0 < device.available_memory() <= device.total_memory()


def test_energy_sums_packages_and_survives_a_wrap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "POWERCAP", tmp_path)
    monkeypatch.setattr(device, "_energy_seen", {})
    assert device.energy_joules() is None
    span = 10_000_000

    def counters(first: int, second: int) -> None:
        for zone, name, value in [
            ("intel-rapl:0", "package-0", first),
            ("intel-rapl:0:0", "core", 7_000_000),
            ("intel-rapl:1", "package-1", second),
            ("intel-rapl:2", "psys", 5_000_000),
        ]:
            cgroup(
                tmp_path / zone,
                {"name": name + "\n", "energy_uj": str(value), "max_energy_range_uj": str(span)},
            )

    counters(9_000_000, 1_000_000)
    start = device.energy_joules()
    counters(500_000, 3_000_000)
    end = device.energy_joules()
    assert start is not None and end is not None
    assert end - start == pytest.approx(1.5 + 2.0)


def test_the_compiler_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert device.compiler() is None
    assert (device.compiler_line() or "").startswith("no C++ compiler found: torch.compile is off")
    tool = tmp_path / "g++"
    tool.touch(mode=0o755)
    assert device.compiler() == str(tool)
    monkeypatch.setattr(device.sysconfig, "get_path", lambda name: str(tmp_path))
    assert (device.compiler_line() or "").startswith("Python.h not found")
    (tmp_path / "Python.h").touch()
    assert device.compiler_line() is None


def test_the_environment_is_json_able() -> None:
    found = json.loads(json.dumps(device.environment()))
    assert found["packages"]["torch"] == str(torch.__version__)
    assert found["cores"] >= 1 and found["memory_bytes"] > 0


@pytest.mark.parametrize("as_json", [False, True])
def test_env_prints_the_environment(capsys: pytest.CaptureFixture[str], as_json: bool) -> None:
    assert device.run_env(device.EnvConfig(json=as_json)) == 0
    printed = capsys.readouterr().out
    assert str(torch.__version__) in printed
    if as_json:
        assert json.loads(printed)["threads"] >= 1
