"""Normalisation over the last dimension: RMSNorm (arXiv 1910.07467), LayerNorm, and Gemma's RMSNorm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from burnish.model.spec import Spec


class Norm(nn.Module):
    """RMSNorm or LayerNorm, computed in float32."""

    def __init__(self, spec: Spec, size: int):
        super().__init__()
        self.rms = spec.norm != "layer"
        self.eps = spec.norm_eps
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if spec.norm == "layer" and spec.norm_bias else None

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype)
        if self.rms:
            return F.rms_norm(x, weight.shape, weight, self.eps)
        return F.layer_norm(x, weight.shape, weight, None if self.bias is None else self.bias.to(x.dtype), self.eps)


class CentredNorm(Norm):
    """RMSNorm times (1 + weight), the product in float32 too; the weight starts at 0 (Gemma)."""

    def __init__(self, spec: Spec, size: int):
        super().__init__(spec, size)
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(wide), self.weight.shape, 1 + self.weight.to(wide), self.eps).to(x.dtype)


def norm(spec: Spec, size: int) -> Norm:
    """The norm that the spec names."""
    return CentredNorm(spec, size) if spec.norm == "centred_rms" else Norm(spec, size)
