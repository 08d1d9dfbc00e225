"""Dispatch and combine that return while their messages travel, so that a rank computes something else meanwhile.

What is started gives a function that waits and returns what arrived. Backends that can do so start their own messages
(`begin_dispatch`, `begin_combine`); on a GPU any backend's work goes to a stream beside the one that computes. Elsewhere
everything has happened when the call returns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from runtime.comm.experts import Dispatched, ExpertComm


class Overlap:
    """One expert backend. Ranks must start and wait in the same order; what is started must be waited for."""

    def __init__(self, comm: ExpertComm) -> None:
        self.comm = comm
        self._stream: torch.cuda.Stream | None = None

    def dispatch(self, x_TH: torch.Tensor, slots_TK: torch.Tensor, weights_TK: torch.Tensor,
                 capacity: int) -> Callable[[], Dispatched]:
        """`ExpertComm.dispatch`, begun."""
        return self._begin("dispatch", x_TH, slots_TK, weights_TK, capacity)

    def combine(self, y_NH: torch.Tensor, arrived: Dispatched) -> Callable[[], torch.Tensor]:
        """`ExpertComm.combine`, begun."""
        return self._begin("combine", y_NH, arrived)

    def _begin(self, what: str, x: torch.Tensor, *rest: Any) -> Callable[[], Any]:
        if not getattr(self.comm, "moves", True):  # everything is here: nothing to wait for
            value = getattr(self.comm, what)(x, *rest)
            return lambda: value
        if x.is_cuda:
            return self._aside(getattr(self.comm, what), x, *rest)
        begin: Callable[..., Callable[[], Any]] | None = getattr(self.comm, f"begin_{what}", None)
        if begin is not None:
            return begin(x, *rest)
        value = getattr(self.comm, what)(x, *rest)
        return lambda: value

    def _aside(self, call: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
        """Run on the side stream, after all that was queued so far; the caller's stream waits only when asked to."""
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        side = self._stream
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            value = call(*arguments)
        done = side.record_event()

        def wait() -> Any:
            here = torch.cuda.current_stream()
            here.wait_event(done)
            for tensor in (value,) if isinstance(value, torch.Tensor) else (value.x_NH, value.slots_NK, value.weights_NK):
                tensor.record_stream(here)
            del arguments_kept[:]
            return value

        arguments_kept = list(arguments)  # their memory must not be given away while the side stream reads it
        return wait
