"""What every spec shares: frozen, strict, no unknown keys, no NaN."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

Dtype = Literal["fp32", "bf16", "fp8", "fp8_block", "fp4", "mxfp4", "int4"]
"""Storage and arithmetic formats. fp8: one scale a row; fp8_block: a scale per 128x128 block; fp4: NVFP4 (a scale
per 16); mxfp4: a scale per 32; int4: a bf16 scale per 128."""

BYTES_PER_ELEMENT: dict[str, float] = {
    "fp32": 4.0,
    "bf16": 2.0,
    "fp8": 1.0,
    "fp8_block": 1.0 + 4 / (128 * 128),
    "fp4": 0.5 + 1 / 16,
    "mxfp4": 0.5 + 1 / 32,
    "int4": 0.5 + 2 / 128,
}
"""Bytes an element takes with its share of the scales."""

Source = Literal["measured", "interpolated", "transferred", "calibrated", "roofline", "assumed", "mixed"]
"""Where a number comes from; a sum of unlike sources is `mixed`."""


class Spec(BaseModel):
    """Base of the vocabulary: immutable, strictly typed, unknown keys refused."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())
