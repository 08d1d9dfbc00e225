"""How the fp8 products of decode steps are cut, by timing them on this device with this model's own weights.

For every shape of an fp8 weight outside the experts and every bucket of rows that a graph size falls in: torch's product and
each candidate run as a CUDA graph over the weights of many layers, so that none stays in the cache. A candidate is taken only
if it gives torch's numbers up to rounding, and if it is faster. Without a candidate torch serves, as without this module.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

import torch
from triton.errors import TritonError

from runtime.kernels.products import Rows8, Share
from runtime.model.attention import Gqa, Mla
from runtime.ops import Fp8Weight, Weight
from runtime.products import Key, Products, bucket_of, cut_product, narrow, torch_product
from runtime.triton_ops import TritonOps
from runtime.tune_prefill import tune_prefill

if TYPE_CHECKING:
    from runtime.model.transformer import Layer, Transformer

log = logging.getLogger("eptwin.tune")
_GAIN = 0.98
"""A candidate must take at most this share of torch's time."""
_ROUNDING = 0.01
"""Relative error in norm between two products of the same fp8 numbers, summed in fp32 and rounded to bf16."""
_ROTATED_BYTES = 150e6
"""Weights that a timing rotates over: two and a half times an H200's L2."""
_AHEAD = 512
"""Bytes of a weight row that are asked for while the forerunner ends: what a program's loads in flight will want first."""
Timer = Callable[[Sequence[Callable[[], object]]], float]

CANDIDATES: dict[int, tuple[Share, ...]] = {
    16: (Share(16, 64, 256, 4, 4, 2), Share(16, 64, 256, 4, 5, 2), Share(16, 128, 128, 4, 5, 1), Share(16, 128, 128, 4, 6, 2),
         Share(16, 64, 128, 4, 7, 3), Share(16, 128, 256, 4, 6, 1)),
    32: (Share(32, 64, 256, 4, 4, 2), Share(32, 128, 128, 4, 5, 2), Share(32, 128, 128, 4, 9, 1), Share(32, 64, 128, 4, 6, 3),
         Share(32, 64, 256, 4, 8, 1)),
    64: (Share(64, 128, 128, 4, 5, 1), Share(64, 128, 128, 4, 8, 1), Share(64, 128, 128, 4, 8, 1, tma=True),
         Share(64, 64, 128, 4, 4, 3), Share(64, 64, 128, 4, 4, 3, whole=True), Share(64, 64, 128, 4, 6, 2)),
    128: (Share(128, 128, 128, 8, 4, 1), Share(128, 128, 128, 8, 5, 1, tma=True), Share(128, 128, 128, 8, 6, 1),
          Share(128, 128, 128, 8, 7, 1, tma=True), Share(128, 64, 128, 4, 9, 1), Share(128, 64, 128, 4, 4, 2),
          Share(128, 64, 128, 4, 3, 3, whole=True)),
    256: (Share(256, 128, 128, 8, 4, 1), Share(256, 128, 128, 8, 4, 1, tma=True)),
}
"""By bucket. Tiles hold half a bucket's rows at least, so that their number does not change within one."""


def tune_products(transformer: Transformer, sizes: Sequence[int], timer: Timer, *, pdl: bool) -> None:
    """Fill the products' table of the transformer's operators for the buckets of `sizes`."""
    ops = transformer.rig.ops
    if not isinstance(ops, TritonOps):
        return
    table = ops.products = process_table()
    for bucket in sorted({bucket for size in sizes if (bucket := bucket_of(size))}):
        for weights in fp8_weights(transformer.layers):
            key = (bucket, *weights[0].data.shape)
            if key not in table.seconds:  # a former formation of this process may have timed it
                decide(table, key, weights, timer, pdl=pdl)
    tune_prefill(transformer, table, timer)


def decide(table: Products, key: Key, weights: Sequence[Fp8Weight], timer: Timer, *, pdl: bool = False) -> None:
    """Time torch's product of so many rows and each candidate; the fastest that is right gets the entry."""
    bucket, _, depth = key
    device = weights[0].data.device
    stream = torch.Generator(device).manual_seed(3)
    x = narrow(torch.randn(bucket, depth, generator=stream, device=device).to(torch.bfloat16))
    want, plain_s = torch_product(x, weights[0]), timer([lambda w=w: torch_product(x, w) for w in weights])
    best_s = float("inf")
    for share in candidates(bucket, pdl):
        seconds = _timed(x, weights, share, want, timer)
        if seconds is not None and seconds < best_s:
            best_s = seconds
            if seconds <= _GAIN * plain_s:
                table.shares[key] = share
    table.seconds[key] = plain_s, best_s


def candidates(bucket: int, pdl: bool) -> Iterator[Share]:
    """Ways to cut a product of up to so many rows."""
    for share in CANDIDATES[bucket]:
        yield replace(share, pdl=pdl, ahead=_AHEAD if pdl else 0)


def _timed(x: Rows8, weights: Sequence[Fp8Weight], share: Share, want: torch.Tensor, timer: Timer) -> float | None:
    try:
        got = cut_product(x, weights[0], share)
        if not float((got.double() - want.double()).norm()) <= _ROUNDING * float(want.double().norm()):
            log.warning("a product with %s cut as %s gives other numbers than torch's", list(weights[0].data.shape), share)
            return None
        return timer([lambda w=w: cut_product(x, w, share) for w in weights])
    except (RuntimeError, ValueError, TritonError) as err:  # a cut that this device or shape does not take
        log.info("%s: %s", share, str(err)[:200])
        return None


def fp8_weights(layers: Sequence[Layer]) -> list[list[Fp8Weight]]:
    """The fp8 matrices of the layers' products, those of one shape together: a few of them, over the whole depth."""
    found: dict[tuple[int, ...], list[Fp8Weight]] = {}
    for layer in layers:
        for weight in _weights(layer):
            if isinstance(weight, Fp8Weight):
                found.setdefault(tuple(weight.data.shape), []).append(weight)
    few = []
    for weights in found.values():
        count = max(1, min(len(weights), 16, -(-int(_ROTATED_BYTES) // weights[0].data.numel())))
        few.append(weights[::max(1, len(weights) // count)][:count])
    return few


def _weights(layer: Layer) -> Iterator[Weight | None]:
    a = layer.attention
    if isinstance(a, Gqa):
        yield from (a.qkv, a.out)
    elif isinstance(a, Mla):
        both = a.down.both if a.down is not None else None
        yield from ((both,) if both is not None else (a.kv_down,) if a.down is None else (a.down.q, a.down.kv))
        yield from (a.q_up, a.out)
    dense = getattr(layer.ffn, "shared", layer.ffn)
    if dense is not None:
        yield from (getattr(dense, "w13", None), getattr(dense, "w2", None))


@cache
def process_table() -> Products:
    """What this process has timed, whatever formation it is in."""
    return Products()
