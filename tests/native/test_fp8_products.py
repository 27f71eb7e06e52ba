"""Native products with FP8 weights, number by number, and with activations that are rounded too."""

from __future__ import annotations

import pytest
import torch
from test_products import activations, assert_product, built, dtypes, libraries, plainly, refused  # noqa: F401

from burnish.compress.fp8 import E4M3, FP8


def every_fp8(scale: float) -> FP8:
    """A row for each of the 256 bytes, in a place of its own among zeros."""
    return FP8(torch.diag(torch.arange(256, dtype=torch.uint8)), torch.linspace(scale, 3 * scale, 256))


@dtypes
@pytest.mark.parametrize("flushed", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 5, 32, 256])
@torch.no_grad()
def test_every_number_of_fp8(built, dtype, flushed, tokens):  # noqa: F811
    """Each is what torch takes it for, exactly, also where subnormal numbers are taken for zero; what is no number
    makes its row none. Ones meet a single weight that is not zero."""
    weight, x, bias = every_fp8(0.7), torch.ones(tokens, 256, dtype=dtype), torch.zeros(256)
    matrix = weight.values.view(E4M3).float() * weight.scale[:, None]
    torch.set_flush_denormal(flushed)
    try:
        with refused():
            got = weight.matmul(x, bias)
        expanded = weight.dequantize_to(dtype)
    finally:
        torch.set_flush_denormal(False)
    want = matrix.diagonal().to(dtype).expand(tokens, 256)
    assert want.isnan().sum() == 2 * tokens and want.unique().numel() > 100
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(expanded, matrix.to(dtype), rtol=0, atol=0, equal_nan=True)


@dtypes
@pytest.mark.parametrize("tokens", [1, 7, 33, 300])
@torch.no_grad()
def test_fp8_with_rounded_activations(built, dtype, tokens):  # noqa: F811
    """They are rounded before the product, which the kernels do."""
    weight, x, bias = FP8.quantize(torch.randn(48, 200), dynamic=True), activations(tokens, 200, dtype), torch.randn(48)
    assert weight.as_stored() is None  # what multiplies without rounding them would take
    want = plainly(lambda: weight.matmul(x, bias))
    with refused():
        got = weight.matmul(x, bias)
    assert_product(got, want, x, weight)
    alone = FP8(weight.values, weight.scale).matmul(x, bias)
    assert (alone.float() - want.float()).norm() > 2 * (got.float() - want.float()).norm()
