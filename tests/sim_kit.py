"""Small services for tests of the simulator: a cost model one can do by hand, and plans, clusters and traffic for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from twin.cost.batch import StepBatch, StepCost
from twin.sim.world import World
from twin.spec.cluster import ClusterSpec, GpuSpec, NetworkSpec, NodeGroup
from twin.spec.model import Attention, ModelSpec
from twin.spec.plan import Plan, PoolPlan
from twin.spec.scenario import Scenario
from twin.spec.workload import Arrivals, Lengths, WorkloadSpec


@dataclass(frozen=True)
class LinearCosts:
    """A step takes `step_s`, plus so much for each sequence, context token and prompt token of the fullest rank."""

    step_s_each: float = 0.0
    seq_s: float = 0.0
    context_s: float = 0.0
    prefill_s: float = 0.0
    kv_blocks_per_rank: int = 10_000_000
    kv_token_bytes: float = 1.0

    def step(self, batch: StepBatch) -> StepCost:
        parts = {"base": self.step_s_each, "work": self.step_s(batch) - self.step_s_each}
        total = sum(parts.values())
        return StepCost(total, parts, {"base": "assumed", "work": "roofline"}, 0.9 * total, 1.2 * total)

    def step_s(self, batch: StepBatch) -> float:
        ranks = self.seq_s * batch.decode_seqs + self.context_s * batch.decode_context + self.prefill_s * batch.prefill_tokens
        return self.step_s_each + float(ranks.max())

    def decode_s(self, seqs: np.ndarray, context: np.ndarray) -> np.ndarray:
        return self.step_s_each + (self.seq_s * seqs + self.context_s * context).max(axis=1)

    def kv_transfer_bytes(self, tokens: int) -> float:
        return self.kv_token_bytes * tokens


GPU = GpuSpec(name="test", hbm_bytes=1e9, hbm_bytes_per_s=1e12, bf16_flop_per_s=1e14)
MODEL = ModelSpec(name="tiny", model_type="llama", hidden=64, vocab=128, layers=1, layer_attention=("full",),
                  layer_ffn=("dense",), dense_intermediate=128,
                  attention=Attention(kind="gqa", heads=4, kv_heads=4, head_dim=16, v_head_dim=16))


def cluster(nodes: int = 1, gpus_per_node: int = 8, **network: Any) -> ClusterSpec:
    spec = {"nvlink_bytes_per_s": 1e6, "nvlink_latency_s": 0.0, "nic_bytes_per_s": 1e5, "nic_latency_s": 0.0,
            "switch_latency_s": 0.0, "pcie_bytes_per_s": 1e6, **network}
    group = NodeGroup(nodes=nodes, gpus_per_node=gpus_per_node, gpu=GPU, price_usd_per_gpu_h=2.0)
    return ClusterSpec(name="test", groups=(group,), network=NetworkSpec(**spec))


def pool(**fields: Any) -> PoolPlan:
    return PoolPlan(**{"role": "mixed", "max_num_seqs": 64, "max_batch_tokens": 8192, "block_tokens": 1, **fields})


def lengths(value: float | Lengths) -> Lengths:
    return value if isinstance(value, Lengths) else Lengths(kind="fixed", mean=float(value))


def workload(arrivals: Arrivals, isl: float | Lengths = 1, osl: float | Lengths = 1, **fields: Any) -> WorkloadSpec:
    return WorkloadSpec(arrivals=arrivals, isl=lengths(isl), osl=lengths(osl), **fields)


def scenario(traffic: WorkloadSpec, *pools: PoolPlan, seed: int = 0, on: ClusterSpec | None = None,
             kv_send: str = "engine", **plan: Any) -> Scenario:
    return Scenario(name="test", model=MODEL, cluster=on or cluster(), workload=traffic, seed=seed, kv_send=kv_send,
                    plan=Plan(pools=pools, **plan))


def world(question: Scenario, *costs: LinearCosts, **more: Any) -> World:
    """A world of the scenario's plan; one cost model serves all pools unless each has its own."""
    assert question.plan is not None
    each = costs if len(costs) > 1 else costs * len(question.plan.pools)
    return World(question, question.plan, each, **more)


def run(question: Scenario, *costs: LinearCosts, **more: Any) -> World:
    done = world(question, *costs, **more)
    done.run()
    return done
