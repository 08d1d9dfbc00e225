"""The simulated service: admission, routers, instances and KV transfers, wired for one plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from twin.cost.batch import StepBatch
from twin.cost.handover import HandoverStyle, handover_of
from twin.cost.model import CostModel
from twin.cost.network import Network
from twin.cost.steps import CalibratedSteps
from twin.policy.admission import Admission, Decision
from twin.policy.arrivals import named_seed, named_stream
from twin.sim.clock import Clock
from twin.sim.instance import Instance
from twin.sim.presence import Presence
from twin.sim.request import Request
from twin.sim.run import Run, StepCosts
from twin.sim.sending import Sendings
from twin.sim.targets import Targets
from twin.sim.transfers import Transfers
from twin.spec.cluster import ClusterSpec
from twin.spec.errors import Infeasible
from twin.spec.plan import Plan, PoolPlan

Observer = Callable[[float, str, int, int, int], None]
"""Told of every event: (time, what, request, instance, rank); -1 where there is none."""


class PoolCosts(StepCosts, Protocol):
    """A pool's cost model, as far as the simulation needs it."""

    @property
    def kv_blocks_per_rank(self) -> int: ...

    def kv_transfer_bytes(self, tokens: int) -> float: ...


@dataclass(frozen=True)
class Switches:
    """What changes how the simulation runs, not what it simulates.

    `coalesce` off: one step at a time. `observer` is told of every event of a request, `on_run` of every run of steps
    that an instance has ended.
    """

    coalesce: bool = True
    observer: Observer | None = None
    on_run: Callable[[Instance, Run], None] | None = None


def lay_out(plan: Plan, cluster: ClusterSpec) -> list[list[tuple[int, ...]]]:
    """The GPUs of every instance of every pool: consecutive, pools in their order, each in its node group.

    Raises Infeasible when a group has too few GPUs.
    """
    starts = np.cumsum([0, *[group.gpus for group in cluster.groups]])
    first = {group.name: int(start) for group, start in zip(cluster.groups, starts, strict=False)}
    free = dict(first)
    layout = []
    for pool in plan.pools:
        group = cluster.group(pool.node_group)
        begin = free[group.name]
        free[group.name] += pool.gpus
        if free[group.name] - first[group.name] > group.gpus:
            raise Infeasible(f"the plan puts {free[group.name] - first[group.name]} GPUs on node group {group.name!r}, "
                             f"which has {group.gpus}", constraint="gpus", needed=free[group.name] - first[group.name],
                             available=group.gpus, unit="GPUs")
        layout.append([tuple(range(begin + i * pool.world, begin + (i + 1) * pool.world)) for i in range(pool.instances)])
    return layout


class Service:
    """One plan at work. `ended` is called when a request finishes or is refused. `style` is how KV is handed over (None: as
    the plan's engine does it), `layers` those of the model."""

    def __init__(self, clock: Clock, cluster: ClusterSpec, plan: Plan, costs: Sequence[PoolCosts], *, seed: int,
                 ended: Callable[[Request], None], switches: Switches | None = None, style: HandoverStyle | None = None,
                 layers: int = 1) -> None:
        self.clock, self.plan, self.costs, self.ended = clock, plan, costs, ended
        self.requests: dict[int, Request] = {}
        switches = switches or Switches()
        self._observer, self._on_run = switches.observer, switches.on_run
        self.instances: list[Instance] = []
        for index, (pool, cost, sites) in enumerate(zip(plan.pools, costs, lay_out(plan, cluster), strict=True)):
            for gpus in sites:
                number = len(self.instances)
                self.instances.append(Instance(
                    clock, number, index, pool, cost, cost.kv_blocks_per_rank, gpus, self.requests, self,
                    named_stream(seed, f"mtp/{number}"), coalesce=switches.coalesce))
        style = style or handover_of(plan.engine)
        self.transfers = Transfers(clock, Network(cluster), style) if plan.separated else None
        if self.transfers is not None:
            self._share_links(self.transfers)
        self.entry = self._targets(seed, "prefill" if plan.separated else "mixed")
        self.decode = self._targets(seed, "decode") if plan.separated else self.entry
        self.admission = None if plan.max_outstanding is None else Admission(plan.max_outstanding)
        self.sendings = None
        if self.transfers is not None:
            self.sendings = Sendings(clock, self.transfers, self.decode, style, layers, self._note)
        # What a request spends in the front end before a rank hears of it: it has just missed a step that began meanwhile.
        self._frontend_s = max((float(getattr(cost, "frontend_s", 0.0)) for cost in costs), default=0.0)
        self._outstanding_tokens = 0
        self._outstanding = 0

    def _share_links(self, transfers: Transfers) -> None:
        """KV and the collectives of instances slow one another down where they use the same links."""
        for instance in self.instances:
            # calibrated steps are seconds alone: what they put on links is as of the pool's own cost model
            costs = instance.costs.base if isinstance(instance.costs, CalibratedSteps) else instance.costs
            if isinstance(costs, CostModel) and instance.pool.world > 1:
                presence = Presence(costs, instance.gpus, transfers.changed, instance.retime)
                instance.presence = presence
                transfers.add_neighbour(presence)

    def _targets(self, seed: int, role: str) -> Targets:
        instances = [instance for instance in self.instances if instance.pool.role == role]
        token_s = {index: prefill_token_s(pool, self.costs[index]) if self.plan.router == "predicted_ttft" else 0.0
                   for index, pool in enumerate(self.plan.pools)}
        return Targets(instances, self.plan.router, named_seed(seed, f"router/{role}"),
                       [token_s[instance.pool_index] for instance in instances])

    def submit(self, request: Request) -> Decision:
        """A request comes in: refused, or sent to the rank that will compute its prompt."""
        self._note("arrive", request)
        self.requests[request.id] = request
        decision = self._decide(request)
        if not decision.admitted:
            self._note("reject", request)
            request.status = "rejected"
            self.ended(request)
            return decision
        self._outstanding += 1
        self._outstanding_tokens += request.isl + request.osl
        request.cached_tokens = self._cached_tokens(request)
        output = 0 if self.plan.separated else request.osl
        site = self.entry.choose(request.isl - request.cached_tokens, output, request.cached_tokens)
        request.prefill_instance, request.prefill_rank = site.instance.number, site.rank
        self._note("route", request, site.instance, site.rank)
        self._after(self._frontend_s, lambda: site.instance.enqueue(site.rank, request))
        return decision

    def _after(self, delay_s: float, action: Callable[[], None]) -> None:
        """Do it when a delay is over; at once without one."""
        if delay_s == 0.0:
            action()
            return
        later = self.clock.at(self.clock.now + delay_s)
        assert later.callbacks is not None
        later.callbacks.append(lambda _: action())

    def resume(self, request: Request) -> bool:
        """A request that was in decode before the run began: straight to a rank that decodes. False for one that could not
        be here, because it never fits."""
        if not self._decide(request).admitted:
            return False
        self.requests[request.id] = request
        self._outstanding += 1
        self._outstanding_tokens += request.isl + request.osl
        site = self.decode.choose(0, request.osl)
        request.prefill_instance = request.decode_instance = site.instance.number
        request.prefill_rank = request.decode_rank = site.rank
        site.instance.enqueue(site.rank, request)
        return True

    def _decide(self, request: Request) -> Decision:
        for targets, tokens in ((self.entry, request.isl), (self.decode, request.isl + request.osl - 1)):
            for instance in targets.instances:
                limit = instance.ranks[0].capacity_tokens
                if tokens > limit:
                    return Decision(False, reason=f"{tokens} tokens exceed the KV cache of {limit} tokens a rank")
                pool = instance.pool
                if pool.role != "decode" and pool.chunk_tokens is None and request.isl > pool.max_batch_tokens:
                    return Decision(False, reason=f"a prompt of {request.isl} tokens exceeds a step of "
                                                  f"{pool.max_batch_tokens} without chunked prefill")
        if self.admission is None:
            return Decision(True)
        return self.admission.decide(self._outstanding, self._outstanding_tokens, request.isl + request.osl)

    def _cached_tokens(self, request: Request) -> int:
        """Prompt tokens found in the prefix cache: whole blocks of the shared part, never the whole prompt."""
        pool = self.entry.instances[0].pool
        if not pool.prefix_cache:
            return 0
        return min(request.shared_tokens, request.isl - 1) // pool.block_tokens * pool.block_tokens

    # What instances tell.

    def first_token(self, request: Request, instance: Instance) -> None:
        self._note("first_token", request, instance, request.prefill_rank)
        self.entry.prompt_done(instance, request.prefill_rank, request.isl - request.cached_tokens)

    def prompt_ends(self, request: Request, instance: Instance, rank: int, tokens: int) -> None:
        assert self.sendings is not None, "a prefill pool in a plan that is not separated"
        self.sendings.prompt_ends(request, instance, rank, tokens, self._kv_bytes(request, instance))

    def prefilled(self, request: Request, instance: Instance, rank: int) -> None:
        """The KV stays here until it has been sent to a decode rank."""
        assert self.sendings is not None, "a hand-over in a plan that is not separated"
        self.entry.left(instance, rank, 0)
        self.sendings.prefilled(request, instance, rank, self._kv_bytes(request, instance))

    def _kv_bytes(self, request: Request, source: Instance) -> float:
        return self.costs[source.pool_index].kv_transfer_bytes(request.isl)

    def finished(self, request: Request, instance: Instance, rank: int) -> None:
        self._note("finish", request, instance, rank)
        self._outstanding -= 1
        self._outstanding_tokens -= request.isl + request.osl
        targets = self.entry if instance.pool.role == "prefill" else self.decode
        targets.left(instance, rank, 0 if instance.pool.role == "prefill" else request.osl)
        self.ended(request)

    def preempted(self, request: Request, instance: Instance) -> None:
        self._note("preempt", request, instance)

    def stepped(self, instance: Instance, run: Run) -> None:
        if self._on_run is not None:
            self._on_run(instance, run)

    def _note(self, what: str, request: Request, instance: Instance | None = None, rank: int = -1) -> None:
        if self._observer is not None:
            self._observer(self.clock.now, what, request.id, -1 if instance is None else instance.number, rank)


def prefill_token_s(pool: PoolPlan, cost: StepCosts) -> float:
    """Seconds a prompt token takes in a full step of prefill on all ranks."""
    tokens = min(pool.max_batch_tokens, pool.chunk_tokens or pool.max_batch_tokens)
    return cost.step_s(StepBatch.prefill(np.full(pool.dp, tokens))) / tokens
