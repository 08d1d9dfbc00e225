"""Watching ranks: which one failed, in what phase, and what it said; told once."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable
from typing import Any

from runtime.launch import RankProcesses
from runtime.options import EngineOptions
from twin.spec.errors import EptwinError, RankFailed, SpecError

_PERIOD_S = 0.1
_SETTLE_S = 0.3
"""After the first sign of trouble, how long to gather others: survivors often complain before the dead are found."""
_MIN_SILENCE_S = 2.0


class Watch:
    """Looks at children, heart beats and reports. The cause is, in this order: a rank killed by a signal or that ended by
    itself, a rank that raised an error of its own, a rank without heart beat, the first to complain about a peer."""

    def __init__(self, processes: RankProcesses, options: EngineOptions, fail: Callable[[EptwinError], None]) -> None:
        self._processes, self._fail = processes, fail
        self._silence_s = max(options.timeout_s, _MIN_SILENCE_S)
        self._reports: dict[int, dict[str, Any]] = {}
        self._beats: dict[int, tuple[int, float]] = {}
        self._stopped = False
        self._trouble = asyncio.Event()

    def report(self, rank: int, message: dict[str, Any]) -> None:
        """A rank says that it failed."""
        self._reports[rank] = message
        self._trouble.set()

    def stop(self) -> None:
        """Ranks that leave from now on are meant to."""
        self._stopped = True

    async def run(self) -> None:
        """Watch until stopped or until something fails."""
        while not self._stopped:
            try:
                async with asyncio.timeout(_PERIOD_S):
                    await self._trouble.wait()
            except TimeoutError:
                pass
            if self._stopped:
                return
            if self._reports or self._processes.exited() or self._silent():
                await asyncio.sleep(_SETTLE_S)
                if not self._stopped:
                    self._fail(self._cause())
                return

    def _silent(self) -> list[int]:
        """Ranks whose heart has not beaten for the timeout."""
        now = time.monotonic()
        silent = []
        for rank in range(self._processes.world):
            beats = self._processes.board.read(rank)[1]
            if beats != self._beats.get(rank, (-1, 0.0))[0]:
                self._beats[rank] = (beats, now)
            elif beats and now - self._beats[rank][1] > self._silence_s:  # before the first beat it is still importing
                silent.append(rank)
        return silent

    def _cause(self) -> EptwinError:
        exited = {rank: code for rank, code in self._processes.exited().items() if rank not in self._reports}
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
        rank, message = next(iter(self._reports.items()))
        return self._failed(rank, f"lost its peers: {message['error']}", "", message["phase"])

    def _stale(self) -> list[int]:
        """Ranks that have not said anything themselves and are the longest without a heart beat."""
        now = time.monotonic()
        self._silent()
        quiet = {rank: now - since for rank, (_, since) in self._beats.items() if rank not in self._reports}
        return sorted((rank for rank, seconds in quiet.items() if seconds > _MIN_SILENCE_S / 2), key=lambda r: -quiet[r])

    def _failed(self, rank: int, how: str, said: str = "", phase: str = "") -> RankFailed:
        phase = phase or self._processes.board.read(rank)[0]
        text = f"rank {rank} {how} in phase {phase}; the other ranks were ended"
        return RankFailed(f"{text}\n{said}" if said else text, rank=rank, where=phase)
