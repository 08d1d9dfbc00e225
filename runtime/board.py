"""A small shared file on which every rank notes its phase and that it is alive; it outlives a killed rank."""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

PHASES = ("start", "load", "idle", "schedule", "wait", "embed", "attention", "dense_ffn", "gate", "dispatch", "experts",
          "combine", "shared_experts", "head", "sample", "draft", "book", "done")
_CODE = {name: code for code, name in enumerate(PHASES)}
_ROW = struct.Struct("<II")  # phase, beats


class Board:
    """One row a rank. Writers touch only their own row."""

    def __init__(self, path: Path, world: int, *, create: bool = False) -> None:
        if create:
            path.write_bytes(bytes(_ROW.size * world))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), _ROW.size * world)

    def mark(self, rank: int, phase: str) -> None:
        struct.pack_into("<I", self._map, _ROW.size * rank, _CODE[phase])

    def beat(self, rank: int) -> None:
        beats = struct.unpack_from("<I", self._map, _ROW.size * rank + 4)[0]
        struct.pack_into("<I", self._map, _ROW.size * rank + 4, (beats + 1) & 0xFFFFFFFF)

    def read(self, rank: int) -> tuple[str, int]:
        """(phase, heart beats so far) of a rank."""
        code, beats = _ROW.unpack_from(self._map, _ROW.size * rank)
        return PHASES[code], beats

    def close(self) -> None:
        self._map.close()
