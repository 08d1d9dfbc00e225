"""The plan as an OpenAI-compatible service: FastAPI routes over the engine's front end.

`serve(frontend_factory, ...)` runs until SIGTERM or SIGINT, then drains. `create_app` is the same as an ASGI app.
Loopback only unless told; with EPTWIN_API_KEY set, every route but /livez wants the key.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import secrets
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from runtime.gateway_answer import Answer, Desk, Job
from runtime.gateway_http import Guard, HttpError, log, to_http
from runtime.gateway_protocol import TimedProtocol
from runtime.gateway_schema import MAX_CHOICES, ChatRequest, CompletionRequest, ErrorBody, Sampling
from runtime.gateway_text import ChoiceSpec, Engine
from runtime.metrics import CONTENT_TYPE, ServiceMetrics
from runtime.tokenizer import Tokenizer, load_tokenizer
from runtime.types import FrontendStats
from twin.policy.admission import Admission
from twin.spec.errors import EptwinError
from twin.spec.urls import API_KEY_VARIABLE

_THREAD_CHARS = 16_384
"""Prompts longer than this are tokenised off the event loop."""


@dataclass(frozen=True)
class GatewaySettings:
    """Limits of one service. `max_context` is prompt plus output in tokens (None: as much as the engine takes);
    `default_max_tokens` is the output limit of a chat request that states none; `max_outstanding` counts sequences in
    flight (running or waiting), `max_outstanding_tokens` their prompts plus allowed outputs. A service whose engine
    failed answers 503 for `failed_s`, then ends."""

    model_name: str
    max_context: int | None = None
    api_key: str | None = field(default=None, repr=False)
    max_outstanding: int = 1024
    max_outstanding_tokens: int | None = None
    default_max_tokens: int = 1024
    max_body_bytes: int = 1 << 20
    max_header_bytes: int = 32 << 10
    body_timeout_s: float = 30.0
    write_timeout_s: float = 30.0
    idle_timeout_s: float = 30.0
    drain_s: float = 10.0
    failed_s: float = 2.0


def serve(frontend_factory: Callable[[], Engine], *, settings: GatewaySettings, vocab: int,
          tokenizer_folder: Path | None = None, host: str = "127.0.0.1", port: int = 8000,
          on_start: Callable[[int], None] | None = None) -> None:
    """Serve until SIGTERM or SIGINT: then new requests are refused, running ones have `settings.drain_s` to end.

    The factory is called, and the engine started and stopped, on the server's event loop. The key comes from
    EPTWIN_API_KEY unless the settings have one. `on_start` hears the bound port (`port` 0 takes a free one). Raises
    SpecError for a bad tokenizer, OSError when the address is taken, what the engine raises on start, and RankFailed
    when it fails later.
    """
    if settings.api_key is None:
        settings = replace(settings, api_key=os.environ.get(API_KEY_VARIABLE, "").strip() or None)
    app = create_app(frontend_factory, load_tokenizer(tokenizer_folder, vocab), settings)
    with contextlib.closing(listen(host, port)) as listener:
        if settings.api_key is None and not ipaddress.ip_address(listener.getsockname()[0]).is_loopback:
            log.warning("serving other machines without a key; set %s to ask for one", API_KEY_VARIABLE)
        GatewayServer(app, settings, on_start=on_start).run(sockets=[listener])
    if app.state.engine.failure is not None:
        raise app.state.engine.failure.with_traceback(None)


def listen(host: str, port: int) -> socket.socket:
    """A bound socket, before the engine takes its time to start. Raises OSError when the address is taken or unknown."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    # With the protocol stated: asyncio sets TCP_NODELAY only then, and without it first tokens wait 40 ms for an ACK.
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    return listener


class GatewayServer(uvicorn.Server):
    """uvicorn with our timeouts; run it with sockets from `listen`. SIGTERM drains and ends `run` normally; SIGINT
    drains and ends it with KeyboardInterrupt; a second one does not wait."""

    def __init__(self, app: FastAPI, settings: GatewaySettings, *, on_start: Callable[[int], None] | None = None) -> None:
        self._gateway, self._on_start, self._failed_s = app, on_start, settings.failed_s
        self._failed_at: float | None = None
        super().__init__(uvicorn.Config(
            app, http=TimedProtocol, ws="none", lifespan="on", log_level="warning", access_log=False,
            server_header=False, timeout_keep_alive=int(settings.idle_timeout_s), backlog=4096,
            timeout_graceful_shutdown=max(1, int(settings.drain_s)), h11_max_incomplete_event_size=2 * settings.max_header_bytes))

    async def startup(self, sockets: list[Any] | None = None) -> None:
        await _start_engine(self._gateway)
        await super().startup(sockets)
        if self._on_start is not None and self.started and sockets:
            self._on_start(sockets[0].getsockname()[1])

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second; True ends the service."""
        if self._gateway.state.engine.failure is not None:
            self._failed_at = self._failed_at or time.monotonic()
            self.should_exit = self.should_exit or time.monotonic() - self._failed_at > self._failed_s
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._gateway.state.desk.draining = True
        if sig == signal.SIGTERM:  # uvicorn would raise it again after shutting down, and the process would die of it
            self.force_exit, self.should_exit = self.should_exit, True
        else:
            super().handle_exit(sig, frame)


def create_app(frontend_factory: Callable[[], Engine], tokenizer: Tokenizer, settings: GatewaySettings) -> FastAPI:
    """The ASGI app. `app.state` has `engine` (once started), `desk` and `metrics`."""
    app = FastAPI(title="eptwin", description="An OpenAI-compatible service of one plan.", docs_url=None, redoc_url=None,
                  lifespan=_lifespan)
    desk = Desk(Admission(settings.max_outstanding, settings.max_outstanding_tokens), settings.write_timeout_s)
    metrics = ServiceMetrics(settings.model_name, lambda: _stats(app))
    app.state.desk, app.state.metrics, app.state.engine, app.state.factory = desk, metrics, None, frontend_factory
    app.add_middleware(Guard, api_key=settings.api_key, metrics=metrics, max_body_bytes=settings.max_body_bytes,
                       max_header_bytes=settings.max_header_bytes, body_timeout_s=settings.body_timeout_s)
    for kind in (RequestValidationError, HTTPException, HttpError, EptwinError, Exception):
        app.add_exception_handler(kind, _error_response)
    _add_probes(app)
    _add_models(app, settings)
    _add_completions(app, _Counter(settings, tokenizer, app))
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


def _stats(app: FastAPI) -> FrontendStats:
    return FrontendStats() if app.state.engine is None else app.state.engine.stats()


def _max_context(app: FastAPI, settings: GatewaySettings) -> int:
    own: int = app.state.engine.max_context
    return own if settings.max_context is None else min(own, settings.max_context)


async def _start_engine(app: FastAPI) -> None:
    if app.state.engine is None:
        engine = app.state.factory()
        await engine.start()
        app.state.engine = engine


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    desk: Desk = app.state.desk
    await _start_engine(app)
    sweeper = asyncio.create_task(desk.sweep())
    desk.ready = True
    try:
        yield
    finally:
        desk.ready = False
        sweeper.cancel()
        await app.state.engine.stop()


class _Counter:
    """Where requests are turned into jobs: everything is checked here, before the engine hears of it."""

    def __init__(self, settings: GatewaySettings, tokenizer: Tokenizer, app: FastAPI) -> None:
        self._settings, self._tokenizer, self._app = settings, tokenizer, app

    async def chat(self, body: ChatRequest) -> Answer:
        start_s = time.monotonic()
        self._check_model(body)
        turns = [(message.role, message.text) for message in body.messages]
        size = sum(len(text) for _, text in turns)
        prompt = await _maybe_threaded(size, lambda: self._tokenizer.encode_chat(turns))
        return self._answer(body, [prompt], start_s, chat=True, param="messages", default=self._settings.default_max_tokens)

    async def complete(self, body: CompletionRequest) -> Answer:
        start_s = time.monotonic()
        self._check_model(body)
        prompts = [await self._prompt(prompt) for prompt in body.prompts]
        return self._answer(body, prompts, start_s, chat=False, param="prompt", default=16)

    async def _prompt(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            return await _maybe_threaded(len(prompt), lambda: self._tokenizer.encode(prompt))
        if max(prompt) >= self._tokenizer.vocab:
            raise HttpError(400, f"token ids must be below {self._tokenizer.vocab}", param="prompt")
        return prompt

    def _check_model(self, body: Sampling) -> None:
        if body.model not in (None, "", self._settings.model_name):
            raise HttpError(404, "no such model here; see /v1/models, or leave model empty", param="model",
                            code="model_not_found")

    def _answer(self, body: Sampling, prompts: Sequence[list[int]], start_s: float, *, chat: bool, param: str,
                default: int) -> Answer:
        if len(prompts) * (body.n or 1) > MAX_CHOICES:
            raise HttpError(400, f"prompts x n must be at most {MAX_CHOICES}", param="n")
        choices: list[ChoiceSpec] = []
        for prompt in prompts:
            limit = self._output_limit(body, len(prompt), param, default)
            for i in range(body.n or 1):
                params = body.sampling_params(limit, self._tokenizer.eos_ids)
                if params.seed is not None and i:
                    params = replace(params, seed=(params.seed + i) % 2**63)
                choices.append(ChoiceSpec(len(choices), prompt, params, body.stops))
        options = body.stream_options
        job = Job(id=("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12), created_s=int(time.time()),
                  model=self._settings.model_name, chat=chat, choices=tuple(choices), stream=bool(body.stream),
                  include_usage=bool(options and options.include_usage),
                  running_usage=bool(options and options.continuous_usage_stats), start_s=start_s)
        state = self._app.state
        return Answer(job, state.engine, self._tokenizer, state.metrics, state.desk)

    def _output_limit(self, body: Sampling, prompt_tokens: int, param: str, default: int) -> int:
        """Output tokens this request may have. Raises HttpError when prompt and output exceed the context."""
        context = _max_context(self._app, self._settings)
        room = context - prompt_tokens
        if prompt_tokens < 1:
            raise HttpError(400, "the prompt is empty", param=param)
        if room < (body.output_limit or 1):
            raise HttpError(400, f"prompt ({prompt_tokens} tokens) and output ({body.output_limit or 1}) exceed the "
                                 f"context of {context}", param=param, code="context_length_exceeded")
        return body.output_limit or min(default, room)


async def _maybe_threaded(chars: int, encode: Callable[[], list[int]]) -> list[int]:
    return encode() if chars <= _THREAD_CHARS else await asyncio.to_thread(encode)


_ERRORS = {400: "bad request", 401: "missing or wrong key", 408: "body too slow", 413: "body too large",
           415: "compressed body", 431: "headers too large", 500: "internal error"}


def _responses(*more: int) -> dict[int | str, dict[str, Any]]:
    """Every answer that a route may give besides 200, for the OpenAPI document."""
    texts = {**_ERRORS, 404: "unknown model", 429: "overloaded; see Retry-After", 503: "not ready; see Retry-After"}
    chosen = [*_ERRORS, *more]
    return {code: {"model": ErrorBody, "description": texts[code]} for code in sorted(chosen)}


_COMPLETION = {
    "type": "object", "required": ["id", "object", "created", "model", "choices", "usage"],
    "properties": {"choices": {"type": "array", "items": {"type": "object", "required": ["index", "finish_reason"]}}}}


def _add_completions(app: FastAPI, counter: _Counter) -> None:
    answers = _responses(404, 429, 503)
    answers[200] = {"description": "a completion, or with `stream` its chunks as server-sent events",
                    "content": {"application/json": {"schema": _COMPLETION},
                                "text/event-stream": {"schema": {"type": "object", "required": ["data"]}}}}

    @app.post("/v1/chat/completions", response_class=Response, responses=answers)
    async def chat_completions(body: ChatRequest) -> Response:
        return await counter.chat(body)

    @app.post("/v1/completions", response_class=Response, responses=answers)
    async def completions(body: CompletionRequest) -> Response:
        return await counter.complete(body)


def _add_models(app: FastAPI, settings: GatewaySettings) -> None:
    created_s = int(time.time())

    @app.get("/v1/models", responses=_responses())
    async def models() -> dict[str, Any]:
        card = {"id": settings.model_name, "object": "model", "created": created_s, "owned_by": "eptwin",
                "max_model_len": _max_context(app, settings)}
        return {"object": "list", "data": [card]}


def _add_probes(app: FastAPI) -> None:
    desk: Desk = app.state.desk

    def ready() -> dict[str, str]:
        if app.state.engine.failure is not None:
            raise HttpError(503, "the engine has failed", code="engine_failed", retry_after_s=5.0)
        if app.state.engine.stats().recovering:
            raise HttpError(503, "a rank was lost; the others re-form", code="recovering", retry_after_s=2.0)
        if desk.draining or not desk.ready:
            raise HttpError(503, "draining" if desk.draining else "not ready", retry_after_s=5.0)
        return {"status": "ok"}

    @app.get("/livez", responses=_responses())
    async def livez() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz", responses=_responses(503))
    async def readyz() -> dict[str, str]:
        return ready()

    @app.get("/health", responses=_responses(503))
    async def health() -> dict[str, str]:
        return ready()

    @app.get("/load", responses=_responses())
    async def load() -> dict[str, int]:
        return {"server_load": desk.outstanding}

    @app.get("/metrics", response_class=PlainTextResponse, responses=_responses())
    async def prometheus() -> Response:
        return Response(app.state.metrics.render(), media_type=CONTENT_TYPE)


def _error_response(request: Request, error: Exception) -> Response:
    """Any exception as OpenAI's error object. What the client sent is never repeated."""
    if isinstance(error, RequestValidationError):
        error = _validation_error(error)
    elif isinstance(error, HTTPException):
        text = {404: "no such route", 405: "method not allowed here"}.get(error.status_code, "the request cannot be read")
        error = HttpError(error.status_code, text)
    found = to_http(error)
    headers = {name.decode(): value.decode() for name, value in found.headers()}
    return JSONResponse(found.body(), status_code=found.status, headers=headers)


def _validation_error(error: RequestValidationError) -> HttpError:
    first = error.errors()[0]
    names = [str(part)[:40] for part in first.get("loc", ()) if part != "body"]
    where = ".".join(names[:4]).encode("ascii", "backslashreplace").decode()[:80]
    text = str(first.get("msg", "invalid"))[:100].encode("ascii", "replace").decode()
    return HttpError(400, f"{where}: {text}" if where else text, param=where or None)


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's document, less the 422 that it adds to every route with a body: our validation errors are 400."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version="1", description=app.description, routes=app.routes)
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        for unused in ("HTTPValidationError", "ValidationError"):
            document["components"]["schemas"].pop(unused, None)
        app.openapi_schema = document
    return app.openapi_schema
