"""What exchanges and all-reduces of a step put on the links, and how much longer they take when others use some of them too.

Legend of shapes: k links that carry anything, d DP ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from twin.cost.batch import INDEX, Array
from twin.cost.build import Crossing, crossings
from twin.cost.collectives import Collective
from twin.cost.comm import link_rates, pattern_traffic
from twin.cost.model import CostModel
from twin.cost.network import Ints, Network
from twin.cost.protocols import TP_EFFICIENCY


@dataclass(frozen=True, eq=False)
class Leg:
    """Dispatch or combine of one layer, or one collective of TP groups, by token of each DP rank: bytes and seconds of each link
    [k, d]; the flows that cross the link while it is under way [k]; and how many of them a step has."""

    bytes_kd: Array
    seconds_kd: Array
    flows_k: Array
    times: float


@dataclass(frozen=True, eq=False)
class Wire:
    """All legs of a step on `links_k` (numbers of the network's links, rising)."""

    links_k: Ints
    legs: tuple[Leg, ...]

    @cached_property
    def flows_k(self) -> Array:
        """Flows that a link's bandwidth is shared with while an exchange is on it: [k]."""
        return np.asarray(np.max([leg.flows_k for leg in self.legs], axis=0))

    def step_bytes(self, tokens_d: Array) -> Array:
        """Bytes that a step sends over each link: [k]."""
        return np.asarray(sum(leg.times * (leg.bytes_kd @ tokens_d) for leg in self.legs))

    def alone_s(self, tokens_d: Array) -> tuple[Array, ...]:
        """Seconds that each leg keeps each link busy, once: [k] for each."""
        return tuple(leg.seconds_kd @ tokens_d for leg in self.legs)

    def more_s(self, alone_s: tuple[Array, ...], taken_k: Array) -> float:
        """Seconds that a step's exchanges take longer when the part `taken_k` of each link's rate is not theirs. A leg ends
        with its slowest link, so only that one matters."""
        return sum(leg.times * float((each_k / (1.0 - taken_k)).max() - each_k.max())
                   for leg, each_k in zip(self.legs, alone_s, strict=True))


def wire_of(cost: CostModel, gpus: Sequence[int]) -> Wire | None:
    """The wire of an instance of this pool that sits on `gpus`; None where nothing travels."""
    site, seats = cost.site, np.asarray(gpus, dtype=np.int64)
    if len(gpus) < 2:
        return None
    legs = [_leg(crossing, site.network, seats, site.model.moe_layers)
            for crossing in (crossings(site) if site.model.moe_layers else ())]
    summed = (one for one in cost.collectives if one.feature == INDEX["tokens"])
    legs += [_ring(one, site.network, seats.reshape(-1, cost.pool.tp)) for one in summed]
    if not legs:
        return None
    used = np.flatnonzero(np.any([leg.bytes_kd.any(axis=1) for leg in legs], axis=0))
    kept = tuple(Leg(leg.bytes_kd[used], leg.seconds_kd[used], leg.flows_k[used], leg.times) for leg in legs)
    return Wire(used, kept) if len(used) else None


def _ring(collective: Collective, network: Network, gpus_dt: Ints) -> Leg:
    """A collective of every TP group [d, t] at once: each GPU sends all but its own part to the next, twice in an all-reduce."""
    dp, tp = gpus_dt.shape
    rounds = (2.0 if collective.key == "tp/all_reduce" else 1.0) * (tp - 1) / tp
    nexts: Array = np.kron(np.eye(dp), np.roll(np.eye(tp), 1, axis=1)).astype(np.float64)
    by_sender = network.link_matrix(nexts, gpus_dt.ravel())
    n_bytes = by_sender.reshape(len(by_sender), dp, tp).sum(axis=2) * rounds * collective.unit_bytes
    return Leg(n_bytes, n_bytes / (network.capacity * TP_EFFICIENCY)[:, None], by_sender.sum(axis=1), collective.times)


def _leg(crossing: Crossing, network: Network, gpus: Ints, layers: int) -> Leg:
    """One phase over all links of the network, as `compile_exchange` has it before it drops what never is slowest."""
    legs = pattern_traffic(crossing.protocol, crossing.reach, network, gpus)
    load = np.zeros((len(network.links), crossing.senders_Rd.shape[1]))
    flows = np.zeros(len(network.links))
    for gather, spread in legs:
        load += network.link_matrix(spread, gpus) @ gather @ crossing.senders_Rd
        sent_R: Array = (gather @ crossing.senders_Rd).sum(axis=1)
        flows += network.link_bytes(np.sign(sent_R[:, None] * spread), gpus)
    if crossing.backwards:
        turned = network.reversed
        load, flows = load[turned], flows[turned]
    forwards = len(legs) > 1 and bool(load[~network.nvlink_links].any())
    rate = link_rates(crossing.phase, network, forwards=forwards)
    skew = np.where(network.nvlink_links | (len(legs) == 1), crossing.reach.skew, crossing.reach.skew_rail)
    n_bytes = load * crossing.token_bytes
    return Leg(n_bytes, n_bytes * (skew / rate)[:, None], flows, float(layers))
