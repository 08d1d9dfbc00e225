"""What repeats in a search is worked out once, and gives what it gave when it was worked out each time."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from twin.cost import model as costs
from twin.cost.batch import StepBatch
from twin.cost.build import Shared, Site, build_shared
from twin.cost.comm import Exchange
from twin.cost.model import CostModel
from twin.plan.bounds import Bounds, alone
from twin.plan.space import enumerate_plans
from twin.spec.load import load_scenario
from twin.spec.plan import Plan, PoolPlan

LIMITS = ["search.max_num_seqs=[32,64]", "search.max_batch_tokens=[4096,8192]", "search.redundant_experts=[0]"]


@pytest.mark.parametrize("change", ["search.tbo=[false,true]", "search.mtp_draft_tokens=[0,1]", "engine=sglang"])
def test_limits_compile_nothing_anew(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scenario = load_scenario("r1_chat", [*LIMITS, "search.tp=[1]", "search.dp=[16]", change])
    plans = [plan for plan in enumerate_plans(scenario) if isinstance(plan, Plan)]
    compiled: Counter[str] = Counter()

    def counted(site: Site) -> Shared:
        compiled["shared"] += 1
        return build_shared(site)

    monkeypatch.setattr(costs, "build_shared", counted)
    bounds = Bounds(scenario)
    pools: dict[PoolPlan, Plan] = {}
    for plan in plans:
        for pool in plan.pools:
            pools.setdefault(alone(pool), plan)
    found = [bounds.pool(plan, pool) for pool, plan in pools.items()]
    shapes = {(p.role, p.tp, p.dp, p.ep, p.tbo, p.mtp_draft_tokens) for p in pools}
    assert len(pools) >= 4 * len(shapes), "limits make most of the pools"
    assert compiled["shared"] == len(shapes)
    assert [repr(one) for one in found] == [repr(Bounds(scenario).pool(plan, pool)) for pool, plan in pools.items()]


def test_contexts_alone_ask_for_no_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    scenario = load_scenario("r1_chat")
    plan = Plan(pools=(PoolPlan(role="mixed", dp=16, ep=16, max_num_seqs=64),), precision=scenario.search.precision,
                engine=scenario.engine)
    model, seqs = CostModel(scenario.model, scenario.cluster, plan, plan.pools[0]), np.arange(17, 33) // 8 * 8
    asked: Counter[str] = Counter()
    real = Exchange.seconds

    def seconds(self: Exchange, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        asked["exchange"] += 1
        return real(self, tokens)

    monkeypatch.setattr(Exchange, "seconds", seconds)
    none = np.zeros(16)
    batches = [StepBatch(seqs, seqs * length, none, none, none) for length in (100, 200, 300)]
    batches.append(StepBatch(seqs, seqs * 100, none + 64, none + 2048, none + 1))
    told = [model.step_s(one) for one in batches]
    assert asked["exchange"] == 2 * len(model.exchanges), "for the first decode and for the prompts"
    assert len(set(told)) == len(told)
    fresh = [CostModel(scenario.model, scenario.cluster, plan, plan.pools[0]).step_s(one) for one in batches]
    assert told == fresh
