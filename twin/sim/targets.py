"""The DP ranks that a router may choose between, and what it knows of their load."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from twin.policy.routing import Router, RouterLoad
from twin.sim.instance import Instance


@dataclass(frozen=True)
class Site:
    """One rank of one instance."""

    instance: Instance
    rank: int


class Targets:
    """All ranks of the pools of one role, routed as equals. Load counts what was sent there and has not ended."""

    def __init__(self, instances: Sequence[Instance], kind: str, seed: np.random.SeedSequence,
                 prefill_token_s: Sequence[float]) -> None:
        """`prefill_token_s`: seconds a prompt token takes, by instance; it serves to predict a first token."""
        self.instances = tuple(instances)
        self.sites = tuple(Site(instance, rank) for instance in instances for rank in range(instance.pool.dp))
        self.router = Router(kind, len(self.sites), seed)
        self.requests: NDArray[np.int64] = np.zeros(len(self.sites), dtype=np.int64)
        self.prompt_tokens: NDArray[np.int64] = np.zeros(len(self.sites), dtype=np.int64)
        self.output_tokens: NDArray[np.int64] = np.zeros(len(self.sites), dtype=np.int64)
        self._token_s = np.repeat(np.asarray(prefill_token_s, dtype=float), [i.pool.dp for i in instances])
        starts = np.cumsum([0, *[instance.pool.dp for instance in instances]])
        self._first = {instance.number: int(start) for instance, start in zip(instances, starts, strict=False)}

    def choose(self, prompt_tokens: int, output_tokens: int, cached_tokens: int = 0) -> Site:
        """The site for a request of which so many tokens are still to be computed; books them there."""
        load = RouterLoad(
            self.requests, self.prompt_tokens + self.output_tokens,
            np.concatenate([instance.kv_usage() for instance in self.instances]),
            predicted_ttft_s=(self.prompt_tokens + prompt_tokens) * self._token_s,
            matched_tokens=np.full(len(self.sites), cached_tokens))
        index = self.router.choose(load)
        self._book(index, 1, prompt_tokens, output_tokens)
        return self.sites[index]

    def prompt_done(self, instance: Instance, rank: int, tokens: int) -> None:
        self._book(self._first[instance.number] + rank, 0, -tokens, 0)

    def left(self, instance: Instance, rank: int, output_tokens: int) -> None:
        """A request whose prompt is done has left the site."""
        self._book(self._first[instance.number] + rank, -1, 0, -output_tokens)

    def _book(self, index: int, requests: int, prompt_tokens: int, output_tokens: int) -> None:
        self.requests[index] += requests
        self.prompt_tokens[index] += prompt_tokens
        self.output_tokens[index] += output_tokens
