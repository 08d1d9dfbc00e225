"""Where a rank's time goes, by phase of the step; the board shows the phase to others."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch

from runtime.board import Board
from runtime.faults import Injector

ON_DEVICE = frozenset({"embed", "attention", "dense_ffn", "gate", "dispatch", "experts", "combine", "shared_experts", "head",
                       "draft", "graph"})
"""Phases whose work a GPU does while the host is elsewhere."""
Cut = tuple[dict[str, float], int, bool]
"""The host's seconds by phase, how many marks there had been on the device, and whether the step's graph has some."""
TIMED_EVERY_S = 0.1
"""Steps in graphs that follow one another faster are not all timed on the device: a pair of events takes the host 30 to 70 us."""


class Clock:
    """Seconds by phase; `mark` ends one phase and begins the next, and notes it on the board."""

    def __init__(self, board: Board | None, rank: int, faults: Injector | None = None) -> None:
        self._board, self._rank, self._faults = board, rank, faults
        self._phase, self._since = "start", time.monotonic()
        self._inside = self.sums = False
        self._parts: dict[str, float] = {}
        self._spent: dict[str, float] = {}

    def mark(self, phase: str) -> None:
        if self._inside:
            return
        now = time.monotonic()
        self._parts[self._phase] = self._parts.get(self._phase, 0.0) + now - self._since
        self._phase, self._since = phase, now
        if self._board is not None:
            self._board.mark(self._rank, phase)
        if self._faults is not None:
            self._faults.at(phase)

    def point(self, name: str) -> None:
        """Come to a point at which a fault may be armed."""
        if self._faults is not None:
            self._faults.at(name)

    @property
    def phase(self) -> str:
        return self._phase

    @contextmanager
    def within(self, phase: str) -> Iterator[None]:
        """All time inside belongs to this phase, whatever marks are set there."""
        self.mark(phase)
        self._inside = True
        try:
            yield
        finally:
            self._inside = False

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call."""
        return self.read(self.cut())

    def cut(self) -> Cut:
        """End what `read` is to tell of here; cuts are read in their order, each before or after the next one is made."""
        now = time.monotonic()
        self._parts[self._phase] = self._parts.get(self._phase, 0.0) + now - self._since
        self._since = now
        parts, self._parts = self._parts, {}
        return parts, *self._marks()

    def read(self, cut: Cut) -> dict[str, float]:
        """Seconds by phase between the cut before and this one."""
        parts = self._read(cut)
        if self.sums:
            for phase, seconds in parts.items():
                self._spent[phase] = self._spent.get(phase, 0.0) + seconds
        return parts

    def spent(self, phase: str) -> float:
        """Seconds of a phase that were taken since `sums` was set."""
        return self._spent.get(phase, 0.0)

    def _marks(self) -> tuple[int, bool]:
        return 0, True

    def _read(self, cut: Cut) -> dict[str, float]:
        return cut[0]


class DeviceClock(Clock):
    """Times what the device does, by events between the phases' work; nobody waits for the device to read them.

    A phase on the device counts the device's seconds. Of the host's seconds in these phases and in `sample`, where it waits
    for the device, those that the device did not need count as `sample`. Work that is not done when a step's times are
    taken counts in the next step. All marks are on one stream, so what is before one that is done is done.

    Of steps that are a graph and nothing else one every TIMED_EVERY_S is timed, as long as the host waits for them: the others'
    device seconds are what the host waited, without what the last timed one's host waited longer than the device took.
    """

    def __init__(self, board: Board | None, rank: int, faults: Injector | None = None,
                 make_event: Callable[[], Any] = lambda: torch.cuda.Event(enable_timing=True)) -> None:
        super().__init__(board, rank, faults)
        self._make_event = make_event
        self._spare: list[Any] = []
        self._marked: list[tuple[str, Any]] = []
        self._read_marks = 0  # how many are no longer in the list
        self._serves = self._timing = False  # marks while graphs are captured are not times
        self._timed_at, self._graph_timed = float("-inf"), True
        self._longer_s: float | None = None  # that the host waited for the last timed graph; None where it did not wait

    def mark(self, phase: str) -> None:
        if self._inside:
            return
        super().mark(phase)
        self._serves |= phase == "idle"
        if phase == "graph" and self._serves:
            self._graph_timed = self._longer_s is None or self._since - self._timed_at >= TIMED_EVERY_S
            if not self._graph_timed and not self._timing:
                return
            self._graph_timed, self._timed_at = True, self._since
        if self._serves and (self._timing or phase in ON_DEVICE):
            event = self._spare.pop() if self._spare else self._make_event()
            event.record()
            self._marked.append((phase, event))
            self._timing = phase in ON_DEVICE

    def _marks(self) -> tuple[int, bool]:
        timed, self._graph_timed = self._graph_timed, True
        return self._read_marks + len(self._marked), timed

    def _read(self, cut: Cut) -> dict[str, float]:
        parts, device = dict(cut[0]), dict[str, float]()
        marks, last = self._marked, max(0, cut[1] - self._read_marks - 1)  # a cut read late has nothing left on the device
        while last > 0 and not marks[last][1].query():
            last -= 1
        for (phase, event), (_, until) in pairwise(marks[:last + 1]):
            if phase in ON_DEVICE:
                device[phase] = device.get(phase, 0.0) + event.elapsed_time(until) / 1e3
            self._spare.append(event)
        del marks[:last]
        self._read_marks += last
        waits = "sample" in parts
        host_s = sum(parts.pop(phase, 0.0) for phase in ON_DEVICE) + parts.pop("sample", 0.0)
        if not cut[2] and not device and self._longer_s is not None:
            longer_s = min(self._longer_s, host_s)
            return {**parts, "graph": host_s - longer_s, "sample": longer_s}
        if device:
            spare_s = host_s - sum(device.values())
            self._longer_s = spare_s if waits and spare_s >= 0.0 and device.keys() == {"graph"} else None
        return {**parts, **device, "sample": max(0.0, host_s - sum(device.values()))} if host_s or device else parts
