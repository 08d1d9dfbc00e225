"""KV transfers under way, as flows that share the links of the cluster max-min fair, with one another and with collectives.

Collectives are not followed message by message. What a step's dispatches and combines put on a link is spread evenly over
the step; a link has for KV what they leave on average, and at least its flows' fair part of the link while an exchange is
on it (so many flows of so many). The exchanges have what KV leaves then, and take longer for it (`Neighbour.squeeze`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from twin.cost.handover import HandoverStyle
from twin.cost.network import Flow, Ints, Network
from twin.sim.clock import TRANSFER_PHASE, Clock

Floats = NDArray[np.float64]


class Neighbour(Protocol):
    """Collectives that use links beside transfers. k: their links; `on_link`: which of the network's they are."""

    @property
    def links_k(self) -> Ints: ...

    @property
    def on_link(self) -> NDArray[np.bool_]: ...

    def load(self) -> tuple[Floats, Floats]:
        """Mean bytes/s on each link now, and the flows that carry them while an exchange is under way (none when nothing
        runs): [k], [k]."""
        ...

    def squeeze(self, taken_k: Floats) -> None:
        """From now on, transfers take this part of each link while an exchange is on it."""
        ...


@dataclass(slots=True, eq=False)
class Stream:
    """One flow of a transfer: `left_bytes` at `since_s`, going at `rate` bytes/s, to end at `end_s` if that lasts."""

    flow: Flow
    links: tuple[int, ...]
    transfer: Transfer
    left_bytes: float
    since_s: float
    rate: float = 0.0
    end_s: float = 0.0

    def left_at(self, time_s: float) -> float:
        return max(0.0, self.left_bytes - self.rate * (time_s - self.since_s))


@dataclass(slots=True, eq=False)
class Transfer:
    """One request's KV on its way: it has arrived when all its streams have, plus the latency of the route."""

    done: Callable[[], None]
    latency_s: float
    open_streams: int


class Transfers:
    """Rates are found anew when flows start or end, or when neighbours begin to do something else, for the flows that share
    links with them, directly or through others; between these moments rates are constant, so this is exact.

    `style`: what transfers get out of links and take at least (None: all of it, and nothing).
    """

    def __init__(self, clock: Clock, network: Network, style: HandoverStyle | None = None) -> None:
        self.clock, self.style = clock, style
        self.network = copy.copy(network)  # its capacities are what transfers find
        self.capacity, self.most = network.capacity, (1.0 if style is None else style.link_share) * network.capacity
        self.network.capacity = self.most.copy()
        self.streams: dict[Stream, None] = {}  # in order of start
        self.delivered_bytes = np.zeros(len(network.links))  # by link, of streams that ended
        self.rate_on = np.zeros(len(network.links))  # bytes/s on each link now
        self._neighbours: list[Neighbour] = []
        self._flows = np.zeros(len(network.links))  # of transfers, by link
        self._on_link: dict[int, dict[Stream, None]] = {}
        self._changed: set[int] = set()  # links whose flows have changed at this moment
        self._generation = 0

    def add_neighbour(self, neighbour: Neighbour) -> None:
        """Share links with an instance's collectives; to be told of every change of what they do (`changed`)."""
        self._neighbours.append(neighbour)

    def changed(self, neighbour: Neighbour) -> None:
        """What a neighbour puts on its links has changed."""
        if self.streams:
            links = neighbour.links_k[self._flows[neighbour.links_k] > 0]
            if len(links):
                self._touch(links.tolist())

    def start(self, src_gpus: Sequence[int], dst_gpus: Sequence[int], n_bytes: float, done: Callable[[], None]) -> None:
        """Send `n_bytes` from the GPUs of one rank to those of another; `done` is called when they are there.

        The bytes are cut evenly over as many GPU pairs as the wider side has; the narrower side's GPUs serve several.
        """
        pairs = max(len(src_gpus), len(dst_gpus))
        flows = [Flow(src_gpus[i * len(src_gpus) // pairs], dst_gpus[i * len(dst_gpus) // pairs], n_bytes / pairs)
                 for i in range(pairs)]
        latency_s = max(self.network.latency_s(flow.src, flow.dst) for flow in flows)
        if self.style is not None:
            gathered_bytes = n_bytes / min(len(src_gpus), len(dst_gpus))
            latency_s += self.style.base_s + gathered_bytes / self.style.gather_bytes_per_s
        flows = [flow for flow in flows if flow.src != flow.dst and flow.n_bytes > 0]
        transfer = Transfer(done, latency_s, len(flows))
        if not flows:
            self._arrive_later(transfer)
            return
        for flow in flows:
            stream = Stream(flow, self.network.route(flow.src, flow.dst), transfer, flow.n_bytes, self.clock.now)
            self.streams[stream] = None
            for link in stream.links:
                self._on_link.setdefault(link, {})[stream] = None
                self._flows[link] += 1
            self._touch(stream.links)

    def crossed_bytes(self) -> NDArray[np.float64]:
        """Bytes that have crossed each link up to now [links]."""
        crossed = self.delivered_bytes.copy()
        for stream in self.streams:
            crossed[list(stream.links)] += stream.flow.n_bytes - stream.left_at(self.clock.now)
        return crossed

    def _touch(self, links: Iterable[int]) -> None:
        """Something changes on these links: once all that happens at this moment has, find the rates anew."""
        if not self._changed:
            self._generation += 1  # appointments made so far are void
            self._call(self.clock.now, self._share)
        self._changed.update(links)

    def _share(self) -> None:
        """Find the rates of the streams that a change reaches, and make an appointment with the first that will end."""
        now = self.clock.now
        affected = self._reached(self._changed)
        on_link = dict.fromkeys(sorted(self._changed.union(*(stream.links for stream in affected))), 0.0)
        links = np.array(list(on_link))
        self._changed = set()
        near = [n for n in self._neighbours if n.on_link[links].any()]
        fair = self._leave_room(links, near)
        if affected:
            rates = self.network.rates([stream.flow for stream in affected])
            for stream, rate in zip(affected, rates.tolist(), strict=True):
                stream.left_bytes, stream.since_s, stream.rate = stream.left_at(now), now, rate
                stream.end_s = now + stream.left_bytes / rate
                for link in stream.links:
                    on_link[link] += rate
        self.rate_on[links] = list(on_link.values())
        for neighbour in near:
            at = neighbour.links_k
            neighbour.squeeze(np.minimum(self.rate_on[at] / self.capacity[at], fair[at]))
        if self.streams:
            generation = self._generation
            self._call(min(stream.end_s for stream in self.streams), lambda: self._end(generation))

    def _leave_room(self, links: Ints, near: Sequence[Neighbour]) -> Floats:
        """Set the capacities that transfers find on `links`; their fair part of every link while exchanges are on it."""
        if not near:
            self.network.capacity[links] = self.most[links]
            return np.ones(len(self.capacity))
        used, flows = np.zeros(len(self.capacity)), np.zeros(len(self.capacity))
        for neighbour in near:
            load, count = neighbour.load()
            used[neighbour.links_k] += load
            flows[neighbour.links_k] += count
        fair = self._flows / np.maximum(self._flows + flows, 1.0)
        left = np.maximum(self.capacity - used, self.capacity * fair)
        self.network.capacity[links] = np.minimum(self.most, left)[links]
        return np.asarray(fair)

    def _reached(self, links: set[int]) -> list[Stream]:
        """Streams on these links, and those that share any link with one of them, and so on; in order of start."""
        found: set[Stream] = set()
        seen, ahead = set(links), list(links)
        while ahead:
            for stream in self._on_link.get(ahead.pop(), ()):
                if stream not in found:
                    found.add(stream)
                    fresh = [link for link in stream.links if link not in seen]
                    seen.update(fresh)
                    ahead.extend(fresh)
        return [stream for stream in self.streams if stream in found] if found else []

    def _end(self, generation: int) -> None:
        if generation != self._generation:
            return  # rates have changed since this appointment was made
        for stream in [stream for stream in self.streams if stream.end_s <= self.clock.now]:
            del self.streams[stream]
            for link in stream.links:
                del self._on_link[link][stream]
                self._flows[link] -= 1
                self.delivered_bytes[link] += stream.flow.n_bytes
            stream.transfer.open_streams -= 1
            if stream.transfer.open_streams == 0:
                self._arrive_later(stream.transfer)
            self._touch(stream.links)

    def _arrive_later(self, transfer: Transfer) -> None:
        self._call(self.clock.now + transfer.latency_s, transfer.done)

    def _call(self, time_s: float, what: Callable[[], None]) -> None:
        appointment = self.clock.at(time_s, TRANSFER_PHASE)
        assert appointment.callbacks is not None
        appointment.callbacks.append(lambda _: what())
