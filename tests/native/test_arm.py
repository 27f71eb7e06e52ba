"""The native products with NEON: compiled by a cross compiler for ARM and run by an emulator, where both are there."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch
from test_fp8_products import every_fp8
from test_products import CODES, GROUPS, activations, assert_product, dtypes, plainly, quantise

from burnish.compress.fp4 import FP4
from burnish.compress.fp8 import FP8
from burnish.compress.gguf import GGUF
from burnish.compress.int8 import Int8
from burnish.compress.nf4 import NF4
from burnish.model.linear import Dense
from burnish.native import products

CROSS, EMULATOR = shutil.which("aarch64-linux-gnu-gcc"), shutil.which("qemu-aarch64")
SOURCES = ("products", "gemm", "expand", "decode", "paged", "grouped", "gguf")
TOKENS = (1, 2, 5, 16, 40)

pytestmark = pytest.mark.skipif(not (CROSS and EMULATOR), reason="no cross compiler and emulator for ARM")


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("arm") / "products"
    folder = Path(products.__file__).parent
    sources = [str(folder / f"{name}.c") for name in SOURCES] + [str(Path(__file__).with_name("products_of_file.c"))]
    subprocess.run([CROSS, "-O2", "-fopenmp", "-static", *sources, "-lm", "-o", str(made)], check=True)
    return made


def weights() -> dict:
    found = {"bf16": Dense(torch.randn(37, 320).to(torch.bfloat16)), "fp32": Dense(torch.randn(37, 320))}
    found |= {"nf4": quantise(NF4, True, 37, 320), "fp4": quantise(FP4, True, 37, 320)}
    found |= {"int8": quantise(Int8, None, 37, 320), "fp8": quantise(FP8, None, 37, 300)}
    found |= {str(form): quantise(form, None, 37, 384) for form in (*GROUPS, *CODES)}
    kinds = ("q8_0", "q4_0", "q4_k", "q5_k", "q6_k")
    return found | {kind: GGUF.quantize(torch.randn(37, 512), kind) for kind in kinds}


def multiplied(program: Path, folder: Path, cases: list, dtype: torch.dtype) -> list[torch.Tensor]:
    """The products of weights with activations and biases."""

    def part(tensor) -> bytes:
        raw = b"" if tensor is None else tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        return struct.pack("=q", len(raw)) + raw

    packed = b""
    for weight, x, bias in cases:
        kind, stored = weight.as_stored()
        packed += struct.pack("=5q", kind, *weight.shape, dtype == torch.bfloat16, len(x))
        packed += b"".join(map(part, (*stored, x, bias.to(dtype))))
    (folder / "cases").write_bytes(packed)
    given, made = str(folder / "cases"), folder / "results"
    subprocess.run([EMULATOR, str(program), given, str(made)], check=True)
    results = torch.frombuffer(bytearray(made.read_bytes()), dtype=dtype)
    parts = results.split([len(x) * weight.shape[0] for weight, x, _ in cases])  # raises unless all are there
    return [part.view(len(x), -1) for part, (_, x, _) in zip(parts, cases, strict=True)]


@dtypes
@torch.no_grad()
def test_products_are_the_twins(program, tmp_path, dtype):
    torch.manual_seed(0)
    bias = torch.randn(37)
    cases = [
        (weight, activations(tokens, weight.shape[1], dtype), bias)
        for weight in weights().values()
        for tokens in TOKENS
    ]
    for (weight, x, _), got in zip(cases, multiplied(program, tmp_path, cases, dtype), strict=True):
        want = plainly(lambda weight=weight, x=x: weight.matmul(x, bias.to(dtype)))
        assert_product(got, want, x, weight)


@dtypes
@torch.no_grad()
def test_every_number_of_fp8(program, tmp_path, dtype):
    weight = every_fp8(0.7)
    cases = [(weight, torch.ones(tokens, 256, dtype=dtype), torch.zeros(256)) for tokens in TOKENS]
    want = plainly(weight.dequantize).diagonal().to(dtype)
    for got in multiplied(program, tmp_path, cases, dtype):
        torch.testing.assert_close(got, want.expand(got.shape), rtol=0, atol=0, equal_nan=True)
