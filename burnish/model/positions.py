"""Position schemes as functions of token positions: rotary embedding, ALiBi and T5's buckets of distance.

Rotary: RoFormer (arXiv 2104.09864), section 3.2, in Llama's half-split layout. ALiBi: arXiv 2108.12409, section 3.
Buckets: T5 (arXiv 1910.10683), section 2.1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from burnish.config import UserError
from burnish.model.spec import Spec

LINEAR = ("factor",)
LLAMA3 = ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor")


def inverse_frequencies(spec: Spec, device: torch.device | None = None, local: bool = False) -> Tensor:
    """(rotated dimensions / 2,) rotation frequencies in radians per position, with the spec's scaling applied.

    Scaling "linear" divides every frequency by the factor; "llama3" divides the low frequencies only and blends in
    between (the Llama 3.1 checkpoints' `rope_scaling`). `local`: of the sliding layers, which are not scaled. Raises
    UserError on a type that is not known or lacks a parameter.
    """
    size = int(spec.head_dim * spec.rotary_share)
    exponents = torch.arange(0, size, 2, dtype=torch.float32, device=device) / size
    if local:
        return 1.0 / spec.rope_local_theta**exponents
    frequencies = 1.0 / spec.rope_theta**exponents
    scaling = dict(spec.rope_scaling)
    kind = scaling.get("rope_type", "default")
    if kind == "default":
        return frequencies
    needed = {"linear": LINEAR, "llama3": LLAMA3}.get(str(kind))
    if needed is None:
        raise UserError(f"config.json: rope_scaling type '{kind}' is not supported; known: default, linear, llama3")
    missing = [key for key in needed if key not in scaling]
    if missing:
        raise UserError(f"config.json: rope_scaling type '{kind}' needs {', '.join(missing)}")
    factor = float(scaling["factor"])
    if kind == "linear":
        return frequencies / factor
    original = float(scaling["original_max_position_embeddings"])
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    turns = original * frequencies / (2 * math.pi)
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (blend + (1 - blend) / factor)


def rotary_angles(positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """positions (B, T) -> cos, sin, each (B, T, 1, rotated), to multiply (B, T, heads, rotated)."""
    angles = (positions[..., None].float() * frequencies)[:, :, None]
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first D dimensions of x (B, T, heads, head_dim), pairing j with j + D / 2; D is cos's last size."""
    size = cos.shape[-1]
    if size < x.shape[-1]:
        return torch.cat((rotate(x[..., :size], cos, sin), x[..., size:]), dim=-1)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def alibi_slopes(heads: int) -> Tensor:
    """(heads,) slopes 2^(-8i/n); for a head count n that is no power of two, BLOOM's interleaving (section 3)."""
    closest = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8.0 * i / closest) for i in range(1, closest + 1)]
    slopes += [2.0 ** (-4.0 * i / closest) for i in range(1, 2 * (heads - closest), 2)]
    return torch.tensor(slopes)


def relative_buckets(spec: Spec, distance: Tensor) -> Tensor:
    """The bucket, in [0, relative_buckets), of each distance, key position minus query position (any shape).

    Half of the buckets hold one distance each, the others grow with its logarithm up to `relative_distance`, beyond
    which all share the last. An encoder gives each direction half of them; a decoder counts backwards only.
    """
    count, offset = spec.relative_buckets, torch.zeros_like(distance)
    if spec.causal:
        far = (-distance).clamp(min=0)
    else:
        count //= 2
        far, offset = distance.abs(), (distance > 0) * count
    exact = count // 2
    grown = torch.log(far.clamp(min=1).float() / exact) / math.log(spec.relative_distance / exact) * (count - exact)
    return offset + torch.where(far < exact, far, (exact + grown.long()).clamp(max=count - 1))
