"""Online rebalancing in the simulator: it sees a window, moves what pays, slows what it shares links with, and fades."""

from __future__ import annotations

import numpy as np
import pytest
from sim_kit import lengths
from test_sharing import slow_cluster, told

from twin.cost.model import CostModel
from twin.cost.roofline import bytes_of
from twin.sim import simulate
from twin.sim.simulate import make_costs
from twin.sim.world import World
from twin.spec.load import load_model
from twin.spec.plan import Eplb, Plan, PoolPlan
from twin.spec.results import RunResult
from twin.spec.scenario import Routing, Scenario
from twin.spec.workload import Arrivals, WorkloadSpec

MODEL = load_model("qwen3-30b-a3b").model_copy(update={"layers": 8, "layer_attention": ("full",) * 8, "layer_ffn": ("moe",) * 8})
SKEWED = {"kind": "lognormal", "sigma": 1.0}
EPLB = Eplb(window_steps=50, period_steps=200, budget_bytes=256 << 20)


def question(routing: dict, requests: int = 24, nic_bytes_per_s: float = 200e9, **pool) -> Scenario:
    """Eight ranks on four nodes, decoding long outputs at about 2 ms a step."""
    mixed = PoolPlan(**{"role": "mixed", "dp": 8, "ep": 8, "comm": "nccl", "max_num_seqs": 64, "redundant_experts": 16, **pool})
    traffic = WorkloadSpec(arrivals=Arrivals(kind="closed_loop", concurrency=requests), isl=lengths(64), osl=lengths(800),
                           requests=requests)
    return Scenario(name="q", model=MODEL, cluster=slow_cluster(nic_bytes_per_s), workload=traffic, routing=Routing(**routing),
                    plan=Plan(pools=(mixed,)))


def answer(asked: Scenario) -> RunResult:
    return simulate(asked, asked.plan, record_trace=False).result


def imbalances(result: RunResult) -> np.ndarray:
    return np.array(next(s for s in result.series if "fullest rank" in s.name).value)


def test_a_linear_placement_is_put_right_once_and_left_alone():
    result = answer(question(SKEWED, eplb=EPLB))
    moved = [one for one in result.pools[0].rebalances if one.moved_bytes]
    assert len(moved) == 1, "popularity stays, so nothing more pays"
    only = moved[0]
    assert only.imbalance_before > 1.3 and only.imbalance_after < 1.1
    assert only.gain_s_per_step * EPLB.period_steps > only.cost_s > 0
    assert only.moved_bytes == only.copies * MODEL.expert_params * bytes_of("bf16")
    assert only.layers <= only.copies and only.steps * EPLB.budget_bytes >= only.moved_bytes
    assert only.end_s > only.start_s > 0
    series = imbalances(result)
    assert series[0] == pytest.approx(only.imbalance_before, rel=0.05) and series[-1] < 1.1
    assert (np.diff(series) <= 1e-9).all(), "it gets better in stages, while layers arrive"
    assert RunResult.model_validate_json(result.model_dump_json()) == result


def test_drift_wears_a_placement_out_and_rebalancing_mends_it():
    drifting = {**SKEWED, "drift_half_life_s": 0.5}
    left_alone = imbalances(answer(question(drifting, placement="eplb_global")))
    mended = answer(question(drifting, placement="eplb_global", eplb=EPLB))
    assert left_alone[0] < 1.1 and left_alone[-20:].mean() > 1.2
    assert sum(one.moved_bytes > 0 for one in mended.pools[0].rebalances) >= 2
    assert imbalances(mended).mean() < left_alone.mean() - 0.05
    assert any("half life of 0.5 s" in line for line in mended.assumptions)
    alone = answer(question(drifting, placement="eplb_global"))
    assert mended.pools[0].breakdown_s["moe/experts"] < alone.pools[0].breakdown_s["moe/experts"]


def test_what_saves_less_than_it_costs_is_not_moved():
    result = answer(question({"kind": "lognormal", "sigma": 0.02}, placement="eplb_global", eplb=EPLB))
    assert result.pools[0].rebalances and all(one.moved_bytes == 0 == one.steps for one in result.pools[0].rebalances)


def test_weights_on_their_way_slow_the_exchanges_beside_them(monkeypatch):
    """On slow NICs a migration takes a good part of them for as long as it lasts, and no step after it."""
    monkeypatch.setattr("twin.sim.balance.should_rebalance", lambda *_: True)
    asked = question(SKEWED, nic_bytes_per_s=1e9, eplb=EPLB.model_copy(update={"budget_bytes": 64 << 20}))
    at = World(asked, asked.plan, make_costs(asked, asked.plan))
    at.run()
    instance = at.service.instances[0]
    news = next(one for one in instance.experts.rebalances if one.moved_bytes)
    log = instance.log
    step_s = log.column("step_s")
    begins = log.column("end_s") - step_s
    during = (begins >= news.start_s - 1e-12) & (begins < news.end_s - 1e-12)
    assert during.sum() == news.steps
    before = step_s[np.flatnonzero(during)[0] - 1]
    assert step_s[np.flatnonzero(during)[0]] > 1.02 * before
    assert step_s[np.flatnonzero(during)[-1] + 1] < before
    assert instance.presence._moved_k is None


def test_the_bytes_of_a_migration_arrive_where_they_left_for():
    asked = question(SKEWED, eplb=EPLB)
    at = World(asked, asked.plan, make_costs(asked, asked.plan))
    seen = []
    experts = at.service.instances[0].experts
    count = experts._link_bytes
    experts._link_bytes = lambda plan: seen.append((plan, count(plan))) or seen[-1][1]
    at.run()
    plan, sent = seen[0]
    links = at.service.costs[0].network.links
    total = {kind: sum(b for link, b in zip(links, sent, strict=True) if link.name.startswith(kind))
             for kind in ("nic_up", "nic_down", "nvlink_up", "nvlink_down")}
    assert total["nic_up"] == pytest.approx(total["nic_down"]) and total["nvlink_up"] == pytest.approx(total["nvlink_down"])
    one = MODEL.expert_params * bytes_of("bf16")
    assert total["nic_up"] + total["nvlink_up"] <= plan.num_copies * one * (1 + 1e-9)
    assert total["nic_up"] > 0


@pytest.mark.parametrize("pool", [{}, {"eplb": EPLB}, {"eplb": EPLB, "mtp_draft_tokens": 1}])
def test_many_steps_at_once_drift_as_single_ones(pool):
    asked = question({**SKEWED, "drift_half_life_s": 0.5}, requests=12, placement="eplb_global", **pool)
    fast, slow = (simulate(asked, asked.plan, coalesce=coalesce) for coalesce in (True, False))
    assert told(fast) == told(slow)


def test_without_drift_and_period_nothing_is_followed():
    asked = question(SKEWED)
    at = World(asked, asked.plan, make_costs(asked, asked.plan))
    assert all(i.experts is None and i.presence is None for i in at.service.instances)
    result = answer(asked)
    assert not result.pools[0].rebalances and not any("fullest" in s.name for s in result.series)


def test_relaid_costs_are_those_of_a_pool_built_so():
    asked = question(SKEWED)
    other = question(SKEWED, placement="eplb_global")
    one, built = (make_costs(q, q.plan)[0] for q in (asked, other))
    assert isinstance(one, CostModel)
    relaid = one.relaid(built.site.popularity_LE, built.site.placement)
    seqs, context = np.full(8, 32), np.full(8, 32 * 500)
    assert relaid.decode_s(seqs[None], context[None])[0] == built.decode_s(seqs[None], context[None])[0]
    assert one.decode_s(seqs[None], context[None])[0] > relaid.decode_s(seqs[None], context[None])[0]
