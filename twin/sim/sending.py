"""KV hand-overs: from a prompt that is (or is about to be) computed to a request that can decode elsewhere.

A decode rank is chosen and asked for memory; when it has given it, bytes flow as the engine does it (`HandoverStyle`): at
once or when both sides are between steps, all of them after the prompt or most of them while its last chunk is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from twin.cost.handover import HandoverStyle
from twin.sim.clock import Clock
from twin.sim.instance import Instance
from twin.sim.rank import Handover
from twin.sim.request import Request
from twin.sim.targets import Targets
from twin.sim.transfers import Transfers

Note = Callable[[str, Request, Instance, int], None]


@dataclass(slots=True, eq=False)
class Sending:
    """One hand-over. `tail`: the part of its bytes that waits for the prompt's end; `heard`: sides that are ready."""

    request: Request
    source: Instance
    target: Instance
    n_bytes: float
    tail: float
    reserved: bool = False
    prompt_done: bool = False
    begun: float = 0.0  # part of the bytes that have been put on the way
    open_parts: int = 0
    heard: int = 0


class Sendings:
    """All hand-overs under way, by request."""

    def __init__(self, clock: Clock, transfers: Transfers, decode: Targets, style: HandoverStyle, layers: int,
                 note: Note) -> None:
        self.clock, self.transfers, self.decode, self.style, self.layers = clock, transfers, decode, style, layers
        self._note = note
        self.under_way: dict[int, Sending] = {}

    def prompt_ends(self, request: Request, source: Instance, rank: int, last_chunk: int, n_bytes: float) -> None:
        """The last chunk of a prompt begins: where parts of it leave early, the decode rank is asked now."""
        tail = self.style.tail(request.isl, last_chunk, self.layers)
        if tail < 1.0:
            self._ask(request, source, n_bytes, tail)

    def prefilled(self, request: Request, source: Instance, rank: int, n_bytes: float) -> None:
        """A prompt is computed; its KV stays where it is until it has been sent."""
        sending = self.under_way.get(request.id) or self._ask(request, source, n_bytes, 1.0)
        sending.prompt_done = True
        self._flow(sending)

    def _ask(self, request: Request, source: Instance, n_bytes: float, tail: float) -> Sending:
        site = self.decode.choose(0, request.osl)
        request.decode_instance, request.decode_rank = site.instance.number, site.rank
        sending = self.under_way[request.id] = Sending(request, source, site.instance, n_bytes, tail)
        site.instance.enqueue(site.rank, Handover(request, lambda: self._reserved(sending)))
        return sending

    def _reserved(self, sending: Sending) -> None:
        """The decode rank has given memory and a seat."""
        if not self.style.between_steps:
            sending.reserved = True
            self._flow(sending)
            return
        sending.target.between_steps(lambda: self._heard(sending, by_target=True))
        sending.source.between_steps(lambda: self._heard(sending, by_target=False))

    def _heard(self, sending: Sending, *, by_target: bool) -> None:
        sending.heard += 1
        if by_target:  # the receiver's clock is the one that measures
            sending.request.transfer_start_s = self.clock.now
        if sending.heard == 2:
            sending.reserved = True
            self._flow(sending)

    def _flow(self, sending: Sending) -> None:
        """Put on the way whatever may go by now."""
        request = sending.request
        if not sending.reserved:
            return
        ready = 1.0 if sending.prompt_done else 1.0 - sending.tail
        if sending.prompt_done:
            self._note("transfer", request, sending.target, request.decode_rank)
            if request.transfer_start_s is None:
                request.transfer_start_s = self.clock.now
        part, sending.begun = ready - sending.begun, ready
        sending.open_parts += 1
        self.transfers.start(rank_gpus(sending.source, request.prefill_rank), rank_gpus(sending.target, request.decode_rank),
                             part * sending.n_bytes, lambda: self._landed(sending))

    def _landed(self, sending: Sending) -> None:
        """A part has arrived; with the last one the request can decode, and its memory at the source is free."""
        sending.open_parts -= 1
        if sending.open_parts or not sending.prompt_done:
            return
        request = sending.request
        self._note("landed", request, sending.target, request.decode_rank)
        assert request.transfer_start_s is not None, "a transfer that never began"
        request.kv_transfer_s = self.clock.now - request.transfer_start_s
        del self.under_way[request.id]
        sending.source.release(request.prefill_rank, request.id)
        sending.target.enqueue(request.decode_rank, request)


def rank_gpus(instance: Instance, rank: int) -> tuple[int, ...]:
    """The TP GPUs of one DP rank."""
    tp = instance.pool.tp
    return instance.gpus[rank * tp:(rank + 1) * tp]
