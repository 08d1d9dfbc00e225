"""What stands between the socket and the routes: errors in OpenAI's shape, and a guard that every request passes.

The guard is plain ASGI (a wrapper that buffers or copies responses costs a third of the streaming rate) and checks in
order of cost: the key, the size of the headers, the coding and the size of the body, the time the body takes.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import math
from collections.abc import Iterable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from runtime.metrics import ServiceMetrics
from twin.spec.errors import EptwinError, Overloaded, SpecError

log = logging.getLogger("eptwin.gateway")
_TYPES = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error",
          405: "invalid_request_error", 408: "timeout_error", 413: "invalid_request_error",
          415: "invalid_request_error", 429: "rate_limit_error", 431: "invalid_request_error", 500: "server_error",
          503: "service_unavailable_error"}
PUBLIC_PATHS = frozenset({"/livez"})
"""All that answers without the key."""


class HttpError(Exception):
    """An answer that is not 2xx. `message` is ours alone: it never holds what the client sent."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None,
                 retry_after_s: float | None = None) -> None:
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after_s = retry_after_s
        super().__init__(message)

    def body(self) -> dict[str, object]:
        """OpenAI's error object."""
        return {"error": {"message": self.message[:500], "type": _TYPES.get(self.status, "invalid_request_error"),
                          "param": self.param, "code": self.code}}

    def headers(self) -> list[tuple[bytes, bytes]]:
        found = [(b"content-type", b"application/json")]
        if self.retry_after_s is not None:
            found.append((b"retry-after", str(max(1, math.ceil(self.retry_after_s))).encode()))
        if self.status == 401:
            found.append((b"www-authenticate", b"Bearer"))
        return found


def to_http(error: Exception) -> HttpError:
    """The answer to an exception. What is not expected is a bug: it is logged, and the client learns nothing of it."""
    if isinstance(error, HttpError):
        return error
    if isinstance(error, Overloaded):
        return HttpError(429 if error.status == 429 else 503, "the service is overloaded", code="overloaded",
                         retry_after_s=error.retry_after_s)
    if isinstance(error, SpecError):
        field = next((p.field for p in error.problems if p.field), None)
        return HttpError(400, "the engine refuses the request's parameters", param=field)
    if isinstance(error, EptwinError):
        return HttpError(503, "the engine could not complete the request", code="engine_failed", retry_after_s=5.0)
    log.error("unexpected error", exc_info=error)
    return HttpError(500, "internal error")


async def send_json(send: Send, status: int, body: object, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
    """A whole JSON response."""
    data = json.dumps(body).encode()
    headers = list(headers) or [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status,
                "headers": [*headers, (b"content-length", str(len(data)).encode())]})
    await send({"type": "http.response.body", "body": data})


async def send_error(send: Send, error: HttpError) -> None:
    await send_json(send, error.status, error.body(), error.headers())


class Guard:
    """The outermost layer. `api_key` None lets everybody in. Bodies are read whole, at most `max_body_bytes` within
    `body_timeout_s`, before a route sees the request; routes still hear of the client's disconnection."""

    def __init__(self, app: ASGIApp, *, api_key: str | None, metrics: ServiceMetrics, max_body_bytes: int,
                 max_header_bytes: int, body_timeout_s: float) -> None:
        self._app, self._metrics = app, metrics
        self._key = None if api_key is None else api_key.encode()
        self._max_body_bytes, self._max_header_bytes = max_body_bytes, max_header_bytes
        self._body_timeout_s = body_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        started = False

        async def counted_send(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                self._metrics.responses[message["status"] // 100].inc()
            await send(message)

        try:
            self._check(scope)
            inner = await self._read_body(scope, receive)
            if inner is not None:
                await self._app(scope, inner, counted_send)
        except Exception as error:
            answer = to_http(error)
            if started:
                raise
            await send_error(counted_send, answer)

    def _check(self, scope: Scope) -> None:
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        if self._key is not None and scope["path"] not in PUBLIC_PATHS and not self._authorised(headers):
            raise HttpError(401, "missing or wrong API key; send it as `Authorization: Bearer KEY`", code="invalid_api_key")
        if sum(len(name) + len(value) for name, value in headers) > self._max_header_bytes:
            raise HttpError(431, f"headers exceed {self._max_header_bytes} bytes")
        for name, value in headers:
            if name == b"content-encoding" and value.strip().lower() not in (b"", b"identity"):
                raise HttpError(415, "compressed request bodies are not accepted")
            if name == b"content-length" and (not value.isdigit() or int(value) > self._max_body_bytes):
                raise HttpError(413, f"body exceeds {self._max_body_bytes} bytes")

    def _authorised(self, headers: list[tuple[bytes, bytes]]) -> bool:
        given = [value for name, value in headers if name == b"authorization"]
        if len(given) != 1 or self._key is None:
            return False
        scheme, _, rest = given[0].partition(b" ")
        token = rest.strip() if scheme.lower() == b"bearer" else given[0].strip()
        return hmac.compare_digest(token, self._key)

    async def _read_body(self, scope: Scope, receive: Receive) -> Receive | None:
        """A `receive` that gives the whole body, then the rest of the connection; None when the client has gone."""
        if scope["method"] in ("GET", "HEAD"):
            return receive
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self._body_timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > self._max_body_bytes:
                        raise HttpError(413, f"body exceeds {self._max_body_bytes} bytes")
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            raise HttpError(408, f"the body took longer than {self._body_timeout_s:g} s") from None
        whole: list[Message] = [{"type": "http.request", "body": b"".join(parts), "more_body": False}]

        async def replay() -> Message:
            return whole.pop() if whole else await receive()

        return replay
