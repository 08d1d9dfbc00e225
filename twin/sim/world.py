"""One simulated run from start to end: clients and a service on one clock."""

from __future__ import annotations

from collections.abc import Sequence

from twin.cost.handover import handover_of
from twin.sim.balance import follow_experts
from twin.sim.clients import Clients
from twin.sim.clock import Clock
from twin.sim.service import PoolCosts, Service, Switches
from twin.spec.plan import Plan
from twin.spec.scenario import Scenario


class World:
    """Everything that a run consists of. `run` takes it to the end; tests may `step` it and look in between."""

    def __init__(self, scenario: Scenario, plan: Plan, costs: Sequence[PoolCosts], *, max_requests: int | None = None,
                 switches: Switches | None = None, in_flight: int = 0) -> None:
        self.clock = Clock()
        self.clients = Clients(self.clock, scenario.workload, scenario.seed, max_requests)
        self.service = Service(self.clock, scenario.cluster, plan, costs, seed=scenario.seed,
                               ended=self.clients.request_ended, switches=switches,
                               style=handover_of(plan.engine, scenario.kv_send), layers=scenario.model.layers)
        follow_experts(scenario, self.service.instances)
        self.clients.start(self.service, in_flight)

    @property
    def is_over(self) -> bool:
        return bool(self.clients.done.processed)

    def step(self) -> None:
        """One event."""
        self.clock.step()

    def run(self) -> None:
        """Until every request has ended, and counts or not."""
        self.clock.run(until=self.clients.done)
        self.clock.phase = self.clients.last_phase
        for instance in self.service.instances:
            instance.settle()
        self.clients.count()
