"""From what happened to each request to what a run is worth; the simulator and the load client both end here.

    records = mark_warmup(records, workload.warmup_fraction)
    summary = summarise(records, workload, gpus=8, usd_per_h=20.0, itl_s=Summary.of(gaps_of_counted))

Definitions, the same for a prediction and a measurement:

- **counted**: requests after the warm-up, the first `warmup_fraction` of all requests in order of arrival.
- **latencies**: over counted requests that ended well.
- **window**: opens at the first counted arrival. Closed loops and bursts close it at the last finish, as published
  load tests do (all tokens over the whole duration, ramp-down included). Open loops close it at the last arrival, when
  the offered load ends, because the time to drain says nothing about the load; where fewer than half of the counted
  requests finished by then, the run was shorter than its own requests and the window also runs to the last finish.
  A run that began with requests in flight (negative ids) was full from the start and closes at the last arrival.
- **rates**: everything that happened inside the window (after it opens: what ends at that very moment belongs to what
  came before) over its length, whoever did it: a request at its finish, its prompt at its first token, its output
  evenly from first token to finish. With no warm-up, a closed loop's rate is its total tokens over its duration.
- **goodput**: requests that met every objective on their own, at their finish. **Attainment**: their share of all
  submitted after the warm-up; a rejected, failed or unfinished request has missed.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from twin.spec.results import Cost, Counts, Latencies, RequestRecord, Steady, Summary, Throughput
from twin.spec.workload import Slo, WorkloadSpec

MIN_COUNTED = 20
"""Fewer counted requests than this cannot show whether a run is steady."""
MAX_DRIFT = 0.1
"""Relative change of mean E2E latency from the first to the second half that a steady run may show."""
WILD_DRIFT = 0.5
"""A drift beyond this may still be chance (batch means of a nearly saturated queue wander), but then the run is too short for
its averages to mean anything."""
MAX_QUEUE_SLOPE = 0.05
"""Share of the arrivals that may pile up, unfinished, in a steady run."""
_BATCHES = 5
_T_CRITICAL = 3.355
"""Student's t, 8 degrees of freedom (two halves of 5 batch means), 99% two-sided."""


@dataclass(frozen=True)
class RunSummary:
    """The parts of a RunResult that follow from its requests."""

    latencies: Latencies
    throughput: Throughput
    counts: Counts
    steady: Steady
    cost: Cost


def mark_warmup(records: Iterable[RequestRecord], warmup_fraction: float) -> list[RequestRecord]:
    """The records in order of arrival, `counted` false for the first `warmup_fraction` of them (rounded down)."""
    ordered = sorted(records, key=lambda r: (r.arrival_s, r.id))
    warmup = int(len(ordered) * warmup_fraction)
    return [
        record if record.counted == (i >= warmup) else record.model_copy(update={"counted": i >= warmup})
        for i, record in enumerate(ordered)
    ]


def summarise(
    records: Sequence[RequestRecord],
    workload: WorkloadSpec,
    *,
    gpus: int,
    usd_per_h: float | None = None,
    itl_s: Summary | None = None,
) -> RunSummary:
    """Summarise requests whose `counted` flags are set (see mark_warmup).

    `itl_s` summarises the gaps between output tokens of the counted requests, which records do not carry. `usd_per_h`
    is the price of all `gpus` together. Raises ValueError when `gpus` < 1.
    """
    if gpus < 1:
        raise ValueError(f"gpus must be at least 1, got {gpus}")
    ordered = sorted(records, key=lambda r: (r.arrival_s, r.id))
    counted = [r for r in ordered if r.counted and r.status == "ok" and r.finish_s is not None]
    open_loop = workload.arrivals.kind in ("poisson", "deterministic", "trace")
    window = counted_window(ordered, open_loop=open_loop)
    throughput = _throughput(ordered, counted, window, workload.slo, gpus)
    return RunSummary(
        latencies=Latencies(
            ttft_s=Summary.of([v for r in counted if (v := r.ttft_s) is not None]),
            tpot_s=Summary.of([v for r in counted if (v := r.tpot_s) is not None]),
            itl_s=itl_s or Summary(count=0),
            e2e_s=Summary.of([v for r in counted if (v := r.e2e_s) is not None]),
        ),
        throughput=throughput,
        counts=count(ordered),
        steady=steady(ordered, workload.arrivals.kind),
        cost=cost(throughput, usd_per_h),
    )


def count(records: Sequence[RequestRecord]) -> Counts:
    """Requests by how they ended, and tokens: prompts of requests that got a first token, output of all."""
    ends = {"ok": 0, "rejected": 0, "failed": 0, "unfinished": 0}
    for record in records:
        ends[record.status] += 1
    return Counts(
        submitted=len(records),
        finished=ends["ok"],
        rejected=ends["rejected"],
        failed=ends["failed"],
        unfinished=ends["unfinished"],
        counted=sum(r.counted and r.status == "ok" for r in records),
        preemptions=sum(r.preemptions for r in records),
        input_tokens=sum(r.isl for r in records if r.first_token_s is not None),
        output_tokens=sum(r.output_tokens for r in records),
    )


def counted_window(records: Sequence[RequestRecord], *, open_loop: bool) -> tuple[float, float]:
    """(start_s, end_s) of the window that rates are taken over; see the top of this file. (0, 0) when empty."""
    counted = [r for r in records if r.counted]
    finishes = sorted(r.finish_s for r in counted if r.finish_s is not None)
    if not finishes:
        return (0.0, 0.0)
    start = min(r.arrival_s for r in counted)
    last_arrival = max(r.arrival_s for r in records)
    warm = any(r.id < 0 for r in records)
    if open_loop and (warm or 2 * sum(f <= last_arrival for f in finishes) >= len(counted)):
        return (start, last_arrival)
    return (start, finishes[-1])


def meets(record: RequestRecord, slo: Slo) -> bool:
    """True when this request alone met every objective. One token has no TPOT and cannot miss it."""
    if record.status != "ok" or record.finish_s is None:
        return False
    pairs = ((record.ttft_s, slo.ttft_s), (record.tpot_s, slo.tpot_s), (record.e2e_s, slo.e2e_s))
    return all(limit is None or value is None or value <= limit for value, limit in pairs)


def cost(throughput: Throughput, usd_per_h: float | None) -> Cost:
    """What a million tokens cost at these rates when all GPUs together cost `usd_per_h`."""
    if usd_per_h is None:
        return Cost()
    total = throughput.input_tok_per_s + throughput.output_tok_per_s

    def per_million(tok_per_s: float) -> float | None:
        return usd_per_h / (tok_per_s * 3600) * 1e6 if tok_per_s > 0 else None

    return Cost(
        usd_per_h=usd_per_h,
        usd_per_million_output_tokens=per_million(throughput.output_tok_per_s),
        usd_per_million_tokens=per_million(total),
    )


def weighted_summary(pairs: Iterable[tuple[float, int]]) -> Summary:
    """Summary of values that occur `weight` times each: equal to Summary.of with every value written out."""
    ordered = sorted((float(value), int(weight)) for value, weight in pairs if weight > 0)
    total = sum(weight for _, weight in ordered)
    if not total:
        return Summary(count=0)
    ends, seen = [], 0
    for _, weight in ordered:
        seen += weight
        ends.append(seen)

    def order_statistic(index: int) -> float:
        low, high = 0, len(ends) - 1
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if ends[middle] > index else (middle + 1, high)
        return ordered[low][0]

    def at(q: float) -> float:
        position = (total - 1) * q
        lower = order_statistic(int(position))
        upper = order_statistic(min(int(position) + 1, total - 1))
        return lower + (upper - lower) * (position - int(position))

    return Summary(
        count=total,
        mean=sum(v * w for v, w in ordered) / total,
        p50=at(0.5),
        p90=at(0.9),
        p95=at(0.95),
        p99=at(0.99),
        max=ordered[-1][0],
    )


def _throughput(
    records: Sequence[RequestRecord], counted: Sequence[RequestRecord], window: tuple[float, float], slo: Slo, gpus: int
) -> Throughput:
    start, end = window
    window_s = end - start
    finished = prompt_tokens = met = 0
    output_tokens = 0.0
    judged = [r for r in records if r.counted]
    for record in records:
        if record.first_token_s is not None and start < record.first_token_s <= end:
            prompt_tokens += record.isl
        output_tokens += _tokens_inside(record, start, end)
        if record.status == "ok" and record.finish_s is not None and start < record.finish_s <= end:
            finished += 1
            met += meets(record, slo)
    stated = any(limit is not None for limit in (slo.ttft_s, slo.tpot_s, slo.e2e_s))
    tpot = Summary.of([v for r in counted if (v := r.tpot_s) is not None]).p50

    def rate(amount: float) -> float:
        return amount / window_s if window_s > 0 else 0.0

    return Throughput(
        window_s=window_s,
        requests_per_s=rate(finished),
        input_tok_per_s=rate(prompt_tokens),
        output_tok_per_s=rate(output_tokens),
        output_tok_per_s_per_gpu=rate(output_tokens) / gpus,
        total_tok_per_s_per_gpu=rate(prompt_tokens + output_tokens) / gpus,
        tok_per_s_per_user=1 / tpot if tpot else None,
        goodput_per_s=rate(met) if stated else None,
        slo_attainment=sum(meets(r, slo) for r in judged) / len(judged) if stated and judged else None,
    )


def _tokens_inside(record: RequestRecord, start: float, end: float) -> float:
    """Output tokens that fall in [start, end], the ones after the first evenly spread from first token to finish."""
    first, last = record.first_token_s, record.finish_s
    if first is None or record.output_tokens < 1:
        return 0.0
    inside = float(start < first <= end)
    rest = record.output_tokens - 1
    if rest and last is not None and last > first:
        inside += rest * max(0.0, min(last, end) - max(first, start)) / (last - first)
    elif rest:
        inside += rest * (start < first <= end)
    return inside


def steady(records: Sequence[RequestRecord], arrivals: str) -> Steady:
    """Was the counted part steady? Two signs must each be large and beyond chance to say no: latency that drifts
    (Welch's t on batch means, which serial correlation fools less than single requests) and unfinished requests that
    pile up (beyond 4 standard deviations of a Poisson count of those in the system)."""
    counted = [r for r in records if r.counted]
    done = [(r.arrival_s, e) for r in counted if r.status == "ok" and (e := r.e2e_s) is not None]
    warmup_s = counted[0].arrival_s - records[0].arrival_s if counted else 0.0
    if arrivals == "burst":
        return Steady(verdict="too short", warmup_s=warmup_s, reason="a burst is a transient; figures span all of it")
    if len(done) < MIN_COUNTED:
        return Steady(
            verdict="too short", warmup_s=warmup_s, reason=f"{len(done)} requests were counted; at least {MIN_COUNTED} are needed"
        )
    mean_e2e_s = sum(e for _, e in done) / len(done)
    span_s = counted[-1].arrival_s - counted[0].arrival_s
    drift, beyond_chance = _drift([e for _, e in done])
    slope, piles_up = _queue_slope(records, counted[0].arrival_s, counted[-1].arrival_s)
    verdict, reason = "steady", ""
    if span_s < mean_e2e_s:
        verdict, reason = "too short", f"requests take {mean_e2e_s:.3g} s, but arrivals were counted for {span_s:.3g} s"
    elif piles_up:
        verdict, reason = "not steady", f"{slope:.1%} of the arriving requests pile up"
    elif beyond_chance and abs(drift) > MAX_DRIFT:
        verdict, reason = "not steady", f"mean E2E latency changes by {drift:+.1%} from the first to the second half"
    elif abs(drift) > WILD_DRIFT:
        verdict = "too short"
        reason = f"mean E2E latency changes by {drift:+.1%} between its halves, which more requests would tell from chance"
    return Steady.model_validate(
        {"verdict": verdict, "warmup_s": warmup_s, "drift": drift, "queue_slope_per_s": slope, "reason": reason}
    )


def _drift(values: Sequence[float]) -> tuple[float, bool]:
    """(second half's mean / first half's - 1, whether batch means say that it is more than chance)."""
    half = len(values) // 2
    sides = (values[:half], values[half : 2 * half])
    means = [sum(side) / half for side in sides]
    drift = means[1] / means[0] - 1 if means[0] > 0 else 0.0
    batch = half // _BATCHES
    variance = 0.0
    for side in sides:
        batches = [sum(side[i * batch : (i + 1) * batch]) / batch for i in range(_BATCHES)]
        centre = sum(batches) / _BATCHES
        variance += sum((b - centre) ** 2 for b in batches) / (_BATCHES - 1) / _BATCHES
    return drift, abs(means[1] - means[0]) > _T_CRITICAL * math.sqrt(variance)


def _queue_slope(records: Sequence[RequestRecord], start: float, end: float, points: int = 64) -> tuple[float, bool]:
    """(growth of the requests in the system over those that arrive in [start, end], whether it is large and beyond
    chance): the least-squares slope through their number at `points` instants. `unfinished` requests never leave."""
    if end <= start:
        return 0.0, False
    arrivals = sorted(r.arrival_s for r in records)
    leaves = sorted(math.inf if r.status == "unfinished" else r.arrival_s if r.finish_s is None else r.finish_s for r in records)
    times = [start + (end - start) * i / (points - 1) for i in range(points)]
    inside = [bisect_right(arrivals, t) - bisect_right(leaves, t) for t in times]
    mean_t, mean_n = sum(times) / points, sum(inside) / points
    spread = sum((t - mean_t) ** 2 for t in times)
    slope = sum((t - mean_t) * (n - mean_n) for t, n in zip(times, inside, strict=True)) / spread
    growth = slope * (end - start)
    share = growth / sum(start <= t <= end for t in arrivals)
    return share, share > MAX_QUEUE_SLOPE and growth > 4 * math.sqrt(max(mean_n, 1.0))
