"""Weights that stay in their files until a placement takes them."""

from __future__ import annotations

import pytest
import tiny
import torch

from burnish.model.linear import Linear, Unread
from burnish.store.checkpoint import load


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_unread_leaves_every_projection_of_the_layers_in_its_file(root, family):
    late, early = load(tiny.folder(root, family), unread=True), load(tiny.folder(root, family))
    weights = {path: part.weight for path, part in early.net.named_modules() if isinstance(part, Linear)}
    for path, part in late.net.named_modules():
        if isinstance(part, Linear):
            assert isinstance(part.weight, Unread) == path.startswith(late.net.body), path
            assert torch.equal(part.weight.dequantize(), weights[path].dequantize()), path
