"""The paged optimiser against torch's own, and its memory as seen from another process."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_runs import tiny_config, tiny_examples, tiny_model
from torch import nn

import burnish
from burnish.config import UserError
from burnish.engine import checkpointing, paging
from burnish.engine.optim import adamw
from burnish.engine.paging import SMALLEST_LIMIT, PagedAdamW
from burnish.engine.train import train

PAGED = {"optim": "paged_adamw", "optim_memory_limit": SMALLEST_LIMIT}
WIDE = {"hidden_size": 64, "head_dim": 32, "intermediate_size": 192}  # parameters of several pages
CHAINS = {"full": ["full"], "qlora": ["nf4", {"lora": {"r": 64, "target_modules": "all-linear"}}]}
BETAS, EPSILON = (0.9, 0.99), 1e-8


def run(output_dir, chain="full", stop=0, **changes):
    """(model, result) of a run of 6 steps, or of `stop` ones that end as if the user had interrupted them."""

    def progress(step, *_):
        if step == stop:
            raise KeyboardInterrupt

    model = tiny_model(CHAINS[chain], **WIDE)
    config = tiny_config(
        output_dir, gradient_accumulation_steps=2, weight_decay=0.1, warmup_steps=2, lr_scheduler_type="cosine",
        max_steps=6, save_steps=2, **changes,
    )  # fmt: skip
    return model, train(model, tiny_examples(), config, progress=progress)


def assert_same(left, right):
    assert left[1].losses == right[1].losses
    for name, parameter in left[0].trainable().items():
        assert torch.equal(parameter, right[0].trainable()[name]), name


@pytest.mark.parametrize("chain", CHAINS)
def test_a_run_equals_the_unpaged_one_bit_for_bit(tmp_path, chain):
    expected, result = (run(tmp_path / name, chain, **changes) for name, changes in (("plain", {}), ("paged", PAGED)))
    assert_same(result, expected)
    assert max(p.numel() for p in result[0].trainable().values()) * 8 > 2 * SMALLEST_LIMIT
    files = (tmp_path / name / "checkpoint-6" for name in ("plain", "paged"))
    plain, paged = (checkpointing.read(path, "optimizer.safetensors") for path in files)
    assert plain.keys() == paged.keys() and all(torch.equal(plain[name], paged[name]) for name in plain)
    assert {path.name for path in (tmp_path / "paged").iterdir()} == {f"checkpoint-{n}" for n in (2, 4, 6)}


@pytest.mark.parametrize(("before", "after"), [({}, PAGED), (PAGED, {})])
def test_a_run_is_resumed_by_the_other_optimiser(tmp_path, caplog, before, after):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, stop=5, **before)
    assert_same(run(tmp_path, **after), run(None))
    assert "checkpoint-4: step 4 of 6" in caplog.text


def two_parameters(device="cpu"):
    draw = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=draw).to(device)) for shape in ((3, 5000), (777,), (1,))]


def assert_steps_equal(limit, device="cpu"):
    plain, paged = two_parameters(device), two_parameters(device)
    optimizers = [adamw([{"params": plain, "lr": 0.1, "weight_decay": 0.1}], BETAS, EPSILON)]
    optimizers += [PagedAdamW([{"params": paged, "lr": 0.1, "weight_decay": 0.1}], BETAS, EPSILON, limit, None)]
    for step in range(5):
        for optimizer, parameters in zip(optimizers, (plain, paged), strict=True):
            draw = torch.Generator().manual_seed(step)
            for parameter in parameters[: 2 if step < 2 else 3]:
                parameter.grad = torch.randn(parameter.shape, generator=draw).to(device)
            optimizer.param_groups[0]["lr"] *= 0.9
            optimizer.step()
    for left, right in zip(plain, paged, strict=True):
        assert torch.equal(left, right)
        for name, moment in optimizers[0].state[left].items():
            assert torch.equal(moment, optimizers[1].state[right][name].to(device)), name
    return optimizers[1]


@pytest.mark.parametrize("limit", [SMALLEST_LIMIT, 3 * SMALLEST_LIMIT + 5, 1 << 30])
def test_any_limit_gives_the_same_numbers(limit):
    assert_steps_equal(limit)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpus_pages_are_the_hosts():
    optimizer = assert_steps_equal(SMALLEST_LIMIT, "cuda")
    assert all(state["exp_avg"].is_pinned() for state in optimizer.state.values())


def test_what_cannot_be_paged_is_one_line(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=f"optim_memory_limit: is 100 bytes.*{SMALLEST_LIMIT}"):
        run(None, **PAGED | {"optim_memory_limit": 100})
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="paged_adamw cannot keep its pages in .*file"):
        run(tmp_path / "file" / "below", **PAGED)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        with pytest.raises(UserError, match="paged_adamw cannot keep its pages in .*: File too large; set output_dir"):
            run(tmp_path / "out", **PAGED)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    monkeypatch.setattr(paging.shutil, "disk_usage", lambda folder: SimpleNamespace(free=5 << 20))
    with pytest.raises(UserError, match="it needs 19 MiB, and 5 MiB are free"):
        PagedAdamW([{"params": [nn.Parameter(torch.zeros(2_500_000))]}], BETAS, EPSILON, 1 << 20, tmp_path)


CHILD = """
import sys, torch
from burnish.engine.optim import adamw
from burnish.engine.paging import PagedAdamW

parameters = [torch.nn.Parameter(torch.zeros(12_500_000)) for _ in range(4)]
for parameter in parameters:
    parameter.grad = torch.ones_like(parameter)
groups = [{"params": parameters, "lr": 0.1, "weight_decay": 0.0}]
paged, plain = PagedAdamW(groups, (0.9, 0.99), 1e-8, 32 << 20, None), adamw(groups, (0.9, 0.99), 1e-8)
for optimizer in (paged, plain):
    for steps in (0, 2):
        for _ in range(steps):
            optimizer.step()
        print("ready", flush=True)
        sys.stdin.readline()
"""


def test_the_resident_state_stays_below_the_limit(tmp_path):
    """400 MB of moments, 32 MiB of them in memory: read from outside, from the kernel's account of the process."""
    environment = os.environ | {"PYTHONPATH": str(Path(burnish.__file__).parents[1]), "TMPDIR": str(tmp_path)}
    child = subprocess.Popen([sys.executable, "-c", CHILD], stdin=-1, stdout=-1, text=True, env=environment)
    status, found = Path(f"/proc/{child.pid}/status"), []
    for _ in range(4):
        assert child.stdout.readline() == "ready\n"
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        found.append({key: int(lines[key].split()[0]) << 10 for key in ("VmRSS", "VmHWM")})
        Path(f"/proc/{child.pid}/clear_refs").write_text("5")  # a new peak
        child.stdin.write("\n")
        child.stdin.flush()
    assert child.wait() == 0
    before_paged, paged, before_plain, plain = found
    assert paged["VmHWM"] - before_paged["VmRSS"] < (32 << 20) + (8 << 20)
    assert paged["VmRSS"] - before_paged["VmRSS"] < 8 << 20
    assert plain["VmHWM"] - before_plain["VmRSS"] > 390_000_000
