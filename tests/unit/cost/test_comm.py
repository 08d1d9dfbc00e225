"""Bytes on links against traffic counted token by token, and what a protocol's legs add up to."""

from __future__ import annotations

import numpy as np
import pytest
from cost_cases import cost_model, pool_of

from twin.cost.batch import StepBatch
from twin.cost.build import reach_of
from twin.cost.comm import kv_transfer_s, pattern_traffic
from twin.cost.network import Network
from twin.cost.protocols import PROTOCOLS
from twin.cost.routing import sample_top_k
from twin.spec.load import load_cluster, load_model
from twin.spec.plan import Precision

R1 = load_model("deepseek-r1")
FP8 = Precision(weights="fp8_block", experts="fp8_block", dispatch="fp8")


def counted(pattern: str, network: Network, ranks: int, experts_Tk: np.ndarray, sender_T: np.ndarray) -> np.ndarray:
    """Copies that cross each link when these tokens are dispatched, one token at a time."""
    assert R1.moe is not None
    load = np.zeros(len(network.links))
    per_rank, node = R1.moe.experts // ranks, network.domain_of

    def send(src: int, dst: int) -> None:
        load[list(network.route(src, dst))] += 1

    for experts, src in zip(experts_Tk // per_rank, sender_T, strict=True):
        if pattern == "direct_copies":
            for dst in experts:
                send(src, int(dst))
            continue
        touched = sorted(set(experts.tolist()))
        if pattern == "direct":
            for dst in touched:
                send(src, dst)
            continue
        for n in sorted({int(node[dst]) for dst in touched}):
            mirror = n * 8 + src % 8
            send(src, mirror)
            for dst in touched:
                if node[dst] == n:
                    send(mirror, dst)
    return load


@pytest.mark.parametrize("protocol", ["deepep_low_latency", "symm", "deepep_normal"])
def test_link_loads_match_traffic_counted_by_monte_carlo(protocol: str) -> None:
    """Two nodes, tokens unevenly spread over senders: every link within 4% of the busiest of its kind, totals within 1%."""
    pool = pool_of(dp=16, ep=16, comm=protocol)
    cost = cost_model(R1, "h100-2x8", pool, precision=FP8)
    network, tokens = cost.network, np.arange(16) * 80 + 300
    assert R1.moe is not None
    even = np.full(256, 1 / 256)
    sender = np.repeat(np.arange(16), tokens)
    chosen = sample_top_k(R1.moe, even, len(sender), np.random.default_rng(11))
    truth = counted(PROTOCOLS[protocol].pattern, network, 16, chosen, sender)
    legs = pattern_traffic(PROTOCOLS[protocol], reach_of(cost.site), network, np.arange(16))
    load = sum(network.link_matrix(spread, np.arange(16)) @ gather @ tokens for gather, spread in legs)
    assert load.sum() == pytest.approx(truth.sum(), rel=0.01)
    for kind in ("nvlink", "pcie", "nic"):
        of_kind = np.array([link.kind == kind for link in network.links])
        assert load[of_kind] == pytest.approx(truth[of_kind], abs=0.04 * truth[of_kind].max())


def test_ag_rs_sends_every_token_to_every_rank_once() -> None:
    cost = cost_model(R1, "h100-2x8", pool_of(dp=16, ep=16, comm="ag_rs"), precision=FP8)
    network = cost.network
    legs = pattern_traffic(PROTOCOLS["ag_rs"], reach_of(cost.site), network, np.arange(16))
    load = sum(network.link_matrix(spread, np.arange(16)) @ gather @ np.ones(16) for gather, spread in legs)
    nic = [load[i] for i, link in enumerate(network.links) if link.name.startswith("nic_down")]
    nvlink = [load[i] for i, link in enumerate(network.links) if link.name.startswith("nvlink_down")]
    assert nic == pytest.approx([1.0] * 16)  # its twin's token; the node's other seven rails bring the rest
    assert nvlink == pytest.approx([14.0] * 16)  # own node's seven and seven more of those that came in


@pytest.mark.parametrize("protocol", ["deepep_low_latency", "symm", "deepep_normal", "nccl", "ag_rs"])
def test_expert_tp_multiplies_deliveries(protocol: str) -> None:
    """An expert cut over two ranks needs its tokens on both: NVLink carries more, never less."""
    whole = cost_model(R1, "h100-1x8", pool_of(dp=8, ep=8, comm=protocol), precision=FP8)
    cut = cost_model(R1, "h100-1x8", pool_of(dp=8, ep=4, comm=protocol), precision=FP8)
    seconds = []
    for cost in (whole, cut):
        exchange = dict(cost.exchanges)["dispatch"]
        nvlink_s, rdma_s = exchange.seconds(np.full(8, 512.0))
        assert float(rdma_s) == 0.0
        seconds.append(float(nvlink_s))
    assert seconds[1] >= seconds[0] * 0.999


def test_the_published_deepep_tables_follow_from_bytes_and_a_few_constants() -> None:
    """Low latency, 7168 hidden, top 8 of 256, fp8 out and bf16 back, Hopper with 400G NICs (published microseconds)."""
    published = {8: (39.8, 72.4), 16: (102.1, 186.2), 32: (143.0, 263.3), 64: (166.8, 304.7)}
    for ranks, measured in published.items():
        cost = cost_model(R1, f"h200-{ranks // 8}x8", pool_of(dp=ranks, ep=ranks, comm="deepep_low_latency"), precision=FP8)
        for (_, exchange), truth in zip(cost.exchanges, measured, strict=True):
            nvlink_s, rdma_s = exchange.seconds(np.full(ranks, 128.0))
            assert (float(nvlink_s + rdma_s) + exchange.fixed_s) * 1e6 == pytest.approx(truth, rel=0.12)


def test_kv_hand_over_uses_every_rail_and_costs_at_least_its_start() -> None:
    """Mooncake, Qwen3-8B TP8 on 2 x 8 H800: 4.5 GB in 31.65 ms, 146 MB in 1.5 ms."""
    network = Network(load_cluster("h800-2x8"))
    assert kv_transfer_s(network, range(8), range(8, 16), 4.5e9) == pytest.approx(31.65e-3, rel=0.1)
    assert kv_transfer_s(network, range(8), range(8, 16), 146e6) == pytest.approx(1.5e-3, rel=0.1)
    narrow = kv_transfer_s(network, [0], range(8, 16), 4.5e9)  # one NIC sends what eight receive
    assert narrow == pytest.approx(8 * kv_transfer_s(network, range(8), range(8, 16), 4.5e9), rel=0.05)


def test_under_tp_alone_engines_sum_experts_in_the_all_reduce() -> None:
    for engine, travels in (("vllm", False), ("sglang", False), ("trtllm", False), ("eptwin", True)):
        cost = cost_model(R1, "h200-1x8", pool_of(tp=8, ep=8), engine=engine, precision=FP8)
        assert bool(cost.exchanges) == travels
        parts = cost.step(StepBatch.decode([8], [8000])).parts_s
        assert ("moe/dispatch/latency" in parts) == travels
        assert parts["tp/all_reduce"] > 0


def test_more_nodes_never_make_an_exchange_faster() -> None:
    last = 0.0
    for nodes in (1, 2, 4, 8):
        cost = cost_model(R1, load_cluster(f"h200-{nodes}x8"), pool_of(dp=8 * nodes, ep=8 * nodes, comm="deepep_low_latency"),
                          precision=FP8)
        total = sum(float(sum(e.seconds(np.full(8 * nodes, 64.0)))) + e.fixed_s for _, e in cost.exchanges)
        assert total > last
        last = total
