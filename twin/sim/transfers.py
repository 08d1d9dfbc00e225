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
    """One flow of a transfer. `left_bytes` as of the last change of rates; `end_s` at the present rate."""

    flow: Flow
    transfer: Transfer
    left_bytes: float
    rate: float = 0.0
    end_s: float = 0.0


@dataclass(slots=True, eq=False)
class Transfer:
    """One request's KV on its way: it has arrived when all its streams have, plus the latency of the route."""

    done: Callable[[], None]
    latency_s: float
    open_streams: int


class Transfers:
    """Rates are found anew whenever a flow starts or ends; between these moments they are constant, so this is exact."""

    def __init__(self, clock: Clock, network: Network) -> None:
        self.clock, self.network = clock, network
        self.streams: list[Stream] = []
        self.delivered_bytes = np.zeros(len(network.links))  # by link, of streams that ended
        self._since_s = 0.0
        self._generation = 0

    def start(self, src_gpus: Sequence[int], dst_gpus: Sequence[int], n_bytes: float, done: Callable[[], None]) -> None:
        """Send `n_bytes` from the GPUs of one rank to those of another, `done` is called when they are there.

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
        self._progress()
        self.streams.extend(Stream(flow, transfer, flow.n_bytes) for flow in flows)
        self._share()

    def crossed_bytes(self) -> NDArray[np.float64]:
        """Bytes that have crossed each link up to now [links]."""
        elapsed_s = self.clock.now - self._since_s
        crossed = self.delivered_bytes.copy()
        for stream in self.streams:
            sent = stream.flow.n_bytes - max(0.0, stream.left_bytes - stream.rate * elapsed_s)
            crossed[list(self.network.route(stream.flow.src, stream.flow.dst))] += sent
        return crossed

    def _progress(self) -> None:
        """Take off what was sent since the rates were last found."""
        elapsed_s = self.clock.now - self._since_s
        for stream in self.streams:
            stream.left_bytes = max(0.0, stream.left_bytes - stream.rate * elapsed_s)
        self._since_s = self.clock.now

    def _share(self) -> None:
        """Find the rates of what is under way and make an appointment with the first that will end."""
        self._generation += 1
        if not self.streams:
            return
        rates = self.network.rates([stream.flow for stream in self.streams])
        for stream, rate in zip(self.streams, rates.tolist(), strict=True):
            stream.rate = rate
            stream.end_s = self.clock.now + stream.left_bytes / rate
        generation = self._generation
        appointment = self.clock.at(min(stream.end_s for stream in self.streams), TRANSFER_PHASE)
        assert appointment.callbacks is not None
        appointment.callbacks.append(lambda _: self._end(generation))

    def _end(self, generation: int) -> None:
        if generation != self._generation:
            return  # rates have changed since this appointment was made
        self._progress()
        ended = [stream for stream in self.streams if stream.end_s <= self.clock.now]
        self.streams = [stream for stream in self.streams if stream.end_s > self.clock.now]
        for stream in ended:
            for link in self.network.route(stream.flow.src, stream.flow.dst):
                self.delivered_bytes[link] += stream.flow.n_bytes
            stream.transfer.open_streams -= 1
            if stream.transfer.open_streams == 0:
                self._arrive_later(stream.transfer)
        self._share()

    def _arrive_later(self, transfer: Transfer) -> None:
        arrival = self.clock.at(self.clock.now + transfer.latency_s, TRANSFER_PHASE)
        assert arrival.callbacks is not None
        arrival.callbacks.append(lambda _: transfer.done())
