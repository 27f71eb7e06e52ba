"""The native products with NEON: compiled by a cross compiler for ARM and run by an emulator, where both are there."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch
from test_products import CODES, GROUPS, activations, assert_product, plainly, quantise

from burnish.compress.fp4 import FP4
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
    found |= {"int8": quantise(Int8, None, 37, 320)}
    found |= {str(form): quantise(form, None, 37, 384) for form in (*GROUPS, *CODES)}
    kinds = ("q8_0", "q4_0", "q4_k", "q5_k", "q6_k")
    return found | {kind: GGUF.quantize(torch.randn(37, 512), kind) for kind in kinds}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_products_are_the_twins(program, tmp_path, dtype):
    torch.manual_seed(0)
    bias, cases, packed = torch.randn(37), [], b""

    def part(tensor) -> bytes:
        raw = b"" if tensor is None else tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        return struct.pack("=q", len(raw)) + raw

    for name, weight in weights().items():
        kind, stored = weight.as_stored()
        for tokens in TOKENS:
            x = activations(tokens, weight.shape[1], dtype)
            packed += struct.pack("=5q", kind, *weight.shape, dtype == torch.bfloat16, tokens)
            packed += b"".join(map(part, (*stored, x, bias.to(dtype))))
            cases.append((name, weight, x))
    (tmp_path / "cases").write_bytes(packed)
    given, made = str(tmp_path / "cases"), tmp_path / "results"
    subprocess.run([EMULATOR, str(program), given, str(made)], check=True)
    results = torch.frombuffer(bytearray(made.read_bytes()), dtype=dtype)
    for _, weight, x in cases:
        got, results = results[: len(x) * 37].view(-1, 37), results[len(x) * 37 :]
        want = plainly(lambda weight=weight, x=x: weight.matmul(x, bias.to(dtype)))
        assert_product(got, want, x, weight)
    assert not len(results)
