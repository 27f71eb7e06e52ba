"""The native kernels against their plain torch twins, on every instruction set that this processor has."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from burnish.compress.fp4 import FP4
from burnish.compress.fp8 import FP8
from burnish.compress.gguf import FORMATS, GGUF
from burnish.compress.grouped import Form, Grouped
from burnish.compress.int8 import Int8
from burnish.compress.nf4 import NF4
from burnish.model import linear
from burnish.model.linear import Dense
from burnish.native import build, products

EXTRA = {"native": (), "AVX2": ("-march=x86-64-v3",), "portable": ("-DPORTABLE",)}
GROUPS = [Form(4, 32), Form(4, 128, False), Form(4, -1, False)]
CODES = [Form(bits, *rest) for bits in (2, 3, 8) for rest in ((32,), (128, False), (-1, False), (64, False))]
KINDS = [(NF4, True), (NF4, False), (FP4, True), (Int8, None), (FP8, None), *((form, None) for form in GROUPS)]
kinds = pytest.mark.parametrize(
    ("kind", "double"), KINDS, ids=["nf4", "nf4, plain constants", "fp4", "int8", "fp8", "groups", "zeros", "rows"]
)
codes = pytest.mark.parametrize("form", CODES, ids=str)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
TOKENS = [*range(1, products.FEW_TOKENS + 1), 33, 49, 64, 65, 100, 130]
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # of the size that a product of these norms has


def supports(name: str) -> bool:
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return name != "AVX2" or all(re.search(rf"\b{flag}\b", flags) for flag in ("avx2", "fma", "bmi2"))


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    if build.compiler() is None:
        pytest.skip("no compiler")
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    yield {name: products._load(extra) for name, extra in EXTRA.items() if supports(name)}
    patch.undo()


@pytest.fixture(params=EXTRA)
def built(request, libraries, monkeypatch):
    if request.param not in libraries:
        pytest.skip(f"this processor has no {request.param}")
    assert libraries[request.param] is not None
    monkeypatch.setattr(products, "_loaded", [libraries[request.param]])


def quantise(kind, double, rows: int, columns: int):
    dense = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * 1000 + columns))
    dense[0] = 0
    if isinstance(kind, Form):
        return kind.round(dense + 0.3)
    return kind.quantize(dense) if double is None else kind.quantize(dense, double)


def activations(tokens: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens)).to(dtype)


def plainly(function):
    """What `function` gives without the library."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "_loaded", [None])
        return function()


def assert_product(got: torch.Tensor, want: torch.Tensor, x: torch.Tensor, weight) -> None:
    assert got.shape == want.shape and got.dtype == want.dtype
    size = x.float().norm() * weight.dequantize().norm() / x.shape[1] ** 0.5
    size += want.float().norm()  # the bias and the rounding of the result are in it too
    assert (got.float() - want.float()).norm() <= CLOSE[got.dtype] * size


@contextmanager
def refused():
    """No way past the kernels: expanding the matrix fails."""
    with pytest.MonkeyPatch.context() as patch:
        for kind in (NF4, Int8, FP8, Grouped):
            patch.setattr(kind, "dequantize_to", lambda self, dtype: pytest.fail("the matrix was expanded"))
            if not products.MULTIPLIES_BFLOAT16:  # else many tokens are torch's, by pieces of the matrix
                patch.setattr(kind, "expand", lambda self, first, out: pytest.fail("the matrix was expanded"))
        yield


@kinds
@dtypes
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 65), (5, 64), (64, 100), (33, 192), (1, 16448)])
def test_the_expanded_matrix_is_the_twins(built, kind, double, dtype, shape):
    weight = quantise(kind, double, *shape)
    want = plainly(lambda: weight.dequantize_to(dtype))
    assert torch.equal(weight.dequantize_to(dtype), want)
    assert torch.equal(weight.dequantize(), plainly(weight.dequantize))


@kinds
@dtypes
@pytest.mark.parametrize("rows", [1, 2, 5, 64])
@pytest.mark.parametrize("columns", [64, 128, 320])
@torch.no_grad()
def test_products_are_the_twins(built, kind, double, dtype, rows, columns):
    weight = quantise(kind, double, rows, columns)
    inputs = [activations(tokens, columns, dtype) for tokens in TOKENS]
    bias = torch.randn(rows)
    want = [plainly(lambda x=x: (weight.matmul(x), weight.matmul(x, bias))) for x in inputs]
    with refused():
        got = [(weight.matmul(x), weight.matmul(x, bias)) for x in inputs]
    for x, pair, twins in zip(inputs, got, want, strict=True):
        assert_product(pair[0], twins[0], x, weight)
        assert_product(pair[1], twins[1], x, weight)


@codes
@dtypes
@pytest.mark.parametrize("rows", [1, 5, 64])
@torch.no_grad()
def test_products_with_other_bits_are_the_twins(built, form, dtype, rows):
    bias = torch.randn(rows)
    for columns in (64, 128, 320, 384):
        weight = quantise(form, None, rows, columns)
        for tokens in (1, 2, 3, 4, 5, 8, 9, 17, 32, 33, 70):
            x = activations(tokens, columns, dtype)
            want = plainly(lambda weight=weight, x=x: weight.matmul(x, bias))
            with refused():
                got = weight.matmul(x, bias)
            assert_product(got, want, x, weight)
        want = plainly(lambda weight=weight: weight.dequantize_to(dtype))
        assert torch.equal(weight.dequantize_to(dtype), want)


@dtypes
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@torch.no_grad()
def test_products_with_groups_of_another_order(built, bits, dtype):
    form, draw = Form(bits, 32, False, ordered=True), torch.Generator().manual_seed(bits)
    codes, scale, zero = form.nearest(torch.randn(9, 256, generator=draw))
    codes = codes.to(torch.uint8).view(9, 256)
    weight = Grouped.of(form, codes, scale, zero, torch.randperm(256, generator=draw))
    assert torch.equal(weight.dequantize(), plainly(weight.dequantize))
    for tokens in (1, 7, 40):
        x = activations(tokens, 256, dtype)
        want = plainly(lambda x=x: weight.matmul(x))
        with refused():
            got = weight.matmul(x)
        assert_product(got, want, x, weight)


@dtypes
@pytest.mark.parametrize("rows", [1, 2, 5, 64])
@pytest.mark.parametrize("columns", [64, 128, 320])
@torch.no_grad()
def test_products_with_bfloat16_weights(built, dtype, rows, columns):
    weight = Dense(torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).to(torch.bfloat16))
    bias = torch.randn(rows)
    for tokens in TOKENS:
        x = activations(tokens, columns, dtype)
        wide = x.double() @ weight.dense.double().t()
        kind, stored = weight.as_stored()
        for shift in (None, bias):
            want = (wide if shift is None else wide + shift).to(dtype)
            assert_product(products.matmul(kind, x, shift, weight.shape, stored), want, x, weight)


@dtypes
@pytest.mark.parametrize("name", ["q8_0", "q4_0", "q4_k", "q5_k", "q6_k"])
@pytest.mark.parametrize("rows", [1, 5, 130])
@torch.no_grad()
def test_gguf_blocks(built, name, dtype, rows):
    """Made, expanded and multiplied; of 32 tokens a row's result is that of the token alone."""
    dense = torch.randn(rows, 768 if name.endswith("k") else 320, generator=torch.Generator().manual_seed(rows))
    weight, twin = GGUF.quantize(dense, name), plainly(lambda: GGUF.quantize(dense, name))
    size = dense.norm()
    assert abs((weight.dequantize() - dense).norm() - (twin.dequantize() - dense).norm()) < 0.005 * size
    assert torch.equal(weight.dequantize_to(dtype), plainly(lambda: weight.dequantize_to(dtype)))
    x, bias = activations(products.FEW_TOKENS, dense.shape[1], dtype), torch.randn(rows)
    together = weight.matmul(x, bias)
    wide = x.double() @ weight.dequantize().double().t() + bias
    assert (together.double() - wide).norm() <= (1e-2 if dtype == torch.bfloat16 else 1e-4) * wide.norm()
    for tokens in (1, 2, 3, 9):
        assert torch.equal(weight.matmul(x[:tokens], bias), together[:tokens])


@pytest.mark.parametrize("name", ["q5_0", "q5_1"])
@torch.no_grad()
def test_gguf_blocks_that_are_only_read(built, name):
    found = FORMATS[name]
    raw = torch.randint(0, 256, (5, 10, found.nbytes), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    raw[..., [1, 3]] &= 0xBB  # finite scales
    weight, x = GGUF(found, raw.view(5, -1)), activations(3, 320, torch.float32)
    assert torch.equal(weight.dequantize(), plainly(weight.dequantize))
    wide = x.double() @ weight.dequantize().double().t()
    assert (weight.matmul(x).double() - wide).norm() <= 1e-4 * wide.norm()


@pytest.mark.parametrize("multiplies", [False, True])
@torch.no_grad()
def test_which_products_are_the_kernels(monkeypatch, multiplies):
    """Where the processor multiplies bfloat16, many tokens are torch's."""
    monkeypatch.setattr(products, "MULTIPLIES_BFLOAT16", multiplies)
    monkeypatch.setattr(products, "matmul", lambda kind, x, *_: asked.append(len(x)) or x)
    counts = [1, products.FEW_DENSE_TOKENS, products.FEW_DENSE_TOKENS + 1, products.FEW_TOKENS + 1]
    dense = torch.randn(8, 128)
    for weight, x, given in (
        (Dense(dense.bfloat16()), torch.bfloat16, counts[:2] if multiplies else counts),
        (Dense(dense.bfloat16()), torch.float32, counts),
        (Int8.quantize(dense), torch.bfloat16, counts[:3] if multiplies else counts),
        (Int8.quantize(dense), torch.float32, counts),
        (Dense(dense), torch.float32, []),
        (Dense(dense[:, :100].bfloat16()), torch.bfloat16, []),
    ):
        asked: list[int] = []
        for tokens in counts:
            weight.matmul(torch.randn(tokens, weight.shape[1]).to(x))
        with torch.enable_grad():
            if isinstance(weight, Dense):
                weight.matmul(torch.randn(1, weight.shape[1]).to(x))  # a weight that trains
        assert asked == given


@pytest.mark.parametrize("kind", [Int8, FP8])
@dtypes
@pytest.mark.parametrize("columns", [1, 7, 63, 65, 100, 130])
@torch.no_grad()
def test_rows_of_any_length(built, kind, dtype, columns):
    weight = quantise(kind, None, 9, columns)
    inputs = [activations(tokens, columns, dtype) for tokens in (1, 2, 3, 7, 8, 9, 32, 33, 300)]
    want = [plainly(lambda x=x: weight.matmul(x)) for x in inputs]
    with refused():
        got = [weight.matmul(x) for x in inputs]
    for x, y, twin in zip(inputs, got, want, strict=True):
        assert_product(y, twin, x, weight)


@dtypes
@pytest.mark.parametrize("columns", [5, 32, 100])
@torch.no_grad()
def test_nf4_rows_that_share_blocks(built, dtype, columns):
    """Blocks of 64 run on over the ends of rows; there the matrix is expanded."""
    weight = quantise(NF4, True, 9, columns)
    for tokens in (1, 8):
        x = activations(tokens, columns, dtype)
        assert_product(weight.matmul(x), plainly(lambda x=x: weight.matmul(x)), x, weight)


@kinds
@torch.no_grad()
def test_in_float32_a_tokens_result_does_not_depend_on_its_batch(built, kind, double):
    weight, x = quantise(kind, double, 37, 192), activations(700, 192, torch.float32)
    for most, fewer in ((products.FEW_TOKENS, range(1, products.FEW_TOKENS)), (700, [33, 48, 64, 321, 650])):
        together = weight.matmul(x[:most])
        for tokens in fewer:
            assert torch.equal(weight.matmul(x[:tokens]), together[:tokens])


@kinds
@dtypes
@torch.no_grad()
def test_more_tokens_and_more_threads(built, kind, double, dtype):
    weight, x = quantise(kind, double, 1030, 64), activations(40, 64, dtype)
    assert_product(weight.matmul(x), plainly(lambda: weight.matmul(x)), x, weight)
    alone = [weight.matmul(x[:3]), weight.matmul(x[:20]), weight.matmul(x), weight.dequantize()]
    torch.set_num_threads(3)
    try:
        assert weight.shape[0] * weight.shape[1] > products.SMALL
        together = [weight.matmul(x[:3]), weight.matmul(x[:20]), weight.matmul(x), weight.dequantize()]
    finally:
        torch.set_num_threads(1)
    assert all(map(torch.equal, alone, together))


@kinds
@dtypes
@torch.no_grad()
def test_activations_that_are_not_contiguous(built, kind, double, dtype):
    weight, x = quantise(kind, double, 10, 64), activations(64, 12, dtype).T
    assert not x.is_contiguous()
    for view in (x, x[::2], x[:2]):
        assert torch.equal(weight.matmul(view), weight.matmul(view.contiguous()))


@kinds
@dtypes
def test_gradients(built, kind, double, dtype):
    weight, x = quantise(kind, double, 10, 64), activations(6, 64, dtype).requires_grad_()
    bias, upstream = torch.randn(10, requires_grad=True), activations(6, 10, dtype)
    got = torch.autograd.grad(weight.matmul(x, bias), (x, bias), upstream)
    want = plainly(lambda: torch.autograd.grad(weight.matmul(x, bias), (x, bias), upstream))
    assert all(map(torch.equal, got, want))
    (alone,) = torch.autograd.grad(weight.matmul(x.detach(), bias), bias, upstream)
    assert torch.equal(alone, want[1])


@kinds
@torch.no_grad()
def test_other_dtypes_and_widths(built, kind, double):
    weight = quantise(kind, double, 10, 64)
    for dtype in (torch.float16, torch.float64):
        x = activations(3, 64, dtype)
        assert torch.equal(weight.matmul(x), plainly(lambda x=x: weight.matmul(x)))
    assert weight.matmul(activations(0, 64, torch.float32)).shape == (0, 10)
    with pytest.raises(ValueError, match=r"takes \(tokens, 64\)"):
        weight.matmul(activations(3, 63, torch.float32))


@kinds
@torch.no_grad()
def test_constants_that_were_cast(built, kind, double):
    weight, x = quantise(kind, double, 10, 64).to(torch.bfloat16), activations(3, 64, torch.float32)
    assert_product(weight.matmul(x), plainly(lambda: weight.matmul(x)), x, weight)
    assert torch.equal(weight.dequantize(), plainly(weight.dequantize))


def test_without_a_compiler_it_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(build, "compiler", lambda: None)
    monkeypatch.setattr(build, "compiler_line", lambda: "no C++ compiler found")
    monkeypatch.setattr(products, "_loaded", [])
    weight = quantise(NF4, True, 4, 64)
    with caplog.at_level(logging.WARNING), torch.no_grad():
        for _ in range(2):
            x = activations(2, 64, torch.float32)
            assert_product(weight.matmul(x), x @ weight.dequantize().T, x, weight)
    assert caplog.messages == ["no C++ compiler found"]


@pytest.mark.skipif(build.compiler() is None, reason="no compiler")
def test_a_compiler_that_fails(monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "--no-such-flag"))
    monkeypatch.setattr(products, "_loaded", [])
    with caplog.at_level(logging.WARNING):
        assert not products.usable(torch.device("cpu"), torch.float32)
    assert len(caplog.messages) == 1 and "plain torch, slower" in caplog.messages[0]


@pytest.mark.skipif(build.compiler() is None, reason="no compiler")
def test_two_processes_build_at_once(tmp_path):
    code = "from burnish.native import products; assert products.library() is not None"
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    processes = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(2)]
    assert [process.wait(600) for process in processes] == [0, 0]
    assert [path.suffix for path in (tmp_path / "burnish").iterdir()] == [".so"]


@kinds
@dtypes
@pytest.mark.parametrize("rows", [256, 600])
def test_a_matrix_expanded_in_pieces_multiplies_as_a_whole(built, monkeypatch, kind, double, dtype, rows):
    """Pieces of 256 rows, the last one shorter, for dense weights too."""
    monkeypatch.setattr(linear, "PIECE", 1)
    bias = torch.randn(rows)
    weights = [quantise(kind, double, rows, 192), Dense(torch.randn(rows, 192).to(torch.bfloat16))]
    for weight in weights:
        assert weight.in_pieces
        x = activations(products.FEW_TOKENS + 270, 192, dtype)  # more than are widened at a time
        with torch.no_grad():
            assert_product(
                linear.by_pieces(x, weight, bias),
                (x.double() @ weight.dequantize().double().t() + bias).to(dtype),
                x,
                weight,
            )
            grad = activations(products.FEW_TOKENS + 270, rows, dtype)
            want = (grad.double() @ weight.dequantize().double()).to(dtype)
            got = linear.by_pieces_transposed(grad, weight)
            assert got.shape == want.shape and got.dtype == dtype
            assert (got.float() - want.float()).norm() <= CLOSE[dtype] * want.float().norm()
            monkeypatch.setattr(products, "MULTIPLIES_BFLOAT16", False)  # as where gradients go this way
            assert torch.equal(weight.matmul_transposed(grad), got)
