"""Going on without ranks that were lost: the front end's side.

The dead are reaped and the stuck are killed, which closes their connections and so frees whoever waits for them. Those
that are left hear their place in the next formation, leave their old groups, say that they are there, and, once all are
there, meet in new groups under a new prefix of the store, load the experts that they lack, and say that they are ready.
A rank lost meanwhile begins the next attempt.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from runtime.formation import Formation, reform
from runtime.launch import RankProcesses
from runtime.options import EngineOptions
from runtime.watch import Loss, Watch
from twin.spec.errors import EptwinError, RankFailed, SpecError
from twin.spec.model import ModelSpec

Message = dict[str, Any]
MAX_ATTEMPTS = 8
"""Formations in a row in which nobody got a token: what breaks every one of them will break the next."""


@dataclass(frozen=True)
class Recovered:
    """One re-forming, on the machine's monotonic clock: when the front end noticed, when the last survivor had heard, when
    all were ready. `world` ranks serve now."""

    cause: str
    lost: tuple[int, ...]
    noticed: float
    heard: float
    ready: float
    world: int


class Recovery:
    """Re-forms as often as it must. `send(seat, message)` reaches a process."""

    def __init__(self, processes: RankProcesses, watch: Watch, model: ModelSpec, options: EngineOptions,
                 send: Callable[[int, Message], None]) -> None:
        self._processes, self._watch, self._model, self._options, self._send = processes, watch, model, options, send
        self._losses: list[Loss] = []
        self._here: set[int] = set()
        self._ready: dict[int, Message] = {}
        self._formation: Formation | None = None
        self._news = asyncio.Event()
        self._fruitless = 0

    def note(self, loss: Loss) -> None:
        """Something was lost (again)."""
        self._losses.append(loss)
        self._news.set()

    def hear(self, seat: int, message: Message) -> None:
        """A rank is there, or ready. One that was late for its formation is told of the one that is formed now."""
        now = self._formation
        if now is None or seat not in now.seats:
            return
        if message["formation"] != now.number:
            self._order(now, seat)
        elif message["ev"] == "here":
            self._here.add(seat)
        else:
            self._watch.ready(seat)
            self._ready[seat] = message
        self._news.set()

    def progressed(self) -> None:
        """A formation gave a token."""
        self._fruitless = 0

    async def run(self, formation: Formation, begun: Callable[[Formation], None]) -> tuple[dict[int, Message], Recovered]:
        """Form until a formation serves; what its ranks said as they were ready (by rank), and what it took. `begun` hears
        of every attempt. Raises RankFailed, or SpecError for bad input, when there is no way on."""
        noticed, cause = time.monotonic(), str(self._losses[0].cause)
        lost: set[int] = set()
        while self._losses:
            losses, self._losses = self._losses, []
            now = {seat for loss in losses for seat in loss.lost}
            lost |= now
            before, formation = formation, self._next(formation, losses, now)
            begun(formation)
            await self._attempt(before, formation, now)
        ready = {formation.seats.index(seat): message for seat, message in self._ready.items()}
        heard = max([noticed, *(message["heard_at"] for message in ready.values())])
        return ready, Recovered(cause, tuple(sorted(lost)), noticed, heard, time.monotonic(), len(formation.seats))

    def _next(self, formation: Formation, losses: list[Loss], lost: set[int]) -> Formation:
        self._fruitless += 1
        for loss in losses:
            if isinstance(loss.cause, SpecError) or self._fruitless > MAX_ATTEMPTS:
                raise loss.cause
        return reform(formation, lost, self._model)

    async def _attempt(self, before: Formation, formation: Formation, lost: set[int]) -> None:
        """Form; returns when all are ready or more is lost."""
        self._formation, self._here, self._ready = formation, set(), {}
        seats = set(formation.seats)
        fresh = lost & seats
        self._watch.expect(seats, fresh)
        await asyncio.to_thread(self._processes.kill, lost | (set(before.seats) - seats))
        self._processes.replace(formation, fresh)
        for seat in seats - fresh:
            self._order(formation, seat)
        if await self._all(self._here, seats):
            for seat in seats:
                self._send(seat, {"op": "meet", "formation": formation.number})
            await self._all(self._ready, seats)

    async def _all(self, heard: Collection[int], seats: set[int]) -> bool:
        """Wait until all have spoken; False when something was lost instead. A rank that is silent for too long is lost."""
        until = time.monotonic() + self._options.start_timeout_s
        while not self._losses and not seats <= set(heard):
            self._news.clear()
            try:
                async with asyncio.timeout_at(asyncio.get_running_loop().time() + until - time.monotonic()):
                    await self._news.wait()
            except TimeoutError:
                silent = seats - set(heard)
                text = f"ranks {sorted(silent)} did not re-form in {self._options.start_timeout_s:g} s"
                self.note(Loss(RankFailed(text, rank=min(silent), where="reform"), frozenset(silent)))
        return not self._losses

    def _order(self, formation: Formation, seat: int) -> None:
        self._send(seat, {"op": "reform", "formation": formation.number, "plan": formation.plan.model_dump_json(),
                          "rank": formation.seats.index(seat), "world": len(formation.seats)})


def fresh(failure: EptwinError) -> EptwinError:
    """The same failure as a new object: one that is raised many times would gather the tracebacks of all."""
    again = type(failure).__new__(type(failure), *failure.args)
    again.__dict__.update(failure.__dict__)
    return again
