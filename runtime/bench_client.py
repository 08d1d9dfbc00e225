"""One load-test request: a synthetic prompt out, server-sent events in, times and token counts kept.

A token counts when the service says so (`usage` in each chunk, which ours and vLLM send on request), else when a chunk
carries text. Several tokens in one read share its time, as that is when the client had them.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from dataclasses import dataclass, field
from typing import Any, Literal

import aiohttp

from twin.spec.urls import readable

Api = Literal["completions", "chat"]
PromptUnit = Literal["bytes", "words"]
MAX_EVENT_BYTES = 1 << 20
_LETTERS = bytes(97 + i % 26 for i in range(256))
_WORDS = (
    "the", "of", "and", "to", "in", "is", "you", "that", "it", "he", "was", "for", "on", "are", "as", "with", "his", "they",
    "at", "be", "this", "have", "from", "or", "one", "had", "by", "word", "but", "not", "what", "all", "were", "we", "when",
    "your", "can", "said", "there", "use", "an", "each", "which", "she", "do", "how", "their", "if", "will", "up", "other",
    "about", "out", "many", "then", "them", "these", "so", "some", "her", "would", "make", "like", "him", "into", "time",
)


@dataclass
class Outcome:
    """What became of one request; times on the monotonic clock. `kind` says how it failed ("" when it did not)."""

    sent_s: float = 0.0
    token_s: list[float] = field(default_factory=list)
    end_s: float | None = None
    prompt_tokens: int | None = None
    output_tokens: int = 0
    kind: str = ""
    message: str = ""


@dataclass(frozen=True)
class Target:
    """Where and how to ask. `overhead_tokens` is what the chat template adds to a prompt."""

    url: str
    api: Api = "completions"
    model: str = ""
    unit: PromptUnit = "bytes"
    headers: tuple[tuple[str, str], ...] = ()
    timeout_s: float = 600.0
    ignore_eos: bool = True
    temperature: float = 0.0
    seed: int = 0
    prefix_share: float = 0.0
    overhead_tokens: int = 0

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self.api == "chat" else "/v1/completions"

    def body(self, index: int, isl: int, osl: int) -> dict[str, Any]:
        """Request `index`, of `isl` prompt tokens; the same every time. `osl` limits the output."""
        text = prompt_text(self.seed, index, max(1, isl - self.overhead_tokens), self.unit, self.prefix_share)
        ask: dict[str, Any] = {"messages": [{"role": "user", "content": text}]} if self.api == "chat" else {"prompt": text}
        return {"model": self.model, **ask, "max_tokens": osl, "temperature": self.temperature, "stream": True,
                "ignore_eos": self.ignore_eos,
                "stream_options": {"include_usage": True, "continuous_usage_stats": True}}


def prompt_text(seed: int, index: int, tokens: int, unit: PromptUnit, prefix_share: float) -> str:
    """A prompt of `tokens` letters (one token each to a byte-level tokenizer) or common words (about one each to
    others). The first `prefix_share` of it is the same for all requests, the rest for none."""
    shared = int(tokens * prefix_share)
    common, own = random.Random(f"{seed}:prefix"), random.Random(f"{seed}:{index}")  # noqa: S311
    if unit == "bytes":
        return (common.randbytes(shared) + own.randbytes(tokens - shared)).translate(_LETTERS).decode()
    return " ".join(common.choices(_WORDS, k=shared) + own.choices(_WORDS, k=tokens - shared))


async def ask(session: aiohttp.ClientSession, target: Target, index: int, isl: int, osl: int, outcome: Outcome) -> None:
    """Run one request into `outcome`, which is filled as events come, so that a cancelled request keeps what it has."""
    body = json.dumps(target.body(index, isl, osl))
    outcome.sent_s = time.monotonic()
    try:
        async with asyncio.timeout(target.timeout_s):
            async with session.post(target.url + target.path, data=body, allow_redirects=False) as response:
                if response.status != 200:
                    text = (await response.content.read(4096)).decode(errors="replace")
                    outcome.kind, outcome.message = f"http {response.status}", readable(text)
                elif not response.headers.get("Content-Type", "").startswith("text/event-stream"):
                    outcome.kind = "not a stream"
                    outcome.message = readable(response.headers.get("Content-Type", "no content type"))
                else:
                    await _read_stream(response, outcome)
    except TimeoutError:
        outcome.kind, outcome.message = "timeout", f"no end within {target.timeout_s:g} s"
    except aiohttp.ClientError as error:
        outcome.kind, outcome.message = "connection", readable(f"{type(error).__name__}: {error}")
    outcome.end_s = time.monotonic()
    if not outcome.kind and not outcome.token_s:
        outcome.kind, outcome.message = "no tokens", "the stream ended without a token"


async def _read_stream(response: aiohttp.ClientResponse, outcome: Outcome) -> None:
    pending, done = b"", False
    while not done:
        block = await response.content.readany()
        if not block:
            outcome.kind, outcome.message = "cut short", "the stream ended before [DONE]"
            return
        now = time.monotonic()
        *lines, pending = (pending + block).split(b"\n")
        if len(pending) > MAX_EVENT_BYTES:
            outcome.kind, outcome.message = "bad stream", f"an event exceeds {MAX_EVENT_BYTES} bytes"
            return
        for line in lines:
            done = done or _take(line.strip(), now, outcome)
            if outcome.kind:
                return


def _take(line: bytes, now: float, outcome: Outcome) -> bool:
    """One line of the stream; True at its end mark."""
    if not line.startswith(b"data:"):
        return False
    data = line[5:].strip()
    if data == b"[DONE]":
        return True
    try:
        event = json.loads(data)
        if not isinstance(event, dict):
            raise ValueError("not an object")
        if "error" in event:
            outcome.kind, outcome.message = "error event", readable(json.dumps(event["error"]))
            return False
        usage = event.get("usage")
        if isinstance(usage, dict):
            outcome.prompt_tokens = int(usage["prompt_tokens"])
            count = int(usage["completion_tokens"])
        else:
            count = outcome.output_tokens + sum(_has_text(choice) for choice in event["choices"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        outcome.kind, outcome.message = "bad stream", readable(f"{type(error).__name__}: {error}")
        return False
    if event.get("choices"):
        outcome.token_s.extend([now] * (count - len(outcome.token_s)))
    outcome.output_tokens = count
    return False


def _has_text(choice: dict[str, Any]) -> bool:
    return bool((choice.get("delta") or {}).get("content") or choice.get("text"))
