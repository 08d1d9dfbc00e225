"""Seconds of one pass through a stack of layers, in parts: the slowest rank's own work, experts in lockstep, exchanges.

Legend of shapes: n steps, d DP ranks, f features, o operators.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from twin.cost.batch import INDEX, Array
from twin.cost.collectives import Collective
from twin.cost.comm import Exchange
from twin.cost.experts import ExpertCost
from twin.cost.roofline import OpTable
from twin.spec.base import Source

_TOKENS = INDEX["tokens"]


@dataclass(frozen=True)
class Streams:
    """Seconds of a pass, arrays [n]: what computes, what communicates, the shared experts' part of compute."""

    compute: Array
    comm: Array
    shared: Array


@dataclass(frozen=True)
class Stack:
    """Everything a pass needs, compiled. `exchanges` (named) is empty where tokens never leave their rank."""

    table: OpTable
    collectives: tuple[Collective, ...]
    experts: ExpertCost | None
    exchanges: tuple[tuple[str, Exchange], ...]
    moe_layers: int
    shared_columns: Array  # [o]: 1 for the shared experts' operators

    def launches(self, x: Array) -> Array:
        """Kernels that the busiest rank launches: [n, d, f] -> [n]. A grouped expert FFN is six, an exchange three."""
        routed = self.moe_layers * ((6 if self.experts is not None else 0) + 3 * len(self.exchanges))
        return np.asarray(self.table.launches(x).max(axis=-1) + routed)

    def streams(self, x: Array) -> Streams:
        """Totals of a pass over `x` [n, d, f]."""
        op_s = self.table.seconds(x)
        rank_s = op_s.sum(axis=-1)
        for collective in self.collectives:
            rank_s = rank_s + collective.seconds(x)
        slow = rank_s.argmax(axis=-1)
        rows = np.arange(len(x))
        compute, shared = rank_s[rows, slow], op_s[rows, slow] @ self.shared_columns
        comm = np.zeros(len(x))
        tokens = x[..., _TOKENS]
        if self.experts is not None:
            gemm_s, permute_s = self.experts.seconds(tokens.sum(axis=-1))
            compute = compute + gemm_s + permute_s
        for _, exchange in self.exchanges:
            nvlink_s, rdma_s = exchange.seconds(tokens)
            comm = comm + self.moe_layers * (nvlink_s + rdma_s + exchange.fixed_s * (tokens.sum(axis=-1) > 0))
        return Streams(compute, comm, shared)

    def parts(self, x: Array) -> dict[str, float]:
        """Seconds by key of ONE pass, x [d, f]; sums to compute + comm of `streams`."""
        op_s = self.table.seconds(x)
        extra = [collective.seconds(x) for collective in self.collectives]
        slow = int((op_s.sum(axis=-1) + sum(extra)).argmax())
        found: dict[str, float] = {}
        for op, seconds in zip(self.table.ops, op_s[slow], strict=True):
            found[op.key] = found.get(op.key, 0.0) + float(seconds)
        for collective, seconds in zip(self.collectives, extra, strict=True):
            found[collective.key] = found.get(collective.key, 0.0) + float(seconds[slow])
        tokens = x[:, _TOKENS]
        total = tokens.sum(keepdims=True)
        if self.experts is not None:
            gemm_s, permute_s = self.experts.seconds(total)
            found["moe/experts"], found["moe/permute"] = float(gemm_s[0]), float(permute_s[0])
        for name, exchange in self.exchanges:
            if total[0] > 0:
                nvlink_s, rdma_s = exchange.seconds(tokens)
                found[f"moe/{name}/nvlink"] = self.moe_layers * float(nvlink_s)
                found[f"moe/{name}/rdma"] = self.moe_layers * float(rdma_s)
                found[f"moe/{name}/latency"] = self.moe_layers * exchange.fixed_s
        return {key: seconds for key, seconds in found.items() if seconds}

    def sources(self) -> dict[str, Source]:
        """Where each key's seconds come from."""
        found: dict[str, Source] = {op.key: "roofline" for op in self.table.ops}
        found |= {collective.key: "calibrated" for collective in self.collectives}
        found |= {"moe/experts": "roofline", "moe/permute": "roofline"}
        for name, exchange in self.exchanges:
            found |= {f"moe/{name}/{part}": exchange.source for part in ("nvlink", "rdma", "latency")}
        return found
