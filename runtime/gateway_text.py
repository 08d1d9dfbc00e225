"""One choice of an answer: from the engine's tokens to text, cut at stop strings and counted."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Sequence
from dataclasses import dataclass
from typing import Protocol

from runtime.metrics import ServiceMetrics
from runtime.tokenizer import Detokenizer
from runtime.types import FrontendStats, SamplingParams, TokenEvent, TokenStream
from twin.spec.errors import EptwinError


class Engine(Protocol):
    """What the gateway asks of a front end. `submit` raises Overloaded when it refuses and SpecError for a bad request;
    the stream raises RankFailed. `max_context` (prompt plus output, in tokens) holds from the start on; `failure` is
    set once the engine can serve no more."""

    max_context: int
    failure: EptwinError | None

    def start(self) -> Awaitable[None]: ...
    def stop(self) -> Awaitable[None]: ...
    def submit(self, prompt_ids: Sequence[int], params: SamplingParams) -> TokenStream: ...
    def stats(self) -> FrontendStats: ...


class GenerationFailed(EptwinError):
    """The engine ended this request without completing it."""


class StopScanner:
    """Cuts text at the first stop string, which may span any number of pushes.

    Text that could still turn out to be the start of a stop string is held back, nothing more.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Text that is safe to show now; sets `stopped` when a stop string is complete."""
        if not self._stops:
            return text
        held = self._held + text
        cut = min((at for stop in self._stops if (at := held.find(stop)) >= 0), default=-1)
        if cut >= 0:
            self.stopped, self._held = True, ""
            return held[:cut]
        keep = max(self._overlap(held, stop) for stop in self._stops)
        self._held = held[len(held) - keep:]
        return held[:len(held) - keep]

    def finish(self) -> str:
        """What was held back, now that nothing follows."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Length of the longest end of `text` that begins `stop` and is not all of it."""
        return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


@dataclass(frozen=True)
class Piece:
    """What one token adds to a choice. `finish_reason` is set on the last piece; `output_tokens` counts so far."""

    choice: int
    text: str
    finish_reason: str | None
    output_tokens: int


@dataclass(frozen=True)
class ChoiceSpec:
    """One sequence to generate."""

    index: int
    prompt_ids: Sequence[int]
    params: SamplingParams
    stops: tuple[str, ...]


async def generate(spec: ChoiceSpec, engine: Engine, detokenizer: Detokenizer, metrics: ServiceMetrics,
                   start_s: float) -> AsyncIterator[Piece]:
    """The pieces of one choice, one for each token. Whatever ends this generator early cancels the request.

    `start_s` is when the HTTP request came, on the clock of TokenEvent.time. Raises what the engine raises, and
    GenerationFailed when it ends the request as cancelled or in error.
    """
    stream = engine.submit(spec.prompt_ids, spec.params)
    timer = _Timer(metrics, start_s)
    scanner = StopScanner(spec.stops)
    metrics.prompt_tokens.inc(len(spec.prompt_ids))
    metrics.request_prompt_tokens.observe(len(spec.prompt_ids))
    end = "abort"
    try:
        async for event in stream:
            reason = event.finish_reason
            if reason in ("cancelled", "error") or event.token_id < 0:
                end = "error" if reason == "error" else "abort"
                raise GenerationFailed("the engine could not complete the request")
            timer.token(event)
            text = scanner.push("" if _ends(event, spec) else detokenizer.push(event.token_id))
            if reason is not None and not scanner.stopped:
                text += scanner.push(detokenizer.finish())
                text += "" if scanner.stopped else scanner.finish()
            reason = "stop" if scanner.stopped else reason
            end = reason or end
            yield Piece(spec.index, text, reason, timer.tokens)
            if reason is not None:
                return
        raise GenerationFailed("the engine ended the request early")
    finally:
        timer.close()
        metrics.ended[end].inc()
        await stream.aclose()


def _ends(event: TokenEvent, spec: ChoiceSpec) -> bool:
    """True for the token that means the end; it is counted as output but is not text."""
    return event.finish_reason == "stop" and event.token_id in spec.params.stop_token_ids


class _Timer:
    """Observes the latencies of one request."""

    def __init__(self, metrics: ServiceMetrics, start_s: float) -> None:
        self._metrics, self._start_s = metrics, start_s
        self._first_s = self._last_s = start_s
        self.tokens = 0

    def token(self, event: TokenEvent) -> None:
        if self.tokens == 0:
            self._first_s = event.time
            self._metrics.ttft_s.observe(event.time - self._start_s)
        else:
            self._metrics.itl_s.observe(event.time - self._last_s)
        self._last_s = event.time
        self.tokens += 1
        self._metrics.generation_tokens.inc()

    def close(self) -> None:
        if self.tokens:
            self._metrics.e2e_s.observe(self._last_s - self._start_s)
            self._metrics.request_generation_tokens.observe(self.tokens)
        if self.tokens > 1:
            self._metrics.tpot_s.observe((self._last_s - self._first_s) / (self.tokens - 1))
