"""One MoE layer of prefill: grouped matrix products (torch's, on sorted rows) between fused Triton stages.

    align -> gather (+ fp8) -> grouped GEMM -> silu_mul (+ fp8) -> grouped GEMM -> weighted scatter-sum

Shapes: T tokens, K choices, N = T*K rows sorted by expert without padding, H hidden, I expert width, E local experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from runtime.kernels.align import align
from runtime.kernels.fused import FP8, quant_fp8_rows, silu_mul, silu_mul_quant


def prefill_moe(
    x_TH: torch.Tensor,
    w13_E2IH: torch.Tensor,
    w2_EHI: torch.Tensor,
    topk_weights_TK: torch.Tensor,
    topk_ids_TK: torch.Tensor,
    *,
    expert_map: torch.Tensor | None = None,
    w13_scale_E2I: torch.Tensor | None = None,
    w2_scale_EH: torch.Tensor | None = None,
) -> torch.Tensor:
    """y_TH as `moe.fused_moe` with "silu_mul"; meant for many rows an expert.

    fp8 weights (with row scales) multiply activations quantised row by row to fp8; bf16 weights stay in bf16. Choices
    of absent experts add nothing. CUDA-graph safe on devices with a grouped-GEMM kernel (sm_90, sm_100).
    """
    rows, experts = topk_ids_TK.numel(), w2_EHI.shape[0]
    plan = align(topk_ids_TK, experts, 1, expert_map)
    place = inverse(plan.sorted_rows, plan.num_padded, rows)
    offs = plan.ends
    if w13_E2IH.dtype == FP8:
        assert w13_scale_E2I is not None and w2_scale_EH is not None
        xq, x_scale = gather_rows(*quant_fp8_rows(x_TH), plan.sorted_rows, topk_ids_TK.shape[1], plan.num_padded)
        gate_up = _scaled_grouped_mm(xq, w13_E2IH, x_scale, w13_scale_E2I, offs)
        hq, h_scale = silu_mul_quant(gate_up)
        y_NH = _scaled_grouped_mm(hq, w2_EHI, h_scale, w2_scale_EH, offs)
    else:
        x_NH, _ = gather_rows(x_TH, None, plan.sorted_rows, topk_ids_TK.shape[1], plan.num_padded)
        gate_up = F.grouped_mm(x_NH, w13_E2IH.transpose(1, 2), offs=offs)
        y_NH = F.grouped_mm(silu_mul(gate_up), w2_EHI.transpose(1, 2), offs=offs)
    return weighted_sum(y_NH, place, topk_weights_TK, x_TH.dtype)


def _scaled_grouped_mm(
    a: torch.Tensor, w: torch.Tensor, a_scale: torch.Tensor, w_scale: torch.Tensor, offs: torch.Tensor
) -> torch.Tensor:
    row_wise = F.ScalingType.RowWise
    return F.scaled_grouped_mm(
        a, w.transpose(1, 2), a_scale, row_wise, w_scale, row_wise, offs=offs, output_dtype=torch.bfloat16
    )


def inverse(sorted_rows: torch.Tensor, num_used: torch.Tensor, rows: int) -> torch.Tensor:
    """place [rows] int32: where each row went; -1 for rows of absent experts."""
    place = torch.full((rows,), -1, dtype=torch.int32, device=sorted_rows.device)
    block = 1024
    _inverse_kernel[(triton.cdiv(rows, block),)](sorted_rows, num_used, place, BLOCK=block, num_warps=4)
    return place


def gather_rows(
    x_TH: torch.Tensor, scale_T: torch.Tensor | None, sorted_rows: torch.Tensor, choices: int, num_used: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows of x in expert order, their scales). Rows past `num_used` are not written: no expert owns them."""
    rows, hidden = sorted_rows.numel(), x_TH.shape[1]
    out_NH = torch.empty(rows, hidden, dtype=x_TH.dtype, device=x_TH.device)
    scale_N = torch.empty(rows if scale_T is not None else 0, dtype=torch.float32, device=x_TH.device)
    _gather_kernel[(rows,)](
        x_TH, scale_T if scale_T is not None else x_TH, out_NH, scale_N, sorted_rows, num_used, hidden,
        CHOICES=choices, HAS_SCALE=scale_T is not None, BLOCK=triton.next_power_of_2(hidden), num_warps=4,
    )  # fmt: skip
    return out_NH, scale_N


def weighted_sum(
    y_NH: torch.Tensor, place: torch.Tensor, weights_TK: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """out_t = sum over t's choices of weight * y[place], in fp32, choices with place -1 skipped."""
    tokens, choices = weights_TK.shape
    hidden = y_NH.shape[1]
    out_TH = torch.empty(tokens, hidden, dtype=dtype, device=y_NH.device)
    block = min(2048, triton.next_power_of_2(hidden))
    _weighted_sum_kernel[(tokens, triton.cdiv(hidden, block))](
        y_NH, place, weights_TK, out_TH, hidden, CHOICES=choices, BLOCK=block, num_warps=8 if block > 1024 else 4
    )
    return out_TH


@triton.jit
def _inverse_kernel(sorted_rows, num_used, place, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    used = at < tl.load(num_used)
    row = tl.load(sorted_rows + at, mask=used, other=0)
    tl.store(place + row, at, mask=used)


@triton.jit
def _gather_kernel(
    x, scale, out, out_scale, sorted_rows, num_used, hidden,
    CHOICES: tl.constexpr, HAS_SCALE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64)
    if at >= tl.load(num_used):
        return
    token = (tl.load(sorted_rows + at) // CHOICES).to(tl.int64)
    column = tl.arange(0, BLOCK)
    tl.store(out + at * hidden + column, tl.load(x + token * hidden + column, mask=column < hidden), mask=column < hidden)
    if HAS_SCALE:
        tl.store(out_scale + at, tl.load(scale + token))


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
