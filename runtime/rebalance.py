"""Deciding on a better placement of experts: the same on every rank, from loads that all have summed.

Legend: L MoE layers, E experts, S slots, R EP ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from twin.policy import placement as policy
from twin.policy.migration import Copy, copies, keep_ranks, migration, should_rebalance
from twin.policy.placement import Placement
from twin.policy.replica_split import split_over_replicas
from twin.spec.plan import PoolPlan

FIRST_BYTES_PER_S = 1e9
"""Speed of a migration before one was seen."""


@dataclass(frozen=True)
class Seen:
    """What the ranks saw in a window, summed over them: tokens by expert, seconds in experts, the copies that went best."""

    load_LE: NDArray[np.float64]
    experts_s: float
    steps: int
    moved_bytes: float
    moving_s: float

    def pack(self) -> NDArray[np.float64]:
        return np.concatenate([self.load_LE.ravel(), [self.experts_s, self.moved_bytes, self.moving_s]])

    def unpack(self, packed: NDArray[np.float64]) -> Seen:
        """The sum that came back, in this one's shape."""
        experts_s, moved_bytes, moving_s = (float(x) for x in packed[-3:])
        return Seen(packed[:-3].reshape(self.load_LE.shape), experts_s, self.steps, moved_bytes, moving_s)


@dataclass(frozen=True)
class Decision:
    """`layers` are the layers to change with their copies, none when it does not pay. Imbalances are the fullest rank over
    the mean, with the window's tokens split over replicas as well as can be, a mean over layers."""

    placement: Placement
    layers: tuple[tuple[int, tuple[Copy, ...]], ...]
    imbalance_before: float
    imbalance_after: float
    gain_s_per_step: float
    cost_s: float


def decide(seen: Seen, now: Placement, pool: PoolPlan, groups: int, copy_bytes: int, ranks: int) -> Decision:
    """Whether and how to move. The fullest rank sets the pace of experts, so a step gains what it has too much."""
    assert pool.eplb is not None
    slots = now.num_slots
    if pool.placement == "eplb_hierarchical":
        wanted = policy.place_hierarchical(seen.load_LE, slots, now.num_ranks, 1, groups)
    else:
        wanted = policy.place_global(seen.load_LE, slots, now.num_ranks)
    plan = migration(now, keep_ranks(now, wanted))
    before, after = (float(policy.max_over_mean(policy.slots_to_ranks(split_over_replicas(seen.load_LE, where), where)).mean())
                     for where in (now, plan.placement))
    gain_s = seen.experts_s / ranks / max(seen.steps, 1) * (before - after)
    speed = seen.moved_bytes / seen.moving_s if seen.moving_s > 0 else FIRST_BYTES_PER_S
    cost_s = plan.num_copies * copy_bytes / speed
    if not plan.num_copies or not should_rebalance(gain_s, pool.eplb.period_steps, cost_s):
        return Decision(now, (), before, before if plan.num_copies else after, gain_s, cost_s)
    layers = tuple((layer, copies(now, layer, changes)) for layer, changes in enumerate(plan.changes) if changes)
    return Decision(plan.placement, layers, before, after, gain_s, cost_s)
