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
_ROW = struct.Struct("<IIIII")  # phase, beats, faults fired, phases begun, whether it waits for others


class Board:
    """One row a rank. Writers touch only their own row. `rows` makes a new board; without it there must be one."""

    def __init__(self, path: Path, rows: int | None = None) -> None:
        if rows is not None:
            path.write_bytes(bytes(_ROW.size * rows))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)

    def mark(self, rank: int, phase: str) -> None:
        struct.pack_into("<I", self._map, _ROW.size * rank, _CODE[phase])
        self._count(rank, 12)

    def beat(self, rank: int, *, waits: bool = False) -> None:
        """A sign of life; `waits`: in a collective."""
        struct.pack_into("<I", self._map, _ROW.size * rank + 16, waits)
        self._count(rank, 4)

    def fire(self, rank: int) -> None:
        """Note that a fault is about to strike."""
        self._count(rank, 8)

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
        self._map.close()

    def _count(self, rank: int, offset: int) -> None:
        at = _ROW.size * rank + offset
        struct.pack_into("<I", self._map, at, (struct.unpack_from("<I", self._map, at)[0] + 1) & 0xFFFFFFFF)
