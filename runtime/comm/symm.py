"""Dispatch and combine through symmetric memory: every rank writes into the others' buffers, one barrier a phase.

Nothing waits for the host and nothing is counted in advance, so that a whole step can be captured in a CUDA graph. There
are two sets of buffers, taken in turn: two batches may be on their way at once. One set alone is safe for one batch after
another, since every rank has read what it needs of a phase before it signals the next.

Needs torch and triton only. Legend: see `runtime.kernels.symm`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from runtime.comm.group import guarded
from runtime.comm.waiting import Waiting
from runtime.kernels import symm as kernels
from runtime.kernels.symm import Peers, Places

_ALIGN = 256
SETS = 2


@dataclass(frozen=True)
class Shape:
    """What buffers are made for: at most `capacity` rows a source, each of `hidden` numbers with `choices` choices."""

    world: int
    capacity: int
    hidden: int
    choices: int
    dtype: torch.dtype
    fp8: bool = False

    @property
    def rows(self) -> int:
        return self.world * self.capacity

    @property
    def row_bytes(self) -> int:
        """Bytes that one token's row takes on its way out, without its choices."""
        return self.hidden + 4 if self.fp8 else self.hidden * self.dtype.itemsize

    def places(self, which: int = 0) -> Places:
        """Offsets of set `which`; they do not overlap and are aligned for wide accesses."""
        sizes = (self.rows * self.hidden * (1 if self.fp8 else self.dtype.itemsize), self.rows * 4 if self.fp8 else 0,
                 self.rows * self.choices * 4, self.rows * self.choices * 4, self.rows * self.hidden * self.dtype.itemsize,
                 self.world * 4)
        at, offsets = which * self.set_bytes if which else 0, []
        for size in sizes:
            offsets.append(at)
            at += -(-size // _ALIGN) * _ALIGN
        return Places(*offsets)

    @property
    def set_bytes(self) -> int:
        return self.places().flags + -(-self.world * 4 // _ALIGN) * _ALIGN

    @property
    def total_bytes(self) -> int:
        return SETS * self.set_bytes

    def holds(self, other: Shape) -> bool:
        """Whether buffers of this shape serve the other."""
        same = (self.world, self.hidden, self.choices, self.dtype, self.fp8)
        return same == (other.world, other.hidden, other.choices, other.dtype, other.fp8) and self.capacity >= other.capacity


@dataclass(frozen=True)
class Buffers:
    """This rank's memory, the addresses of everyone's, and how often each set's barrier was passed [SETS] int32. `keep` is
    what must live as long as the addresses are used."""

    shape: Shape
    memory: torch.Tensor
    bases_W: torch.Tensor
    turns: torch.Tensor
    keep: Any = None

    def view(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        size = dtype.itemsize
        for dim in shape:
            size *= dim
        return self.memory[offset:offset + size].view(dtype).view(shape)


@dataclass(frozen=True)
class Arrival:
    """Rows that came, with local slots (-1: nothing here, and the row may hold anything); fp8 rows have a scale each.
    Results written into `out_NH` [N, H] are not copied again. `source_TH`, `source_TK`: what this rank sent."""

    x_NH: torch.Tensor
    slots_NK: torch.Tensor
    weights_NK: torch.Tensor
    out_NH: torch.Tensor | None
    scale_N: torch.Tensor | None
    which: int
    capacity: int
    source_TH: torch.Tensor
    source_TK: torch.Tensor
    buffers: Buffers


Allocate = Callable[[Shape, torch.device], Buffers]


@dataclass
class _State:
    """Counters on the device, kept over all buffers."""

    present_W: torch.Tensor
    moved: torch.Tensor  # rows sent, rows fetched


class SymmExchange:
    """One rank's end. All ranks make the same calls in the same order with the same `capacity`.

    `fp8` sends rows as float8_e4m3fn with a scale each. `push_back` makes experts write results into the sources' buffers;
    without it sources read them where they were computed. `waiting` says how long barriers wait and who did not come.
    """

    def __init__(self, allocate: Allocate, index: int, waiting: Waiting, *, slots_per_rank: int, expert_tp: int = 1,
                 fp8: bool = False, push_back: bool = False) -> None:
        self._allocate, self.index, self.world, self.waiting = allocate, index, len(waiting.ranks), waiting
        self._slots_per_rank, self._expert_tp = slots_per_rank, expert_tp
        self._fp8, self._push_back = fp8, push_back
        self._buffers: Buffers | None = None
        self._state: _State | None = None
        self._next = 0

    def reserve(self, capacity: int, hidden: int, choices: int, dtype: torch.dtype, device: torch.device) -> Buffers:
        """Make room for `capacity` rows a source, if there is not; every rank must call this. Not while capturing."""
        wanted = Shape(self.world, capacity, hidden, choices, dtype, self._fp8)
        if self._buffers is not None and self._buffers.shape.holds(wanted):
            return self._buffers
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"buffers for {capacity} rows a rank must be reserved before a graph is captured")
        rounded = 1 << (capacity - 1).bit_length() if capacity > 1 else 1
        with torch.inference_mode(False):  # what a step makes first is changed between steps too
            self._buffers = self._allocate(Shape(self.world, rounded, hidden, choices, dtype, self._fp8), device)
            self.waiting.ready(device)
            self.waiting.memory.append(self._buffers)  # captured graphs may still point to former ones
            if self._state is None:
                self._state = _State(torch.ones(self.world, dtype=torch.int32, device=device),
                                     torch.zeros(2, dtype=torch.int64, device=device))
        return self._buffers

    def dispatch(self, x_TH: torch.Tensor, slots_TK: torch.Tensor, weights_TK: torch.Tensor, capacity: int) -> Arrival:
        """Send tokens to the ranks of their slots and see what came, in fp8 as it came. T <= capacity."""
        arrival = self.send(x_TH, slots_TK, weights_TK, capacity)
        self.meet(arrival)
        return arrival

    def combine(self, y_NH: torch.Tensor, arrival: Arrival) -> torch.Tensor:
        """Each own token's sum over its experts' results, [T, H]."""
        self.give(y_NH, arrival)
        self.meet(arrival)
        return self.collect(arrival)

    def send(self, x_TH: torch.Tensor, slots_TK: torch.Tensor, weights_TK: torch.Tensor, capacity: int) -> Arrival:
        """The first half of `dispatch`; what it returns is filled once all ranks have met."""
        buffers = self.reserve(capacity, x_TH.shape[1], slots_TK.shape[1], x_TH.dtype, x_TH.device)
        which, self._next = self._next, (self._next + 1) % SETS
        shape, at = buffers.shape, buffers.shape.places(which)
        rows, choices = self.world * capacity, shape.choices
        assert self._state is not None
        x_TH, slots_TK, weights_TK = x_TH.contiguous(), slots_TK.contiguous(), weights_TK.contiguous()
        kernels.push(x_TH, slots_TK, weights_TK, self._peers(buffers), at, capacity, self._state.moved[:1], fp8=self._fp8)
        received = torch.float8_e4m3fn if self._fp8 else shape.dtype
        return Arrival(buffers.view(at.x, (rows, shape.hidden), received),
                       buffers.view(at.slots, (rows, choices), torch.int32),
                       buffers.view(at.weights, (rows, choices), torch.float32),
                       None if self._push_back else buffers.view(at.y, (rows, shape.hidden), shape.dtype),
                       buffers.view(at.scale, (rows,), torch.float32) if self._fp8 else None,
                       which, capacity, x_TH, slots_TK, buffers)

    def widen(self, arrival: Arrival) -> Arrival:
        """The arrival with rows in the dtype that was sent."""
        if arrival.scale_N is None:
            return arrival
        wide = torch.empty(arrival.x_NH.shape, dtype=arrival.buffers.shape.dtype, device=arrival.x_NH.device)
        return replace(arrival, x_NH=kernels.widen(arrival.x_NH, arrival.scale_N, arrival.slots_NK, wide), scale_N=None)

    def give(self, y_NH: torch.Tensor, arrival: Arrival) -> None:
        """The first half of `combine`: put results where their sources will look."""
        if arrival.out_NH is None or y_NH.data_ptr() != arrival.out_NH.data_ptr():
            at = arrival.buffers.shape.places(arrival.which)
            kernels.hand_back(y_NH.contiguous(), arrival.slots_NK, self._peers(arrival.buffers), at, arrival.capacity,
                              home=not self._push_back)

    def collect(self, arrival: Arrival) -> torch.Tensor:
        """The last part of `combine`."""
        assert self._state is not None
        return kernels.gather_sum(arrival.source_TK, arrival.source_TH, self._peers(arrival.buffers),
                                  arrival.buffers.shape.places(arrival.which), arrival.capacity, self._state.moved[1:],
                                  home=not self._push_back)

    def meet(self, arrival: Arrival) -> None:
        """A barrier of all present ranks, on the device."""
        state = self._state
        assert state is not None
        which = arrival.which
        kernels.meet(self._peers(arrival.buffers), arrival.buffers.shape.places(which), arrival.buffers.turns[which:which + 1],
                     state.present_W, self.waiting.ready(arrival.x_NH.device))

    def exclude(self, index: int) -> None:
        """Wait for a rank no more; its experts must not be chosen again. Clears what `check` says of it."""
        assert self._state is not None
        patience = self.waiting.ready(self._state.present_W.device)
        for flags in (self._state.present_W, patience.lost_W1, patience.alarm_W):
            flags[index] = 0

    @property
    def moved_rows(self) -> tuple[int, int]:
        """Rows sent to other ranks, and rows fetched (or received back) from them. Waits for the device."""
        if self._state is None:
            return 0, 0
        sent, fetched = self._state.moved.tolist()
        return sent, fetched

    @property
    def sent_bytes(self) -> int:
        """Payload of this rank's tokens that travelled, out and back; what ranks without a row are told is not counted."""
        if self._buffers is None:
            return 0
        shape = self._buffers.shape
        sent, fetched = self.moved_rows
        return sent * (shape.row_bytes + 8 * shape.choices) + fetched * shape.hidden * shape.dtype.itemsize

    def _peers(self, buffers: Buffers) -> Peers:
        return Peers(buffers.bases_W, self.index, self.world, self._expert_tp, self._slots_per_rank)


def over(pg: Any) -> Allocate:
    """Allocate symmetric memory over a process group of CUDA ranks; the group only carries the addresses."""

    def allocate(shape: Shape, device: torch.device) -> Buffers:
        memory, bases_W, handle = share_memory(pg, shape.world, shape.total_bytes, device)
        return Buffers(shape, memory, bases_W, torch.zeros(SETS, dtype=torch.int32, device=device), handle)

    return allocate


def share_memory(pg: Any, world: int, size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """This rank's zeroed bytes, the addresses [W] of everyone's, and what must live as long as these are used. All ranks of the
    group call this together."""
    import torch.distributed._symmetric_memory as symm_mem

    def meet() -> tuple[torch.Tensor, Any]:
        memory = symm_mem.empty(size, dtype=torch.uint8, device=device)
        return memory, symm_mem.rendezvous(memory, pg)

    memory, handle = guarded(meet)
    memory.zero_()
    torch.cuda.synchronize(device)
    guarded(lambda: dist.barrier(group=pg))  # nobody may signal before all flags are zero
    bases = [handle.get_buffer(peer, (size,), torch.uint8).data_ptr() for peer in range(world)]
    return memory, torch.tensor(bases, dtype=torch.int64, device=device), handle
