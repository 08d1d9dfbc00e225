"""What passes between a client of the engine and its front end. No torch here, so that a gateway starts fast."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Literal, Protocol

from twin.spec.errors import Problem, SpecError

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class SamplingParams:
    """How output tokens are drawn. `temperature` 0 is greedy. `top_k` 0, `top_p` 1 and `min_p` 0 switch a filter off.

    `seed` None draws from the engine's seed and the request id. Generation stops before `max_tokens` at a token of
    `stop_token_ids`, unless `ignore_eos`; the stop token itself is part of the output. Raises SpecError when a value is
    out of range.
    """

    max_tokens: int = 16
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        checks = (
            ("max_tokens", 1 <= self.max_tokens <= 1 << 28, "1 .. 2^28"),
            ("temperature", math.isfinite(self.temperature) and 0 <= self.temperature <= 100, "0 .. 100"),
            ("top_p", math.isfinite(self.top_p) and 0 < self.top_p <= 1, "0 < top_p <= 1"),
            ("top_k", self.top_k >= 0, "at least 0 (0: off)"),
            ("min_p", math.isfinite(self.min_p) and 0 <= self.min_p <= 1, "0 .. 1"),
            ("seed", self.seed is None or -(2**63) <= self.seed < 2**64, "a 64-bit integer"),
            ("stop_token_ids", len(self.stop_token_ids) <= 64, "at most 64 tokens"),
        )
        problems = [Problem(f"is {str(getattr(self, name))[:40]}", field=name, expected=expected)
                    for name, good, expected in checks if not good]
        if problems:
            raise SpecError(problems)


@dataclass(frozen=True)
class TokenEvent:
    """One output token. `index` counts from 0; `finish_reason` is set on the last event of a request.

    `time` is the front end's monotonic clock when the token arrived. A request that ends without a further token
    (cancelled, error) ends with `token_id` -1.
    """

    token_id: int
    index: int
    finish_reason: FinishReason | None
    time: float


@dataclass(frozen=True)
class InstanceStats:
    """One instance, summed over its DP ranks. `kv_usage` is the used fraction of the fullest DP rank's blocks; `drafted` and
    `stood` count speculated tokens by place, and those that were right; `compiles_after_start` counts kernels that requests
    waited for."""

    pool: int
    role: str
    instance: int
    running: int
    waiting: int
    kv_usage: float
    steps: int
    drafted: tuple[int, ...] = ()
    stood: tuple[int, ...] = ()
    compiles_after_start: int = 0


@dataclass(frozen=True)
class FrontendStats:
    """The engine now. `running` and `waiting` count requests over all instances. While `recovering` it takes no requests;
    `recoveries` counts the times that it went on without a rank."""

    running: int = 0
    waiting: int = 0
    steps: int = 0
    submitted: int = 0
    finished: int = 0
    kv_transfer_bytes: int = 0
    instances: tuple[InstanceStats, ...] = field(default_factory=tuple)
    recovering: bool = False
    recoveries: int = 0


class TokenStream(Protocol):
    """What `Frontend.submit` returns: an async iterator that knows its request. `aclose` cancels what is not done."""

    request_id: int

    def __aiter__(self) -> AsyncIterator[TokenEvent]: ...
    async def __anext__(self) -> TokenEvent: ...
    async def aclose(self) -> None: ...
