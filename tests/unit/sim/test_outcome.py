"""What a simulation says about its pools, its gaps, its steadiness and its timeline."""

from __future__ import annotations

import numpy as np
import pytest
from sim_kit import LinearCosts, cluster, pool, scenario, workload, world

from twin.sim import simulate
from twin.sim.breakdown import stride_at
from twin.sim.timeline import Timeline
from twin.spec.errors import Infeasible
from twin.spec.load import load_cluster, load_model
from twin.spec.plan import Plan, PoolPlan, Precision
from twin.spec.results import RunResult
from twin.spec.scenario import Routing, Scenario
from twin.spec.workload import Arrivals, Lengths, Slo

COSTS = LinearCosts(step_s_each=0.01, seq_s=1e-3, prefill_s=1e-4, kv_blocks_per_rank=4000, kv_token_bytes=100.0)
STEADY = workload(Arrivals(kind="poisson", rate_per_s=8.0), Lengths(kind="uniform", low=10, high=60),
                  Lengths(kind="uniform", low=10, high=40), requests=400, slo=Slo(ttft_s=0.2, tpot_s=0.03))
TWO_NODES = cluster(nodes=2, gpus_per_node=4, nvlink_domain_gpus=4, nics_per_node=2)


def separated(**more):
    return simulate(scenario(STEADY, pool(role="prefill"), pool(role="decode", dp=2), on=TWO_NODES),
                    scenario(STEADY, pool(role="prefill"), pool(role="decode", dp=2), on=TWO_NODES).plan,
                    cost_models=[COSTS, COSTS], **more)


def test_a_result_is_whole():
    result = separated().result
    assert RunResult.model_validate_json(result.model_dump_json()) == result
    assert result.kind == "prediction" and result.counts.finished == 400 and result.counts.counted == 320
    prefill, decode = result.pools
    assert prefill.role == "prefill" and prefill.kv_transfer_bytes == pytest.approx(100.0 * result.counts.input_tokens)
    assert decode.kv_transfer_s.count == 320 and 0 < decode.utilisation < 1
    assert set(decode.breakdown_s) == {"base", "work"} and decode.sources == {"base": "assumed", "work": "roofline"}
    assert sum(decode.breakdown_s.values()) == pytest.approx(decode.step_s.mean, rel=0.1)
    assert result.source == "mixed" and result.cost.usd_per_h == 3 * 2.0
    assert result.intervals["tpot_s_mean"].low == pytest.approx(0.9 * result.latencies.tpot_s.mean)
    assert any("5 of 8 GPUs" in warning for warning in result.warnings)
    assert any("KV" in line for line in result.assumptions)
    assert {s.name for s in result.series} >= {"requests in the system", "prefill: waiting", "decode: KV in use"}
    assert all(len(s.time_s) == len(s.value) <= 300 for s in result.series)


def test_series_integrate_to_the_tokens():
    output = separated()
    made = next(s for s in output.result.series if s.name == "decode: output")
    tokens = sum(v * dt for v, dt in zip(made.value, np.diff(made.time_s, prepend=0.0), strict=True))
    assert tokens == pytest.approx(sum(r.output_tokens - 1 for r in output.requests), rel=1e-6)


def test_gaps_add_up_to_the_decode_time():
    """Sum of all gaps = sum over counted requests of finish minus first token: no gap is missed or counted twice."""
    for costs in (COSTS, LinearCosts(step_s_each=0.01, seq_s=1e-3, prefill_s=1e-4, kv_blocks_per_rank=230)):
        question = scenario(STEADY, pool(max_num_seqs=8))
        output = simulate(question, question.plan, cost_models=[costs])
        spans = sum(r.finish_s - r.first_token_s for r in output.requests if r.counted)
        itl = output.result.latencies.itl_s
        assert itl.mean * itl.count == pytest.approx(spans, rel=1e-9)
        assert itl.count == sum(r.osl - 1 for r in output.requests if r.counted)
        assert itl.max == pytest.approx(max(r.itl_max_s for r in output.requests if r.counted))
    assert output.result.counts.preemptions > 0, "the small memory must have pre-empted"
    output = separated()
    spans = sum(r.finish_s - r.first_token_s for r in output.requests if r.counted)
    assert output.result.latencies.itl_s.mean * output.result.latencies.itl_s.count == pytest.approx(spans, rel=1e-9)


def test_overload_and_heavy_traffic_are_not_steady():
    """A queue that grows is named as such; so is rho 0.98 started empty and watched for a short while."""
    overload = scenario(workload(Arrivals(kind="poisson", rate_per_s=3.0), 1, 1, requests=400), pool(max_num_seqs=1))
    verdict = simulate(overload, overload.plan, cost_models=[LinearCosts(step_s_each=0.5)]).result.steady
    assert verdict.verdict == "not steady" and verdict.queue_slope_per_s > 0.2
    traffic = workload(Arrivals(kind="poisson", rate_per_s=0.98), Lengths(kind="geometric", mean=1000.0), 1, requests=600)
    verdicts = []
    for seed in range(10):
        heavy = scenario(traffic, pool(max_num_seqs=1, max_batch_tokens=1_000_000, chunk_tokens=None), seed=seed)
        result = simulate(heavy, heavy.plan, cost_models=[LinearCosts(prefill_s=1e-3)], record_trace=False).result
        verdicts.append(result.steady.verdict)
        assert verdicts[-1] != "steady" or abs(result.steady.drift) <= 0.5
        assert verdicts[-1] == "steady" or verdicts[-1] in result.warnings[0]
    assert verdicts.count("steady") <= 5, "by chance a short run may look calm"
    assert verdicts.count("not steady") >= 3
    calm = scenario(STEADY, pool())
    assert simulate(calm, calm.plan, cost_models=[COSTS]).result.steady.verdict == "steady"


def test_the_timeline_is_a_chrome_trace_and_stays_small():
    output = separated()
    starts: dict[tuple, float] = {}
    for event in output.trace:
        assert {"name", "ph", "pid", "tid"} <= set(event)
        if event["ph"] == "X" and event["pid"] < 2:
            key = event["pid"], event["tid"]
            assert event["ts"] >= starts.get(key, 0.0) - 1e-3, "steps of a rank overlap"
            starts[key] = event["ts"] + event["dur"]
    arrows = {event["ph"]: event for event in output.trace if event.get("cat") == "kv"}
    assert set(arrows) == {"b", "e", "s", "f"}
    counted_from_s = output.requests[80].arrival_s
    assert min(event["ts"] for event in output.trace if event["ph"] == "X") >= counted_from_s * 1e6 - 1
    at = world(scenario(STEADY, pool()), COSTS)
    few = Timeline(0.0, 1, max_events=100)
    at.service._on_run = few.observe
    at.run()
    assert 90 <= len(few.events(at.service.instances, [])) <= 110


def test_sampled_steps_thin_out_and_stand_for_all():
    sampled = [step for step in range(1 << 17) if step % stride_at(step) == 0]
    assert sampled[:33] == list(range(33)) and len(sampled) < 300
    assert sum(stride_at(step) for step in sampled) == pytest.approx(1 << 17, rel=0.001)


def test_more_gpus_than_the_cluster_has_do_not_fit():
    question = scenario(STEADY, pool(dp=9))
    with pytest.raises(Infeasible, match="9 GPUs"):
        simulate(question, question.plan, cost_models=[COSTS])


def test_what_can_never_run_is_refused_at_once():
    question = scenario(workload(Arrivals(kind="burst"), 50, 10, requests=3), pool(chunk_tokens=None, max_batch_tokens=40,
                                                                                  max_num_seqs=4))
    result = simulate(question, question.plan, cost_models=[COSTS]).result
    assert result.counts.rejected == 3 and "refused" in " ".join(result.warnings)
    question = scenario(workload(Arrivals(kind="burst"), 50, 10, requests=3), pool())
    tiny = LinearCosts(step_s_each=0.1, kv_blocks_per_rank=40)
    assert simulate(question, question.plan, cost_models=[tiny]).result.counts.rejected == 3


def test_twice_the_speed_is_half_the_time():
    """Scaling every second scales every result (powers of two, so exactly)."""
    fast = scenario(workload(Arrivals(kind="poisson", rate_per_s=16.0), 20, 20, requests=80), pool(dp=2, max_num_seqs=4))
    slow = scenario(workload(Arrivals(kind="poisson", rate_per_s=8.0), 20, 20, requests=80), pool(dp=2, max_num_seqs=4))
    quick = simulate(fast, fast.plan, cost_models=[LinearCosts(0.0078125, 0.0, 0.0, 0.000244140625)]).requests
    other = simulate(slow, slow.plan, cost_models=[LinearCosts(0.015625, 0.0, 0.0, 0.00048828125)]).requests
    assert [2 * r.finish_s for r in quick] == [r.finish_s for r in other]


def test_one_minute_of_r1_chat_on_32_gpus():
    model, on = load_model("deepseek-r1"), load_cluster("h200-4x8")
    fp8 = Precision(weights="fp8_block", experts="fp8_block", dispatch="fp8")
    plan = Plan(precision=fp8, pools=(PoolPlan(role="prefill", dp=8, ep=8, max_batch_tokens=8192, chunk_tokens=8192),
                                      PoolPlan(role="decode", dp=24, ep=24, redundant_experts=8, max_num_seqs=64)))
    traffic = workload(Arrivals(kind="poisson", rate_per_s=8.0), Lengths(kind="lognormal", mean=1200.0, cv=0.8, max_tokens=8192),
                       Lengths(kind="lognormal", mean=400.0, cv=0.7, max_tokens=4096), duration_s=60.0)
    question = Scenario(name="r1", model=model, cluster=on, workload=traffic, plan=plan, routing=Routing(kind="zipf", alpha=0.4))
    result = simulate(question, plan).result
    assert result.counts.finished == result.counts.submitted > 400
    assert len(result.pools[1].expert_load) == 58 and len(result.pools[1].expert_load[0]) == 24
    assert all(pool.memory is not None and pool.memory.free_bytes >= 0 for pool in result.pools)
