"""Kernels chosen by measurement: what given times decide, what is kept between processes, and what cannot hurt."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from burnish.compress.gguf import GGUF
from burnish.compress.grouped import Form
from burnish.compress.int8 import Int8
from burnish.compress.nf4 import NF4
from burnish.model.linear import Dense
from burnish.native import build, choice, products

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="no compiler")
BF16, FP32 = torch.bfloat16, torch.float32
NAMES = ("bfloat16", "int8", "nf4", "groups_2", "groups_3", "groups_4", "groups_8", "q8_0", "q4_k")
DAMAGED = ["", "{", "[]", "{}", "\x00", '{"tokens": [16, 32, 64, 256], "burnish": [1, 1, 1, 1], "torch": [1, 1, 1]}',
           '{"tokens": [16, 32, 64, 256], "burnish": [1, 1, 1, NaN], "torch": [1, 1, 1, 1]}',
           '{"tokens": [16, 32, 64, 256], "burnish": [1, 1, 1, "1"], "torch": [1, 1, 1, 1]}',
           '{"tokens": [16, 32, 64, 256], "burnish": [1, 1, 1, 0], "torch": [1, 1, 1, 1]}',
           '{"tokens": [16, 32, 64, 128], "burnish": [1, 1, 1, 1], "torch": [1, 1, 1, 1]}']  # fmt: skip


@pytest.fixture
def measuring(monkeypatch, tmp_path):
    """A machine that has measured nothing, and matrices that are large enough; its cache folder."""
    assert products.library() is not None
    monkeypatch.setenv(choice.SWITCH, "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(choice, "measures", True)  # which a test of offload may have ended
    monkeypatch.setattr(choice, "LEAST", 64 * 128)
    forget(monkeypatch)
    return tmp_path / "burnish"


def forget(monkeypatch) -> None:
    """As a new process."""
    monkeypatch.setattr(choice, "_known", {})


def timed(monkeypatch, *pairs: tuple[float, float]) -> list[int]:
    """Measuring gives these seconds for burnish and torch; the list grows with every time that it is done."""
    done: list[int] = []
    monkeypatch.setattr(choice, "_measure", lambda *_: done.append(1) or pairs)
    return done


def weights() -> dict[str, torch.nn.Module]:
    dense = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    groups = {f"groups_{bits}": Form(bits, 64, bits == 4).round(dense) for bits in (2, 3, 4, 8)}
    blocks = {name: GGUF.quantize(dense, name) for name in ("q8_0", "q4_k")}
    return {
        "bfloat16": Dense(dense.to(BF16)),
        "int8": Int8.quantize(dense),
        "nf4": NF4.quantize(dense),
        **groups,
        **blocks,
    }


@pytest.mark.parametrize("multiplies", [False, True])
def test_the_constants_stay_unless_the_other_way_is_a_fifth_faster(monkeypatch, multiplies):
    monkeypatch.setattr(products, "MULTIPLIES_BFLOAT16", multiplies)
    near, far = (1.0, 0.81), (1.0, 0.79)
    for kind, dtype in ((products.INT8, FP32), (products.INT8, BF16), (products.DENSE, BF16)):
        for tokens in (5, 16, 17, 32, 33, 64, 65, 1000):
            plain = products.by_constants(kind, dtype, tokens)
            at = next((n for n, count in enumerate(choice.COUNTS) if tokens <= count), 3)
            assert choice.chosen(kind, dtype, tokens, None) == plain
            for pair, moved in ((near, False), (far, True)):
                pair = pair if plain else pair[::-1]
                times = tuple(pair if n == at else (1.0, 1.0) for n in range(4))
                assert choice.chosen(kind, dtype, tokens, times) == (plain != moved)
                other = 8 if at else 1000
                assert choice.chosen(kind, dtype, other, times) == products.by_constants(kind, dtype, other)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [FP32, BF16])
@torch.no_grad()
def test_products_go_the_way_that_was_faster(measuring, monkeypatch, name, dtype):
    """From 33 tokens on the way that the constants do not take; either gives the product."""
    weight, kind = weights()[name], products.NAMES.index(name)
    plain = {count: products.by_constants(kind, dtype, count) for count in (1, 4, 5, 32, 33, 300)}
    fast, slow = (0.5, 1.0), (1.0, 0.5)
    timed(monkeypatch, *((fast if plain[32] else slow,) * 2), *((slow if plain[33] else fast,) * 2))
    asked: list[int] = []
    inner = products.matmul
    monkeypatch.setattr(products, "matmul", lambda kind, x, *rest: asked.append(len(x)) or inner(kind, x, *rest))
    for count in plain:
        x = torch.randn(count, 256, generator=torch.Generator().manual_seed(count)).to(dtype)
        got, want = weight.matmul(x).double(), x.double() @ weight.dequantize().double().t()
        assert (got - want).norm() <= (1e-2 if dtype == BF16 else 1e-4) * want.norm()
    assert asked == [count for count, mine in plain.items() if (not mine if count > 32 else mine)]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_what_is_measured_is_kept_for_other_processes(measuring, monkeypatch, name):
    """Really timed once, of at most as many weights as asked for; torch's random numbers are left alone."""
    monkeypatch.setattr(choice, "SAMPLE", 16 * 256)
    weight, state = weights()[name], torch.get_rng_state()
    shapes: set[tuple[int, int]] = set()
    inner = products.matmul
    monkeypatch.setattr(
        products,
        "matmul",
        lambda kind, x, bias, shape, stored: shapes.add(shape) or inner(kind, x, bias, shape, stored),
    )
    weight.matmul(torch.ones(16, 256))
    assert (16, 256) in shapes and shapes <= {(16, 256), (64, 256)} and torch.equal(torch.get_rng_state(), state)
    (file,) = measuring.iterdir()
    library = Path(products.ready()._name).stem
    assert file.name == f"{library}-torch{torch.__version__}-1-{name}-float32.json"
    (one,) = choice.used()
    assert one["storage"] == name and all(0 < ms < 1000 for ms in (*one["burnish_ms"], *one["torch_ms"]))
    forget(monkeypatch)
    monkeypatch.setattr(choice, "_measure", lambda *_: pytest.fail("measured again"))
    weight.matmul(torch.ones(16, 256))
    assert choice.used() == [one]


@torch.no_grad()
def test_each_number_of_threads_and_dtype_has_its_own_times(measuring, monkeypatch):
    done, weight = timed(monkeypatch, *[(1.0, 1.0)] * 4), weights()["int8"]
    for count, dtype in ((8, FP32), (300, FP32), (8, BF16)):
        weight.matmul(torch.ones(count, 256, dtype=dtype))
    assert len(done) == len(list(measuring.iterdir())) == 2
    torch.set_num_threads(2)
    try:
        weight.matmul(torch.ones(8, 256))
    finally:
        torch.set_num_threads(1)
    assert len(done) == len(list(measuring.iterdir())) == 3


@pytest.mark.parametrize("text", DAMAGED)
@torch.no_grad()
def test_a_damaged_file_is_made_anew(measuring, monkeypatch, text):
    times = ((1.0, 0.1),) * 4
    done, weight = timed(monkeypatch, *times), weights()["int8"]
    weight.matmul(torch.ones(8, 256))
    (file,) = measuring.iterdir()
    file.write_text(text)
    forget(monkeypatch)
    weight.matmul(torch.ones(8, 256))
    assert len(done) == 2 and list(choice._known.values()) == [times] and choice._read(file) == times
    assert list(measuring.iterdir()) == [file]


@torch.no_grad()
def test_the_first_file_wins(measuring, monkeypatch):
    """Another process has measured meanwhile: both go by what it found, now and later."""
    weight, first = weights()["int8"], ((1.0, 0.5),) * 4
    timed(monkeypatch, *first)
    weight.matmul(torch.ones(8, 256))
    (file,) = measuring.iterdir()
    assert choice._keep(file, ((0.5, 1.0),) * 4) == first == choice._read(file)
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("no links in this file system")))
    assert choice._keep(file, ((0.5, 1.0),) * 4) == first
    file.unlink()
    assert choice._keep(file, ((0.5, 1.0),) * 4) == ((0.5, 1.0),) * 4 and list(measuring.iterdir()) == [file]


@torch.no_grad()
def test_where_nothing_can_be_kept_the_constants_stay(measuring, monkeypatch):
    measuring.write_text("a file where the folder would be")
    weight, x = weights()["int8"], torch.ones(8, 256)
    timed(monkeypatch, *[(1.0, 0.1)] * 4)
    monkeypatch.setattr(Int8, "by_torch", lambda *_: pytest.fail("not what the constants say"))
    weight.matmul(x)
    assert choice.used() == []


@torch.no_grad()
def test_a_choice_holds_for_the_whole_process(measuring, monkeypatch):
    weight, x = weights()["nf4"], torch.randn(300, 256)
    timed(monkeypatch, *[(1.0, 0.1)] * 4)
    first = weight.matmul(x)
    (file,) = measuring.iterdir()
    file.write_text(json.dumps({"tokens": choice.COUNTS, "burnish": [0.1] * 4, "torch": [1.0] * 4}))
    assert torch.equal(weight.matmul(x), first)
    forget(monkeypatch)
    assert not torch.equal(weight.matmul(x), first)  # burnish's own sums


@torch.no_grad()
def test_what_is_not_measured(measuring, monkeypatch):
    """Few tokens, small matrices, float32 weights, training weights, within a memory limit, and when told not to."""
    monkeypatch.setattr(choice, "_measure", lambda *_: pytest.fail("measured"))
    some, many = torch.ones(products.FEW_DENSE_TOKENS, 256), torch.ones(300, 256)
    every = weights()
    for weight in every.values():
        weight.matmul(some)
        weight.matmul(many[:0])
    Dense(torch.ones(64, 256)).matmul(many)
    with torch.enable_grad():
        every["bfloat16"].matmul(many.to(BF16))
    with monkeypatch.context() as patch:
        patch.setattr(choice, "measures", False)
        every["int8"].matmul(many)
    with monkeypatch.context() as patch:
        patch.setattr(choice, "LEAST", 64 * 256 + 1)
        every["nf4"].matmul(many)
    monkeypatch.setenv(choice.SWITCH, "0")
    every["nf4"].matmul(many)
    assert choice.used() == [] and not measuring.exists()


@pytest.mark.parametrize(("seconds", "rounds"), [(0.001, choice.ROUNDS), (0.0042, 3), (1.0, 2)])
def test_measuring_ends_in_time(monkeypatch, seconds, rounds):
    """By a clock of its own. A slow machine has two rounds; times are of the fastest."""
    now, seen = [0.0], []
    monkeypatch.setattr(choice, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def takes(x, factor):
        seen.append(len(x))
        now[0] += factor * seconds * (10 if len(seen) <= 2 * len(choice.COUNTS) else 1) / 10

    times = choice._measure(64, FP32, (lambda x: takes(x, 1), lambda x: takes(x, 20)))
    assert seen == [count for count in choice.COUNTS for _ in range(2)] * rounds
    assert all(pair == pytest.approx((0.1 * seconds, 2 * seconds)) for pair in times)


def test_two_processes_measure_at_once(tmp_path):
    """Both read the one file that is left."""
    code = """
import json, torch
from burnish.compress.int8 import Int8
from burnish.native import choice
with torch.no_grad():
    Int8.quantize(torch.ones(1024, 1024)).matmul(torch.ones(40, 1024))
print(json.dumps(choice.used()))
"""
    (tmp_path / "burnish").mkdir()
    shutil.copy(products.ready()._name, tmp_path / "burnish")
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), choice.SWITCH: "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    processes = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [json.loads(process.communicate(timeout=600)[0]) for process in processes]
    assert said[0] == said[1] and len(said[0]) == 1 and said[0][0]["threads"] == 1
    assert sorted(path.suffix for path in (tmp_path / "burnish").iterdir()) == [".json", ".so"]
