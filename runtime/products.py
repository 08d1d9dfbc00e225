"""Which kernel serves an fp8 product of a step's rows: torch's, or one cut along K (`runtime.kernels.products`).

A table holds how products are cut, by the power of two of rows that they fit in and the weight's shape. `tune_products`
fills it by timing on the device; where it has no entry, torch serves.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from runtime.kernels.fused import quant_fp8_rows
from runtime.kernels.moe_fp8 import Fp8Tiles
from runtime.kernels.products import Rows8, Share, fp8_product
from runtime.ops import Fp8Weight

BUCKETS = (16, 32, 64, 128, 256)
"""The most rows of an entry."""
Key = tuple[int, int, int]
"""Bucket, output columns, depth."""


@dataclass
class Products:
    """The table. `seconds`: what was timed, by key: torch's product and the best other one. `prefill`: the products of MoE
    layers of long prefills, by the shape of `w13`, and what was timed for it."""

    shares: dict[Key, Share] = field(default_factory=dict)
    seconds: dict[Key, tuple[float, float]] = field(default_factory=dict)
    prefill: dict[tuple[int, ...], Fp8Tiles] = field(default_factory=dict)
    prefill_seconds: dict[tuple[int, ...], tuple[float, float]] = field(default_factory=dict)

    def find(self, rows: int, weight: Fp8Weight) -> Share | None:
        """How this product is cut, if it is to be."""
        bucket = bucket_of(rows) if self.shares else None
        return None if bucket is None else self.shares.get((bucket, *weight.data.shape))

    def report(self) -> list[dict[str, object]]:
        """A line a timed product, for records."""
        layers = [{"part": "fp8 MoE prefill", "tokens": None, "shape": list(key), "plain_s": plain, "fused_s": best,
                   "serves": str(self.prefill.get(key, "plain")), "cuts": []}
                  for key, (plain, best) in sorted(self.prefill_seconds.items())]
        return [*layers, *({"part": "fp8 product", "tokens": key[0], "shape": list(key[1:]), "plain_s": plain, "fused_s": cut,
                 "serves": "cut" if key in self.shares else "plain",
                 "cuts": [vars(self.shares[key])] if key in self.shares else []}
                for key, (plain, cut) in sorted(self.seconds.items()))]


def bucket_of(rows: int) -> int | None:
    """The least bucket that holds so many rows."""
    return next((bucket for bucket in BUCKETS if 0 < rows <= bucket), None)


def narrow(x: torch.Tensor | Rows8, share: Share | None = None) -> Rows8:
    """Rows rounded to fp8, unless they are, for a product that is cut so."""
    if isinstance(x, Rows8):
        return x
    return Rows8(*quant_fp8_rows(x.contiguous(), early=share is not None and share.pdl), x.dtype)


def torch_product(x: Rows8, weight: Fp8Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Scales a row of each side, summed in fp32, by torch."""
    return torch._scaled_mm(x.data, weight.data.t(), scale_a=x.scale[:, None], scale_b=weight.scale[None], bias=bias,
                            out_dtype=x.dtype, use_fast_accum=True)


def cut_product(x: Rows8, weight: Fp8Weight, share: Share, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The same by parts."""
    return fp8_product(x, weight.data, weight.scale, share, bias_N=bias)
