"""`simulate`: one plan under one scenario's traffic, from the spec to a prediction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from twin.cost.choose import pool_costs
from twin.cost.model import CostModel
from twin.cost.network import Network
from twin.policy.arrivals import named_stream
from twin.sim.assumptions import assumptions, warnings
from twin.sim.breakdown import Breakdown, together
from twin.sim.instance import Instance
from twin.sim.layers import StepView, follow_step
from twin.sim.outcome import gaps, intervals, pool_result, result_source, series
from twin.sim.request import Request
from twin.sim.run import Run
from twin.sim.service import PoolCosts, Switches, lay_out
from twin.sim.timeline import Timeline
from twin.sim.world import World
from twin.spec.cluster import ClusterSpec
from twin.spec.plan import Plan
from twin.spec.provenance import provenance
from twin.spec.results import RequestRecord, RunResult
from twin.spec.scenario import Scenario
from twin.spec.summarise import count, counted_window, summarise


@dataclass(frozen=True)
class SimOutput:
    """`result` is the prediction, `requests` all requests in order of arrival, `trace` Chrome trace events, `detail` one
    step in layer grain when that was asked for and the costs have layers."""

    result: RunResult
    requests: list[RequestRecord]
    trace: list[dict[str, Any]]
    detail: StepView | None = None


_WATCHED = ("first_token", "finish", "reject")
Hopeless = Callable[[str, Request], bool]
"""Told when a request got its first token ("first_token"), its last ("finish") or was refused ("reject"). True: that will do."""


class GivenUp(Exception):
    """The simulation was ended by `hopeless`."""


def simulate(scenario: Scenario, plan: Plan, *, detail: bool = False, max_requests: int | None = None,
             record_trace: bool = True, cost_models: Sequence[PoolCosts] | None = None,
             coalesce: bool = True, in_flight: int = 0, brief: bool = False, hopeless: Hopeless | None = None) -> SimOutput:
    """Serve the scenario's traffic with `plan` and say what happens.

    `cost_models`: one for each pool, made here otherwise. `max_requests` shortens the traffic. `coalesce=False` takes
    decode steps one at a time: slower, same results. `detail` follows one step, from the middle of the run of the pool that
    decodes, layer by layer, and adds it to the trace. `in_flight` requests are in decode when the run begins, so that an
    open loop need not fill the service first; they count for throughput alone. `brief` leaves out of the result what only
    readers want (parts and sources of steps, intervals, gaps between tokens, series); all else is the same. `hopeless` may
    end the run early. Raises Infeasible when the plan does not fit the cluster or its memory, SpecError for traffic that
    cannot be drawn, GivenUp when `hopeless` said so.
    """
    costs = list(cost_models) if cost_models is not None else make_costs(scenario, plan)
    breakdowns = [Breakdown() for pool in plan.pools for _ in range(pool.instances)]
    observers: list[Callable[[Instance, Run], None]] = [] if brief else [
        lambda instance, run: breakdowns[instance.number].observe(instance, run)]

    def watch(_: float, what: str, request_id: int, *__: int) -> None:
        if what in _WATCHED and hopeless is not None and hopeless(what, world.service.requests[request_id]):
            world.clients.give_up()

    world = World(scenario, plan, costs, max_requests=max_requests, in_flight=in_flight, switches=Switches(
        coalesce=coalesce, observer=watch if hopeless is not None else None,
        on_run=lambda instance, run: _tell(observers, instance, run)))
    timeline = None
    if record_trace:
        timeline = Timeline(world.clients.counted_from_s(), len(world.service.instances))
        observers.append(timeline.observe)
    world.run()
    if world.clients.gave_up:
        raise GivenUp
    records = [request.record() for request in world.clients.sent]
    result = _result(scenario, plan, world, records, breakdowns, brief=brief)
    trace = timeline.events(world.service.instances, world.clients.sent) if timeline else []
    view = _detail(world, breakdowns) if detail else None
    if view is not None:
        trace += view.trace(pid=len(world.service.instances))
    return SimOutput(result, records, trace, view)


def _detail(world: World, breakdowns: Sequence[Breakdown]) -> StepView | None:
    instance = world.service.decode.instances[0]
    batch = breakdowns[instance.number].middle_batch(len(instance.log))
    return follow_step(instance.costs, batch) if batch is not None and isinstance(instance.costs, CostModel) else None


def _tell(observers: Sequence[Callable[[Instance, Run], None]], instance: Instance, run: Run) -> None:
    for observer in observers:
        observer(instance, run)


def make_costs(scenario: Scenario, plan: Plan) -> list[PoolCosts]:
    """The cost model of every pool, placed where its first instance sits."""
    network = Network(scenario.cluster)
    seed = int(named_stream(scenario.seed, "routing").integers(2**31))
    models: list[PoolCosts] = []
    for pool, sites in zip(plan.pools, lay_out(plan, scenario.cluster), strict=True):
        first = sites[0][0] - _group_start(scenario.cluster, pool.node_group)
        models.append(pool_costs(scenario, plan, pool, network=network, first_gpu=first, seed=seed))
    return models


def _group_start(cluster: ClusterSpec, name: str | None) -> int:
    """Index of the first GPU of a node group in the cluster."""
    place = cluster.groups.index(cluster.group(name))
    return sum(group.gpus for group in cluster.groups[:place])


def _result(scenario: Scenario, plan: Plan, world: World, records: list[RequestRecord],
            breakdowns: list[Breakdown], *, brief: bool) -> RunResult:
    workload, instances = scenario.workload, world.service.instances
    requests = world.clients.sent
    background = [request.record() for request in world.clients.background]
    window = counted_window([*background, *records], open_loop=workload.arrivals.kind in ("poisson", "deterministic", "trace"))
    summary = summarise([*background, *records], workload, gpus=plan.gpus, usd_per_h=_usd_per_h(scenario.cluster, plan),
                        itl_s=None if brief else gaps(instances, world.service.requests))
    by_pool = [together(breakdowns[i.number] for i in instances if i.pool_index == index) for index in range(len(plan.pools))]
    pools = tuple(pool_result(pool, costs, [i for i in instances if i.pool_index == index], requests,
                              by_pool[index], window)
                  for index, (pool, costs) in enumerate(zip(plan.pools, world.service.costs, strict=True)))
    by_role: dict[str, Breakdown] = {pool.role: breakdown for pool, breakdown in zip(plan.pools, by_pool, strict=True)}
    return RunResult(
        kind="prediction", name=plan.name, model=scenario.model.name, cluster=scenario.cluster.name, plan=plan,
        provenance=provenance(scenario, plan, seed=scenario.seed),
        latencies=summary.latencies, throughput=summary.throughput, counts=count(records), steady=summary.steady,
        cost=summary.cost, pools=pools, intervals={} if brief else intervals(summary, by_role),
        series=() if brief else series(instances, records, plan.pools), source=result_source(by_pool),
        assumptions=assumptions(scenario, plan), warnings=warnings(scenario, plan, summary, pools))


def _usd_per_h(cluster: ClusterSpec, plan: Plan) -> float | None:
    """What the plan's GPUs cost an hour; None where a price is not stated."""
    prices = [cluster.group(pool.node_group).price_usd_per_gpu_h for pool in plan.pools]
    if any(price is None for price in prices):
        return None
    return float(np.sum([pool.gpus * price for pool, price in zip(plan.pools, prices, strict=True) if price is not None]))
