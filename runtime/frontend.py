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
from runtime.formation import Formation, first_formation
from runtime.launch import RankProcesses
from runtime.layout import layouts
from runtime.options import EngineOptions
from runtime.records import StepRecords
from runtime.recovery import Recovered, Recovery, fresh
from runtime.requests import check_request
from runtime.routing_record import write_routing
from runtime.suspects import Suspects
from runtime.targets import Target, Targets
from runtime.types import FrontendStats, SamplingParams, TokenEvent
from runtime.watch import Loss, Watch
from twin.policy.admission import Admission
from twin.spec.errors import EptwinError, Overloaded, RankFailed, SpecError
from twin.spec.model import ModelSpec
from twin.spec.plan import Plan

Message = dict[str, Any]
_LINE_LIMIT = 64 << 20
_MAX_OUTSTANDING = 100_000
_REFORM_RETRY_S = 2.0


class Frontend:
    """One engine. All methods belong to one event loop. With `options.recover` it goes on without a rank that is lost, and
    requests with it, from their tokens; else, and when there is no way on, every request ends with RankFailed.

    `plan` is what was asked for; `formation` what there is. Ranks are those of the formation, seats their processes.
    `records` are of every step and `finished_flights` every request that ended, when `options.record`.
    """

    def __init__(self, plan: Plan, model: ModelSpec, options: EngineOptions | None = None) -> None:
        """Raises SpecError when the model cannot be cut as the plan says."""
        self.plan, self.model, self.options = plan, model, options or EngineOptions()
        ranks = layouts(plan, model)
        self.formation = first_formation(plan)
        self.targets = Targets(plan, ranks, self.options.seed)
        self.max_context = model.max_context
        self.ready, self.totals = dict[int, Message](), dict[int, Message]()
        self.records = StepRecords()
        self.records.form(0, self.formation.seats, self.targets.targets)
        self.finished_flights: list[Flight] = []
        self.recoveries, self.rebalances = list[Recovered](), list[Message]()
        self.failure: EptwinError | None = None
        self._admission = Admission(plan.max_outstanding or _MAX_OUTSTANDING)
        self._ends: deque[float] = deque(maxlen=64)
        self._processes = RankProcesses(plan, model, self.options)
        self._watch = Watch(self._processes, self.options, self._lose)
        self._recovery = Recovery(self._processes, self._watch, model, self.options, self._send_seat)
        self._recovering: asyncio.Task[None] | None = None
        self._suspects = Suspects(self._end, self._add)
        self._writers, self._serving = dict[int, asyncio.StreamWriter](), set[Any]()
        self._flights: dict[int, Flight] = {}
        self._handovers = Handovers(model, self.targets, self._send, self._wake)
        self._wakes: dict[int, int] = {}
        self._next_id = 0
        self._submitted = self._finished = 0
        self._started, self._quiet = asyncio.Event(), asyncio.Event()
        self._farewells: set[int] = set()
        self._all_left = asyncio.Event()
        self._draining = self._stopped = False
        self._tasks: list[asyncio.Task[None]] = []
        self._server: asyncio.AbstractServer | None = None

    # Life

    async def start(self) -> None:
        """Start the ranks and wait until all are ready. Raises SpecError or RankFailed; nothing is left running then."""
        self._server = await asyncio.start_unix_server(self._serve_rank, str(self._processes.control_path), limit=_LINE_LIMIT)
        try:
            async with asyncio.timeout(self.options.start_timeout_s):
                await asyncio.to_thread(self._processes.prepare)
                self._processes.start()
                self._tasks.append(asyncio.create_task(self._watch.run()))
                await self._started.wait()
        except TimeoutError:
            silent = sorted(set(range(self.plan.gpus)) - set(self.ready)) or [0]
            text = f"ranks {silent} were not ready after {self.options.start_timeout_s:g} s"
            self.failure = RankFailed(text, rank=silent[0], where="start")
        finally:
            if not self._started.is_set():
                await self.stop(grace_s=0.0)
        if self.failure is not None:
            await self.stop(grace_s=0.0)
            raise fresh(self.failure)
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
        if self._recovering is not None:
            self._recovering.cancel()
            await asyncio.gather(self._recovering, return_exceptions=True)
        for flight in list(self._flights.values()):
            cancelled = TokenEvent(-1, len(flight.output), "cancelled", time.monotonic())
            flight.stream.push(fresh(self.failure) if self.failure else cancelled)
        self._flights.clear()
        for seat in self._writers:
            self._send_seat(seat, {"op": "stop"})
        if self._writers and self.failure is None and self._recovering is None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._all_left.wait(), grace_s)
        await asyncio.to_thread(self._processes.end, 0.0 if self.failure or self._recovering else grace_s)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for writer in self._writers.values():
            writer.close()
        await asyncio.gather(*self._serving, return_exceptions=True)  # the loop would cancel them, and complain
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()
        write_routing(self.options.record_routing, list(self.totals.values()), self.model.name)

    # Requests

    def submit(self, prompt_ids: Sequence[int], params: SamplingParams) -> Stream:
        """Queue a request. Raises SpecError for one that cannot be served, Overloaded when there are too many or the engine is
        about to go on without a rank."""
        if self.failure is not None:
            raise fresh(self.failure)
        prompt = [int(token) for token in prompt_ids]
        check_request(prompt, params, self.plan, self.model.vocab, self.max_context)
        if self._draining or self._stopped:
            raise Overloaded("the engine is shutting down", retry_after_s=5.0)
        if self._recovering is not None:
            raise Overloaded("a rank was lost; the others re-form", retry_after_s=_REFORM_RETRY_S)
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
        self._add(flight)
        return flight.stream

    def cancel(self, request_id: int) -> bool:
        """End a request now; its stream ends with `cancelled`. False when it ended already."""
        flight = self._flights.get(request_id)
        if flight is None or flight.cancelled:
            return False
        flight.cancelled = True
        flight.finish_reason = "cancelled"
        flight.stream.push(TokenEvent(-1, len(flight.output), "cancelled", time.monotonic()))
        if self._recovering is not None:  # nobody works on it
            self._end(flight)
            return True
        if self._handovers.cancel(flight):
            self._end(flight)
        return True

    def stats(self) -> FrontendStats:
        """The engine now."""
        instances = self.targets.instances()
        running = min(sum(i.running for i in instances), len(self._flights))
        return FrontendStats(running, len(self._flights) - running, sum(i.steps for i in instances), self._submitted,
                             self._finished, self._handovers.moved_bytes, instances, self._recovering is not None,
                             len(self.recoveries))

    def flight(self, request_id: int) -> Flight:
        """A request in flight. Raises KeyError for one that ended."""
        return self._flights[request_id]

    @property
    def moved_bytes(self) -> int:
        """KV bytes that decode ranks have received."""
        return self._handovers.moved_bytes

    def forget(self) -> None:
        """Drop what was recorded so far (a warm-up)."""
        self.records.clear()
        self.finished_flights.clear()
        self._handovers.moved_bytes = 0

    def rank_pids(self) -> list[int]:
        return self._processes.pids()

    def faults_fired(self, seat: int) -> int:
        return self._processes.board.fired(seat)

    # Ranks

    def _add(self, flight: Flight) -> None:
        """Give a request to its entry, with the tokens that it has."""
        hands_over = self.plan.separated and flight.params.max_tokens - len(flight.output) > 1
        early = hands_over and self.options.kv_send in ("chunk", "layer")
        self._send(flight.entry.leader, flight.message("add", wake=self._wake(flight.entry), hands_over=hands_over, early=early))

    def _send(self, rank: int, message: Message) -> None:
        self._send_seat(self.formation.seats[rank], message)

    def _send_seat(self, seat: int, message: Message) -> None:
        writer = self._writers.get(seat)
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
        self._serving.add(asyncio.current_task())
        try:
            while line := await reader.readline():
                message = json.loads(line)
                seat, event = message["seat"], message["ev"]
                if event == "hello":
                    self._writers[seat] = writer
                elif event == "bye":
                    self._farewells.add(seat)
                    if self._farewells >= self._writers.keys():
                        self._all_left.set()
                elif event == "records":
                    self.records.hear(message)
                elif self._recovering is not None and event in ("here", "ready"):
                    self._recovery.hear(seat, message)
                elif message["formation"] == self.formation.number and seat in self.formation.seats:
                    self._hear(seat, {**message, "rank": self.formation.seats.index(seat)})
        except ConnectionError:
            pass  # the watch knows better why a rank is gone
        finally:
            writer.close()

    def _hear(self, seat: int, message: Message) -> None:
        event, rank = message["ev"], message["rank"]
        if event == "ready":
            self._watch.ready(seat)
            self.ready[rank] = message
            if len(self.ready) == self.plan.gpus:
                self._started.set()
        elif event == "failed":
            self._watch.report(seat, message | {"missing": [self.formation.seats[r] for r in message.get("missing", ())]})
        elif self._recovering is not None:
            return
        elif event == "step":
            self._hear_step(self.targets.of_leader(rank), message)
        elif event == "load":
            self.targets.of_leader(rank).hear_load(message["load"])
        elif event == "totals":
            self.totals[rank] = message
        elif event == "eplb":
            self.rebalances.append({**message, "pool": self.targets.of_leader(rank).pool})
        elif (flight := self._flights.get(message.get("id", -1))) is not None:
            self._hear_flight(flight, message)

    def _hear_flight(self, flight: Flight, message: Message) -> None:
        event = message["ev"]
        if event == "refused":
            flight.stream.push(SpecError(message["error"]))
            self._end(flight)
        elif event == "starts":
            self._handovers.starts(flight, message["blocks"])
        elif event == "reserved":
            self._handovers.reserved(flight, message["blocks"])
        elif self._handovers.progressed(flight, message):
            self._end(flight)

    def _hear_step(self, target: Target, message: Message) -> None:
        target.hear_load(message["load"])
        target.steps += 1
        if "drafts" in message:
            target.count_drafts(*message["drafts"])
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
            self._recovery.progressed()
            self._suspects.clear(flight)
            if reason is not None and not flight.pending:
                if flight.state == "entry" and flight.aim is not None:  # what is held for a transfer that never began
                    self._handovers.cancel(flight)
                self._end(flight)
        for request_id, blocks in message.get("handover", ()):
            flight = self._flights.get(request_id)
            if flight is not None and flight.finish_reason is None:
                self._handovers.begin(flight, blocks)

    # Ends

    def _end(self, flight: Flight) -> None:
        if self._flights.pop(flight.request_id, None) is None:
            return
        move_load(flight, flight.decoder or flight.entry, None)
        self._suspects.clear(flight, try_next=self._recovering is None)
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

    # Losses

    def _lose(self, loss: Loss) -> None:
        """A rank is lost, or ranks have lost one another."""
        able = self.options.recover and self._started.is_set() and not isinstance(loss.cause, SpecError)
        if not able or self._stopped:
            self._fail(loss.cause)
            return
        self._suspects.strike(self._flights[i] for i in loss.suspects if i in self._flights)
        self._recovery.note(loss)
        if self._recovering is None:
            self._recovering = asyncio.create_task(self._recover())

    async def _recover(self) -> None:
        """Form anew, then go on with every request."""
        try:
            self.ready, done = await self._recovery.run(self.formation, self._begin)
        except Exception as error:  # nothing must leave clients waiting for a recovery that is over
            self._recovering = None
            self._fail(error if isinstance(error, EptwinError) else RankFailed(f"re-form: {error!r}", rank=0, where="reform"))
            return
        plan = self.formation.plan
        self.recoveries.append(done)
        self.targets = Targets(plan, layouts(plan, self.model), self.options.seed, self.formation.origins)
        self.records.form(self.formation.number, self.formation.seats, self.targets.targets)
        self._handovers.start_over(self.targets)
        self.max_context = min(message["max_context"] for message in self.ready.values())
        self._recovering = None
        for flight in list(self._flights.values()):
            if flight.cancelled:
                self._end(flight)
                continue
            flight.start_over(self.targets.choose_entry(len(flight.prompt) + len(flight.output)))
            if not self._suspects.waits(flight):
                self._add(flight)

    def _begin(self, formation: Formation) -> None:
        """A formation is tried: nothing that belongs to an earlier one counts any more."""
        self.formation = formation
        self._wakes.clear()
        for seat in self._writers.keys() - set(formation.seats):
            self._writers.pop(seat).close()

    def _fail(self, failure: EptwinError) -> None:
        """The engine is lost: so are all requests. Whoever waits for the start hears it too."""
        self.failure = failure
        for flight in self._flights.values():
            flight.stream.push(fresh(failure))
        self._flights.clear()
        self._settle()
        self._started.set()
