"""Requests that were in a step that failed: which of them breaks it is found by trying them again one at a time."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable

from runtime.flight import Flight
from runtime.types import TokenEvent


class Suspects:
    """`end` takes a request that is guilty out of the engine, `add` gives one to its rank."""

    def __init__(self, end: Callable[[Flight], None], add: Callable[[Flight], None]) -> None:
        self._end, self._add = end, add
        self._queue: deque[Flight] = deque()

    def strike(self, flights: Iterable[Flight]) -> None:
        """These were in a step that failed. One that was alone, or for the second time, ends with `error`."""
        flights = list(flights)
        for flight in flights:
            flight.strikes += 1
            if flight.strikes > 1 or len(flights) == 1:
                flight.finish_reason = "error"
                flight.stream.push(TokenEvent(-1, len(flight.output), "error", time.monotonic()))
                self._end(flight)
            elif flight not in self._queue:
                self._queue.append(flight)

    def waits(self, flight: Flight) -> bool:
        """Whether its turn to be tried has yet to come."""
        return flight in self._queue and flight is not self._queue[0]

    def clear(self, flight: Flight, *, try_next: bool = True) -> None:
        """It got a token, or ended, and is no suspect any more: the next one's turn."""
        if flight not in self._queue:
            return
        first = flight is self._queue[0]
        self._queue.remove(flight)
        flight.strikes = 0
        if first and self._queue and try_next:
            self._add(self._queue[0])
