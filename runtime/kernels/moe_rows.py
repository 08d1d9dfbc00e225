"""One MoE layer of a few tokens: every row multiplies its expert's weights by itself, lane by lane.

    gate and up projection + activation, a row at a time  ->  down projection, weighted sum over choices, residual stream

Shapes: T tokens, K choices, H hidden, I expert width, E local experts; rows are token*K + choice. So few rows seldom meet
at an expert, and where they do the second reads its weights from the cache. A program of the second product goes through
all choices of its token, so that their sum needs no kernel and no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from runtime.kernels.moe import ACTIVATIONS
from runtime.kernels.skinny import Cut, launch_options, tile_of, wait_for_forerunner


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
    _up_rows_kernel[(triton.cdiv(width, up.n), rows)](
        x_TH, w13_E2IH, h_NI, topk_ids_TK, or_x(w13_scale_E2I), or_x(w13_bias_E2I), experts, alpha, limit,
        HIDDEN=hidden, WIDTH=width, CHOICES=choices, ACTIVATION=ACTIVATIONS[activation],
        HAS_SCALE=w13_scale_E2I is not None, HAS_BIAS=w13_bias_E2I is not None,
        EVEN_N=width % up.n == 0, EVEN_K=hidden % up.k == 0, PDL=up.pdl, BLOCK_N=up.n, BLOCK_K=up.k,
        num_warps=up.warps, **launch_options(up),
    )  # fmt: skip
    _down_rows_kernel[(triton.cdiv(hidden, down.n), tokens)](
        h_NI, w2_EHI, out_TH, topk_ids_TK, topk_weights_TK, or_x(residual_TH), or_x(w2_scale_EH), or_x(w2_bias_EH), experts,
        HIDDEN=hidden, WIDTH=width, CHOICES=choices, ADD=residual_TH is not None,
        HAS_SCALE=w2_scale_EH is not None, HAS_BIAS=w2_bias_EH is not None,
        EVEN_K=width % down.k == 0, PDL=down.pdl, BLOCK_N=down.n, BLOCK_K=down.k,
        num_warps=down.warps, **launch_options(down),
    )  # fmt: skip
    return out_TH


@triton.jit
def _up_rows_kernel(
    x, w13, h, ids, scale, bias, experts, alpha, limit,
    HIDDEN: tl.constexpr, WIDTH: tl.constexpr, CHOICES: tl.constexpr, ACTIVATION: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, PDL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    n, row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(1).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
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
        gate_tile = tile_of(gates, at, row_ok, HIDDEN, EVEN_N, EVEN_K)
        up_tile = tile_of(gates + WIDTH * HIDDEN, at, row_ok, HIDDEN, EVEN_N, EVEN_K)
        a = tl.load(x + row // CHOICES * HIDDEN + at, mask=at < HIDDEN, other=0.0).to(tl.float32)[None, :]
        gate_acc += gate_tile.to(tl.float32) * a
        up_acc += up_tile.to(tl.float32) * a
    gate, up = tl.sum(gate_acc, 1), tl.sum(up_acc, 1)
    if HAS_SCALE:
        gate *= tl.load(scale + gate_row, mask=row_ok, other=0.0)
        up *= tl.load(scale + gate_row + WIDTH, mask=row_ok, other=0.0)
    if HAS_BIAS:
        gate += tl.load(bias + gate_row, mask=row_ok, other=0.0).to(tl.float32)
        up += tl.load(bias + gate_row + WIDTH, mask=row_ok, other=0.0).to(tl.float32)
    if ACTIVATION == 0:
        value = gate * tl.sigmoid(gate) * up
    else:
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
        value = (up + 1.0) * gate * tl.sigmoid(alpha * gate)
    if h.dtype.element_ty == tl.float16:
        value = tl.minimum(tl.maximum(value, -65504.0), 65504.0)
    tl.store(h + row * WIDTH + n, value.to(h.dtype.element_ty), mask=row_ok)


@triton.jit
def _down_rows_kernel(
    h, w2, out, ids, weights, residual, scale, bias, experts,
    HIDDEN: tl.constexpr, WIDTH: tl.constexpr, CHOICES: tl.constexpr, ADD: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr, PDL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    n, token = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(1).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    row_ok = n < HIDDEN
    wait_for_forerunner(PDL)
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
            tile = tile_of(w2 + (expert * HIDDEN + n) * WIDTH, at, row_ok & here, WIDTH, False, EVEN_K)
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
