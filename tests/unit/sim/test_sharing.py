"""KV transfers and the collectives of steps on the same links: who gets what, and that nobody gets more than there is."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from sim_kit import lengths

from twin.cost.batch import StepBatch
from twin.cost.model import CostModel
from twin.cost.network import Network
from twin.cost.steps import CalibratedSteps, PoolSteps
from twin.cost.wire import wire_of
from twin.sim import simulate
from twin.sim.clock import Clock
from twin.sim.layers import StepView, follow_step
from twin.sim.presence import Presence, rows
from twin.sim.simulate import make_costs
from twin.sim.transfers import Transfers
from twin.sim.world import World
from twin.spec.cluster import ClusterSpec, NetworkSpec, NodeGroup
from twin.spec.load import load_cluster, load_model
from twin.spec.plan import Plan, PoolPlan
from twin.spec.scenario import Scenario
from twin.spec.workload import Arrivals, WorkloadSpec

DECODE = {"role": "decode", "dp": 8, "ep": 8, "comm": "nccl"}


def slow_cluster(nic_bytes_per_s: float = 2e9, nodes: int = 8) -> ClusterSpec:
    """Nodes of two H200, one slow NIC each, so that exchanges and KV both hurt."""
    gpu = load_cluster("h200-1x8").groups[0].gpu
    return ClusterSpec(name="slow", groups=(NodeGroup(nodes=nodes, gpus_per_node=2, gpu=gpu),), network=NetworkSpec(
        nvlink_bytes_per_s=450e9, nvlink_domain_gpus=2, nics_per_node=1, nic_bytes_per_s=nic_bytes_per_s, pcie_bytes_per_s=200e9))


def question(engine: str = "eptwin", rate: float = 6.0, requests: int = 60, **pools) -> Scenario:
    decode = {**DECODE, "dp": 8, "ep": 8, "max_num_seqs": 16, **pools}
    plan = Plan(engine=engine, pools=(PoolPlan(role="prefill", dp=4, ep=4, comm="nccl"), PoolPlan(**decode)))
    traffic = WorkloadSpec(arrivals=Arrivals(kind="poisson", rate_per_s=rate), isl=lengths(1500), osl=lengths(40),
                           requests=requests)
    return Scenario(name="q", model=load_model("qwen3-30b-a3b"), cluster=slow_cluster(), workload=traffic, plan=plan,
                    engine=engine)


def cost(pool: PoolPlan, on: ClusterSpec) -> CostModel:
    plan = Plan(pools=(pool.model_copy(update={"role": "mixed"}),))
    return CostModel(load_model("qwen3-30b-a3b"), on, plan, pool)


def even(dp: int, seqs: int = 64) -> StepBatch:
    return StepBatch.decode(np.full(dp, seqs), np.full(dp, seqs * 1000))


@pytest.mark.parametrize("comm", ["nccl", "deepep_normal", "deepep_low_latency", "ag_rs"])
def test_the_wire_is_what_the_step_is_priced_by(comm):
    """The slowest link of each leg is the exchange's own seconds, and bytes that leave NICs arrive at NICs."""
    on = slow_cluster()
    model = cost(PoolPlan(**{**DECODE, "comm": comm}), on)
    batch = even(8)
    wire, parts = wire_of(model, range(8)), model.step(batch).parts_s
    tokens = model.exchanged_tokens(batch)
    for leg, name in zip(wire.legs, ("dispatch", "combine"), strict=True):
        known = parts.get(f"moe/{name}/nvlink", 0.0) + parts.get(f"moe/{name}/rdma", 0.0)
        assert leg.times * (leg.seconds_kd @ tokens).max() == pytest.approx(known, rel=1e-9)
    names = [Network(on).links[link].name for link in wire.links_k]
    sent = wire.step_bytes(tokens)
    up, down = (sum(b for n, b in zip(names, sent, strict=True) if n.startswith(kind)) for kind in ("nic_up", "nic_down"))
    assert up == pytest.approx(down) and up > 0
    assert wire.more_s(wire.alone_s(tokens), np.zeros(len(sent))) == 0.0


@pytest.mark.parametrize("comm", ["nccl", "deepep_low_latency"])
def test_both_grains_agree_on_what_a_flow_costs_the_exchanges(comm):
    """Layer grain follows every message beside a KV flow that never ends; step grain only knows parts of links."""
    on = slow_cluster()
    model = cost(PoolPlan(**{**DECODE, "comm": comm}), on)
    batch = even(8)
    alone, beside = follow_step(model, batch), follow_step(model, batch, beside=((12, 0),))
    network, wire = Network(on), wire_of(model, range(8))
    taken = np.isin(wire.links_k, network.route(12, 0)) / (1.0 + wire.flows_k)
    tokens = model.exchanged_tokens(batch)
    more_s = replace(wire, legs=wire.legs[:1]).more_s(wire.alone_s(tokens)[:1], taken) / wire.legs[0].times
    assert more_s > 1e-4, "the case must hurt"
    assert dispatch_s(alone) + more_s == pytest.approx(dispatch_s(beside), rel=0.02)
    # ranks that are served early send back early, on links of their own in that grain: it gains a little by it
    both_s = alone.total_s + model.longer_s(rows(batch, 1), wire.more_s(wire.alone_s(tokens), taken))[0]
    assert both_s == pytest.approx(beside.total_s, rel=0.05)


def dispatch_s(view: StepView) -> float:
    return max(span.end_s - span.start_s for span in view.layers[-1].spans if span.name == "dispatch")


class Steady:
    """A neighbour that puts the same on one link all the time."""

    def __init__(self, link: int, rate: float, flows: int) -> None:
        self.on_link = np.arange(10_000) == link
        self.links_k, self._load, self.taken = np.array([link]), (np.array([rate]), np.array([float(flows)])), 0.0

    def load(self):
        return self._load

    def squeeze(self, taken_k):
        self.taken = float(taken_k[0])


@pytest.mark.parametrize(("busy", "flows", "share"), [(0.25, 3, 0.75), (0.9, 3, 0.25), (0.9, 9, 0.1), (0.0, 3, 1.0)])
def test_kv_gets_what_is_left_or_its_fair_part(busy, flows, share):
    on = slow_cluster(nic_bytes_per_s=1e9)
    network, clock, ended = Network(on), Clock(), []
    link = next(i for i, one in enumerate(network.links) if one.name == "nic_down/1")
    transfers, steady = Transfers(clock, network), Steady(link, busy * 1e9, flows)
    transfers.add_neighbour(steady)
    transfers.start([0], [2], 5e9, lambda: ended.append(clock.now))
    clock.step()
    assert steady.taken == pytest.approx(min(share, 1 / (1 + flows)))
    clock.run()
    assert ended[0] == pytest.approx(5.0 / share, rel=1e-4)
    assert steady.taken == 0.0, "nothing is taken when nothing flows"


def links_are_not_overfull(at: World) -> bool:
    """KV at its rate now and what steps send in their time now fit each link. True where both are on one."""
    transfers = at.service.transfers
    load = np.zeros(len(transfers.capacity))
    for instance in at.service.instances:
        run, presence = instance._run, instance.presence
        if run is None or presence.wire is None:
            continue
        done = instance._steps_done(run)
        length_s = run.pace_s if run.retimed == done else float(run.step_s[done])
        tokens = presence.costs.exchanged_tokens(run.batch)
        load[presence.links_k] += presence.wire.step_bytes(tokens) / length_s
    # step bytes are an average over a step that grows with its context: a hair above is rounding
    assert (load + transfers.rate_on <= transfers.capacity * (1 + 1e-3)).all()
    return bool(((load > 0) & (transfers.rate_on > 0)).any())


@pytest.mark.parametrize("engine", ["eptwin", "sglang"])
def test_no_link_carries_more_than_it_can(engine):
    asked = question(engine)
    at = World(asked, asked.plan, make_costs(asked, asked.plan))
    both = 0
    while not at.is_over:
        at.step()
        if not at.service.transfers._changed:  # rates are found once all of a moment has happened
            both += links_are_not_overfull(at)
    assert both > 50
    moved = sum(at.service.costs[0].kv_transfer_bytes(r.isl) for r in at.clients.sent)
    nics = [i for i, link in enumerate(at.service.transfers.network.links) if link.name.startswith("nic_down")]
    assert at.service.transfers.crossed_bytes()[nics].sum() == pytest.approx(moved)


def told(output) -> tuple:
    return output.result.model_dump_json(exclude={"provenance"}), [r.model_dump_json() for r in output.requests], output.trace


@pytest.mark.parametrize("pools", [{}, {"tbo": True, "tbo_min_tokens": 2}])
def test_many_steps_at_once_are_squeezed_as_single_ones(pools):
    asked = question(**pools)
    assert told(simulate(asked, asked.plan)) == told(simulate(asked, asked.plan, coalesce=False))


def test_sharing_costs_both_sides(monkeypatch):
    asked = question()
    shared = simulate(asked, asked.plan).result
    monkeypatch.setattr(Presence, "squeeze", lambda self, taken: None)
    monkeypatch.setattr(Presence, "load", lambda self: (np.zeros(len(self.links_k)),) * 2)
    apart = simulate(asked, asked.plan).result
    assert shared.pools[1].breakdown_s["overlap/shared_links"] > 0
    assert "overlap/shared_links" not in apart.pools[1].breakdown_s
    assert shared.pools[0].kv_transfer_s.mean > 1.02 * apart.pools[0].kv_transfer_s.mean
    assert shared.latencies.tpot_s.mean > apart.latencies.tpot_s.mean


def test_nothing_changes_where_no_link_is_shared():
    """Decode inside one NVLink domain: KV comes in over the NIC, exchanges stay on NVLink."""
    asked = question(dp=2, ep=2)
    network = Network(asked.cluster)
    costs = make_costs(asked, asked.plan)
    assert not np.isin(wire_of(costs[1], (4, 5)).links_k, network.route(0, 4)).any()
    assert "overlap/shared_links" not in simulate(asked, asked.plan, cost_models=costs).result.pools[1].breakdown_s


def test_all_reduces_of_tp_groups_over_nodes_are_on_the_wire():
    """A ring over two nodes of two: of all that the group passes on, one hop in four leaves each node, twice all but a quarter
    of every token, as often as the layers have sums."""
    on = slow_cluster()
    model = cost(PoolPlan(role="decode", dp=1, tp=4, ep=1), on)
    wire = wire_of(model, range(4))
    sums = next(one for one in model.collectives if one.key == "tp/all_reduce")
    names = [Network(on).links[link].name for link in wire.links_k]
    sent = wire.step_bytes(model.exchanged_tokens(even(1)))
    up = [b for name, b in zip(names, sent, strict=True) if name.startswith("nic_up")]
    assert up == pytest.approx([2 * 3 / 4 * 64 * sums.unit_bytes * sums.times] * 2)
    taken = np.full(len(wire.links_k), 0.5)
    assert wire.more_s(wire.alone_s(np.array([64.0])), taken) > 0


def test_calibrated_steps_share_links_too(monkeypatch):
    asked = question()
    costs = make_costs(asked, asked.plan)
    decode = asked.plan.pools[1]
    steps = PoolSteps(pool=1, role="decode", dp=decode.dp, tp=1, ep=decode.ep, samples=(),
                      fit={"step": costs[1].step_s(even(8, 4))})
    priced = (costs[0], CalibratedSteps(costs[1], steps))
    assert simulate(asked, asked.plan, cost_models=priced).result.pools[1].breakdown_s["overlap/shared_links"] > 0
