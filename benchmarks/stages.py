"""How far processes that wait for one another have come, so that a run that is cut off tells where.

A process notes each stage that it begins in a file of its own. At the end of the budget it leaves the calls that it was in
(written by a thread that needs no turn of Python's) and calls off what its device waits for; who does not end then is killed.
"""

from __future__ import annotations

import faulthandler
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

_GRACE_S = 4.0
_FRAME = re.compile(r'^  File "(?P<file>[^"]*)", line (?P<line>\d+) in (?P<name>.*)$')


class Stages:
    """Of one process. `began` is the whole run's beginning on the machine's monotonic clock; rank 0 says each stage aloud. `look`
    says more of where the process is, asked from another thread at the end of the budget."""

    look: Callable[[], str] | None = None

    def __init__(self, folder: str, rank: int, began: float, budget_s: float) -> None:
        self._folder, self._rank, self._began, self._until = Path(folder), rank, began, began + budget_s
        self("imported")

    def __call__(self, stage: str) -> None:
        seconds = time.monotonic() - self._began
        (self._folder / f"stage{self._rank}").write_text(json.dumps([stage, seconds]), encoding="utf-8")
        if self._rank == 0:
            print(f"[{seconds:6.1f} s] {stage}", file=sys.stderr, flush=True)

    def end_in_time(self) -> None:
        """Leave the calls of all threads at the end of the budget, and then wait for other ranks' devices no more."""
        left = max(0.1, self._until - time.monotonic())
        file = (self._folder / f"calls{self._rank}").open("w", encoding="utf-8")  # open as long as the process lives
        faulthandler.dump_traceback_later(left, file=file)
        timer = threading.Timer(left + 1.0, self._give_up)
        timer.daemon = True
        timer.start()

    def _give_up(self) -> None:
        from runtime.comm.waiting import call_off

        try:
            if self.look is not None:
                (self._folder / f"more{self._rank}").write_text(self.look(), encoding="utf-8")
        finally:
            call_off()
            time.sleep(_GRACE_S)
            os._exit(1)  # should nobody be there to end it

    def ended(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        self("ended")


def wait_for(children: Sequence[BaseProcess], folder: str, began: float, budget_s: float) -> list[str]:
    """Until all have ended, one has failed or the budget is spent; none is left. What went wrong, a line each."""
    until = began + budget_s
    while any(c.is_alive() for c in children) and not any(c.exitcode for c in children) and time.monotonic() < until:
        time.sleep(0.05)
    failed = [rank for rank, child in enumerate(children) if child.exitcode]
    late = [rank for rank, child in enumerate(children) if child.is_alive()] if not failed else []
    grace = time.monotonic() + (_GRACE_S if late else 1.0)
    for child in children:
        child.join(max(0.0, grace - time.monotonic()))  # who waits for a rank that failed is ended with it
        if child.is_alive():
            child.kill()
            child.join()
    if late:
        return [f"{budget_s:g} s are over:", *(where(folder, rank) for rank in range(len(children)))]
    return [f"rank {', '.join(map(str, failed))} of {len(children)} failed (see above):",
            *(where(folder, rank) for rank in failed)] if failed else []


def where(folder: str, rank: int) -> str:
    """A rank's last stage, and the calls that its main thread was in, the innermost first."""
    try:
        stage, seconds = json.loads(Path(folder, f"stage{rank}").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"rank {rank}: not begun (starting Python, importing torch)"
    calls, more = (file.read_text(encoding="utf-8") if file.exists() else ""
                   for file in (Path(folder, f"calls{rank}"), Path(folder, f"more{rank}")))
    found = [_FRAME.match(line) for line in calls.rpartition("most recent call first")[2].splitlines()]
    frames = [f"{Path(m['file']).name}:{m['line']} {m['name']}" for m in found if m]
    return ", ".join((f"rank {rank}: {stage}, since {seconds:.1f} s", *([more] if more else []),
                      *([f"in {' < '.join(frames[:6])}"] if frames else [])))
