"""The two products of an fp8 MoE layer of a long prefill, on rows in expert order.

The first product gathers rows, activates, and rounds its tile to fp8 at once, with a scale for each row of the tile: a power
of two, so that nothing but exponents change when the scales of a row's tiles are then made one. So the wide activations never
touch memory. The second product is torch's grouped one or this module's, whose tiles all come by the copy engine.

Shapes: T tokens, K choices, N = T*K rows, P rows in expert order padded to whole blocks, H hidden, I expert width, E local
experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from runtime.kernels.align import Alignment
from runtime.kernels.fused import FP8

_LEVEL_ROWS = 8


@dataclass(frozen=True)
class Grouped:
    """A product's tile: rows, output columns (of the first, activated ones), depth, warps, loads in flight; and how many row
    blocks share a column of tiles before the next column begins (1: a row block's columns follow one another)."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    group: int = 1
    tma: bool = False


@dataclass(frozen=True)
class Fp8Tiles:
    """Of both products; without `down`, torch's grouped product is the second."""

    up: Grouped
    down: Grouped | None = None


FP8_TILES = Fp8Tiles(Grouped(128, 128, 128, 8, 3), Grouped(128, 128, 128, 4, 3))
"""Measured on an H200 with 128 experts, hidden 2048, width 768, 8 choices of 16,384 tokens: the fastest of seventeen tiles."""


def tiles_fit(w13_E2IH: torch.Tensor, tiles: Fp8Tiles) -> bool:
    """Whether the copy engine can read these weights' rows, and whole tiles make the output."""
    width, hidden = w13_E2IH.shape[1] // 2, w13_E2IH.shape[2]
    return width % 16 == 0 and hidden % 16 == 0 and (tiles.down is None or hidden % tiles.down.n == 0)


def up_fp8(
    x_TH: torch.Tensor, x_scale_T: torch.Tensor, w13_E2IH: torch.Tensor, w13_scale_E2I: torch.Tensor, plan: Alignment,
    choices: int, tile: Grouped,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """silu(gate) * up in the plan's order: (fp8 [P, I], fp32 scale a row [P]). Rows that are padding hold anything."""
    experts, twice, hidden = w13_E2IH.shape
    width, rows, padded = twice // 2, len(x_TH) * choices, plan.sorted_rows.numel()
    assert tile.m == plan.block_m and x_TH.is_contiguous() and w13_E2IH.is_contiguous()
    tiles_n = triton.cdiv(width, tile.n)
    h_PI = torch.empty(padded, width, dtype=FP8, device=x_TH.device)
    steps = torch.empty(padded, tiles_n, dtype=torch.float32, device=x_TH.device)
    w = TensorDescriptor.from_tensor(w13_E2IH.view(2 * experts, width, hidden), [2, tile.n, tile.k]) if tile.tma else w13_E2IH
    blocks = plan.expert_ids.numel()
    _up_fp8_kernel[(blocks * tiles_n,)](
        x_TH, w, h_PI, steps, plan.sorted_rows, plan.expert_ids, plan.num_padded, w13_scale_E2I, x_scale_T, rows, blocks,
        hidden, width, CHOICES=choices, TILES_N=tiles_n, GROUP=tile.group, TMA=tile.tma, EVEN_N=width % tile.n == 0,
        EVEN_K=hidden % tile.k == 0, BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, num_warps=tile.warps,
        num_stages=tile.stages,
    )  # fmt: skip
    scale_P = torch.empty(padded, dtype=torch.float32, device=x_TH.device)
    _level_kernel[(triton.cdiv(padded, _LEVEL_ROWS),)](
        h_PI, steps, scale_P, plan.num_padded, width, TILES_N=tiles_n, BLOCK_T=triton.next_power_of_2(tiles_n),
        BLOCK_N=tile.n, ROWS=_LEVEL_ROWS, num_warps=4,
    )  # fmt: skip
    return h_PI, scale_P


def down_fp8(
    h_PI: torch.Tensor, h_scale_P: torch.Tensor, w2_EHI: torch.Tensor, w2_scale_EH: torch.Tensor, plan: Alignment,
    tile: Grouped, dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:  # fmt: skip
    """y_PH, rows in the plan's order; those past its end are not written."""
    (padded, width), hidden = h_PI.shape, w2_EHI.shape[1]
    assert plan.block_m % tile.m == 0 and h_PI.is_contiguous() and w2_EHI.is_contiguous() and hidden % tile.n == 0
    y_PH = torch.empty(padded, hidden, dtype=dtype, device=h_PI.device)
    tiles_n, blocks = hidden // tile.n, padded // tile.m
    _down_fp8_kernel[(blocks * tiles_n,)](
        TensorDescriptor.from_tensor(h_PI, [tile.m, tile.k]),
        TensorDescriptor.from_tensor(w2_EHI.view(-1, width), [tile.n, tile.k]),
        y_PH, plan.expert_ids, plan.num_padded, h_scale_P, w2_scale_EH, blocks, width, hidden, TILES_N=tiles_n,
        GROUP=tile.group, EACH=plan.block_m // tile.m, BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, num_warps=tile.warps,
        num_stages=tile.stages,
    )  # fmt: skip
    return y_PH


@triton.jit
def _tile_at(blocks, TILES_N: tl.constexpr, GROUP: tl.constexpr):
    """(row block, column tile) of a program: GROUP row blocks by each column, then the next column."""
    pid = tl.program_id(0)
    if GROUP == 1:
        return pid // TILES_N, pid % TILES_N
    first = pid // (GROUP * TILES_N) * GROUP
    size = tl.minimum(blocks - first, GROUP)
    inner = pid % (GROUP * TILES_N)
    return first + inner % size, inner // size


@triton.jit(do_not_specialize=["rows", "blocks"])
def _up_fp8_kernel(
    x, w13, h, steps, sorted_rows, expert_ids, num_padded, scale, x_scale, rows, blocks, hidden, width,
    CHOICES: tl.constexpr, TILES_N: tl.constexpr, GROUP: tl.constexpr, TMA: tl.constexpr, EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    block, tile = _tile_at(blocks, TILES_N, GROUP)
    place = block * BLOCK_M + tl.arange(0, BLOCK_M)
    if block * BLOCK_M >= tl.load(num_padded):
        return
    row = tl.load(sorted_rows + place)
    expert = tl.load(expert_ids + block).to(tl.int64)
    k, r = tl.arange(0, BLOCK_K), tl.arange(0, 2 * BLOCK_N)
    token, real = row // CHOICES, row < rows
    x_row = x + token.to(tl.int64) * hidden
    # gate rows of the weight, then as many up rows
    column = tile * BLOCK_N + r % BLOCK_N
    w_row, w_ok = expert * 2 * width + column + r // BLOCK_N * width, column < width
    acc = tl.zeros([BLOCK_M, 2 * BLOCK_N], tl.float32)
    for start in range(0, hidden, BLOCK_K):
        at = start + k
        if EVEN_K:
            a = tl.load(x_row[:, None] + at[None, :], mask=real[:, None], other=0.0)
        else:
            a = tl.load(x_row[:, None] + at[None, :], mask=real[:, None] & (at < hidden)[None, :], other=0.0)
        if TMA:
            b = tl.reshape(w13.load([expert.to(tl.int32) * 2, tile * BLOCK_N, start]), [2 * BLOCK_N, BLOCK_K])
        elif EVEN_K and EVEN_N:
            b = tl.load(w13 + w_row[:, None] * hidden + at[None, :])
        else:
            b = tl.load(w13 + w_row[:, None] * hidden + at[None, :], mask=w_ok[:, None] & (at < hidden)[None, :], other=0.0)
        acc = tl.dot(a, tl.trans(b), acc)
    acc *= tl.load(x_scale + token, mask=real, other=0.0)[:, None] * tl.load(scale + w_row, mask=w_ok, other=0.0)[None, :]
    gate, up = tl.split(tl.permute(tl.reshape(acc, [BLOCK_M, 2, BLOCK_N]), (0, 2, 1)))
    value = gate * tl.sigmoid(gate) * up
    top = tl.maximum(tl.max(tl.abs(value), 1), 1e-10)
    step = tl.exp2(tl.ceil(tl.log2(top / 448.0)))
    tl.store(steps + place.to(tl.int64) * TILES_N + tile, step)
    value = tl.minimum(tl.maximum(value / step[:, None], -448.0), 448.0)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    out = h + place[:, None].to(tl.int64) * width + n[None, :]
    tl.store(out, value.to(h.dtype.element_ty), mask=real[:, None] & (n < width)[None, :])


@triton.jit
def _level_kernel(
    h, steps, scale, num_padded, width, TILES_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """The largest step of a row's tiles becomes the row's scale; tiles whose step is smaller are shifted to it."""
    place = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    if tl.program_id(0) * ROWS >= tl.load(num_padded):
        return
    t, column = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_N)
    top = tl.max(tl.load(steps + place[:, None] * TILES_N + t[None, :], mask=(t < TILES_N)[None, :], other=0.0), 1)
    tl.store(scale + place, top)
    for tile in tl.static_range(TILES_N):
        share = tl.load(steps + place * TILES_N + tile) / top
        n = tile * BLOCK_N + column
        at, less = h + place[:, None] * width + n[None, :], (share < 1.0)[:, None] & (n < width)[None, :]
        value = tl.load(at, mask=less, other=0.0).to(tl.float32) * share[:, None]
        tl.store(at, value.to(h.dtype.element_ty), mask=less)


@triton.jit(do_not_specialize=["blocks"])
def _down_fp8_kernel(
    h, w2, y, expert_ids, num_padded, h_scale, scale, blocks, width, hidden, TILES_N: tl.constexpr, GROUP: tl.constexpr,
    EACH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    block, tile = _tile_at(blocks, TILES_N, GROUP)
    if block * BLOCK_M >= tl.load(num_padded):
        return
    expert = tl.load(expert_ids + block // EACH)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, width, BLOCK_K):
        acc = tl.dot(h.load([block * BLOCK_M, start]), tl.trans(w2.load([expert * hidden + tile * BLOCK_N, start])), acc)
    place, column = block * BLOCK_M + tl.arange(0, BLOCK_M), tile * BLOCK_N + tl.arange(0, BLOCK_N)
    acc *= tl.load(h_scale + place)[:, None] * tl.load(scale + expert * hidden + column)[None, :]
    tl.store(y + place[:, None].to(tl.int64) * hidden + column[None, :], acc.to(y.dtype.element_ty))
