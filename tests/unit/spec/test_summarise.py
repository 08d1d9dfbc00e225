"""The definitions of summarise, on requests whose answers can be worked out by hand, and on simulated queues."""

import random

import pytest

from twin.spec.results import RequestRecord, Summary
from twin.spec.summarise import (
    count,
    counted_window,
    mark_warmup,
    meets,
    steady,
    summarise,
    weighted_summary,
)
from twin.spec.workload import WorkloadSpec


def workload(kind: str = "closed_loop", **slo: float) -> WorkloadSpec:
    arrivals = {"closed_loop": {"concurrency": 2}, "poisson": {"rate_per_s": 1.0}, "burst": {}}[kind]
    return WorkloadSpec.model_validate({
        "arrivals": {"kind": kind, **arrivals}, "isl": {"mean": 10.0}, "osl": {"mean": 5.0}, "requests": 4, "slo": slo})


def served(i: int, arrival: float, ttft: float = 1.0, gap: float = 0.5, osl: int = 5, **more: object) -> RequestRecord:
    return RequestRecord.model_validate({
        "id": i, "arrival_s": arrival, "isl": 10, "osl": osl, "output_tokens": osl, "first_token_s": arrival + ttft,
        "finish_s": arrival + ttft + gap * (osl - 1), **more})


def test_closed_loop_rates_are_totals_over_duration() -> None:
    records = mark_warmup([served(i, 3.0 * (i // 2)) for i in range(4)], 0.0)
    got = summarise(records, workload(ttft_s=1.0), gpus=2, usd_per_h=7.2)
    assert got.throughput.window_s == 6.0
    assert got.throughput.output_tok_per_s == pytest.approx(20 / 6)
    assert got.throughput.input_tok_per_s == pytest.approx(40 / 6)
    assert got.throughput.output_tok_per_s_per_gpu == pytest.approx(10 / 6)
    assert got.throughput.total_tok_per_s_per_gpu == pytest.approx(5.0)
    assert got.throughput.tok_per_s_per_user == pytest.approx(2.0)
    assert got.throughput.goodput_per_s == pytest.approx(4 / 6)
    assert got.throughput.slo_attainment == 1.0
    assert got.latencies.ttft_s.p50 == 1.0
    assert got.latencies.tpot_s.mean == 0.5
    assert got.cost.usd_per_million_output_tokens == pytest.approx(7.2 / (20 / 6 * 3600) * 1e6)


def test_open_loop_window_ends_at_the_last_arrival_and_prorates() -> None:
    records = mark_warmup([served(i, float(i)) for i in range(20)], 0.2)
    assert counted_window(records, open_loop=True) == (4.0, 19.0)
    got = summarise(records, workload("poisson"), gpus=1)
    assert got.throughput.output_tok_per_s == pytest.approx(5.0, rel=0.05)
    assert got.throughput.goodput_per_s is None


def test_an_open_loop_shorter_than_its_requests_runs_to_the_last_finish() -> None:
    records = [served(i, 0.1 * i) for i in range(4)]
    assert counted_window(records, open_loop=True) == (0.0, pytest.approx(3.3))


def test_misses_count_against_attainment() -> None:
    records = [served(0, 0.0), served(1, 0.0, ttft=2.0),
               RequestRecord(id=2, arrival_s=0.0, isl=1, osl=1, status="rejected"),
               RequestRecord(id=3, arrival_s=0.0, isl=1, osl=1, status="unfinished")]
    got = summarise(records, workload(ttft_s=1.5), gpus=1)
    assert got.throughput.slo_attainment == 0.25
    assert (got.counts.finished, got.counts.rejected, got.counts.unfinished) == (2, 1, 1)
    assert got.counts.submitted == 4
    assert count(records).output_tokens == 10
    assert not meets(records[1], workload(ttft_s=1.5).slo)


def test_warmup_is_the_first_share_by_arrival_not_by_id() -> None:
    records = mark_warmup([served(0, 9.0), served(1, 1.0), served(2, 2.0), served(3, 3.0)], 0.25)
    assert [r.id for r in records if not r.counted] == [1]


def test_nothing_served_is_all_zeros_not_a_crash() -> None:
    got = summarise([], workload(ttft_s=1.0), gpus=1, usd_per_h=1.0)
    assert got.throughput.output_tok_per_s == 0
    assert got.throughput.slo_attainment is None
    assert got.latencies.ttft_s.count == 0
    assert got.cost.usd_per_million_output_tokens is None
    assert got.steady.verdict == "too short"


def test_weighted_summary_equals_the_long_way() -> None:
    draw = random.Random(3)
    pairs = [(draw.random(), draw.randrange(0, 9)) for _ in range(200)]
    written_out = Summary.of([v for v, w in pairs for _ in range(w)])
    weighted = weighted_summary(pairs)
    assert weighted.count == written_out.count
    for name in ("mean", "p50", "p90", "p95", "p99", "max"):
        assert getattr(weighted, name) == pytest.approx(getattr(written_out, name), rel=1e-12)


def single_server(rho: float, requests: int, seed: int) -> list[RequestRecord]:
    """M/M/1 from empty, by Lindley's recursion."""
    draw = random.Random(seed)
    clock = free = 0.0
    records = []
    for i in range(requests):
        clock += draw.expovariate(rho)
        free = max(free, clock) + draw.expovariate(1.0)
        records.append(RequestRecord(id=i, arrival_s=clock, isl=1, osl=1, output_tokens=1, first_token_s=free,
                                     finish_s=free))
    return mark_warmup(records, 0.2)


def test_steady_queues_pass_and_overloaded_ones_do_not() -> None:
    calm = [steady(single_server(0.7, 3000, seed), "poisson").verdict for seed in range(20)]
    assert calm.count("steady") >= 18
    flooded = [steady(single_server(1.3, 1000, seed), "poisson").verdict for seed in range(20)]
    assert flooded.count("not steady") >= 19


def test_a_run_shorter_than_its_requests_is_too_short() -> None:
    records = [served(i, 0.01 * i, ttft=5.0) for i in range(50)]
    assert steady(records, "poisson").verdict == "too short"
    assert steady(records, "burst").verdict == "too short"
