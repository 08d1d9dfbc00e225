"""Whether a service takes a request now or sends it away with a time to come back."""

from __future__ import annotations

from dataclasses import dataclass

from twin.spec.errors import SpecError

MIN_RETRY_S = 1.0   # HTTP's Retry-After counts whole seconds
MAX_RETRY_S = 60.0  # beyond a minute the estimate says nothing any more


@dataclass(frozen=True)
class Decision:
    """`retry_after_s` and `reason` are set when the request is not admitted."""

    admitted: bool
    retry_after_s: float = 0.0
    reason: str = ""


@dataclass(frozen=True)
class Admission:
    """Limits on what was admitted and has not finished; tokens count prompt plus allowed output."""

    max_outstanding_requests: int
    max_outstanding_tokens: int | None = None

    def __post_init__(self) -> None:
        for field in ("max_outstanding_requests", "max_outstanding_tokens"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise SpecError(f"is {value}", field=field, expected="at least 1")

    def decide(self, outstanding_requests: int, outstanding_tokens: int, request_tokens: int, *,
               requests_per_s: float = 0.0, tokens_per_s: float = 0.0) -> Decision:
        """Admit or reject one request of `request_tokens`.

        The measured rates at which requests and tokens finish say when there will be room; 0 for unknown. A request
        larger than the token limit is admitted when no token is outstanding: it could never enter otherwise.
        """
        excess_requests = outstanding_requests + 1 - self.max_outstanding_requests
        if excess_requests > 0:
            return Decision(False, _wait_s(excess_requests, requests_per_s),
                            f"{outstanding_requests} requests are outstanding, the limit is "
                            f"{self.max_outstanding_requests}")
        if self.max_outstanding_tokens is None:
            return Decision(True)
        excess_tokens = min(outstanding_tokens, outstanding_tokens + request_tokens - self.max_outstanding_tokens)
        if excess_tokens > 0:
            return Decision(False, _wait_s(excess_tokens, tokens_per_s),
                            f"{outstanding_tokens} tokens are outstanding, with {request_tokens} more the limit of "
                            f"{self.max_outstanding_tokens} is exceeded")
        return Decision(True)


def _wait_s(excess: float, rate_per_s: float) -> float:
    if rate_per_s <= 0.0:
        return MIN_RETRY_S
    return min(max(excess / rate_per_s, MIN_RETRY_S), MAX_RETRY_S)
