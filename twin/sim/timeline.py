"""The run as Chrome trace events (Perfetto, chrome://tracing): a process an instance, a thread a DP rank, microseconds.

`X` slices are steps, `C` counters queue and KV memory, `b`/`e` pairs KV transfers, and `s`/`f` arrows lead from the
prefill rank to the decode rank. A trace covers a window and stops at so many events, so that it opens quickly.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from twin.sim.instance import Instance
from twin.sim.request import Request
from twin.sim.run import Run, batch_at

Event = dict[str, Any]
MAX_EVENTS = 20_000


class Timeline:
    """Collects steps from `from_s` on, an equal number of events for each of `instances` instances."""

    def __init__(self, from_s: float, instances: int, max_events: int = MAX_EVENTS) -> None:
        self.from_s = from_s
        self._room = [max_events // max(instances, 1)] * instances
        self._until_s = [from_s] * instances
        self._events: list[Event] = []

    def observe(self, instance: Instance, run: Run) -> None:
        """Note the steps of a run while there is room."""
        number = instance.number
        needed = instance.pool.dp + 2
        for offset in range(run.steps):
            end_s, step_s = float(run.ends_s[offset]), float(run.step_s[offset])
            if self._room[number] < needed:
                return
            if end_s - step_s < self.from_s:
                continue
            self._room[number] -= needed
            self._until_s[number] = end_s
            self._events.extend(_slices(instance, run, offset, end_s - step_s, step_s))
            log, step = instance.log, run.first + offset
            capacity = instance.ranks[0].capacity_tokens * instance.pool.dp
            for name, value in (("waiting", int(log.column("waiting")[step])),
                                ("kv_usage", float(log.column("kv_tokens")[step]) / capacity)):
                self._events.append({"name": name, "ph": "C", "pid": number, "tid": 0, "ts": _us(end_s - step_s),
                                     "args": {name: value}})

    def events(self, instances: Iterable[Instance], requests: Iterable[Request]) -> list[Event]:
        """All events: names of processes and threads first, then in order of time."""
        heads: list[Event] = []
        for instance in instances:
            heads.append({"name": "process_name", "ph": "M", "pid": instance.number, "tid": 0,
                          "args": {"name": f"{instance.pool.role} instance {instance.number}"}})
            heads.extend({"name": "thread_name", "ph": "M", "pid": instance.number, "tid": rank,
                          "args": {"name": f"DP rank {rank}"}} for rank in range(instance.pool.dp))
        body = [*self._events, *(event for request in requests for event in self._transfer(request))]
        return heads + sorted(body, key=lambda event: (event["ts"], event["pid"], event["tid"]))

    def _transfer(self, request: Request) -> list[Event]:
        source, target = request.prefill_instance, request.decode_instance
        if request.kv_transfer_s is None or request.transfer_start_s is None or source is None or target is None:
            return []
        start_s, end_s = request.transfer_start_s, request.transfer_start_s + request.kv_transfer_s
        if start_s < self.from_s or end_s > self._until_s[target]:
            return []
        common = {"name": f"KV of request {request.id}", "cat": "kv", "id": request.id}
        here = {"pid": source, "tid": request.prefill_rank}
        there = {"pid": target, "tid": request.decode_rank}
        return [{**common, **here, "ph": "b", "ts": _us(start_s), "args": {"tokens": request.isl}},
                {**common, **here, "ph": "e", "ts": _us(end_s)},
                {**common, **here, "ph": "s", "ts": _us(start_s)},
                {**common, **there, "ph": "f", "bp": "e", "ts": _us(end_s)}]


def _slices(instance: Instance, run: Run, offset: int, start_s: float, step_s: float) -> Iterable[Event]:
    """One slice for each rank of an instance: what it does in this step."""
    batch = batch_at(run, offset)
    for rank in range(instance.pool.dp):
        seqs, tokens = int(batch.decode_seqs[rank]), int(batch.prefill_tokens[rank])
        name = "mixed" if seqs and tokens else "prefill" if tokens else "decode" if seqs else "idle"
        yield {"name": name, "cat": "step", "ph": "X", "pid": instance.number, "tid": rank, "ts": _us(start_s),
               "dur": _us(step_s), "args": {"decode_seqs": seqs, "decode_context": int(batch.decode_context[rank]),
                                            "prefill_tokens": tokens}}


def _us(seconds: float) -> float:
    """Microseconds, to the nanosecond."""
    return round(seconds * 1e6, 3)
