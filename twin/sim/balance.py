"""Experts of one instance over time: popularity changes, online rebalancing (EPLB) sees loads and moves weights.

The decision is the runtime's, from what a window of steps has seen, sampling noise included: a better placement, moved if
what it saves until the next decision exceeds what moving takes (`twin.policy.migration`). Copies travel layer by layer, so
many bytes a step, and slow the exchanges on the links that they cross. What was won fades as popularity goes on.
Legend of shapes: L MoE layers (one where all are alike), E experts, R EP ranks, W GPUs of the instance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from twin.cost.batch import StepBatch
from twin.cost.drift import Drift, Recorded
from twin.cost.model import CostModel
from twin.cost.roofline import bytes_of
from twin.cost.routing import over_time, place, slot_shares
from twin.policy.arrivals import named_stream
from twin.policy.migration import Migration, copies, keep_ranks, migration, should_rebalance
from twin.policy.placement import Placement, max_over_mean, slots_to_ranks
from twin.sim.presence import Presence
from twin.sim.steplog import StepLog
from twin.spec.plan import PoolPlan
from twin.spec.results import Rebalance
from twin.spec.scenario import Scenario

if TYPE_CHECKING:
    from twin.sim.instance import Instance

Floats = NDArray[np.float64]
_STAGES = 4  # in how many parts the placement changes while weights travel
_MADE = 32
_NO_LIMIT = 1 << 62


@dataclass
class Moving:
    """A migration under way since `start_step`. `stages`: (first step with it, placement), the last being the new one."""

    stages: list[tuple[int, Placement]]
    start_step: int
    news: Rebalance


class Experts:
    """What popularity and placement are, for an instance that asks at the beginning of every run of steps."""

    def __init__(self, pool: PoolPlan, base: CostModel, gpus: Sequence[int], drift: Drift | Recorded | None,
                 stream: np.random.Generator, presence: Presence, made: dict[tuple[int, Placement], CostModel]) -> None:
        """`made`: costs of this pool that there are, shared by its instances."""
        assert base.site.popularity_LE is not None and base.site.placement is not None and base.model.moe is not None
        self.pool, self.base, self.drift, self.presence = pool, base, drift, presence
        self._gpus, self._stream = np.asarray(gpus, dtype=np.int64), stream
        self.placement = base.site.placement
        self.rebalances: list[Rebalance] = []
        self.imbalances: list[tuple[float, float]] = []  # (from, fullest rank over the mean), as popularity has it
        self._made = made
        self._moving: Moving | None = None
        self._known: tuple[int, Placement] = (0, self.placement)
        self._costs = base
        self._decided_at = 0
        self._note(0.0, 0)

    def begin(self, now_s: float, log: StepLog, batch: StepBatch) -> tuple[CostModel, int, float]:
        """Steps begin: the costs they have, how many they may be, and before when the last of them must begin."""
        step = len(log)
        self._advance(now_s, step)
        if self.pool.eplb is not None and step % self.pool.eplb.period_steps == 0 and step > self._decided_at:
            self._decided_at = step
            if self._moving is None:
                self._decide(now_s, log, batch)
        epoch = 0 if self.drift is None else self.drift.epoch(now_s)
        if epoch != self._known[0] or self.placement is not self._known[1]:
            self._known = (epoch, self.placement)
            self._costs = self._relaid(*self._known)
            self._note(now_s, epoch)
        return self._costs, self._steps_left(step), float("inf") if self.drift is None else self.drift.next_s(epoch)

    def _relaid(self, epoch: int, placement: Placement) -> CostModel:
        """Costs of this popularity and placement; instances that are alike share them."""
        if len(self._made) > _MADE:
            self._made.clear()
        if (epoch, placement) not in self._made:
            self._made[epoch, placement] = self.base.relaid(self.popularity(epoch), placement)
        return self._made[epoch, placement]

    def popularity(self, epoch: int) -> Floats:
        """Shares of experts [L, E]."""
        assert self.base.site.popularity_LE is not None
        return self.base.site.popularity_LE if self.drift is None else self.drift.at(epoch)

    def _note(self, now_s: float, epoch: int) -> None:
        self.imbalances.append((now_s, self._imbalance(self.popularity(epoch), self.placement)))

    def _imbalance(self, load_LE: Floats, placement: Placement) -> float:
        """The fullest rank's load over the mean, replicas used as the engine uses them: a mean over layers."""
        loads = slot_shares(load_LE, placement, split=self.base.site.engine.splits_replicas)
        return float(max_over_mean(slots_to_ranks(loads, placement)).mean())

    def _steps_left(self, step: int) -> int:
        """Steps until something is to be done between two of them."""
        ahead = [] if self._moving is None else [first - step for first, _ in self._moving.stages]
        if self.pool.eplb is not None:
            ahead.append(self.pool.eplb.period_steps - step % self.pool.eplb.period_steps)
        return min(ahead, default=_NO_LIMIT)

    def _advance(self, now_s: float, step: int) -> None:
        """Go on with what moves."""
        moving = self._moving
        while moving is not None and moving.stages and moving.stages[0][0] <= step:
            self.placement = moving.stages.pop(0)[1]
            if not moving.stages:
                self.rebalances.append(moving.news.model_copy(update={"end_s": now_s, "steps": step - moving.start_step}))
                self.presence.moves(None)
                self._moving = moving = None

    # The decision

    def _decide(self, now_s: float, log: StepLog, batch: StepBatch) -> None:
        load_LE = self._seen(log)
        if not load_LE.any():
            return
        assert self.pool.eplb is not None
        wanted = self._wanted(load_LE)
        plan = migration(self.placement, keep_ranks(self.placement, wanted))
        before, after = (self._imbalance(load_LE, one) for one in (self.placement, plan.placement))
        parts = self._costs.step(batch).parts_s
        gain_s = (parts.get("moe/experts", 0.0) + parts.get("moe/permute", 0.0)) * (before - after) / before
        link_bytes = self._link_bytes(plan)
        cost_s = float((link_bytes / self.base.network.capacity).max())
        pays = plan.num_copies > 0 and should_rebalance(gain_s, self.pool.eplb.period_steps, cost_s)
        news = Rebalance(
            start_s=now_s, end_s=now_s, steps=0, layers=0, copies=0, moved_bytes=0.0, imbalance_before=before,
            imbalance_after=before if plan.num_copies and not pays else after, gain_s_per_step=gain_s, cost_s=cost_s, solve_s=0.0)
        if not pays:
            self.rebalances.append(news)
            return
        changed = [layer for layer, changes in enumerate(plan.changes) if changes]
        number = plan.num_copies * self._alike
        self._moving = self._stages(plan, changed, len(log), news.model_copy(update={
            "layers": len(changed) * self._alike, "copies": number, "moved_bytes": number * self._copy_bytes}))
        steps = self._moving.stages[-1][0] - len(log)
        self.presence.moves(link_bytes / (steps * self._costs.step_s(batch)))

    def _seen(self, log: StepLog) -> Floats:
        """Tokens that each expert got in the window's steps: what was expected of them, and chance [L, E]."""
        assert self.pool.eplb is not None and self.base.model.moe is not None
        last = slice(-self.pool.eplb.window_steps, None)
        tokens = (log.column("decode_seqs") * (1 + self.pool.mtp_draft_tokens) + log.column("prefill_tokens"))[last]
        began_s = (log.column("end_s") - log.column("step_s"))[last]
        epochs = np.zeros(len(tokens), dtype=np.int64) if self.drift is None else (began_s / self.drift.tick_s).astype(np.int64)
        found, which = np.unique(epochs, return_inverse=True)
        by_epoch = np.bincount(which, weights=tokens)
        mean_LE = sum(total * self.popularity(int(epoch)) for epoch, total in zip(found, by_epoch, strict=True))
        return self._stream.poisson(np.asarray(mean_LE) * self.base.model.moe.top_k).astype(float)

    def _wanted(self, load_LE: Floats) -> Placement:
        pool = self.pool if self.pool.placement != "linear" else self.pool.model_copy(update={"placement": "eplb_global"})
        return place(self.base.model, pool, load_LE, len(np.unique(self.base.network.domain_of[self._gpus])))

    # Moving

    @property
    def _alike(self) -> int:
        """MoE layers that a row of popularity stands for."""
        return self.base.model.moe_layers // self.placement.num_layers

    @property
    def _copy_bytes(self) -> float:
        """An expert's weights in one layer, over all ranks that share it."""
        return self.base.model.expert_params * bytes_of(self.base.plan.precision.experts)

    def _stages(self, plan: Migration, changed: list[int], step: int, news: Rebalance) -> Moving:
        """Layers go one after the other, each in whole steps; the placement follows in a few parts."""
        assert self.pool.eplb is not None
        budget, slots_LS, start_step = self.pool.eplb.budget_bytes, np.array(self.placement.slot_to_logical), step
        stages: list[tuple[int, Placement]] = []
        for part in np.array_split(np.array(changed), min(_STAGES, len(changed))):
            for layer in part.tolist():
                slots_LS[layer] = plan.placement.slot_to_logical[layer]
                step += self._alike * max(1, int(-(-len(plan.changes[layer]) * self._copy_bytes // budget)))
            stages.append((step, Placement(slots_LS.copy(), self.placement.num_ranks)))
        return Moving(stages, start_step, news)

    def _link_bytes(self, plan: Migration) -> Floats:
        """Bytes of the whole migration on each link of the network."""
        etp, world = self.pool.expert_tp, len(self._gpus)
        traffic_WW = np.zeros((world, world))
        for layer, changes in enumerate(plan.changes):
            for copy in copies(self.placement, layer, changes):
                if copy.source != copy.target:
                    for part in range(etp):
                        traffic_WW[copy.source * etp + part, copy.target * etp + part] += self._copy_bytes / etp
        return self.base.network.link_bytes(traffic_WW * self._alike, self._gpus)


def follow_experts(scenario: Scenario, instances: Sequence[Instance]) -> None:
    """Give every instance whose experts drift or move the process that says how."""
    priced = [i.costs for i in instances if isinstance(i.costs, CostModel) and i.costs.site.popularity_LE is not None]
    drift = None
    if priced:
        assert priced[0].site.popularity_LE is not None
        drift = over_time(scenario.model, scenario.routing, priced[0].site.popularity_LE, named_stream(scenario.seed, "drift"))
    made: dict[int, dict[tuple[int, Placement], CostModel]] = {}
    for instance in instances:
        costs, pool = instance.costs, instance.pool
        if not isinstance(costs, CostModel) or costs.site.placement is None or pool.ep < 2 or not (drift or pool.eplb):
            continue
        presence = instance.presence or Presence(costs, instance.gpus, lambda _: None, instance.retime)
        if pool.eplb is not None:
            instance.presence = presence
        instance.experts = Experts(pool, costs, instance.gpus, drift, named_stream(scenario.seed, f"eplb/{instance.number}"),
                                   presence, made.setdefault(instance.pool_index, {}))
