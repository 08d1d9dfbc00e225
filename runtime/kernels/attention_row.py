"""Decode attention of a single row in one launch: query-key norm, rotary embedding, cache write, paged split-KV attention and
the merge of its splits. What is stored of the context is read before the projections that it waits for are there.

Shapes: H query heads, G key heads, D head width, R rotary columns; see `rope` and `attention_gqa`, whose results it gives.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from runtime.kernels.rope import partner
from runtime.kernels.skinny import Cut, launch_options, let_follower_start, wait_for_forerunner
from runtime.kernels.splits import split_range

_LOG2_E = 1.4426950408889634
MOST_KEY_HEADS = 128


def attention_row(
    qkv_C: torch.Tensor,
    seq_len: torch.Tensor,
    table_P: torch.Tensor,
    cos_sin: torch.Tensor,
    kv_cache: torch.Tensor,
    cut: Cut,
    arrived: torch.Tensor,
    *,
    heads: int,
    scale: float,
    interleaved: bool = False,
    q_norm_D: torch.Tensor | None = None,
    k_norm_D: torch.Tensor | None = None,
    eps: float = 1e-6,
    window: int = 0,
    sinks_H: torch.Tensor | None = None,
) -> torch.Tensor:
    """out [H, D] of projections `qkv_C` [(H + 2 G) * D] of the newest of `seq_len` [1] int32 tokens, whose key and value go to
    the cache; 0 tokens (a graph's padding) give zeros and write nothing.

    `kv_cache` [blocks, 2, block_tokens, G, D] in qkv's dtype, `table_P` int32 the sequence's blocks. Length and table must be
    older than the kernel before this one. `cut`: `n` tokens a tile, `k` splits. `arrived` int32 [G], zero, is left zero.
    """
    _, two, block_tokens, kv_heads, dim = kv_cache.shape
    assert two == 2 and kv_cache.dtype == qkv_C.dtype and kv_cache.is_contiguous() and qkv_C.is_contiguous()
    assert qkv_C.numel() == (heads + 2 * kv_heads) * dim and seq_len.numel() == 1 and kv_heads <= arrived.numel()
    assert table_P.is_contiguous() and table_P.dtype == seq_len.dtype == torch.int32 and cos_sin.is_contiguous()
    group, splits = heads // kv_heads, cut.k
    new = lambda *shape: torch.empty(shape, dtype=torch.float32, device=qkv_C.device)  # noqa: E731
    parts, lse = new(kv_heads, splits, group, dim), new(kv_heads, splits, group)
    out_HD = torch.empty(heads, dim, dtype=qkv_C.dtype, device=qkv_C.device)
    or_x = lambda t: t if t is not None else qkv_C  # noqa: E731
    _row_kernel[(kv_heads * splits,)](
        qkv_C, kv_cache, table_P, seq_len, cos_sin, or_x(q_norm_D), or_x(k_norm_D), or_x(sinks_H), parts, lse, arrived,
        out_HD, window, scale * _LOG2_E, eps,
        KV_HEADS=kv_heads, GROUP=group, DIM=dim, ROTARY=cos_sin.shape[1], BLOCK_TOKENS=block_tokens, SPLITS=splits,
        INTERLEAVED=interleaved, Q_NORM=q_norm_D is not None, K_NORM=k_norm_D is not None, HAS_SINKS=sinks_H is not None,
        PDL=cut.pdl, EARLY=cut.early, BLOCK_M=max(16, triton.next_power_of_2(group)),
        BLOCK_G=triton.next_power_of_2(group), BLOCK_D=triton.next_power_of_2(dim), BLOCK_N=cut.n, CHUNK=min(splits, 8),
        num_warps=cut.warps, **launch_options(cut),
    )  # fmt: skip
    return out_HD


@triton.jit
def _heads(rows, d, other, ok, DIM: tl.constexpr, ROTARY: tl.constexpr):
    """Heads' rows [heads, D], of which `rows` [heads] point at the starts, and beside every column its partner's."""
    value = tl.load(rows[:, None] + d[None, :], mask=ok[:, None] & (d < DIM)[None, :], other=0.0)
    return value, tl.load(rows[:, None] + other[None, :], mask=ok[:, None] & (d < ROTARY)[None, :], other=0.0)


@triton.jit
def _turned(value, mate, sign, cos, sin, gain, mate_gain, eps, DIM: tl.constexpr, NORM: tl.constexpr):
    """`_heads` in fp32, normed (rounded as a separate norm would), then rotated."""
    dtype: tl.constexpr = value.dtype
    value, mate = value.to(tl.float32), mate.to(tl.float32)
    if NORM:
        inverse = tl.rsqrt(tl.sum(value * value, 1) / DIM + eps)[:, None]
        value = (value * inverse * gain[None, :]).to(dtype).to(tl.float32)
        mate = (mate * inverse * mate_gain[None, :]).to(dtype).to(tl.float32)
    return value * cos[None, :] + mate * (sin * sign)[None, :]


@triton.jit
def _gains(norm, d, other, DIM: tl.constexpr, ROTARY: tl.constexpr, NORM: tl.constexpr):
    if NORM:
        return (
            tl.load(norm + d, mask=d < DIM, other=0.0).to(tl.float32),
            tl.load(norm + other, mask=d < ROTARY, other=0.0).to(tl.float32),
        )
    return tl.zeros_like(d).to(tl.float32), tl.zeros_like(d).to(tl.float32)


@triton.jit
def _stored(
    cache, table, first, hi, kv_head, d, KV_HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(keys, values) [n, D] of the tokens from `first` that are below `hi`; the others are zero."""
    token = first + tl.arange(0, BLOCK_N)
    if BLOCK_TOKENS % BLOCK_N == 0:  # a tile lies in one block
        block = tl.load(table + first // BLOCK_TOKENS, mask=first < hi, other=0).to(tl.int64)
    else:
        block = tl.load(table + token // BLOCK_TOKENS, mask=token < hi, other=0).to(tl.int64)
    slot = block * 2 * BLOCK_TOKENS + token % BLOCK_TOKENS
    place = cache + (slot * KV_HEADS + kv_head)[:, None] * DIM + d[None, :]
    inside = (token < hi)[:, None] & (d < DIM)[None, :]
    return tl.load(place, mask=inside, other=0.0), tl.load(place + BLOCK_TOKENS * KV_HEADS * DIM, mask=inside, other=0.0)


@triton.jit
def _row_kernel(
    qkv, cache, table, seq_len, cos_sin, q_norm, k_norm, sinks, parts, lse, arrived, out, window, scale_log2, eps,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, ROTARY: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    SPLITS: tl.constexpr, INTERLEAVED: tl.constexpr, Q_NORM: tl.constexpr, K_NORM: tl.constexpr, HAS_SINKS: tl.constexpr,
    PDL: tl.constexpr, EARLY: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Program (split, key head); the first split has the new token too; the last program of a key head merges its splits."""
    let_follower_start(EARLY)
    kv_head, split = tl.program_id(0) % KV_HEADS, tl.program_id(0) // KV_HEADS
    m, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    length = tl.load(seq_len)
    past = tl.maximum(length - 1, 0)  # tokens before the new one; its position too
    begin = tl.maximum(length - window, 0) if window > 0 else 0
    lo, hi = split_range(begin // BLOCK_N * BLOCK_N, past, split, SPLITS, BLOCK_N)
    hi = tl.where(begin < past, hi, 0)
    k, v = _stored(cache, table, lo, hi, kv_head, d, KV_HEADS, DIM, BLOCK_TOKENS, BLOCK_N)
    other, angle, sign = partner(d, ROTARY, INTERLEAVED)
    turned = cos_sin + past.to(tl.int64) * ROTARY
    cos = tl.load(turned + angle, mask=d < ROTARY, other=1.0)
    sin = tl.load(turned + ROTARY // 2 + angle, mask=d < ROTARY, other=0.0)
    q_gain, q_mate_gain = _gains(q_norm, d, other, DIM, ROTARY, Q_NORM)
    k_gain, k_mate_gain = _gains(k_norm, d, other, DIM, ROTARY, K_NORM)
    wait_for_forerunner(PDL, EARLY)
    head, head_ok, one = kv_head * GROUP + m, m < GROUP, tl.arange(0, 1)
    k_rows = qkv + (KV_HEADS * GROUP + kv_head + one) * DIM
    q_row, q_mate = _heads(qkv + head * DIM, d, other, head_ok, DIM, ROTARY)
    # read by all, beside the query, rather than after it by the one that needs it
    k_row, k_mate = _heads(k_rows, d, other, one == 0, DIM, ROTARY)
    new_v = tl.load(k_rows[:, None] + KV_HEADS * DIM + d[None, :], mask=(d < DIM)[None, :], other=0.0)
    query = _turned(q_row, q_mate, sign, cos, sin, q_gain, q_mate_gain, eps, DIM, Q_NORM).to(qkv.dtype.element_ty)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if split == 0:
        new_k = _turned(k_row, k_mate, sign, cos, sin, k_gain, k_mate_gain, eps, DIM, K_NORM).to(qkv.dtype.element_ty)
        real = length > 0
        block = tl.load(table + past // BLOCK_TOKENS, mask=real, other=0).to(tl.int64)
        place = ((block * 2 * BLOCK_TOKENS + past % BLOCK_TOKENS) * KV_HEADS + kv_head) * DIM + d[None, :]
        tl.store(cache + place, new_k, mask=(d < DIM)[None, :] & real)
        tl.store(cache + place + BLOCK_TOKENS * KV_HEADS * DIM, new_v, mask=(d < DIM)[None, :] & real)
        score = tl.sum(query.to(tl.float32) * new_k.to(tl.float32), 1) * scale_log2
        top = tl.where(real, score, -1e30)
        total += tl.where(real, 1.0, 0.0)
        if HAS_SINKS:
            sink = tl.load(sinks + head, mask=head_ok, other=0.0).to(tl.float32) * 1.4426950408889634
            score = top
            top = tl.maximum(score, sink)
            total = total * tl.exp2(score - top) + tl.exp2(sink - top)
            acc += new_v.to(tl.float32) * tl.where(real, tl.exp2(score - top), 0.0)[:, None]
        else:
            acc += tl.where(real, new_v.to(tl.float32), 0.0)
    for first in range(lo, hi, BLOCK_N):
        next_k, next_v = _stored(cache, table, first + BLOCK_N, hi, kv_head, d, KV_HEADS, DIM, BLOCK_TOKENS, BLOCK_N)
        token = first + tl.arange(0, BLOCK_N)
        s = tl.dot(query, tl.trans(k)) * scale_log2
        s = tl.where(((token >= begin) & (token < hi))[None, :], s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - new_top[:, None])
        decay = tl.exp2(top - new_top)
        total = total * decay + tl.sum(p, 1)
        acc = tl.dot(p.to(query.dtype), v, acc * decay[:, None])
        top = new_top
        k, v = next_k, next_v
    seen = tl.where(total > 0.0, total, 1.0)
    acc = acc / seen[:, None]
    if SPLITS == 1:
        tl.store(out + head[:, None] * DIM + d[None, :], acc.to(out.dtype.element_ty),
                 mask=head_ok[:, None] & (d < DIM)[None, :])  # fmt: skip
    else:
        row = (kv_head * SPLITS + split) * GROUP + m
        tl.store(lse + row, tl.where(total > 0.0, top + tl.log2(seen), float("-inf")), mask=head_ok)
        tl.store(parts + row[:, None] * DIM + d[None, :], acc, mask=head_ok[:, None] & (d < DIM)[None, :])
        tl.debug_barrier()  # all lanes have stored before the program says so
        if tl.atomic_add(arrived + kv_head, 1, sem="acq_rel") == SPLITS - 1:
            tl.store(arrived + kv_head, 0)  # as the next layer wants it
            _merge_splits(parts, lse, out, kv_head, d, GROUP, DIM, SPLITS, BLOCK_G, BLOCK_D, CHUNK)


@triton.jit
def _merge_splits(
    parts, lse, out, kv_head, d, GROUP: tl.constexpr, DIM: tl.constexpr, SPLITS: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One key head's heads: sum over splits of 2^lse part / sum of 2^lse; all past the first-level cache."""
    g, s, each = tl.arange(0, BLOCK_G), tl.arange(0, SPLITS), tl.arange(0, CHUNK)
    ok = (g < GROUP)[None, :]
    rows = (kv_head * SPLITS + s)[:, None] * GROUP + g[None, :]
    top = tl.max(tl.load(lse + rows, mask=ok, other=-1e30, cache_modifier=".cg"), 0)
    top = tl.maximum(top, -1e30)  # finite: there may be no token
    total = tl.zeros([BLOCK_G], tl.float32)
    value = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    for chunk in tl.static_range(SPLITS // CHUNK):
        rows = (kv_head * SPLITS + chunk * CHUNK + each)[:, None] * GROUP + g[None, :]
        part = tl.load(
            parts + rows[:, :, None] * DIM + d[None, None, :], mask=ok[:, :, None] & (d < DIM)[None, None, :], other=0.0,
            cache_modifier=".cg",
        )  # fmt: skip
        weight = tl.exp2(tl.load(lse + rows, mask=ok, other=float("-inf"), cache_modifier=".cg") - top[None, :])
        total += tl.sum(weight, 0)
        value += tl.sum(part * weight[:, :, None], 0)
    value = value / tl.where(total > 0.0, total, 1.0)[:, None]
    place = (kv_head * GROUP + g)[:, None] * DIM + d[None, :]
    tl.store(out + place, value.to(out.dtype.element_ty), mask=(g < GROUP)[:, None] & (d < DIM)[None, :])
