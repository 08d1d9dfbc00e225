"""An instance: DP ranks that step together, the slowest setting the pace, as a SimPy process.

Ranks are touched only when something changes there. A rank whose scheduler promises so many decode steps without change
(`decode_only_steps`) is a row of arrays until then: `lag` counts the steps it has yet to be told of. When all ranks are
in that state the instance takes as many steps at once as the nearest promise allows; whatever arrives meanwhile cuts the
run at the next step boundary. Both are exact: `coalesce=False` steps one by one with the same results (tested).
What comes from outside (requests, hand-overs) waits in `inbox` until a boundary, as it does in a real engine.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, Literal, Protocol

import numpy as np
import simpy
from numpy.typing import NDArray

from twin.cost.batch import StepBatch
from twin.policy.steps import StepPlan
from twin.sim.balance import Experts
from twin.sim.clock import FIRST_INSTANCE_PHASE, TRANSFER_PHASE, Clock
from twin.sim.presence import Presence
from twin.sim.rank import Handover, Rank
from twin.sim.request import Request
from twin.sim.run import Run, StepCosts, batch_at
from twin.sim.steplog import StepLog
from twin.spec.plan import PoolPlan

NEVER = np.int64(1) << 62
_LONGEST_RUN = 1024


class Listener(Protocol):
    """Who is told what happens to requests. `prompt_ends`: a step begins that computes the last `tokens` tokens of a prompt in
    a prefill pool. `first_token` comes before `finished` or `prefilled`."""

    def prompt_ends(self, request: Request, instance: Instance, rank: int, tokens: int) -> None: ...
    def first_token(self, request: Request, instance: Instance) -> None: ...
    def prefilled(self, request: Request, instance: Instance, rank: int) -> None: ...
    def finished(self, request: Request, instance: Instance, rank: int) -> None: ...
    def preempted(self, request: Request, instance: Instance) -> None: ...
    def stepped(self, instance: Instance, run: Run) -> None: ...


class Instance:
    """`number` orders the instances of the whole service; `gpus` are the cluster's that it sits on."""

    def __init__(self, clock: Clock, number: int, pool_index: int, pool: PoolPlan, costs: StepCosts, kv_blocks: int,
                 gpus: tuple[int, ...], requests: dict[int, Request], listener: Listener,
                 mtp_stream: np.random.Generator, *, coalesce: bool = True) -> None:
        self.clock, self.number, self.pool_index, self.pool, self.costs = clock, number, pool_index, pool, costs
        self.gpus, self.requests, self.listener, self.coalesce = gpus, requests, listener, coalesce
        self.phase = FIRST_INSTANCE_PHASE + number
        self.ranks = [Rank(pool, kv_blocks) for _ in range(pool.dp)]
        self.log = StepLog()
        self.segments: list[tuple[int, int, int]] = []  # (request, first step, last step) that gave it one token each
        self.preemptions = 0
        self.presence: Presence | None = None  # on links that others use, where they do
        self.experts: Experts | None = None  # where they drift or move
        self.inbox: list[tuple[int, Request | Handover]] = []
        self._calls: list[Callable[[], None]] = []  # to be made between steps
        self._mtp = mtp_stream
        self._seqs, self._context, self._other, self._waiting, self._lag = np.zeros((5, pool.dp), dtype=np.int64)
        self._horizon = np.full(pool.dp, NEVER, dtype=np.int64)
        self._run: Run | None = None
        self._asleep: simpy.Event | None = None
        self._ahead = 64  # steps worth computing at once: follows how far runs get before they are cut
        self.process = clock.process(self._work())

    # What others may do.

    def enqueue(self, rank: int, item: Request | Handover) -> None:
        """Hand a request, or a hand-over that needs memory, to a rank; it is looked at between steps."""
        self.inbox.append((rank, item))
        self.disturb()

    def between_steps(self, call: Callable[[], None]) -> None:
        """Have something done when the step that is under way (or begins at this very moment) has ended."""
        later = self.clock.at(self.clock.now, TRANSFER_PHASE)
        assert later.callbacks is not None
        later.callbacks.append(lambda _: self._call_later(call))

    def _call_later(self, call: Callable[[], None]) -> None:
        self._calls.append(call)
        self.disturb()

    def release(self, rank: int, request_id: int) -> None:
        """The KV of a prefilled request has left."""
        self.ranks[rank].release(request_id)
        self.disturb()

    def kv_usage(self) -> NDArray[np.float64]:
        """Share of each rank's KV memory in use after the last step that is done, [dp]."""
        tokens = self._other + self._context
        if self._run is not None and self._run.steps > 1:
            tokens = tokens + self._steps_done(self._run) * self._seqs
        return np.asarray(tokens / self.ranks[0].capacity_tokens)

    def sync(self, rank: int) -> None:
        """Tell a rank's scheduler of the decode steps that are done, so that its state can be looked at."""
        lag = int(self._lag[rank])
        if lag:
            left = self.ranks[rank].advance(lag)
            assert not left, "a request ended inside a promised run"
            self._lag[rank] = 0

    def disturb(self) -> None:
        """Something changed: wake up, or end the run at the next step boundary."""
        if self._asleep is not None:
            sleeper, self._asleep = self._asleep, None
            self.clock.at(self.clock.now, self.phase, sleeper)
        elif self._run is not None and self._run.steps > 1:
            run = self._run
            steps = self._steps_done(run) + 1
            if steps < run.steps:
                run.steps = steps
                self.process.interrupt()

    def retime(self) -> None:
        """What others take of its links has changed: the rest of the step under way takes a longer or shorter time."""
        run = self._run
        if run is None or self.presence is None:
            return
        done = self._steps_done(run)
        step_s = float((run.alone_s[done:done + 1] + self.presence.longer_s(batch_at(run, done), 1))[0])
        pace_s = run.pace_s if run.retimed == done else float(run.step_s[done])
        left = (float(run.ends_s[done]) - self.clock.now) / pace_s
        start_s = float(run.ends_s[done - 1]) if done else run.start_s
        run.retimed, run.pace_s, run.steps = done, step_s, done + 1
        run.ends_s[done] = self.clock.now + left * step_s
        run.step_s[done] = run.ends_s[done] - start_s
        self.process.interrupt()

    def settle(self) -> None:
        """The simulation is over: log the steps of the run in flight that have ended by now."""
        if self._run is not None:
            self._run.steps = self._steps_done(self._run)
            if self._run.steps:
                self._run.first = self._log_run(self._run)
                self.listener.stepped(self, self._run)

    def _steps_done(self, run: Run) -> int:
        """Steps of the run in flight that have ended; a boundary at this very moment has when its phase is over."""
        side: Literal["left", "right"] = "left" if self.clock.phase < self.phase else "right"
        return int(np.searchsorted(run.ends_s[:run.steps], float(self.clock.now), side))

    # The process.

    def _work(self) -> Generator[simpy.Event, Any, None]:
        while True:
            self.clock.phase = self.phase
            run = self._begin()
            self.clock.phase = 0
            if run is None:
                if self.presence is not None:
                    self.presence.rests()
                self._asleep = self.clock.event()
                yield self._asleep
                continue
            self._run = run
            while True:
                try:
                    yield self.clock.at(float(run.ends_s[run.steps - 1]), self.phase)
                    break
                except simpy.Interrupt:
                    pass  # the run was cut: wait for its new end
            self._run = None
            self.clock.phase = self.phase
            self._end(run)

    def _begin(self) -> Run | None:
        """Take in what came, schedule the ranks whose promise is over, and start a run; None when nothing can run."""
        self._read_inbox()
        planned = []
        for rank in np.flatnonzero(self._horizon == 0).tolist():
            plan = self.ranks[rank].schedule(self.pool.mtp_draft_tokens)
            self._book_preempted(rank, plan)
            self._measure(rank)
            if not plan.is_empty:
                planned.append((rank, plan))
        if planned:
            return self._start(1, planned)
        steps = self._horizon.min(where=self._horizon > 0, initial=NEVER)
        return None if steps == NEVER else self._start(min(int(steps), self._ahead), [])

    def _start(self, steps: int, planned: list[tuple[int, StepPlan]]) -> Run:
        batch, now, until_s = self._batch(planned), self.clock.now, float("inf")
        if self.experts is not None:
            self.costs, room, until_s = self.experts.begin(now, self.log, batch)
            steps = min(steps, room)
        if batch.prefill_seqs.any():
            step_s = np.array([self.costs.step_s(batch)])
        else:
            grown = np.arange(steps)[:, None] * self._seqs
            step_s = self.costs.decode_s(np.broadcast_to(self._seqs, grown.shape), self._context + grown)
        alone_s = step_s
        if self.presence is not None:
            self.presence.begins(batch, float(step_s[0]))
            step_s = alone_s + self.presence.longer_s(batch, steps)
        ends_s = np.cumsum(np.concatenate([[now], step_s]))[1:]  # one addition after the other, as single steps do
        if steps > 1 and ends_s[steps - 2] >= until_s:
            steps = 1 + int(np.searchsorted(ends_s[:steps - 1], until_s))  # those that begin before
        for rank, plan in planned:
            for chunk in plan.prefill:
                request = self.requests[chunk.request_id]
                if request.prefill_start_s is None:
                    request.prefill_start_s = now
                if chunk.is_last and self.pool.role == "prefill" and request.osl > 1:
                    self.listener.prompt_ends(request, self, rank, chunk.tokens)
        return Run(now, ends_s, step_s, alone_s, steps, batch, planned)

    def _batch(self, planned: list[tuple[int, StepPlan]]) -> StepBatch:
        prefill = np.zeros((3, self.pool.dp))
        for rank, plan in planned:
            for chunk in plan.prefill:
                prefill[:, rank] += chunk.tokens, chunk.tokens * (chunk.start + chunk.tokens / 2), 1
        return StepBatch(self._seqs.copy(), self._context.copy(), prefill[0], prefill[1], prefill[2])

    def _end(self, run: Run) -> None:
        """Book the steps that were done, in the order of ranks."""
        if not run.planned:
            cut = run.steps < len(run.ends_s)
            self._ahead = max(8, 2 * run.steps) if cut else min(_LONGEST_RUN, max(self._ahead, 4 * run.steps))
        run.first = self._log_run(run)
        plans = dict(run.planned)
        lazy = self._seqs > 0
        lazy[list(plans)] = False
        self._lag[lazy] += run.steps
        self._horizon[lazy] -= run.steps
        self._context[lazy] += run.steps * self._seqs[lazy]
        ended = lazy & (self._horizon == 0)
        for rank in sorted([*plans, *np.flatnonzero(ended).tolist()]):
            if rank in plans:
                self._complete(rank, plans[rank])
            else:
                left = self.ranks[rank].advance(int(self._lag[rank]))
                self._lag[rank] = 0
                self._book_left(rank, left)
            self._hand_over(rank)
            self._look_at(rank)
        self.listener.stepped(self, run)

    def _complete(self, rank: int, plan: StepPlan) -> None:
        accepted = self._draw_accepted(plan) if self.pool.mtp_draft_tokens and plan.decode else None
        last = len(self.log) - 1
        if accepted:
            self.log.column("output_tokens")[last] += sum(accepted.values()) - len(plan.decode)
        self._book_joined(plan, last)
        hold = set()
        for chunk in plan.prefill:
            if chunk.is_last:
                request = self.requests[chunk.request_id]
                self._book_prefilled(rank, request, last)
                if self.pool.role == "prefill" and request.osl > 1:
                    hold.add(request.id)
        self._book_left(rank, self.ranks[rank].complete(plan, accepted=accepted, hold=hold))

    def _draw_accepted(self, plan: StepPlan) -> dict[int, int]:
        """Tokens each decode gives: one, and drafts up to the first that is refused, each accepted by chance."""
        drafts = self.pool.mtp_draft_tokens
        kept = self._mtp.random((len(plan.decode), drafts)) < self.pool.mtp_acceptance
        gains = 1 + np.logical_and.accumulate(kept, axis=1).sum(axis=1)
        return dict(zip(plan.decode, np.minimum(gains, plan.decode_tokens).tolist(), strict=True))

    # Bookkeeping of one rank.

    def _read_inbox(self) -> None:
        calls, self._calls = self._calls, []
        for call in calls:
            call()
        inbox, self.inbox = self.inbox, []
        for rank, item in inbox:
            self.sync(rank)
            if isinstance(item, Handover):
                self.ranks[rank].handovers.append(item)
            elif self.pool.role == "prefill":
                self.ranks[rank].add(item.id, item.isl, 1, computed_tokens=item.cached_tokens)
            elif self.pool.role == "decode" or item.first_token_s is not None:  # its KV is here already
                self.ranks[rank].incoming.discard(item.id)
                self.ranks[rank].add(item.id, item.isl, item.osl, computed_tokens=item.isl, generated_tokens=1)
            else:
                self.ranks[rank].add(item.id, item.isl, item.osl, computed_tokens=item.cached_tokens)
        for rank in sorted({rank for rank, _ in inbox}):
            self._hand_over(rank)
            self._look_at(rank)

    def _hand_over(self, rank: int) -> None:
        if self.ranks[rank].handovers:
            for handover in self.ranks[rank].take_handovers():
                handover.start()

    def _measure(self, rank: int) -> None:
        """Refresh the arrays of a rank from its scheduler, which must be in step (lag 0)."""
        at = self.ranks[rank]
        self._seqs[rank], self._context[rank] = at.num_decoding, at.decode_context
        self._other[rank], self._waiting[rank] = at.other_kv_tokens, at.num_waiting

    def _look_at(self, rank: int) -> None:
        """Measure a rank and ask it how long nothing will change there."""
        self._measure(rank)
        at = self.ranks[rank]
        if at.is_idle:
            self._horizon[rank] = NEVER
        elif self.coalesce and not self.pool.mtp_draft_tokens:
            self._horizon[rank] = at.decode_only_steps()
        else:
            self._horizon[rank] = 0

    def _log_run(self, run: Run) -> int:
        steps = run.steps
        batch = run.batch
        kv = np.minimum(self._other + batch.decode_context + batch.decode_seqs * ((self.pool.block_tokens - 1) // 2)
                        + np.arange(steps)[:, None] * batch.decode_seqs, self.ranks[0].capacity_tokens)
        last_chunks = sum(chunk.is_last for _, plan in run.planned for chunk in plan.prefill)
        seqs = int(batch.decode_seqs.sum())
        return self.log.append(
            steps, end_s=run.ends_s[:steps], step_s=run.step_s[:steps], decode_seqs=seqs,
            prefill_seqs=float(batch.prefill_seqs.sum()),
            prefill_tokens=float(batch.prefill_tokens.sum()), output_tokens=seqs + last_chunks,
            kv_tokens=kv.sum(axis=1), kv_tokens_fullest=kv.max(axis=1),
            waiting=float(self._waiting.sum()))

    # Bookkeeping of requests.

    def _book_preempted(self, rank: int, plan: StepPlan) -> None:
        for request_id in plan.preempted:
            request = self.requests[request_id]
            self.preemptions += 1
            self.ranks[rank].preempted.add(request_id)
            request.preemptions += 1
            self._close_segment(request, len(self.log) - 1)
            self.listener.preempted(request, self)

    def _book_joined(self, plan: StepPlan, step: int) -> None:
        """Hand-overs that decode for the first time stand at the end of the plan."""
        for request_id in reversed(plan.decode):
            request = self.requests[request_id]
            if request.segment is not None:
                break
            assert request.last_token_s is not None, "a sequence decodes before its first token"
            request.saw_gap(self.clock.now - request.last_token_s)
            request.segment = step + 1

    def _book_prefilled(self, rank: int, request: Request, step: int) -> None:
        """A prompt, or what a pre-empted request had, is computed: a token comes out."""
        if request.last_token_s is not None:
            request.saw_gap(self.clock.now - request.last_token_s)
        self.ranks[rank].preempted.discard(request.id)
        request.last_token_s = self.clock.now
        request.segment = step + 1
        if request.first_token_s is None:
            request.first_token_s = self.clock.now
            self.listener.first_token(request, self)

    def _book_left(self, rank: int, left: list[int]) -> None:
        for request_id in left:
            request = self.requests[request_id]
            self._close_segment(request, len(self.log) - 1)
            if self.pool.role == "prefill" and request.osl > 1:
                self.listener.prefilled(request, self, rank)
            else:
                request.finish_s = self.clock.now
                request.status = "ok"
                self.listener.finished(request, self, rank)

    def _close_segment(self, request: Request, last: int) -> None:
        first, request.segment = request.segment, None
        if first is None or last < first:
            return
        self.segments.append((request.id, first, last))
        request.last_token_s = float(self.log.column("end_s")[last])
        request.saw_steps(self.log.longest_s(first, last))
