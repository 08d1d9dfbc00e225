"""The least time that a step can take on a device: bytes and flops of each phase over rates measured in the same run.

A phase's floor is the larger of its bytes over the read bandwidth and its flops over the matrix peak; a step's floor is
their sum. Each weight is read once a step, experts only if a token chose them; activations are not counted.

Legend: T tokens of the step, N rows that this rank's experts get, C stored tokens that attention reads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from runtime.layout import RankLayout
from twin.spec.model import ModelSpec


@dataclass(frozen=True)
class Rates:
    """bytes/s read and flop/s in bf16 and fp8, measured."""

    read_bytes_per_s: float
    bf16_flop_per_s: float
    fp8_flop_per_s: float


@dataclass(frozen=True)
class Load:
    """What a step computes: `tokens`, their `pairs` with stored tokens, `stored` tokens read of the cache, sequences that
    want logits, and of the experts: rows that arrive and rows that dispatch and combine copy (0 without a slice)."""

    tokens: int
    pairs: float
    stored: int
    wanted: int
    expert_rows: int
    copied_rows: int = 0


def phase_floors(model: ModelSpec, at: RankLayout, params: dict[str, torch.Tensor], load: Load, rates: Rates,
                 kv_itemsize: int) -> dict[str, float]:
    """Seconds by phase, named as the model marks them."""
    groups: dict[str, list[tuple[str, torch.Tensor]]] = {}
    for name, tensor in params.items():
        groups.setdefault(_phase(name), []).append((name, tensor))
    floors = {}
    for phase, tensors in groups.items():
        rows = {"experts": load.expert_rows, "head": load.wanted}.get(phase, load.tokens)
        floors[phase] = _products(model, at, phase, tensors, rows, rates)
    a = model.attention
    kv_bytes = load.stored * _kv_elements(model, at) * kv_itemsize * model.layers
    heads = a.heads // at.tp
    absorbed = a.kind == "mla" and load.tokens == load.wanted  # decode reads latents themselves
    width = 2 * (a.kv_lora_rank or 0) + (a.qk_rope_head_dim or 0) if absorbed else a.head_dim + a.v_head_dim
    flops = 2 * heads * width * load.pairs * model.layers
    floors["attention"] += max(kv_bytes / rates.read_bytes_per_s, flops / rates.bf16_flop_per_s)
    if load.copied_rows:
        copied = 2 * 2 * load.copied_rows * model.hidden  # bf16 rows, read and written
        floors["dispatch"] = floors["combine"] = copied / rates.read_bytes_per_s
    return floors


def _phase(name: str) -> str:
    part = name.split(".")[1] if "." in name else name
    if part in ("head", "norm", "embed"):
        return "head" if part != "embed" else "embed"
    return {"experts": "experts", "shared": "shared_experts", "ffn": "dense_ffn", "router": "gate", "router_bias": "gate",
            "score_bias": "gate"}.get(part, "attention")


def _products(model: ModelSpec, at: RankLayout, phase: str, tensors: list[tuple[str, torch.Tensor]], rows: int,
              rates: Rates) -> float:
    if phase == "embed":
        return 0.0
    wide = sum(t.numel() * t.element_size() for _, t in tensors)
    matrices = [(name, t) for name, t in tensors if t.dim() >= 2 and not name.endswith(".scale")]
    if phase == "experts":
        slots = at.slots_per_rank
        each = rows / max(1, model.moe_layers) / slots
        wide = wide * -math.expm1(-each) if each < 50 else wide  # experts that got a row, routed at random
        flops = 2.0 * rows / max(1, model.moe_layers) * sum(t[0].numel() for _, t in matrices)
    else:
        flops = 2.0 * rows * sum(t.numel() for _, t in matrices)
    narrow = any(t.dtype == torch.float8_e4m3fn for _, t in matrices)
    peak = rates.fp8_flop_per_s if narrow else rates.bf16_flop_per_s
    return max(wide / rates.read_bytes_per_s, flops / peak)


def _kv_elements(model: ModelSpec, at: RankLayout) -> int:
    a = model.attention
    if a.kind == "mla":
        assert a.kv_lora_rank and a.qk_rope_head_dim
        return a.kv_lora_rank + a.qk_rope_head_dim
    return 2 * max(1, a.kv_heads // at.tp) * a.head_dim
