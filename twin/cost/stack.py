"""Seconds of one pass through a stack of layers, in parts: the slowest rank's own work, experts in lockstep, exchanges.

Legend of shapes: n steps, d DP ranks, f features, o operators.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from twin.cost.batch import INDEX, Array
from twin.cost.collectives import Collective
from twin.cost.comm import Exchange
from twin.cost.experts import ExpertCost
from twin.cost.interval import joined, plain
from twin.cost.measured import Evidence, Measured, RowTable
from twin.cost.overlap import Half
from twin.cost.roofline import OpTable

_TOKENS, _PADDING = INDEX["tokens"], INDEX["padding"]
_SHARED_KEY = "moe/shared"
# what of each key runs before attention (or beside the dispatch, as shared experts do) and what from it to the gate
_EARLY = {"attention/absorb": 0.5, "attention/kv_write": 1.0, "norm": 0.5, "small": 0.5, _SHARED_KEY: 1.0}
_LATE = {"attention/absorb": 0.5, "norm": 0.5, "small": 0.5, "attention/kv_read": 1.0, "attention/prefill": 1.0,
         "attention/kv_up": 1.0, "attention/state": 1.0, "attention/scan": 1.0, "attention/indexer": 1.0, "moe/gate": 1.0}
_PROJECTIONS = "attention/projections"
_KEPT, _KEPT_SIZE = 256, 4096  # batches whose token parts a stack remembers, and the numbers that such a batch has at most


@dataclass(frozen=True)
class Streams:
    """Seconds of a pass, arrays [n]: what computes and what communicates."""

    compute: Array
    comm: Array


@dataclass(frozen=True)
class TokenParts:
    """Seconds of what depends on tokens and rows alone: of operators by place among all [n, d], of experts' GEMMs and permutation
    [n], of each exchange over NVLink and RDMA [n]; and which steps have tokens [n]."""

    own: dict[int, Array]
    experts: tuple[Array, Array] | None
    exchanges: tuple[tuple[Array, Array], ...]
    some: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Stack:
    """Everything a pass needs, compiled: operators on the roofline (`table`) and from a profile (`measured`).
    `exchanges` (named) is empty where tokens never leave their rank."""

    table: OpTable
    measured: tuple[Measured, ...]
    collectives: tuple[Collective, ...]
    experts: ExpertCost | None
    exchanges: tuple[tuple[str, Exchange], ...]
    moe_layers: int
    launch_counts: Array  # [f] kernels a rank launches
    wait_s: float  # at each exchange, for ranks that come late
    wait_share: float  # the same, as part of what is computed between exchanges
    ranks: int  # DP ranks; a batch of one column stands for all of them alike
    layers: int = 1
    output_share: float = 0.5  # of the attention projections' work, the one after attention
    _known: dict[bytes, TokenParts] = field(default_factory=dict, init=False, repr=False, compare=False)

    def launches(self, x: Array) -> Array:
        """Kernels that the busiest rank launches: [n, d, f] -> [n]. A grouped expert FFN is six, an exchange three."""
        routed = self.moe_layers * ((6 if self.experts is not None else 0) + 3 * len(self.exchanges))
        return np.asarray((x @ self.launch_counts).max(axis=-1) + routed)

    def _alike(self, x: Array) -> int:
        return self.ranks if x.shape[-2] == 1 else 1

    def streams(self, x: Array) -> Streams:
        """Totals of a pass over `x` [n, d, f] (or [n, 1, f], all ranks alike)."""
        rank_s = self.table.seconds(x).sum(axis=-1)
        known = self._of_tokens(x)
        for place, own in enumerate(self._owns):
            found = known.own.get(place)
            rank_s = rank_s + (own.seconds(x) if found is None else found)
        compute: Array = rank_s.max(axis=-1)
        comm = np.zeros(len(x))
        if known.experts is not None:
            gemm_s, permute_s = known.experts
            compute = compute + gemm_s + permute_s
        for (_, exchange), (nvlink_s, rdma_s) in zip(self.exchanges, known.exchanges, strict=True):
            wait_s = self.moe_layers * self.wait_s + compute * self.wait_share
            comm = comm + self.moe_layers * (nvlink_s + rdma_s + exchange.fixed_s * known.some) + wait_s * known.some
        return Streams(compute, comm)

    @cached_property
    def _owns(self) -> tuple[Measured | Collective, ...]:
        return (*self.measured, *self.collectives)

    @cached_property
    def _columns(self) -> list[int]:
        """The features that `TokenParts` follow from."""
        return sorted({_TOKENS, _PADDING, *(own.feature for own in self._owns if isinstance(own, RowTable | Collective))})

    def _of_tokens(self, x: Array) -> TokenParts:
        """Remembered: a decode step differs from the last in its contexts, but seldom in tokens, which are padded to a graph."""
        columns = x[..., self._columns]
        if columns.size > _KEPT_SIZE:
            return self._token_parts(x)
        key = columns.tobytes() + bytes([x.shape[-2] == 1])
        found = self._known.get(key)
        if found is None:
            if len(self._known) >= _KEPT:
                self._known.clear()
            found = self._known[key] = self._token_parts(x)
        return found

    def _token_parts(self, x: Array) -> TokenParts:
        tokens, total = x[..., _TOKENS], self._routed(x)
        own = {place: own.seconds(x) for place, own in enumerate(self._owns) if isinstance(own, RowTable | Collective)}
        return TokenParts(own, None if self.experts is None else self.experts.seconds(total),
                          tuple(exchange.seconds(tokens) for _, exchange in self.exchanges), total > 0)

    def _routed(self, x: Array) -> Array:
        """Tokens of the instance that experts get: [n, d, f] -> [n]."""
        return np.asarray((x[..., _TOKENS] - x[..., _PADDING]).sum(axis=-1) * self._alike(x))

    def half(self, x: Array) -> Half:
        """A pass over one half batch [n, d, f], as two-batch overlap needs it."""
        streams, tokens, total = self.streams(x), x[..., _TOKENS], self._routed(x)
        experts = np.sum(self.experts.seconds(total), axis=0) if self.experts is not None else np.zeros(len(x))
        output = {_PROJECTIONS: self.output_share}
        before = {_PROJECTIONS: 1 - self.output_share}
        crossed = [np.asarray(self.moe_layers * (sum(e.seconds(tokens)) + e.fixed_s)) for _, e in self.exchanges]
        local = [np.asarray(self.moe_layers * e.local_s * tokens.max(axis=-1)) for _, e in self.exchanges]
        wait = self.moe_layers * self.wait_s + streams.compute * self.wait_share
        share = self.moe_layers / max(self.layers, 1)
        return Half(streams.compute, experts, share * self._own_s(x, _EARLY | before), share * self._own_s(x, _LATE | output),
                    crossed[0], crossed[1], local[0], local[1], wait * (total > 0))

    def _own_s(self, x: Array, parts: dict[str, float]) -> Array:
        """Seconds of `parts` (key -> how much of it) on the rank that has most: [n, d, f] -> [n]."""
        columns = np.array([parts.get(op.key, 0.0) for op in self.table.ops])
        seconds = self.table.seconds(x) @ columns
        for own in self.measured:
            if set(own.keys) & set(parts):
                seconds = seconds + sum(found * parts.get(key, 0.0) for key, found in own.parts(x).items())
        return np.asarray(seconds.max(axis=-1))

    def shared_s(self, x: Array) -> Array:
        """Seconds of the shared experts on the rank that has most: [n, d, f] -> [n]."""
        return self._own_s(x, {_SHARED_KEY: 1.0})

    def parts(self, x: Array) -> dict[str, float]:
        """Seconds by key of ONE pass, x [d, f]; sums to compute + comm of `streams`."""
        op_s = self.table.seconds(x)
        by_key: dict[str, Array] = {}
        for j, op in enumerate(self.table.ops):
            by_key[op.key] = by_key.get(op.key, np.zeros(len(x))) + op_s[:, j]
        for own in self.measured:
            for key, seconds in own.parts(x).items():
                by_key[key] = by_key.get(key, np.zeros(len(x))) + seconds
        for collective in self.collectives:
            by_key[collective.key] = by_key.get(collective.key, np.zeros(len(x))) + collective.seconds(x)
        slow = int(np.sum(list(by_key.values()), axis=0).argmax())
        found = {key: float(seconds[slow]) for key, seconds in by_key.items()}
        tokens, total = x[:, _TOKENS], self._routed(x[None])
        if self.experts is not None:
            gemm_s, permute_s = self.experts.seconds(total)
            found["moe/experts"], found["moe/permute"] = float(gemm_s[0]), float(permute_s[0])
        compute_s = sum(found.values())
        for name, exchange in self.exchanges:
            if total[0] > 0:
                nvlink_s, rdma_s = exchange.seconds(tokens)
                found[f"moe/{name}/nvlink"] = self.moe_layers * float(nvlink_s)
                found[f"moe/{name}/rdma"] = self.moe_layers * float(rdma_s)
                found[f"moe/{name}/latency"] = self.moe_layers * exchange.fixed_s
                found[f"moe/{name}/wait"] = self.moe_layers * self.wait_s + compute_s * self.wait_share
        return {key: seconds for key, seconds in found.items() if seconds}

    def evidence(self) -> dict[str, Evidence]:
        """Where each key's seconds come from."""
        pairs = [(op.key, plain("roofline")) for op in self.table.ops]
        pairs += [(key, evidence) for own in self.measured for key, evidence in zip(own.keys, own.evidence, strict=True)]
        pairs += [(collective.key, collective.evidence) for collective in self.collectives]
        pairs += [("moe/experts", self.experts.evidence)] if self.experts is not None else []
        pairs += [("moe/permute", plain("roofline"))]
        pairs += [(f"moe/{name}/{part}", plain(exchange.source)) for name, exchange in self.exchanges
                  for part in ("nvlink", "rdma", "latency")]
        pairs += [(f"moe/{name}/wait", plain("calibrated")) for name, _ in self.exchanges]
        return joined(pairs)
