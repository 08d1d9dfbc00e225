"""Which of the MoE implementations serves a layer, by its shape alone (so that a captured graph fixes the choice).

Crossings measured on an H200 with 128 experts, hidden 2048, width 768, 8 choices: fp8 weights with wider activations win
up to 12 rows an expert, products wholly in fp8 above (6 to 39% faster at 16 to 24 rows in five models' shapes); torch's grouped
GEMM overtakes ours near 400 rows an expert in bf16, and between 512 and 1024 in fp8, where the products of `moe_fp8` win from 256
on (494 against 512 us; at 1024 rows 1510 against 1599).
"""

from __future__ import annotations

import torch

from runtime.kernels.fused import FP8
from runtime.kernels.moe import fused_moe, fused_moe_fp8
from runtime.kernels.moe_fp8 import FP8_TILES, Fp8Tiles, tiles_fit
from runtime.kernels.moe_prefill import prefill_moe

_FP8_ROWS = 12
_GROUPED_ROWS = 384
_GROUPED_ROWS_FP8 = 768
_TILED_ROWS_FP8 = 255


def moe_layer(
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
    all_experts: int | None = None,
    out_TH: torch.Tensor | None = None,
    x_scale_T: torch.Tensor | None = None,
    fp8_tiles: Fp8Tiles | None = FP8_TILES,
) -> torch.Tensor:
    """`moe.fused_moe`'s function and arguments, by whichever implementation is fastest at these shapes.

    A fall in precision comes with size: from 13 rows an expert, fp8 weights meet activations rounded to fp8 row by row.
    The rows an expert gets are estimated as all choices over `all_experts`, else over all of the map's. `fp8_tiles`: the
    products of layers of many rows an expert, wholly in fp8; else torch's and one before it.
    """
    plain = activation == "silu_mul" and w13_bias_E2I is None and w2_bias_EH is None
    all_experts = all_experts or (expert_map.numel() if expert_map is not None else w2_EHI.shape[0])
    each = topk_ids_TK.numel() / all_experts
    operands = (x_TH, w13_E2IH, w2_EHI, topk_weights_TK, topk_ids_TK)
    scales = {"w13_scale_E2I": w13_scale_E2I, "w2_scale_EH": w2_scale_EH, "x_scale_T": x_scale_T}
    if w13_E2IH.dtype != FP8 or fp8_tiles is None or not tiles_fit(w13_E2IH, fp8_tiles):
        fp8_tiles = None
    grouped_rows = _GROUPED_ROWS if w13_E2IH.dtype != FP8 else _GROUPED_ROWS_FP8 if fp8_tiles is None else _TILED_ROWS_FP8
    if plain and each > grouped_rows:
        return prefill_moe(*operands, expert_map=expert_map, out_TH=out_TH, tiles=fp8_tiles, **scales)
    if each > _FP8_ROWS and plain and w13_E2IH.dtype == FP8:
        assert w13_scale_E2I is not None and w2_scale_EH is not None
        return fused_moe_fp8(*operands, expert_map=expert_map, w13_scale_E2I=w13_scale_E2I, w2_scale_EH=w2_scale_EH,
                             all_experts=all_experts, out_TH=out_TH, x_scale_T=x_scale_T)
    return fused_moe(
        *operands, activation=activation, expert_map=expert_map, w13_bias_E2I=w13_bias_E2I, w2_bias_EH=w2_bias_EH,
        alpha=alpha, limit=limit, all_experts=all_experts, out_TH=out_TH, **scales,
    )  # fmt: skip
