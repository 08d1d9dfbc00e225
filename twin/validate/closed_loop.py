"""Mean TTFT and TPOT of a closed loop: a step loop over one deployment, with tables instead of a cost model inside.

What `twin.sim` does event by event for any traffic, this does for the one traffic of serving benchmarks (users who each send
their next request when the last ended, all at once at first) some fifty times faster; a test holds the two together.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from twin.cost.serving import Serving
from twin.validate.step_times import StepTimes


@dataclass(slots=True)
class Request:
    """One request: when it was sent, its lengths, what is left to compute, and when its tokens came."""

    number: int
    sent_s: float
    isl: int
    osl: int
    done: int = 0  # prompt tokens computed
    first_s: float = 0.0
    end_s: float = 0.0
    again: int = 0  # tokens of its own to compute again with the prompt, after it lost its memory

    @property
    def prompt(self) -> int:
        """Tokens to compute before it decodes, or decodes on."""
        return self.isl + self.again

    @property
    def longest(self) -> int:
        """KV tokens at its end."""
        return self.isl + self.osl


@dataclass(slots=True)
class _Rank:
    """One DP rank: prompts in order, sequences by the decode step that ends them, and what they hold."""

    waiting: deque[Request] = field(default_factory=deque)
    running: list[tuple[float, int, Request]] = field(default_factory=list)
    context: float = 0.0
    held: int = 0  # KV tokens of all that was admitted, at their ends
    filling: int = 0  # KV tokens of admitted prompts that are not computed yet

    def kept(self, share: float) -> float:
        """KV tokens taken: what there is, and `share` of what is still to come."""
        now = self.context + self.filling
        return now + share * (self.held - now)


class Worker:
    """One instance: `role` mixed, prefill (prompts alone) or decode (sequences alone). `room` is KV tokens a rank holds."""

    def __init__(self, times: StepTimes, serving: Serving, role: str, room: float) -> None:
        self.times, self.serving, self.role, self.room = times, serving, role, room
        self.ranks = [_Rank() for _ in range(times.dp)]
        self.unseen: deque[Request] = deque()
        self.gain = times.costs.tokens_per_step
        self.decoded = 0.0  # tokens that a sequence present from the start would have gained
        self.steps = 0
        self.patience = serving.balance_steps if times.dp > 1 else serving.wait_steps
        self.held_since = -1  # step at which the first unseen prompt began to wait for other ranks
        self.next_poll = 0
        self.load = 0

    def send(self, request: Request) -> None:
        self.load += 1
        self.unseen.append(request)

    @property
    def busy(self) -> bool:
        return self.load > 0

    def _look(self) -> None:
        """Take what has arrived, when this is a step at which the scheduler looks."""
        decoding = any(rank.running for rank in self.ranks)
        if self.unseen and (not decoding or (self.steps >= self.next_poll and self._together())):
            while self.unseen:
                request = self.unseen.popleft()
                rank = min(self.ranks, key=lambda r: len(r.waiting) + len(r.running))
                rank.waiting.append(request)
        if self.steps >= self.next_poll:
            self.next_poll = self.steps + self.serving.poll_steps

    def _together(self) -> bool:
        """Whether prompts begin now: every attention-DP rank has one or the step would be full enough, or the first has
        waited long enough."""
        if not self.patience or self._enough():
            self.held_since = -1
            return True
        if self.held_since < 0:
            self.held_since = self.steps
        if self.steps - self.held_since < self.patience:
            return False
        self.held_since = -1
        return True

    def _enough(self) -> bool:
        if len(self.ranks) > 1:
            return len(self.unseen) >= len(self.ranks)
        tokens = sum(request.isl for request in self.unseen) + len(self.ranks[0].running)
        return tokens >= self.serving.wait_share * self.serving.budget_tokens

    def step(self, now: float, until: float) -> tuple[float, list[Request], list[Request]]:
        """Run one step with prompts, or decode steps until something changes or `until`. Returns when it ended, whose first
        token came, and who ended."""
        self._look()
        full = [self._make_room(rank) for rank in self.ranks]
        if self.role == "decode" and not any(full):
            self._adopt()
        picked = [self._pick(rank, lost) for rank, lost in zip(self.ranks, full, strict=True)]
        if any(picked):
            return self._prompt_step(now, picked)
        return self._decode_run(now, until)

    def _adopt(self) -> None:
        for rank in self.ranks:
            while rank.waiting and (self._fits(rank, rank.waiting[0]) or not rank.running):
                request = rank.waiting.popleft()
                rank.held += request.longest
                self._run(rank, request)

    def _run(self, rank: _Rank, request: Request) -> None:
        rank.context += request.prompt + 1
        heapq.heappush(rank.running, (self.decoded + max(request.osl - request.again - 1, 1), request.number, request))

    def _fits(self, rank: _Rank, request: Request) -> bool:
        """Whether memory holds one more request, as far ahead as the engine looks."""
        share = self.serving.reserved_share
        return rank.kept(share) + request.prompt + share * (request.longest - request.prompt) <= self.room

    def _make_room(self, rank: _Rank) -> bool:
        """Where outputs are not reserved in full and the next tokens do not fit, who came last loses its memory and waits in
        front to be computed again. Whether anyone did."""
        lost = False
        while self.serving.reserved_share < 1 and len(rank.running) > 1 and self._spare(rank) < 1:
            place = max(range(len(rank.running)), key=lambda k: rank.running[k][1])
            end, _, request = rank.running.pop(place)
            heapq.heapify(rank.running)
            left = max(end - self.decoded, 1.0)
            rank.context -= request.longest - left
            rank.held -= request.longest
            request.done, request.again = 0, math.floor(request.osl - left)
            rank.waiting.appendleft(request)
            lost = True
        return lost

    def _spare(self, rank: _Rank) -> float:
        """Decode steps until a rank's memory is full."""
        return (self.room - rank.kept(0.0)) / (self.gain * len(rank.running))

    def _pick(self, rank: _Rank, full: bool) -> list[tuple[Request, int]]:
        """Prompts (and how much of each) that fit the next step's budget and the memory; no new ones where it is `full`."""
        if self.role == "decode" or not rank.waiting:
            return []
        left = self.serving.budget_tokens - (len(rank.running) if self.serving.mixed else 0)
        found: list[tuple[Request, int]] = []
        while rank.waiting and left > 0:
            request = rank.waiting[0]
            need = request.prompt - request.done
            if not request.done:
                if full or 0 < self.serving.running <= len(rank.running) + len(found):
                    break
                if not self._fits(rank, request) and (rank.running or found):
                    break
                if not self.serving.chunks and need > left and found:
                    break
            take = need if not self.serving.chunks else min(need, left)
            found.append((request, take))
            left -= take
            if not request.done:
                rank.held += request.longest
                rank.filling += request.prompt
            request.done += take
            if request.done < request.prompt:
                break
            rank.waiting.popleft()
        return found

    def _prompt_step(self, now: float, picked: Sequence[list[tuple[Request, int]]]) -> tuple[float, list[Request], list[Request]]:
        mixed = self.serving.mixed
        tokens = [float(sum(take for _, take in found)) for found in picked]
        pairs = [sum(take * (r.done - take / 2) for r, take in found) for found in picked]
        depth = [p / t if t else 0.0 for p, t in zip(pairs, tokens, strict=True)]
        n = [len(rank.running) if mixed else 0 for rank in self.ranks]
        context = [rank.context if mixed else 0.0 for rank in self.ranks]
        now += self.times.ranks_s(n, context, tokens, depth)
        self.next_poll = self.steps  # SGLang's interval counts decode steps; after prompts it looks at once
        ended = self._advance(1, now) if mixed and any(n) else []
        first = []
        for rank, found in zip(self.ranks, picked, strict=True):
            for request, _ in found:
                if request.done >= request.prompt:
                    rank.filling -= request.prompt
                    if not request.again:
                        first.append(request)
                    if self.role == "prefill":
                        rank.held -= request.longest
                        self.load -= 1
                    else:
                        self._run(rank, request)
        return now, first, ended

    def _decode_run(self, now: float, until: float) -> tuple[float, list[Request], list[Request]]:
        """Decode steps in which nothing changes, priced at the middle of the run."""
        ends = [rank.running[0][0] for rank in self.ranks if rank.running]
        if not ends:
            return until, [], []
        steps = max(1, math.ceil((min(ends) - self.decoded) / self.gain - 1e-9))
        if self.unseen:
            look = max(self.next_poll, self.held_since + self.patience if self.held_since >= 0 else 0)
            steps = max(1, min(steps, look - self.steps))
        if self.serving.reserved_share < 1:
            spare = min(self._spare(rank) for rank in self.ranks if rank.running)  # without end where memory was not known
            steps = max(1, math.floor(min(float(steps), spare)))
        step_s = self._decode_s(steps)
        if now + steps * step_s > until > now:
            steps = max(1, min(steps, math.ceil((until - now) / step_s)))
            step_s = self._decode_s(steps)
        now += steps * step_s
        return now, [], self._advance(steps, now)

    def _decode_s(self, steps: int) -> float:
        """Seconds of the middle one of so many decode steps."""
        grown = self.gain * (steps - 1) / 2
        if len(self.ranks) == 1:
            rank = self.ranks[0]
            n = len(rank.running)
            return self.times.decode_s(n, rank.context + n * grown)
        counts = [len(rank.running) for rank in self.ranks]
        none = [0.0] * len(counts)
        context = [rank.context + k * grown for rank, k in zip(self.ranks, counts, strict=True)]
        return self.times.ranks_s(counts, context, none, none)

    def _advance(self, steps: int, now: float) -> list[Request]:
        """All sequences gain `steps` tokens; those that reach their length leave."""
        self.decoded += steps * self.gain
        self.steps += steps
        ended = []
        for rank in self.ranks:
            rank.context += steps * self.gain * len(rank.running)
            while rank.running and rank.running[0][0] <= self.decoded + 1e-9:
                request = heapq.heappop(rank.running)[2]
                request.end_s = now
                rank.context = max(0.0, rank.context - request.longest) if rank.running else 0.0
                rank.held -= request.longest
                self.load -= 1
                ended.append(request)
        return ended


@dataclass(frozen=True)
class Loop:
    """What happened to the counted requests, means weighted as the whole test would be."""

    ttft_s: float
    tpot_s: float
    requests: int
    end_s: float


def run_loop(entry: Sequence[Worker], decode: Sequence[Worker], concurrency: int, lengths: Callable[[int], tuple[int, int]], *,
             frontend_s: float, handover_s: Callable[[int], float], waves: int = 10, simulated: int = 4) -> Loop:
    """Serve a closed loop with `entry` workers (and `decode` workers where prompts are computed apart).

    `waves` requests a user are sent in the test, all users at once at first; of more than `simulated`, the first and the last
    wave stand for themselves and those between for the rest.
    """
    kept = min(waves, simulated)
    total = kept * concurrency
    requests: list[Request] = []
    arrivals: list[tuple[float, int, Request, bool]] = []

    def send(now: float) -> None:
        if len(requests) < total:
            request = Request(len(requests), now, *lengths(len(requests)))
            requests.append(request)
            heapq.heappush(arrivals, (now + frontend_s / 2, request.number, request, False))

    for _ in range(concurrency):
        send(0.0)
    workers = [*entry, *decode]
    clock = [0.0] * len(workers)
    left = total
    while left:
        i, at = -1, math.inf  # the first of the busy workers that are free soonest
        for k, worker in enumerate(workers):
            if worker.load and clock[k] < at:
                i, at = k, clock[k]
        if arrivals and arrivals[0][0] <= at:
            _deliver(arrivals, entry, decode, clock)
            continue
        clock[i], first, ended = workers[i].step(at, arrivals[0][0] if arrivals else math.inf)
        for request in first:
            request.first_s = clock[i]
            if decode:
                heapq.heappush(arrivals, (clock[i] + handover_s(request.isl), request.number, request, True))
        for request in ended:
            left -= 1
            send(request.end_s)
    return _summary(requests, concurrency, waves, kept, frontend_s)


def _deliver(arrivals: list[tuple[float, int, Request, bool]], entry: Sequence[Worker], decode: Sequence[Worker],
             clock: list[float]) -> None:
    """Hand the next arrival to the least loaded worker of its stage; an idle worker begins then."""
    now, _, request, computed = heapq.heappop(arrivals)
    pool, start = (decode, len(entry)) if computed else (entry, 0)
    place = min(range(len(pool)), key=lambda k: pool[k].load)
    if not pool[place].busy:
        clock[start + place] = max(clock[start + place], now)
    pool[place].send(request)


def _summary(requests: list[Request], concurrency: int, waves: int, kept: int, frontend_s: float) -> Loop:
    ttft = np.array([r.first_s - r.sent_s for r in requests]) + frontend_s / 2
    tpot = np.array([(r.end_s - r.first_s) / max(r.osl - 1, 1) for r in requests])
    weight = np.ones(len(requests))
    if kept >= 3:
        weight[concurrency:-concurrency] = (waves - 2) / (kept - 2)
    return Loop(float(np.average(ttft, weights=weight)), float(np.average(tpot, weights=weight)), len(requests),
                max(r.end_s for r in requests))
