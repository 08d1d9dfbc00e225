"""One MoE layer of a few tokens: every row multiplies its expert's weights by itself, lane by lane.

    gate and up projection + activation, a row at a time  ->  down projection, weighted sum over choices, residual stream

Shapes: T tokens, K choices, H hidden, I expert width, E local experts; rows are token*K + choice. So few rows seldom meet
at an expert, and where they do the second reads its weights from the cache. A program of the second product goes through
all choices of its token, so that their sum needs no kernel and no atomics.

Each product has two kernels. Of the first: one program a tile, or (`Cut.per_sm`) programs that stay, each reading its next
tile while it multiplies one. Of the second: one that reads choice by choice, or (`Cut.stages` > 1) one that reads all
choices of a token side by side, so many steps of the depth of them before the first product has ended.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from runtime.kernels.moe import ACTIVATIONS
from runtime.kernels.skinny import Cut, launch_options, let_follower_start, tile_of, wait_for_forerunner
from runtime.kernels.splits import multiprocessors


def moe_rows(
    x_TH: torch.Tensor,
    w13_E2IH: torch.Tensor,
    w2_EHI: torch.Tensor,
    topk_weights_TK: torch.Tensor,
    topk_ids_TK: torch.Tensor,
    up: Cut,
    down: Cut,
    *,
    activation: str = "silu_mul",
    w13_scale_E2I: torch.Tensor | None = None,
    w2_scale_EH: torch.Tensor | None = None,
    w13_bias_E2I: torch.Tensor | None = None,
    w2_bias_EH: torch.Tensor | None = None,
    alpha: float = 1.702,
    limit: float = 7.0,
    residual_TH: torch.Tensor | None = None,
) -> torch.Tensor:
    """y_TH = residual + sum over a token's local choices of weight * expert(x): `moe.fused_moe`'s function, rounded once.

    Choices outside 0..E-1 (a graph's padding) add nothing; their rows are neither computed nor read.
    """
    tokens, choices = topk_ids_TK.shape
    experts, hidden, width = w2_EHI.shape
    rows = tokens * choices
    assert x_TH.is_contiguous() and w13_E2IH.is_contiguous() and w2_EHI.is_contiguous()
    assert topk_ids_TK.is_contiguous() and topk_weights_TK.is_contiguous()
    h_NI = torch.empty(rows, width, dtype=x_TH.dtype, device=x_TH.device)
    out_TH = torch.empty_like(x_TH)
    or_x = lambda t: t if t is not None else x_TH  # noqa: E731
    common = {"HIDDEN": hidden, "WIDTH": width, "CHOICES": choices}
    up_flags = {
        **common, "ACTIVATION": ACTIVATIONS[activation], "HAS_SCALE": w13_scale_E2I is not None,
        "HAS_BIAS": w13_bias_E2I is not None, "EVEN_N": width % up.n == 0, "EVEN_K": hidden % up.k == 0, "PDL": up.pdl,
        "ONE": tokens == 1, "BLOCK_N": up.n, "BLOCK_K": up.k, "num_warps": up.warps, **launch_options(up),
    }  # fmt: skip
    up_operands = (x_TH, w13_E2IH, h_NI, topk_ids_TK, or_x(w13_scale_E2I), or_x(w13_bias_E2I), experts, alpha, limit)
    tiles = triton.cdiv(width, up.n)
    if up.per_sm:
        if up.k < hidden:
            raise ValueError("a program that stays reads whole rows")
        programs = min(tiles * rows, multiprocessors(x_TH.device.index or 0) * up.per_sm)
        _up_stream_kernel[(programs,)](*up_operands, tiles * rows, **up_flags)
    else:
        _up_rows_kernel[(tiles, rows)](*up_operands, **up_flags)
    down_kernel = _down_rows_kernel if down.stages == 1 else _down_side_by_side_kernel
    down_kernel[(triton.cdiv(hidden, down.n), tokens)](
        h_NI, w2_EHI, out_TH, topk_ids_TK, topk_weights_TK, or_x(residual_TH), or_x(w2_scale_EH), or_x(w2_bias_EH), experts,
        **common, ADD=residual_TH is not None, HAS_SCALE=w2_scale_EH is not None, HAS_BIAS=w2_bias_EH is not None,
        EVEN_K=width % down.k == 0, PDL=down.pdl, EARLY=down.early, ONE=tokens == 1, BLOCK_N=down.n, BLOCK_K=down.k,
        num_warps=down.warps, **launch_options(down),
        **({} if down.stages == 1 else {"AHEAD": down.stages, "BLOCK_C": triton.next_power_of_2(choices)}),
    )  # fmt: skip
    return out_TH


@triton.jit
def _activated(gate, up, alpha, limit, ACTIVATION: tl.constexpr):
    if ACTIVATION == 0:
        return gate * tl.sigmoid(gate) * up
    gate = tl.minimum(gate, limit)
    up = tl.minimum(tl.maximum(up, -limit), limit)
    return (up + 1.0) * gate * tl.sigmoid(alpha * gate)


@triton.jit
def _store_up(
    gate, up, gate_row, row, n, row_ok, h, scale, bias, alpha, limit,
    WIDTH: tl.constexpr, ACTIVATION: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """What follows both sums: scales, biases, the activation."""
    if HAS_SCALE:
        gate *= tl.load(scale + gate_row, mask=row_ok, other=0.0)
        up *= tl.load(scale + gate_row + WIDTH, mask=row_ok, other=0.0)
    if HAS_BIAS:
        gate += tl.load(bias + gate_row, mask=row_ok, other=0.0).to(tl.float32)
        up += tl.load(bias + gate_row + WIDTH, mask=row_ok, other=0.0).to(tl.float32)
    value = _activated(gate, up, alpha, limit, ACTIVATION)
    if h.dtype.element_ty == tl.float16:
        value = tl.minimum(tl.maximum(value, -65504.0), 65504.0)
    tl.store(h + row * WIDTH + n, value.to(h.dtype.element_ty), mask=row_ok)


@triton.jit
def _up_rows_kernel(
    x, w13, h, ids, scale, bias, experts, alpha, limit,
    HIDDEN: tl.constexpr, WIDTH: tl.constexpr, CHOICES: tl.constexpr, ACTIVATION: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, PDL: tl.constexpr,
    ONE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    n, row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(1).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    # the follower may start now and not before: it reads the choices, which are complete once this wait is over
    wait_for_forerunner(PDL)
    expert = tl.load(ids + row).to(tl.int64)
    if (expert < 0) | (expert >= experts):
        return
    row_ok = n < WIDTH
    gate_row = expert * 2 * WIDTH + n
    gates = w13 + gate_row * HIDDEN
    gate_acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    up_acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for step in tl.static_range((HIDDEN + BLOCK_K - 1) // BLOCK_K):
        at = step * BLOCK_K + k
        gate_tile = tile_of(gates, at, row_ok, HIDDEN, EVEN_N, EVEN_K, ONE)
        up_tile = tile_of(gates + WIDTH * HIDDEN, at, row_ok, HIDDEN, EVEN_N, EVEN_K, ONE)
        a = tl.load(x + row // CHOICES * HIDDEN + at, mask=at < HIDDEN, other=0.0).to(tl.float32)[None, :]
        gate_acc += gate_tile.to(tl.float32) * a
        up_acc += up_tile.to(tl.float32) * a
    _store_up(
        tl.sum(gate_acc, 1), tl.sum(up_acc, 1), gate_row, row, n, row_ok, h, scale, bias, alpha, limit,
        WIDTH, ACTIVATION, HAS_SCALE, HAS_BIAS,
    )  # fmt: skip


@triton.jit
def _up_tiles(
    w13, ids, experts, index, tiles, k, n, HIDDEN: tl.constexpr, WIDTH: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    ONE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(gate tile, up tile, gate rows, whether there is such an expert) of tile number `index`, if it is below `tiles`."""
    TILES: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    found = tl.load(ids + index // TILES, mask=index < tiles, other=-1).to(tl.int64)
    here = (found >= 0) & (found < experts)
    column = index % TILES * BLOCK_N + n
    gate_row = tl.where(here, found, 0) * 2 * WIDTH + column
    row_ok = (column < WIDTH) & here
    gates = w13 + gate_row * HIDDEN
    gate = tile_of(gates, k, row_ok, HIDDEN, False, EVEN_K, ONE)
    up = tile_of(gates + WIDTH * HIDDEN, k, row_ok, HIDDEN, False, EVEN_K, ONE)
    return gate, up, gate_row, here


@triton.jit(do_not_specialize=["tiles"])
def _up_stream_kernel(
    x, w13, h, ids, scale, bias, experts, alpha, limit, tiles,
    HIDDEN: tl.constexpr, WIDTH: tl.constexpr, CHOICES: tl.constexpr, ACTIVATION: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, PDL: tl.constexpr,
    ONE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Program p computes tiles p, p + programs, ..., the next one's weights on their way while one is multiplied."""
    n, k = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    TILES: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    first, programs = tl.program_id(0), tl.num_programs(0)
    wait_for_forerunner(PDL)
    gate_tile, up_tile, gate_row, here = _up_tiles(
        w13, ids, experts, first, tiles, k, n, HIDDEN, WIDTH, EVEN_N, EVEN_K, ONE, BLOCK_N
    )
    a = tl.load(x + first // TILES // CHOICES * HIDDEN + k, mask=k < HIDDEN, other=0.0)
    for index in range(first, tiles, programs):
        after = index + programs
        next_gate, next_up, next_row, next_here = _up_tiles(
            w13, ids, experts, after, tiles, k, n, HIDDEN, WIDTH, EVEN_N, EVEN_K, ONE, BLOCK_N
        )
        wide = a.to(tl.float32)[None, :]
        if not ONE:
            a = tl.load(x + after // TILES // CHOICES * HIDDEN + k, mask=(k < HIDDEN) & (after < tiles), other=0.0)
        gate = tl.sum(gate_tile.to(tl.float32) * wide, 1)
        up = tl.sum(up_tile.to(tl.float32) * wide, 1)
        column, row = index % TILES * BLOCK_N + n, index // TILES
        _store_up(
            gate, up, gate_row, row, column, (column < WIDTH) & here, h, scale, bias, alpha, limit,
            WIDTH, ACTIVATION, HAS_SCALE, HAS_BIAS,
        )  # fmt: skip
        gate_tile, up_tile, gate_row, here = next_gate, next_up, next_row, next_here


@triton.jit
def _down_rows_kernel(
    h, w2, out, ids, weights, residual, scale, bias, experts,
    HIDDEN: tl.constexpr, WIDTH: tl.constexpr, CHOICES: tl.constexpr, ADD: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr, PDL: tl.constexpr, EARLY: tl.constexpr,
    ONE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    let_follower_start(EARLY)
    n, token = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(1).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    row_ok = n < HIDDEN
    wait_for_forerunner(PDL, EARLY)
    total = tl.zeros([BLOCK_N], tl.float32)
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for choice in tl.static_range(CHOICES):
        row = token * CHOICES + choice
        found = tl.load(ids + row).to(tl.int64)
        here = (found >= 0) & (found < experts)
        expert = tl.where(here, found, 0)  # an absent choice reads nothing; no branch, so that loads overlap
        weight = tl.load(weights + row).to(tl.float32)
        weight = tl.where(here, weight, 0.0)
        if HAS_SCALE:
            acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        for step in tl.static_range((WIDTH + BLOCK_K - 1) // BLOCK_K):
            at = step * BLOCK_K + k
            tile = tile_of(w2 + (expert * HIDDEN + n) * WIDTH, at, row_ok & here, WIDTH, False, EVEN_K, ONE)
            a = tl.load(h + row * WIDTH + at, mask=(at < WIDTH) & here, other=0.0).to(tl.float32) * weight
            acc += tile.to(tl.float32) * a[None, :]
        if HAS_SCALE:
            total += tl.sum(acc, 1) * tl.load(scale + expert * HIDDEN + n, mask=row_ok, other=0.0)
        if HAS_BIAS:
            total += weight * tl.load(bias + expert * HIDDEN + n, mask=row_ok, other=0.0).to(tl.float32)
    if not HAS_SCALE:
        total += tl.sum(acc, 1)
    if ADD:
        total += tl.load(residual + token * HIDDEN + n, mask=row_ok, other=0.0).to(tl.float32)
    tl.store(out + token * HIDDEN + n, total.to(out.dtype.element_ty), mask=row_ok)


@triton.jit
def _side_tile(rows, at, ok, WIDTH: tl.constexpr, EVEN_K: tl.constexpr):
    """A step of all choices' rows: `rows` [n, choices] point at row starts."""
    place = rows[:, :, None] + at[None, None, :]
    if EVEN_K:
        return tl.load(place, mask=ok[:, :, None], other=0.0, eviction_policy="evict_first")
    return tl.load(place, mask=ok[:, :, None] & (at < WIDTH)[None, None, :], other=0.0, eviction_policy="evict_first")


@triton.jit
def _down_side_by_side_kernel(
    h, w2, out, ids, weights, residual, scale, bias, experts,
    HIDDEN: tl.constexpr, WIDTH: tl.constexpr, CHOICES: tl.constexpr, ADD: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr, PDL: tl.constexpr, EARLY: tl.constexpr,
    ONE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, AHEAD: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The choices, their weights and so the experts' weights are known before the first product has ended: it lets this
    kernel start only after they are (see `_up_rows_kernel`). They are read past the first-level cache, which may hold what
    lay there before."""
    let_follower_start(EARLY)
    STEPS: tl.constexpr = (WIDTH + BLOCK_K - 1) // BLOCK_K
    n, token = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(1).to(tl.int64)
    c, k = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_K)
    row = token * CHOICES + c
    found = tl.load(ids + row, mask=c < CHOICES, other=-1, cache_modifier=".cg").to(tl.int64)
    here = (found >= 0) & (found < experts)
    at_rows = tl.where(here, found, 0)[None, :] * HIDDEN + n[:, None]
    ok = here[None, :] & (n < HIDDEN)[:, None]
    tiles = ()
    for step in tl.static_range(STEPS if STEPS < AHEAD else AHEAD):
        tiles += (_side_tile(w2 + at_rows * WIDTH, step * BLOCK_K + k, ok, WIDTH, EVEN_K),)
    weight = tl.load(weights + row, mask=here, other=0.0, cache_modifier=".cg").to(tl.float32)
    if HAS_SCALE:
        factor = tl.load(scale + at_rows, mask=ok, other=0.0) * weight[None, :]
    if HAS_BIAS:
        shift = tl.load(bias + at_rows, mask=ok, other=0.0).to(tl.float32) * weight[None, :]
    wait_for_forerunner(PDL, EARLY)
    if ADD:
        stream = tl.load(residual + token * HIDDEN + n, mask=n < HIDDEN, other=0.0)
    acc = tl.zeros([BLOCK_N, BLOCK_C, BLOCK_K], tl.float32)
    for step in tl.static_range(STEPS):
        at = step * BLOCK_K + k
        a = tl.load(h + row[:, None] * WIDTH + at[None, :], mask=here[:, None] & (at < WIDTH)[None, :], other=0.0)
        tile = tiles[step] if step < AHEAD else _side_tile(w2 + at_rows * WIDTH, at, ok, WIDTH, EVEN_K)
        acc += tile.to(tl.float32) * a.to(tl.float32)[None, :, :]
    each = tl.sum(acc, 2)
    each = each * factor if HAS_SCALE else each * weight[None, :]
    if HAS_BIAS:
        each += shift
    total = tl.sum(each, 1)
    if ADD:
        total += stream.to(tl.float32)
    tl.store(out + token * HIDDEN + n, total.to(out.dtype.element_ty), mask=n < HIDDEN)
