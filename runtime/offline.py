"""Run a workload against an engine of our own and measure it: what `eptwin run` does.

Requests are those that the simulator sees for the same workload and seed. Prompts are random tokens; outputs have the
drawn length (a stop token does not end them), so that prediction and measurement speak of the same work.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from runtime.flight import Flight
from runtime.frontend import Frontend
from runtime.measure import Run, measure
from runtime.options import EngineOptions
from runtime.types import SamplingParams
from twin.policy.arrivals import RequestSet, named_stream, sample_requests
from twin.spec.errors import Overloaded, SpecError
from twin.spec.model import ModelSpec
from twin.spec.plan import Plan
from twin.spec.results import RequestRecord
from twin.spec.workload import WorkloadSpec

Progress = Callable[[int, int], None]
"""Told (requests finished, requests in all) now and then."""
_MAX_REQUESTS = 100_000
_WARMUP_ROUNDS = 2


def run_workload(plan: Plan, model: ModelSpec, workload: WorkloadSpec, options: EngineOptions | None = None, *,
                 seed: int = 0, name: str = "run", cluster: str = "this machine", usd_per_h: float | None = None,
                 max_requests: int | None = None, progress: Progress | None = None, command: str = "") -> Run:
    """Start the plan's ranks, send the workload, stop them. SIGTERM ends the load early and keeps what was measured.

    Raises SpecError when the plan does not fit the model or a request exceeds the context, RankFailed when a rank dies.
    """
    options = replace(options or EngineOptions(), record=True)
    traffic = sample_requests(workload, seed, max_requests=min(max_requests or _MAX_REQUESTS, workload.requests or _MAX_REQUESTS))

    async def run() -> Run:
        frontend = Frontend(plan, model, options)
        await frontend.start()
        load = _Load(frontend, workload, traffic, seed, progress)
        try:
            with _on_sigterm(load.end_early):
                await load.warm_up()
                start = await load.run()
        finally:
            await frontend.stop()
        return measure(frontend, workload, load.sent, load.refused, start=start, name=name, cluster=cluster, seed=seed,
                       usd_per_h=usd_per_h, command=command)

    return asyncio.run(run())


@contextlib.contextmanager
def _on_sigterm(action: Callable[[], None]) -> Iterator[None]:
    """Call `action` on SIGTERM inside the block, where the platform and thread allow it."""
    loop = asyncio.get_running_loop()
    try:
        loop.add_signal_handler(signal.SIGTERM, action)
    except (NotImplementedError, RuntimeError, ValueError):
        yield
        return
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGTERM)


@dataclass
class _Load:
    """Sends requests as the workload says and keeps their flights."""

    frontend: Frontend
    workload: WorkloadSpec
    traffic: RequestSet
    seed: int
    progress: Progress | None
    sent: list[Flight] = field(default_factory=list)
    refused: list[RequestRecord] = field(default_factory=list)
    finished: int = 0

    def __post_init__(self) -> None:
        self._prompts = named_stream(self.seed, "prompts")
        self._over = asyncio.Event()
        self._next = 0
        self._start = 0.0
        longest = int((self.traffic.isl + self.traffic.osl).max())
        if longest > self.frontend.max_context:
            raise SpecError(f"the longest request has {longest} tokens", field="workload",
                            expected=f"at most {self.frontend.max_context}, the engine's context")

    def end_early(self) -> None:
        """Send no more; what is in flight may finish."""
        self._over.set()

    async def warm_up(self) -> None:
        """Touch every rank with requests like those to come, so that nothing is measured for the first time."""
        entries = len(self.frontend.targets.entries)
        isl, osl = int(np.median(self.traffic.isl)), int(min(8, self.traffic.osl.max()))
        for _ in range(_WARMUP_ROUNDS):
            prompts = [self._prompt(isl) for _ in range(min(2 * entries, self.frontend.plan.max_outstanding or 2 * entries))]
            streams = [self.frontend.submit(prompt, SamplingParams(max_tokens=osl, ignore_eos=True)) for prompt in prompts]
            for stream in streams:
                async for _ in stream:
                    pass
        self.frontend.forget()

    async def run(self) -> float:
        """Send everything and wait for it; the start on the monotonic clock. Raises RankFailed."""
        self._start = time.monotonic()
        kind = self.workload.arrivals.kind
        if kind == "closed_loop":
            assert self.workload.arrivals.concurrency is not None, "the spec demands it"
            await _together(self._user() for _ in range(min(self.workload.arrivals.concurrency, len(self.traffic))))
        else:
            await _together([self._open_loop()])
        return self._start

    async def _open_loop(self) -> None:
        assert self.traffic.arrival_s is not None, "only a closed loop has no arrival times"
        async with asyncio.TaskGroup() as group:
            for number, arrival_s in enumerate(self.traffic.arrival_s.tolist()):
                wait = self._start + arrival_s - time.monotonic()
                if wait > 0:
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._over.wait(), wait)
                if self._over.is_set():
                    return
                group.create_task(self._one(number, self._start + arrival_s))

    async def _user(self) -> None:
        """One user of a closed loop: ask, read, think, ask again."""
        until = self.workload.duration_s
        while self._next < len(self.traffic) and not self._over.is_set():
            if until is not None and time.monotonic() - self._start > until:
                return
            number, self._next = self._next, self._next + 1
            await self._one(number, time.monotonic())
            if self.workload.arrivals.think_s:
                await asyncio.sleep(self.workload.arrivals.think_s)

    async def _one(self, number: int, arrival: float) -> None:
        isl, osl = int(self.traffic.isl[number]), int(self.traffic.osl[number])
        try:
            stream = self.frontend.submit(self._prompt(isl), SamplingParams(max_tokens=osl, ignore_eos=True))
        except Overloaded:
            at = arrival - self._start
            self.refused.append(RequestRecord(id=10**9 + number, arrival_s=at, isl=isl, osl=osl, status="rejected"))
            return
        flight = self.frontend.flight(stream.request_id)
        flight.arrival = arrival  # latency counts from when the request was due, even where this client was late
        self.sent.append(flight)
        async for _ in stream:
            pass
        self.finished += 1
        if self.progress is not None:
            self.progress(self.finished, len(self.traffic))

    def _prompt(self, tokens: int) -> list[int]:
        ids: list[int] = self._prompts.integers(0, self.frontend.model.vocab, tokens).tolist()
        return ids


async def _together(jobs: Iterable[Coroutine[None, None, None]]) -> None:
    """Run coroutines; the first error, plain, when one fails."""
    try:
        async with asyncio.TaskGroup() as group:
            for job in jobs:
                group.create_task(job)
    except* Exception as errors:
        raise _first(errors) from None


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
