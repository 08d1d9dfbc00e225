"""Which process is which rank of which plan, and what those that are left form when some are lost.

A seat is a process's number: its rank in the first formation, which it keeps. Every instance that lost ranks takes the
largest legal shape of those left: first with its TP degree and fewer DP ranks, else with a smaller TP degree; experts are
spread over as many ranks as before or as there are. What then has no place is ended. An instance of which nobody is left
is given up while others do its work; the only one of its role gets new processes on its old seats.
"""

from __future__ import annotations

from dataclasses import dataclass

from runtime.layout import check
from twin.spec.errors import RankFailed, SpecError
from twin.spec.model import ModelSpec
from twin.spec.plan import Plan, PoolPlan

Place = tuple[int, int]
"""(pool, instance) in the first formation's plan."""
_MAX_POOLS = 16


@dataclass(frozen=True)
class Formation:
    """The plan's rank r is the process on `seats[r]`. `origins` says for every instance of the plan, in order of rank, which
    one of the first plan it was. `number` counts formations from 0."""

    number: int
    plan: Plan
    seats: tuple[int, ...]
    origins: tuple[Place, ...]

    def rank_of(self, seat: int) -> int | None:
        """The seat's rank, None for one that takes no part any more."""
        return self.seats.index(seat) if seat in self.seats else None

    def members(self) -> list[tuple[Place, PoolPlan, list[int]]]:
        """(origin, shape, seats) of every instance."""
        shapes = [pool for pool in self.plan.pools for _ in range(pool.instances)]
        found, first = [], 0
        for origin, shape in zip(self.origins, shapes, strict=True):
            found.append((origin, shape, list(self.seats[first:first + shape.world])))
            first += shape.world
        return found


def first_formation(plan: Plan) -> Formation:
    """The plan as it is stated."""
    origins = tuple((index, instance) for index, pool in enumerate(plan.pools) for instance in range(pool.instances))
    return Formation(0, plan, tuple(range(plan.gpus)), origins)


def reform(now: Formation, lost: set[int], model: ModelSpec) -> Formation:
    """The formation after `lost`; seats of it that are in `lost` want new processes. Raises RankFailed when no legal plan
    is left."""
    members = now.members()
    alive = [(origin, shape, [seat for seat in seats if seat not in lost], seats) for origin, shape, seats in members]
    serving = {shape.role for _, shape, left, _ in alive if left}
    kept: list[tuple[Place, PoolPlan, list[int]]] = []
    for origin, shape, left, seats in alive:
        if left:
            smaller = shape if len(left) == len(seats) else shrink(shape, len(left), model)
            kept.append((origin, smaller, left[:smaller.world]))
        elif shape.role not in serving:
            serving.add(shape.role)
            kept.append((origin, shape, seats))
    return _arranged(now, kept)


def shrink(pool: PoolPlan, gpus: int, model: ModelSpec) -> PoolPlan:
    """The largest legal shape of a pool's instance on at most `gpus` GPUs."""
    for tp in range(min(pool.tp, gpus), 0, -1):
        for dp in range(gpus // tp, 0, -1):
            for ep in _spreads(dp * tp, pool):
                shape = _shape(pool, dp, tp, ep, model)
                if shape is not None:
                    return shape
    raise RankFailed(f"{gpus} ranks of a {pool.role} instance cannot hold the model in any shape", rank=0, where="reform")


def _spreads(world: int, pool: PoolPlan) -> list[int]:
    """EP degrees to try: experts cut as before, then not cut at all, then anything."""
    divisors = [ep for ep in range(world, 0, -1) if world % ep == 0]
    same = [world // pool.expert_tp] if world % pool.expert_tp == 0 else []
    return list(dict.fromkeys([*same, *divisors]))


def _shape(pool: PoolPlan, dp: int, tp: int, ep: int, model: ModelSpec) -> PoolPlan | None:
    """The pool in this shape, with slots that divide; None when the model cannot be cut so."""
    experts = model.moe.experts if model.moe else 0
    wanted = pool.redundant_experts if ep > 1 else 0
    spare = wanted + -(experts + wanted) % ep if experts else 0
    if experts + spare > experts * ep:
        return None
    fields = pool.model_dump() | {"instances": 1, "dp": dp, "tp": tp, "ep": ep, "redundant_experts": spare}
    shape = PoolPlan.model_validate(fields)
    try:
        check(Plan(pools=(shape.model_copy(update={"role": "mixed"}),)), model)
    except SpecError:
        return None
    return shape


def _arranged(now: Formation, kept: list[tuple[Place, PoolPlan, list[int]]]) -> Formation:
    """Pools of equal shape and origin side by side, as a plan wants them."""
    pools: dict[tuple[int, PoolPlan], list[tuple[Place, list[int]]]] = {}
    for origin, shape, seats in kept:
        pools.setdefault((origin[0], shape.model_copy(update={"instances": 1})), []).append((origin, seats))
    roles = {shape.role for _, shape in pools}
    if len(pools) > _MAX_POOLS or roles not in ({"mixed"}, {"prefill", "decode"}):
        raise RankFailed("what is left cannot form an engine", rank=0, where="reform")
    shapes = tuple(shape.model_copy(update={"instances": len(group)}) for (_, shape), group in pools.items())
    plan = now.plan.model_copy(update={"pools": shapes})
    in_order = [member for group in pools.values() for member in group]
    return Formation(now.number + 1, plan, tuple(seat for _, seats in in_order for seat in seats),
                     tuple(origin for origin, _ in in_order))
