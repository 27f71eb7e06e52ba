"""GGUF's blocks: their bytes against the definition and the gguf package, the C functions against their twins."""

from __future__ import annotations

import ctypes
import struct
from pathlib import Path

import pytest
import torch

from burnish.compress import gguf
from burnish.compress.gguf import FORMATS, GGUF, Table
from burnish.config import UserError
from burnish.native import products

ROUNDED, SEARCHED, ONLY_READ = ("q8_0", "q4_0"), ("q4_k", "q5_k", "q6_k"), ("q5_0", "q5_1")
names = pytest.mark.parametrize("name", FORMATS)
made = pytest.mark.parametrize("name", ROUNDED + SEARCHED)
PEBBLE = Path(gguf.__file__).parents[1] / "assets" / "pebble" / "model.safetensors"


def plainly(function):
    """What `function` gives without the library."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "_loaded", [None])
        return function()


def random(rows: int = 6, columns: int = 512) -> torch.Tensor:
    """Normal rows, among them zeros, one sign, one value, one outlier, and values that only subnormal scales reach."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * 1000 + columns))
    x[0], x[1], x[2] = 0, x[1].abs(), 2.5
    x[3, 7], x[4] = 40.0, x[4] * 1e-6
    return x


def error(got: torch.Tensor, x: torch.Tensor) -> float:
    return ((got - x).norm() / x.norm()).item()


def scalar(name: str, block: bytes) -> list[float]:
    """The weights of one block, one after the other, by the format's definition; float32 in each operation."""

    def half(at: int) -> torch.Tensor:
        return torch.tensor(struct.unpack_from("<e", block, at)[0])

    if name == "q8_0":
        return [(half(0) * x).item() for x in struct.unpack_from("32b", block, 2)]
    if name == "q4_0":
        return [(half(0) * ((block[2 + i % 16] >> i // 16 * 4 & 15) - 8)).item() for i in range(32)]
    if name in ONLY_READ:
        bits = struct.unpack_from("<I", block, len(block) - 20)[0]
        q = [block[len(block) - 16 + i % 16] >> i // 16 * 4 & 15 | (bits >> i & 1) << 4 for i in range(32)]
        return [(half(0) * (x - 16) if name == "q5_0" else half(0) * x + half(2)).item() for x in q]
    out = []
    for i in range(256):
        group, lane = i // 32, i % 32
        if name == "q6_k":
            low = block[group // 4 * 64 + group % 2 * 32 + lane] >> group % 4 // 2 * 4 & 15
            high = block[128 + group // 4 * 32 + lane] >> group % 4 * 2 & 3
            scale = struct.unpack_from("b", block, 192 + i // 16)[0]
            out.append((half(208) * scale * ((high << 4 | low) - 32)).item())
            continue
        s = block[4:16]
        if group < 4:
            scale, minimum = s[group] & 63, s[group + 4] & 63
        else:
            scale = s[group + 4] & 15 | s[group - 4] >> 6 << 4
            minimum = s[group + 4] >> 4 | s[group] >> 6 << 4
        q = block[(16 if name == "q4_k" else 48) + group // 2 * 32 + lane] >> group % 2 * 4 & 15
        q |= (block[16 + lane] >> group & 1) << 4 if name == "q5_k" else 0
        out.append((half(0) * scale * q - half(2) * minimum).item())
    return out


def blocks(name: str, rows: int, columns: int) -> torch.Tensor:
    """Random bytes with finite scales."""
    found = FORMATS[name]
    raw = torch.randint(0, 256, (rows, columns // found.size, found.nbytes), dtype=torch.uint8)
    for at in {"q6_k": (208,), "q4_k": (0, 2), "q5_k": (0, 2), "q5_1": (0, 2)}.get(name, (0,)):
        raw[..., at + 1] &= 0xBB
    return raw.view(rows, -1)


@names
def test_expanded_values_are_the_definitions(name):
    found, raw = FORMATS[name], blocks(name, 3, 512)
    weight = GGUF(found, raw)
    want = [value for block in raw.view(-1, found.nbytes) for value in scalar(name, bytes(block.tolist()))]
    want = torch.tensor(want).view(3, 512)
    assert torch.equal(weight.dequantize(), want)
    assert torch.equal(plainly(weight.dequantize), want)
    half = weight.dequantize_to(torch.bfloat16)
    assert torch.equal(half, want.bfloat16()) and torch.equal(plainly(lambda: weight.dequantize_to(half.dtype)), half)
    part = torch.empty(2, 512)
    weight.expand(1, part)
    assert torch.equal(part, want[1:])


@made
def test_blocks_of_the_twins(name):
    x = random()
    ours, twins = GGUF.quantize(x, name), plainly(lambda: GGUF.quantize(x, name))
    if name in ROUNDED:
        assert torch.equal(ours.blocks, twins.blocks)
    for row, (got, want) in enumerate(zip(ours.dequantize(), twins.dequantize(), strict=True)):
        assert abs(error(got, x[row]) - error(want, x[row])) < 0.005 if row else torch.equal(got, want)


@names
def test_blocks_and_values_are_the_gguf_packages(name):
    package = pytest.importorskip("gguf.quants")
    kind = pytest.importorskip("gguf").GGMLQuantizationType(FORMATS[name].code)
    x, raw = random(64), blocks(name, 16, 1024)
    if name in ROUNDED:
        assert torch.equal(GGUF.quantize(x, name).blocks, torch.from_numpy(package.quantize(x.numpy(), kind)))
    want = torch.from_numpy(package.dequantize(raw.numpy(), kind))
    assert torch.equal(GGUF(FORMATS[name], raw).dequantize(), want)


@pytest.mark.parametrize(("name", "most"), [("q8_0", 0.0055), ("q4_k", 0.073), ("q5_k", 0.037), ("q6_k", 0.018)])
def test_the_error_of_a_normal_matrix(name, most):
    x = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    assert error(GGUF.quantize(x, name).dequantize(), x) < most


@pytest.mark.parametrize("name", SEARCHED)
@pytest.mark.parametrize("source", ["normal", "heavy tails", "pebble"])
def test_the_error_is_near_llama_cpps(name, source):
    library = Path(pytest.importorskip("llama_cpp").__file__).parent / "lib" / "libggml-base.so"
    if source == "pebble":
        from burnish.store.tensors import read_header

        x = read_header(PEBBLE)["model.layers.3.mlp.gate_proj.weight"].read().float()
    else:
        kind = torch.distributions.StudentT(3.0) if source != "normal" else torch.distributions.Normal(0, 1)
        torch.manual_seed(0)
        x = kind.sample((64, 1024))
    ours = GGUF.quantize(x, name)
    theirs = torch.empty_like(ours.blocks)
    function = ctypes.CDLL(str(library)).ggml_quantize_chunk
    function.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    function(FORMATS[name].code, x.data_ptr(), theirs.data_ptr(), 0, *x.shape, None)
    assert error(ours.dequantize(), x) < 1.02 * error(GGUF(FORMATS[name], theirs).dequantize(), x)


@names
@pytest.mark.parametrize("shape", [(5, 256), (130, 768)])
@torch.no_grad()
def test_products(name, shape):
    """Errors are beside the lengths of what is multiplied: its product may be next to nothing."""
    weight = GGUF(FORMATS[name], blocks(name, *shape))
    dense, bias = weight.dequantize(), torch.randn(shape[0])
    for dtype, close in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        for tokens in (1, 2, 3, 8, 32, 40):
            x = torch.randn(tokens, shape[1]).to(dtype)
            want = x.float() @ dense.T + bias
            lengths = x.float().norm(dim=1, keepdim=True) * dense.norm(dim=1) + bias.abs()
            for got in (weight.matmul(x, bias), plainly(lambda x=x: weight.matmul(x, bias))):
                assert got.dtype == dtype and ((got.float() - want).abs() / lengths).max() < close


@torch.no_grad()
def test_products_of_few_tokens_expand_nothing(monkeypatch):
    weight, x = GGUF.quantize(torch.randn(8, 256), "q4_k"), torch.randn(2, 256)
    want = weight.matmul(x)
    if not products.usable(x.device, x.dtype):
        pytest.skip("no compiler")
    monkeypatch.setattr(gguf, "expanded", lambda *_: pytest.fail("the matrix was expanded"))
    monkeypatch.setattr(GGUF, "expand", lambda *_: pytest.fail("the matrix was expanded"))
    assert torch.equal(weight.matmul(x), want)


@made
def test_rows_of_blocks_that_are_no_multiple_of_64(name):
    size = FORMATS[name].size
    weight = GGUF.quantize(torch.randn(4, 3 * size), name)
    x = torch.randn(2, 3 * size)
    assert error(weight.matmul(x), x @ weight.dequantize().T) < 1e-4
    with pytest.raises(UserError, match=f"no whole blocks of {size}"):
        GGUF.quantize(torch.randn(4, 3 * size - 1), name)


@made
def test_parts(name):
    weight, size = GGUF.quantize(torch.randn(8, 1024), name), FORMATS[name].size
    dense = weight.dequantize()
    assert torch.equal(weight.shard(0, [(6, 8), (0, 3)]).dequantize(), torch.cat((dense[6:], dense[:3])))
    assert torch.equal(weight.shard(1, [(size, 3 * size)]).dequantize(), dense[:, size : 3 * size])
    with pytest.raises(UserError, match="would cut its blocks"):
        weight.shard(1, [(0, size // 2)])


def test_gradients_reach_the_activations():
    weight, x = GGUF.quantize(torch.randn(8, 256), "q6_k"), torch.randn(3, 256, requires_grad=True)
    weight.matmul(x).square().sum().backward()
    dense, twin = weight.dequantize(), x.detach().requires_grad_()
    (twin @ dense.T).square().sum().backward()
    assert error(x.grad, twin.grad) < 1e-4


def test_a_table_expands_the_rows_that_are_looked_up():
    storage = GGUF.quantize(torch.randn(40, 256), "q5_k")
    table, ids = Table(storage), torch.tensor([[3, 39], [0, 3]])
    assert torch.equal(table(ids), storage.dequantize()[ids])
    assert table.weight.shape == (40, 256) and table.weight.dtype == torch.float32 and table.weight.isnan().all()
