"""Quantising a model of S bytes, and proving it, takes at most S / 4 and 2.5 layers beside what any process takes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import tiny
import torch

from burnish.native import products

TEXT = {"nsamples": 2, "max_length": 16}


def peak(model: Path, output: Path, names: list[str]) -> int:
    """Most resident bytes of `burnish quantize`."""
    chosen = str([{name: TEXT} for name in names])
    status, said, most = tiny.peak(["quantize", str(model), "--techniques", chosen, "--output-dir", str(output)])
    assert not status, said
    return most


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """410 MB."""
    return tiny.large_folder(tmp_path_factory.mktemp("large"), 1024, 2816)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("names", [["gptq"], ["smoothquant", "awq", "gptq"]], ids=", ".join)
def test_a_quarter_of_the_model_and_two_layers_and_a_half(root, large, tmp_path, names):
    if not products.usable(torch.device("cpu"), torch.float32):
        pytest.skip("no compiler, and the plain twins of the kernels take more")
    base = peak(tiny.folder(root, "llama"), tmp_path / "tiny", names)
    size = (large / "model.safetensors").stat().st_size
    most = peak(large, tmp_path / "small", names) - base
    assert most <= size / 4 + 2.5 * size / 16, f"{most >> 20} MiB of {size >> 20}"
    assert (tmp_path / "small" / "model.safetensors").stat().st_size < 0.3 * size
