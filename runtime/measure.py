"""From what the front end saw to a Measurement: request records, pools, a timeline; by the simulator's definitions."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from runtime.flight import Flight
from runtime.frontend import Frontend
from runtime.rank import place
from runtime.targets import add_places
from twin.policy.placement import Placement, rank_load
from twin.spec.plan import PoolPlan
from twin.spec.provenance import provenance
from twin.spec.results import Memory, PoolResult, Rebalance, RequestRecord, RunResult, Series, Summary
from twin.spec.summarise import counted_window, mark_warmup, summarise
from twin.spec.workload import WorkloadSpec

Record = dict[str, Any]
PARTS = {"embed": "embedding", "attention": "attention", "dense_ffn": "ffn/dense", "gate": "moe/gate", "dispatch": "moe/dispatch",
         "experts": "moe/experts", "combine": "moe/combine", "shared_experts": "moe/shared", "head": "head", "sample": "sampling",
         "draft": "mtp/draft", "graph": "step/graph", "schedule": "host/schedule", "book": "host/book", "wait": "host/wait",
         "migrate": "moe/migrate"}
"""The phases that ranks time, by the names of the cost model's parts."""
_MAX_TRACE = 20_000
_SERIES_POINTS = 240


@dataclass(frozen=True)
class Step:
    """One step of an instance: all its DP ranks together. Seconds from the run's start; `parts` a mean over `ranks`, those
    that had work; `others` are TP followers and ranks without any, which took the step with them."""

    pool: int
    instance: int
    start_s: float
    end_s: float
    ranks: tuple[Record, ...]
    parts: dict[str, float]
    others: tuple[Record, ...] = ()

    def total(self, field: str) -> float:
        return sum(rank[field] for rank in self.ranks)


@dataclass(frozen=True)
class Run:
    """What a run yields; `write_run` takes it as it is."""

    result: RunResult
    requests: list[RequestRecord]
    trace: list[Record]
    steps: list[Step]


def measure(frontend: Frontend, workload: WorkloadSpec, sent: Sequence[Flight], unsent: Sequence[RequestRecord], *,
            start: float, name: str, cluster: str, seed: int, usd_per_h: float | None = None, command: str = "") -> Run:
    """The Measurement of a run whose requests were `sent` (and `unsent`: rejected ones), in seconds from `start`.

    The front end must have recorded (EngineOptions.record); call after `stop`, when ranks have told their totals.
    """
    base = _instance_numbers(frontend)
    records = mark_warmup([*(_record(flight, start, base) for flight in sent), *unsent], workload.warmup_fraction)
    counted = {record.id for record in records if record.counted and record.status == "ok"}
    gaps = [b - a for flight in sent if flight.request_id in counted for a, b in pairwise(flight.token_times)]
    gpus = frontend.plan.gpus
    summary = summarise(records, workload, gpus=gpus, usd_per_h=usd_per_h, itl_s=Summary.of(gaps))
    steps = group_steps(frontend.records.steps, start, frontend.records.others)
    window = counted_window(records, open_loop=workload.arrivals.kind in ("poisson", "deterministic", "trace"))
    pools = tuple(_pool(frontend, index, pool, steps, window, sent, counted, start)
                  for index, pool in enumerate(frontend.plan.pools))
    result = RunResult(
        kind="measurement", name=name, model=frontend.model.name, cluster=cluster, plan=frontend.plan,
        provenance=provenance(frontend.model, frontend.plan, workload, seed=seed, command=command,
                              libraries=("torch", "numpy", "pydantic")),
        latencies=summary.latencies, throughput=summary.throughput, counts=summary.counts, steady=summary.steady, pools=pools,
        cost=summary.cost, series=_series(records, steps, frontend), source="measured",
        assumptions=(f"prompts are random tokens; sampling is greedy; output lengths are fixed; {frontend.options.dtype} on "
                     f"{frontend.options.device}",), warnings=_warnings(frontend))
    return Run(result, records, _trace(frontend, steps, sent, start, base), steps)


def _warnings(frontend: Frontend) -> tuple[str, ...]:
    """Where the run was not what the plan says."""
    runs, asks = frontend.options.dtype, frontend.plan.precision
    other = sorted({f for f in (asks.weights, asks.experts, asks.kv, asks.dispatch) if f != runs})
    found = [f"the plan asks for {', '.join(other)}; the ranks computed, stored and sent {runs}"] if other else []
    found += [f"{r.cause.splitlines()[0]}: {r.world} ranks served {r.ready - r.noticed:.3g} s later" for r in frontend.recoveries]
    return tuple(found)


def group_steps(records: Iterable[Record], start: float, others: Iterable[Record] = ()) -> list[Step]:
    """Steps in order of time, from the records of their DP ranks that had work, and of others that took part."""
    groups, beside = _by_step(records), _by_step(others)
    steps = []
    for key, ranks in groups.items():
        pool, instance, *_ = key
        names = sorted({name for rank in ranks for name in rank["parts"]})
        parts = {PARTS.get(n, n): sum(r["parts"].get(n, 0.0) for r in ranks) / len(ranks) for n in names if n in PARTS}
        steps.append(Step(pool, instance, min(r["start"] for r in ranks) - start, max(r["end"] for r in ranks) - start,
                          tuple(sorted(ranks, key=lambda r: r["dp_rank"])), parts, tuple(beside.get(key, ()))))
    return sorted(steps, key=lambda step: (step.end_s, step.pool, step.instance))


def _by_step(records: Iterable[Record]) -> dict[tuple[int, ...], list[Record]]:
    """Records by (pool, instance, formation, round): rounds are counted anew when ranks re-form."""
    groups: dict[tuple[int, ...], list[Record]] = {}
    for record in records:
        key = record["pool"], record["instance"], record.get("formation", 0), record["round"]
        groups.setdefault(key, []).append(record)
    return groups


def _record(flight: Flight, start: float, base: dict[tuple[int, int], int]) -> RequestRecord:
    times = flight.token_times
    done = flight.finish_reason in ("stop", "length")
    entry = base[flight.entry.pool, flight.entry.instance]
    decoder = base[flight.decoder.pool, flight.decoder.instance] if flight.decoder is not None else entry
    return RequestRecord(
        id=flight.request_id, arrival_s=flight.arrival - start, isl=len(flight.prompt), osl=flight.params.max_tokens,
        output_tokens=len(flight.output),
        prefill_start_s=None if flight.prefill_start is None else flight.prefill_start - start,
        first_token_s=times[0] - start if times else None, finish_s=times[-1] - start if done else None,
        itl_max_s=max((b - a for a, b in pairwise(times)), default=None), prefill_instance=entry, decode_instance=decoder,
        kv_transfer_s=None if flight.transfer is None else flight.transfer[1] - flight.transfer[0],
        preemptions=flight.preemptions, status="ok" if done else "failed" if flight.finish_reason == "error" else "unfinished")


def _instance_numbers(frontend: Frontend) -> dict[tuple[int, int], int]:
    """Instances counted through all pools, as the simulator counts them."""
    keys = [(pool, instance) for pool, plan in enumerate(frontend.plan.pools) for instance in range(plan.instances)]
    return {key: number for number, key in enumerate(keys)}


def _pool(frontend: Frontend, index: int, pool: PoolPlan, steps: Sequence[Step], window: tuple[float, float],
          sent: Sequence[Flight], counted: set[int], start: float) -> PoolResult:
    mine = [s for s in steps if s.pool == index]
    shown = [s for s in mine if window[0] < s.end_s <= window[1]] if window[1] > window[0] else mine
    span = window[1] - window[0] if window[1] > window[0] else max((s.end_s for s in mine), default=0.0)
    busy = sum(s.end_s - s.start_s for s in shown)
    kv = [rank["kv"] for s in shown for rank in s.ranks]
    moved = [f for f in sent if f.transfer is not None
             and (f.entry if pool.role == "prefill" else f.decoder or f.entry).pool == index]
    names = sorted({name for s in shown for name in s.parts})
    return PoolResult(
        role=pool.role, instances=pool.instances, gpus=pool.gpus, dp=pool.dp, tp=pool.tp, ep=pool.ep,
        utilisation=min(1.0, busy / span / pool.instances) if span > 0 else 0.0, steps=len(shown),
        step_s=Summary.of([s.end_s - s.start_s for s in shown]),
        batch_seqs_mean=_mean([s.total("decode_seqs") + s.total("prefill_seqs") for s in shown]),
        batch_tokens_mean=_mean([s.total("tokens") for s in shown]), kv_usage_mean=_mean(kv), kv_usage_max=max(kv, default=0.0),
        preemptions=sum(f.preemptions for f in sent if (f.decoder or f.entry).pool == index),
        breakdown_s={name: _mean([s.parts.get(name, 0.0) for s in shown]) for name in names},
        sources=dict.fromkeys(names, "measured"), memory=_memory(frontend, index, pool),
        expert_load=_expert_load(frontend, index, pool), rebalances=_rebalances(frontend, index, start),
        kv_transfer_s=Summary.of([f.transfer[1] - f.transfer[0] for f in moved if f.transfer and f.request_id in counted])
        if pool.role != "mixed" else None,
        kv_transfer_bytes=float(frontend.moved_bytes) if pool.role == "prefill" else 0.0, mtp_accepted=draft_shares(shown))


def draft_shares(steps: Sequence[Step]) -> tuple[float, ...] | None:
    """Share of drafts that stood, by place; None where nothing was drafted."""
    drafted, stood = (add_places([rank["drafts"][side] for s in steps for rank in s.ranks]) for side in (0, 1))
    return tuple(round(good / made, 6) for good, made in zip(stood, drafted, strict=True)) or None


def _mean(values: Sequence[float]) -> float:
    return float(sum(values) / len(values)) if values else 0.0


def _memory(frontend: Frontend, index: int, pool: PoolPlan) -> Memory | None:
    """Bytes on the fullest rank of a pool, as the ranks stated them when they were ready."""
    ranks = [r for t in frontend.targets.targets if t.pool == index for r in t.tp_ranks if r in frontend.ready]
    if not ranks:
        return None
    ready = [frontend.ready[r] for r in ranks]
    dense, experts, kv = (float(max(m[name] for m in ready)) for name in ("dense_bytes", "expert_bytes", "kv_bytes"))
    total = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    blocks = int(ready[0]["kv_blocks"])
    return Memory(hbm_bytes=total, dense_weight_bytes=dense, expert_weight_bytes=experts, kv_pool_bytes=kv,
                  activation_bytes=0.0, comm_buffer_bytes=0.0, reserved_bytes=0.0,
                  free_bytes=max(0.0, total - dense - experts - kv), kv_tokens=blocks * pool.block_tokens, kv_blocks=blocks)


def _rebalances(frontend: Frontend, index: int, start: float) -> tuple[Rebalance, ...]:
    """The pool's cycles of rebalancing, as its ranks told of them."""
    return tuple(Rebalance(
        start_s=m["start"] - start, end_s=m["end"] - start, steps=m["last_round"] - m["first_round"], layers=m["layers"],
        copies=m["copies"], moved_bytes=float(m["bytes"]), imbalance_before=m["imbalance_before"],
        imbalance_after=m["imbalance_after"], gain_s_per_step=m["gain_s_per_step"], cost_s=m["cost_s"], solve_s=m["solve_s"])
        for m in frontend.rebalances if m["pool"] == index)


def _expert_load(frontend: Frontend, index: int, pool: PoolPlan) -> tuple[tuple[float, ...], ...] | None:
    """Tokens sent to every EP rank, relative to the mean of its layer, over the whole run; replicas share evenly."""
    slots, ep = place(frontend.model, pool), pool.ep
    ranks = [r for t in frontend.targets.targets if t.pool == index for r in t.tp_ranks if r in frontend.totals]
    if slots is None or not ranks:
        return None
    load_LE = np.sum([frontend.totals[r]["expert_load"] for r in ranks], axis=0).astype(float)
    if not load_LE.sum():
        return None
    for target in frontend.targets.targets:  # where experts were moved, where they ended
        if target.pool == index and "placement" in frontend.totals.get(target.leader, {}):
            slots, ep = frontend.totals[target.leader]["placement"], target.plan.ep
    load_LR = rank_load(load_LE, Placement(np.array(slots), ep))
    return tuple(tuple(round(float(x), 6) for x in row / max(row.mean(), 1e-12)) for row in load_LR)


def _series(records: Sequence[RequestRecord], steps: Sequence[Step], frontend: Frontend) -> tuple[Series, ...]:
    end_s = max((s.end_s for s in steps), default=0.0)
    if end_s <= 0:
        return ()
    times = np.linspace(0.0, end_s, _SERIES_POINTS + 1)[1:]
    arrivals = np.sort([r.arrival_s for r in records])
    leaves = np.sort([r.arrival_s if r.finish_s is None else r.finish_s for r in records])
    inside = np.searchsorted(arrivals, times, "right") - np.searchsorted(leaves, times, "right")
    found = [_one_series("requests in the system", "requests", times, inside.astype(float))]
    for index, pool in enumerate(frontend.plan.pools):
        mine = [s for s in steps if s.pool == index]
        name = pool.role if len(frontend.plan.pools) <= 2 else f"{pool.role} {index}"
        ends = np.array([s.end_s for s in mine])
        made = np.concatenate([[0.0], np.cumsum([s.total("made") for s in mine])])
        rate = np.diff(made[np.searchsorted(ends, times, "right")], prepend=0.0) / np.diff(times, prepend=0.0)
        running = np.array([s.total("decode_seqs") + s.total("prefill_seqs") for s in mine] or [0.0])
        at = np.minimum(np.searchsorted(ends, times, "left"), len(running) - 1)
        found += [_one_series(f"{name}: running", "sequences", times, running[at]),
                  _one_series(f"{name}: output", "tok/s", times, rate)]
    return tuple(found)


def _one_series(name: str, unit: str, times: np.ndarray, values: np.ndarray) -> Series:
    return Series(name=name, unit=unit, time_s=tuple(round(float(t), 9) for t in times),
                  value=tuple(round(float(v), 9) for v in values))


def _trace(frontend: Frontend, steps: Sequence[Step], sent: Sequence[Flight], start: float,
           base: dict[tuple[int, int], int]) -> list[Record]:
    """Chrome trace events: a process an instance, a thread a DP rank, and after these one each further TP rank; steps with
    their parts, and KV transfers. A TP follower's step is named by what its leader did."""
    events: list[Record] = []
    for target in frontend.targets.targets:
        pid, pool = base[target.pool, target.instance], frontend.plan.pools[target.pool]
        if target.dp_rank == 0:
            events.append({"name": "process_name", "ph": "M", "pid": pid, "tid": 0,
                           "args": {"name": f"{target.plan.role} instance {target.instance}"}})
        events.append({"name": "thread_name", "ph": "M", "pid": pid, "tid": target.dp_rank,
                       "args": {"name": f"DP rank {target.dp_rank}"}})
        events += [{"name": "thread_name", "ph": "M", "pid": pid, "tid": _thread(pool, target.dp_rank, tp_rank),
                    "args": {"name": f"DP rank {target.dp_rank}, TP rank {tp_rank}"}} for tp_rank in range(1, pool.tp)]
    heads = len(events)
    for step in steps[:_MAX_TRACE]:
        did = {rank["dp_rank"]: rank for rank in step.ranks}
        for rank in (*step.ranks, *step.others):
            parts = {PARTS.get(name, name): round(seconds * 1e6, 1) for name, seconds in rank["parts"].items() if name in PARTS}
            what = did.get(rank["dp_rank"], rank)
            name = f"{what['decode_seqs']} decode + {what['prefill_tokens']} prompt tokens"
            thread = _thread(frontend.plan.pools[step.pool], rank["dp_rank"], rank.get("tp_rank", 0))
            events.append({"name": name, "ph": "X", "cat": "step", "pid": base[step.pool, step.instance], "tid": thread,
                           "ts": _us(rank["start"] - start), "dur": _us(rank["end"] - rank["start"]),
                           "args": {**parts, "unit": "us", "decode_seqs": what["decode_seqs"],
                                    "prefill_tokens": what["prefill_tokens"]}})
    for flight in sent:
        if flight.transfer is not None and flight.decoder is not None and len(events) < 2 * _MAX_TRACE:
            here = {"pid": base[flight.entry.pool, flight.entry.instance], "tid": flight.entry.dp_rank}
            there = {"pid": base[flight.decoder.pool, flight.decoder.instance], "tid": flight.decoder.dp_rank}
            what = {"name": f"KV of request {flight.request_id}", "cat": "kv", "id": flight.request_id}
            began, ended = (_us(t - start) for t in flight.transfer)
            events += [{**what, **here, "ph": "b", "ts": began, "args": {"tokens": len(flight.prompt)}},
                       {**what, **here, "ph": "e", "ts": ended}, {**what, **here, "ph": "s", "ts": began},
                       {**what, **there, "ph": "f", "bp": "e", "ts": ended}]
    return events[:heads] + sorted(events[heads:], key=lambda e: (e["ts"], e["pid"], e["tid"]))


def _thread(pool: PoolPlan, dp_rank: int, tp_rank: int) -> int:
    """A rank's thread in the trace: leaders by their DP rank, then everybody else."""
    return dp_rank if tp_rank == 0 else pool.dp + dp_rank * (pool.tp - 1) + tp_rank - 1


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 3)
