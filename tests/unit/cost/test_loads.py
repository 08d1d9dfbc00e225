"""What the quick ways of compiling an exchange skip changes nothing: shared loads, products with lone ranks, reversed links."""

from __future__ import annotations

import numpy as np
import pytest
from cost_cases import cost_model, gqa_model, pool_of

from twin.cost.build import crossings
from twin.cost.comm import compile_exchange, through
from twin.cost.network import Network, network_of
from twin.spec.load import load_cluster


def test_products_with_lone_ranks_are_products() -> None:
    rng = np.random.default_rng(0)
    matrix = rng.random((7, 4))
    lone = (np.eye(4), np.diag([1.0, 0.0, 2.0, 3.0]))
    for square in (*lone, rng.random((4, 4)), np.repeat(np.eye(2), 2, axis=0), np.ones((4, 1))):
        assert through(matrix, square) == pytest.approx(matrix @ square, rel=1e-12)


@pytest.mark.parametrize("cluster", ["h200-3x8", "gb200-nvl72-18x4", "cpu-2rank"])
def test_links_turn_round_by_their_names(cluster: str) -> None:
    network = Network(load_cluster(cluster))
    swap = {"up": "down", "down": "up"}
    for link, back in zip(network.links, network.reversed, strict=True):
        kind, index = link.name.split("/")
        prefix, way = kind.rsplit("_", 1)
        assert network.links[back].name == f"{prefix}_{swap[way]}/{index}"
        assert network.links[back].bytes_per_s == network.capacity[back] == link.bytes_per_s
    assert [link.kind == "nvlink" for link in network.links] == network.nvlink_links.tolist()


@pytest.mark.parametrize("comm", ["nccl", "deepep_normal", "deepep_low_latency", "ag_rs"])
def test_dispatch_and_combine_share_their_loads(comm: str) -> None:
    cost = cost_model(gqa_model(), "h200-2x8", pool_of(dp=16, ep=16, comm=comm))
    site, tokens = cost.site, np.random.default_rng(1).integers(1, 99, (3, 16)).astype(float)
    for crossing, (name, shared) in zip(crossings(site), cost.exchanges, strict=True):
        alone = compile_exchange(crossing.protocol, crossing.phase, crossing.reach, site.network, site.gpus_R,
                                 crossing.senders_Rd, crossing.token_bytes, backwards=crossing.backwards)
        for a, b in zip(alone.seconds(tokens), shared.seconds(tokens), strict=True):
            assert a == pytest.approx(b, rel=1e-12), name


def test_a_cluster_has_one_network() -> None:
    assert network_of(load_cluster("h200-2x8")) is network_of(load_cluster("h200-2x8"))
    first, second = (cost_model(gqa_model(), "h200-2x8", pool_of(dp=8, ep=8)) for _ in range(2))
    assert first.network is second.network
