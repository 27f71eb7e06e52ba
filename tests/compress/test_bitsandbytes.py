"""NF4, FP4 and int8 against bitsandbytes on the CPU: the same codes, constants and values."""

from __future__ import annotations

import pytest
import tiny
import torch

from burnish import chain
from burnish.chain import forward
from burnish.compress import four_bit, int8
from burnish.compress.fp4 import FP4
from burnish.compress.int8 import Int8
from burnish.compress.nf4 import NF4
from burnish.config import UserError
from burnish.model.linear import Dense
from burnish.native import products
from burnish.store.checkpoint import load

bnb = pytest.importorskip("bitsandbytes.functional")

SHAPES = [(64, 64), (48, 32), (37, 53), (1, 1), (3, 64), (5, 13), (129, 127), (300, 512)]


@pytest.fixture(autouse=True)
def uncompiled():
    """bitsandbytes compiles some of its CPU functions, which takes longer than all these tests."""
    with torch.compiler.set_stance("force_eager"):
        yield


def matrix(rows: int, columns: int, kind: str = "normal") -> torch.Tensor:
    draw = torch.Generator().manual_seed(rows * 1000 + columns)
    x = torch.randn(rows, columns, generator=draw)
    if kind == "outliers":
        x[0, 0], x[-1] = 80.0, x[-1] * 1e-4
    elif kind == "zeros":  # whole blocks and rows of zeros
        x[: rows // 2 + 1] = 0
    elif kind == "constant":
        x = torch.full((rows, columns), 0.25)
    return x


def test_tables_are_bitsandbytes():
    assert torch.equal(torch.tensor(NF4.LEVELS), bnb.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(torch.tensor(FP4.LEVELS), bnb.get_4bit_type("fp4", device="cpu").sort().values)
    assert torch.equal(four_bit.dynamic_map(), bnb.create_dynamic_map(signed=True))


@pytest.mark.parametrize("kind", ["normal", "outliers", "zeros", "constant"])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_fp4(shape, double, kind):
    """Values; the order of bitsandbytes' codes is another. With its constants' codes, where two levels are as near."""
    x = matrix(*shape, kind)
    packed, state = bnb.quantize_4bit(x, blocksize=64, compress_statistics=double, quant_type="fp4")
    weight = FP4.quantize(x, double)
    if double:
        assert_same(weight.absmax2, state.state2.absmax)
        assert_same(weight.offset, state.offset)
        assert_codes_as_near(weight, x, state.absmax.view(-1))
        weight = FP4(shape, {**weight.tensors(), "absmax": state.absmax.view(-1)})
    state.shape = torch.Size((1, x.numel()))
    assert_same(weight.dequantize(), bnb.dequantize_4bit(packed, state).view(shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["normal", "outliers", "zeros", "constant"])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_nf4(shape, double, kind, dtype):
    x = matrix(*shape, kind).to(dtype)
    packed, state = bnb.quantize_4bit(x, blocksize=64, compress_statistics=double, quant_type="nf4")
    weight = NF4.quantize(x, double)
    assert torch.equal(weight.packed, packed.view(-1))
    theirs = {"packed": packed.view(-1), "absmax": state.absmax.view(-1)}
    if double:
        theirs |= {"absmax2": state.state2.absmax, "offset": state.offset}
        assert_codes_as_near(weight, x, theirs["absmax"])
    for name in theirs.keys() - ({"absmax"} if double else set()):
        assert_same(weight.tensors()[name], theirs[name])
    state.shape = torch.Size((1, x.numel()))  # the CPU kernel mistakes rows that are shorter than a block
    want = bnb.dequantize_4bit(packed, state).view(shape)
    assert_same(NF4(shape, theirs).dequantize().to(dtype), want)
    if not double:
        assert_same(weight.dequantize().to(dtype), want)


def assert_same(left: torch.Tensor, right: torch.Tensor) -> None:
    torch.testing.assert_close(left.detach(), right, atol=1e-37, rtol=0)


def assert_codes_as_near(weight: four_bit.FourBit, x: torch.Tensor, theirs: torch.Tensor) -> None:
    """The constants' codes are bitsandbytes', but where its CPU kernel, which looks levels up in bins, takes the
    farther of two levels; and where all constants of a group are equal and no code counts."""
    absmax = four_bit.blocks(x.float(), 64).abs().amax(1)
    groups = four_bit.blocks(absmax - absmax.mean(), 256)
    value = (groups / weight.absmax2[:, None].clamp(min=1e-38)).view(-1)[: len(absmax)]
    counts = weight.absmax2.repeat_interleave(256)[: len(absmax)] > 0
    code = four_bit.dynamic_map()
    error, their_error = (abs(code[c.long()] - value)[counts] for c in (weight.absmax, theirs))
    assert (error <= their_error + 1e-7).all()
    assert ((weight.absmax.int() - theirs.int()).abs()[counts] <= 2).all()
    assert (weight.absmax == theirs)[counts].float().mean().nan_to_num(1) > 0.9


def test_nf4_of_many_numbers():
    """Half a million weights: no code is off, also next to the borders between two levels."""
    draw = torch.Generator().manual_seed(0)
    borders = (torch.tensor(NF4.LEVELS[1:]) + torch.tensor(NF4.LEVELS[:-1])) / 2
    near = borders[torch.randint(15, (4096, 64), generator=draw)]
    near = near * (1 + 2e-7 * torch.randn(near.shape, generator=draw))
    near[:, 0] = 1.0
    for x in (torch.randn(4096, 64, generator=draw), near * torch.rand(4096, 1, generator=draw)):
        packed, _ = bnb.quantize_4bit(x, blocksize=64, compress_statistics=False, quant_type="nf4")
        assert torch.equal(NF4.quantize(x, False).packed, packed.view(-1))


@pytest.mark.parametrize("kind", ["normal", "outliers", "zeros", "constant"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("piece", [int8.PIECE, 300])
def test_int8(monkeypatch, shape, kind, piece):
    monkeypatch.setattr(int8, "PIECE", piece)
    x = matrix(*shape, kind)
    values, scale, _ = bnb.int8_vectorwise_quant(x)
    weight = Int8.quantize(x)
    assert torch.equal(weight.values, values)
    torch.testing.assert_close(weight.dequantize(), bnb.int8_vectorwise_dequant(values, scale), atol=0, rtol=1e-6)


def test_the_constants_of_nf4_take_0_127_bits():
    """QLoRA, section 3: 8 / 64 + 32 / (64 * 256) bits a parameter with double quantisation, 0.5 without."""
    x = matrix(512, 2048)
    bits = {}
    for double in (False, True):
        weight = NF4.quantize(x, double)
        bits[double] = 8 * (weight.nbytes - weight.packed.numel()) / x.numel()
    assert bits[False] == 0.5
    assert bits[True] == pytest.approx(8 / 64 + 32 / (64 * 256), abs=1e-4)
    assert round(bits[True], 3) == 0.127


@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("planted", [0, 1, 3])
@pytest.mark.parametrize("compiled", [False, True])
@torch.no_grad()
def test_llm_int8(monkeypatch, tokens, planted, compiled):
    """The product with activations in int8 and outlier columns beside it."""
    if not compiled:
        monkeypatch.setattr(products, "_loaded", [None])
    dense, draw = matrix(96, 128).half(), torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, 128, generator=draw).clamp(-5, 5).half()
    for column in range(planted):
        x[-1, 7 + 40 * column] = 60.0 * (column + 1)
    stored, scale, _ = bnb.int8_vectorwise_quant(dense)
    values, absmax, columns = bnb.int8_vectorwise_quant(x.clone(), threshold=6.0)
    product = torch.ops.bitsandbytes.int8_mixed_scaled_mm  # their layer takes another way on a CPU
    want, _ = product(x, values, stored, absmax, scale, columns, None)
    got = Int8.quantize(dense, threshold=6.0).matmul(x)
    assert got.dtype == torch.float16 and (got - want).abs().max() <= 2e-3 * want.abs().max()
    whole = Int8.quantize(dense, threshold=1e9).matmul(x)  # every activation in int8, the planted ones too
    exact = x.float() @ dense.float().t()
    if planted:
        assert (got - exact)[-1].norm() < 0.5 * (whole - exact)[-1].norm()
    elif tokens > 1:
        assert torch.equal(got, whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [Int8, NF4, FP4])
def test_matmul_and_its_gradient_equal_the_expanded_matrix(kind, dtype):
    weight, bias = kind.quantize(matrix(48, 96)), matrix(1, 48)[0]
    for tokens in (1, 7, 40):
        x = matrix(tokens, 96).to(dtype).requires_grad_()
        expanded = weight.dequantize().to(dtype)
        want = torch.nn.functional.linear(x, expanded, bias.to(dtype))
        close = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.15, "rtol": 0.02}
        torch.testing.assert_close(weight.matmul(x, bias), want, **close)
        with torch.no_grad():
            torch.testing.assert_close(weight.matmul(x, bias), want, **close)
        upstream = matrix(tokens, 48).to(dtype)
        (got,) = torch.autograd.grad(weight.matmul(x, bias), x, upstream)
        (expected,) = torch.autograd.grad(want, x, upstream)
        torch.testing.assert_close(got, expected, **close)


@pytest.mark.parametrize("kind", [Dense, Int8, NF4, FP4])
@pytest.mark.parametrize("dim", [0, 1])
def test_shards_are_the_parts_of_the_whole(kind, dim):
    weight = Dense(matrix(192, 192)) if kind is Dense else kind.quantize(matrix(192, 192))
    whole = weight.dequantize()
    for spans in ([(0, 64)], [(128, 192), (0, 64)]):
        part = weight.shard(dim, spans)
        assert torch.equal(part.dequantize(), torch.cat([whole.narrow(dim, a, b - a) for a, b in spans], dim))
        assert part.shape == part.dequantize().shape and type(part) is kind


def test_nf4_is_not_cut_within_a_block():
    weight = NF4.quantize(matrix(64, 192))
    assert weight.shard(0, [(3, 5)]).shape == (2, 192)
    with pytest.raises(UserError, match="blocks of 64"):
        weight.shard(1, [(0, 96)])
    with pytest.raises(UserError, match="blocks of 64"):
        NF4.quantize(matrix(64, 96)).shard(0, [(0, 32)])


@pytest.mark.parametrize("name", ["int8", "nf4", "fp4"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_head_embeddings_and_norms_stay(root, name, family):
    base, model = load(tiny.folder(root, family)), chain.apply(load(tiny.folder(root, family)), name)
    kind = {"int8": Int8, "nf4": NF4, "fp4": FP4}[name]
    stored = {path for path, m in model.net.named_modules() if isinstance(m, kind)}
    assert stored and all(path.startswith("layers.") for path in stored)
    for path, parameter in model.net.named_parameters():
        if not path.startswith(tuple(stored)):
            assert torch.equal(parameter, base.net.get_parameter(path))
    batch = {"input_ids": torch.arange(6, 20)[None]}
    with torch.no_grad():
        difference = forward(model, batch) - forward(base, batch)
    assert difference.norm() < {"int8": 0.03, "nf4": 0.3, "fp4": 0.45}[name] * forward(base, batch).norm()


def test_one_projection_can_be_quantised(root):
    model = chain.apply(load(tiny.folder(root, "llama")), {"nf4": {"target_modules": ["down_proj"]}})
    stored = [path for path, m in model.net.named_modules() if isinstance(m, NF4)]
    assert stored == ["layers.0.mlp.down_proj.weight", "layers.1.mlp.down_proj.weight"]
