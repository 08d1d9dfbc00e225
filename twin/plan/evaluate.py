"""One candidate under one load, simulated: the numbers that plans are compared by."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from twin.plan.misses import PERCENTILES, Misses
from twin.sim import GivenUp, simulate
from twin.spec.plan import Plan
from twin.spec.results import RunResult, Summary
from twin.spec.scenario import Scenario
from twin.spec.units import format_s
from twin.spec.workload import Slo, WorkloadSpec


@dataclass(frozen=True)
class Job:
    """A simulation to run, as text so that any executor can carry it to any process. `only_if_ok`: nobody wants its metrics
    when it misses the objectives, so it ends where that is certain."""

    scenario_json: str
    plan_json: str
    load: float
    max_requests: int
    in_flight: int = 0
    only_if_ok: bool = False


@dataclass(frozen=True)
class Evaluation:
    """What a simulation said. `ok`: steady and within the objectives; `reason` why not; no metrics where
    it was given up."""

    load: float
    ok: bool
    reason: str
    metrics: dict[str, float]


def run(job: Job) -> Evaluation:
    """Simulate a job. Deterministic: the same job gives the same evaluation in any process."""
    scenario = Scenario.model_validate_json(job.scenario_json)
    plan = Plan.model_validate_json(job.plan_json)
    loaded = scenario.model_copy(update={"workload": at_load(scenario.workload, job.load)})
    misses = Misses(scenario.workload, min(job.max_requests, scenario.workload.requests or job.max_requests))
    try:
        result = simulate(loaded, plan, max_requests=job.max_requests, record_trace=False, brief=True, in_flight=job.in_flight,
                          hopeless=misses if job.only_if_ok else None).result
    except GivenUp:
        return Evaluation(job.load, False, misses.reason, {})
    reason = missed(result, scenario.workload.slo)
    return Evaluation(job.load, not reason, reason, metrics_of(result))


def offered_load(workload: WorkloadSpec) -> float:
    """The load that a workload offers: requests/s, users of a closed loop, or a trace's speed-up."""
    arrivals = workload.arrivals
    if arrivals.kind == "closed_loop":
        assert arrivals.concurrency is not None
        return float(arrivals.concurrency)
    if arrivals.kind in ("poisson", "deterministic"):
        assert arrivals.rate_per_s is not None
        return arrivals.rate_per_s
    return arrivals.speedup


def load_unit(workload: WorkloadSpec) -> str:
    kind = workload.arrivals.kind
    return {"closed_loop": "users", "poisson": "req/s", "deterministic": "req/s"}.get(kind, "x the trace")


def at_load(workload: WorkloadSpec, load: float) -> WorkloadSpec:
    """The same traffic (same lengths, same order) at another load."""
    kind = workload.arrivals.kind
    if kind == "closed_loop":
        change: dict[str, float | int] = {"concurrency": max(1, round(load))}
    elif kind in ("poisson", "deterministic"):
        change = {"rate_per_s": load}
    else:
        change = {"speedup": load}
    return workload.model_copy(update={"arrivals": workload.arrivals.model_copy(update=change)})


def missed(result: RunResult, slo: Slo) -> str:
    """Which objective a run missed and by how much, or ''."""
    if result.steady.verdict == "not steady":
        return f"not steady: {result.steady.reason}"
    if result.counts.rejected or result.counts.failed:
        return f"{result.counts.rejected + result.counts.failed} requests were not served"
    for name, limit, summary in (
        ("TTFT", slo.ttft_s, result.latencies.ttft_s),
        ("TPOT", slo.tpot_s, result.latencies.tpot_s),
        ("E2E", slo.e2e_s, result.latencies.e2e_s),
    ):
        value = percentile(summary, slo.percentile)
        if limit is not None and value is not None and value > limit:
            return f"{name} p{slo.percentile:g} {format_s(value)} exceeds {format_s(limit)} by {value / limit - 1:.0%}"
    return ""


def percentile(summary: Summary, percent: float) -> float | None:
    """A percentile of a summary, interpolated between those it holds."""
    known = [
        (p, v)
        for p, v in zip(PERCENTILES, (summary.p50, summary.p90, summary.p95, summary.p99, summary.max), strict=True)
        if v is not None
    ]
    if not known:
        return None
    if percent <= known[0][0]:
        return known[0][1]
    for (p0, v0), (p1, v1) in pairwise(known):
        if percent <= p1:
            return v0 + (v1 - v0) * (percent - p0) / (p1 - p0)
    return known[-1][1]


def metrics_of(result: RunResult) -> dict[str, float]:
    """The comparable numbers of a run, by name; what it does not know is left out."""
    latencies, throughput, cost = result.latencies, result.throughput, result.cost
    values: dict[str, float | None] = {
        "output_tok_per_s": throughput.output_tok_per_s,
        "tok_per_s_per_gpu": throughput.output_tok_per_s_per_gpu,
        "total_tok_per_s_per_gpu": throughput.total_tok_per_s_per_gpu,
        "tok_per_s_per_user": throughput.tok_per_s_per_user,
        "requests_per_s": throughput.requests_per_s,
        "goodput_per_s": throughput.goodput_per_s,
        "slo_attainment": throughput.slo_attainment,
        "usd_per_million_output_tokens": cost.usd_per_million_output_tokens,
        "usd_per_million_tokens": cost.usd_per_million_tokens,
        "preemptions": float(result.counts.preemptions),
    }
    for name, summary in (("ttft_s", latencies.ttft_s), ("tpot_s", latencies.tpot_s), ("e2e_s", latencies.e2e_s)):
        values |= {f"{name}_p50": summary.p50, f"{name}_p95": summary.p95, f"{name}_p99": summary.p99}
    for pool in result.pools:
        values |= {
            f"{pool.role}_utilisation": pool.utilisation,
            f"{pool.role}_kv_usage_max": pool.kv_usage_max,
            f"{pool.role}_step_s": pool.step_s.mean,
            f"{pool.role}_batch_seqs": pool.batch_seqs_mean,
        }
        if pool.memory is not None:
            values[f"{pool.role}_free_bytes"] = pool.memory.free_bytes
    return {name: value for name, value in values.items() if value is not None}
