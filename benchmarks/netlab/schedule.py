"""What gloo does, as messages that wait for one another; and how long they take on the twin's network.

A message moves once its sender has it and the receiver's note that it is ready has come back over the wire: gloo sends no
payload before that. Collectives follow gloo's algorithms: all-to-all posts everything at once; all-gather and both halves
of all-reduce go round a ring with two segments under way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from twin.cost.network import Flow, Network

_MAX_SEGMENT_BYTES = 1 << 20
"""Gloo's default bound of a ring all-reduce's segment."""


@dataclass(frozen=True)
class Message:
    """`n_bytes` from rank to rank. The sender has it once messages `sender_after` have arrived, the receiver is ready for it
    once `receiver_after` have; both name earlier messages of the list."""

    source: int
    target: int
    n_bytes: float
    sender_after: tuple[int, ...] = ()
    receiver_after: tuple[int, ...] = ()


@dataclass(frozen=True)
class Constants:
    """What is fitted: `late_s` is how much longer than it should a delay line keeps what crosses it (wake-ups, timers),
    `begin_s` what a call costs before and after its messages."""

    late_s: float = 0.0
    begin_s: float = 0.0


def all_to_all(traffic_bytes_RR: npt.NDArray[np.float64]) -> list[Message]:
    """Rank i sends [i, j] bytes to j, all at once."""
    ranks = range(len(traffic_bytes_RR))
    return [Message(i, j, float(traffic_bytes_RR[i, j])) for i in ranks for j in ranks if i != j]


_REACH_BYTES = 8.0  # how far a piece of KV reaches, told before its layers


def kv_transfer(source: int, target: int, layers: int, layer_bytes: float, first: int = 0) -> list[Message]:
    """A word of how much comes, then one message a layer; the receiver asks for the next when it has the last. `first` is the
    first message's index."""
    sizes = [_REACH_BYTES, *[layer_bytes] * layers]
    return [Message(source, target, size, (), (first + i - 1,) if i else ()) for i, size in enumerate(sizes)]


def all_gather(rank_bytes: float, world: int) -> list[Message]:
    """Every rank's bytes to every rank, in two segments."""
    return _ring(rank_bytes / 2, 2, world)


def all_reduce(n_bytes: float, world: int) -> list[Message]:
    """Reduce-scatter round a ring, then all-gather."""
    segments = max(-(-int(n_bytes) // _MAX_SEGMENT_BYTES), 2 * world)
    each = -(-segments // world)
    first = _ring(n_bytes / (each * world), each, world)
    return first + _ring(n_bytes / (each * world), each, world, len(first))


def _ring(segment_bytes: float, each: int, world: int, offset: int = 0) -> list[Message]:
    """`each` segments of every rank go world - 1 times on to the next rank; a rank begins a segment when it and its
    neighbour have the one before the last. Message i of rank r has index offset + i * world + r; with an offset, the first
    two wait for the last of what came before."""
    messages = []
    for i in range(each * (world - 1)):
        for rank in range(world):
            before, here, there = offset + (i - 2) * world, (rank - 1) % world, rank
            waits = i >= 2 or offset > 0
            messages.append(Message(rank, (rank + 1) % world, segment_bytes, (before + here,) if waits else (),
                                    (before + there,) if waits else ()))
    return messages


def ends_s(messages: Sequence[Message], network: Network, constants: Constants,
           burst_bytes: float = 0.0) -> npt.NDArray[np.float64]:
    """When each message has arrived, in seconds after all ranks began. Flows share links max-min fair; a link that was idle
    lets `burst_bytes` through at once, as token buckets do."""
    run = _Run(messages, network, constants, burst_bytes)
    while run.advance():
        pass
    return run.ends + constants.begin_s


def one_way_s(network: Network, source: int, target: int, constants: Constants) -> float:
    """Seconds that a small message takes on its way."""
    route = list(network.route(source, target))
    return float(network.latency[route].sum() + constants.late_s * (network.latency[route] > 0).sum())


class _Run:
    """Flow-level simulation of messages that wait for one another."""

    def __init__(self, messages: Sequence[Message], network: Network, constants: Constants, burst_bytes: float) -> None:
        self.messages, self.network, self.burst = messages, network, burst_bytes
        self.latency = np.array([one_way_s(network, m.source, m.target, constants) for m in messages])
        self.ends = np.full(len(messages), np.nan)
        self.now = 0.0
        self._waiting = dict.fromkeys(range(len(messages)))
        self._starts: dict[int, float] = {}
        self._left: dict[int, float] = {}
        self._credit: dict[int, tuple[float, float]] = {}  # link -> (bytes, when it was last known)

    def advance(self) -> bool:
        """Go on to the next moment at which something starts or ends; False when all has ended."""
        self._release()
        if not self._starts and not self._left:
            return False
        live = list(self._left)
        flows = [Flow(self.messages[i].source, self.messages[i].target) for i in live]
        rates = self.network.rates(flows) if flows else np.zeros(0)
        finishing = [self.now + self._left[i] / rate for i, rate in zip(live, rates, strict=True)]
        until = min([*finishing, *self._starts.values()])
        for i, rate, finish in zip(live, rates, finishing, strict=True):
            self._left[i] -= rate * (until - self.now)
            if finish <= until + 1e-12:
                self._finish(i, until)
        self.now = until
        for i in [i for i, start in self._starts.items() if start <= until]:
            del self._starts[i]
            self._begin(i)
        return True

    def _release(self) -> None:
        """Find out when messages start whose predecessors have all ended."""
        for i in list(self._waiting):
            message = self.messages[i]
            sender = self._after(message.sender_after)
            receiver = self._after(message.receiver_after)
            if not np.isnan(sender + receiver):
                del self._waiting[i]
                self._starts[i] = max(self.now, sender, receiver + self.latency[i])

    def _after(self, waits: tuple[int, ...]) -> float:
        return float(self.ends[list(waits)].max()) if waits else 0.0

    def _begin(self, i: int) -> None:
        message = self.messages[i]
        route = self.network.route(message.source, message.target)
        at_once = min([message.n_bytes, *(self._credit_of(link) for link in route)])
        for link in route:
            self._credit[link] = (self._credit_of(link) - at_once, self.now)
        if message.n_bytes - at_once <= 0:
            self.ends[i] = self.now + self.latency[i]
        else:
            self._left[i] = message.n_bytes - at_once

    def _credit_of(self, link: int) -> float:
        """Tokens in a link's bucket: what was left, and more for the time that it was idle since."""
        left, since = self._credit.get(link, (self.burst, 0.0))
        busy = any(link in self.network.route(self.messages[i].source, self.messages[i].target) for i in self._left)
        return left if busy else min(self.burst, left + (self.now - since) * float(self.network.capacity[link]))

    def _finish(self, i: int, moment: float) -> None:
        del self._left[i]
        self.ends[i] = moment + self.latency[i]
        for link in self.network.route(self.messages[i].source, self.messages[i].target):
            self._credit[link] = (0.0, moment)
