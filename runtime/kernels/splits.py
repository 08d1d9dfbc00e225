"""How decode attention is cut along the context, and how the cuts are merged.

Each program of a decode kernel covers one split of one sequence and leaves an unnormalised-by-others result: its own
softmax output and the base-2 log of its softmax denominator. `merge` weighs them together.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl


def choose_splits(programs: int, max_context: int, block_tokens: int, resident: int) -> int:
    """Splits a sequence so that programs * splits fills the `resident` program slots of the device once.

    Reads no device value: `max_context` is the largest context that a step can have (a graph's capture bound); a split
    is a share of each sequence's real length, so short sequences are cut as finely. At most one split a tile, 64 in all.
    """
    wanted = max(1, resident // max(programs, 1))
    return max(1, min(wanted, -(-max_context // block_tokens), 64))


@lru_cache(maxsize=8)
def multiprocessors(device_index: int) -> int:
    """Multiprocessors of a CUDA device; 132 (an H100 or H200) where kernels run under the interpreter."""
    if not torch.cuda.is_available():
        return 132
    return torch.cuda.get_device_properties(device_index).multi_processor_count


def merge(parts_BHSD: torch.Tensor, lse_BHS: torch.Tensor, out_BHD: torch.Tensor) -> None:
    """out = sum_s 2^lse_s part_s / sum_s 2^lse_s; zero where every split was empty (lse -inf)."""
    batch, heads, splits, dim = parts_BHSD.shape
    # of 512 columns each thread holds every split of its own four, and sums need no other; of many splits too much would be held
    block_d = min(triton.next_power_of_2(dim), 512 if splits <= 16 and dim >= 512 else 128)
    _merge_kernel[(batch * heads, triton.cdiv(dim, block_d))](
        parts_BHSD, lse_BHS, out_BHD, splits, dim,
        BLOCK_S=triton.next_power_of_2(splits), BLOCK_D=block_d, num_warps=4,
    )  # fmt: skip


@triton.jit(do_not_specialize=["splits"])
def _merge_kernel(parts, lse, out, splits, dim, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, BLOCK_S)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    weight = tl.load(lse + row * splits + s, mask=s < splits, other=float("-inf"))
    top = tl.maximum(tl.max(weight), -1e30)  # finite: all splits may be empty
    weight = tl.exp2(weight - top)
    # a split that saw nothing wrote no part: its weight is zero and it is not read
    part = tl.load(
        parts + (row * splits + s[:, None]) * dim + d[None, :],
        mask=(weight > 0.0)[:, None] & (d < dim)[None, :],
        other=0.0,
    )
    total = tl.sum(weight)
    value = tl.sum(part * weight[:, None], 0) / tl.where(total > 0.0, total, 1.0)
    tl.store(out + row * dim + d, value.to(out.dtype.element_ty), mask=d < dim)


@triton.jit
def half(x):
    """x in fp16, saturated."""
    return tl.minimum(tl.maximum(x.to(tl.float32), -65504.0), 65504.0).to(tl.float16)


@triton.jit
def split_range(begin, length, split, splits, BLOCK_N: tl.constexpr):
    """The tokens [lo, hi) of this split: equal shares of [begin, length) in whole tiles of BLOCK_N."""
    tiles = tl.cdiv(length - begin, BLOCK_N)
    share = tl.cdiv(tiles, splits) * BLOCK_N
    lo = begin + split * share
    return lo, tl.minimum(lo + share, length)


@triton.jit
def token_slots(block_table, tokens, length, first, BLOCK_TOKENS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Slot numbers (block * BLOCK_TOKENS + offset, int64) of BLOCK_N consecutive tokens from `first`.

    One table read when a tile cannot straddle blocks, else one a token.
    """
    if BLOCK_TOKENS % BLOCK_N == 0:
        base = tl.load(block_table + first // BLOCK_TOKENS).to(tl.int64)
        return base * BLOCK_TOKENS + tokens % BLOCK_TOKENS
    block = tl.load(block_table + tokens // BLOCK_TOKENS, mask=tokens < length, other=0).to(tl.int64)
    return block * BLOCK_TOKENS + tokens % BLOCK_TOKENS
