"""One step in layer grain: it agrees with the step grain where nothing contends, and says more where something does."""

from __future__ import annotations

import numpy as np
import pytest
from sim_kit import workload

from twin.cost.batch import StepBatch
from twin.cost.model import CostModel
from twin.sim import simulate
from twin.sim.layers import follow_step
from twin.sim.outcome import expert_load
from twin.spec.load import load_cluster, load_model
from twin.spec.plan import Plan, PoolPlan, Precision
from twin.spec.scenario import Routing, Scenario
from twin.spec.workload import Arrivals

FP8 = Precision(weights="fp8_block", experts="fp8_block", dispatch="fp8")
DECODE, PREFILL = "decode", "prefill"


def cost(pool: PoolPlan, cluster: str = "h200-4x8", routing: Routing | None = None, model: str = "deepseek-r1",
         engine: str = "eptwin") -> CostModel:
    mixed = pool if pool.role == "mixed" else pool.model_copy(update={"role": "mixed"})
    plan = Plan(pools=(mixed,), precision=FP8, engine=engine)
    return CostModel(load_model(model), load_cluster(cluster), plan, pool, routing=routing)


def even(pool: PoolPlan) -> StepBatch:
    if pool.role == PREFILL:
        return StepBatch.prefill(np.full(pool.dp, 4096))
    return StepBatch.decode(np.full(pool.dp, 64), np.full(pool.dp, 64 * 2000))


@pytest.mark.parametrize(("pool", "cluster"), [
    (PoolPlan(role=DECODE, dp=32, ep=32, comm="deepep_low_latency"), "h200-4x8"),
    (PoolPlan(role=DECODE, dp=8, ep=8, comm="nccl"), "h200-1x8"),
    (PoolPlan(role=DECODE, dp=32, ep=32, redundant_experts=32, comm="nccl"), "h200-4x8"),
    (PoolPlan(role=PREFILL, dp=16, ep=16, comm="deepep_normal"), "h200-4x8"),
    (PoolPlan(role=DECODE, dp=2, tp=8, ep=16, comm="ag_rs"), "h200-2x8"),
    (PoolPlan(role="mixed", dp=1, tp=8, ep=8), "h200-1x8"),
    (PoolPlan(role="mixed", dp=1, tp=8, ep=1), "h200-1x8")])
def test_grains_agree_where_nothing_contends(pool, cluster):
    view = follow_step(cost(pool, cluster), even(pool))
    assert view is not None
    assert view.total_s == pytest.approx(view.step.total_s, rel=0.02)
    assert len(view.layers) == 61 and {layer.kind for layer in view.layers[:3]} == {"dense"}
    assert {layer.kind for layer in view.layers[3:]} == {"moe"}


@pytest.mark.parametrize("role", [DECODE, PREFILL])
def test_what_an_engine_takes_beyond_its_operators_is_in_both_grains(role):
    pool = PoolPlan(role=role, dp=8, ep=8, comm="nccl")
    view = follow_step(cost(pool, "h200-1x8", engine="trtllm"), even(pool))
    assert abs(view.step.parts_s["engine/slowdown"]) > 0.02 * view.step.total_s
    assert view.total_s == pytest.approx(view.step.total_s, rel=0.02)


def test_a_rank_with_less_to_do_waits_for_the_others():
    pool = PoolPlan(role=DECODE, dp=8, ep=8, comm="nccl")
    seqs = np.array([64, 8, 8, 8, 8, 8, 8, 8])
    view = follow_step(cost(pool, "h200-1x8"), StepBatch.decode(seqs, seqs * 4000))
    layer = view.layers[-1]
    begin = {span.rank: span.start_s for span in layer.spans if span.name == "experts"}
    attention = {span.rank: span.end_s for span in layer.spans if span.name == "attention and gate"}
    assert attention[0] > 1.5 * attention[1], "the long rank computes longer"
    assert min(begin.values()) >= attention[0], "nobody's experts start before the last rank has sent its tokens"


def test_the_layer_with_the_most_uneven_experts_takes_longest():
    pool = PoolPlan(role=DECODE, dp=8, ep=8, comm="nccl")
    flat = follow_step(cost(pool, "h200-1x8"), even(pool))
    assert len({layer.seconds for layer in flat.layers[3:]}) == 1
    uneven = cost(pool, "h200-1x8", Routing(kind="zipf", alpha=1.0))
    times = [layer.seconds for layer in follow_step(uneven, even(pool)).layers[3:]]
    fullest = [max(row) for row in expert_load(uneven)]
    assert len(set(times)) > 40
    assert int(np.argmax(times)) == int(np.argmax(fullest)) and int(np.argmin(times)) == int(np.argmin(fullest))


def test_two_overlapped_halves_have_no_single_order():
    assert follow_step(cost(PoolPlan(role=DECODE, dp=8, ep=8, tbo=True, comm="nccl"), "h200-1x8"),
                       even(PoolPlan(role=DECODE, dp=8, ep=8))) is None


def test_detail_adds_a_step_to_the_trace():
    model, on = load_model("qwen3-30b-a3b"), load_cluster("h200-1x8")
    plan = Plan(pools=(PoolPlan(role="mixed", dp=8, ep=8, comm="nccl"),))
    question = Scenario(name="q", model=model, cluster=on, plan=plan, workload=workload(
        Arrivals(kind="poisson", rate_per_s=20.0), 200, 20, requests=40))
    output = simulate(question, plan, detail=True)
    assert output.detail is not None and output.detail.total_s > 0
    extra = [event for event in output.trace if event["pid"] == 1]
    assert {event["name"] for event in extra} >= {"attention and gate", "dispatch", "experts", "combine"}
    assert output.result == simulate(question, plan, record_trace=False).result
