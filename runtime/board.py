"""A small shared file on which every rank notes its phase, that it is alive, and faults that it inflicted on itself.

It outlives a killed rank."""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

PHASES = ("start", "load", "capture", "warm-up", "reform", "idle", "schedule", "wait", "graph", "embed", "attention",
          "dense_ffn", "gate", "dispatch", "experts", "combine", "shared_experts", "head", "sample", "draft", "book",
          "migrate", "done")
_CODE = {name: code for code, name in enumerate(PHASES)}
_ROW = struct.Struct("=IIIII")  # phase, beats, faults fired, phases begun, whether it waits for others
_FIELDS = 5


class Board:
    """One row a rank. Writers touch only their own row. `rows` makes a new board; without it there must be one."""

    def __init__(self, path: Path, rows: int | None = None) -> None:
        if rows is not None:
            path.write_bytes(bytes(_ROW.size * rows))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)
        self._words = memoryview(self._map).cast("I")  # marks are many: nothing is packed for one

    def mark(self, rank: int, phase: str) -> None:
        words, at = self._words, _FIELDS * rank
        words[at] = _CODE[phase]
        words[at + 3] = (words[at + 3] + 1) & 0xFFFFFFFF

    def beat(self, rank: int, *, waits: bool = False) -> None:
        """A sign of life; `waits`: in a collective."""
        self._words[_FIELDS * rank + 4] = waits
        self._count(rank, 1)

    def fire(self, rank: int) -> None:
        """Note that a fault is about to strike."""
        self._count(rank, 2)

    def fired(self, rank: int) -> int:
        """Faults that struck a rank so far."""
        return int(_ROW.unpack_from(self._map, _ROW.size * rank)[2])

    def read(self, rank: int) -> tuple[str, int]:
        """(phase, heart beats so far) of a rank."""
        code, beats, *_ = _ROW.unpack_from(self._map, _ROW.size * rank)
        return PHASES[code], beats

    def progress(self, rank: int) -> tuple[int, bool]:
        """(phases begun so far, whether it waited for others at its last heart beat) of a rank."""
        *_, begun, waits = _ROW.unpack_from(self._map, _ROW.size * rank)
        return begun, bool(waits)

    def close(self) -> None:
        self._words.release()
        self._map.close()

    def _count(self, rank: int, field: int) -> None:
        at = _FIELDS * rank + field
        self._words[at] = (self._words[at] + 1) & 0xFFFFFFFF
