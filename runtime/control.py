"""The control channel: JSON lines over a Unix socket between the front end and every rank.

A rank's reader thread keeps the heart beating and ends the process when the front end is gone, whatever the main thread
waits for.
"""

from __future__ import annotations

import json
import os
import queue
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runtime.board import Board
from runtime.comm.group import waiting

Message = dict[str, Any]
BEAT_S = 0.25
ORPHANED = 3
"""Exit code of a rank whose front end vanished."""


class Control:
    """A rank's end of the channel. Messages carry the process's seat and the formation that it belongs to. `interrupt` is
    called from the reader thread when the present formation is over, whatever the main thread waits for."""

    def __init__(self, path: Path, seat: int, board: Board, interrupt: Callable[[], None] = lambda: None) -> None:
        self.seat, self._board, self._interrupt = seat, board, interrupt
        self.formation = 0
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.connect(str(path))
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self.closing = False
        self.send({"ev": "hello", "pid": os.getpid()})
        threading.Thread(target=self._read, daemon=True).start()
        threading.Thread(target=self._beat, daemon=True).start()

    def send(self, message: Message) -> None:
        """Send one message; safe from any thread."""
        line = json.dumps({"seat": self.seat, "formation": self.formation, **message}, separators=(",", ":")).encode() + b"\n"
        with self._lock:
            self._socket.sendall(line)

    def post(self, message: Message) -> None:
        """Put a message into this rank's own inbox (from its helper threads)."""
        self._inbox.put(message)

    def drain(self, *, wait: bool) -> list[Message]:
        """All messages that came; with `wait`, at least one."""
        messages = [self._inbox.get()] if wait else []
        while not self._inbox.empty():
            messages.append(self._inbox.get())
        return messages

    def order(self, patience_s: float) -> Message | None:
        """The next order to re-form later than this formation, or to meet in this one; whatever else comes is of no use
        any more. None when none comes in time."""
        until = time.monotonic() + patience_s
        while True:
            try:
                message = self._inbox.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                return None
            newer = message.get("formation", -1) - self.formation
            if (message["op"] == "reform" and newer > 0) or (message["op"] == "meet" and newer == 0):
                return message

    def _read(self) -> None:
        with self._socket.makefile("rb") as lines:
            for line in lines:
                message = json.loads(line)
                self._inbox.put(message)
                if message["op"] == "reform" and message["formation"] > self.formation:
                    self._interrupt()
        if not self.closing:
            os._exit(ORPHANED)

    def _beat(self) -> None:
        stop = threading.Event()
        while not stop.wait(BEAT_S):
            self._board.beat(self.seat, waits=waiting())
