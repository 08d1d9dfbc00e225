"""Where requests can be sent: the DP ranks of every instance, what each has to do, and which one is next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

import numpy as np

from runtime.layout import RankLayout
from runtime.types import InstanceStats
from twin.policy.routing import Router, RouterLoad
from twin.spec.errors import SpecError
from twin.spec.plan import Plan, PoolPlan


@dataclass
class Target:
    """One DP rank. `leader` is its first TP rank; load as the front end counts it, or as the leader last reported."""

    pool: int
    plan: PoolPlan
    instance: int
    dp_rank: int
    tp_ranks: list[int]
    instance_ranks: list[int]
    outstanding_requests: int = 0
    outstanding_tokens: int = 0
    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0
    compiles_after_start: int = 0
    steps: int = 0
    drafted: list[int] = field(default_factory=list)
    stood: list[int] = field(default_factory=list)

    def hear_load(self, load: list[float]) -> None:
        """What its leader says of itself."""
        running, waiting, self.kv_usage, compiled = load
        self.running, self.waiting, self.compiles_after_start = int(running), int(waiting), int(compiled)

    def count_drafts(self, drafted: list[int], stood: list[int]) -> None:
        """Add a step's drafts by place: how many there were and how many stood."""
        self.drafted, self.stood = add_places([self.drafted, drafted]), add_places([self.stood, stood])

    @property
    def leader(self) -> int:
        return self.tp_ranks[0]


def add_places(counts: Sequence[Sequence[int]]) -> list[int]:
    """Sums by place; a shorter list has nothing further on."""
    return [sum(column) for column in zip_longest(*counts, fillvalue=0)]


class Targets:
    """All targets, and the routers that choose among those that take prompts and among those that decode."""

    def __init__(self, plan: Plan, ranks: Sequence[RankLayout], seed: int, origins: Sequence[tuple[int, int]] = ()) -> None:
        """`origins` names every instance by what it was in the plan that the engine began with (see runtime.formation)."""
        if plan.router == "prefix_affinity":
            raise SpecError("the engine's front end does not know what its ranks have cached yet", field="router",
                            expected="round_robin, least_loaded, power_of_two or predicted_ttft")
        places = sorted({(at.pool, at.instance) for at in ranks})
        named = dict(zip(places, origins or places, strict=True))
        self.targets = [Target(named[at.pool, at.instance][0], plan.pools[at.pool], named[at.pool, at.instance][1], at.dp_rank,
                               at.tp_ranks, at.instance_ranks) for at in ranks if at.is_leader]
        self.entries = [t for t in self.targets if t.plan.role != "decode"]
        self.decoders = [t for t in self.targets if t.plan.role == "decode"]
        self._entry_router = Router(plan.router, len(self.entries), seed)
        self._decode_router = Router(plan.router, len(self.decoders), seed) if self.decoders else None
        self._of_leader = {t.leader: t for t in self.targets}
        self._seconds_per_token = 1e-3  # replaced by what is measured; the same for all, so it never decides alone

    def of_leader(self, rank: int) -> Target:
        return self._of_leader[rank]

    def choose_entry(self, prompt_tokens: int) -> Target:
        """Where a new request starts."""
        return self.entries[self._entry_router.choose(self._load(self.entries, prompt_tokens))]

    def choose_decoder(self, prompt_tokens: int) -> Target:
        """Where a prefilled request goes on."""
        assert self._decode_router is not None, "a handover without a decode pool"
        return self.decoders[self._decode_router.choose(self._load(self.decoders, prompt_tokens))]

    def _load(self, targets: list[Target], prompt_tokens: int) -> RouterLoad:
        tokens = np.array([t.outstanding_tokens for t in targets], dtype=np.int64)
        return RouterLoad(np.array([t.outstanding_requests for t in targets], dtype=np.int64), tokens,
                          np.array([t.kv_usage for t in targets]),
                          predicted_ttft_s=(tokens + prompt_tokens) * self._seconds_per_token)

    def instances(self) -> tuple[InstanceStats, ...]:
        """Statistics by instance, in order of rank."""
        groups: dict[tuple[int, int], list[Target]] = {}
        for target in self.targets:
            groups.setdefault((target.pool, target.instance), []).append(target)
        return tuple(InstanceStats(pool, group[0].plan.role, instance, sum(t.running for t in group),
                                   sum(t.waiting for t in group), max(t.kv_usage for t in group), max(t.steps for t in group),
                                   tuple(add_places([t.drafted for t in group])), tuple(add_places([t.stood for t in group])),
                                   sum(t.compiles_after_start for t in group))
                     for (pool, instance), group in groups.items())
