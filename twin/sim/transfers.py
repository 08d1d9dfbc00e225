"""KV transfers under way, as flows that share the links of the cluster max-min fair."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from twin.cost.network import Flow, Network
from twin.sim.clock import TRANSFER_PHASE, Clock


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
    """Rates are found anew when flows start or end, for the flows that share links with them, directly or through others;
    between these moments rates are constant, so this is exact."""

    def __init__(self, clock: Clock, network: Network) -> None:
        self.clock, self.network = clock, network
        self.streams: dict[Stream, None] = {}  # in order of start
        self.delivered_bytes = np.zeros(len(network.links))  # by link, of streams that ended
        self._on_link: dict[int, dict[Stream, None]] = {}
        self._changed: set[int] = set()  # links whose flows have changed at this moment
        self._generation = 0

    def start(self, src_gpus: Sequence[int], dst_gpus: Sequence[int], n_bytes: float, done: Callable[[], None]) -> None:
        """Send `n_bytes` from the GPUs of one rank to those of another; `done` is called when they are there.

        The bytes are cut evenly over as many GPU pairs as the wider side has; the narrower side's GPUs serve several.
        """
        pairs = max(len(src_gpus), len(dst_gpus))
        flows = [Flow(src_gpus[i * len(src_gpus) // pairs], dst_gpus[i * len(dst_gpus) // pairs], n_bytes / pairs)
                 for i in range(pairs)]
        latency_s = max(self.network.latency_s(flow.src, flow.dst) for flow in flows)
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
            self._touch(stream)

    def crossed_bytes(self) -> NDArray[np.float64]:
        """Bytes that have crossed each link up to now [links]."""
        crossed = self.delivered_bytes.copy()
        for stream in self.streams:
            crossed[list(stream.links)] += stream.flow.n_bytes - stream.left_at(self.clock.now)
        return crossed

    def _touch(self, stream: Stream) -> None:
        """A stream has come or gone: once all that happens at this moment has, find the rates anew."""
        if not self._changed:
            self._generation += 1  # appointments made so far are void
            self._call(self.clock.now, self._share)
        self._changed.update(stream.links)

    def _share(self) -> None:
        """Find the rates of the streams that a change reaches, and make an appointment with the first that will end."""
        now = self.clock.now
        affected = self._reached(self._changed)
        self._changed = set()
        if affected:
            rates = self.network.rates([stream.flow for stream in affected])
            for stream, rate in zip(affected, rates.tolist(), strict=True):
                stream.left_bytes, stream.since_s, stream.rate = stream.left_at(now), now, rate
                stream.end_s = now + stream.left_bytes / rate
        if self.streams:
            generation = self._generation
            self._call(min(stream.end_s for stream in self.streams), lambda: self._end(generation))

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
                self.delivered_bytes[link] += stream.flow.n_bytes
            stream.transfer.open_streams -= 1
            if stream.transfer.open_streams == 0:
                self._arrive_later(stream.transfer)
            self._touch(stream)

    def _arrive_later(self, transfer: Transfer) -> None:
        self._call(self.clock.now + transfer.latency_s, transfer.done)

    def _call(self, time_s: float, what: Callable[[], None]) -> None:
        appointment = self.clock.at(time_s, TRANSFER_PHASE)
        assert appointment.callbacks is not None
        appointment.callbacks.append(lambda _: what())
