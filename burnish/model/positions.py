"""Position schemes as functions of token positions: rotary embedding, ALiBi and T5's buckets of distance.

Rotary: RoFormer (arXiv 2104.09864), section 3.2, in Llama's half-split layout; its scaling to longer contexts by YaRN:
arXiv 2309.00071, sections 3.2 to 3.4. ALiBi: arXiv 2108.12409, section 3. Buckets: T5 (arXiv 1910.10683), section 2.1.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from burnish.config import UserError
from burnish.model.spec import Spec

LINEAR = YARN = ("factor",)
LLAMA3 = ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor")


def inverse_frequencies(spec: Spec, device: torch.device | None = None, local: bool = False) -> Tensor:
    """(rotated dimensions / 2,) rotation frequencies in radians per position, with the spec's scaling applied.

    Scaling "linear" divides every frequency by the factor; "llama3" and "yarn" divide the low frequencies only and
    blend in between, by turns over the original context (the Llama 3.1 checkpoints' `rope_scaling`) or by dimension.
    `local`: of the sliding layers, which are not scaled. Raises UserError on a type that is not known or lacks a
    parameter.
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
    needed = {"linear": LINEAR, "llama3": LLAMA3, "yarn": YARN}.get(str(kind))
    if needed is None:
        known = "default, linear, llama3, yarn"
        raise UserError(f"config.json: rope_scaling type '{kind}' is not supported; known: {known}")
    missing = [key for key in needed if key not in scaling]
    if missing:
        raise UserError(f"config.json: rope_scaling type '{kind}' needs {', '.join(missing)}")
    factor = float(scaling["factor"])
    if kind == "linear":
        return frequencies / factor
    if kind == "yarn":
        kept = yarn_share(spec, scaling, size, device)
        return frequencies * (kept + (1 - kept) / factor)
    original = float(scaling["original_max_position_embeddings"])
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    turns = original * frequencies / (2 * math.pi)
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (blend + (1 - blend) / factor)


def yarn_share(spec: Spec, scaling: dict[str, Any], size: int, device: torch.device | None) -> Tensor:
    """(size / 2,) how much of each frequency stays: all of those that turn more than `beta_fast` times over the
    original context, nothing of those that turn less than `beta_slow` times, a ramp by dimension in between."""
    original = float(scaling.get("original_max_position_embeddings") or spec.max_positions)

    def dimension(turns: float) -> float:
        return size * math.log(original / (2 * math.pi * turns)) / (2 * math.log(spec.rope_theta))

    low, high = dimension(scaling.get("beta_fast") or 32), dimension(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    ramp = (torch.arange(size // 2, dtype=torch.float32, device=device) - low) / (high - low or 0.001)
    return 1 - ramp.clamp(0, 1)


def rotary_scale(spec: Spec) -> float:
    """What rotated queries and keys each are multiplied by: with YaRN the root of the scores' temperature (its section
    3.4), 0.1 ln(factor) + 1, or what the config says."""
    scaling: dict[str, Any] = dict(spec.rope_scaling)
    if scaling.get("rope_type") != "yarn":
        return 1.0
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(max(float(scaling["factor"]), 1.0)) + 1

    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return scale(scaling["mscale"]) / scale(scaling["mscale_all_dim"])
    return scale(1.0)


def rotary_angles(
    positions: Tensor, frequencies: Tensor, dtype: torch.dtype, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """positions (B, T) -> cos, sin, each times `scale`, (B, T, 1, rotated), to multiply (B, T, heads, rotated)."""
    angles = (positions[..., None].float() * frequencies)[:, :, None]
    cos, sin = (scale * angles.cos()).to(dtype), (scale * angles.sin()).to(dtype)
    return torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first D dimensions of x (B, T, heads, head_dim), pairing j with j + D / 2; D is cos's last size."""
    size = cos.shape[-1]
    if size < x.shape[-1]:
        return torch.cat((rotate(x[..., :size], cos, sin), x[..., size:]), dim=-1)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def alibi_slopes(heads: int, device: torch.device | None = None) -> Tensor:
    """(heads,) slopes 2^(-8i/n); for a head count n that is no power of two, BLOOM's interleaving (section 3)."""
    closest = 2 ** math.floor(math.log2(heads))
    numbers = torch.arange(closest, dtype=torch.float64, device=device)
    first, between = (numbers + 1) * (-8.0 / closest), (2 * numbers[: heads - closest] + 1) * (-4.0 / closest)
    return torch.cat((first, between)).exp2().float()


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
