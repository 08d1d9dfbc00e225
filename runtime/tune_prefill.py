"""Which products serve the fp8 MoE layers of long prefills, by timing them on this device with this model's own weights.

Those of `moe_fp8.FP8_TILES` serve unless another pair of tiles is faster, and gives the numbers of the layer that rounds its
activations afterwards up to that rounding.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from triton.errors import TritonError

from runtime.kernels.moe_fp8 import FP8_TILES, Fp8Tiles, Grouped, tiles_fit
from runtime.kernels.moe_prefill import prefill_moe
from runtime.products import Products

if TYPE_CHECKING:
    from runtime.model.transformer import Transformer
    from runtime.ops import ExpertWeights

log = logging.getLogger("eptwin.tune")
_GAIN = 0.98
"""A pair of tiles must take at most this share of the time without."""
_ROUNDING = 0.06
"""Relative error in norm of two layers that round their activations to fp8 by scales of their own."""
_ROWS = 65536
"""Rows that are timed: an expert of 128 gets 512, tiles enough for the device."""
Timer = Callable[[Sequence[Callable[[], object]]], float]

_UPS = (FP8_TILES.up, Grouped(128, 128, 128, 8, 4), Grouped(128, 128, 128, 8, 3, tma=True))
_DOWNS = (FP8_TILES.down, None, Grouped(128, 128, 128, 8, 3), Grouped(128, 256, 128, 8, 4, group=8))
CANDIDATES = tuple(Fp8Tiles(up, down) for up in _UPS for down in _DOWNS)[1:]


def tune_prefill(transformer: Transformer, table: Products, timer: Timer) -> None:
    """Fill the table's pair of tiles for the shape of the model's experts."""
    layers = transformer.moe_layers
    if not layers or layers[0].moe.swiglu_limit is not None or layers[0].weights.b13 is not None:
        return
    weights, choices = layers[0].weights, min(layers[0].moe.top_k, len(layers[0].weights.w2))
    key = tuple(weights.w13.shape)
    if weights.s13 is None or key in table.prefill_seconds or not tiles_fit(weights.w13, FP8_TILES):
        return
    try:
        decide(table, weights, choices, timer)
    except RuntimeError as err:  # no room: the layers stay as they are
        log.warning("products of long prefills were not timed: %s", str(err)[:200])


def decide(table: Products, w: ExpertWeights, choices: int, timer: Timer, rows: int = _ROWS) -> None:
    """Time the layer without and with each pair of tiles, on random tokens that choose evenly."""
    (experts, _, hidden), device = w.w13.shape, w.w13.device
    stream = torch.Generator(device).manual_seed(5)
    x = torch.randn(rows // choices, hidden, generator=stream, device=device).to(torch.bfloat16)
    odds = torch.rand(len(x), experts, generator=stream, device=device)
    ids = odds.topk(choices, -1)[1].int().contiguous()
    gates = torch.rand(ids.shape, generator=stream, device=device)
    layer = partial(prefill_moe, x, w.w13, w.w2, gates, ids, w13_scale_E2I=w.s13, w2_scale_EH=w.s2)
    want, plain_s, best_s = layer().double(), timer([partial(layer, tiles=FP8_TILES)]), float("inf")
    for tiles in CANDIDATES:
        try:
            wrong = float((layer(tiles=tiles).double() - want).norm() / want.norm())
            if not wrong <= _ROUNDING:
                log.warning("an fp8 MoE layer by %s gives other numbers than without", tiles)
                continue
            seconds = timer([partial(layer, tiles=tiles)])
        except (RuntimeError, ValueError, AssertionError, TritonError) as err:  # tiles that this device or shape does not take
            log.info("%s: %s", tiles, str(err)[:200])
            continue
        if seconds < best_s:
            best_s = seconds
            if seconds <= _GAIN * plain_s:
                table.prefill[tuple(w.w13.shape)] = tiles
    table.prefill_seconds[tuple(w.w13.shape)] = plain_s, best_s
