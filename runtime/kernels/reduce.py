"""All-reduce and all-gather of a few ranks through symmetric memory, one kernel each, which a CUDA graph can hold.

Every program copies its part of the tensor into this rank's buffer, meets the same program of every other rank, and reads the
part from all buffers, in the order of ranks: all ranks add the same numbers in the same order, so that they get the same bits.

There are two sets of buffers, taken in turn by a counter on the device, which a captured graph follows as well. A set is
written again two calls later. By then every peer has come to the call between, hence has ended the one before that, in which
it read the set. Which program has which part may differ from call to call; it is the same on all ranks.

Legend: W ranks, N numbers of the tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from runtime.kernels.symm import _POLLS, Patience, _address, wait_for_all

MOST_PROGRAMS = 128
"""All of them wait at the same time: those of all ranks that share a GPU must find room on it together (`programs_for`)."""
_TILE_BYTES = 2048
SETS = 2


def flag_lanes(world: int) -> int:
    """int32 flags that a program has in a buffer, one for each rank, in whole 16 bytes."""
    return max(4, triton.next_power_of_2(world))


@dataclass(frozen=True)
class Shared:
    """Where all ranks' buffers begin (`bases_W`), this rank's place among `world`, and in every buffer the byte offsets of the
    first set, of one set from the other and of the flags [MOST_PROGRAMS, lanes] int32."""

    bases_W: torch.Tensor
    index: int
    world: int
    data: int
    set_bytes: int
    flags: int
    programs: int = MOST_PROGRAMS


def programs_for(sharers: int) -> int:
    """Programs of a rank that shares its GPU with others, `sharers` in all, the same on all ranks: together no more than half as
    many as a large GPU has multiprocessors. One on which something waits may not take a kernel that wants its memory divided
    otherwise into cache and shared memory; were all of them like that, the rank waited for could not come."""
    return MOST_PROGRAMS if sharers <= 1 else max(1, MOST_PROGRAMS // 2 // sharers)


def share(x_N: torch.Tensor, out: torch.Tensor, shared: Shared, counters: torch.Tensor, patience: Patience, *,
          gather: bool) -> torch.Tensor:
    """Fill `out` with the sum of all ranks' x [N] (in fp32, rounded once), or with all of them [W, N]. A sum may go into x.

    `counters` [2] int32 count calls, and programs of a call that have ended. Ranks that do not come: see `Patience`.
    """
    count = x_N.numel()
    assert x_N.is_contiguous() and out.is_contiguous() and count * x_N.element_size() <= shared.set_bytes
    block = _TILE_BYTES // x_N.element_size()
    unit = next(unit for unit in (8, 4, 2, 1) if count % unit == 0)  # tells the compiler how wide accesses may be
    _share_kernel[(min(MOST_PROGRAMS, shared.programs, triton.cdiv(count, block)),)](
        x_N, out, shared.bases_W, counters, count // unit, shared.index, shared.data, shared.set_bytes, shared.flags,
        patience.limit, patience.lost_W1, patience.alarm_W, patience.off, WORLD=shared.world, LANES=flag_lanes(shared.world),
        UNIT=unit, GATHER=gather, BLOCK=block, POLLS=_POLLS, TIMED=patience.timed, num_warps=1,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["units"], do_not_specialize_on_alignment=["counters"])
def _share_kernel(
    x, out, bases, counters, units, me, data_at, set_bytes, flags_at, patience, lost, alarm, off,
    WORLD: tl.constexpr, LANES: tl.constexpr, UNIT: tl.constexpr, GATHER: tl.constexpr, BLOCK: tl.constexpr,
    POLLS: tl.constexpr, TIMED: tl.constexpr,
):  # fmt: skip
    program, programs = tl.program_id(0), tl.num_programs(0)
    count = units * UNIT
    now = tl.load(counters) + 1
    data_at += (now & 1) * set_bytes
    own = _address(bases, me, data_at, x.dtype.element_ty)
    for start in range(program * BLOCK, count, programs * BLOCK):
        column = start + tl.arange(0, BLOCK)
        tl.store(own + column, tl.load(x + column, mask=column < count), mask=column < count)
    tl.debug_barrier()  # what all threads wrote is told by one of them
    awaited = tl.arange(0, LANES) < WORLD
    wait_for_all(bases, flags_at + program * LANES * 4, now, awaited, patience, lost, alarm, off, me,
                 WORLD, LANES, POLLS, TIMED)
    tl.debug_barrier()
    for start in range(program * BLOCK, count, programs * BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < count
        total = tl.zeros([BLOCK], tl.float32)
        for rank in tl.static_range(WORLD):
            theirs = _address(bases, rank, data_at, x.dtype.element_ty)
            value = tl.load(theirs + column, mask=inside, other=0.0, cache_modifier=".cg")
            if GATHER:
                tl.store(out + rank * count + column, value, mask=inside)
            else:
                total += value.to(tl.float32)
        if not GATHER:
            tl.store(out + column, total.to(out.dtype.element_ty), mask=inside)
    if tl.atomic_add(counters + 1, 1, sem="acq_rel") == programs - 1:  # all have read the count of calls
        tl.store(counters + 1, 0)
        tl.store(counters, now)
