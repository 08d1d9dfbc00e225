"""Faults on purpose: a rank kills, stops or upsets itself at a named point, and leaves proof that it did.

A fault is `RANK:POINT:HOW[:NTH]`, several are separated by commas: `1:dispatch:kill:3` kills rank 1 when it comes to its
third dispatch. Points: `prefill` and `decode` (a step with, or without, prompt tokens begins), `migration` (weights are
about to be exchanged), and every phase that ranks note on the board (`idle`, `attention`, `dispatch`, `combine`, ...).
How: `kill` (SIGKILL), `stop` (SIGSTOP), `raise`, or `hang` (no more work is done, but the heart beats). The proof is a count
on the board, written before the blow.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass

from runtime.board import PHASES, Board
from twin.spec.errors import SpecError

POINTS = ("prefill", "decode", "migration", *PHASES)
HOW = ("kill", "stop", "raise", "hang")


class InjectedFault(RuntimeError):
    """What a fault of the kind `raise` raises."""


@dataclass(frozen=True)
class Fault:
    """The `nth` (from 1) time that rank `rank` comes to `point`, `how` happens to it."""

    rank: int
    point: str
    how: str
    nth: int = 1


def parse(text: str) -> list[Fault]:
    """Faults from their notation. Raises SpecError for what is none."""
    return [_parse(part.strip()) for part in text.split(",") if part.strip()]


def _parse(part: str) -> Fault:
    words = part.split(":")
    numbers = [words[0], *words[3:]]
    if len(words) not in (3, 4) or not all(w.isdecimal() for w in numbers) or words[1] not in POINTS or words[2] not in HOW:
        raise SpecError(f"{part[:60]!r} is no fault", field="faults", expected="RANK:POINT:HOW[:NTH]",
                        hint=f"points: {', '.join(POINTS)}; how: {', '.join(HOW)}")
    return Fault(int(words[0]), words[1], words[2], int(numbers[1]) if len(numbers) > 1 else 1)


class Injector:
    """The faults of one process. Those that fired before this process was started do not come again."""

    def __init__(self, faults: list[Fault], rank: int, board: Board) -> None:
        self._board, self._rank = board, rank
        self._left = [f for f in faults if f.rank == rank][board.fired(rank):]
        self._seen: dict[str, int] = {}

    def at(self, point: str) -> None:
        """Come to a point; may not return."""
        if not self._left:
            return
        seen = self._seen[point] = self._seen.get(point, 0) + 1
        fault = self._left[0]
        if fault.point != point or seen < fault.nth:
            return
        self._left.pop(0)
        self._board.fire(self._rank)
        if fault.how == "raise":
            raise InjectedFault(f"injected at {point}")
        while fault.how == "hang":
            time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGKILL if fault.how == "kill" else signal.SIGSTOP)
