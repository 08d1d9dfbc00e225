"""What a decode step derives from its sequences' lengths and tables, and what it leaves for the next one, on the device.

Shapes: B sequences (a length of 0 is a graph's padding), P blocks of a table.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def place_tokens(
    seq_lens_B: torch.Tensor, tables_BP: torch.Tensor, block_tokens: int, positions_B: torch.Tensor, slots_B: torch.Tensor
) -> None:
    """Fill `positions` (length - 1, int64) and `slots` (where the newest token's KV goes, int64; -1 for padding)."""
    batch = seq_lens_B.shape[0]
    block = 128
    _place_kernel[(triton.cdiv(batch, block),)](
        seq_lens_B, tables_BP, positions_B, slots_B, batch, tables_BP.stride(0), BLOCK_TOKENS=block_tokens, BLOCK=block,
        num_warps=4,
    )  # fmt: skip


def feed_back(tokens_B: torch.Tensor, ids_B: torch.Tensor, seq_lens_B: torch.Tensor) -> None:
    """The tokens become the next step's input, and every sequence that is not padding grows by one."""
    batch = seq_lens_B.shape[0]
    block = 128
    _feed_kernel[(triton.cdiv(batch, block),)](tokens_B, ids_B, seq_lens_B, batch, BLOCK=block, num_warps=4)


@triton.jit(do_not_specialize=["batch", "stride"])
def _place_kernel(
    lens, tables, positions, slots, batch, stride, BLOCK_TOKENS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < batch
    length = tl.load(lens + row, mask=inside, other=0)
    at = tl.maximum(length - 1, 0)
    real = inside & (length > 0)
    block = tl.load(tables + row.to(tl.int64) * stride + at // BLOCK_TOKENS, mask=real, other=0).to(tl.int64)
    tl.store(positions + row, at.to(tl.int64), mask=inside)
    tl.store(slots + row, tl.where(real, block * BLOCK_TOKENS + at % BLOCK_TOKENS, -1), mask=inside)


@triton.jit(do_not_specialize=["batch"])
def _feed_kernel(tokens, ids, lens, batch, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < batch
    tl.store(ids + row, tl.load(tokens + row, mask=inside, other=0), mask=inside)
    length = tl.load(lens + row, mask=inside, other=0)
    tl.store(lens + row, length + (length > 0).to(length.dtype), mask=inside)
