"""The engine's front end, in the process that launched the ranks: takes requests, routes them, streams tokens back.

    frontend = Frontend(plan, model, EngineOptions())
    await frontend.start()
    async for event in frontend.submit([1, 2, 3], SamplingParams(max_tokens=8)): ...
    await frontend.stop()
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from runtime.flight import Flight, Handovers, Stream, move_load
from runtime.launch import RankProcesses
from runtime.layout import layouts
from runtime.options import EngineOptions
from runtime.targets import Target, Targets
from runtime.types import FrontendStats, SamplingParams, TokenEvent
from runtime.watch import Watch
from twin.policy.admission import Admission
from twin.spec.errors import EptwinError, Overloaded, Problem, RankFailed, SpecError
from twin.spec.model import ModelSpec
from twin.spec.plan import Plan

Message = dict[str, Any]
_LINE_LIMIT = 64 << 20
_MAX_OUTSTANDING = 100_000


class Frontend:
    """One engine. All methods belong to one event loop. A rank that fails ends every request with RankFailed.

    `steps` keeps a record of every step and `finished_flights` every request that ended, when `options.record`.
    """

    def __init__(self, plan: Plan, model: ModelSpec, options: EngineOptions | None = None) -> None:
        """Raises SpecError when the model cannot be cut as the plan says."""
        self.plan, self.model, self.options = plan, model, options or EngineOptions()
        ranks = layouts(plan, model)
        self.targets = Targets(plan, ranks, self.options.seed)
        self.max_context = model.max_context
        self.ready: dict[int, Message] = {}
        self.totals: dict[int, Message] = {}
        self.steps: list[Message] = []
        self.finished_flights: list[Flight] = []
        self.failure: EptwinError | None = None
        self._admission = Admission(plan.max_outstanding or _MAX_OUTSTANDING)
        self._ends: deque[float] = deque(maxlen=64)
        self._processes = RankProcesses(plan, model, self.options)
        self._watch = Watch(self._processes, self.options, self._fail)
        self._writers: dict[int, asyncio.StreamWriter] = {}
        self._flights: dict[int, Flight] = {}
        self._handovers = Handovers(model, self.targets, self._send, self._wake)
        self._wakes: dict[int, int] = {}
        self._next_id = 0
        self._submitted = self._finished = 0
        self._started = asyncio.Event()
        self._quiet = asyncio.Event()
        self._farewells: set[int] = set()
        self._all_left = asyncio.Event()
        self._draining = False
        self._stopped = False
        self._tasks: list[asyncio.Task[None]] = []
        self._server: asyncio.AbstractServer | None = None

    # Life

    async def start(self) -> None:
        """Start the ranks and wait until all are ready. Raises SpecError or RankFailed; nothing is left running then."""
        self._server = await asyncio.start_unix_server(self._serve_rank, str(self._processes.control_path), limit=_LINE_LIMIT)
        try:
            self._processes.start()
            self._tasks.append(asyncio.create_task(self._watch.run()))
            async with asyncio.timeout(self.options.start_timeout_s):
                await self._started.wait()
        except TimeoutError:
            silent = sorted(set(range(self.plan.gpus)) - set(self.ready))
            self.failure = RankFailed(f"ranks {silent} were not ready after {self.options.start_timeout_s:g} s",
                                      rank=silent[0] if silent else 0, where="start")
        finally:
            if not self._started.is_set():
                await self.stop(grace_s=0.0)
        if self.failure is not None:
            await self.stop(grace_s=0.0)
            raise self.failure
        self.max_context = min(message["max_context"] for message in self.ready.values())

    async def drain(self, timeout_s: float) -> bool:
        """Take no more requests and wait for those in flight; False when some were left after `timeout_s`."""
        self._draining = True
        self._settle()
        try:
            async with asyncio.timeout(timeout_s):
                await self._quiet.wait()
        except TimeoutError:
            return False
        return True

    async def stop(self, grace_s: float = 5.0) -> None:
        """End the ranks; requests still in flight end as cancelled. Safe to call twice."""
        if self._stopped:
            return
        self._stopped = True
        self._watch.stop()
        for flight in list(self._flights.values()):
            flight.stream.push(self.failure or TokenEvent(-1, len(flight.output), "cancelled", time.monotonic()))
        self._flights.clear()
        for rank in self._writers:
            self._send(rank, {"op": "stop"})
        if self._writers and self.failure is None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._all_left.wait(), grace_s)
        await asyncio.to_thread(self._processes.end, 0.0 if self.failure else grace_s)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for writer in self._writers.values():
            writer.close()
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()

    # Requests

    def submit(self, prompt_ids: Sequence[int], params: SamplingParams) -> Stream:
        """Queue a request. Raises SpecError for one that cannot be served, Overloaded when there are too many."""
        if self.failure is not None:
            raise self.failure
        prompt = [int(token) for token in prompt_ids]
        self._check(prompt, params)
        if self._draining or self._stopped:
            raise Overloaded("the engine is shutting down", retry_after_s=5.0)
        decision = self._admission.decide(len(self._flights), 0, 0, requests_per_s=self._finish_rate())
        if not decision.admitted:
            raise Overloaded(decision.reason, retry_after_s=decision.retry_after_s, status=429)
        request_id, self._next_id = self._next_id, self._next_id + 1
        seed = params.seed if params.seed is not None else self.options.seed * 1_000_003 + request_id
        entry = self.targets.choose_entry(len(prompt))
        flight = Flight(request_id, prompt, params, seed, Stream(request_id, self.cancel), entry, time.monotonic())
        self._flights[request_id] = flight
        self._submitted += 1
        self._quiet.clear()
        move_load(flight, None, entry)
        self._send(entry.leader, flight.message("add", wake=self._wake(entry),
                                                hands_over=self.plan.separated and params.max_tokens > 1))
        return flight.stream

    def cancel(self, request_id: int) -> bool:
        """End a request now; its stream ends with `cancelled`. False when it ended already."""
        flight = self._flights.get(request_id)
        if flight is None or flight.cancelled:
            return False
        flight.cancelled = True
        flight.finish_reason = "cancelled"
        flight.stream.push(TokenEvent(-1, len(flight.output), "cancelled", time.monotonic()))
        if flight.state == "moving":  # blocks in transfer are freed when both sides are done with them
            return True
        places = [flight.at] if flight.state != "asking" or flight.decoder is None else [flight.entry, flight.decoder]
        for place in places:
            self._send(place.leader, {"op": "cancel", "id": request_id, "wake": self._wake(place)})
        self._end(flight)
        return True

    def stats(self) -> FrontendStats:
        """The engine now."""
        instances = self.targets.instances()
        running = min(sum(i.running for i in instances), len(self._flights))
        return FrontendStats(running, len(self._flights) - running, sum(i.steps for i in instances), self._submitted,
                             self._finished, self._handovers.moved_bytes, instances)

    def flight(self, request_id: int) -> Flight:
        """A request in flight. Raises KeyError for one that ended."""
        return self._flights[request_id]

    @property
    def moved_bytes(self) -> int:
        """KV bytes that decode ranks have received."""
        return self._handovers.moved_bytes

    def forget(self) -> None:
        """Drop what was recorded so far (a warm-up)."""
        self.steps.clear()
        self.finished_flights.clear()
        self._handovers.moved_bytes = 0

    def rank_pids(self) -> list[int]:
        return self._processes.pids()

    def _check(self, prompt: list[int], params: SamplingParams) -> None:
        problems = []
        if not prompt:
            problems.append(Problem("is empty", field="prompt", expected="at least one token"))
        if prompt and not 0 <= min(prompt) <= max(prompt) < self.model.vocab:
            problems.append(Problem("has token ids outside the vocabulary", field="prompt",
                                    expected=f"0..{self.model.vocab - 1}"))
        if len(prompt) + params.max_tokens > self.max_context:
            problems.append(Problem(f"prompt {len(prompt)} + output {params.max_tokens} tokens exceed the context",
                                    field="max_tokens", expected=f"at most {self.max_context} together"))
        for pool in self.plan.pools:
            if pool.role != "decode" and pool.chunk_tokens is None and len(prompt) > pool.max_batch_tokens:
                problems.append(Problem(f"{len(prompt)} tokens exceed a step and chunked prefill is off", field="prompt",
                                        expected=f"at most {pool.max_batch_tokens}"))
        if problems:
            raise SpecError(problems)

    # Ranks

    def _send(self, rank: int, message: Message) -> None:
        writer = self._writers.get(rank)
        if writer is not None and not writer.is_closing():
            writer.write(json.dumps(message, separators=(",", ":")).encode() + b"\n")

    def _wake(self, target: Target) -> int:
        """Wake every other rank of the target's instance; returns the number to send along to its leader."""
        first = target.instance_ranks[0]
        number = self._wakes[first] = self._wakes.get(first, 0) + 1
        for rank in target.instance_ranks:
            if rank != target.leader:
                self._send(rank, {"op": "wake", "wake": number})
        return number

    async def _serve_rank(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while line := await reader.readline():
                message = json.loads(line)
                if message["ev"] == "hello":
                    self._writers[message["rank"]] = writer
                else:
                    self._hear(message)
        except ConnectionError:
            pass  # the watch knows better why a rank is gone

    def _hear(self, message: Message) -> None:
        event, rank = message["ev"], message["rank"]
        if event == "ready":
            self.ready[rank] = message
            if len(self.ready) == self.plan.gpus:
                self._started.set()
        elif event == "step":
            self._hear_step(self.targets.of_leader(rank), message)
        elif event == "load":
            target = self.targets.of_leader(rank)
            target.running, target.waiting, target.kv_usage = message["load"]
        elif event == "failed":
            self._watch.report(rank, message)
        elif event == "totals":
            self.totals[rank] = message
        elif event == "bye":
            self._farewells.add(rank)
            if self._farewells >= self._writers.keys():
                self._all_left.set()
        elif (flight := self._flights.get(message.get("id", -1))) is not None:
            self._hear_flight(flight, message)

    def _hear_flight(self, flight: Flight, message: Message) -> None:
        event = message["ev"]
        if event == "refused":
            flight.stream.push(SpecError(message["error"]))
            self._end(flight)
        elif event == "reserved":
            self._handovers.reserved(flight, message["blocks"])
        elif self._handovers.progressed(flight, message) or (flight.finish_reason and not flight.pending):
            self._end(flight)

    def _hear_step(self, target: Target, message: Message) -> None:
        target.running, target.waiting, target.kv_usage = message["load"]
        target.steps += 1
        for request_id in message.get("preempted", ()):
            if (flight := self._flights.get(request_id)) is not None:
                flight.preemptions += 1
        for request_id in message.get("began", ()):
            if (flight := self._flights.get(request_id)) is not None:
                flight.prefill_start = flight.prefill_start or message["began_at"]
        for request_id, token, reason in message["out"]:
            flight = self._flights.get(request_id)
            if flight is None or flight.cancelled:
                continue
            target.outstanding_tokens -= 1 if flight.output else 1 + len(flight.prompt)
            flight.give(token, reason)
            if reason is not None and not flight.pending:
                self._end(flight)
        for request_id, blocks in message.get("handover", ()):
            flight = self._flights.get(request_id)
            if flight is not None and not flight.cancelled:
                self._handovers.begin(flight, blocks)
        if "record" in message:
            self.steps.append({**message["record"], "pool": target.pool, "instance": target.instance, "dp_rank": target.dp_rank,
                               "rank": target.leader})

    # Ends

    def _end(self, flight: Flight) -> None:
        if self._flights.pop(flight.request_id, None) is None:
            return
        move_load(flight, flight.decoder or flight.entry, None)
        self._finished += 1
        self._ends.append(time.monotonic())
        if self.options.record:
            self.finished_flights.append(flight)
        self._settle()

    def _settle(self) -> None:
        if not self._flights:
            self._quiet.set()

    def _finish_rate(self) -> float:
        """Requests that ended a second, over the last few."""
        return (len(self._ends) - 1) / max(time.monotonic() - self._ends[0], 1e-3) if len(self._ends) > 1 else 0.0

    def _fail(self, failure: EptwinError) -> None:
        """A rank is lost: so are all requests. Whoever waits for the start hears it too."""
        self.failure = failure
        for flight in self._flights.values():
            flight.stream.push(failure)
        self._flights.clear()
        self._settle()
        self._started.set()


