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
    replicas. `start_J` is where its replicas begin among all places of all rounds, `count_J` how many they are. Of each place
    of a round: `expert_QP` whose replica (which j), `rank_QP` and `slot_QP` where. `rounds`: how many there are, and the most
    replicas of an expert. Everything else is -1."""

    first_E: torch.Tensor
    rank_E: torch.Tensor
    start_J: torch.Tensor
    count_J: torch.Tensor
    expert_QP: torch.Tensor
    rank_QP: torch.Tensor
    slot_QP: torch.Tensor
    rounds: torch.Tensor


def split(ids_N: torch.Tensor, tables: Tables, source: int, ranks: int, sweeps: int) -> torch.Tensor:
    """A slot for each of the choices, -1 for -1; the same dtype."""
    t, rows, (several, places) = tables, ids_N.numel(), tables.expert_QP.shape
    slots_N, fill_QP = torch.empty_like(ids_N), torch.empty_like(t.expert_QP)
    if not rows:
        return slots_N
    block = min(_BLOCK, triton.next_power_of_2(max(rows, 16)))
    lanes, bins, wide = (max(triton.next_power_of_2(n), 2) for n in (ranks, several, places))
    scratch = torch.empty(lanes + bins + 2 * wide, dtype=torch.int32, device=ids_N.device)
    _pour_kernel[(1,)](ids_N, slots_N, t.first_E, t.rank_E, t.start_J, t.count_J, t.expert_QP, t.rank_QP, t.rounds, fill_QP,
                       scratch, rows, source, RANKS=ranks, LANES=lanes, BINS=bins, P=places, WIDE=wide, SWEEPS=sweeps,
                       BLOCK=block, num_warps=4)
    _deal_kernel[(several,)](ids_N, slots_N, t.rank_E, t.start_J, t.count_J, t.slot_QP, fill_QP, rows, RANKS=ranks, BLOCK=block,
                             num_warps=4)
    return slots_N


@triton.jit(do_not_specialize=["rows", "source"])
def _pour_kernel(
    ids, slots, first, rank_of, starts, counts, experts, ranks, rounds, fills, scratch, rows, source,
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
    loads, levels = scratch + LANES + BINS, scratch + LANES + BINS + WIDE  # of a round's places
    lane = tl.arange(0, WIDE)
    count, most = tl.load(rounds), tl.load(rounds + 1)
    for turn_of in range(0, SWEEPS * count):
        tl.debug_barrier()
        row = turn_of % count * P
        expert = tl.load(experts + row + lane, mask=lane < P, other=-1)
        here = expert >= 0
        rank = tl.load(ranks + row + lane, mask=here, other=0)
        mates = tl.load(starts + expert, mask=here, other=0) - row  # lane of the expert's first replica
        many = tl.load(counts + expert, mask=here, other=0)
        amount = tl.load(scratch + LANES + expert, mask=here, other=0)
        load = tl.load(scratch + rank, mask=here, other=0)
        load -= tl.load(fills + row + lane, mask=here & (turn_of >= count), other=0)
        tl.store(loads + lane, load, mask=here)
        tl.debug_barrier()
        # the level that each number of the emptiest ranks would give; equal loads count as one number of ranks
        below, lower = tl.zeros([WIDE], tl.int32), tl.zeros([WIDE], tl.int32)
        for k in range(0, most):
            other = tl.load(loads + mates + k, mask=k < many, other=2147483647)
            below += tl.where(other <= load, other, 0)
            lower += (other <= load).to(tl.int32)
        tl.store(levels + lane, (amount + below) // tl.maximum(lower, 1), mask=here)
        tl.debug_barrier()
        level = tl.full([WIDE], 2147483647, tl.int32)
        for k in range(0, most):
            level = tl.minimum(level, tl.load(levels + mates + k, mask=k < many, other=2147483647))
        over, earlier = amount, tl.zeros([WIDE], tl.int32)
        turn = (rank + RANKS - source % RANKS) % RANKS
        for k in range(0, most):
            other = tl.load(loads + mates + k, mask=k < many, other=2147483647)
            its_turn = (tl.load(ranks + row + mates + k, mask=k < many, other=0) + RANKS - source % RANKS) % RANKS
            over -= tl.where(k < many, tl.maximum(level - other, 0), 0)
            earlier += ((other <= level) & (its_turn < turn)).to(tl.int32)
        fill = tl.maximum(level - load, 0) + ((load <= level) & (earlier < over)).to(tl.int32)
        tl.store(scratch + rank, load + fill, mask=here)
        tl.store(fills + row + lane, fill, mask=here)


@triton.jit(do_not_specialize=["rows"])
def _deal_kernel(ids, slots, rank_of, starts, counts, slot_of, fills, rows, RANKS: tl.constexpr, BLOCK: tl.constexpr):
    j = tl.program_id(0)
    place, many = tl.load(starts + j), tl.load(counts + j)
    if place < 0:
        return
    dealt = 0
    for start in range(0, rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        chosen = tl.load(ids + row, mask=row < rows, other=-1).to(tl.int32)
        its = (chosen >= 0) & (tl.load(rank_of + chosen, mask=chosen >= 0, other=-1) == RANKS + j)
        nth = dealt + tl.cumsum(its.to(tl.int32)) - 1
        slot, begin = tl.zeros([BLOCK], tl.int32), 0
        for k in range(0, many):
            end = begin + tl.load(fills + place + k)
            slot = tl.where((nth >= begin) & (nth < end), tl.load(slot_of + place + k), slot)
            begin = end
        tl.store(slots + row, slot.to(slots.dtype.element_ty), mask=its)
        dealt += tl.sum(its.to(tl.int32))
