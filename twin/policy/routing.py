"""Which instance of a pool serves a request, decided from arrays over the pool's instances (I of them)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from twin.spec.errors import Overloaded, SpecError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class RouterLoad:
    """What a router sees at one moment, each array [I].

    `outstanding_*`: sent to the instance and not finished; tokens count what is still to be computed. `kv_usage` 0..1.
    `predicted_ttft_s`: for this request, where a predictor exists. `matched_tokens`: of this request's prompt, found in
    the instance's prefix cache. `healthy`: instances that may be chosen; None for all.
    """

    outstanding_requests: Ints
    outstanding_tokens: Ints
    kv_usage: Floats
    predicted_ttft_s: Floats | None = None
    matched_tokens: Ints | None = None
    healthy: NDArray[np.bool_] | None = None


class Router:
    """Chooses instances one request at a time. Ties go to the instance chosen least recently, then the lowest index.

    Kinds: `round_robin`; `least_loaded`, fewest outstanding tokens, then requests; `power_of_two`, the less loaded of two
    drawn at random; `predicted_ttft`, the earliest first token; `prefix_affinity`, the fewest tokens to compute before
    this request is done, where tokens matched by a prefix cache count `affinity` times. Same seed, same choices.
    """

    def __init__(self, kind: str, num_instances: int, seed: int | np.random.SeedSequence = 0, *,
                 affinity: float = 1.0) -> None:
        if kind not in ROUTERS:
            raise SpecError(f"unknown router {kind!r}", field="router", expected="one of " + ", ".join(ROUTERS))
        self.kind = kind
        self.affinity = affinity
        self._random = np.random.default_rng(seed)
        self._last_choice: Ints = np.zeros(0, dtype=np.int64)
        self._choices = 0
        self.resize(num_instances)

    @property
    def num_instances(self) -> int:
        return len(self._last_choice)

    def resize(self, num_instances: int) -> None:
        """Follow a pool that grows or shrinks at its end; new instances count as never chosen."""
        if num_instances < 1:
            raise SpecError(f"is {num_instances}", field="num_instances", expected="at least 1")
        kept = self._last_choice[:num_instances]
        self._last_choice = np.concatenate([kept, np.zeros(num_instances - len(kept), dtype=np.int64)])

    def choose(self, load: RouterLoad) -> int:
        """The instance for the next request. Raises Overloaded when none is healthy."""
        if len(load.outstanding_tokens) != self.num_instances:
            raise ValueError(f"load of {len(load.outstanding_tokens)} instances, router of {self.num_instances}")
        able = np.arange(self.num_instances) if load.healthy is None else np.flatnonzero(load.healthy)
        if not len(able):
            raise Overloaded("no healthy instance", retry_after_s=1.0)
        choice = ROUTERS[self.kind](self, load, able) if len(able) > 1 else int(able[0])
        self._choices += 1
        self._last_choice[choice] = self._choices
        return choice

    def _least(self, able: Ints, *keys: Floats | Ints) -> int:
        """The able instance with the smallest keys, compared in order, then the least recently chosen."""
        for key in (*keys, self._last_choice):
            values = key[able]
            able = able[values == values.min()]
            if len(able) == 1:
                break
        return int(able[0])


def _round_robin(router: Router, load: RouterLoad, able: Ints) -> int:
    return router._least(able)


def _least_loaded(router: Router, load: RouterLoad, able: Ints) -> int:
    return router._least(able, load.outstanding_tokens, load.outstanding_requests, load.kv_usage)


def _power_of_two(router: Router, load: RouterLoad, able: Ints) -> int:
    first = int(router._random.integers(len(able)))
    second = (first + 1 + int(router._random.integers(len(able) - 1))) % len(able)
    return _least_loaded(router, load, able[[first, second]])


def _predicted_ttft(router: Router, load: RouterLoad, able: Ints) -> int:
    if load.predicted_ttft_s is None:
        raise ValueError("the predicted_ttft router needs predicted_ttft_s")
    return router._least(able, load.predicted_ttft_s, load.outstanding_tokens)


def _prefix_affinity(router: Router, load: RouterLoad, able: Ints) -> int:
    if load.matched_tokens is None:
        raise ValueError("the prefix_affinity router needs matched_tokens")
    to_compute = load.outstanding_tokens - router.affinity * load.matched_tokens
    return router._least(able, to_compute, load.outstanding_requests, load.kv_usage)


ROUTERS: dict[str, Callable[[Router, RouterLoad, Ints], int]] = {
    "round_robin": _round_robin,
    "least_loaded": _least_loaded,
    "power_of_two": _power_of_two,
    "predicted_ttft": _predicted_ttft,
    "prefix_affinity": _prefix_affinity,
}
