"""Rotary position embedding: frequencies of the plain, linear, llama3 and yarn schemes.

Formulas: YaRN (Peng et al., arXiv 2309.00071) and Llama 3.1's frequency scaling.
"""

from __future__ import annotations

import math

import torch

from twin.spec.errors import SpecError
from twin.spec.model import Rope


def rope_width(rope: Rope, head_dim: int) -> int:
    """Rotated channels of a head."""
    return int(head_dim * rope.partial)


def inverse_frequencies(rope: Rope, width: int) -> tuple[torch.Tensor, float]:
    """(fp32 [width / 2], factor that cos and sin are multiplied with)."""
    plain = 1.0 / rope.theta ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    if rope.scaling == "none":
        return plain, 1.0
    if rope.scaling == "linear":
        return plain / rope.factor, 1.0
    if rope.original_max_position is None:
        raise SpecError(f"{rope.scaling} scaling needs original_max_position", field="attention.rope")
    if rope.scaling == "llama3":
        return _llama3(rope, plain), 1.0
    return _yarn(rope, plain, width), rope_attention_factor(rope)


def softmax_scale(rope: Rope, head_dim: int) -> float:
    """1 / sqrt(head_dim); yarn with mscale_all_dim (DeepSeek) multiplies it by mscale squared."""
    scale = head_dim**-0.5
    if rope.scaling != "none" and rope.mscale_all_dim:
        scale *= _mscale(rope.factor, rope.mscale_all_dim) ** 2
    return scale


def rope_attention_factor(rope: Rope) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return _mscale(rope.factor, rope.mscale) / _mscale(rope.factor, rope.mscale_all_dim)
    return _mscale(rope.factor, 1.0)


def cos_sin(positions_T: torch.Tensor, inverse_R: torch.Tensor, factor: float) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of every token's angles, fp32 [T, R]."""
    angles = positions_T[:, None].float() * inverse_R
    return angles.cos() * factor, angles.sin() * factor


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _llama3(rope: Rope, plain: torch.Tensor) -> torch.Tensor:
    original = float(rope.original_max_position or 0)
    wavelength = 2 * math.pi / plain
    smooth = (original / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    between = (1 - smooth) * plain / rope.factor + smooth * plain
    slow = wavelength > original / rope.low_freq_factor
    fast = wavelength < original / rope.high_freq_factor
    return torch.where(slow, plain / rope.factor, torch.where(fast, plain, between))


def _yarn(rope: Rope, plain: torch.Tensor, width: int) -> torch.Tensor:
    original = float(rope.original_max_position or 0)

    def channel(rotations: float) -> float:
        """The channel that turns `rotations` times over the original context."""
        return width * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = channel(rope.beta_fast), channel(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    span = high - low or 0.001
    slowed = ((torch.arange(width // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
    return plain / rope.factor * slowed + plain * (1 - slowed)
