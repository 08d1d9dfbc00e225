"""Those who send requests: a schedule of arrivals, or users who each wait for their answer (closed loop)."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

import numpy as np
import simpy
from numpy.typing import NDArray

from twin.policy.arrivals import MAX_REQUESTS, RequestSet, named_stream, sample_requests
from twin.sim.clock import Clock
from twin.sim.request import Request
from twin.sim.service import Service
from twin.spec.workload import WorkloadSpec


class Clients:
    """Sends the whole traffic of a workload. `done` happens when every request has ended.

    Requests in order of arrival; the first `warmup_fraction` of them are not counted.
    """

    def __init__(self, clock: Clock, workload: WorkloadSpec, seed: int, max_requests: int | None) -> None:
        self.clock, self.workload, self.seed = clock, workload, seed
        self.done = clock.event()
        self.sent: list[Request] = []
        self.background: list[Request] = []
        self.last_phase = 0  # of the event that ended the last request
        self.gave_up = False
        self._ended = 0
        self._all_sent = False
        closed = workload.arrivals.kind == "closed_loop"
        limits = [n for n in (workload.requests, max_requests) if n is not None]
        self._limit = min([*limits, MAX_REQUESTS])
        drawn = min(self._limit, 4 * (workload.arrivals.concurrency or 1)) if closed and not limits else max_requests
        self.traffic: RequestSet = sample_requests(workload, seed, max_requests=drawn)
        self._total = self._limit if closed else len(self.traffic)

    def start(self, service: Service, in_flight: int = 0) -> None:
        """Begin to send to a service, whose `ended` must call `request_ended`; with `in_flight` requests already there."""
        self.service = service
        for request in self._in_flight(in_flight):
            if service.resume(request):
                self.background.append(request)
        if self.traffic.arrival_s is not None:
            self.clock.process(self._arrivals(self.traffic.arrival_s))
        else:
            concurrency = self.workload.arrivals.concurrency
            assert concurrency is not None, "the spec demands it of a closed loop"
            self.clock.process(self._users(min(concurrency, self._total)))

    def counted_from_s(self) -> float:
        """When the first request that counts arrives; 0 for a closed loop, where that is not known beforehand."""
        if self.traffic.arrival_s is None:
            return 0.0
        return float(self.traffic.arrival_s[int(len(self.traffic) * self.workload.warmup_fraction)])

    def count(self) -> None:
        """Mark which requests count, once all are sent: not the first `warmup_fraction` of them."""
        warmup = int(len(self.sent) * self.workload.warmup_fraction)
        for request in self.sent:
            request.counted = request.id >= warmup

    def _in_flight(self, count: int) -> Iterator[Request]:
        """Requests as a steady state has them in decode: a long output is there longer, so it is met more often, at any
        point of its output alike. What was generated counts as prompt. Ids are negative; none of them counts."""
        stream = named_stream(self.seed, "in_flight")
        isl, osl = self.traffic.isl, self.traffic.osl
        chosen = stream.choice(len(isl), size=count, p=osl / osl.sum())
        generated = np.floor(stream.random(count) * osl[chosen]).astype(np.int64)
        for number, (index, done) in enumerate(zip(chosen.tolist(), generated.tolist(), strict=True)):
            if osl[index] - done > 1:
                yield Request(-1 - number, 0.0, int(isl[index]) + done, int(osl[index]) - done, counted=False,
                              prefill_start_s=0.0, first_token_s=0.0, last_token_s=0.0)

    def request_ended(self, request: Request) -> None:
        if request.id < 0:
            return
        self._ended += 1
        if self.traffic.arrival_s is None:
            self._think(request)
        if self._all_sent and self._ended == len(self.sent) and not self.done.triggered:
            self._finish()

    def give_up(self) -> None:
        """The run is over here, for what anybody wants to know of it."""
        self.gave_up = True
        if not self.done.triggered:
            self._finish()

    def _finish(self) -> None:
        self.last_phase = self.clock.phase
        self.done.succeed()

    def _arrivals(self, arrival_s: NDArray[np.float64]) -> Generator[simpy.Event, Any, None]:
        for time_s in arrival_s.tolist():
            if time_s > self.clock.now:
                yield self.clock.at(time_s)
            self._send()
        yield self.clock.at(self.clock.now)

    def _users(self, concurrency: int) -> Generator[simpy.Event, Any, None]:
        for _ in range(concurrency):
            self._send()
        yield self.clock.at(self.clock.now)

    def _think(self, request: Request) -> None:
        """The user reads the answer, then sends the next request; one who was refused tries again after a second."""
        pause_s = self.workload.arrivals.think_s + (1.0 if request.status == "rejected" else 0.0)
        if pause_s == 0.0:
            self._send()
            return
        again = self.clock.at(self.clock.now + pause_s)
        assert again.callbacks is not None
        again.callbacks.append(self._send)

    def _send(self, _: simpy.Event | None = None) -> None:
        """The next request, unless all are sent or the time is over."""
        number = len(self.sent)
        over = self.workload.duration_s is not None and self.clock.now > self.workload.duration_s
        if number >= self._total or over:
            self._all_sent = True
            if self._ended == number and not self.done.triggered:
                self._finish()
            return
        if number >= len(self.traffic):
            self.traffic = sample_requests(self.workload, self.seed, max_requests=min(self._limit, 2 * number))
        isl = int(self.traffic.isl[number])
        request = Request(number, self.clock.now, isl, int(self.traffic.osl[number]),
                          shared_tokens=int(isl * self.workload.prefix_share))
        self.sent.append(request)
        self._all_sent = number + 1 == self._total
        self.service.submit(request)
