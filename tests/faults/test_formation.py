"""Who forms what after a loss: always a legal plan, of the seats that are left, as large as it can be."""

from __future__ import annotations

from itertools import combinations

import pytest
from chaos_kit import plan_of
from runtime_checkpoints import Checkpoints

from runtime.formation import Formation, first_formation, reform, shrink
from runtime.layout import check
from twin.spec.errors import RankFailed
from twin.spec.model import ModelSpec
from twin.spec.plan import Plan, PoolPlan

MIXED = {"role": "mixed"}
SHAPES = [
    ({**MIXED, "dp": 4, "ep": 4},),
    ({**MIXED, "dp": 4, "ep": 4, "redundant_experts": 4, "placement": "eplb_global"},),
    ({**MIXED, "dp": 2, "tp": 2, "ep": 4},),
    ({**MIXED, "dp": 4, "ep": 2},),
    ({**MIXED, "tp": 2, "ep": 2, "instances": 2},),
    ({"role": "prefill", "tp": 2, "ep": 2}, {"role": "decode", "dp": 2, "ep": 2}),
    ({"role": "prefill"}, {"role": "decode", "instances": 3}),
]


@pytest.fixture(scope="module")
def model(checkpoints: Checkpoints) -> ModelSpec:
    return checkpoints["qwen3_moe"].model


@pytest.mark.parametrize("pools", SHAPES, ids=lambda pools: "+".join(f"{p['role']}{i}" for i, p in enumerate(pools)))
def test_every_loss_leaves_a_legal_plan(pools: tuple[dict[str, object], ...], model: ModelSpec) -> None:
    plan = plan_of(*pools)
    now = first_formation(plan)
    for n in range(1, plan.gpus + 1):
        for lost in map(set, combinations(range(plan.gpus), n)):
            after = reform(now, lost, model)
            check(after.plan, model)
            Plan.model_validate(after.plan.model_dump())
            assert after.number == 1
            assert len(after.seats) == len(set(after.seats)) == after.plan.gpus
            assert {pool.role for pool in after.plan.pools} == {pool.role for pool in plan.pools}
            replaced = set(after.seats) & lost
            for _, shape, seats in after.members():
                assert set(seats) <= lost or not set(seats) & lost, "an instance is replaced as a whole or not at all"
                assert shape.ep * shape.expert_tp == len(seats)
            roles_left = {shape.role for _, shape, seats in now.members() if set(seats) - lost}
            assert bool(replaced) == (roles_left != {pool.role for pool in plan.pools})


def test_the_largest_shape_is_taken(model: ModelSpec) -> None:
    four = plan_of({**MIXED, "dp": 4, "ep": 4}).pools[0]
    assert [(s.dp, s.tp, s.ep) for s in (shrink(four, n, model) for n in (3, 2, 1))] == [(3, 1, 3), (2, 1, 2), (1, 1, 1)]
    two_by_two = plan_of({**MIXED, "dp": 2, "tp": 2, "ep": 4}).pools[0]
    assert [(s.dp, s.tp) for s in (shrink(two_by_two, n, model) for n in (3, 2, 1))] == [(1, 2), (1, 2), (1, 1)]
    cut = plan_of({**MIXED, "dp": 4, "ep": 2}).pools[0]  # experts over two ranks each
    assert shrink(cut, 2, model).expert_tp == 2, "experts are cut as before where they can be"


def test_losses_add_up_and_origins_stay(model: ModelSpec) -> None:
    """Two instances lose ranks one after the other; what serves keeps the names that it began with."""
    formation = first_formation(plan_of({**MIXED, "dp": 2, "ep": 2, "instances": 2}))
    once = reform(formation, {1}, model)
    assert sorted(zip(once.origins, (seats for _, _, seats in once.members()), strict=True)) == [((0, 0), [0]), ((0, 1), [2, 3])]
    twice = reform(once, {2}, model)
    assert sorted((origin, seats) for origin, _, seats in twice.members()) == [((0, 0), [0]), ((0, 1), [3])]
    assert len(twice.plan.pools) == 1, "equal shapes share a pool"
    assert twice.plan.pools[0].instances == 2
    gone = reform(twice, {0}, model)
    assert gone.seats == (3,)
    assert gone.rank_of(3) == 0
    assert gone.rank_of(0) is None


def test_what_cannot_be_is_said(model: ModelSpec) -> None:
    none = PoolPlan(role="mixed")
    with pytest.raises(RankFailed, match="0 ranks of a mixed instance"):
        shrink(none, 0, model)
    roles = Formation(3, plan_of(MIXED), (0,), ((0, 0),))
    assert reform(roles, {0}, model).seats == (0,), "the only instance gets a new process on its seat"
