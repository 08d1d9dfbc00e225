"""Dispatch and combine straight through peers' memory: rows are written to, and read from, addresses of other ranks.

Every rank owns one buffer of equal layout that all others can address; `bases` [W] int64 holds where each begins. A
rank's rows live at `source * capacity + token`, so that nobody has to count before sending, and rows that did not come
are told by their slots (-1). Addresses are aligned to 16 bytes. Nothing here reads a value back to the host. Counters lie
anywhere, so kernels are not compiled anew for their alignment (a graph may be captured at a counter not met before).

Legend: T own tokens, C capacity (rows a source may send, the same on all ranks), W ranks, N = W*C rows, H hidden,
K choices, E ranks that experts are spread over; each of them is `expert_tp` neighbours that cut every expert.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

from runtime.kernels.fused import _FP8_MAX, _TINY

_MAX_BLOCK = 2048
_POLLS = 64
"""A waiting barrier looks once in so many polls whether the host calls it off: that word lies across the bus."""


@dataclass(frozen=True)
class Peers:
    """Where all ranks' buffers begin, and how experts lie over them. `index` is this rank's place among `world`."""

    bases_W: torch.Tensor
    index: int
    world: int
    expert_tp: int
    slots_per_rank: int


@dataclass(frozen=True)
class Places:
    """Byte offsets in a buffer: received rows [N, H], their scales [N] (fp8), local slots [N, K], weights [N, K], results
    [N, H] and barrier flags [W] int32."""

    x: int
    scale: int
    slots: int
    weights: int
    y: int
    flags: int


def push(x_TH: torch.Tensor, slots_TK: torch.Tensor, weights_TK: torch.Tensor, peers: Peers, at: Places, capacity: int,
         sent: torch.Tensor, *, fp8: bool) -> None:
    """Send every token once to each rank that holds any of its experts, and what it chose there to all ranks.

    Slots are numbered over all ranks on the way in and from the receiver's first on arrival; -1 chooses nothing. `sent`
    [1] int64 grows by the rows that left for other ranks. With `fp8` rows travel as float8_e4m3fn with one scale a row.
    """
    tokens, hidden = x_TH.shape
    choices = slots_TK.shape[1]
    assert tokens <= capacity and x_TH.is_contiguous() and slots_TK.is_contiguous() and weights_TK.is_contiguous()
    block = triton.next_power_of_2(hidden) if fp8 else _block(hidden)
    _push_kernel[(capacity, triton.cdiv(hidden, block))](
        x_TH, slots_TK, weights_TK, peers.bases_W, sent, tokens, capacity, hidden, peers.slots_per_rank, peers.index,
        at.x, at.scale, at.slots, at.weights, WORLD=peers.world, EXPERT_TP=peers.expert_tp, CHOICES=choices,
        LANES=triton.next_power_of_2(choices), FP8=fp8, BLOCK=block, num_warps=8 if block > 4096 else 4,
    )  # fmt: skip


def widen(x_NH: torch.Tensor, scale_N: torch.Tensor, slots_NK: torch.Tensor, out_NH: torch.Tensor) -> torch.Tensor:
    """fp8 rows times their scale, of rows that chose something; the others are left as they are."""
    rows, hidden = x_NH.shape
    block = _block(hidden)
    _widen_kernel[(rows, triton.cdiv(hidden, block))](
        x_NH, scale_N, slots_NK, out_NH, hidden, CHOICES=slots_NK.shape[1],
        LANES=triton.next_power_of_2(slots_NK.shape[1]), BLOCK=block, num_warps=4,
    )  # fmt: skip
    return out_NH


def hand_back(y_NH: torch.Tensor, slots_NK: torch.Tensor, peers: Peers, at: Places, capacity: int, *, home: bool) -> None:
    """Write the results of rows that chose something where `gather_sum` looks for them: into the sources' buffers, or,
    with `home`, into this rank's own."""
    rows, hidden = y_NH.shape
    assert y_NH.is_contiguous() and rows == peers.world * capacity
    block = _block(hidden)
    _hand_back_kernel[(rows, triton.cdiv(hidden, block))](
        y_NH, slots_NK, peers.bases_W, capacity, hidden, peers.index, at.y, HOME=home, CHOICES=slots_NK.shape[1],
        LANES=triton.next_power_of_2(slots_NK.shape[1]), BLOCK=block, num_warps=4,
    )  # fmt: skip


def gather_sum(slots_TK: torch.Tensor, like_TH: torch.Tensor, peers: Peers, at: Places, capacity: int,
               fetched: torch.Tensor, *, home: bool) -> torch.Tensor:
    """Each token's sum over the ranks it was sent to, in fp32, rounded once to `like_TH`'s dtype.

    With `home` results are read where they were computed, else from this rank's own buffer. `fetched` [1] int64 grows by
    the rows that came from other ranks.
    """
    out_TH = torch.empty_like(like_TH)
    tokens, hidden = out_TH.shape
    if not tokens:
        return out_TH
    block = _block(hidden)
    _gather_sum_kernel[(tokens, triton.cdiv(hidden, block))](
        slots_TK, peers.bases_W, out_TH, fetched, capacity, hidden, peers.slots_per_rank, peers.index, at.y, HOME=home,
        EXPERT_TP=peers.expert_tp, CHOICES=slots_TK.shape[1], LANES=triton.next_power_of_2(slots_TK.shape[1]),
        BLOCK=block, num_warps=4,
    )  # fmt: skip
    return out_TH


@dataclass(frozen=True)
class Patience:
    """How long barriers wait and what ends waiting. `limit` [1] int64: nanoseconds, or polls where they are not `timed`.
    `lost_W1` [W + 1] int32: ranks that did not come in time, and, last, whether waiting was called off; while any is set
    nobody is waited for. `alarm_W` says the same of ranks, and `off` [1] calls off: both int32, where the host may read and
    write them while the device runs (pinned memory)."""

    limit: torch.Tensor
    lost_W1: torch.Tensor
    alarm_W: torch.Tensor
    off: torch.Tensor
    timed: bool = True


def meet(peers: Peers, at: Places, turn: torch.Tensor, present_W: torch.Tensor, patience: Patience) -> None:
    """Wait until every present rank is here; what ranks wrote before is then visible to those that they wrote to.

    `turn` [1] int32 counts meetings. Ranks still missing when patience ends are marked as lost, unless it was called off.
    Absent ranks (`present_W` 0) are not waited for. Everything is read on the device when the kernel runs, so that a captured
    graph obeys what changes later.
    """
    _meet_kernel[(1,)](peers.bases_W, at.flags, turn, present_W, patience.limit, patience.lost_W1, patience.alarm_W,
                       patience.off, peers.index, WORLD=peers.world, LANES=max(2, triton.next_power_of_2(peers.world)),
                       POLLS=_POLLS, TIMED=patience.timed, num_warps=1)


def _block(hidden: int) -> int:
    return min(_MAX_BLOCK, triton.next_power_of_2(hidden))


@triton.jit
def _address(bases, rank, offset, dtype: tl.constexpr):
    return tl.multiple_of((tl.load(bases + rank) + offset).to(tl.pointer_type(dtype)), 16)


@triton.jit
def _destinations(slots, token, slots_per_rank, tokens, CHOICES: tl.constexpr, LANES: tl.constexpr):
    """(lanes, slots, owner rank of a choice if no earlier choice has the same, else -1)."""
    lane = tl.arange(0, LANES)
    chosen = tl.load(slots + token * CHOICES + lane, mask=(lane < CHOICES) & (token < tokens), other=-1).to(tl.int32)
    owner = tl.where(chosen >= 0, chosen // slots_per_rank, -1)
    earlier = (owner[:, None] == owner[None, :]) & (lane[None, :] < lane[:, None])
    return lane, chosen, tl.where(tl.sum(earlier.to(tl.int32), 1) == 0, owner, -1)


@triton.jit(do_not_specialize=["tokens", "capacity"], do_not_specialize_on_alignment=["sent"])
def _push_kernel(
    x, slots, weights, bases, sent, tokens, capacity, hidden, slots_per_rank, me, x_at, scale_at, slots_at, weights_at,
    WORLD: tl.constexpr, EXPERT_TP: tl.constexpr, CHOICES: tl.constexpr, LANES: tl.constexpr, FP8: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    row = (me * capacity + token).to(tl.int64)
    lane, chosen, owner = _destinations(slots, token, slots_per_rank, tokens, CHOICES, LANES)
    if tl.program_id(1) == 0:
        weight = tl.load(weights + token * CHOICES + lane, mask=(lane < CHOICES) & (token < tokens), other=0.0)
        away = tl.sum(tl.where(owner >= 0, EXPERT_TP - (owner == me // EXPERT_TP).to(tl.int32), 0))
        if away > 0:
            tl.atomic_add(sent, away.to(tl.int64), sem="relaxed")
        for rank in range(0, WORLD):
            first = rank // EXPERT_TP * slots_per_rank
            here = (chosen >= first) & (chosen < first + slots_per_rank)
            place = row * CHOICES + lane
            tl.store(_address(bases, rank, slots_at, tl.int32) + place, tl.where(here, chosen - first, -1), mask=lane < CHOICES)
            tl.store(_address(bases, rank, weights_at, tl.float32) + place, weight.to(tl.float32), mask=lane < CHOICES)
    if token < tokens:
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < hidden
        value = tl.load(x + token.to(tl.int64) * hidden + column, mask=inside, other=0.0)
        step = 1.0
        if FP8:
            wide = value.to(tl.float32)
            step = tl.maximum(tl.max(tl.abs(wide)), _TINY) / _FP8_MAX
            value = (wide / step).to(tl.float8e4nv)
        for choice in tl.static_range(CHOICES):
            there = tl.sum(tl.where(lane == choice, owner, 0))
            if there >= 0:
                for cut in tl.static_range(EXPERT_TP):
                    out = _address(bases, there * EXPERT_TP + cut, x_at, value.dtype)
                    tl.store(out + row * hidden + column, value, mask=inside)
                    if FP8:
                        tl.store(_address(bases, there * EXPERT_TP + cut, scale_at, tl.float32) + row, step)


@triton.jit
def _chose(slots, row, CHOICES: tl.constexpr, LANES: tl.constexpr):
    lane = tl.arange(0, LANES)
    return tl.max(tl.load(slots + row * CHOICES + lane, mask=lane < CHOICES, other=-1)) >= 0


@triton.jit
def _widen_kernel(x, scale, slots, out, hidden, CHOICES: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    if _chose(slots, row, CHOICES, LANES):
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(x + row * hidden + column, mask=column < hidden, other=0.0).to(tl.float32) * tl.load(scale + row)
        tl.store(out + row * hidden + column, value.to(out.dtype.element_ty), mask=column < hidden)


@triton.jit(do_not_specialize=["capacity"])
def _hand_back_kernel(
    y, slots, bases, capacity, hidden, me, y_at,
    HOME: tl.constexpr, CHOICES: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    if _chose(slots, row, CHOICES, LANES):
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        source = row // capacity
        place = row if HOME else me * capacity + row % capacity
        out = _address(bases, me if HOME else source, y_at, y.dtype.element_ty)
        value = tl.load(y + row.to(tl.int64) * hidden + column, mask=column < hidden)
        tl.store(out + place.to(tl.int64) * hidden + column, value, mask=column < hidden)


@triton.jit(do_not_specialize=["capacity"], do_not_specialize_on_alignment=["fetched"])
def _gather_sum_kernel(
    slots, bases, out, fetched, capacity, hidden, slots_per_rank, me, y_at,
    HOME: tl.constexpr, EXPERT_TP: tl.constexpr, CHOICES: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    lane, _, owner = _destinations(slots, token, slots_per_rank, token + 1, CHOICES, LANES)
    if tl.program_id(1) == 0:
        away = tl.sum(tl.where(owner >= 0, EXPERT_TP - (owner == me // EXPERT_TP).to(tl.int32), 0))
        if away > 0:
            tl.atomic_add(fetched, away.to(tl.int64), sem="relaxed")
    acc = tl.zeros([BLOCK], tl.float32)
    for choice in tl.static_range(CHOICES):
        there = tl.sum(tl.where(lane == choice, owner, 0))
        known = tl.maximum(there, 0) * EXPERT_TP  # loads are masked, not skipped, so that all are in flight at once
        for cut in tl.static_range(EXPERT_TP):
            row = ((me if HOME else known + cut) * capacity + token).to(tl.int64)
            y = _address(bases, known + cut if HOME else me, y_at, out.dtype.element_ty)
            acc += tl.load(y + row * hidden + column, mask=(column < hidden) & (there >= 0), other=0.0).to(tl.float32)
    tl.store(out + token.to(tl.int64) * hidden + column, acc.to(out.dtype.element_ty), mask=column < hidden)


@triton.jit(do_not_specialize_on_alignment=["turn"])
def _meet_kernel(
    bases, flags_at, turn, present, patience, lost, alarm, off, me,
    WORLD: tl.constexpr, LANES: tl.constexpr, POLLS: tl.constexpr, TIMED: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, LANES)
    awaited = tl.load(present + lane, mask=lane < WORLD, other=0) != 0
    now = tl.atomic_add(turn, 1, sem="relaxed") + 1
    wait_for_all(bases, flags_at, now, awaited, patience, lost, alarm, off, me, WORLD, LANES, POLLS, TIMED)


@triton.jit
def wait_for_all(
    bases, flags_at, now, awaited, patience, lost, alarm, off, me,
    WORLD: tl.constexpr, LANES: tl.constexpr, POLLS: tl.constexpr, TIMED: tl.constexpr,
):  # fmt: skip
    """Tell all awaited ranks that this one has come to its meeting `now`, and wait until they have. For programs of one warp."""
    lane = tl.arange(0, LANES)
    broken = (tl.max(tl.load(lost + lane, mask=lane < WORLD, other=0)) > 0) | (tl.load(lost + WORLD) > 0)
    theirs = (tl.load(bases + lane, mask=lane < WORLD, other=0) + flags_at).to(tl.pointer_type(tl.int32)) + me
    # release: whatever earlier kernels of this stream wrote anywhere is visible to who sees the flag
    tl.atomic_xchg(theirs, tl.zeros([LANES], tl.int32) + now, mask=awaited, sem="release", scope="sys")
    mine = _address(bases, me, flags_at, tl.int32) + lane
    missing = awaited & (tl.load(mine, mask=awaited, other=0, volatile=True) - now < 0)
    start = globaltimer() if TIMED else tl.zeros([], tl.int64)
    spent = tl.zeros([], tl.int64)
    limit = tl.where(broken, 0, tl.load(patience)).to(tl.int64)
    polls = tl.zeros([], tl.int32)
    while (tl.max(missing.to(tl.int32)) > 0) & (spent < limit):
        missing = awaited & (tl.load(mine, mask=awaited, other=0, volatile=True) - now < 0)
        spent = globaltimer() - start if TIMED else spent + 1
        polls += 1
        if polls % POLLS == 0:
            called = tl.load(off, volatile=True)
            limit = tl.where(called != 0, 0, limit)
            if called != 0:
                tl.store(lost + WORLD, 1)
    tl.atomic_add(mine, 0, mask=awaited, sem="acquire", scope="sys")
    blamed = missing & (limit > 0)  # who was not waited for is not to blame
    tl.store(lost + lane, 1, mask=blamed)
    tl.store(alarm + lane, 1, mask=blamed)
