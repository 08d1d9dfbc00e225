"""A request in flight, as the front end sees it: its stream of tokens, its place, and the handover of its KV."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from runtime.kv import kv_routes
from runtime.targets import Target, Targets
from runtime.types import FinishReason, SamplingParams, TokenEvent
from twin.spec.model import ModelSpec

Send = Callable[[int, dict[str, Any]], None]
"""Send a message to a rank."""


class Stream:
    """A TokenStream: async iterator over the events of one request. `aclose` cancels what is not done."""

    def __init__(self, request_id: int, cancel: Callable[[int], bool]) -> None:
        self.request_id = request_id
        self._cancel = cancel
        self._queue: asyncio.Queue[TokenEvent | Exception] = asyncio.Queue()
        self._done = False

    def push(self, event: TokenEvent | Exception) -> None:
        self._queue.put_nowait(event)

    def __aiter__(self) -> AsyncIterator[TokenEvent]:
        return self

    async def __anext__(self) -> TokenEvent:
        """The next event. Raises what ended the request: RankFailed, SpecError."""
        if self._done:
            raise StopAsyncIteration
        event = await self._queue.get()
        if isinstance(event, Exception):
            self._done = True
            raise event
        self._done = event.finish_reason is not None
        return event

    async def aclose(self) -> None:
        if not self._done:
            self._done = True
            self._cancel(self.request_id)


@dataclass
class Flight:
    """`state`: entry (waits, prefills or, in a mixed pool, decodes at `entry`), asking (the decoder for blocks), moving
    (KV under way), decode. `aim`: the decoder that was asked for room before the prompt was done; `moves`: KV is under way to it;
    `landed`: all of it is there. Times on the machine's monotonic clock. `strikes` counts steps that failed with it in them."""

    request_id: int
    prompt: list[int]
    params: SamplingParams
    seed: int
    stream: Stream
    entry: Target
    arrival: float
    state: str = "entry"
    decoder: Target | None = None
    aim: Target | None = None
    moves: bool = False
    landed: bool = False
    output: list[int] = field(default_factory=list)
    token_times: list[float] = field(default_factory=list)
    prefill_start: float | None = None
    source_blocks: list[int] = field(default_factory=list)
    transfer: tuple[float, float] | None = None
    pending: set[tuple[str, int]] = field(default_factory=set)
    preemptions: int = 0
    cancelled: bool = False
    finish_reason: FinishReason | None = None
    strikes: int = 0

    @property
    def at(self) -> Target:
        """Who works on it."""
        return self.decoder if self.state == "decode" and self.decoder is not None else self.entry

    @property
    def known_tokens(self) -> int:
        """Tokens whose KV there is after the newest was drawn."""
        return len(self.prompt) + len(self.output) - 1

    def message(self, op: str, **more: Any) -> dict[str, Any]:
        """A message about this request that carries all a leader needs to know."""
        return {"op": op, "id": self.request_id, "tokens": self.prompt + self.output, "prompt_len": len(self.prompt),
                "params": asdict(self.params), "seed": self.seed, **more}

    def start_over(self, entry: Target) -> None:
        """Begin again at `entry`, from the tokens that there are; what was computed of them is lost."""
        self.state, self.entry, self.decoder, self.aim = "entry", entry, None, None
        self.moves = self.landed = False
        self.source_blocks, self.transfer = [], None
        self.pending.clear()
        move_load(self, None, entry)

    def give(self, token: int, reason: FinishReason | None) -> None:
        """Pass a token on to the client."""
        now = time.monotonic()
        self.output.append(token)
        self.token_times.append(now)
        self.finish_reason = reason
        self.stream.push(TokenEvent(token, len(self.output) - 1, reason, now))


class Handovers:
    """KV on its way from prefill to decode ranks: reserve, move, activate there and release here."""

    def __init__(self, model: ModelSpec, targets: Targets, send: Send, wake: Callable[[Target], int]) -> None:
        self._model, self._targets, self._send, self._wake = model, targets, send, wake
        self._tag = 0
        self.moved_bytes = 0

    def start_over(self, targets: Targets) -> None:
        """Nothing is on its way any more; go on among other targets."""
        self._targets = targets

    def starts(self, flight: Flight, blocks: list[int]) -> None:
        """The first part of a prompt is being computed: ask a decode rank for room already."""
        flight.aim, flight.source_blocks = self._targets.choose_decoder(len(flight.prompt)), blocks
        self._ask(flight, flight.aim, early=True)

    def begin(self, flight: Flight, blocks: list[int]) -> None:
        """The prompt is computed and held at the entry: ask a decode rank for room, if none was asked."""
        asked = flight.aim is not None
        flight.decoder = flight.aim or self._targets.choose_decoder(len(flight.prompt))
        flight.state, flight.source_blocks = "moving" if flight.moves else "asking", blocks
        move_load(flight, flight.entry, flight.decoder)
        if not asked:
            self._ask(flight, flight.decoder, early=False)
        elif flight.landed:
            self._activate(flight, flight.decoder)

    def _ask(self, flight: Flight, decoder: Target, *, early: bool) -> None:
        self._send(decoder.leader, flight.message("reserve", wake=self._wake(decoder), early=early))

    def reserved(self, flight: Flight, blocks: list[int]) -> None:
        """The decode rank has room: tell every rank on both sides what to move."""
        decoder = flight.decoder or flight.aim
        if flight.moves or decoder is None:
            return
        source, target, early = flight.entry.tp_ranks, decoder.tp_ranks, flight.aim is not None
        flight.moves, flight.state = True, "moving" if flight.state == "asking" else flight.state
        self._tag += 1
        plans: dict[tuple[str, int], list[list[int]]] = {}
        for route in kv_routes(self._model, len(source), len(target)):
            plans.setdefault(("sent", source[route.source]), []).append([target[route.target], *route.source_heads])
            plans.setdefault(("received", target[route.target]), []).append([source[route.source], *route.target_heads])
        flight.pending = set(plans)
        tokens = flight.known_tokens + (flight.state == "entry")  # the newest is not drawn yet
        for (side, rank), routes in plans.items():
            self._send(rank, {"op": "send_kv" if side == "sent" else "receive_kv", "id": flight.request_id, "tag": self._tag,
                              "tokens": tokens, "routes": routes, "early": early,
                              "blocks": flight.source_blocks if side == "sent" else blocks})

    def progressed(self, flight: Flight, message: dict[str, Any]) -> bool:
        """One rank has sent or received its part. True when a request that ended has no more to wait for."""
        event = message["ev"]
        flight.pending.discard((event, message["rank"]))
        if event == "received":
            began = min(message["start"], flight.transfer[0]) if flight.transfer else message["start"]
            flight.transfer = (began, message["end"])
            self.moved_bytes += message["bytes"]
        decoder = flight.decoder or flight.aim
        assert decoder is not None
        if not any(side == event for side, _ in flight.pending):
            if event == "sent":
                self._send(flight.entry.leader, {"op": "release", "id": flight.request_id, "wake": self._wake(flight.entry)})
            elif flight.finish_reason is None and flight.state == "moving":
                self._activate(flight, decoder)
            else:
                flight.landed = True
        if flight.finish_reason is None or flight.pending:
            return False
        self._cancel(flight, decoder)
        return True

    def cancel(self, flight: Flight) -> bool:
        """Tell who works on it, or keeps room for it; False where blocks in transfer are freed when both sides are done with
        them."""
        if flight.pending:
            return False
        self._cancel(flight, flight.at)
        other = flight.decoder if flight.state == "asking" else flight.aim if flight.state == "entry" else None
        if other is not None:
            self._cancel(flight, other)
        return True

    def _cancel(self, flight: Flight, target: Target) -> None:
        self._send(target.leader, {"op": "cancel", "id": flight.request_id, "wake": self._wake(target)})

    def _activate(self, flight: Flight, decoder: Target) -> None:
        flight.state = "decode"
        self._send(decoder.leader, flight.message("activate", wake=self._wake(decoder)))


def move_load(flight: Flight, source: Target | None, target: Target | None) -> None:
    """Count a request away from one target and to another; None is outside."""
    rest = flight.params.max_tokens - len(flight.output)
    if source is not None:
        source.outstanding_requests -= 1
        source.outstanding_tokens -= rest + (0 if flight.output else len(flight.prompt))
    if target is not None:
        target.outstanding_requests += 1
        target.outstanding_tokens += rest + (0 if flight.output else len(flight.prompt))
