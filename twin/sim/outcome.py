"""From a simulated run to a RunResult: what the requests say, and what the pools did meanwhile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twin.cost.model import CostModel
from twin.sim.breakdown import Breakdown, common_source
from twin.sim.instance import Instance
from twin.sim.request import Request
from twin.sim.service import PoolCosts
from twin.spec.plan import PoolPlan
from twin.spec.results import Interval, Memory, PoolResult, RequestRecord, Series, Summary
from twin.spec.summarise import RunSummary, weighted_summary

SERIES_POINTS = 240
Floats = NDArray[np.float64]


def pool_result(pool: PoolPlan, costs: PoolCosts, instances: Sequence[Instance], requests: Sequence[Request],
                breakdown: Breakdown, window: tuple[float, float]) -> PoolResult:
    """One pool's behaviour over the counted window (the whole run where that is empty)."""
    steps = {name: np.concatenate([inside(instance, window, name) for instance in instances])
             for name in ("step_s", "decode_seqs", "prefill_seqs", "prefill_tokens", "kv_tokens", "kv_tokens_fullest")}
    step_s = steps["step_s"]
    capacity = float(instances[0].ranks[0].capacity_tokens)
    shown = len(step_s) > 0
    from_here = [r for r in requests if r.kv_transfer_s is not None
                 and (r.prefill_instance if pool.role == "prefill" else r.decode_instance) in {i.number for i in instances}]
    transferred = costs.kv_transfer_bytes if pool.role == "prefill" else None
    return PoolResult(
        role=pool.role, instances=pool.instances, gpus=pool.gpus, dp=pool.dp, tp=pool.tp, ep=pool.ep,
        utilisation=_busy_share(instances, window),
        steps=len(step_s), step_s=weighted_summary((float(s), 1) for s in step_s),
        batch_seqs_mean=float((steps["decode_seqs"] + steps["prefill_seqs"]).mean()) if shown else 0.0,
        batch_tokens_mean=float((steps["decode_seqs"] * (1 + pool.mtp_draft_tokens) + steps["prefill_tokens"]).mean())
        if shown else 0.0,
        kv_usage_mean=float((steps["kv_tokens"] * step_s).sum() / step_s.sum() / capacity / pool.dp) if shown else 0.0,
        kv_usage_max=float(steps["kv_tokens_fullest"].max() / capacity) if shown else 0.0,
        preemptions=sum(instance.preemptions for instance in instances),
        breakdown_s=breakdown.mean_parts_s(), sources={part: breakdown.sources[part] for part in sorted(breakdown.sources)},
        memory=_memory(costs), expert_load=expert_load(costs),
        kv_transfer_s=Summary.of([r.kv_transfer_s for r in from_here if r.counted and r.kv_transfer_s is not None])
        if pool.role != "mixed" else None,
        kv_transfer_bytes=float(sum(transferred(r.isl) for r in from_here)) if transferred else 0.0,
        rebalances=tuple(one for i in instances if i.experts is not None for one in i.experts.rebalances))


def inside(instance: Instance, window: tuple[float, float], name: str) -> Floats:
    """A column of the steps that ended inside the window."""
    ends = instance.log.column("end_s")
    if window[1] <= window[0]:
        return instance.log.column(name)
    first, last = np.searchsorted(ends, window[0], "right"), np.searchsorted(ends, window[1], "right")
    return instance.log.column(name)[first:last]


def _busy_share(instances: Sequence[Instance], window: tuple[float, float]) -> float:
    """Share of the window that instances spent in steps, mean over instances."""
    last_s = max((float(i.log.column("end_s")[-1]) for i in instances if len(i.log)), default=0.0)
    start, end = window if window[1] > window[0] else (0.0, last_s)
    if end <= start:
        return 0.0
    busy = 0.0
    for instance in instances:
        ends = instance.log.column("end_s")
        begins = ends - instance.log.column("step_s")
        busy += float(np.maximum(np.minimum(ends, end) - np.maximum(begins, start), 0.0).sum())
    return min(1.0, busy / (end - start) / len(instances))


def _memory(costs: PoolCosts) -> Memory | None:
    return costs.memory() if isinstance(costs, CostModel) else None


def expert_load(costs: PoolCosts) -> tuple[tuple[float, ...], ...] | None:
    """Expected load of every EP rank in every layer, relative to the layer's mean; None without routed experts."""
    if not isinstance(costs, CostModel) or costs.site.popularity_LE is None or costs.site.placement is None:
        return None
    share_LR = costs.site.share_LR
    relative_LR = share_LR / share_LR.mean(axis=1, keepdims=True)
    return tuple(tuple(round(float(x), 6) for x in row) for row in relative_LR)


def gaps(instances: Sequence[Instance], requests: Mapping[int, Request]) -> Summary:
    """Every gap between two tokens of a counted request: steps, weighted by how many such requests they served, and
    the gaps that requests carry themselves."""
    pairs: list[tuple[float, int]] = []
    for instance in instances:
        change: NDArray[np.int64] = np.zeros(len(instance.log) + 1, dtype=np.int64)
        for request_id, first, last in instance.segments:
            if requests[request_id].counted:
                change[first] += 1
                change[last + 1] -= 1
        served = np.cumsum(change)[:-1]
        values, where = np.unique(instance.log.column("step_s"), return_inverse=True)
        weights = np.bincount(where, weights=served, minlength=len(values))
        pairs.extend((value, int(weight)) for value, weight in zip(values.tolist(), weights.tolist(), strict=True) if weight)
    pairs.extend((gap_s, 1) for request in requests.values() if request.counted for gap_s in request.gaps_s)
    return weighted_summary(pairs)


def intervals(summary: RunSummary, breakdowns: Mapping[str, Breakdown]) -> dict[str, Interval]:
    """80% intervals of the main metrics: the intervals of the steps that make them, queueing taken as it came out."""
    entry = breakdowns.get("prefill") or breakdowns["mixed"]
    decode = breakdowns.get("decode") or breakdowns["mixed"]
    found: dict[str, Interval] = {}

    def add(name: str, value: float | None, low: float, high: float) -> None:
        if value is not None:
            found[name] = Interval(low=value * low, high=value * high)

    for latency, by in (("ttft_s", entry), ("tpot_s", decode), ("itl_s", decode), ("e2e_s", decode)):
        low, high = _ratios(by)
        for statistic in ("mean", "p50", "p99"):
            add(f"{latency}_{statistic}", getattr(getattr(summary.latencies, latency), statistic), low, high)
    low, high = _ratios(decode)
    add("tok_per_s_per_user", summary.throughput.tok_per_s_per_user, 1 / high, 1 / low)
    return found


def _ratios(breakdown: Breakdown) -> tuple[float, float]:
    """Low and high end of the pool's step time relative to its mean."""
    if breakdown.total_s <= 0 or breakdown.low_s <= 0:
        return 1.0, 1.0
    return breakdown.low_s / breakdown.total_s, breakdown.high_s / breakdown.total_s


def series(instances: Sequence[Instance], records: Sequence[RequestRecord], pools: Sequence[PoolPlan]) -> tuple[Series, ...]:
    """Unfinished requests, and by pool: waiting, running, KV in use, output tokens a second and, where experts drift
    or move, their imbalance; at equal distances."""
    end_s = max((float(i.log.column("end_s")[-1]) for i in instances if len(i.log)), default=0.0)
    if end_s <= 0:
        return ()
    times = np.linspace(0.0, end_s, SERIES_POINTS + 1)[1:]
    arrivals = np.sort([r.arrival_s for r in records])
    leaves = np.sort([r.arrival_s if r.finish_s is None else r.finish_s for r in records])
    unfinished = np.searchsorted(arrivals, times, "right") - np.searchsorted(leaves, times, "right")
    found = [_series("requests in the system", "requests", times, unfinished.astype(float))]
    for index, pool in enumerate(pools):
        mine = [i for i in instances if i.pool_index == index and len(i.log)]
        name = pool.role if len(pools) <= 2 else f"{pool.role} {index}"
        capacity = max(sum(i.ranks[0].capacity_tokens * pool.dp for i in instances if i.pool_index == index), 1)
        running = [i.log.column("decode_seqs") + i.log.column("prefill_seqs") for i in mine]
        found += [
            _series(f"{name}: waiting", "requests", times, _sampled(mine, times, [i.log.column("waiting") for i in mine])),
            _series(f"{name}: running", "sequences", times, _sampled(mine, times, running)),
            _series(f"{name}: KV in use", "share", times,
                    _sampled(mine, times, [i.log.column("kv_tokens") for i in mine]) / capacity),
            _series(f"{name}: output", "tok/s", times, _rate(mine, times))]
        told = [i.experts.imbalances for i in mine if i.experts is not None]
        if told:
            found.append(_series(f"{name}: fullest rank's experts", "of the mean", times, _held(told, times)))
    return tuple(found)


def _series(name: str, unit: str, times: Floats, values: Floats) -> Series:
    return Series(name=name, unit=unit, time_s=tuple(round(t, 9) for t in times.tolist()),
                  value=tuple(round(v, 9) for v in values.tolist()))


def _sampled(instances: Sequence[Instance], times: Floats, columns: Sequence[Floats]) -> Floats:
    """The value of the step under way at each time, summed over instances; 0 between steps."""
    total = np.zeros(len(times))
    for instance, column in zip(instances, columns, strict=True):
        ends = instance.log.column("end_s")
        step = np.minimum(np.searchsorted(ends, times, "left"), len(ends) - 1)
        busy = (ends[step] - instance.log.column("step_s")[step] < times) & (times <= ends[step])
        total += np.where(busy, column[step], 0.0)
    return total


def _held(told: Sequence[Sequence[tuple[float, float]]], times: Floats) -> Floats:
    """What was last told at each time, mean over those who told it."""
    columns = [np.array(pairs).T for pairs in told]
    return np.asarray(np.mean([value[np.searchsorted(since, times, "right") - 1] for since, value in columns], axis=0))


def _rate(instances: Sequence[Instance], times: Floats) -> Floats:
    """Output tokens a second between one time and the next."""
    total = np.zeros(len(times))
    for instance in instances:
        made = np.concatenate([[0.0], np.cumsum(instance.log.column("output_tokens"))])
        done = made[np.searchsorted(instance.log.column("end_s"), times, "right")]
        total += np.diff(done, prepend=0.0)
    return total / np.diff(times, prepend=0.0)


def result_source(breakdowns: Sequence[Breakdown]) -> Any:
    """Where a result's seconds come from."""
    return common_source([breakdown.source for breakdown in breakdowns if breakdown.steps])
