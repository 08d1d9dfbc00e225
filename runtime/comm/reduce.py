"""Sums and gathers of tensor-parallel ranks through symmetric memory, for tensors of a step that a CUDA graph holds.

What is larger than the buffers goes by the group's own backend, and so does all else: whoever asks sees one group. All ranks
get the same bits, so that all of them route, draw and feed back alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from runtime.comm.group import Group
from runtime.comm.waiting import Waiting
from runtime.kernels import reduce as kernels

_ALIGN = 256
_MOST_BYTES = 64 << 20
"""A set of buffers is no larger; a step with more rows is none for a graph."""
Allocate = Callable[[int], tuple[torch.Tensor, torch.Tensor, Any]]
"""From a size to this rank's zeroed bytes, the addresses of everyone's and what must live as long as these are used."""


@dataclass(frozen=True)
class Room:
    """What steps need: `rows` rows of `row_bytes`, fewer where they would be too many."""

    rows: int
    row_bytes: int

    @property
    def held_rows(self) -> int:
        """Rows that there is room for."""
        return min(self.rows, _MOST_BYTES // self.row_bytes)


class SymmetricGroup:
    """A group's end. All ranks make the same calls in the same order, on one stream. Numbers are floats, on `device`, which
    `sharers` ranks (of any group) share."""

    def __init__(self, group: Group, allocate: Allocate, room: Room, device: torch.device, waiting: Waiting,
                 sharers: int = 1) -> None:
        self._group, self.room, self.waiting = group, room, waiting
        self._patience = waiting.ready(device)
        set_bytes = -(-room.held_rows * room.row_bytes // _ALIGN) * _ALIGN
        flags = kernels.SETS * set_bytes
        memory, bases_W, keep = allocate(flags + kernels.MOST_PROGRAMS * kernels.flag_lanes(group.size) * 4)
        self.waiting.memory.append((memory, keep))
        self._counters = torch.zeros(2, dtype=torch.int32, device=device)
        self._shared = kernels.Shared(bases_W, group.index, group.size, 0, set_bytes, flags,
                                      kernels.programs_for(sharers))

    @property
    def size(self) -> int:
        return self._group.size

    @property
    def index(self) -> int:
        return self._group.index

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over the group, in place; returns x."""
        if not self._fits(x):
            return self._group.all_reduce(x)
        return kernels.share(x, x, self._shared, self._counters, self._patience, gather=False)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """[size, *x.shape]; all members give the same shape."""
        if not self._fits(x):
            return self._group.all_gather(x)
        out = x.new_empty((self.size, *x.shape))
        return kernels.share(x, out, self._shared, self._counters, self._patience, gather=True)

    def _fits(self, x: torch.Tensor) -> bool:
        return 0 < x.numel() * x.element_size() <= self._shared.set_bytes and x.is_contiguous()
