"""Records of steps: kept as they are on the rank, sent many at a time as rows of one width, read on the front end when
somebody asks.

A rank takes hundreds of steps a second, and after each of them all of this code has left the processor's caches. So a step
only ends its times; what it did is written down while the next step runs on the device, packing waits for a batch, and names,
roundings and dictionaries are the reader's. A batch leaves once it is full or `BATCH_S` old, while the device is busy too, and
whenever the rank has nothing left to do; a rank that is killed takes with it the rows since its last batch.
"""

from __future__ import annotations

import base64
from array import array
from collections.abc import Callable, Mapping, Sequence
from itertools import repeat
from operator import attrgetter
from typing import Any

from runtime.batch import Segment
from runtime.targets import Target
from twin.policy.steps import StepPlan

Record = dict[str, Any]
Did = tuple[int, int, int, int, int, int, float, float, Sequence[int], Sequence[int]]
"""Decodes and their context, prompts, their tokens, all tokens, tokens made; the prompts' context as the cost model counts it
(StepBatch), the share of KV blocks in use; drafts and those that stood, by place."""
BATCH_ROWS = 64
BATCH_S = 0.5
_TIMES = ("start", "end", "cpu_s")
_COUNTS = ("round", "decode_seqs", "decode_context", "prefill_seqs", "prefill_tokens", "tokens", "made")
_REALS = ("prefill_context", "kv")
_HEAD = len(_TIMES) + len(_COUNTS) + len(_REALS)
_ABSENT = float("nan")  # of a phase that a step did not have
_start = attrgetter("start")


def did(plan: StepPlan, segments: Sequence[Segment], made: int, kv: float, drafted: Sequence[int], stood: Sequence[int]) -> Did:
    """What a step did for its rank's own requests."""
    decodes = len(plan.decode)
    if not plan.prefill:
        return decodes, sum(map(_start, segments)) + decodes, 0, 0, sum(plan.decode_tokens), made, 0.0, kv, drafted, stood
    context = sum(map(_start, segments[:decodes])) + decodes
    before = sum(len(s.token_ids) * (s.start + len(s.token_ids) / 2) for s in segments[decodes:])
    return decodes, context, len(plan.prefill), plan.prefill_tokens, plan.total_tokens, made, before, kv, drafted, stood


IDLE: Did = (0, 0, 0, 0, 0, 0, 0.0, 0.0, (), ())
"""Of a TP follower, and of a rank without work."""


class StepLog:
    """A rank's steps since the last batch."""

    def __init__(self, send: Callable[[Record], None]) -> None:
        self._send = send
        self._kept: list[tuple[float, float, float, int, Mapping[str, float], Did]] = []
        self._owed: Callable[[], None] | None = None

    def owe(self, write_down: Callable[[], None]) -> None:
        """A step that `write_down` will add, once the device is busy with the next one."""
        self.settle()
        self._owed = write_down

    def settle(self) -> None:
        """Add the step that is owed."""
        owed, self._owed = self._owed, None
        if owed is not None:
            owed()

    def add(self, start: float, end: float, cpu_s: float, number: int, parts: Mapping[str, float], what: Did) -> None:
        """Keep a step: times on the machine's monotonic clock, the round's number, seconds by phase."""
        self._kept.append((start, end, cpu_s, number, parts, what))

    def send_due(self) -> None:
        """Add the step that is owed, and send the batch if it is time; for when the device is busy."""
        self.settle()
        kept = self._kept
        if kept and (len(kept) >= BATCH_ROWS or kept[-1][1] - kept[0][0] >= BATCH_S):
            self.flush()

    def flush(self) -> None:
        """Send what there is."""
        self.settle()
        if not self._kept:
            return
        phases = list(dict.fromkeys(phase for *_, parts, _ in self._kept for phase in parts))
        places = max(len(what[-1]) for *_, what in self._kept)
        rows = array("d")
        for start, end, cpu_s, number, parts, (*amounts, drafted, stood) in self._kept:
            pad = (0,) * (places - len(drafted))
            rows.extend((start, end, cpu_s, number, *amounts, *map(parts.get, phases, repeat(_ABSENT)),
                         *drafted, *pad, *stood, *pad))
        self._kept.clear()
        self._send({"ev": "records", "phases": phases, "places": places, "rows": base64.b64encode(rows).decode()})


def unpack_rows(message: Record) -> list[Record]:
    """The steps of a batch."""
    phases, places, rows = message["phases"], message["places"], array("d", base64.b64decode(message["rows"]))
    first_draft = _HEAD + len(phases)
    width = first_draft + 2 * places
    found = []
    for at in range(0, len(rows), width):
        row = rows[at:at + width].tolist()
        times, counts, reals = row[:len(_TIMES)], map(int, row[len(_TIMES):_HEAD - len(_REALS)]), row[_HEAD - len(_REALS):_HEAD]
        drafted = [int(n) for n in row[first_draft:first_draft + places] if n]
        stood = [int(n) for n in row[first_draft + places:][:len(drafted)]]
        parts = {name: round(seconds, 7) for name, seconds in zip(phases, row[_HEAD:first_draft], strict=True) if seconds >= 0}
        found.append(dict(zip((*_TIMES, *_COUNTS, *_REALS), (*times, *counts, *reals), strict=True))
                     | {"parts": parts, "drafts": [drafted, stood]})
    return found


class StepRecords:
    """The front end's: `steps` of ranks that had work of their own, `others` of TP followers and of ranks without any, which
    took part in somebody's step. Batches stay as they came until one of the two is read."""

    def __init__(self) -> None:
        self._places: dict[tuple[int, int], Record] = {}
        self._came: list[Record] = []
        self._steps: list[Record] = []
        self._others: list[Record] = []

    def form(self, number: int, seats: Sequence[int], targets: Sequence[Target]) -> None:
        """Another formation begins: which process is what in it. Batches of earlier ones may still come."""
        for target in targets:
            for tp_rank, rank in enumerate(target.tp_ranks):
                self._places[number, seats[rank]] = {"pool": target.pool, "instance": target.instance, "dp_rank": target.dp_rank,
                                                     "rank": rank, "formation": number, "tp_rank": tp_rank}

    def hear(self, message: Record) -> None:
        """A batch came from a process."""
        if (message["formation"], message["seat"]) in self._places:
            self._came.append(message)

    def clear(self) -> None:
        """Forget all that came."""
        for kept in (self._came, self._steps, self._others):
            kept.clear()

    @property
    def steps(self) -> list[Record]:
        self._read()
        return self._steps

    @property
    def others(self) -> list[Record]:
        self._read()
        return self._others

    def _read(self) -> None:
        for message in self._came:
            place = self._places[message["formation"], message["seat"]]
            for record in unpack_rows(message):
                (self._steps if record["tokens"] else self._others).append({**record, **place})
        self._came.clear()
