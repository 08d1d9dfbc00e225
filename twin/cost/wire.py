"""What the exchanges of a step put on the links, and how much longer they take when others use some of them too.

Legend of shapes: k links that carry anything, d DP ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from twin.cost.batch import Array
from twin.cost.build import Crossing, crossings
from twin.cost.comm import link_rates, pattern_traffic
from twin.cost.model import CostModel
from twin.cost.network import Ints, Network


@dataclass(frozen=True, eq=False)
class Leg:
    """Dispatch or combine of one layer, by token of each DP rank: bytes and seconds of each link [k, d]; and the flows that
    cross the link while it is under way [k]."""

    bytes_kd: Array
    seconds_kd: Array
    flows_k: Array


@dataclass(frozen=True, eq=False)
class Wire:
    """Both legs of all MoE layers on `links_k` (numbers of the network's links, rising)."""

    links_k: Ints
    legs: tuple[Leg, ...]
    layers: int

    @cached_property
    def flows_k(self) -> Array:
        """Flows that a link's bandwidth is shared with while an exchange is on it: [k]."""
        return np.asarray(np.max([leg.flows_k for leg in self.legs], axis=0))

    def step_bytes(self, tokens_d: Array) -> Array:
        """Bytes that a step sends over each link: [k]."""
        return np.asarray(self.layers * sum(leg.bytes_kd @ tokens_d for leg in self.legs))

    def alone_s(self, tokens_d: Array) -> tuple[Array, ...]:
        """Seconds that each leg of one layer keeps each link busy: [k] for each."""
        return tuple(leg.seconds_kd @ tokens_d for leg in self.legs)

    def more_s(self, alone_s: tuple[Array, ...], taken_k: Array) -> float:
        """Seconds that a step's exchanges take longer when the part `taken_k` of each link's rate is not theirs. A leg ends
        with its slowest link, so only that one matters."""
        return self.layers * sum(float((each_k / (1.0 - taken_k)).max() - each_k.max()) for each_k in alone_s)


def wire_of(cost: CostModel, gpus: Sequence[int]) -> Wire | None:
    """The wire of an instance of this pool that sits on `gpus`; None where its tokens do not travel."""
    site = cost.site
    found = crossings(site) if site.model.moe_layers else ()
    if not found or len(gpus) < 2:
        return None
    legs = [_leg(crossing, site.network, np.asarray(gpus, dtype=np.int64)) for crossing in found]
    used = np.flatnonzero(np.any([leg.bytes_kd.any(axis=1) for leg in legs], axis=0))
    kept = tuple(Leg(leg.bytes_kd[used], leg.seconds_kd[used], leg.flows_k[used]) for leg in legs)
    return Wire(used, kept, site.model.moe_layers) if len(used) else None


def _leg(crossing: Crossing, network: Network, gpus: Ints) -> Leg:
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
    return Leg(n_bytes, n_bytes * (skew / rate)[:, None], flows)
