"""One step, layer by layer: what every rank computes, and every dispatch and combine as flows on the topology.

The step grain adds up the slowest rank's work and the fullest link's bytes; here ranks run side by side on a SimPy
clock, flows of different ranks share links max-min fair, and a rank goes on when what it waits for has arrived. The two
must agree where nothing contends (tested); where they do not, this says where the time goes.
Legend: R ranks (GPUs) of the instance, d DP ranks, L MoE layers.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twin.cost.batch import StepBatch, StepCost
from twin.cost.build import Crossing, crossings
from twin.cost.comm import link_rates, pattern_traffic
from twin.cost.model import CostModel
from twin.cost.network import Network
from twin.sim.clock import Clock
from twin.sim.transfers import Transfers

Floats = NDArray[np.float64]
_ENDLESS_BYTES = 1e18
_BESIDE, _SLOWDOWN = "overlap/shared_experts", "engine/slowdown"
_ONCE = ("embedding", "head", "sampling", "tp/logits", "host/", "mtp/")


@dataclass(frozen=True)
class Span:
    """What a rank did when: seconds from the start of the layer."""

    rank: int
    name: str
    start_s: float
    end_s: float


@dataclass(frozen=True)
class LayerRun:
    """One layer: its kind (dense or moe), how long it takes, and the spans of its ranks."""

    kind: str
    seconds: float
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class StepView:
    """A step in layer grain beside the same step in step grain. `once_s`: head, sampling, host and the like."""

    layers: tuple[LayerRun, ...]
    once_s: float
    step: StepCost

    @property
    def total_s(self) -> float:
        return self.once_s + sum(layer.seconds for layer in self.layers)

    def trace(self, pid: int) -> list[dict[str, Any]]:
        """Chrome trace events of the whole step, a thread a rank, from time zero. Long runs of equal layers are cut to
        the first three."""
        events: list[dict[str, Any]] = [{"name": "process_name", "ph": "M", "pid": pid, "tid": 0,
                                         "args": {"name": "one step, layer by layer"}}]
        start_s, seen = 0.0, 0
        for index, layer in enumerate(self.layers):
            seen = seen + 1 if index and layer is self.layers[index - 1] else 0
            if seen < 3:
                events += [{"name": span.name, "cat": "layer", "ph": "X", "pid": pid, "tid": span.rank,
                            "ts": round((start_s + span.start_s) * 1e6, 3),
                            "dur": round((span.end_s - span.start_s) * 1e6, 3), "args": {"layer": index}}
                           for span in layer.spans]
            start_s += layer.seconds
        return events


def follow_step(cost: CostModel, batch: StepBatch, beside: Sequence[tuple[int, int]] = ()) -> StepView | None:
    """The step in layer grain; None for a step that overlaps two half batches, which has no single order of layers.
    `beside`: pairs of GPUs between which something else (KV) flows all the time."""
    step = cost.step(batch)
    if "overlap/tbo" in step.parts_s:
        return None
    ranks = [cost.step(_alike(batch, rank)).parts_s for rank in range(cost.pool.dp)]
    slower = _slower(step.parts_s)
    once_s = max(sum(s * (1.0 if key.startswith("host/") else slower) for key, s in parts.items() if key.startswith(_ONCE))
                 for parts in ranks)
    model = cost.model
    dense = _dense_layer(cost, ranks)
    popularity = _relative_load(cost)
    moe = [_MoeLayer(cost, batch, step, ranks, load_R, float(load_R.max() / popularity.max(axis=1).mean()), beside).run()
           for load_R in popularity]
    dense, moe = _stretched(dense, slower), [_stretched(layer, slower) for layer in moe]
    layers, next_moe = [], 0
    for kind in model.layer_ffn:
        if kind == "dense":
            layers.append(dense)
        else:
            layers.append(moe[next_moe % len(moe)])
            next_moe += 1
    return StepView(tuple(layers), once_s, step)


def _slower(parts_s: Mapping[str, float]) -> float:
    """What the engine takes on the device over the sum of its operators."""
    device_s = sum(seconds for key, seconds in parts_s.items() if not key.startswith(("host/", _SLOWDOWN)))
    return 1.0 + parts_s.get(_SLOWDOWN, 0.0) / device_s


def _stretched(layer: LayerRun, times: float) -> LayerRun:
    spans = tuple(replace(span, start_s=span.start_s * times, end_s=span.end_s * times) for span in layer.spans)
    return replace(layer, seconds=layer.seconds * times, spans=spans)


def _alike(batch: StepBatch, rank: int) -> StepBatch:
    """The batch with every rank doing what one rank does: its own work is then what the step's parts show."""
    columns = [np.full(len(column), column[rank]) for column in (
        batch.decode_seqs, batch.decode_context, batch.prefill_tokens, batch.prefill_context, batch.prefill_seqs)]
    return StepBatch(*columns)


def _own_s(parts: dict[str, float], cost: CostModel, layer: str) -> float:
    """Seconds of one rank's own work in one layer (attention, norms, TP collectives, and the gate or the dense FFN)."""
    model = cost.model
    every = sum(s for key, s in parts.items()
                if key.startswith(("attention/", "norm", "tp/")) and not key.startswith(_ONCE)) / model.layers
    if layer == "dense":
        return every + parts.get("ffn/dense", 0.0) / max(model.dense_layers, 1)
    return every + parts.get("moe/gate", 0.0) / max(model.moe_layers, 1)


def _dense_layer(cost: CostModel, ranks: Sequence[dict[str, float]]) -> LayerRun:
    own = [_own_s(parts, cost, "dense") for parts in ranks]
    spans = tuple(Span(rank, "attention and FFN", 0.0, own[rank // cost.pool.tp]) for rank in range(cost.pool.world))
    return LayerRun("dense", max(own), spans)


def _relative_load(cost: CostModel) -> Floats:
    """Load of every rank's experts relative to the mean, one row for each distinct MoE layer: [L, R]."""
    site = cost.site
    if site.popularity_LE is None or site.placement is None:
        return np.ones((1, cost.pool.world))
    share_LR = site.share_LR
    return np.repeat(share_LR / share_LR.mean(axis=1, keepdims=True), cost.pool.expert_tp, axis=1)


@dataclass
class _MoeLayer:
    """One MoE layer on a clock of its own. `load_R`: load of each rank relative to the mean; `weight`: this layer's
    fullest rank relative to the mean layer's."""

    cost: CostModel
    batch: StepBatch
    step: StepCost
    ranks: Sequence[dict[str, float]]
    load_R: Floats
    weight: float
    beside: Sequence[tuple[int, int]] = ()
    spans: list[Span] = field(default_factory=list)

    def run(self) -> LayerRun:
        world, tp = self.cost.pool.world, self.cost.pool.tp
        beside = _BESIDE in self.step.parts_s
        shared = self._per_layer("moe/shared")
        sent = [_own_s(parts, self.cost, "moe") + (0.0 if beside else share)
                for parts, share in zip(self.ranks, shared, strict=True)]
        sends_s = np.repeat(np.array(sent), tp)
        shared_end_s = sends_s + np.repeat(np.array(shared), tp) * beside
        self._note("attention and gate", np.zeros(world), sends_s)
        crossing = {c.name: c for c in crossings(self.cost.site)}
        arrived_s = self._cross(crossing.get("dispatch"), sends_s)
        begins_s = np.maximum(arrived_s, shared_end_s)
        done_s = begins_s + self._experts_s()
        self._note("experts", begins_s, done_s)
        back_s = self._cross(crossing.get("combine"), done_s)
        return LayerRun("moe", float(back_s.max()), tuple(self.spans))

    def _note(self, name: str, start_R: Floats, end_R: Floats) -> None:
        self.spans.extend(Span(rank, name, float(start), float(end))
                          for rank, (start, end) in enumerate(zip(start_R, end_R, strict=True)) if end > start)

    def _per_layer(self, key: str) -> list[float]:
        return [parts.get(key, 0.0) / max(self.cost.model.moe_layers, 1) for parts in self.ranks]

    def _experts_s(self) -> Floats:
        """Seconds of each rank's experts: the fullest rank's as the step grain has it, the others' by their load."""
        parts, layers = self.step.parts_s, max(self.cost.model.moe_layers, 1)
        fullest_s = (parts.get("moe/experts", 0.0) + parts.get("moe/permute", 0.0)) / layers * self.weight
        return np.asarray(fullest_s * self.load_R / self.load_R.max())

    def _cross(self, crossing: Crossing | None, ready_R: Floats) -> Floats:
        """When each rank has all that it waits for, given when each rank is ready to send: [R]."""
        if crossing is None:
            return np.full(len(ready_R), ready_R.max())  # the gather before and after is a barrier in any case
        site = self.cost.site
        gpus = [int(gpu) for gpu in site.gpus_R]
        bytes_RR, forwards = self._traffic(crossing)
        network = _paced(site.network, link_rates(crossing.phase, site.network, forwards=forwards))
        clock, arrived, landed = Clock(), ready_R.copy(), 0
        transfers = Transfers(clock, network)

        def send(src: int, _: object) -> None:
            for dst in np.flatnonzero(bytes_RR[src]).tolist():
                if src != dst:
                    transfers.start([gpus[src]], [gpus[dst]], float(bytes_RR[src, dst]), partial(land, dst))

        def land(dst: int) -> None:
            nonlocal landed
            landed += 1
            arrived[dst] = max(arrived[dst], clock.now)

        for src, ready_s in enumerate(ready_R.tolist()):
            start = clock.at(ready_s)
            assert start.callbacks is not None
            start.callbacks.append(partial(send, src))
        for src, dst in self.beside:
            transfers.start([src], [dst], _ENDLESS_BYTES, lambda: None)
        while landed < np.count_nonzero(bytes_RR):
            clock.step()
        fixed_s = sum(self.step.parts_s.get(f"moe/{crossing.name}/{part}", 0.0) for part in ("latency", "wait"))
        fixed_s /= max(self.cost.model.moe_layers, 1)
        self._note(crossing.name, ready_R, arrived + fixed_s)
        return arrived + fixed_s

    def _traffic(self, crossing: Crossing) -> tuple[Floats, bool]:
        """Bytes from rank to rank [R, R], all legs at once (forwarding is pipelined), and whether it forwards."""
        site, network = self.cost.site, self.cost.site.network
        tokens_d = np.asarray(self.batch.decode_seqs * (1 + self.cost.pool.mtp_draft_tokens) + self.batch.prefill_tokens,
                              dtype=float)
        own_R = crossing.senders_Rd @ tokens_d
        legs = pattern_traffic(crossing.protocol, crossing.reach, network, site.gpus_R)
        total = np.zeros((len(own_R), len(own_R)))
        for gather, spread in legs:
            total += (gather @ own_R)[:, None] * spread * self._visits(crossing)[None, :]
        total = np.round(total * crossing.token_bytes, 3)  # equal flows must end at one moment
        np.fill_diagonal(total, 0.0)
        domain = network.domain_of[site.gpus_R]
        leaves = bool(total[domain[:, None] != domain[None, :]].any())
        return total.T.copy() if crossing.backwards else total, len(legs) > 1 and leaves

    def _visits(self, crossing: Crossing) -> Floats:
        """How often a token visits each rank in this layer, relative to what the crossing's reach says of even
        popularity: [R]. Visits saturate where load does not: two experts of one rank need one visit."""
        moe, popularity = self.cost.model.moe, self.cost.site.popularity_LE
        if moe is None or popularity is None or len(popularity) == 1 or crossing.protocol.pattern == "rail_all":
            return np.ones(len(self.load_R))  # even popularity: the reach is that of this very placement
        even = 1.0 / self.cost.pool.ep
        if crossing.protocol.pattern == "direct_copies":
            base, visits = crossing.reach.copies, self.load_R
        else:
            base = crossing.reach.touch
            visits = (1 - np.clip(1 - self.load_R * even, 0, 1) ** moe.top_k) / (1 - (1 - even) ** moe.top_k)
        return np.asarray(visits * base.mean() / np.maximum(base, 1e-300))


def _paced(network: Network, rate: Floats) -> Network:
    """The network with each link as fast as a phase gets out of it, and without latency (which a phase states itself)."""
    paced = copy.copy(network)
    paced.capacity = rate
    paced.latency = np.zeros(len(rate))
    return paced
