"""Absorbed MLA decode for many heads a rank on Hopper, where the matrix units are the limit.

Same function as `attention_mla.mla_decode`, for bf16 caches of 512 + 64 columns, blocks of whole 64-token tiles and
multiples of 64 heads. One program holds 64 heads: two warpgroups share the scores (each 32 of a tile's 64 tokens) and split
the value columns (each 256 of 512). A loading warp fills one of two buffers by TMA while the other is worked on; a tile serves
q.k and p.v both. Written in Gluon, because Triton issues the next tile's load only after the second product: measured
1.6 times slower on an H200.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

HEADS, TOKENS, LATENT, ROPE = 64, 64, 512, 64


def fits(q_BHD: torch.Tensor, cache: torch.Tensor, latent: int) -> bool:
    """Whether this kernel serves these shapes."""
    return (
        q_BHD.dtype == cache.dtype == torch.bfloat16
        and (latent, q_BHD.shape[2]) == (LATENT, LATENT + ROPE)
        and q_BHD.shape[1] % HEADS == 0
        and cache.shape[1] % TOKENS == 0
    )


def launch(
    q_BHD: torch.Tensor, cache: torch.Tensor, block_table_BP: torch.Tensor, seq_lens_B: torch.Tensor,
    out_BHL: torch.Tensor, parts: torch.Tensor, lse: torch.Tensor, programs: int, whole: int, splits: int, scale_log2: float,
) -> None:  # fmt: skip
    """Fill `out_BHL`, `parts` and `lse` as `attention_mla`'s kernel does; shapes for which `fits` holds."""
    _, heads, dim = q_BHD.shape
    shared = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    tile = lambda t, columns: TensorDescriptor.from_tensor(t.view(-1, dim), [64, columns], shared)  # noqa: E731
    _kernel[(programs,)](
        tile(q_BHD, LATENT), tile(q_BHD, ROPE), tile(cache, LATENT), tile(cache, ROPE),
        block_table_BP, seq_lens_B, out_BHL, parts, lse, block_table_BP.stride(0), heads, whole, splits, scale_log2,
        BLOCK_TOKENS=cache.shape[1], GROUPS=heads // HEADS, num_warps=8,
    )  # fmt: skip


@gluon.jit
def _load_tiles(latent_desc, rope_desc, table, lo, hi, kv, k_r, full, empty, BLOCK_TOKENS: gl.constexpr):
    """The loading warp: tile after tile into the two buffers, each as soon as its last tile is done with."""
    for first in range(lo, hi, 64):
        step = (first - lo) // 64
        now = step % 2
        slot = gl.load(table + first // BLOCK_TOKENS) * BLOCK_TOKENS + first % BLOCK_TOKENS
        # a fresh barrier counts as having completed phase 1: the first two waits pass at once
        mbarrier.wait(empty.index(now), (step // 2) % 2 ^ 1)
        mbarrier.expect(full.index(now), 64 * 576 * 2)
        tma.async_copy_global_to_shared(latent_desc, [slot, 0], full.index(now), kv.index(now))
        tma.async_copy_global_to_shared(rope_desc, [slot, 512], full.index(now), k_r.index(now))


@gluon.jit
def _zero_tail(kv, valid):
    """Zero the rows of a tile past a sequence's end: whatever lies there must not meet a zero weight as NaN."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    for c in gl.static_range(8):
        part = kv.slice(c * 64, 64, dim=1)
        value = part.load(layout)
        part.store(gl.where((row < valid)[:, None], value, gl.zeros_like(value)))
    fence_async_shared()


@gluon.jit
def _softmax_step(s, top, total, valid, scale_log2, p_smem):
    """p = 2^(s - max) into shared memory; (new max, how much earlier sums shrink, running sums still one a score)."""
    layout: gl.constexpr = s.type.layout
    column = gl.arange(0, 64, layout=gl.SliceLayout(0, layout))
    s = gl.where((column < valid)[None, :], s * scale_log2, float("-inf"))
    new_top = gl.maximum(top, gl.max(s, 1))
    decay = gl.exp2(top - new_top)
    p = gl.exp2(s - new_top[:, None])
    p_smem.store(p.to(gl.bfloat16))
    return new_top, decay, total * decay[:, None] + p


@gluon.jit
def _attend(lo, hi, scale_log2, q_c, q_r, kv, k_r, p_smem, q_ready, full, empty, out, parts, lse, row, part, splits):
    """The two computing warpgroups: the softmax-weighted sum over the tiles of [lo, hi), written for 64 heads: from `row` on
    if `part` is negative, else as parts, `splits` apart from `part` on."""
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 32, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 256, 16])
    rows_s: gl.constexpr = gl.SliceLayout(1, s_layout)
    rows_o: gl.constexpr = gl.SliceLayout(1, o_layout)
    top = gl.full([64], float("-inf"), gl.float32, layout=rows_s)
    total = gl.zeros([64, 64], gl.float32, layout=s_layout)
    s_zero = gl.zeros([64, 64], gl.float32, layout=s_layout)
    acc = gl.zeros([64, 512], gl.float32, layout=o_layout)
    mbarrier.wait(q_ready, 0)
    for first in range(lo, hi, 64):
        step = (first - lo) // 64
        now = step % 2
        mbarrier.wait(full.index(now), (step // 2) % 2)
        s = warpgroup_mma(q_r, k_r.index(now).permute((1, 0)), s_zero, use_acc=False, is_async=True)
        s = warpgroup_mma(q_c, kv.index(now).permute((1, 0)), s, is_async=True)
        s = warpgroup_mma_wait(0, deps=[s])
        top, decay, total = _softmax_step(s, top, total, hi - first, scale_log2, p_smem)
        if hi - first < 64:
            _zero_tail(kv.index(now), hi - first)
        fence_async_shared()
        acc = acc * gl.convert_layout(decay, rows_o)[:, None]
        acc = warpgroup_mma(p_smem, kv.index(now), acc, is_async=True)
        # waiting here, not after the next q.k: with products of two accumulators in flight ptxas serialises them all
        acc = warpgroup_mma_wait(0, deps=[acc])
        gl.thread_barrier()  # both warpgroups have finished with the buffer
        mbarrier.arrive(empty.index(now), count=1)
    seen = gl.sum(total, 1)
    safe = gl.where(seen > 0.0, seen, 1.0)
    value = acc / gl.convert_layout(safe, rows_o)[:, None]
    column = gl.arange(0, 512, layout=gl.SliceLayout(0, o_layout))
    if part < 0:
        rows = row + gl.arange(0, 64, layout=rows_o)
        gl.store(out + rows[:, None] * 512 + column[None, :], value.to(out.dtype.element_ty))
    else:
        place = part + gl.arange(0, 64, layout=rows_s) * splits
        gl.store(lse + place, gl.where(seen > 0.0, top + gl.log2(safe), float("-inf")))
        gl.store(parts + gl.convert_layout(place, rows_o)[:, None] * 512 + column[None, :], value)


@gluon.jit(do_not_specialize=["table_stride", "whole", "splits"])
def _kernel(
    q_latent, q_rope, latent_desc, rope_desc, block_table, seq_lens, out, parts, lse, table_stride, heads, whole, splits,
    scale_log2, BLOCK_TOKENS: gl.constexpr, GROUPS: gl.constexpr,
):  # fmt: skip
    shared: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    # head groups fastest: programs that read the same tokens run together and share them in L2
    pid = gl.program_id(0)
    group = pid % GROUPS
    item = pid // GROUPS  # a whole sequence, or a split of a cut one
    beyond = gl.maximum(item - whole, 0)
    split = beyond % splits
    seq = gl.minimum(item, whole) + beyond // splits
    length = gl.load(seq_lens + seq)
    share = gl.cdiv(gl.cdiv(length, 64), gl.where(item < whole, 1, splits)) * 64
    lo = split * share
    hi = gl.minimum(lo + share, length)
    table = block_table + seq.to(gl.int64) * table_stride

    q_c = gl.allocate_shared_memory(gl.bfloat16, [64, 512], shared)
    q_r = gl.allocate_shared_memory(gl.bfloat16, [64, 64], shared)
    kv = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 512], shared)
    k_r = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 64], shared)
    p_smem = gl.allocate_shared_memory(gl.bfloat16, [64, 64], shared)
    q_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_ready, count=1)
    for i in gl.static_range(2):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    mbarrier.expect(q_ready, 64 * 576 * 2)
    row = seq * heads + group * 64
    part = gl.where(item < whole, -1, (row - whole * heads).to(gl.int64) * splits + split)
    tma.async_copy_global_to_shared(q_latent, [row, 0], q_ready, q_c)
    tma.async_copy_global_to_shared(q_rope, [row, 512], q_ready, q_r)
    gl.warp_specialize(
        [
            (
                _attend,
                (
                    lo, hi, scale_log2, q_c, q_r, kv, k_r, p_smem, q_ready, full, empty, out, parts, lse,
                    row.to(gl.int64), part, splits,
                ),
            ),
            (_load_tiles, (latent_desc, rope_desc, table, lo, hi, kv, k_r, full, empty, BLOCK_TOKENS)),
        ],
        [1],
        [24],
    )  # fmt: skip
