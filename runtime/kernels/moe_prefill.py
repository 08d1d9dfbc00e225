"""One MoE layer of prefill: a gathering GEMM with the activation in its epilogue, torch's grouped GEMM on rows in expert
order, and the weighted sum of each token's rows.

    align -> gather + up projection + activation -> (fp8 rows) -> grouped GEMM -> weighted sum

or, wholly in fp8, by the products of `moe_fp8`, of which the first rounds its activations itself.

Shapes: T tokens, K choices, N = T*K rows, P rows in expert order padded to whole blocks, H hidden, I expert width,
E local experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from runtime.kernels.align import align
from runtime.kernels.fused import FP8, quant_fp8_rows
from runtime.kernels.moe import ACTIVATIONS, Tile, out_like, up_projection
from runtime.kernels.moe_fp8 import Fp8Tiles, down_fp8, up_fp8

_UP = Tile(128, 128, 64, 8, 4)
_UP_FP8 = Tile(128, 128, 128, 8, 3)


def prefill_moe(
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
    alpha: float = 1.702,
    limit: float = 7.0,
    out_TH: torch.Tensor | None = None,
    x_scale_T: torch.Tensor | None = None,
    tiles: Fp8Tiles | None = None,
) -> torch.Tensor:
    """y_TH as `moe.fused_moe`, without a bias of the down projection; meant for 128 rows an expert and more.

    fp8 weights (with row scales) multiply activations quantised row by row to fp8, as `moe.fused_moe_fp8` does; bf16
    weights stay in bf16. `tiles` asks for the products of `moe_fp8`. CUDA-graph safe on devices with a grouped-GEMM kernel
    (sm_90, sm_100).
    """
    experts, choices = w2_EHI.shape[0], topk_ids_TK.shape[1]
    plan = align(topk_ids_TK, experts, tiles.up.m if tiles else _UP.m, expert_map, places=True)
    assert plan.places is not None
    fp8 = w13_E2IH.dtype == FP8
    out_TH = out_like(x_TH, x_scale_T, out_TH)
    x, x_scale = quant_fp8_rows(x_TH) if fp8 and x_scale_T is None else (x_TH, x_scale_T)
    if fp8 and tiles is not None:
        assert w13_scale_E2I is not None and w2_scale_EH is not None and x_scale is not None and activation == "silu_mul"
        hq, h_scale = up_fp8(x, x_scale, w13_E2IH, w13_scale_E2I, plan, choices, tiles.up)
        y_PH = down_fp8(hq, h_scale, w2_EHI, w2_scale_EH, plan, tiles.down) if tiles.down else \
            _scaled_grouped_mm(hq, w2_EHI, h_scale, w2_scale_EH, plan.ends)
        return weighted_sum(y_PH, plan.places, topk_weights_TK, out_TH)
    h_PI = up_projection(
        x, w13_E2IH, plan, choices, _UP_FP8 if fp8 else _UP, ACTIVATIONS[activation], w13_scale_E2I, w13_bias_E2I,
        alpha, limit, x_scale, out_TH.dtype, in_order=True, widen=x_scale is not None and not fp8,
    )  # fmt: skip
    if fp8:
        assert w2_scale_EH is not None
        hq, h_scale = quant_fp8_rows(h_PI, plan.num_padded)
        y_PH = _scaled_grouped_mm(hq, w2_EHI, h_scale, w2_scale_EH, plan.ends)
    else:
        y_PH = F.grouped_mm(h_PI, w2_EHI.transpose(1, 2), offs=plan.ends)
    return weighted_sum(y_PH, plan.places, topk_weights_TK, out_TH)


def _scaled_grouped_mm(
    a: torch.Tensor, w: torch.Tensor, a_scale: torch.Tensor, w_scale: torch.Tensor, offs: torch.Tensor
) -> torch.Tensor:
    row_wise = F.ScalingType.RowWise
    return F.scaled_grouped_mm(
        a, w.transpose(1, 2), a_scale, row_wise, w_scale, row_wise, offs=offs,
        output_dtype=torch.bfloat16, use_fast_accum=True,
    )


def weighted_sum(y_NH: torch.Tensor, place: torch.Tensor, weights_TK: torch.Tensor, out_TH: torch.Tensor) -> torch.Tensor:
    """out_t = sum over t's choices of weight * y[place], in fp32, choices with place -1 skipped."""
    tokens, choices = weights_TK.shape
    hidden = y_NH.shape[1]
    block = min(2048, triton.next_power_of_2(hidden))
    _weighted_sum_kernel[(tokens, triton.cdiv(hidden, block))](
        y_NH, place, weights_TK, out_TH, hidden, CHOICES=choices, BLOCK=block, num_warps=8 if block > 1024 else 4
    )
    return out_TH


@triton.jit
def _weighted_sum_kernel(y, place, weights, out, hidden, CHOICES: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float32)
    for choice in tl.static_range(CHOICES):
        at = tl.load(place + token * CHOICES + choice).to(tl.int64)
        weight = tl.load(weights + token * CHOICES + choice).to(tl.float32)
        row = tl.load(y + at * hidden + column, mask=(column < hidden) & (at >= 0), other=0.0)
        acc += weight * row.to(tl.float32)
    tl.store(out + token * hidden + column, acc.to(out.dtype.element_ty), mask=column < hidden)
