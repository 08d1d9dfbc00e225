"""One answer: runs its choices on the engine and writes them as one JSON object or as server-sent events.

However the request ends (done, failed, client gone, reader stalled, server stopping), every choice still running is
cancelled before the response returns.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from runtime.gateway_http import HttpError, send_error, send_json, to_http
from runtime.gateway_text import ChoiceSpec, Engine, Piece, generate
from runtime.metrics import ServiceMetrics
from runtime.tokenizer import Tokenizer
from twin.policy.admission import Admission
from twin.spec.errors import Overloaded

_MERGE_BOUND = 64
"""Pieces of a many-choice answer that wait for the reader before the choices wait too."""
_NOT_READY_RETRY_S = 5.0


@dataclass
class Desk:
    """Who is being served. Admits as the policy says (429 beyond), nobody while not ready or draining (503), and cuts
    off readers that take nothing for `write_timeout_s`, so that what they leave unread stays bounded. `outstanding`
    counts sequences, `outstanding_tokens` their prompts and allowed outputs."""

    admission: Admission
    write_timeout_s: float
    ready: bool = False
    draining: bool = False
    outstanding: int = 0
    outstanding_tokens: int = 0
    _left: deque[float] = field(default_factory=lambda: deque(maxlen=64))
    _writing: dict[asyncio.Task[Any], float] = field(default_factory=dict)

    @contextlib.contextmanager
    def seat(self, choices: Sequence[ChoiceSpec]) -> Iterator[None]:
        """Hold places for all choices of a request or none; raises Overloaded when there are none."""
        if self.draining or not self.ready:
            raise Overloaded("not accepting requests", retry_after_s=_NOT_READY_RETRY_S, status=503)
        tokens = sum(len(choice.prompt_ids) + choice.params.max_tokens for choice in choices)
        decision = self.admission.decide(self.outstanding + len(choices) - 1, self.outstanding_tokens, tokens,
                                         requests_per_s=self._leaving_per_s())
        if not decision.admitted:
            raise Overloaded(decision.reason, retry_after_s=decision.retry_after_s, status=429)
        self.outstanding += len(choices)
        self.outstanding_tokens += tokens
        try:
            yield
        finally:
            self.outstanding -= len(choices)
            self.outstanding_tokens -= tokens
            self._left.append(time.monotonic())

    def _leaving_per_s(self) -> float:
        """Requests that ended per second, over the last few; 0 when unknown."""
        span_s = time.monotonic() - self._left[0] if self._left else 0.0
        return len(self._left) / span_s if span_s > 0 else 0.0

    @contextlib.contextmanager
    def writer(self) -> Iterator[asyncio.Task[Any]]:
        """Marks the current task as one that writes to a client; see `wrote`."""
        task = asyncio.current_task()
        assert task is not None
        try:
            yield task
        finally:
            self._writing.pop(task, None)

    async def write(self, task: asyncio.Task[Any], send: Send, data: bytes) -> None:
        """Send a part of a body; the sweeper cancels `task` when the client takes too long to read."""
        self._writing[task] = time.monotonic()
        await send({"type": "http.response.body", "body": data, "more_body": True})
        self._writing.pop(task, None)

    async def sweep(self) -> None:
        """Runs for as long as the service: one clock for all writers, cheaper than a timer a token."""
        while True:
            await asyncio.sleep(min(1.0, self.write_timeout_s / 4))
            limit = time.monotonic() - self.write_timeout_s
            for task in [task for task, since in self._writing.items() if since < limit]:
                task.cancel()


@dataclass(frozen=True)
class Job:
    """A validated request. `id` and `created_s` (Unix time) go into the answer."""

    id: str
    created_s: int
    model: str
    chat: bool
    choices: tuple[ChoiceSpec, ...]
    stream: bool
    include_usage: bool
    running_usage: bool
    start_s: float

    @property
    def object(self) -> str:
        kind = "chat.completion" if self.chat else "text_completion"
        return f"{kind}.chunk" if self.stream and self.chat else kind

    def usage(self, output_tokens: int) -> dict[str, int]:
        """Tokens as OpenAI counts them; one prompt is counted once however many choices it has."""
        prompts = {id(choice.prompt_ids): len(choice.prompt_ids) for choice in self.choices}
        prompt_tokens = sum(prompts.values())
        return {"prompt_tokens": prompt_tokens, "completion_tokens": output_tokens,
                "total_tokens": prompt_tokens + output_tokens}


class Answer(Response):
    """An ASGI response that runs a Job. Nothing is sent before the first token, so that refusals have their status."""

    def __init__(self, job: Job, engine: Engine, tokenizer: Tokenizer, metrics: ServiceMetrics, desk: Desk) -> None:
        super().__init__(status_code=200)
        self._job, self._engine, self._tokenizer = job, engine, tokenizer
        self._metrics, self._desk = metrics, desk

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with self._desk.seat(self._job.choices):
                worker = asyncio.create_task(self._stream(send) if self._job.stream else self._whole(send))
                watcher = asyncio.create_task(_until_gone(receive))
                try:
                    await asyncio.wait({worker, watcher}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    worker.cancel()
                    watcher.cancel()
                    await asyncio.gather(worker, watcher, return_exceptions=True)
                if not worker.cancelled():
                    worker.result()
        except Exception as error:
            await send_error(send, to_http(error))

    def _pieces(self) -> AsyncIterator[Piece]:
        sources = [generate(choice, self._engine, self._tokenizer.detokenizer(), self._metrics, self._job.start_s)
                   for choice in self._job.choices]
        return sources[0] if len(sources) == 1 else merge(sources)

    async def _whole(self, send: Send) -> None:
        job = self._job
        texts: list[list[str]] = [[] for _ in job.choices]
        reasons: list[str | None] = [None] * len(job.choices)
        counts = [0] * len(job.choices)
        async with contextlib.aclosing(self._pieces()) as pieces:  # type: ignore[type-var]
            async for piece in pieces:
                texts[piece.choice].append(piece.text)
                counts[piece.choice] = piece.output_tokens
                reasons[piece.choice] = piece.finish_reason
        choices = [_choice(job, i, "".join(text), reason) for i, (text, reason) in enumerate(zip(texts, reasons, strict=True))]
        await send_json(send, 200, {"id": job.id, "object": job.object, "created": job.created_s, "model": job.model,
                                    "choices": choices, "usage": job.usage(sum(counts))})

    async def _stream(self, send: Send) -> None:
        job, started = self._job, False
        chunks = Chunks(job)
        with self._desk.writer() as task:
            try:
                async with contextlib.aclosing(self._pieces()) as pieces:  # type: ignore[type-var]
                    async for piece in pieces:
                        if not started:
                            started = True
                            await send({"type": "http.response.start", "status": 200, "headers": _SSE_HEADERS})
                        await self._desk.write(task, send, chunks.of(piece))
            except Exception as error:
                if not started:
                    raise
                await self._desk.write(task, send, chunks.failed(to_http(error)))
            await send({"type": "http.response.body", "body": chunks.end(), "more_body": False})


_SSE_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"),
                (b"x-accel-buffering", b"no")]


class Chunks:
    """Writes the events of one stream. Each is one line `data: {...}`; what does not change is written once."""

    def __init__(self, job: Job) -> None:
        self._job = job
        head = {"id": job.id, "object": job.object, "created": job.created_s, "model": job.model}
        self._head = f"data: {json.dumps(head)[:-1]}, "
        self._open = [self._choice_open(i) for i in range(len(job.choices))]
        self._fresh = [True] * len(job.choices)
        self._counts = [0] * len(job.choices)
        self._usage = ', "usage": null' if job.include_usage else ""

    def of(self, piece: Piece) -> bytes:
        """One token's event: its delta carries `content` always, the first of a choice also the role."""
        self._counts[piece.choice] = piece.output_tokens
        content = json.dumps(piece.text)
        if self._job.chat and self._fresh[piece.choice]:
            self._fresh[piece.choice] = False
            content += ', "role": "assistant"'
        reason = "null" if piece.finish_reason is None else json.dumps(piece.finish_reason)
        close = "}" if self._job.chat else ""
        usage = f', "usage": {json.dumps(self._job.usage(sum(self._counts)))}' if self._job.running_usage else self._usage
        return (f'{self._open[piece.choice]}{content}{close}, "logprobs": null, "finish_reason": {reason}}}]{usage}}}\n\n'
                ).encode()

    def failed(self, error: HttpError) -> bytes:
        """The stream broke: an error that strict clients see, in a chunk that naive clients survive."""
        choice = {"index": 0, "finish_reason": "error", "logprobs": None,
                  **({"delta": {"content": ""}} if self._job.chat else {"text": ""})}
        body = {"choices": [choice], **error.body()}
        return f"{self._head}{json.dumps(body)[1:]}\n\n".encode()

    def end(self) -> bytes:
        """The last events: usage where it was asked for, then the end mark."""
        if not self._job.include_usage:
            return b"data: [DONE]\n\n"
        usage = json.dumps(self._job.usage(sum(self._counts)))
        return f'{self._head}"choices": [], "usage": {usage}}}\n\ndata: [DONE]\n\n'.encode()

    def _choice_open(self, index: int) -> str:
        field_name = '"delta": {"content": ' if self._job.chat else '"text": '
        return f'{self._head}"choices": [{{"index": {index}, {field_name}'


def _choice(job: Job, index: int, text: str, reason: str | None) -> dict[str, object]:
    content: dict[str, object] = {"message": {"role": "assistant", "content": text}} if job.chat else {"text": text}
    return {"index": index, **content, "logprobs": None, "finish_reason": reason}


async def merge(sources: Sequence[AsyncIterator[Piece]]) -> AsyncIterator[Piece]:
    """Pieces of all sources as they come. The first failure of one ends all."""
    queue: asyncio.Queue[Piece | Exception | None] = asyncio.Queue(_MERGE_BOUND)

    async def feed(source: AsyncIterator[Piece]) -> None:
        try:
            async with contextlib.aclosing(source) as pieces:  # type: ignore[type-var]
                async for piece in pieces:
                    await queue.put(piece)
            await queue.put(None)
        except Exception as error:
            await queue.put(error)

    tasks = [asyncio.create_task(feed(source)) for source in sources]
    try:
        left = len(tasks)
        while left:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
