"""The network as a graph: GPU ports, NVSwitch domains, PCIe, NICs, leaf and spine switches, with capacities and latencies.

Transfers are flows that share links max-min fair. A collective asks the graph how many bytes cross each link: as all
its flows start together and a lockstep ends with the slowest, it takes the bytes of the fullest link over its capacity
plus the latency of the longest route. Every link is one direction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import networkx as nx
import numpy as np
import numpy.typing as npt

from twin.cost.batch import Array
from twin.spec.cluster import ClusterSpec
from twin.spec.errors import SpecError

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Flow:
    """Bytes on their way from one GPU to another (cluster-wide indices)."""

    src: int
    dst: int
    n_bytes: float = 0.0


@dataclass(frozen=True)
class Link:
    """One direction of a physical link. kind: nvlink, pcie, nic or uplink (leaf to spine)."""

    name: str
    kind: str
    bytes_per_s: float
    latency_s: float


class Network:
    """The graph of one cluster. GPU i is the i-th over groups and nodes in their order; ranks sit on GPUs so numbered."""

    def __init__(self, cluster: ClusterSpec) -> None:
        self.cluster = cluster
        spec = cluster.network
        sizes = [group.gpus_per_node for group in cluster.groups for _ in range(group.nodes)]
        self.gpus = sum(sizes)
        self.node_of: Ints = np.repeat(np.arange(len(sizes)), sizes)
        starts = np.repeat(np.cumsum([0, *sizes[:-1]]), sizes)
        self.local_of: Ints = np.arange(self.gpus) - starts
        self.domain_of = self._domains()
        nics = spec.nics_per_node
        self.rail_of: Ints = self.local_of % nics if nics else np.zeros(self.gpus, dtype=np.int64)
        self.nic_of: Ints = self.node_of * max(nics, 1) + self.rail_of
        if spec.rails:
            self.leaf_of: Ints = self.rail_of + max(nics, 1) * (self.node_of // spec.leaf_ports)
        else:
            self.leaf_of = self.node_of // max(1, spec.leaf_ports // max(nics, 1))
        self._build_links()
        self._routes: dict[tuple[int, int], tuple[int, ...]] = {}

    def _domains(self) -> Ints:
        """NVLink domain of every GPU: a node, or several nodes of one group where the domain spans them."""
        spec, parts, base = self.cluster.network, [], 0
        for group in self.cluster.groups:
            size = spec.nvlink_domain_gpus
            local = np.arange(group.gpus) % group.gpus_per_node
            node = np.arange(group.gpus) // group.gpus_per_node
            if size >= group.gpus_per_node:
                own = np.arange(group.gpus) // (size // group.gpus_per_node * group.gpus_per_node)
            else:  # a domain smaller than the node
                own = node * (-(-group.gpus_per_node // size)) + local // size
            parts.append(own + base)
            base += int(own.max()) + 1
        return np.concatenate(parts)

    def _build_links(self) -> None:
        """Links in a fixed order (so that results are the same everywhere), and where each kind starts."""
        spec = self.cluster.network
        n_nics, n_leaves = int(self.nic_of.max()) + 1, int(self.leaf_of.max()) + 1
        nic_rate = spec.nic_bytes_per_s or spec.pcie_bytes_per_s
        # a leaf's uplinks carry what its attached NICs can send, over the oversubscription
        ports = np.bincount(self.leaf_of[np.unique(self.nic_of, return_index=True)[1]], minlength=n_leaves)
        uplink = np.maximum(ports, 1) * nic_rate / spec.oversubscription
        half_nv, half_nic, hop = spec.nvlink_latency_s / 2, spec.nic_latency_s / 2, spec.switch_latency_s
        self._blocks: tuple[tuple[str, str, int, float | Array, float], ...] = (  # prefix, kind, count, rate, latency
            ("nvlink_up", "nvlink", self.gpus, spec.nvlink_bytes_per_s, half_nv),
            ("nvlink_down", "nvlink", self.gpus, spec.nvlink_bytes_per_s, half_nv),
            ("pcie_up", "pcie", self.gpus, spec.pcie_bytes_per_s, 0.0),
            ("pcie_down", "pcie", self.gpus, spec.pcie_bytes_per_s, 0.0),
            ("nic_up", "nic", n_nics, nic_rate, half_nic), ("nic_down", "nic", n_nics, nic_rate, half_nic),
            ("leaf_up", "uplink", n_leaves, uplink, hop), ("leaf_down", "uplink", n_leaves, uplink, hop))
        counts = [count for _, _, count, _, _ in self._blocks]
        starts = np.cumsum([0, *counts]).tolist()
        self._nv_up, self._nv_down, self._pcie_up, self._pcie_down = starts[:4]
        self._nic_up, self._nic_down, self._up, self._down = starts[4:8]
        self.capacity: Array = np.concatenate([np.full(count, rate, dtype=float) for _, _, count, rate, _ in self._blocks])
        self.latency: Array = np.repeat([latency_s for *_, latency_s in self._blocks], counts)
        self.nvlink_links: npt.NDArray[np.bool_] = np.repeat([kind == "nvlink" for _, kind, *_ in self._blocks], counts)
        order = np.arange(starts[-1])
        self.reversed: Ints = np.concatenate(  # the link that carries the same bytes when every flow turns round
            [order[starts[i ^ 1]:starts[(i ^ 1) + 1]] for i in range(len(self._blocks))])

    @cached_property
    def links(self) -> tuple[Link, ...]:
        """Every link, in the order of `capacity`."""
        return tuple(Link(f"{prefix}/{i}", kind, float(self.capacity[at]), latency_s)
                     for (prefix, kind, count, _, latency_s), start in zip(self._blocks, self._starts, strict=True)
                     for i, at in enumerate(range(start, start + count)))

    @property
    def _starts(self) -> tuple[int, ...]:
        return (self._nv_up, self._nv_down, self._pcie_up, self._pcie_down, self._nic_up, self._nic_down, self._up, self._down)

    # --- the graph
    def graph(self) -> nx.DiGraph:
        """The whole network as a networkx graph; edges carry `link` (index), `bytes_per_s` and `latency_s`."""
        graph = nx.DiGraph(name=self.cluster.name)
        for gpu in range(self.gpus):
            switch, nic = f"nvswitch{self.domain_of[gpu]}", f"nic{self.nic_of[gpu]}"
            self._edge(graph, f"gpu{gpu}", switch, self._nv_up + gpu)
            self._edge(graph, switch, f"gpu{gpu}", self._nv_down + gpu)
            if self.has_nics:
                self._edge(graph, f"gpu{gpu}", nic, self._pcie_up + gpu)
                self._edge(graph, nic, f"gpu{gpu}", self._pcie_down + gpu)
                leaf = f"leaf{self.leaf_of[gpu]}"
                self._edge(graph, nic, leaf, self._nic_up + int(self.nic_of[gpu]))
                self._edge(graph, leaf, nic, self._nic_down + int(self.nic_of[gpu]))
                self._edge(graph, leaf, "spine", self._up + int(self.leaf_of[gpu]))
                self._edge(graph, "spine", leaf, self._down + int(self.leaf_of[gpu]))
        return graph

    def _edge(self, graph: nx.DiGraph, src: str, dst: str, link: int) -> None:
        at = self.links[link]
        graph.add_edge(src, dst, link=link, kind=at.kind, bytes_per_s=at.bytes_per_s, latency_s=at.latency_s)

    @property
    def has_nics(self) -> bool:
        return self.cluster.network.nics_per_node > 0

    def route(self, src: int, dst: int) -> tuple[int, ...]:
        """Links from GPU to GPU: through the NVSwitch inside a domain, else PCIe, NIC, leaf (and spine where the leaves
        differ). Empty when src is dst. Raises SpecError for a GPU that the cluster lacks or that nothing reaches."""
        if (src, dst) not in self._routes:
            self._routes[src, dst] = self._find_route(src, dst)
        return self._routes[src, dst]

    def _find_route(self, src: int, dst: int) -> tuple[int, ...]:
        if not (0 <= src < self.gpus and 0 <= dst < self.gpus):
            raise SpecError(f"no GPU {max(src, dst)} in a cluster of {self.gpus}", field="network",
                            expected=f"0..{self.gpus - 1}")
        if src == dst:
            return ()
        if self.domain_of[src] == self.domain_of[dst]:
            return (self._nv_up + src, self._nv_down + dst)
        if not self.has_nics:
            raise SpecError(f"GPUs {src} and {dst} share no NVLink domain and the nodes have no NICs",
                            field="network.nics_per_node")
        leaves = int(self.leaf_of[src]), int(self.leaf_of[dst])
        spine = () if leaves[0] == leaves[1] else (self._up + leaves[0], self._down + leaves[1])
        return (self._pcie_up + src, self._nic_up + int(self.nic_of[src]), *spine,
                self._nic_down + int(self.nic_of[dst]), self._pcie_down + dst)

    def latency_s(self, src: int, dst: int) -> float:
        """Seconds that the first byte takes."""
        return float(sum(self.latency[link] for link in self.route(src, dst)))

    # --- flows
    def rates(self, flows: Sequence[Flow]) -> Array:
        """Max-min fair bytes/s of flows that are under way at once; inf for a flow that never leaves its GPU.

        Progressive filling: the link whose fair share is smallest stops its flows, its capacity is spent, and so on.
        """
        routes = [self.route(flow.src, flow.dst) for flow in flows]
        used = sorted({link for route in routes for link in route})
        place = {link: i for i, link in enumerate(used)}
        crossing = np.zeros((len(used), len(flows)), dtype=bool)
        crossing[[place[link] for route in routes for link in route], [j for j, route in enumerate(routes) for _ in route]] = True
        left, waiting = self.capacity[used], crossing.sum(axis=1)
        rates = np.full(len(flows), np.inf)
        open_flows = crossing.any(axis=0)
        while open_flows.any():
            share = np.where(waiting > 0, left / np.maximum(waiting, 1), np.inf)
            tightest = share.min()
            # all links at this share stop together, so that equal flows get bit-equal rates
            stopped = open_flows & crossing[share <= tightest * (1 + 1e-12)].any(axis=0)
            rates[stopped] = tightest
            spent = crossing[:, stopped].sum(axis=1)
            left, waiting = np.maximum(left - spent * tightest, 0.0), waiting - spent
            open_flows &= ~stopped
        return rates

    def finish_s(self, flows: Sequence[Flow]) -> Array:
        """When each of flows that start together ends, sharing links as they come and go (flow-level simulation)."""
        left = np.array([flow.n_bytes for flow in flows], dtype=float)
        ends = np.array([self.latency_s(flow.src, flow.dst) for flow in flows])
        latency = ends.copy()
        live = np.array([flow.src != flow.dst for flow in flows]) & (left > 0)
        now = 0.0
        while live.any():
            index = np.flatnonzero(live)
            rates = self.rates([flows[i] for i in index])
            step = float(np.min(left[index] / rates))
            now += step
            left[index] -= rates * step
            done = index[left[index] <= 1e-9 * np.array([flows[i].n_bytes for i in index])]
            ends[done] = now + latency[done]
            live[done] = False
        return ends

    def transfer_s(self, src_gpu: int, dst_gpu: int, n_bytes: float) -> float:
        """Seconds of one transfer that has the network to itself."""
        route = self.route(src_gpu, dst_gpu)
        if not route:
            return 0.0
        return self.latency_s(src_gpu, dst_gpu) + n_bytes / float(self.capacity[list(route)].min())

    # --- collectives
    def link_bytes(self, traffic_bytes_RR: Array, ranks: Sequence[int] | Ints) -> Array:
        """Bytes that cross each link when rank i sends traffic[i, j] to rank j: [links]; sends to oneself cross none."""
        return np.asarray(self.link_matrix(traffic_bytes_RR, ranks).sum(axis=1))

    def link_matrix(self, per_unit_RR: Array, ranks: Sequence[int] | Ints) -> Array:
        """As `link_bytes`, kept apart by sender: [links, R], so that link bytes are linear in what each rank sends."""
        gpus = np.asarray(ranks, dtype=np.int64)
        count = len(gpus)
        traffic = np.array(per_unit_RR, dtype=float)
        np.fill_diagonal(traffic, 0.0)
        domain, leaf = self.domain_of[gpus], self.leaf_of[gpus]
        near = traffic * (domain[:, None] == domain[None, :])
        far = traffic - near
        out = np.zeros((len(self.capacity), count))
        senders = np.arange(count)
        out[self._nv_up + gpus, senders] += near.sum(axis=1)
        out[self._nv_down + gpus] += near.T
        if far.any():
            if not self.has_nics:
                raise SpecError("ranks share no NVLink domain and the nodes have no NICs", field="network.nics_per_node")
            out[self._pcie_up + gpus, senders] += far.sum(axis=1)
            out[self._pcie_down + gpus] += far.T
            out[self._nic_up + self.nic_of[gpus], senders] += far.sum(axis=1)
            self._add(out, self._nic_down, self.nic_of[gpus], far)
            spine = far * (leaf[:, None] != leaf[None, :])
            if spine.any():
                out[self._up + leaf, senders] += spine.sum(axis=1)
                self._add(out, self._down, leaf, spine)
        return out

    @staticmethod
    def _add(out: Array, first: int, link_R: Ints, traffic_RR: Array) -> None:
        """Add to rows `first + link[j]` what every rank sends to rank j; many receivers may share a link."""
        count = len(link_R)
        rows = int(link_R.max()) + 1
        cells = link_R[:, None] * count + np.arange(count)
        total = np.bincount(cells.ravel(), weights=traffic_RR.T.ravel(), minlength=rows * count)
        out[first:first + rows] += total.reshape(rows, count)

    def route_latency_s(self, traffic_RR: Array, ranks: Sequence[int] | Ints) -> float:
        """Latency of the longest route that carries anything."""
        gpus = np.asarray(ranks, dtype=np.int64)
        busy = np.array(traffic_RR, dtype=float) > 0
        np.fill_diagonal(busy, False)
        if not busy.any():
            return 0.0
        near = self.domain_of[gpus][:, None] == self.domain_of[gpus][None, :]
        across = self.leaf_of[gpus][:, None] != self.leaf_of[gpus][None, :]
        spec = self.cluster.network
        worst = spec.nvlink_latency_s if (busy & near).any() else 0.0
        if (busy & ~near).any():
            worst = max(worst, spec.nic_latency_s + (2 * spec.switch_latency_s if (busy & ~near & across).any() else 0.0))
        return worst

    def all_to_all_s(self, traffic_bytes_RR: Array, ranks: Sequence[int] | Ints) -> float:
        """Seconds until the last of simultaneous flows ends: the fullest link's bytes over its capacity, plus latency.

        A lower bound that max-min sharing attains whenever the fullest link never idles (tested against `finish_s`).
        """
        loads = self.link_bytes(traffic_bytes_RR, ranks)
        return float((loads / self.capacity).max()) + self.route_latency_s(traffic_bytes_RR, ranks)

    def all_gather_s(self, n_bytes: float, ranks: Sequence[int] | Ints) -> float:
        """Ring all-gather of `n_bytes` in all (each rank brings its share), hierarchical across NVLink domains.

        Inside a domain the ring carries (g - 1) / g of what the domain holds; between domains each rail's share goes
        round a ring of the domains, then spreads inside. Pipelined, so the slower of the two paces it.
        """
        gpus = np.asarray(ranks, dtype=np.int64)
        world = len(gpus)
        if world <= 1 or n_bytes <= 0:
            return 0.0
        spec = self.cluster.network
        _, members = np.unique(self.domain_of[gpus], return_counts=True)
        domains, inside = len(members), int(members.max())
        inner_s = n_bytes * (inside - 1) / inside / spec.nvlink_bytes_per_s
        hops_s = (inside - 1) * spec.nvlink_latency_s
        if domains == 1:
            return inner_s + hops_s
        if not self.has_nics:
            raise SpecError("ranks share no NVLink domain and the nodes have no NICs", field="network.nics_per_node")
        port = min(self.capacity[self._nic_up], spec.pcie_bytes_per_s)
        nics = max(1, min(len(np.unique(self.nic_of[gpus[self.domain_of[gpus] == self.domain_of[gpus[0]]]])), inside))
        outer_s = n_bytes * (domains - 1) / domains / (nics * port)
        return float(max(inner_s, outer_s)) + hops_s + (domains - 1) * spec.nic_latency_s

    def reduce_scatter_s(self, n_bytes: float, ranks: Sequence[int] | Ints) -> float:
        """Ring reduce-scatter of buffers of `n_bytes`: the all-gather backwards."""
        return self.all_gather_s(n_bytes, ranks)

    def all_reduce_s(self, n_bytes: float, ranks: Sequence[int] | Ints) -> float:
        """The faster of a ring (reduce-scatter, then all-gather) and a binary tree (small messages)."""
        world = len(ranks)
        if world <= 1 or n_bytes <= 0:
            return 0.0
        ring_s = self.reduce_scatter_s(n_bytes, ranks) + self.all_gather_s(n_bytes, ranks)
        gpus = np.asarray(ranks, dtype=np.int64)
        ones = np.ones((world, world))
        slowest = self.cluster.network.nvlink_bytes_per_s
        if len(np.unique(self.domain_of[gpus])) > 1:
            slowest = min(slowest, float(self.capacity[self._nic_up]), self.cluster.network.pcie_bytes_per_s)
        depth = int(np.ceil(np.log2(world)))
        tree_s = 2 * depth * self.route_latency_s(ones, gpus) + 2 * n_bytes / slowest
        return min(ring_s, tree_s)

    def fan_in_s(self, sources: Sequence[int], destinations: Sequence[int], n_bytes: float) -> float:
        """Seconds until `n_bytes` from every source have reached its destination, all starting at once (KV transfer)."""
        flows = [Flow(src, dst, n_bytes) for src, dst in zip(sources, destinations, strict=True)]
        return float(self.finish_s(flows).max(initial=0.0))


@lru_cache(maxsize=16)
def network_of(cluster: ClusterSpec) -> Network:
    """The cluster's graph, made once for all that ask."""
    return Network(cluster)
