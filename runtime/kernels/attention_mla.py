"""Absorbed MLA decode: every head attends to one paged latent vector a token, whose first columns are the value too.

Shapes: B sequences, H query heads, L latent columns (512), R rotary columns (64), S splits. A tile of the cache is
loaded once and serves both products, q.k over L+R columns and p.v over the first L. The first sequences may be left whole and
the others cut (`twin.policy.latent_cuts`): the whole ones write their result at once, the others parts that are merged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from runtime.kernels.splits import merge, multiprocessors, split_range, token_slots
from twin.policy.latent_cuts import Cut, block_heads, choose_cut

_LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class MlaTile:
    """Heads and tokens a tile, warps, loads in flight, and programs that fit a multiprocessor at once."""

    heads: int
    tokens: int
    warps: int
    stages: int
    resident: int


def choose_mla_tile(heads: int, dim: int = 576) -> MlaTile:
    """Up to 32 heads the cache read is the limit (small tiles, two of them in shared memory if rows of `dim` columns let
    them); above, the matrix units are."""
    stages = 5 if dim <= 640 else 4
    block = block_heads(heads)
    return MlaTile(block, 64, 8, 2, 1) if block == 64 else MlaTile(block, 64, 4, stages, 1)


def mla_decode(
    q_BHD: torch.Tensor,
    cache: torch.Tensor,
    block_table_BP: torch.Tensor,
    seq_lens_B: torch.Tensor,
    *,
    scale: float,
    latent: int = 512,
    max_context: int | None = None,
    cut: Cut | None = None,
    tile: MlaTile | None = None,
) -> torch.Tensor:
    """out_BHL = softmax(scale * q . cache) cache[:, :latent] over each sequence's first `seq_lens` tokens.

    `cache` [num_blocks, block_tokens, latent + rope]; `latent` and rope are powers of two; `block_table_BP` and
    `seq_lens_B` int32. `max_context` bounds seq_lens (default: what the table holds). An empty sequence gives zeros.
    On Hopper, 64 heads and more go to `attention_mla_hopper` where its shapes hold, unless `tile` is given.
    """
    batch, heads, dim = q_BHD.shape
    _, block_tokens, cache_dim = cache.shape
    assert dim == cache_dim and q_BHD.is_contiguous() and cache.is_contiguous()
    assert block_table_BP.stride(1) == 1 and seq_lens_B.dtype == block_table_BP.dtype == torch.int32
    hopper = _hopper(q_BHD, cache, latent) if tile is None else None
    tile = tile or choose_mla_tile(heads, dim)
    groups = triton.cdiv(heads, tile.heads)
    bound = max_context or block_table_BP.shape[1] * block_tokens
    cut = cut or choose_cut(batch, heads, bound, multiprocessors(q_BHD.device.index or 0) * tile.resident)
    whole, splits = (batch, 1) if cut.splits == 1 else (cut.whole, cut.splits)
    out_BHL = torch.empty(batch, heads, latent, dtype=q_BHD.dtype, device=q_BHD.device)
    # of the sequences that are cut, maybe none
    parts = torch.empty(batch - whole, heads, splits, latent, dtype=torch.float32, device=q_BHD.device)
    lse = torch.empty(batch - whole, heads, splits, dtype=torch.float32, device=q_BHD.device)
    programs = groups * (whole + (batch - whole) * splits)
    if hopper is not None:
        hopper(q_BHD, cache, block_table_BP, seq_lens_B, out_BHL, parts, lse, programs, whole, splits, scale * _LOG2_E)
    else:
        _mla_kernel[(programs,)](
            q_BHD, cache, block_table_BP, seq_lens_B, out_BHL, parts, lse, block_table_BP.stride(0), heads, whole, splits,
            scale * _LOG2_E, LATENT=latent, ROPE=dim - latent, BLOCK_TOKENS=block_tokens, BLOCK_H=tile.heads,
            BLOCK_N=tile.tokens, GROUPS=groups, ALL_WHOLE=whole == batch, ALL_CUT=whole == 0, num_warps=tile.warps,
            num_stages=tile.stages,
        )  # fmt: skip
    if whole < batch:
        merge(parts, lse, out_BHL[whole:])
    return out_BHL


def _hopper(q_BHD: torch.Tensor, cache: torch.Tensor, latent: int) -> Callable[..., None] | None:
    """The Hopper kernel's launcher, where it serves these shapes."""
    if not q_BHD.is_cuda or torch.cuda.get_device_capability(q_BHD.device)[0] != 9:
        return None
    from runtime.kernels import attention_mla_hopper

    return attention_mla_hopper.launch if attention_mla_hopper.fits(q_BHD, cache, latent) else None


@triton.jit(do_not_specialize=["table_stride", "whole", "splits"])
def _mla_kernel(
    q, cache, block_table, seq_lens, out, parts, lse, table_stride, heads, whole, splits, scale_log2,
    LATENT: tl.constexpr, ROPE: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr, GROUPS: tl.constexpr, ALL_WHOLE: tl.constexpr, ALL_CUT: tl.constexpr,
):  # fmt: skip
    # head groups fastest: programs that read the same tokens run together and share them in L2
    pid = tl.program_id(0)
    item = pid // GROUPS  # a whole sequence, or a split of a cut one
    if ALL_WHOLE:
        split, seq, pieces = 0, item.to(tl.int64), 1
    else:
        beyond = tl.maximum(item - whole, 0)
        split, seq = beyond % splits, (tl.minimum(item, whole) + beyond // splits).to(tl.int64)
        pieces = tl.where(item < whole, 1, splits)
    head = pid % GROUPS * BLOCK_H + tl.arange(0, BLOCK_H)
    length = tl.load(seq_lens + seq)
    lo, hi = split_range(0, length, split, pieces, BLOCK_N)
    c, r = tl.arange(0, LATENT), tl.arange(0, ROPE)
    DIM: tl.constexpr = LATENT + ROPE
    row = (seq * heads + head)[:, None] * DIM
    q_c = tl.load(q + row + c[None, :], mask=(head < heads)[:, None], other=0.0)
    q_r = tl.load(q + row + LATENT + r[None, :], mask=(head < heads)[:, None], other=0.0)
    top = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    acc = tl.zeros([BLOCK_H, LATENT], tl.float32)
    for first in range(lo, hi, BLOCK_N):
        token = first + tl.arange(0, BLOCK_N)
        slot = token_slots(block_table + seq * table_stride, token, hi, first, BLOCK_TOKENS, BLOCK_N)
        place = cache + slot[:, None] * DIM
        kv = tl.load(place + c[None, :], mask=(token < hi)[:, None], other=0.0)
        k_r = tl.load(place + LATENT + r[None, :], mask=(token < hi)[:, None], other=0.0)
        s = tl.dot(q_r, tl.trans(k_r))
        s = tl.dot(q_c, tl.trans(kv), s) * scale_log2
        s = tl.where((token < hi)[None, :], s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - new_top[:, None])
        decay = tl.exp2(top - new_top)
        total = total * decay + tl.sum(p, 1)
        acc = tl.dot(p.to(kv.dtype), kv, acc * decay[:, None])
        top = new_top
    seen = tl.where(total > 0.0, total, 1.0)
    value = acc / seen[:, None]
    # found again: what a program held through the loop would cost it registers that it has not (32 heads), and so would two ways
    # to store where one is enough
    item, mine = tl.program_id(0) // GROUPS, head < heads
    if ALL_WHOLE:
        _store_whole(out, value, item, head, heads, mine, LATENT)
    elif ALL_CUT:
        _store_part(parts, lse, value, top, seen, total, item - whole, head, heads, splits, mine, LATENT)
    elif item < whole:
        _store_whole(out, value, item, head, heads, mine, LATENT)
    else:
        _store_part(parts, lse, value, top, seen, total, item - whole, head, heads, splits, mine, LATENT)


@triton.jit
def _store_whole(out, value, seq, head, heads, mine, LATENT: tl.constexpr):
    place = (seq.to(tl.int64) * heads + head)[:, None] * LATENT + tl.arange(0, LATENT)[None, :]
    tl.store(out + place, value.to(out.dtype.element_ty), mask=mine[:, None])


@triton.jit
def _store_part(parts, lse, value, top, seen, total, piece, head, heads, splits, mine, LATENT: tl.constexpr):
    piece = piece.to(tl.int64)
    part = (piece // splits * heads + head) * splits + piece % splits
    tl.store(lse + part, tl.where(total > 0.0, top + tl.log2(seen), float("-inf")), mask=mine)
    tl.store(parts + part[:, None] * LATENT + tl.arange(0, LATENT)[None, :], value, mask=mine[:, None])
