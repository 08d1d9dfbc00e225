"""Which replica each choice of an expert goes to, on the device: `twin.policy.replica_split.BatchSplit`, number for number.

One program counts the batch and pours experts with several replicas into the emptier ranks, those of a round at the same
time; one for each such expert then deals its rows out. Nothing is read back, tables are read when the kernels run:
CUDA-graph safe.

Legend: N choices of a batch, E experts, J of them with several replicas, Q rounds of P replicas at most, R ranks.
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
    replicas. `round_J` is its round, of `rounds` (one number); `expert_QP`, `rank_QP`, `slot_QP` are the replicas of each
    round: which j, where. Everything else is -1."""

    first_E: torch.Tensor
    rank_E: torch.Tensor
    round_J: torch.Tensor
    rounds: torch.Tensor
    expert_QP: torch.Tensor
    rank_QP: torch.Tensor
    slot_QP: torch.Tensor


def split(ids_N: torch.Tensor, tables: Tables, source: int, ranks: int, sweeps: int) -> torch.Tensor:
    """A slot for each of the choices, -1 for -1; the same dtype."""
    t, rows, (several, places) = tables, ids_N.numel(), tables.expert_QP.shape
    slots_N, fill_QP = torch.empty_like(ids_N), torch.empty_like(t.expert_QP)
    if not rows:
        return slots_N
    block = min(_BLOCK, triton.next_power_of_2(max(rows, 16)))
    lanes, bins, wide = (max(triton.next_power_of_2(n), 2) for n in (ranks, several, places))
    scratch = torch.empty(lanes + bins, dtype=torch.int32, device=ids_N.device)
    _pour_kernel[(1,)](ids_N, slots_N, t.first_E, t.rank_E, t.rounds, t.expert_QP, t.rank_QP, fill_QP, scratch, rows, source,
                       RANKS=ranks, LANES=lanes, BINS=bins, P=places, WIDE=wide, SWEEPS=sweeps, BLOCK=block,
                       num_warps=8 if wide > 64 else 4 if wide > 16 else 1)
    narrow = max(16, min(block, 8192 // wide))
    _deal_kernel[(several,)](ids_N, slots_N, t.rank_E, t.round_J, t.expert_QP, t.slot_QP, fill_QP, rows, RANKS=ranks, P=places,
                             WIDE=wide, BLOCK=narrow, num_warps=4)
    return slots_N


@triton.jit(do_not_specialize=["rows", "source"])
def _pour_kernel(
    ids, slots, first, rank_of, rounds, experts, ranks, fills, scratch, rows, source,
    RANKS: tl.constexpr, LANES: tl.constexpr, BINS: tl.constexpr, P: tl.constexpr, WIDE: tl.constexpr, SWEEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
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
    tl.store(scratch + tl.arange(0, LANES), total)  # a round gathers the loads of its own ranks
    tl.store(scratch + LANES + tl.arange(0, BINS), amounts)
    lane = tl.arange(0, WIDE)
    count = tl.load(rounds)
    for turn_of in range(0, SWEEPS * count):
        tl.debug_barrier()
        place = turn_of % count * P + lane
        expert = tl.load(experts + place, mask=lane < P, other=-1)
        here = expert >= 0
        rank = tl.load(ranks + place, mask=here, other=0)
        load = tl.load(scratch + rank, mask=here, other=0)
        load -= tl.load(fills + place, mask=here & (turn_of >= count), other=0)
        amount = tl.load(scratch + LANES + expert, mask=here, other=0)
        same = here[:, None] & (expert[None, :] == expert[:, None])
        # the level that each number of the emptiest ranks would give; equal loads count as one number of ranks
        lower = same & (load[None, :] <= load[:, None])
        below = tl.sum(tl.where(lower, load[None, :], 0), 1)
        of_number = (amount + below) // tl.maximum(tl.sum(lower.to(tl.int32), 1), 1)
        level = tl.min(tl.where(same, of_number[None, :], 2147483647), 1)
        fill = tl.where(here, tl.maximum(level - load, 0), 0)
        over = amount - tl.sum(tl.where(same, fill[None, :], 0), 1)
        at_level = here & (load <= level)
        turn = (rank + RANKS - source % RANKS) % RANKS
        earlier = same & at_level[None, :] & (turn[None, :] < turn[:, None])
        fill += (at_level & (tl.sum(earlier.to(tl.int32), 1) < over)).to(tl.int32)
        tl.store(scratch + rank, load + fill, mask=here)
        tl.store(fills + place, fill, mask=here)


@triton.jit(do_not_specialize=["rows"])
def _deal_kernel(
    ids, slots, rank_of, round_of, experts, slot_of, fills, rows,
    RANKS: tl.constexpr, P: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    j = tl.program_id(0)
    q = tl.load(round_of + j)
    if q < 0:
        return
    lane = tl.arange(0, WIDE)
    mine = tl.load(experts + q * P + lane, mask=lane < P, other=-1) == j
    there = tl.load(slot_of + q * P + lane, mask=mine, other=-1)
    fill = tl.load(fills + q * P + lane, mask=mine, other=0)
    end = tl.cumsum(fill)
    dealt = 0
    for start in range(0, rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        chosen = tl.load(ids + row, mask=row < rows, other=-1).to(tl.int32)
        its = (chosen >= 0) & (tl.load(rank_of + chosen, mask=chosen >= 0, other=-1) == RANKS + j)
        nth = dealt + tl.cumsum(its.to(tl.int32)) - 1
        inside = (nth[:, None] < end[None, :]) & (nth[:, None] >= (end - fill)[None, :])
        slot = tl.sum(tl.where(inside, there[None, :], 0), 1)
        tl.store(slots + row, slot.to(slots.dtype.element_ty), mask=its)
        dealt += tl.sum(its.to(tl.int32))
