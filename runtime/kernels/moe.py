"""One MoE layer by two Triton grouped GEMMs: gather, gate and up projection with the activation, down projection with
the routing weight, and the sum over a token's choices.

Shapes: T tokens, K choices, H hidden, I expert width, E local experts; rows are token*K + choice. Decode is bound by
reading the weights, so tiles are narrow in rows and deep in flight; the same kernels serve prefill with wide tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from runtime.kernels.align import Alignment, align, align_rows_alone
from runtime.kernels.fused import FP8, quant_fp8_rows, to_half

ACTIVATIONS = {"silu_mul": 0, "swiglu_clamped": 1}


_ROWS_ALONE = 16
"""Up to so many rows, each may read its expert for itself, unsorted."""
_SORT_BYTES = 120e6
"""Bytes that rows alone may read again before sorting them is as fast. Our profile of an H200 has that with one or two experts
a rank at 75 to 190 MB (bf16 and fp8, experts of 5 to 180 MB); Mixtral's 16 rows of 8 tokens, alone, took twice what 32 sorted
ones do."""


@dataclass(frozen=True)
class Tile:
    """One GEMM's tile: rows, output columns, reduction depth, warps, loads in flight."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Tiles:
    """The tiles of both GEMMs; `up.n` counts activated columns, so the first GEMM's tile is twice as wide."""

    up: Tile
    down: Tile

    def __post_init__(self) -> None:
        assert self.up.m == self.down.m, "both GEMMs walk the same aligned blocks"


def fused_moe(
    x_TH: torch.Tensor,
    w13_E2IH: torch.Tensor,
    w2_EHI: torch.Tensor,
    topk_weights_TK: torch.Tensor,
    topk_ids_TK: torch.Tensor,
    *,
    activation: str = "silu_mul",
    expert_map: torch.Tensor | None = None,
    w13_scale_E2I: torch.Tensor | None = None,
    w2_scale_EH: torch.Tensor | None = None,
    w13_bias_E2I: torch.Tensor | None = None,
    w2_bias_EH: torch.Tensor | None = None,
    alpha: float = 1.702,
    limit: float = 7.0,
    tiles: Tiles | None = None,
    all_experts: int | None = None,
    out_TH: torch.Tensor | None = None,
    x_scale_T: torch.Tensor | None = None,
) -> torch.Tensor:
    """y_TH = sum over a token's local choices of weight * (act(x w13' + b13) w2' + b2), in x's dtype, fp32 inside.

    `w13` holds the gate rows, then the up rows. `activation`: "silu_mul" is silu(gate) * up; "swiglu_clamped" is
    gpt-oss's (up + 1) * gate * sigmoid(alpha * gate), gate clamped above and up both ways at `limit`. Weights may be
    float8_e4m3fn with one fp32 scale an output row; activations stay in x's dtype. Choices whose expert is not local
    (`expert_map`, or ids outside 0..E-1) add nothing. `all_experts`: how many the choices are spread over, where that is
    more than E and there is no map. The result goes into `out_TH` where given. With `x_scale_T`, x is fp8 with a scale a
    token, read as it is and widened where it is multiplied; `out_TH` must be given and names the dtype. CUDA-graph safe.
    """
    tokens, choices = topk_ids_TK.shape
    experts, hidden = w2_EHI.shape[0], w2_EHI.shape[1]
    assert x_TH.is_contiguous() and w13_E2IH.is_contiguous() and w2_EHI.is_contiguous()
    spread = all_experts or _all_experts(experts, expert_map)
    tiles = tiles or choose_tiles(tokens * choices, spread, w13_E2IH.element_size())
    if expert_map is None and rows_alone(tokens, choices, spread, (w13_E2IH.nbytes + w2_EHI.nbytes) / spread):
        plan = align_rows_alone(topk_ids_TK, tiles.up.m)
    else:
        plan = align(topk_ids_TK, experts, tiles.up.m, expert_map)
    # fp8 weights become fp16 in one instruction, bf16 in several: there, products are in fp16
    a_TH = to_half(x_TH) if w13_E2IH.dtype == FP8 and x_scale_T is None else x_TH
    out_TH = out_like(x_TH, x_scale_T, out_TH)
    h = up_projection(
        a_TH, w13_E2IH, plan, choices, tiles.up, ACTIVATIONS[activation], w13_scale_E2I, w13_bias_E2I, alpha, limit,
        x_scale_T, torch.float16 if w13_E2IH.dtype == FP8 else out_TH.dtype, widen=x_scale_T is not None,
    )
    y = down_projection(
        h, w2_EHI, plan, topk_weights_TK, tiles.down, w2_scale_EH, w2_bias_EH, dtype=out_TH.dtype
    )
    sum_choices(y, topk_ids_TK, experts, expert_map, out_TH)
    assert out_TH.shape[1] == hidden
    return out_TH


def rows_alone(tokens: int, choices: int, experts: int, expert_bytes: float) -> bool:
    """Whether rows are so few that sorting them takes longer than reading an expert again for each further row that chose it, as
    many as even routing over `experts` has: a token's choices differ, those of two tokens may not. `expert_bytes`: what lies here
    of each of them, on average."""
    again = tokens * choices - experts * (1 - (1 - min(choices / experts, 1)) ** tokens)
    return tokens * choices <= _ROWS_ALONE and again * expert_bytes <= _SORT_BYTES


def fused_moe_fp8(
    x_TH: torch.Tensor,
    w13_E2IH: torch.Tensor,
    w2_EHI: torch.Tensor,
    topk_weights_TK: torch.Tensor,
    topk_ids_TK: torch.Tensor,
    *,
    w13_scale_E2I: torch.Tensor,
    w2_scale_EH: torch.Tensor,
    expert_map: torch.Tensor | None = None,
    tiles: Tiles | None = None,
    all_experts: int | None = None,
    out_TH: torch.Tensor | None = None,
    x_scale_T: torch.Tensor | None = None,
) -> torch.Tensor:
    """`fused_moe` ("silu_mul") with both products in fp8: activations are quantised row by row, x and h alike.

    For many rows an expert, where arithmetic is the limit; fp8 weights alone (`fused_moe`) are as fast below.
    """
    tokens, choices = topk_ids_TK.shape
    experts = w2_EHI.shape[0]
    tiles = tiles or choose_tiles_fp8(tokens * choices, all_experts or _all_experts(experts, expert_map))
    plan = align(topk_ids_TK, experts, tiles.up.m, expert_map)
    out_TH = out_like(x_TH, x_scale_T, out_TH)
    xq, x_scale = quant_fp8_rows(x_TH) if x_scale_T is None else (x_TH, x_scale_T)
    h = up_projection(xq, w13_E2IH, plan, choices, tiles.up, 0, w13_scale_E2I, None, 0.0, 0.0, x_scale, out_TH.dtype)
    hq, h_scale = quant_fp8_rows(h)
    y = down_projection(hq, w2_EHI, plan, topk_weights_TK, tiles.down, w2_scale_EH, None, h_scale, out_TH.dtype)
    sum_choices(y, topk_ids_TK, experts, expert_map, out_TH)
    return out_TH


def out_like(x_TH: torch.Tensor, x_scale_T: torch.Tensor | None, out_TH: torch.Tensor | None) -> torch.Tensor:
    """Where the result goes; fp8 rows do not say in which dtype."""
    assert x_scale_T is None or out_TH is not None
    return torch.empty_like(x_TH) if out_TH is None else out_TH


def _all_experts(local: int, expert_map: torch.Tensor | None) -> int:
    return local if expert_map is None else max(local, expert_map.numel())


def choose_tiles(rows: int, experts: int, weight_bytes: int) -> Tiles:
    """The tile ladder, by rows an expert gets when they are spread evenly (tuned on H200, bf16 and fp8 weights)."""
    each = rows / experts
    if weight_bytes == 1 and each <= 24:
        depth = 256 if each <= 12 else 128
        return Tiles(Tile(16, 64, depth, 4, 3), Tile(16, 128, 128, 4, 4))
    if each <= 12:
        return Tiles(Tile(16, 32, 256, 4, 3), Tile(16, 64, 128, 4, 4))
    if each <= 24:
        return Tiles(Tile(32, 64, 128, 4, 3), Tile(32, 128, 128, 4, 3))
    if each <= 96:
        return Tiles(Tile(64, 64, 64, 4, 4), Tile(64, 128, 64, 4, 4))
    return Tiles(Tile(128, 128, 64, 8, 4), Tile(128, 256, 64, 8, 4))


def choose_tiles_fp8(rows: int, experts: int) -> Tiles:
    """The ladder of `fused_moe_fp8`."""
    if rows / experts <= 64:
        return Tiles(Tile(64, 64, 128, 4, 3), Tile(64, 128, 128, 4, 3))
    return Tiles(Tile(128, 128, 128, 8, 3), Tile(128, 256, 128, 8, 3))


def up_projection(
    x_TH: torch.Tensor, w13_E2IH: torch.Tensor, plan: Alignment, choices: int, tile: Tile, activation: int,
    scale_E2I: torch.Tensor | None, bias_E2I: torch.Tensor | None, alpha: float, limit: float,
    x_scale_T: torch.Tensor | None = None, dtype: torch.dtype | None = None, in_order: bool = False, widen: bool = False,
) -> torch.Tensor:  # fmt: skip
    """h_NI: the activated first projection, row by row in (token, choice) order; rows of absent experts not written.

    `in_order` gives h_PI in the plan's order instead, with rows that are padding not written. `x` may be fp8 with a
    scale a token: then the product runs in fp8, or, with `widen`, in the weights' format (fp16 if that is fp8).
    `dtype` names h's dtype (x's, unless given), saturated if fp16.
    """
    experts, twice, hidden = w13_E2IH.shape
    width, rows = twice // 2, x_TH.shape[0] * choices
    h_NI = torch.empty(plan.sorted_rows.numel() if in_order else rows, width, dtype=dtype or x_TH.dtype, device=x_TH.device)
    grid = (plan.expert_ids.numel() * triton.cdiv(width, tile.n),)
    _up_kernel[grid](
        x_TH, w13_E2IH, h_NI, plan.sorted_rows, plan.expert_ids, plan.num_padded,
        scale_E2I if scale_E2I is not None else x_TH, bias_E2I if bias_E2I is not None else x_TH,
        x_scale_T if x_scale_T is not None else x_TH, rows, experts, hidden, width, alpha, limit,
        CHOICES=choices, ACTIVATION=activation, HAS_SCALE=scale_E2I is not None, HAS_BIAS=bias_E2I is not None,
        HAS_A_SCALE=x_scale_T is not None, WIDEN=widen, IN_ORDER=in_order, DIRECT=plan.direct,
        EVEN_N=width % tile.n == 0, EVEN_K=hidden % tile.k == 0,
        BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return h_NI


def down_projection(
    h_NI: torch.Tensor, w2_EHI: torch.Tensor, plan: Alignment, weights_TK: torch.Tensor, tile: Tile,
    scale_EH: torch.Tensor | None, bias_EH: torch.Tensor | None,
    h_scale_N: torch.Tensor | None = None, dtype: torch.dtype | None = None,
) -> torch.Tensor:  # fmt: skip
    """y_NH: each row's expert output times its routing weight; rows of absent experts are not written.

    `h` may be fp8 with a scale a row, as `x` in `up_projection`.
    """
    rows, width = h_NI.shape
    experts, hidden = w2_EHI.shape[:2]
    y_NH = torch.empty(rows, hidden, dtype=dtype or h_NI.dtype, device=h_NI.device)
    grid = (plan.expert_ids.numel() * triton.cdiv(hidden, tile.n),)
    _down_kernel[grid](
        h_NI, w2_EHI, y_NH, plan.sorted_rows, plan.expert_ids, plan.num_padded, weights_TK,
        scale_EH if scale_EH is not None else h_NI, bias_EH if bias_EH is not None else h_NI,
        h_scale_N if h_scale_N is not None else h_NI, rows, experts, width, hidden,
        HAS_SCALE=scale_EH is not None, HAS_BIAS=bias_EH is not None, HAS_A_SCALE=h_scale_N is not None,
        DIRECT=plan.direct,
        EVEN_N=hidden % tile.n == 0, EVEN_K=width % tile.k == 0,
        BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return y_NH


def sum_choices(
    y_NH: torch.Tensor, topk_ids_TK: torch.Tensor, experts: int, expert_map: torch.Tensor | None, out_TH: torch.Tensor
) -> None:
    """out_t = sum over t's local choices of y's rows, in fp32; absent choices are skipped, not read."""
    tokens, choices = topk_ids_TK.shape
    hidden = y_NH.shape[1]
    block = min(1024, triton.next_power_of_2(hidden))
    map_, map_size = (expert_map, expert_map.numel()) if expert_map is not None else (topk_ids_TK, 0)
    _sum_kernel[(tokens, triton.cdiv(hidden, block))](
        y_NH, topk_ids_TK, map_, out_TH, hidden, experts, map_size,
        CHOICES=choices, HAS_MAP=expert_map is not None, BLOCK=block, num_warps=4,
    )  # fmt: skip


@triton.jit
def _block_rows(
    sorted_rows, expert_ids, num_padded, block, rows, experts, DIRECT: tl.constexpr, BLOCK_M: tl.constexpr
):
    """Row numbers of a block (`rows` where there is none), its expert, and whether anything is to do."""
    m = tl.arange(0, BLOCK_M)
    expert = tl.load(expert_ids + block).to(tl.int64)
    if DIRECT:
        row = tl.where(m == 0, block, rows)
        used = (expert >= 0) & (expert < experts)
    else:
        row = tl.load(sorted_rows + block * BLOCK_M + m)
        used = block * BLOCK_M < tl.load(num_padded)
    return row, expert, used


@triton.jit
def _weight_rows(n, width, TWICE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows of one expert's weight that a tile reads: BLOCK_N of them, or as many gate rows and then up rows."""
    if TWICE:
        r = tl.arange(0, 2 * BLOCK_N)
        column = n * BLOCK_N + r % BLOCK_N
        row = column + (r // BLOCK_N) * width
    else:
        column = n * BLOCK_N + tl.arange(0, BLOCK_N)
        row = column
    return row, column < width


@triton.jit
def _tile_product(
    a_rows, a_ok, w, w_row, w_ok, depth, WIDEN: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc[m, c] = sum_k a[m, k] w[c, k] in fp32; `a_rows` and `w` point at row starts."""
    k = tl.arange(0, BLOCK_K)
    a_ptr = a_rows[:, None] + k[None, :]
    w_ptr = w + w_row[:, None].to(tl.int64) * depth + k[None, :]
    acc = tl.zeros([BLOCK_M, COLUMNS], tl.float32)
    for start in range(0, depth, BLOCK_K):
        if EVEN_K:
            a = tl.load(a_ptr, mask=a_ok[:, None], other=0.0)
            b = tl.load(w_ptr) if EVEN_N else tl.load(w_ptr, mask=w_ok[:, None], other=0.0)
        else:
            inside = k < depth - start
            a = tl.load(a_ptr, mask=a_ok[:, None] & inside[None, :], other=0.0)
            b = tl.load(w_ptr, mask=w_ok[:, None] & inside[None, :], other=0.0)
        if WIDEN:
            a = a.to(tl.float16 if b.dtype == tl.float8e4nv else b.dtype)
        acc = tl.dot(a, tl.trans(b.to(a.dtype)), acc)
        a_ptr += BLOCK_K
        w_ptr += BLOCK_K
    return acc


@triton.jit(do_not_specialize=["rows"])
def _up_kernel(
    x, w13, h, sorted_rows, expert_ids, num_padded, scale, bias, a_scale, rows, experts, hidden, width, alpha, limit,
    CHOICES: tl.constexpr, ACTIVATION: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_A_SCALE: tl.constexpr, WIDEN: tl.constexpr, IN_ORDER: tl.constexpr, DIRECT: tl.constexpr, EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # column tiles fastest: programs that run together share rows of x and one expert's weights
    tiles_n = tl.cdiv(width, BLOCK_N)
    block, n = tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n
    row, expert, used = _block_rows(
        sorted_rows, expert_ids, num_padded, block, rows, experts, DIRECT, BLOCK_M
    )  # fmt: skip
    if not used:
        return
    w_row, w_ok = _weight_rows(n, width, True, BLOCK_N)
    acc = _tile_product(
        x + (row // CHOICES).to(tl.int64) * hidden, row < rows, w13 + expert * 2 * width * hidden, w_row, w_ok,
        hidden, WIDEN, EVEN_N, EVEN_K, BLOCK_M, 2 * BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if HAS_A_SCALE:
        acc *= tl.load(a_scale + row // CHOICES, mask=row < rows, other=0.0)[:, None]
    if HAS_SCALE:
        acc *= tl.load(scale + expert * 2 * width + w_row, mask=w_ok, other=0.0)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias + expert * 2 * width + w_row, mask=w_ok, other=0.0).to(tl.float32)[None, :]
    gate, up = tl.split(tl.permute(tl.reshape(acc, [BLOCK_M, 2, BLOCK_N]), (0, 2, 1)))
    if ACTIVATION == 0:
        value = gate * tl.sigmoid(gate) * up
    else:
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
        value = (up + 1.0) * gate * tl.sigmoid(alpha * gate)
    column = n * BLOCK_N + tl.arange(0, BLOCK_N)
    if h.dtype.element_ty == tl.float16:
        value = tl.minimum(tl.maximum(value, -65504.0), 65504.0)
    place = block * BLOCK_M + tl.arange(0, BLOCK_M) if IN_ORDER else row
    out = h + place[:, None].to(tl.int64) * width + column[None, :]
    tl.store(out, value.to(h.dtype.element_ty), mask=(row < rows)[:, None] & (column < width)[None, :])


@triton.jit(do_not_specialize=["rows"])
def _down_kernel(
    h, w2, y, sorted_rows, expert_ids, num_padded, weights, scale, bias, a_scale, rows, experts, width, hidden,
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_A_SCALE: tl.constexpr, DIRECT: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(hidden, BLOCK_N)
    block, n = tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n
    row, expert, used = _block_rows(
        sorted_rows, expert_ids, num_padded, block, rows, experts, DIRECT, BLOCK_M
    )  # fmt: skip
    if not used:
        return
    w_row, w_ok = _weight_rows(n, hidden, False, BLOCK_N)
    acc = _tile_product(
        h + row.to(tl.int64) * width, row < rows, w2 + expert * hidden * width, w_row, w_ok,
        width, False, EVEN_N, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if HAS_A_SCALE:
        acc *= tl.load(a_scale + row, mask=row < rows, other=0.0)[:, None]
    if HAS_SCALE:
        acc *= tl.load(scale + expert * hidden + w_row, mask=w_ok, other=0.0)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias + expert * hidden + w_row, mask=w_ok, other=0.0).to(tl.float32)[None, :]
    acc *= tl.load(weights + row, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    out = y + row[:, None].to(tl.int64) * hidden + w_row[None, :]
    tl.store(out, acc.to(y.dtype.element_ty), mask=(row < rows)[:, None] & w_ok[None, :])


@triton.jit
def _sum_kernel(
    y, ids, map_, out, hidden, experts, map_size, CHOICES: tl.constexpr, HAS_MAP: tl.constexpr, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float32)
    for choice in tl.static_range(CHOICES):
        local = tl.load(ids + token * CHOICES + choice)
        if HAS_MAP:
            local = tl.load(map_ + local, mask=(local >= 0) & (local < map_size), other=-1)
        here = (local >= 0) & (local < experts)
        row = y + (token * CHOICES + choice) * hidden
        acc += tl.load(row + column, mask=(column < hidden) & here, other=0.0).to(tl.float32)
    tl.store(out + token * hidden + column, acc.to(out.dtype.element_ty), mask=column < hidden)
