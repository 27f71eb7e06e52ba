"""FP8 against torch's own conversion and scaled product."""

from __future__ import annotations

import pytest
import tiny
import torch

from burnish import chain
from burnish.chain import forward
from burnish.compress.fp8 import E4M3, FP8
from burnish.config import UserError
from burnish.store.checkpoint import load, save


def matrix(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * 1000 + columns))


@pytest.mark.parametrize("shape", [(48, 64), (5, 7), (300, 33)])
def test_each_row_uses_the_whole_range(shape):
    dense = matrix(*shape) * 10.0 ** torch.arange(-2, 3).repeat(shape[0])[: shape[0], None]
    dense[0] = 0
    weight = FP8.quantize(dense)
    assert weight.values.view(E4M3).float().abs().amax(1)[1:].eq(448).all() and not weight.dequantize()[0].any()
    error = (weight.dequantize() - dense).abs()
    least = dense.abs().amax(1, keepdim=True) / 448 * 2.0**-10  # half a step among the smallest numbers
    assert (error <= torch.maximum(dense.abs() / 16, least) * 1.0001).all()  # half a step of three bits
    assert weight.nbytes == shape[0] * shape[1] + 4 * shape[0]


@pytest.mark.parametrize("tokens", [1, 7, 300])
@torch.no_grad()
def test_products(tokens):
    """By torch's expanded matrix, and for dynamic activations by its scaled product of the same numbers."""
    dense, x, bias = matrix(48, 64), matrix(tokens, 64), matrix(1, 48)[0]
    plain, dynamic = FP8.quantize(dense), FP8.quantize(dense, dynamic=True)
    want = torch.nn.functional.linear(x, plain.dequantize(), bias)
    torch.testing.assert_close(plain.matmul(x, bias), want, atol=1e-5, rtol=1e-5)
    scale = x.abs().amax(1, keepdim=True) / 448
    stored = plain.values.view(E4M3)
    scaled = torch._scaled_mm((x / scale).to(E4M3), stored.t(), scale, plain.scale[None], out_dtype=torch.float32)
    torch.testing.assert_close(dynamic.matmul(x, bias), scaled + bias, atol=1e-4, rtol=1e-4)
    assert not torch.equal(plain.matmul(x, bias), dynamic.matmul(x, bias))


def test_a_cast_and_a_shard_leave_the_numbers_alone():
    weight = FP8.quantize(matrix(64, 96))
    whole = weight.dequantize()
    assert torch.equal(FP8.quantize(matrix(64, 96)).to(torch.float64).dequantize(), whole)
    for dim in (0, 1):
        part = weight.shard(dim, [(32, 64), (0, 16)])
        assert torch.equal(part.dequantize(), torch.cat([whole.narrow(dim, 32, 32), whole.narrow(dim, 0, 16)], dim))


@pytest.mark.parametrize("scheme", ["none", "dynamic"])
def test_a_model_is_saved_and_read(root, tmp_path, scheme):
    base = load(tiny.folder(root, "llama"))
    model = chain.apply(load(tiny.folder(root, "llama")), {"fp8": {"activation_scheme": scheme}})
    batch = {"input_ids": torch.arange(6, 20)[None]}
    with torch.no_grad():
        logits, plain = forward(model, batch), forward(base, batch)
        save(model, tmp_path / "out")
        assert torch.equal(forward(load(tmp_path / "out"), batch), logits)
    assert 0 < (logits - plain).norm() < 0.1 * plain.norm()


def test_mistakes(root):
    with pytest.raises(UserError, match="activation_scheme"):
        chain.apply(load(tiny.folder(root, "llama")), {"fp8": {"activation_scheme": "static"}})
