"""Dispatch and combine: what crosses which link when each rank brings some tokens, and how long that takes.

Link bytes are linear in the tokens that each DP rank brings, so a protocol on a cluster compiles to one matrix
[links, d] of seconds a token for each phase; a step costs its largest row. Combine is dispatch backwards.
Legend: R ranks of the instance, d DP ranks, N nodes (NVLink domains), p chance that a token touches a rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from twin.cost.batch import Array
from twin.cost.network import Flow, Ints, Network
from twin.cost.protocols import CAPPED_AT_BYTES_PER_S, KV_BASE_S, KV_GATHER_BYTES_PER_S, KV_LINK, Phase, Protocol
from twin.spec.base import Source


@dataclass(frozen=True)
class Reach:
    """How tokens spread: `copies[R]` expected expert copies a token sends to each rank, `touch[R]` chance that it touches
    the rank, `touch_domain[N]` that it touches the NVLink domain: all under even popularity. `skew` and `skew_rail` are
    the most visited rank's and domain's excess over that, averaged over layers."""

    copies: Array
    touch: Array
    touch_domain: Array
    skew: float = 1.0
    skew_rail: float = 1.0


@dataclass(frozen=True)
class Exchange:
    """One phase of one layer, compiled: seconds a token of each DP rank, by link class, and fixed seconds."""

    nvlink: tuple[Array, Array]  # shared links [k, d] and private ones [d]
    rdma: tuple[Array, Array]
    fixed_s: float
    source: Source
    local_s: float = 0.0  # a token: packing and unpacking by the rank's own SMs, part of the phase

    @cached_property
    def _even(self) -> tuple[float, float]:
        """Seconds a token when every rank brings as many: NVLink, RDMA."""
        ones = np.ones(len(self.rdma[1]))
        return float(_slowest(ones, self.nvlink)), float(_slowest(ones, self.rdma))

    def seconds(self, tokens: Array) -> tuple[Array, Array]:
        """Exposed NVLink and RDMA seconds: [..., d] (or [..., 1], all ranks alike) -> ([...], [...]); their sum is the phase
        without `fixed_s`.

        Both kinds of link work at once (and forwarding is pipelined), so NVLink shows only where it outlasts RDMA.
        """
        if tokens.shape[-1] == 1 < len(self.rdma[1]):  # one column stands for all ranks alike
            tokens_n = tokens[..., 0]
            rdma_s, nvlink_s = tokens_n * self._even[1], tokens_n * self._even[0]
        else:
            rdma_s, nvlink_s = _slowest(tokens, self.rdma), _slowest(tokens, self.nvlink)
        return np.maximum(nvlink_s - rdma_s, 0.0), rdma_s


def _slowest(tokens: Array, links: tuple[Array, Array]) -> Array:
    shared, private = links
    alone: Array = (tokens * private).max(axis=-1)
    return np.maximum(alone, (tokens @ shared.T).max(axis=-1)) if len(shared) else alone


def pattern_traffic(protocol: Protocol, reach: Reach, network: Network, gpus: Ints) -> list[tuple[Array, Array]]:
    """The legs of a dispatch as (gather, spread): tokens [R] -> traffic [R, R] = diag(gather @ tokens) spread.

    `gather` says whose tokens a rank passes on (its own in direct legs), `spread[i, j]` how many times each goes to j.
    """
    count = len(gpus)
    own = np.eye(count)
    if protocol.pattern == "direct":
        return [(own, np.broadcast_to(reach.touch, (count, count)))]
    if protocol.pattern == "direct_copies":
        return [(own, np.broadcast_to(reach.copies, (count, count)))]
    domains, domain_of = np.unique(network.domain_of[gpus], return_inverse=True)
    everywhere = protocol.pattern == "rail_all"
    touch = np.ones(count) if everywhere else reach.touch
    touch_domain = np.ones(len(domains)) if everywhere else reach.touch_domain
    # the GPU of domain n that stands on the same rail as rank i: its position inside the domain
    position = np.zeros(count, dtype=np.int64)
    for n in range(len(domains)):
        position[domain_of == n] = np.arange(int((domain_of == n).sum()))
    member = [np.flatnonzero(domain_of == n) for n in range(len(domains))]
    over_rail, gather = np.zeros((count, count)), np.eye(count)
    for n, ranks in enumerate(member):
        mirror = ranks[position % len(ranks)]
        away = domain_of != n
        over_rail[np.flatnonzero(away), mirror[away]] = touch_domain[n]
        gather[mirror[away], np.flatnonzero(away)] += 1.0
    inside = (domain_of[:, None] == domain_of[None, :]) * touch[None, :]
    return [(own, over_rail), (gather, inside)]


@dataclass(frozen=True)
class Loads:
    """What a dispatch puts on the network for each token of DP rank d: how often it crosses each link [links, d], in how many
    legs, and the latency of the longest route."""

    crossed_Ld: Array
    legs: int
    latency_s: float


def loads_of(protocol: Protocol, reach: Reach, network: Network, gpus: Ints, senders_Rd: Array) -> Loads:
    """`senders_Rd[r, d]`: part of DP rank d's tokens that rank r sends."""
    legs = pattern_traffic(protocol, reach, network, gpus)
    load, busy = None, np.zeros((len(gpus), len(gpus)))
    for gather, spread in legs:
        leg = through(through(network.link_matrix(spread, gpus), gather), senders_Rd)
        load, busy = leg if load is None else load + leg, busy + spread
    assert load is not None
    return Loads(load, len(legs), network.route_latency_s(busy, gpus))


def compile_exchange(protocol: Protocol, phase: Phase, reach: Reach, network: Network, gpus: Ints, senders_Rd: Array,
                     token_bytes: float, *, backwards: bool, hbm_bytes_per_s: float = np.inf,
                     loads: Loads | None = None) -> Exchange:
    """Compile one phase; `loads` are those of the same dispatch where they are known (combine is dispatch backwards)."""
    loads = loads or loads_of(protocol, reach, network, gpus, senders_Rd)
    on_nvlink, latency_s = network.nvlink_links, loads.latency_s
    order = network.reversed if backwards else np.arange(len(on_nvlink))
    near, far = (loads.crossed_Ld[order[links]] for links in (on_nvlink, ~on_nvlink))
    remote = bool(far.any())
    rate = link_rates(phase, network, forwards=loads.legs > 1 and remote)
    token_s = token_bytes * np.where(on_nvlink | (loads.legs == 1), reach.skew, reach.skew_rail) / rate
    row_s = token_bytes / phase.row_bytes_per_s
    fixed_s = (phase.base_s + row_s + latency_s + (phase.remote_s if remote else 0.0)) if remote or near.any() else 0.0
    local_s = 0.0
    if phase.local:
        copies = float(reach.copies.sum()) * senders_Rd.sum(axis=0).max()
        local_s = copies * token_bytes / (hbm_bytes_per_s * phase.local)
    near *= token_s[on_nvlink, None]
    far *= token_s[~on_nvlink, None]
    return Exchange(_largest(near), _largest(far), fixed_s, protocol.source, local_s)


def link_rates(phase: Phase, network: Network, *, forwards: bool) -> Array:
    """Bytes/s that a phase gets out of each link: `forwards` when what comes over the NIC goes on over NVLink."""
    faster = np.maximum(network.capacity / CAPPED_AT_BYTES_PER_S, 1.0) ** phase.cap_power
    nvlink_rate = np.minimum(network.capacity * phase.nvlink, faster * (phase.forward_cap if forwards else phase.nvlink_cap))
    rates = np.where(network.nvlink_links, nvlink_rate, network.capacity * phase.rdma)
    return rates / phase.served if forwards else rates


def through(matrix: Array, square: Array) -> Array:
    """`matrix @ square`, quick where each rank stands for itself alone."""
    diagonal = np.diagonal(square)
    if square.shape[0] != square.shape[1] or np.count_nonzero(square) != np.count_nonzero(diagonal):
        return np.asarray(matrix @ square)
    return matrix if (diagonal == 1.0).all() else np.asarray(matrix * diagonal)


def _largest(seconds: Array) -> tuple[Array, Array]:
    """(rows [k, d] that several ranks share, the slowest private link of each rank [d]).

    Links that carry the same mix (a GPU's PCIe and its NIC) keep only the slowest; order is kept, so that results are the
    same everywhere.
    """
    used = seconds > 0
    ranks = used.sum(axis=1)
    alone = seconds[ranks == 1].max(axis=0, initial=0.0)
    busy = seconds[ranks > 1]
    if not len(busy):
        return np.zeros((0, seconds.shape[1])), alone
    peak = busy.max(axis=1)
    order = np.argsort(-peak, kind="stable")
    mark = np.round(busy @ np.sqrt(np.arange(2.0, 2.0 + busy.shape[1])) / peak, 7)  # equal mixes have equal marks
    _, first = np.unique(mark[order], return_index=True)
    return busy[order[np.sort(first)]], alone


def kv_transfer_s(network: Network, sources: Sequence[int], destinations: Sequence[int], n_bytes: float) -> float:
    """Seconds to hand `n_bytes` from the GPUs of one rank to those of another, alone on the network: cut evenly over the
    wider side's GPUs, each gathering its blocks and sending them over its link, plus what each hand-over costs at least."""
    pairs = max(len(sources), len(destinations))
    flows = [Flow(sources[i * len(sources) // pairs], destinations[i * len(destinations) // pairs],
                  n_bytes / pairs / KV_LINK) for i in range(pairs)]
    gather_s = n_bytes / min(len(sources), len(destinations)) / KV_GATHER_BYTES_PER_S
    return KV_BASE_S + gather_s + float(network.finish_s(flows).max())
