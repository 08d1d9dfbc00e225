"""An engine for server tests: real batching in steps of a fixed length, tokens that are known beforehand."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence

from runtime.gateway import GatewayServer, GatewaySettings, create_app, listen
from runtime.tokenizer import ByteTokenizer
from runtime.types import FrontendStats, InstanceStats, SamplingParams, TokenEvent
from twin.spec.errors import EptwinError, Overloaded

TEXT = b"The quick brown fox jumps over the lazy dog; caf\xc3\xa9 \xf0\x9f\xa6\x8a. "


BREAKS, RAISES = "!break the stream", "!raise an error"


class FakeStream:
    """One request's tokens."""

    def __init__(self, engine: FakeEngine, request_id: int, prompt: Sequence[int], params: SamplingParams) -> None:
        self.request_id, self.prompt, self.params = request_id, prompt, params
        self._engine, self.produced = engine, 0
        self.events: asyncio.Queue[TokenEvent] = asyncio.Queue()
        self._over = False

    def __aiter__(self) -> AsyncIterator[TokenEvent]:
        return self

    async def __anext__(self) -> TokenEvent:
        if self._over:
            raise StopAsyncIteration
        event = await self.events.get()
        self._over = event.finish_reason is not None
        return event

    async def aclose(self) -> None:
        self._engine.cancel(self.request_id)


class FakeEngine:
    """Every `step_s` each running request gets one token of TEXT (or of `script`). A prompt that begins with
    BREAKS ends in error at its third token, one with RAISES raises on submit. At most `slots` run; the rest wait."""

    def __init__(self, step_s: float = 0.02, slots: int = 1024, max_waiting: int = 10_000,
                 script: Callable[[int], int] = lambda i: TEXT[i % len(TEXT)]) -> None:
        self.step_s, self.slots, self.max_waiting, self.script = step_s, slots, max_waiting, script
        self.max_context = 1 << 20
        self.failure: EptwinError | None = None
        self.running: dict[int, FakeStream] = {}
        self.waiting: deque[FakeStream] = deque()
        self.steps = self.submitted = self.finished = self.cancelled = 0
        self.seen: list[SamplingParams] = []

    async def start(self) -> None:
        self._task = asyncio.create_task(self._loop())

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    def submit(self, prompt_ids: Sequence[int], params: SamplingParams) -> FakeStream:
        if list(prompt_ids[:len(RAISES)]) == list(RAISES.encode()):
            raise RuntimeError("a bug in the engine")
        if len(self.waiting) >= self.max_waiting:
            raise Overloaded("full", retry_after_s=2.0, status=429)
        stream = FakeStream(self, self.submitted, list(prompt_ids), params)
        self.submitted += 1
        self.seen.append(params)
        self.waiting.append(stream)
        return stream

    def cancel(self, request_id: int) -> None:
        before = len(self.running) + len(self.waiting)
        self.running.pop(request_id, None)
        self.waiting = deque(s for s in self.waiting if s.request_id != request_id)
        self.cancelled += before - len(self.running) - len(self.waiting)

    def stats(self) -> FrontendStats:
        instance = InstanceStats(0, "mixed", 0, len(self.running), len(self.waiting), len(self.running) / self.slots, self.steps)
        return FrontendStats(len(self.running), len(self.waiting), self.steps, self.submitted, self.finished, 0, (instance,))

    async def _loop(self) -> None:
        due = time.monotonic()
        while True:
            due = max(due + self.step_s, time.monotonic())
            await asyncio.sleep(due - time.monotonic())
            self._step()

    def _step(self) -> None:
        self.steps += 1
        while self.waiting and len(self.running) < self.slots:
            stream = self.waiting.popleft()
            self.running[stream.request_id] = stream
        now = time.monotonic()
        for stream in list(self.running.values()):
            index, stream.produced = stream.produced, stream.produced + 1
            token, reason = self.script(index), None
            if token in stream.params.stop_token_ids and not stream.params.ignore_eos:
                reason = "stop"
            elif stream.produced >= stream.params.max_tokens:
                reason = "length"
            if index == 2 and stream.prompt[:len(BREAKS)] == list(BREAKS.encode()):
                token, reason = -1, "error"
            stream.events.put_nowait(TokenEvent(token, index, reason, now))
            if reason is not None:
                self.finished += 1
                del self.running[stream.request_id]


@contextlib.contextmanager
def running_server(engine: FakeEngine, vocab: int = 512, **settings: object) -> Iterator[tuple[str, GatewayServer]]:
    """(base URL, server) of a service over `engine` in a thread of its own."""
    limits = GatewaySettings(model_name="tiny", **{"max_context": 4096, **settings})  # type: ignore[arg-type]
    app = create_app(lambda: engine, ByteTokenizer(vocab), limits)
    ports: list[int] = []
    server = GatewayServer(app, limits, on_start=ports.append)
    listener = listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    deadline = time.monotonic() + 10
    while not ports:
        assert thread.is_alive() and time.monotonic() < deadline, "the server did not start"
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{ports[0]}", server
    finally:
        server.should_exit = server.force_exit = True
        thread.join(10)
        listener.close()
        assert not thread.is_alive()


def wait_until(condition: Callable[[], bool], timeout_s: float = 3.0) -> float:
    """Seconds until the condition held. Fails after `timeout_s`."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < timeout_s, "the condition never held"
        time.sleep(0.002)
    return time.monotonic() - start
