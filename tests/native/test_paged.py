"""Attention over pages in C against torch's over what they hold, on every instruction set that this processor has."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_products import built, libraries  # noqa: F401 fixtures

from burnish.native import paged, products

SHAPES = [
    *((3, 4, 2, 16, 5), (2, 8, 2, 64, 37), (2, 6, 6, 128, 16), (1, 12, 1, 80, 1), (2, 2, 1, 256, 19)),
    *((2, 4, 2, 8, 7), (1, 2, 2, 300, 9)),
]


@pytest.mark.parametrize("masked", ["all", "bool", "additive"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_torch(built, dtype, stored, masked):  # noqa: F811
    draw = torch.Generator().manual_seed(0)
    for rows, heads, kv_heads, size, length in SHAPES:
        q = torch.randn(rows, heads, size, generator=draw).to(dtype)
        count = rows * length + 3
        pool, scales = torch.randn(2, kv_heads, count, size, generator=draw), None
        if stored == torch.int8:
            pool, scales = (pool * 40).round().clamp(-127, 127), torch.rand(2, kv_heads, count, 1, generator=draw) / 40
        pool = pool.to(stored)
        slots = torch.randperm(count, generator=draw)[: rows * length].view(rows, length)
        hidden = torch.rand(rows, 1, 1, length, generator=draw) < 0.5
        hidden[..., -1] = False
        mask = None
        if masked == "bool":
            mask = ~hidden
        elif masked == "additive":
            mask = torch.randn(rows, heads, 1, length, generator=draw).masked_fill(hidden, float("-inf")).to(dtype)
        known = pool.float() if scales is None else pool * scales
        k, v = (part[:, slots].transpose(0, 1) for part in known)
        bias = mask.float() if masked == "additive" else mask
        want = F.scaled_dot_product_attention(q.float()[:, :, None], k, v, bias, scale=0.2, enable_gqa=True)[:, :, 0]
        before = torch.get_num_threads()
        for threads in (1, 2):
            torch.set_num_threads(threads)
            got = paged.attention(q, (pool[0], pool[1]), None if scales is None else tuple(scales), slots, mask, 0.2)
            torch.set_num_threads(before)
            assert got.dtype == dtype
            torch.testing.assert_close(got.float(), want, atol=1e-5 if dtype == torch.float32 else 0.01, rtol=0.01)


def test_takes():
    if products.library() is None:
        pytest.skip("no compiler")
    assert paged.takes(torch.zeros(1, 2, 64)) and paged.takes(torch.zeros(1, 2, 41, dtype=torch.bfloat16))
    assert paged.takes(torch.zeros(1, 2, 512)) and not paged.takes(torch.zeros(1, 2, 513))
    assert not paged.takes(torch.zeros(1, 2, 64, dtype=torch.float16))
    assert not paged.takes(torch.zeros(1, 2, 64, requires_grad=True))
