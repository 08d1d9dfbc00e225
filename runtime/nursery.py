"""Ranks on CPUs are born here: a process that has imported all that a rank needs, and forks.

Importing torch takes seconds, more on a busy machine; a fork takes milliseconds. So engines start sooner, and a rank that is
replaced after a loss is there at once. One nursery serves every engine of a process and ends with it. It is asked over
pipes, one JSON line a question and one an answer:

    {"briefing": path, "env": {...}, "log": path}   ->  {"pid": number}
    {"ended": pid}                                  ->  {"code": exit code}, once the child is seen to have ended

A child stays a zombie until its end is asked after: its process id names nothing else meanwhile. Ranks on GPUs start afresh:
nothing of CUDA is meant to be forked.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import select
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from functools import cache
from typing import Any, NoReturn

Message = dict[str, Any]
_READ_EARLY = ("PYTHON", "LD_", "OMP_", "MKL_", "OPENBLAS_", "TORCH", "PYTORCH", "CUDA")
"""Variables that are read when modules are imported: a nursery is good only for those it began with."""
UNKNOWN = 255
"""Exit code of a child whose nursery ended before it was asked."""


class Forked:
    """A child, as subprocess.Popen would show it; `ended` asks the nursery for its exit code."""

    def __init__(self, pid: int, ended: Callable[[int], int]) -> None:
        self.pid, self._ended = pid, ended
        self._code: int | None = None
        self._lock = threading.Lock()
        self._handle = os.pidfd_open(pid)

    def __del__(self) -> None:
        os.close(self._handle)

    def poll(self) -> int | None:
        """The exit code, a negative signal for one that was killed; None while it lives."""
        return self._look(0)

    def wait(self) -> int:
        """Wait for its end."""
        code = None
        while code is None:
            code = self._look(None)
        return code

    def send_signal(self, how: int) -> None:
        with self._lock:
            if self._code is None:
                os.kill(self.pid, how)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _look(self, timeout_ms: int | None) -> int | None:
        if self._code is None:
            watched = select.poll()
            watched.register(self._handle, select.POLLIN)
            if watched.poll(timeout_ms):
                with self._lock:
                    self._code = self._ended(self.pid) if self._code is None else self._code
        return self._code


class Nursery:
    """The asking end."""

    def __init__(self, env: dict[str, str]) -> None:
        self._lock = threading.Lock()
        self._process = subprocess.Popen([sys.executable, "-m", "runtime.nursery"], env=env,
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        atexit.register(self.close)

    def wait(self) -> None:
        """Until it has imported what it needs, or ended."""
        self._ask({})

    def fork(self, briefing: str, env: dict[str, str], log: str) -> Forked:
        """A new rank. Raises OSError when there is none."""
        answer = self._ask({"briefing": briefing, "env": env, "log": log})
        if "pid" not in answer:
            raise OSError(answer.get("error", "the nursery has ended"))
        return Forked(answer["pid"], self._code)

    @property
    def lives(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        """End it; children live on."""
        with self._lock:
            for pipe in (self._process.stdin, self._process.stdout):
                with contextlib.suppress(OSError):
                    if pipe is not None:
                        pipe.close()
            self._process.kill()
            self._process.wait()

    def _code(self, pid: int) -> int:
        """The exit code of a child that has ended, after which its process id is free again."""
        return int(self._ask({"ended": pid}).get("code", UNKNOWN))

    def _ask(self, question: Message) -> Message:
        """The answer; an empty one from a nursery that has ended."""
        to, from_ = self._process.stdin, self._process.stdout
        assert to is not None and from_ is not None
        with self._lock:
            try:
                to.write(json.dumps(question) + "\n")
                to.flush()
                line = from_.readline()
            except (OSError, ValueError):  # a broken or a closed pipe
                line = ""
        return json.loads(line) if line else {}


_ours: dict[frozenset[tuple[str, str]], Nursery] = {}
_guard = threading.Lock()


def nursery(env: dict[str, str]) -> Nursery:
    """The nursery for ranks with this environment, started when there is none. Raises OSError where the system cannot watch
    children of another process."""
    early = frozenset((name, value) for name, value in env.items() if name.startswith(_READ_EARLY))
    with _guard:
        _can_watch()
        if early not in _ours or not _ours[early].lives:
            _ours[early] = Nursery(env)
        return _ours[early]


@cache
def _can_watch() -> None:
    os.close(os.pidfd_open(os.getpid()))


def main() -> None:
    """Import, then answer until nobody asks any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the front end decides
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever else is said goes where errors go
    import runtime.worker  # noqa: F401 - what this is all about

    gc.collect()
    gc.freeze()  # pages that no collection touches stay shared with children
    for line in sys.stdin:
        try:
            answer = _answer(json.loads(line), answers.fileno())
        except OSError as error:
            answer = {"error": str(error)}
        answers.write(json.dumps(answer) + "\n")


def _answer(question: Message, answers: int) -> Message:
    if "ended" in question:
        return {"code": os.waitstatus_to_exitcode(os.waitpid(question["ended"], 0)[1])}
    if "briefing" not in question:
        return {}
    pid = os.fork()
    if pid == 0:
        os.close(answers)
        _be_rank(question)
    return {"pid": pid}


def _be_rank(order: Message) -> NoReturn:
    """What a new process would do."""
    try:
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(source, target)
        os.environ.clear()
        os.environ.update(order["env"])
        sys.argv[1:] = [order["briefing"]]
        from runtime.worker import main as work

        work()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


if __name__ == "__main__":
    main()
