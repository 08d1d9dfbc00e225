"""What each kernel computes, in plain torch: the CPU fallback, and what tests compare with in float64.

Same names and arguments as the kernels. Every function works in the dtype `compute` (fp32 unless told; tests pass
float64) and rounds only its results. Loops over sequences read lengths on the host: not for CUDA graphs.
"""

from __future__ import annotations

import torch

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0


def fused_moe(
    x_TH: torch.Tensor, w13_E2IH: torch.Tensor, w2_EHI: torch.Tensor,
    topk_weights_TK: torch.Tensor, topk_ids_TK: torch.Tensor, *,
    activation: str = "silu_mul", expert_map: torch.Tensor | None = None,
    w13_scale_E2I: torch.Tensor | None = None, w2_scale_EH: torch.Tensor | None = None,
    w13_bias_E2I: torch.Tensor | None = None, w2_bias_EH: torch.Tensor | None = None,
    alpha: float = 1.702, limit: float = 7.0, fp8_rows: bool = False, compute: torch.dtype = torch.float32,
) -> torch.Tensor:  # fmt: skip
    """See `moe.fused_moe`; with `fp8_rows`, `moe.fused_moe_fp8`: what enters either product is rounded to fp8 rows."""
    rounded = _through_fp8 if fp8_rows else lambda value: value
    x = rounded(x_TH.to(compute))
    out = torch.zeros_like(x)
    local = localise(topk_ids_TK, expert_map)
    for expert in range(w2_EHI.shape[0]):
        token, choice = torch.nonzero(local == expert, as_tuple=True)
        if token.numel() == 0:
            continue
        w13 = _scaled(w13_E2IH[expert], w13_scale_E2I, expert, compute)
        w2 = _scaled(w2_EHI[expert], w2_scale_EH, expert, compute)
        gate_up = x[token] @ w13.T
        if w13_bias_E2I is not None:
            gate_up = gate_up + w13_bias_E2I[expert].to(compute)
        y = rounded(_activated(gate_up, activation, alpha, limit)) @ w2.T
        if w2_bias_EH is not None:
            y = y + w2_bias_EH[expert].to(compute)
        out.index_add_(0, token, y * topk_weights_TK[token, choice].to(compute)[:, None])
    return out.to(x_TH.dtype if compute != torch.float64 else compute)


def _through_fp8(value: torch.Tensor) -> torch.Tensor:
    fp8, scale = quant_fp8_rows(value)
    return fp8.to(value.dtype) * scale.to(value.dtype)[:, None]


def localise(topk_ids_TK: torch.Tensor, expert_map: torch.Tensor | None) -> torch.Tensor:
    """Local expert of each choice; -1 where the map has none."""
    ids = topk_ids_TK.long()
    if expert_map is None:
        return ids
    known = (ids >= 0) & (ids < expert_map.numel())
    return torch.where(known, expert_map.long()[ids.clamp(0, expert_map.numel() - 1)], -1)


def _scaled(w: torch.Tensor, scale: torch.Tensor | None, expert: int, compute: torch.dtype) -> torch.Tensor:
    return w.to(compute) if scale is None else w.to(compute) * scale[expert].to(compute)[:, None]


def _activated(gate_up: torch.Tensor, activation: str, alpha: float, limit: float) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    if activation == "silu_mul":
        return gate * torch.sigmoid(gate) * up
    assert activation == "swiglu_clamped", activation
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1.0) * gate * torch.sigmoid(alpha * gate)


def paged(cache: torch.Tensor, table_P: torch.Tensor, length: int) -> torch.Tensor:
    """The first `length` tokens of one sequence, gathered from blocks [num_blocks, block_tokens, ...]."""
    tokens = torch.arange(length, device=cache.device)
    blocks = table_P.long()[tokens // cache.shape[1]]
    return cache[blocks, tokens % cache.shape[1]]


def gqa_decode(
    q_BHD: torch.Tensor, kv_cache: torch.Tensor, block_table_BP: torch.Tensor, seq_lens_B: torch.Tensor, *,
    scale: float, window: int = 0, sinks_H: torch.Tensor | None = None, k_scale: float = 1.0, v_scale: float = 1.0,
    max_context: int | None = None, compute: torch.dtype = torch.float32,
) -> torch.Tensor:  # fmt: skip
    """See `attention_gqa.gqa_decode`; `max_context` is accepted and not needed."""
    out = torch.zeros(q_BHD.shape, dtype=compute, device=q_BHD.device)
    group = q_BHD.shape[1] // kv_cache.shape[3]
    for b, length in enumerate(seq_lens_B.tolist()):
        if length == 0:
            continue
        begin = max(length - window, 0) if window > 0 else 0
        k = paged(kv_cache[:, 0], block_table_BP[b], length)[begin:].to(compute) * k_scale
        v = paged(kv_cache[:, 1], block_table_BP[b], length)[begin:].to(compute) * v_scale
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        s = torch.einsum("hd,nhd->hn", q_BHD[b].to(compute), k) * scale
        if sinks_H is not None:
            s = torch.cat([s, sinks_H.to(compute)[:, None]], 1)
        p = torch.softmax(s, -1)[:, : length - begin]
        out[b] = torch.einsum("hn,nhd->hd", p, v)
    return out.to(q_BHD.dtype if compute != torch.float64 else compute)


def mla_decode(
    q_BHD: torch.Tensor, cache: torch.Tensor, block_table_BP: torch.Tensor, seq_lens_B: torch.Tensor, *,
    scale: float, latent: int = 512, max_context: int | None = None, compute: torch.dtype = torch.float32,
) -> torch.Tensor:  # fmt: skip
    """See `attention_mla.mla_decode`; `max_context` is accepted and not needed."""
    batch, heads, _ = q_BHD.shape
    out = torch.zeros(batch, heads, latent, dtype=compute, device=q_BHD.device)
    for b, length in enumerate(seq_lens_B.tolist()):
        if length == 0:
            continue
        kv = paged(cache, block_table_BP[b], length).to(compute)
        out[b] = torch.softmax(q_BHD[b].to(compute) @ kv.T * scale, -1) @ kv[:, :latent]
    return out.to(q_BHD.dtype if compute != torch.float64 else compute)


def gate_topk(
    logits_TE: torch.Tensor, k: int, *, scoring: str = "softmax", renormalize: bool = True, scale: float = 1.0,
    bias_E: torch.Tensor | None = None, groups: int = 1, topk_groups: int = 1, group_score: str = "top2",
    compute: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """See `gate.gate_topk`."""
    logits = logits_TE.to(compute)
    score = torch.sigmoid(logits) if scoring == "sigmoid" else torch.softmax(logits, -1)
    choice = score if bias_E is None else score + bias_E.to(compute)
    if groups > 1:
        by_group = choice.unflatten(1, (groups, -1))
        value = by_group.topk(min(2, by_group.shape[-1]), -1).values.sum(-1) if group_score == "top2" else by_group.amax(-1)
        best = value.sort(dim=-1, descending=True, stable=True).indices[:, :topk_groups]
        allowed = torch.zeros_like(value, dtype=torch.bool).scatter_(1, best, True)
        choice = by_group.masked_fill(~allowed[:, :, None], float("-inf")).flatten(1)
    ids = choice.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    weights = score.gather(1, ids)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-20)
    return (weights * scale).to(torch.float32 if compute != torch.float64 else compute), ids.to(torch.int32)


def add_rmsnorm(
    x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float, residual_TH: torch.Tensor | None = None,
    compute: torch.dtype = torch.float32,
) -> torch.Tensor:  # fmt: skip
    """See `fused.add_rmsnorm`: `residual_TH` is replaced by the sum."""
    value = x_TH.to(compute)
    if residual_TH is not None:
        residual_TH.copy_(value + residual_TH.to(compute))
        value = residual_TH.to(compute)
    return rmsnorm(value, weight_H, eps).to(x_TH.dtype if compute != torch.float64 else compute)


def rmsnorm(value: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Unrounded RMS norm over the last dim, in value's dtype."""
    return value * torch.rsqrt(value.square().mean(-1, keepdim=True) + eps) * weight.to(value.dtype)


def silu_mul(gate_up_N2I: torch.Tensor, compute: torch.dtype = torch.float32) -> torch.Tensor:
    """See `fused.silu_mul`."""
    return _activated(gate_up_N2I.to(compute), "silu_mul", 0.0, 0.0).to(gate_up_N2I.dtype)


def quant_fp8_rows(x_NH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See `fused.quant_fp8_rows`."""
    x = x_NH.to(torch.float32)
    scale = x.abs().amax(-1).clamp(min=1e-10) / FP8_MAX
    return (x / scale[:, None]).to(FP8), scale


def silu_mul_quant(gate_up_N2I: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See `fused.silu_mul_quant`."""
    return quant_fp8_rows(_activated(gate_up_N2I.to(torch.float32), "silu_mul", 0.0, 0.0))


def rotate(x: torch.Tensor, cos_sin_TR: torch.Tensor, interleaved: bool, halves: bool = False) -> torch.Tensor:
    """Rotate the first R columns of x [T, heads, D]; `halves` leaves interleaved pairs as two halves."""
    rotary = cos_sin_TR.shape[1]
    cos, sin = cos_sin_TR.to(x.dtype)[:, None].chunk(2, -1)
    part, rest = x[..., :rotary], x[..., rotary:]
    a, b = (part[..., 0::2], part[..., 1::2]) if interleaved else part.chunk(2, -1)
    turned = [a * cos - b * sin, b * cos + a * sin]
    together = torch.stack(turned, -1).flatten(-2) if interleaved and not halves else torch.cat(turned, -1)
    return torch.cat([together, rest], -1)


def rope_norm_cache(
    qkv_TC: torch.Tensor, positions_T: torch.Tensor, slots_T: torch.Tensor, cos_sin: torch.Tensor,
    kv_cache: torch.Tensor, *, heads: int, interleaved: bool = False,
    q_norm_D: torch.Tensor | None = None, k_norm_D: torch.Tensor | None = None, eps: float = 1e-6,
    k_scale: float = 1.0, v_scale: float = 1.0, compute: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """See `rope.rope_norm_cache`."""
    dtype, kv_heads, dim = qkv_TC.dtype, kv_cache.shape[3], kv_cache.shape[4]
    q, k, v = qkv_TC.unflatten(1, (-1, dim)).split([heads, kv_heads, kv_heads], 1)
    angles = cos_sin[positions_T.long()]
    q, k = (
        rotate(rmsnorm(a.to(compute), w, eps).to(dtype).to(compute) if w is not None else a.to(compute), angles, interleaved)
        for a, w in ((q, q_norm_D), (k, k_norm_D))
    )
    q, k, v = q.to(dtype), k.to(dtype), v.contiguous()
    kept = slots_T >= 0
    block, offset = slots_T[kept] // kv_cache.shape[2], slots_T[kept] % kv_cache.shape[2]
    kv_cache[block, 0, offset] = (k[kept].to(compute) / k_scale).to(kv_cache.dtype)
    kv_cache[block, 1, offset] = (v[kept].to(compute) / v_scale).to(kv_cache.dtype)
    return q, k, v


def mla_rope_norm_cache(
    q_THD: torch.Tensor, latent_TC: torch.Tensor, norm_L: torch.Tensor, positions_T: torch.Tensor,
    slots_T: torch.Tensor, cos_sin: torch.Tensor, cache: torch.Tensor, *, interleaved: bool = True, eps: float = 1e-6,
    compute: torch.dtype = torch.float32,
) -> torch.Tensor:  # fmt: skip
    """See `rope.mla_rope_norm_cache`."""
    dtype, rotary = latent_TC.dtype, cos_sin.shape[1]
    angles, latent = cos_sin[positions_T.long()], latent_TC.shape[1] - rotary
    turn = lambda x: rotate(x.to(compute), angles, interleaved, halves=True).to(dtype)  # noqa: E731
    q_THD[..., -rotary:] = turn(q_THD[..., -rotary:])
    normed = rmsnorm(latent_TC[:, :latent].to(compute), norm_L, eps).to(dtype)
    out = torch.cat([normed, turn(latent_TC[:, None, latent:])[:, 0]], 1)
    kept = slots_T >= 0
    cache[slots_T[kept] // cache.shape[1], slots_T[kept] % cache.shape[1]] = out[kept].to(cache.dtype)
    return out
