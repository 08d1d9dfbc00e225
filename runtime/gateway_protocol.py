"""uvicorn's HTTP protocol with a limit on how long a connection may take to send its request's headers.

uvicorn times idle connections only after their first response; without this, clients that connect and send nothing,
or a byte at a time, hold sockets for ever.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol


class TimedProtocol(H11Protocol):
    """Closes a connection whose first request has not begun within the keep-alive timeout."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._first_request = self.loop.call_later(self.timeout_keep_alive, self._close_if_silent)

    def connection_lost(self, exc: Exception | None) -> None:
        self._first_request.cancel()
        super().connection_lost(exc)

    def _close_if_silent(self, *_: Any) -> None:
        if self.cycle is None and not self.transport.is_closing():
            self.transport.close()
