"""Kernels that are compiled while requests wait: every one is counted and named in the log.

A kernel of Triton's is compiled again for every new combination of its compile-time arguments, of formats and of what
Triton specialises on (an integer of one or divisible by sixteen, an address divisible by sixteen), which takes a second
or so. `runtime.warmup` makes these happen before the first request. Without triton nothing is ever counted.
"""

from __future__ import annotations

import logging
from typing import Any

log = logging.getLogger("eptwin.compiles")


class Compiles:
    """Counts this process's compilations. `late` are the kernels compiled since `started`, by name."""

    def __init__(self) -> None:
        self.total = 0
        self.late: list[str] = []
        self._counts_late = self._listening = False

    def listen(self) -> None:
        """Be told by triton, from now on; whoever listened before is told as well."""
        if self._listening:
            return
        from triton import knobs  # a CPU has none of it

        self._listening = True
        before = knobs.runtime.jit_post_compile_hook

        def hook(**what: Any) -> Any:
            self.count(getattr(what.get("fn"), "name", "a kernel"))
            return before(**what) if before is not None else None

        knobs.runtime.jit_post_compile_hook = hook

    def starting(self) -> None:
        """What is compiled from now on is part of a start (of this process, or of another formation)."""
        self._counts_late = False

    def started(self) -> None:
        """What is compiled from now on delays a request."""
        self._counts_late = True

    def count(self, kernel: str) -> None:
        """A kernel was compiled."""
        self.total += 1
        if self._counts_late:
            self.late.append(kernel)
            log.warning("%s was compiled while requests waited; the warm-up should have met it", kernel)


compiles = Compiles()
