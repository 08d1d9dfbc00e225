"""The graph, max-min sharing, and collectives against flow-level simulation and networkx."""

from __future__ import annotations

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twin.cost.network import Flow, Network
from twin.spec.cluster import ClusterSpec
from twin.spec.errors import SpecError
from twin.spec.load import load_cluster, presets


def changed(name: str, **network: float | int | bool) -> ClusterSpec:
    cluster = load_cluster(name)
    return cluster.model_copy(update={"network": cluster.network.model_copy(update=network)})


SPINE = Network(changed("h100-4x8", leaf_ports=2, oversubscription=2.0))


@pytest.mark.parametrize("cluster", ["h100-4x8", "gb200-nvl72", "h20-96g-2x8", "cpu-2rank"])
def test_routes_are_the_shortest_paths_of_the_graph(cluster: str) -> None:
    network = Network(load_cluster(cluster))
    graph = network.graph()
    for src, dst in [(0, 1), (0, network.gpus - 1), (network.gpus // 2, 0)]:
        others = [n for n in graph if n.startswith("gpu") and n not in (f"gpu{src}", f"gpu{dst}")]  # GPUs do not forward
        path = nx.shortest_path(nx.restricted_view(graph, others, []), f"gpu{src}", f"gpu{dst}")
        assert [graph.edges[a, b]["link"] for a, b in nx.utils.pairwise(path)] == list(network.route(src, dst))


def test_every_preset_makes_a_network() -> None:
    for name in presets("clusters"):
        network = Network(load_cluster(name))
        assert network.graph().number_of_edges() > 0
        assert (network.capacity > 0).all()


def test_alone_a_transfer_runs_at_its_narrowest_link() -> None:
    network = Network(load_cluster("h200-2x8"))
    assert network.transfer_s(0, 1, 450e9) == pytest.approx(1.0, abs=1e-5)
    assert network.transfer_s(0, 8, 50e9) == pytest.approx(1.0, abs=1e-5)
    assert network.transfer_s(3, 3, 1e12) == 0.0


def test_fan_in_shares_the_receiver() -> None:
    network = Network(load_cluster("h200-4x8"))
    rates = network.rates([Flow(8, 0), Flow(16, 0), Flow(24, 0), Flow(9, 1)])
    assert rates[:3] == pytest.approx([50e9 / 3] * 3)
    assert rates[3] == pytest.approx(50e9)
    assert network.fan_in_s([8, 16, 24], [0, 0, 0], 50e9) == pytest.approx(3.0, abs=1e-4)


def test_oversubscribed_uplinks_bound_what_crosses_the_spine() -> None:
    """A leaf of 2 NICs with 2:1 oversubscription has one NIC's worth of uplink: two crossing flows share it."""
    rates = SPINE.rates([Flow(0, 16), Flow(8, 24), Flow(1, 17)])
    assert rates[:2] == pytest.approx([25e9, 25e9])
    assert rates[2] == pytest.approx(50e9)
    assert SPINE.rates([Flow(0, 8)])[0] == pytest.approx(50e9)  # same rail, same leaf: no spine


FLOWS = st.lists(st.tuples(st.integers(0, 31), st.integers(0, 31)), min_size=1, max_size=24)


@settings(max_examples=60, deadline=None)
@given(FLOWS)
def test_rates_are_max_min_fair(pairs: list[tuple[int, int]]) -> None:
    """Within capacity, and every flow crosses a full link on which nobody is faster: the definition of max-min."""
    flows = [Flow(a, b) for a, b in pairs if a != b]
    rates = SPINE.rates(flows)
    load = np.zeros(len(SPINE.links))
    for flow, rate in zip(flows, rates, strict=True):
        load[list(SPINE.route(flow.src, flow.dst))] += rate
    assert (load <= SPINE.capacity * (1 + 1e-9)).all()
    for flow, rate in zip(flows, rates, strict=True):
        full = [link for link in SPINE.route(flow.src, flow.dst) if load[link] >= SPINE.capacity[link] * (1 - 1e-9)]
        others = [max(r for f, r in zip(flows, rates, strict=True) if link in SPINE.route(f.src, f.dst)) for link in full]
        assert any(rate >= other * (1 - 1e-9) for other in others)


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 12))
def test_all_to_all_is_a_lower_bound_of_flows(seed: int, ranks: int) -> None:
    """Never above the flow-level time."""
    rng = np.random.default_rng(seed)
    gpus = np.sort(rng.choice(32, ranks, replace=False))
    traffic = rng.uniform(1e6, 1e8, (ranks, ranks))
    flows = [Flow(int(gpus[i]), int(gpus[j]), traffic[i, j]) for i in range(ranks) for j in range(ranks) if i != j]
    assert SPINE.all_to_all_s(traffic, gpus) <= SPINE.finish_s(flows).max() * (1 + 1e-6) + 2e-5


def test_uniform_all_to_all_agrees_with_flows() -> None:
    network = Network(load_cluster("h100-4x8"))
    flows = [Flow(i, j, 1e7) for i in range(32) for j in range(32) if i != j]
    bound = network.all_to_all_s(np.full((32, 32), 1e7), range(32))
    assert bound == pytest.approx(float(network.finish_s(flows).max()), rel=1e-6)
    assert bound == pytest.approx(24e7 / 50e9, rel=0.01)  # each NIC sends to 24 ranks on other nodes


def test_link_matrix_is_link_bytes_kept_apart() -> None:
    rng = np.random.default_rng(1)
    traffic, gpus = rng.uniform(0, 1, (16, 16)), np.arange(4, 20)
    matrix = SPINE.link_matrix(traffic, gpus)
    assert matrix.sum(axis=1) == pytest.approx(SPINE.link_bytes(traffic, gpus))
    counted = np.zeros(len(SPINE.links))
    for i in range(16):
        for j in range(16):
            counted[list(SPINE.route(int(gpus[i]), int(gpus[j])))] += traffic[i, j] if i != j else 0
    assert matrix.sum(axis=1) == pytest.approx(counted)


def test_collectives_move_what_rings_move() -> None:
    network = Network(load_cluster("h200-2x8"))
    n = 1e9
    assert network.all_gather_s(n, range(8)) == pytest.approx(n * 7 / 8 / 450e9, rel=0.01)
    assert network.all_reduce_s(n, range(8)) == pytest.approx(2 * n * 7 / 8 / 450e9, rel=0.01)
    assert network.all_gather_s(n, range(16)) == pytest.approx(max(n * 7 / 8 / 450e9, n / 2 / (8 * 50e9)), rel=0.02)
    assert network.all_reduce_s(0, range(8)) == 0.0 == network.all_reduce_s(n, [3])
    small = network.all_reduce_s(1e3, range(8))
    assert small < 2 * 7 * 1e-6  # a tree beats the ring's 14 hops


def test_unreachable_and_unknown_gpus_are_said() -> None:
    network = Network(load_cluster("cpu-2rank"))
    with pytest.raises(SpecError, match="no GPU 7"):
        network.route(0, 7)
    lone = changed("cpu-2rank", nvlink_domain_gpus=1)
    with pytest.raises(SpecError, match="no NICs"):
        Network(lone).route(0, 1)
    with pytest.raises(SpecError, match="no NICs"):
        Network(lone).all_to_all_s(np.ones((2, 2)), [0, 1])
