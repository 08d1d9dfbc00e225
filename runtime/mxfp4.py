"""Weights in mxfp4, as gpt-oss checkpoints store their experts: four-bit floats (e2m1) in blocks of 32 along the input, each
with a power of two as its scale (e8m0).

A tensor [E, K, N] of the model, input-major, is stored output-major in two: `<name>_blocks` uint8 [E, N, K / 32, 16], two
numbers a byte, the first in its low half, and `<name>_scales` uint8 [E, N, K / 32], an exponent with bias 127. All numbers
are exact in bf16. Source: OCP Microscaling Formats specification 1.0.
"""

from __future__ import annotations

import torch

BLOCK = 32
_BIAS = 127
_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def widen(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """bf16 [..., 32 B] of blocks [..., B, 16] and their scales [..., B]."""
    values = torch.tensor([*_VALUES, *(-v for v in _VALUES)], dtype=torch.float32, device=blocks.device)
    pairs = torch.stack([values[(blocks & 15).long()], values[(blocks >> 4).long()]], -1)
    wide = torch.ldexp(pairs.flatten(-2), scales.int()[..., None] - _BIAS)
    return wide.flatten(-2).to(torch.bfloat16)


def stored_shapes(shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of `_blocks` and `_scales` of a tensor [E, K, N]; K is whole blocks."""
    experts, depth, width = shape
    scales = (experts, width, depth // BLOCK)
    return (*scales, BLOCK // 2), scales
