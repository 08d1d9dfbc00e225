"""Paged split-KV decode attention for grouped query heads, with optional sinks, sliding window and fp8 cache.

Shapes: B sequences, H query heads, G = H / kv_heads query heads a key head, D head width, S splits. The cache of one
layer is [num_blocks, 2, block_tokens, kv_heads, D], keys at 0 and values at 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from runtime.kernels.splits import choose_splits, half, merge, multiprocessors, split_range, token_slots

_LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class GqaTile:
    """Tokens a tile, warps, loads in flight, and programs that fit a multiprocessor at once."""

    tokens: int
    warps: int
    stages: int
    resident: int


DEFAULT_TILE = GqaTile(64, 4, 5, 2)


def gqa_decode(
    q_BHD: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table_BP: torch.Tensor,
    seq_lens_B: torch.Tensor,
    *,
    scale: float,
    window: int = 0,
    sinks_H: torch.Tensor | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    max_context: int | None = None,
    splits: int | None = None,
    tile: GqaTile = DEFAULT_TILE,
    out_BHD: torch.Tensor | None = None,
) -> torch.Tensor:
    """out_BHD: attention of one new token a sequence over its first `seq_lens` cached tokens (the new one included).

    `window` > 0 keeps the last `window` tokens. `sinks_H` adds exp(sink) to each head's denominator. A cache in
    float8_e4m3fn holds key / k_scale and value / v_scale. `block_table_BP` and `seq_lens_B` int32; entries past a
    sequence's length are not read. `max_context` bounds seq_lens (default: what the table holds); it only chooses how
    finely to split. An empty sequence (a graph's padding) gives zeros.
    """
    batch, heads, dim = q_BHD.shape
    _, two, block_tokens, kv_heads, _ = kv_cache.shape
    assert two == 2 and heads % kv_heads == 0 and q_BHD.is_contiguous() and kv_cache.is_contiguous()
    assert block_table_BP.stride(1) == 1 and seq_lens_B.dtype == block_table_BP.dtype == torch.int32
    bound = max_context or block_table_BP.shape[1] * block_tokens
    if window > 0:
        bound = min(bound, window)
    slots = multiprocessors(q_BHD.device.index or 0) * tile.resident
    splits = splits or choose_splits(batch * kv_heads, bound, tile.tokens, slots)
    out_BHD = torch.empty_like(q_BHD) if out_BHD is None else out_BHD
    parts, lse = out_BHD, torch.empty(batch, heads, splits, dtype=torch.float32, device=q_BHD.device)
    if splits > 1:
        parts = torch.empty(batch, heads, splits, dim, dtype=torch.float32, device=q_BHD.device)
    group = heads // kv_heads
    _gqa_kernel[(kv_heads * splits * batch,)](
        q_BHD, kv_cache, block_table_BP, seq_lens_B, sinks_H if sinks_H is not None else lse, parts, lse,
        block_table_BP.stride(0), splits, window, scale * k_scale * _LOG2_E, v_scale,
        KV_HEADS=kv_heads, GROUP=group, DIM=dim, BLOCK_TOKENS=block_tokens, HAS_SINKS=sinks_H is not None,
        BLOCK_M=max(16, triton.next_power_of_2(group)), BLOCK_D=triton.next_power_of_2(dim), BLOCK_N=tile.tokens,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if splits > 1:
        merge(parts, lse, out_BHD)
    return out_BHD


@triton.jit(do_not_specialize=["table_stride", "splits"])
def _gqa_kernel(
    q, cache, block_table, seq_lens, sinks, parts, lse, table_stride, splits, window, scale_log2, v_scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    HAS_SINKS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # key heads fastest: programs that run together read neighbouring bytes of the same tokens
    pid = tl.program_id(0)
    kv_head, split = pid % KV_HEADS, (pid // KV_HEADS) % splits
    seq = (pid // (KV_HEADS * splits)).to(tl.int64)
    m, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    head, head_ok = kv_head * GROUP + m, m < GROUP
    q_row = (seq * KV_HEADS * GROUP + head)[:, None] * DIM + d[None, :]
    query = tl.load(q + q_row, mask=head_ok[:, None] & (d < DIM)[None, :], other=0.0)
    # fp8 becomes fp16 in one instruction, bf16 in several; fp16 holds any e4m3 number, and more of a query than bf16
    if cache.dtype.element_ty == tl.float8e4nv:
        query = half(query)
    length = tl.load(seq_lens + seq)
    begin = tl.maximum(length - window, 0) if window > 0 else 0
    # tiles start at multiples of BLOCK_N, so that a tile never straddles two blocks of the cache
    lo, hi = split_range(begin // BLOCK_N * BLOCK_N, length, split, splits, BLOCK_N)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if HAS_SINKS and split == 0:  # a sink is a key without a value: it only adds to the denominator
        top = tl.load(sinks + head, mask=head_ok, other=0.0).to(tl.float32) * 1.4426950408889634
        total += 1.0
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    table = block_table + seq * table_stride
    for first in range(lo, hi, BLOCK_N):
        token = first + tl.arange(0, BLOCK_N)
        slot = token_slots(table, token, hi, first, BLOCK_TOKENS, BLOCK_N)
        # slot = block * BLOCK_TOKENS + offset; a block holds its keys, then its values
        place = cache + ((slot + slot // BLOCK_TOKENS * BLOCK_TOKENS) * KV_HEADS + kv_head)[:, None] * DIM + d[None, :]
        inside = (token < hi)[:, None] & (d < DIM)[None, :]
        k = tl.load(place, mask=inside, other=0.0)
        v = tl.load(place + BLOCK_TOKENS * KV_HEADS * DIM, mask=inside, other=0.0)
        s = tl.dot(query, tl.trans(k.to(query.dtype))) * scale_log2
        s = tl.where(((token >= begin) & (token < hi))[None, :], s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - new_top[:, None])
        decay = tl.exp2(top - new_top)
        total = total * decay + tl.sum(p, 1)
        acc = tl.dot(p.to(query.dtype), v.to(query.dtype), acc * decay[:, None])
        top = new_top
    out = (seq * KV_HEADS * GROUP + head) * splits + split
    seen = tl.where(total > 0.0, total, 1.0)
    tl.store(lse + out, tl.where(total > 0.0, top + tl.log2(seen), float("-inf")), mask=head_ok)
    value = acc * (v_scale / seen)[:, None]
    tl.store(
        parts + out[:, None] * DIM + d[None, :],
        value.to(parts.dtype.element_ty),
        mask=head_ok[:, None] & (d < DIM)[None, :],
    )
