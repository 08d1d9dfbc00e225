"""Which replica each choice of an expert goes to, on the device: `twin.policy.replica_split.BatchSplit`, number for number.

One program counts the batch and pours experts with several replicas into the emptier ranks; one for each such expert then
deals its rows out. Nothing is read back, tables are read when the kernels run: CUDA-graph safe.

Legend: N choices of a batch, E experts, J of them with several replicas, R ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

_BLOCK = 1024


@dataclass(frozen=True)
class Tables:
    """Where experts are, all int32: `first_E` a slot of each, `rank_E` its rank, or R + j for the j-th of those with several
    replicas, whose slots by rank are `slot_JR` (-1: none)."""

    first_E: torch.Tensor
    rank_E: torch.Tensor
    slot_JR: torch.Tensor


def split(ids_N: torch.Tensor, tables: Tables, source: int, sweeps: int) -> torch.Tensor:
    """A slot for each of the choices, -1 for -1; the same dtype."""
    rows, (several, ranks) = ids_N.numel(), tables.slot_JR.shape
    slots_N, bounds_JR = torch.empty_like(ids_N), torch.empty_like(tables.slot_JR)
    if not rows:
        return slots_N
    block = min(_BLOCK, triton.next_power_of_2(max(rows, 16)))
    lanes = max(triton.next_power_of_2(ranks), 2)
    _pour_kernel[(1,)](ids_N, slots_N, tables.first_E, tables.rank_E, tables.slot_JR, bounds_JR, rows, source, several,
                       RANKS=ranks, LANES=lanes, BINS=max(triton.next_power_of_2(several), 2), SWEEPS=sweeps, BLOCK=block,
                       num_warps=4)
    narrow = max(16, min(block, 8192 // lanes))
    _deal_kernel[(several,)](ids_N, slots_N, tables.rank_E, tables.slot_JR, bounds_JR, rows, RANKS=ranks, LANES=lanes,
                             BLOCK=narrow, num_warps=4)
    return slots_N


@triton.jit(do_not_specialize=["rows", "source"])
def _pour_kernel(
    ids, slots, first, rank_of, slot_of, bounds, rows, source, several,
    RANKS: tl.constexpr, LANES: tl.constexpr, BINS: tl.constexpr, SWEEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    lane, bins = tl.arange(0, LANES), tl.arange(0, BINS)
    total = tl.zeros([LANES], tl.int32)
    amounts = tl.zeros([BINS], tl.int32)
    for start in range(0, rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        chosen = tl.load(ids + row, mask=row < rows, other=-1).to(tl.int32)
        known = chosen >= 0
        slot = tl.load(first + chosen, mask=known, other=-1)
        tl.store(slots + row, slot.to(slots.dtype.element_ty), mask=row < rows)
        owner = tl.load(rank_of + chosen, mask=known, other=0)
        alone = known & (owner < RANKS)
        total += tl.histogram(tl.where(alone, owner, 0), LANES, mask=alone)
        shared = known & (owner >= RANKS)
        amounts += tl.histogram(tl.where(shared, owner - RANKS, 0), BINS, mask=shared)
    turn = (lane + RANKS - source % RANKS) % RANKS
    for sweep in tl.static_range(SWEEPS):
        for j in range(0, several):
            amount = tl.sum(tl.where(bins == j, amounts, 0))
            place = j * RANKS + lane
            here = (lane < RANKS) & (tl.load(slot_of + place, mask=lane < RANKS, other=-1) >= 0)
            if sweep > 0:
                total -= tl.load(bounds + place, mask=here, other=0)
            # the level that each number of the emptiest ranks would give; equal loads count as one number of ranks
            lower = here[None, :] & (total[None, :] <= total[:, None])
            below = tl.sum(tl.where(lower, total[None, :], 0), 1)
            level = tl.min(tl.where(here, (amount + below) // tl.maximum(tl.sum(lower.to(tl.int32), 1), 1), 2147483647))
            fill = tl.where(here, tl.maximum(level - total, 0), 0)
            over = amount - tl.sum(fill)
            at_level = here & (total <= level)
            earlier = at_level[None, :] & (turn[None, :] < turn[:, None])
            fill += (at_level & (tl.sum(earlier.to(tl.int32), 1) < over)).to(tl.int32)
            total += fill
            tl.store(bounds + place, fill, mask=lane < RANKS)


@triton.jit(do_not_specialize=["rows"])
def _deal_kernel(
    ids, slots, rank_of, slot_of, fills, rows, RANKS: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    j = tl.program_id(0)
    lane = tl.arange(0, LANES)
    there = tl.load(slot_of + j * RANKS + lane, mask=lane < RANKS, other=-1)
    fill = tl.load(fills + j * RANKS + lane, mask=lane < RANKS, other=0)
    end = tl.cumsum(fill)
    dealt = 0
    for start in range(0, rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        chosen = tl.load(ids + row, mask=row < rows, other=-1).to(tl.int32)
        mine = (chosen >= 0) & (tl.load(rank_of + chosen, mask=chosen >= 0, other=-1) == RANKS + j)
        nth = dealt + tl.cumsum(mine.to(tl.int32)) - 1
        inside = (nth[:, None] < end[None, :]) & (nth[:, None] >= (end - fill)[None, :])
        slot = tl.sum(tl.where(inside, there[None, :], 0), 1)
        tl.store(slots + row, slot.to(slots.dtype.element_ty), mask=mine)
        dealt += tl.sum(mine.to(tl.int32))
