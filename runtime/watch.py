"""Watching ranks: which ones are lost, in what phase, and what they said."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from runtime.clock import ON_DEVICE
from runtime.launch import RankProcesses
from runtime.options import EngineOptions
from twin.spec.errors import EptwinError, RankFailed, SpecError

_PERIOD_S = 0.1
_SETTLE_S = 0.3
"""After the first sign of trouble, how long to gather others: survivors often complain before the dead are found."""
_CERTAIN_S = 0.05
"""The same when a process is known to be dead and the others go on without it."""
_MIN_SILENCE_S = 2.0
_RESTS = frozenset({"idle", "done"})
"""Phases that may last."""
_ASYNC = ON_DEVICE | {"sample"}
"""Phases in which the host of a GPU may wait for what the device does; there, devices tell who keeps them waiting."""


@dataclass(frozen=True)
class Loss:
    """What went wrong. `lost` are seats whose processes cannot be used any more; none when a rank raised an error of its own
    or nobody knows why ranks lost one another. `suspects` are the requests that a rank worked on as it raised its error."""

    cause: EptwinError
    lost: frozenset[int]
    suspects: tuple[int, ...] = ()


class Watch:
    """Looks at children, heart beats, progress and reports. The cause is, in this order: a rank killed by a signal or that
    ended by itself, a rank that raised an error of its own, a rank without heart beat, one that is stuck in its work or that
    others' devices waited for in vain, the first to complain about a peer.

    Every loss is told once; without `options.recover` the first ends the watch.
    """

    def __init__(self, processes: RankProcesses, options: EngineOptions, fail: Callable[[Loss], None]) -> None:
        self._processes, self._fail, self._recover = processes, fail, options.recover
        self._silence_s = max(options.timeout_s, _MIN_SILENCE_S)
        self._start_s = max(options.start_timeout_s, self._silence_s)
        self._seats = set(range(processes.world))
        self._busy = set(self._seats)
        self._reports: dict[int, dict[str, Any]] = {}
        self._beats: dict[int, tuple[int, float]] = {}
        self._stall_s = options.stall_s
        self._rests = _RESTS | (_ASYNC if options.device == "cuda" else frozenset())
        self._progress: dict[int, tuple[int, float]] = {}
        self._stopped = False
        self._trouble = asyncio.Event()

    def report(self, seat: int, message: dict[str, Any]) -> None:
        """A rank says that it failed."""
        self._reports[seat] = message
        self._trouble.set()

    def ready(self, seat: int) -> None:
        """A rank has set itself up: from now on its heart beats count."""
        self._busy.discard(seat)
        self._beats[seat] = (self._processes.board.read(seat)[1], time.monotonic())

    def expect(self, seats: set[int], fresh: set[int]) -> None:
        """Watch these seats, no others; the `fresh` ones have new processes, that take their time to start."""
        self._seats = set(seats)
        self._busy |= fresh
        self._progress = {}
        for seat in fresh:
            self._beats.pop(seat, None)
        self._reports = {}

    def stop(self) -> None:
        """Ranks that leave from now on are meant to."""
        self._stopped = True

    async def run(self) -> None:
        """Watch until stopped or until something fails for good."""
        while not self._stopped:
            try:
                async with asyncio.timeout(_PERIOD_S):
                    await self._trouble.wait()
            except TimeoutError:
                pass
            if self._stopped:
                return
            if self._reports or self._gone():
                await asyncio.sleep(_CERTAIN_S if self._recover and self._gone() else _SETTLE_S)
                self._trouble.clear()
                if not self._stopped and (self._reports or self._gone()):
                    found = self._loss()
                    self._seats -= found.lost
                    self._reports = {}
                    self._fail(found)
                    if not self._recover:
                        return

    def _exited(self) -> dict[int, int]:
        return {seat: code for seat, code in self._processes.exited().items() if seat in self._seats}

    def _silent(self) -> list[int]:
        """Ranks whose heart has not beaten for the timeout; one that sets itself up may be silent for longer."""
        now = time.monotonic()
        silent = []
        for seat in sorted(self._seats):
            beats = self._processes.board.read(seat)[1]
            if beats != self._beats.get(seat, (-1, 0.0))[0]:
                self._beats[seat] = (beats, now)
            elif now - self._beats[seat][1] > (self._start_s if seat in self._busy else self._silence_s):
                silent.append(seat)
        return silent

    def _stalled(self) -> list[int]:
        """Ranks whose heart beats but that have been in one phase for too long, and not because they wait for others."""
        now, stalled = time.monotonic(), []
        for seat in sorted(self._seats - self._busy):
            begun, waits = self._processes.board.progress(seat)
            was, since = self._progress.get(seat, (-1, now))
            if begun != was or waits or self._processes.board.read(seat)[0] in self._rests:
                self._progress[seat] = (begun, now)
            elif now - since > self._stall_s:
                stalled.append(seat)
        return stalled

    def _gone(self) -> set[int]:
        """Seats whose processes are of no use any more."""
        return {*self._exited(), *self._silent(), *self._stalled()}

    def _accused(self) -> list[int]:
        """Ranks that others' devices waited for in vain and that have not said anything themselves."""
        named = {seat for m in self._reports.values() for seat in m.get("missing", ())}
        return sorted((named & self._seats) - self._reports.keys())

    def _loss(self) -> Loss:
        lost = frozenset(self._gone()) | frozenset(self._accused())
        errors = {seat: m for seat, m in self._reports.items() if m["kind"] == "error" and seat not in lost}
        suspects = tuple(i for m in errors.values() for i in m.get("requests", ()))
        return Loss(self._cause(), lost, suspects)

    def _cause(self) -> EptwinError:
        exited = {rank: code for rank, code in self._exited().items() if rank not in self._reports}
        for rank, code in sorted(exited.items(), key=lambda item: item[1]):
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
            return self._failed(rank, how, self._processes.log_tail(rank) if code > 0 else "")
        errors = {rank: m for rank, m in self._reports.items() if m["kind"] == "error"}
        for rank, message in errors.items():
            if message["type"] == "SpecError":
                return SpecError(message["error"])
            return self._failed(rank, f"raised {message['type']}: {message['error']}", "", message["phase"])
        for rank in self._stale():
            return self._failed(rank, "stopped responding")
        for rank in (*self._stalled(), *self._accused()):
            return self._failed(rank, "is alive but got no further")
        rank, message = next(iter(self._reports.items()))
        return self._failed(rank, f"lost its peers: {message['error']}", "", message["phase"])

    def _stale(self) -> list[int]:
        """Ranks that have not said anything themselves and are the longest without a heart beat."""
        now = time.monotonic()
        self._silent()
        quiet = {seat: now - since for seat, (_, since) in self._beats.items()
                 if seat not in self._reports and seat in self._seats and seat not in self._busy}
        return sorted((seat for seat, seconds in quiet.items() if seconds > _MIN_SILENCE_S / 2), key=lambda s: -quiet[s])

    def _failed(self, rank: int, how: str, said: str = "", phase: str = "") -> RankFailed:
        phase = phase or self._processes.board.read(rank)[0]
        end = "the others go on without it" if self._recover else "the other ranks were ended"
        text = f"rank {rank} {how} in phase {phase}; {end}"
        return RankFailed(f"{text}\n{said}" if said else text, rank=rank, where=phase)
