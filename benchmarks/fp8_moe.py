"""The fp8 MoE layer of a long prefill, piece by piece and by every tile that `runtime.kernels.moe_fp8` may have.

A part of `benchmarks.fp8_products`. The layer is Qwen3-30B-A3B's: 128 experts, hidden 2048, width 768, 8 choices.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from benchmarks.timing import time_graph
from runtime.kernels import moe_prefill, reference
from runtime.kernels.align import align
from runtime.kernels.fused import quant_fp8_rows
from runtime.kernels.moe import up_projection
from runtime.kernels.moe_fp8 import Fp8Tiles, Grouped, down_fp8, up_fp8
from runtime.kernels.moe_layer import moe_layer
from runtime.kernels.moe_prefill import prefill_moe, weighted_sum
from runtime.quantise import quantise_rows

Json = dict[str, Any]
EXPERTS, HIDDEN, WIDTH, CHOICES = 128, 2048, 768, 8
TOKENS = (16384, 4096)
UPS = (
    Grouped(128, 128, 128, 8, 3), Grouped(128, 128, 128, 8, 4), Grouped(128, 128, 128, 8, 3, tma=True),
    Grouped(128, 128, 128, 8, 4, tma=True), Grouped(128, 128, 128, 8, 4, group=8, tma=True),
    Grouped(128, 128, 64, 8, 6, tma=True), Grouped(128, 64, 128, 4, 3, tma=True), Grouped(128, 64, 128, 4, 3),
    Grouped(128, 64, 128, 8, 3, tma=True), Grouped(256, 64, 128, 8, 3, tma=True))
DOWNS = (
    Grouped(128, 256, 128, 8, 3), Grouped(128, 256, 128, 8, 4), Grouped(128, 256, 128, 8, 4, group=8),
    Grouped(128, 256, 64, 8, 6), Grouped(128, 128, 128, 4, 3), Grouped(128, 128, 128, 8, 3), Grouped(256, 128, 128, 8, 4))


class Clock(Protocol):
    @property
    def over(self) -> bool: ...


@dataclass(frozen=True)
class Layer:
    """Weights with their scales, and tokens with their routes."""

    w13: torch.Tensor
    w2: torch.Tensor
    s13: torch.Tensor
    s2: torch.Tensor
    x: torch.Tensor
    weights: torch.Tensor
    ids: torch.Tensor

    def run(self, layer: Callable[..., torch.Tensor], **more: Any) -> torch.Tensor:
        return layer(self.x, self.w13, self.w2, self.weights, self.ids, w13_scale_E2I=self.s13, w2_scale_EH=self.s2, **more)


def make_layer(tokens: int, experts: int = EXPERTS) -> Layer:
    w13 = torch.empty(experts, 2 * WIDTH, HIDDEN, dtype=torch.bfloat16, device="cuda").normal_(0, HIDDEN**-0.5)
    w2 = torch.empty(experts, HIDDEN, WIDTH, dtype=torch.bfloat16, device="cuda").normal_(0, WIDTH**-0.5)
    (w13, s13), (w2, s2) = quantise_rows(w13), quantise_rows(w2)
    weights, ids = torch.rand(tokens, experts, device="cuda").softmax(-1).topk(CHOICES, -1)
    x = torch.randn(tokens, HIDDEN, dtype=torch.bfloat16, device="cuda")
    return Layer(w13, w2, s13, s2, x, weights.contiguous(), ids.int().contiguous())


def pieces(a: Layer) -> Iterator[tuple[str, Callable[[], object]]]:
    """Each kernel of the layer as it is without `moe_fp8`."""
    xq, x_scale = quant_fp8_rows(a.x)
    plan = align(a.ids, len(a.w2), 128, places=True)
    up = lambda: up_projection(xq, a.w13, plan, CHOICES, moe_prefill._UP_FP8, 0, a.s13, None, 0.0, 0.0, x_scale,  # noqa: E731
                               torch.bfloat16, in_order=True)
    h = up()
    hq, h_scale = quant_fp8_rows(h, plan.num_padded)
    down = lambda: moe_prefill._scaled_grouped_mm(hq, a.w2, h_scale, a.s2, plan.ends)  # noqa: E731
    y, out = down(), torch.empty_like(a.x)
    yield "align", lambda: align(a.ids, len(a.w2), 128, places=True)
    yield "quantise x", lambda: quant_fp8_rows(a.x)
    yield "up", up
    yield "quantise h", lambda: quant_fp8_rows(h, plan.num_padded)
    yield "down (torch)", down
    yield "weighted sum", lambda: weighted_sum(y, plan.places, a.weights, out)


def compile_moe(index: int, count: int) -> None:
    """Run this process's share of the candidates once, with few experts, as all processes are on one device."""
    a = make_layer(4096, 16)
    for tile, down in [*((tile, False) for tile in UPS), *((tile, True) for tile in DOWNS)][index::count]:
        try:
            candidate(a, tile, down)()
        except (RuntimeError, ValueError) as err:
            print(tile, str(err)[:200], file=sys.stderr)
    if index == 0:
        make_layer(TOKENS[0]).run(moe_layer)


def candidate(a: Layer, tile: Grouped, down: bool) -> Callable[[], object]:
    """One product by a tile."""
    xq, x_scale = quant_fp8_rows(a.x)
    plan = align(a.ids, len(a.w2), 128 if down else tile.m)
    if not down:
        return lambda: up_fp8(xq, x_scale, a.w13, a.s13, plan, CHOICES, tile)
    h, scale = quant_fp8_rows(torch.randn(plan.sorted_rows.numel(), WIDTH, dtype=torch.bfloat16, device="cuda"))
    if tile.m > 128:
        plan = align(a.ids, len(a.w2), tile.m)
        h, scale = quant_fp8_rows(torch.randn(plan.sorted_rows.numel(), WIDTH, dtype=torch.bfloat16, device="cuda"))
    return lambda: down_fp8(h, scale, a.w2, a.s2, plan, tile)


def measure_moe(clock: Clock) -> list[Json]:
    """A row for each number of tokens."""
    return [row for tokens in TOKENS if not clock.over for row in [_measure(tokens, clock)]]


def _measure(tokens: int, clock: Clock) -> Json:
    a = make_layer(tokens)
    flop = 6 * tokens * CHOICES * HIDDEN * WIDTH
    few = Layer(a.w13, a.w2, a.s13, a.s2, *(t[:256].contiguous() for t in (a.x, a.weights, a.ids)))
    want = few.run(reference.fused_moe, compute=torch.float64, fp8_rows=True)
    row: Json = {"tokens": tokens, "flop": flop, "layer_s": _seconds(lambda: a.run(moe_layer)),
                 "layer_error": _error(a.run(prefill_moe)[:256], want),
                 "pieces_s": {name: _seconds(call) for name, call in pieces(a)}, "up": [], "down": []}
    for kind, tiles in (("up", UPS), ("down", DOWNS)):
        for tile in tiles:
            if not clock.over:
                row[kind].append({"tile": vars(tile), **_timed(lambda t=tile, k=kind: candidate(a, t, k == "down"))})
    best = {kind: sorted((c for c in row[kind] if "seconds" in c), key=lambda c: c["seconds"])[:2] for kind in ("up", "down")}
    row["layers"] = []
    for up, down in itertools.product(best["up"], [None, *best["down"]]):
        if not clock.over and (down is None or down["tile"]["m"] <= up["tile"]["m"]):
            tiles = Fp8Tiles(Grouped(**up["tile"]), down and Grouped(**down["tile"]))
            timed = _timed(lambda t=tiles: lambda: a.run(prefill_moe, tiles=t))
            if "seconds" in timed:
                timed["error"] = _error(a.run(prefill_moe, tiles=tiles)[:256], want)
            row["layers"].append({"up": up["tile"], "down": down and down["tile"], **timed})
    return row


def _seconds(call: Callable[[], object]) -> float:
    return time_graph([call], replays=9).median_s


def _timed(make: Callable[[], Callable[[], object]]) -> Json:
    try:
        return {"seconds": _seconds(make())}
    except (RuntimeError, ValueError) as err:
        return {"failed": str(err)[:300]}


def _error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def show_moe(rows: list[Json]) -> None:
    for row in rows:
        rate = lambda seconds, share=1.0, row=row: f"{seconds * 1e6:.0f} us, {row['flop'] * share / seconds / 1e12:.0f} TFLOP/s"  # noqa: E731
        print(f"fp8 MoE layer at {row['tokens']} tokens: {rate(row['layer_s'])}, error {row['layer_error']:.3g}; "
              + ", ".join(f"{name} {seconds * 1e6:.0f}" for name, seconds in row["pieces_s"].items()))
        for kind, share in (("up", 2 / 3), ("down", 1 / 3)):
            for c in row[kind]:
                print(f"  {kind:5} {_name(c['tile'])}: {rate(c['seconds'], share) if 'seconds' in c else c['failed'][:100]}")
        for c in row["layers"]:
            down = _name(c["down"]) if c["down"] else "torch"
            print(f"  layer up {_name(c['up'])} down {down}: "
                  + (f"{rate(c['seconds'])}, error {c['error']:.3g}" if "seconds" in c else c["failed"][:100]), flush=True)


def _name(tile: Json) -> str:
    tma = " tma" if tile["tma"] else ""
    return f"{tile['m']}x{tile['n']}x{tile['k']}/{tile['warps']}w{tile['stages']}s g{tile['group']}{tma}"
