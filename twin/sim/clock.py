"""The simulation's clock: SimPy's environment, with exact appointments and an order among simultaneous events.

Step times are sums of many terms; `timeout(at - now)` would land a rounding error beside `at`, and who comes first at one
moment would depend on the history of the queue. Here an appointment is kept to the bit, and simultaneous events run by
phase: first what arrives (phase NORMAL), then transfers, then the step boundaries of instance 0, 1, 2, ...
"""

from __future__ import annotations

from heapq import heappush
from typing import Any

import simpy
from simpy.events import NORMAL

TRANSFER_PHASE = NORMAL + 1
FIRST_INSTANCE_PHASE = NORMAL + 2


class Clock(simpy.Environment):
    """`phase` is that of the event being handled, as far as its handler says so."""

    def __init__(self) -> None:
        super().__init__()
        self.phase: int = NORMAL

    def at(self, time_s: float, phase: int = NORMAL, event: simpy.Event | None = None) -> simpy.Event:
        """An event (a new one, or one not yet triggered) that happens at `time_s` exactly, in `phase`."""
        assert time_s >= self.now, f"an appointment in the past: {time_s} < {self.now}"
        if event is None:
            event = simpy.Event(self)
        marked: Any = event  # what Environment.schedule does, but with an absolute time
        marked._ok, marked._value = True, None
        queue: list[Any] = self._queue
        heappush(queue, (time_s, phase, next(self._eid), event))
        return event
